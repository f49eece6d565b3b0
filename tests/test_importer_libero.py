"""LIBERO's demonstrations: files of the published layouts, written here by h5py alone, read back."""

import json

import numpy as np
import openpi_layout
import pytest

from z1_jax.collect.__main__ import main
from z1_jax.collect.importers.base import BadData
from z1_jax.collect.importers.detect import open_sources
from z1_jax.collect.importers.libero import LiberoFile
from z1_jax.data.dataset import open_dataset
from z1_jax.errors import UserError

h5py = pytest.importorskip("h5py")
NAME = "libero_object/pick_up_the_milk_and_place_it_in_the_basket"
WIDTHS = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7, "ee_states": 6}


def write(path, rng, late: bool, bddl: str = f"libero/libero/bddl_files/{NAME}.bddl", info=None, steps=(9, 4)):
    """As LIBERO's scripts/create_dataset.py writes it, or (late false) as OpenVLA's regenerate_libero_dataset.py."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if late:
            data.attrs["env_args"] = json.dumps({"env_name": "Libero_Floor", "env_kwargs": {"control_freq": 20}})
            data.attrs["problem_info"] = json.dumps(info or {"language_instruction": list("Pick the milk")})
            data.attrs["bddl_file_name"] = bddl
        for number, count in enumerate(steps):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rng.uniform(-1, 1, (count, 7))
            demo["states"], demo["robot_states"] = rng.normal(size=(count, 40)), rng.normal(size=(count, 9))
            for name, width in WIDTHS.items():
                demo[f"obs/{name}"] = rng.normal(size=(count, width))
            for name in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{name}"] = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return path


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("late", [True, False])
def test_pictures_are_turned_and_each_action_follows_what_it_was_chosen_on(late, stride, rng, tmp_path):
    path = write(tmp_path / f"{NAME}_demo.hdf5", rng, late)
    (source,), flaws = open_sources([path], "", skip_bad=False)
    assert isinstance(source, LiberoFile) and flaws == [] and source.fps == 20
    assert (source.cameras, source.action_dim, source.state_dim) == (("agentview", "robot0_eye_in_hand"), 7, 8)
    assert source.pictures == ()
    with h5py.File(path) as file:
        for reference in source.episodes:
            assert reference.task == NAME
            raw, demo = source.read(reference, source.cameras, stride), file["data"][reference.name]
            count, one = len(demo["actions"]), int(late)
            assert len(raw.actions) == len(raw.state) == count - one
            for step in range(count - one):
                np.testing.assert_array_equal(raw.actions[step], demo["actions"][step + one])
                np.testing.assert_array_equal(raw.state[step, :3], demo["obs/ee_pos"][step])
                np.testing.assert_array_equal(raw.state[step, 3:6], demo["obs/ee_ori"][step])
                np.testing.assert_array_equal(raw.state[step, 6:], demo["obs/gripper_states"][step])
            for camera, stored in (("agentview", "agentview_rgb"), ("robot0_eye_in_hand", "eye_in_hand_rgb")):
                frames = demo[f"obs/{stored}"][: count - one : stride]
                np.testing.assert_array_equal(raw.images[camera], np.rot90(frames, 2, axes=(1, 2)))
            assert raw.instruction == "pick up the milk and place it in the basket"
            assert source.read(reference, (), stride, "carry it").instruction == "carry it"


@pytest.mark.parametrize("late", [True, False])
def test_named_columns_are_turned_and_put_in_time_as_its_own(late, rng, tmp_path, capsys):
    """Also where the usual ones are missing, so that nothing but the task tells that the file is LIBERO's."""
    path = write(tmp_path / f"{NAME}_demo.hdf5", rng, late)
    if late:
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values():
                del demo["obs/ee_pos"], demo["obs/ee_ori"]
    named = ["--state=ee_states,gripper_states", "--images=top:agentview_rgb", "--stride=1", "--chunk=1"]
    if late:
        with pytest.raises(UserError, match=r"has no obs/ee_pos; expected LIBERO's .*--state=COLUMN,COLUMN; it has "):
            main(["collect", f"--from={path}", f"--out={tmp_path / 'data'}", *named[1:]])
    main(["collect", f"--from={path}", f"--out={tmp_path / 'data'}", *named])
    dataset = open_dataset(tmp_path / "data")
    assert len(dataset) == (9 - late) + (4 - late) and tuple(dataset.cameras) == ("top",)
    with h5py.File(path) as file:
        for record in (dataset[i] for i in range(len(dataset))):
            demo, step = file[f"data/demo_{record.episode}"], record.step
            state = np.concatenate([demo["obs/ee_states"][step], demo["obs/gripper_states"][step]])
            np.testing.assert_array_equal(record.state, state.astype("f"))
            np.testing.assert_array_equal(record.actions[0], demo["actions"][step + late].astype("f"))
            np.testing.assert_array_equal(record.images["top"], demo["obs/agentview_rgb"][step][::-1, ::-1])


