"""HDF5 files whose columns have names of their own: robomimic's, LIBERO's, and layouts without either's groups."""

import re

import demo_files as files
import numpy as np
import pytest

from z1_jax.collect.__main__ import main
from z1_jax.data.dataset import open_dataset
from z1_jax.errors import UserError

h5py = pytest.importorskip("h5py")
EVERY = ("--stride=1", "--chunk=1")


def collect(source, out, *options):
    main(["collect", f"--from={source}", f"--out={out}", *EVERY, *options])
    return open_dataset(out)


def episode(rng, steps: int) -> dict[str, np.ndarray]:
    return {
        "arm": rng.normal(size=(steps, 6)),
        "finger": rng.normal(size=steps),
        "commands": rng.uniform(-1, 1, (steps, 7)),
        "front": rng.integers(0, 256, (steps, 12, 16, 3), dtype=np.uint8),
        "wrist": rng.integers(0, 256, (steps, 12, 16, 3), dtype=np.uint8),
    }


def check(dataset, made, cameras):
    """Every record holds the joined state, the action and the frames of its step."""
    assert [row.steps for row in dataset.episodes] == [len(one["commands"]) for one in made]
    for record in (dataset[i] for i in range(len(dataset))):
        one, step = made[record.episode], record.step
        state = np.concatenate([one["finger"][step : step + 1], one["arm"][step]])
        np.testing.assert_array_equal(record.state, state.astype("f"))
        np.testing.assert_array_equal(record.actions[0], one["commands"][step].astype("f"))
        assert set(record.images) == set(cameras)
        for camera, column in cameras.items():
            np.testing.assert_array_equal(record.images[camera], one[column][step])


def test_groups_of_another_layout(rng, tmp_path, capsys):
    """Demonstrations in groups of the file itself, a gripper without an axis, no rate, no words."""
    made = [episode(rng, steps) for steps in (5, 7, 4)]
    path = tmp_path / "mine.h5"
    with h5py.File(path, "w") as file:
        file["notes"] = "none"
        file.create_group("calibration")["camera"] = np.eye(3)
        for number, one in enumerate(made):
            group = file.create_group(f"run_{number}")
            group["robot/arm"], group["robot/finger"], group["commands"] = one["arm"], one["finger"], one["commands"]
            group["cams/front"], group["cams/wrist"] = one["front"], one["wrist"]
    named = ["--state=robot/finger,robot/arm", "--actions=commands", "--images=left:cams/wrist,top:cams/front"]
    with pytest.raises(UserError, match="has no instruction; .*--instruction=TEXT"):
        collect(path, tmp_path / "data", *named)
    words = ["--instruction=wipe the table", "--rate=30"]
    dataset = collect(path, tmp_path / "data", *named, *words)
    check(dataset, made, {"left": "wrist", "top": "front"})
    assert {(row.task, row.instruction) for row in dataset.episodes} == {("mine", "wipe the table")}
    assert dataset.source["fps"] == 30 and tuple(dataset.cameras) == ("left", "top")
    said = capsys.readouterr().out
    assert (
        "actions from commands as stored; state: robot/finger + robot/arm, left from cams/wrist, top from cams/front; "
        "pictures as stored"
    ) in said
    # The same names for a check; without them it says what to name.
    main(["collect", f"--check={path}", *named, words[0]])
    out = capsys.readouterr().out
    assert "episodes       3, 16 decisions" in out and "broken" not in out
    with pytest.raises(
        UserError, match=r"has no group data, which robomimic's have; it has .*run_0/cams/front \[5, 12, 16, 3\]"
    ):
        main(["collect", f"--check={path}"])
    with pytest.raises(UserError, match="is a dataset of ours, whose columns"):
        main(["collect", f"--check={tmp_path / 'data'}", "--state=arm"])
    with pytest.raises(UserError, match="exists with sources"):
        collect(path, tmp_path / "data", "--state=robot/arm,robot/finger", *named[1:], *words)


