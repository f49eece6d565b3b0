"""Files that are written whole."""

import pytest

from z1_jax.files import partial_path, write_whole


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
