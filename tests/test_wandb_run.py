"""With wandb itself, offline: what it would send is read back from its files."""

import json
import os
import struct
import time

import numpy as np
import pytest
from PIL import Image

from envs.video import write_video
from z1_jax.metrics import MetricsWriter

wandb = pytest.importorskip("wandb", reason="W&B's own package: pip install 'z1-jax[log]'")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def log_records(content: bytes) -> list[bytes]:
    """Records of LevelDB's log format, which W&B's files are in: blocks of 32 KB, and 7 bytes before each piece."""
    records, pieces, at = [], [], 7  # the file's own mark takes the first 7 bytes
    while at + 7 <= len(content):
        if -at % 32768 < 7 and -at % 32768:
            at += -at % 32768  # too little of the block is left for a piece
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        pieces.append(content[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            records.append(b"".join(pieces))
            pieces = []
    return records


def sent(run_dir) -> tuple[set[str], list[dict]]:
    """Ids of the pages that were written to, and every row of their history in order."""
    from wandb.proto import wandb_internal_pb2

    ids, rows = set(), []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return ids, rows


def write(run_dir, first: int, last: int) -> None:
    film = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    path = write_video(run_dir / "videos" / "before_seed7.webp", film, fps=20)
    with MetricsWriter(run_dir, wandb_project="test", config={"seed": last}) as writer:
        writer.evaluation("before", 0, {"rate": 0.25, "interval": [0.1, 0.5]})
        writer.video("before_seed7", 0, path, False)
        for step in range(first, last):
            writer.write("grpo", step, {"success": step / 10, "note": "words"})
        writer.evaluation("after", last, {"rate": 0.75, "interval": [0.5, 0.9]})


def test_a_run_that_goes_on_is_the_same_page(tmp_path):
    write(tmp_path, 0, 2)
    ids, _ = sent(tmp_path)
    time.sleep(1.1)  # W&B names its folder by the second
    write(tmp_path, 2, 4)
    again, rows = sent(tmp_path)
    assert ids == again and len(ids) == 1 and ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    steps = [(row["grpo/step"], row["grpo/success"]) for row in rows if "grpo/step" in row]
    assert steps == [(step, step / 10) for step in range(4)]
    assert [row["evaluation/before/success"] for row in rows if "evaluation/before/success" in row] == [0.25]  # once
    after = [(r["evaluation/after/step"], r["evaluation/after/success"]) for r in rows if "evaluation/after/step" in r]
    assert after == [(2, 0.75), (4, 0.75)]  # evaluated anew after more iterations
    kinds = [row["videos/before_seed7/_type"] for row in rows if "videos/before_seed7/_type" in row]
    assert kinds == ["video-file"]
    assert [row["_step"] for row in rows] == list(range(1, len(rows) + 1))  # one count
    files = list(tmp_path.glob("wandb/offline-run-*/files/media/videos/**/*.gif"))
    assert len(files) == 1
    with Image.open(files[0]) as image:
        assert image.n_frames == 5 and image.size == (16, 16)


def test_a_page_that_the_user_names_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    write(tmp_path, 0, 1)
    time.sleep(1.1)
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    write(tmp_path, 1, 2)
    assert sent(tmp_path)[0] == {"mine"} and os.environ["WANDB_RUN_ID"] == "another"
