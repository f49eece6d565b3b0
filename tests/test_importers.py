"""Files of independent writers, read back: h5py, pyarrow and PyAV by published layouts, and LeRobot's own writer."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import demo_files as files
import lerobot_writer as written
import numpy as np
import pytest

from z1_jax.collect.importers.base import BadData
from z1_jax.collect.importers.lerobot import LeRobotDirectory
from z1_jax.collect.importers.orders import ACTION_PARTS, columns
from z1_jax.collect.importers.robomimic import RobomimicFile

REFERENCE = pathlib.Path(__file__).parent / "reference" / "lerobot_datasets"
# Levels of 255 that a colour may be off on a frame's average. LeRobot's frames differ by 6 from their neighbours, the
# random ones by 20 and more; colours that YUV with 8 bits cannot express are off by up to 3.
LOSSLESS, AV1, H264 = 0.0, 2.9, 5.0


def assert_frames(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert got.dtype == np.uint8 and got.shape == expected.shape
    difference = got.astype(int) - expected
    assert np.abs(difference).max() <= (24 if tolerance else 0)
    assert np.abs(difference.mean(axis=(1, 2))).max() <= tolerance


@pytest.mark.parametrize("stride", [1, 4])
def test_robocasa_hdf5_reads_back_as_written(rng, tmp_path, stride):
    demos = files.make_demos(rng, 12)
    source = RobomimicFile(files.write_hdf5(tmp_path / "drawer.hdf5", demos))
    assert [e.name for e in source.episodes] == [f"demo_{i}" for i in range(1, 13)]  # demo_2 before demo_10
    assert {e.task for e in source.episodes} == {"OpenDrawer"} and source.fps == 20
    assert (source.action_dim, source.state_dim, source.cameras) == (12, 16, files.CAMERAS)
    facts = source.facts()
    assert facts["frames"] == sum(len(demo.actions) for demo in demos) and facts["version"] == "1.5.0"
    for reference, demo in zip(source.episodes, demos, strict=True):
        raw = source.read(reference, files.CAMERAS[:2], stride)
        np.testing.assert_array_equal(raw.actions, demo.actions)
        np.testing.assert_array_equal(raw.state, demo.state)
        assert raw.instruction == demo.instruction and set(raw.images) == set(files.CAMERAS[:2])
        for camera in files.CAMERAS[:2]:
            assert_frames(raw.images[camera], demo.images[camera][::stride], LOSSLESS)


def test_a_mask_chooses_demonstrations(rng, tmp_path):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", files.make_demos(rng))
    assert [e.name for e in RobomimicFile(path, "first_2").episodes] == ["demo_1", "demo_2"]
    with pytest.raises(ValueError, match="no mask 'all'; it has first_2"):
        RobomimicFile(path, "all")


@pytest.mark.parametrize("stride", [1, 3])
def test_robocasa_lerobot_is_put_into_raw_order(rng, tmp_path, stride):
    demos = files.make_demos(rng)
    source = LeRobotDirectory(files.write_lerobot(tmp_path / "lerobot", demos))
    assert source.order.count("raw order by meta/modality.json") == 2 and source.flaws == ()
    assert {e.task for e in source.episodes} == {"OpenDrawer"} and set(source.cameras) == set(files.CAMERAS)
    for reference, demo in zip(source.episodes, demos, strict=True):
        raw = source.read(reference, files.CAMERAS, stride)
        np.testing.assert_array_equal(raw.actions, demo.actions)
        np.testing.assert_array_equal(raw.state, demo.state)
        assert raw.instruction == demo.instruction
        for camera in files.CAMERAS:
            assert_frames(raw.images[camera], demo.images[camera][::stride], H264)


def test_without_modality_the_stored_order_is_kept_and_told(rng, tmp_path):
    demos = files.make_demos(rng, 1)
    source = LeRobotDirectory(files.write_lerobot(tmp_path / "lerobot", demos, modality=False))
    assert source.order == "actions in the order that is stored, state in the order that is stored"
    actions, raw = source.read(source.episodes[0], (), 1).actions, demos[0].actions
    np.testing.assert_array_equal(np.concatenate([actions[:, 5:12], actions[:, 0:5]], axis=1), raw)


def test_columns_of_a_modality(rng):
    stored = files.modality_of()["action"]
    expected = [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    assert columns(stored, ACTION_PARTS, 12, "action").tolist() == expected
    assert columns({"arm": {"start": 0, "end": 7}}, ACTION_PARTS, 7, "action") is None
    wrong = {**stored, "gripper_close": {"start": 11, "end": 13}}
    with pytest.raises(ValueError, match="gripper_close has columns 11:13, expected 1"):
        columns(wrong, ACTION_PARTS, 12, "action")
    doubled = {**stored, "gripper_close": {"start": 4, "end": 5}}
    with pytest.raises(ValueError, match="expected each of the 12 columns once"):
        columns(doubled, ACTION_PARTS, 12, "action")


def check_written(path: pathlib.Path, version: str, tolerance: float) -> None:
    """Compares a directory that tests/lerobot_writer.py wrote with its formulas."""
    source = LeRobotDirectory(path)
    assert source.facts()["version"] == version and source.flaws == ()
    assert source.facts()["frames"] == sum(written.LENGTHS)
    assert (source.action_dim, source.state_dim, source.fps) == (written.ACTION_DIM, written.STATE_DIM, written.FPS)
    for reference in reversed(source.episodes):  # files of many episodes are entered anywhere
        episode, steps = reference.number, range(written.LENGTHS[reference.number])
        for stride in (1, 4):
            raw = source.read(reference, written.CAMERAS, stride)
            assert raw.instruction == written.TASKS[episode]
            np.testing.assert_array_equal(raw.state, np.stack([written.state(episode, step) for step in steps]))
            np.testing.assert_array_equal(raw.actions, np.stack([written.action(episode, step) for step in steps]))
            for number, camera in enumerate(written.CAMERAS):
                expected = np.stack([written.frame(number, episode, step) for step in steps[::stride]])
                assert_frames(raw.images[camera], expected, tolerance)


@pytest.mark.parametrize(
    ("name", "version", "tolerance"),
    [("v21_videos", "v2.1", AV1), ("v21_images", "v2.1", LOSSLESS), ("v30_videos", "v3.0", AV1)],
)
def test_what_lerobots_own_writer_wrote(name, version, tolerance):
    check_written(REFERENCE / name, version, tolerance)


def test_lerobots_own_writer_live(tmp_path):
    """Z1_LEROBOT_PYTHON: a Python with lerobot, where that is another than this one."""
    python = os.environ.get("Z1_LEROBOT_PYTHON", sys.executable)
    if "Z1_LEROBOT_PYTHON" not in os.environ and importlib.util.find_spec("lerobot") is None:
        pytest.skip("lerobot is not installed; set Z1_LEROBOT_PYTHON to a Python that has it")
    subprocess.run([*python.split(), written.__file__, str(tmp_path)], check=True, timeout=300)
    version = json.loads((tmp_path / "videos" / "meta" / "info.json").read_text())["codebase_version"]
    check_written(tmp_path / "videos", version, AV1)
    check_written(tmp_path / "images", version, LOSSLESS)


def test_a_split_of_a_lerobot_dataset(rng, tmp_path):
    root = files.write_lerobot(tmp_path / "lerobot", files.make_demos(rng))
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"splits": {"train": "0:2", "test": "2:3"}}))
    assert [e.number for e in LeRobotDirectory(root, "test").episodes] == [2]
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        LeRobotDirectory(root, "val")


def test_other_versions_are_refused(rng, tmp_path):
    root = files.write_lerobot(tmp_path / "lerobot", files.make_demos(rng, 1))
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v1.6"}))
    with pytest.raises(BadData, match="of LeRobot v1.6, expected one of v2.0, v2.1, v3.0"):
        LeRobotDirectory(root)