def test_a_file_for_each_episode(rng, tmp_path, capsys):
    """ALOHA's layout: observations and action in the file itself; the folder is the task."""
    made = [episode(rng, steps) for steps in (6, 4)]
    (tmp_path / "fold").mkdir()
    for number, one in enumerate(made):
        with h5py.File(tmp_path / "fold" / f"episode_{number}.hdf5", "w") as file:
            file.attrs["sim"] = False
            file["action"] = one["commands"]
            file["observations/qpos"] = np.concatenate([one["finger"][:, None], one["arm"]], axis=1)
            file["observations/images/cam_high"] = one["front"]
    table = tmp_path / "words.json"
    table.write_text('{"episode_0": "fold the towel", "1": "fold the shirt"}')
    named = ["--state=observations/qpos", "--actions=action", "--images=cam_high:observations/images/cam_high"]
    dataset = collect(tmp_path / "fold", tmp_path / "data", *named, f"--instructions={table}")
    check(dataset, made, {"cam_high": "front"})
    assert [(row.task, row.instruction) for row in dataset.episodes] == [
        ("fold", "fold the towel"),
        ("fold", "fold the shirt"),
    ]
    assert dataset.source["fps"] is None
    with h5py.File(tmp_path / "fold" / "episode_1.hdf5", "r+") as file:
        del file["observations/images/cam_high"]
        file["observations/images/cam_high"] = np.zeros((4, 900), np.uint8)  # JPEG, padded
    with pytest.raises(UserError, match=r"episode_1: observations/images/cam_high has shape \[4, 900\], .*encoded"):
        collect(tmp_path / "fold", tmp_path / "other", *named, "--instruction=fold")


def test_named_columns_of_robomimics_layout(rng, tmp_path, capsys):
    """A name is looked for in the group, then in its obs; words and rate are the file's."""
    demos = files.make_demos(rng)
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    named = ["--state=obs/robot0_gripper_qpos,robot0_base_pos", f"--images=front:{files.CAMERAS[1]}_image"]
    dataset = collect(path, tmp_path / "data", *named)
    for record in (dataset[i] for i in range(len(dataset))):
        demo, step = demos[record.episode], record.step
        seen = demo.observations
        state = np.concatenate([seen["robot0_gripper_qpos"][step], seen["robot0_base_pos"][step]])
        np.testing.assert_array_equal(record.state, state.astype("f"))
        np.testing.assert_array_equal(record.actions[0], demo.actions[step].astype("f"))
        np.testing.assert_array_equal(record.images["front"], demo.images[files.CAMERAS[1]][step])
        assert record.instruction == demo.instruction
    assert dataset.source["fps"] == 20
    assert len(collect(path, tmp_path / "first", *named, "--split=first_2").episodes) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--state=obs", r"option --state: .*demo_1 has no column obs; it has actions \[9, 12\], obs/robot0_"),
        ("--state=robot0_arm", r"option --state: .*demo_1 has no column robot0_arm; it has actions"),
        ("--actions=action", r"option --actions: .*demo_1 has no column action; it has actions"),
        ("--images=front:front_image", r"option --images: .*demo_1 has no column front_image; it has actions"),
        ("--state=robot0_eye_in_hand_image", r"robot0_eye_in_hand_image has shape \[9, 32, 32, 3\], expected \[steps"),
        ("--images=front:robot0_base_pos", r"robot0_base_pos has shape \[9, 3\], expected images"),
        ("--tolerance-s=0.01", "option --tolerance-s: .*drawer.hdf5 is HDF5; it is for LeRobot"),
        ("--task-changes=split", "option --task-changes=split: .*drawer.hdf5 is HDF5; it is for LeRobot"),
        ("--rate=-1", "argument --rate: got -1, expected 0.1 to 10000"),
    ],
)
def test_names_that_cannot_be(rng, tmp_path, capsys, option, message):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", files.make_demos(rng))
    with pytest.raises(UserError, match=message) as error:
        collect(path, tmp_path / "data", option)
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


def test_a_later_episode_without_a_named_column_may_be_left_out(rng, tmp_path, capsys):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", files.make_demos(rng))
    with h5py.File(path, "r+") as file:
        del file["data/demo_2/obs/robot0_gripper_qpos"]
    with pytest.raises(UserError, match=r"demo_2 has no column robot0_gripper_qpos; it has .*; --skip-bad"):
        collect(path, tmp_path / "data", "--state=robot0_gripper_qpos")
    dataset = collect(path, tmp_path / "data", "--state=robot0_gripper_qpos", "--skip-bad")
    assert len(dataset.episodes) == 2 and re.search("demo_2 has no column", dataset.source["left_out"][0])
