"""A LeRobot dataset as openpi's examples/libero/convert_libero_data_to_lerobot.py writes it, by pyarrow alone.

Pictures lie in the table as PNG; columns are image, wrist_image, state (8) and actions (7); it says 10 frames a second.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

FLAGS = ("--state=state", "--actions=actions", "--images=agentview:image,robot0_eye_in_hand:wrist_image", "--rate=20")


def write(root: pathlib.Path, episodes: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Each episode has image and wrist_image uint8 [N, S, S, 3], state [N, 8], actions [N, 7], and its task, a text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tasks = list(dict.fromkeys(episode["task"] for episode in episodes))
    size = episodes[0]["image"].shape[1]
    picture = {"dtype": "image", "shape": [size, size, 3], "names": ["height", "width", "channel"]}
    numbers = {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index")}
    features = {
        "image": picture,
        "wrist_image": picture,
        "state": {"dtype": "float32", "shape": [8], "names": ["state"]},
        "actions": {"dtype": "float32", "shape": [7], "names": ["actions"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **numbers,
        "index": numbers["frame_index"],
        "task_index": numbers["frame_index"],
    }
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    first = 0
    for number, episode in enumerate(episodes):
        count = len(episode["actions"])
        table = {
            camera: [{"bytes": _png(frame), "path": f"frame_{i:06d}.png"} for i, frame in enumerate(episode[camera])]
            for camera in ("image", "wrist_image")
        }
        table |= {key: list(np.asarray(episode[key], np.float32)) for key in ("state", "actions")}
        table |= {
            "timestamp": (np.arange(count) / 10).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": first + np.arange(count),
            "task_index": np.full(count, tasks.index(episode["task"])),
        }
        pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{number:06d}.parquet")
        first += count
    info = {
        "codebase_version": "v2.1",
        "robot_type": "panda",
        "total_episodes": len(episodes),
        "total_frames": first,
        "chunks_size": 1000,
        "fps": 10,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    for name, rows in (
        ("tasks", [{"task_index": i, "task": task} for i, task in enumerate(tasks)]),
        (
            "episodes",
            [{"episode_index": i, "tasks": [e["task"]], "length": len(e["actions"])} for i, e in enumerate(episodes)],
        ),
    ):
        (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _png(frame: np.ndarray) -> bytes:
    place = io.BytesIO()
    Image.fromarray(frame).save(place, "PNG")
    return place.getvalue()