def test_openpis_lerobot_layout_gives_the_same_decisions(rng, tmp_path, capsys):
    """openpi's dataset is made of OpenVLA's replays, with the pictures turned: both import alike."""
    path = write(tmp_path / f"{NAME}_demo.hdf5", rng, late=False)
    words = "pick up the milk and place it in the basket"
    with h5py.File(path) as file:
        made = [
            {
                "image": demo["obs/agentview_rgb"][()][:, ::-1, ::-1],
                "wrist_image": demo["obs/eye_in_hand_rgb"][()][:, ::-1, ::-1],
                "state": np.concatenate([demo[f"obs/{name}"] for name in ("ee_states", "gripper_states")], axis=1),
                "actions": demo["actions"][()],
                "task": words,
            }
            for demo in file["data"].values()
        ]
    root = openpi_layout.write(tmp_path / "lerobot", made)
    with pytest.raises(UserError, match="has no feature action; it has image, wrist_image, state, actions, "):
        main(["collect", f"--from={root}", f"--out={tmp_path / 'a'}"])
    main(["collect", f"--from={root}", f"--out={tmp_path / 'a'}", "--stride=2", "--chunk=3", *openpi_layout.FLAGS])
    named = ["--state=ee_states,gripper_states", "--stride=2", "--chunk=3"]
    main(["collect", f"--from={path}", f"--out={tmp_path / 'b'}", *named])
    openpis, replays = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert openpis.cameras == replays.cameras and openpis.source["fps"] == replays.source["fps"] == 20
    assert len(openpis) == len(replays) == 5 + 2
    for one, other in zip(openpis.records(range(7)), replays.records(range(7)), strict=True):
        np.testing.assert_array_equal(one.state, other.state)
        np.testing.assert_array_equal(one.actions, other.actions)
        assert one.instruction == other.instruction == words
        for camera in openpis.cameras:
            np.testing.assert_array_equal(one.images[camera], other.images[camera])
    capsys.readouterr()
    main(["collect", f"--check={root}", *openpi_layout.FLAGS[:3]])
    assert "episodes       2, 13 decisions" in capsys.readouterr().out


def test_words_are_the_benchmarks_in_a_suite_and_else_the_files(rng, tmp_path):
    scene = "libero_90/KITCHEN_SCENE10_put_the_black_bowl_in_the_top_drawer_of_the_cabinet"
    source = LiberoFile(write(tmp_path / f"{scene}_demo.hdf5", rng, late=False))
    assert source.episodes[0].task == scene
    words = source.read(source.episodes[0], (), 1).instruction
    assert words == "put the black bowl in the top drawer of the cabinet"
    for number, told in enumerate(("Pick the  milk", list("Pick the milk"), '"pick the milk"')):
        own = write(tmp_path / "mine" / f"{number}.hdf5", rng, True, "tasks/mine.bddl", {"language_instruction": told})
        source = LiberoFile(own)
        assert source.episodes[0].task == "mine"
        assert source.read(source.episodes[0], (), 1).instruction == "pick the milk"
    source = LiberoFile(write(tmp_path / "mine" / "b.hdf5", rng, True, "tasks/mine.bddl", {"other": 1}))
    with pytest.raises(BadData, match="has no instruction; expected language_instruction"):
        source.read(source.episodes[0], (), 1)


def damaged(path, rng, name: str, shape: tuple[int, ...]) -> LiberoFile:
    write(path, rng, True, steps=(6, 1))
    with h5py.File(path, "a") as file:
        del file[f"data/demo_0/obs/{name}"]
        file[f"data/demo_0/obs/{name}"] = np.zeros(shape, np.uint8)
    return LiberoFile(path)


def test_what_does_not_fit_together_is_refused(rng, tmp_path):
    source = damaged(tmp_path / "short.hdf5", rng, "agentview_rgb", (5, 16, 16, 3))
    with pytest.raises(BadData, match="demo_0: agentview has 5 steps, expected the 6 of its actions"):
        source.read(source.episodes[0], source.cameras, 1)
    with pytest.raises(BadData, match="demo_1 has 1 actions, expected at least 2"):
        source.read(source.episodes[1], source.cameras, 1)
    source = damaged(tmp_path / "wide.hdf5", rng, "ee_ori", (6, 4))
    with pytest.raises(BadData, match=r"obs/ee_ori has shape \[6, 4\], expected \[steps, 3\]"):
        source.read(source.episodes[0], (), 1)
