"""Files that are written whole."""

import contextlib
import os
import pathlib
import resource

import numpy as np
import pytest

from z1_jax.errors import UserError
from z1_jax.files import hold, partial_path, read_json, write_whole, writing
from z1_jax.metrics import MetricsWriter
from z1_jax.rl.diagnostics import save_broken


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "π0.5\n")
    assert path.read_bytes() == "π0.5\n".encode() and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    partial_path(path).mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        write_whole(path, b"new")
    assert path.read_bytes() == "π0.5\n".encode()
    partial_path(path).rmdir()
    partial_path(path).write_text("a half, left by a kill")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and not partial_path(path).exists()


@contextlib.contextmanager
def small_disk(most: int = 100):
    """No file may grow beyond `most` bytes: as on a full disk, writing fails at a file that is open."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_records(path: pathlib.Path) -> None:
    with MetricsWriter(path.parent) as writer:
        for step in range(10):
            writer.write("sft", step, {"loss": 0.5})


WRITERS = {
    "a.json": lambda path: write_whole(path, "x" * 1000),
    "metrics.jsonl": write_records,
    "broken/iteration-3.npz": lambda path: save_broken(path.parents[1], 3, {"seeds": np.arange(1000)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_path(name, tmp_path):
    with small_disk(), pytest.raises(OSError) as told:
        WRITERS[name](tmp_path / name)
    assert str(tmp_path / name) in str(told.value) and "File too large" in str(told.value)


def test_a_path_that_is_named_stays(tmp_path):
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), writing(tmp_path):
        open("elsewhere")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[" * 100_000, b"3", b"null", b'"text"'])
@pytest.mark.parametrize("kind", [list, dict])
def test_a_damaged_file_is_one_line(content, kind, tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path, kind, kind()) == kind()
    path.write_bytes(content)
    with pytest.raises(UserError) as told:
        read_json(path, kind, kind())
    assert f"{path} is damaged" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_one_line(make, tmp_path):
    make(tmp_path / ".lock")
    for use in (lambda: hold(tmp_path), lambda: read_json(tmp_path / ".lock", dict, {})):
        with pytest.raises(UserError, match=r"\.lock is no file: move it away"):
            use()


def test_a_lock_of_any_content_is_taken(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe" * 100)
    hold(tmp_path)
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
