"""LIBERO's demonstrations against its real simulation. Without LIBERO all of this is skipped: see docs/libero.md."""

import json
import os

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
import openpi_layout
import pytest

from envs import libero
from envs.base import Episode
from envs.libero import compat
from envs.libero.experts import make_expert
from z1_jax.collect.__main__ import main
from z1_jax.collect.importers.libero import LiberoFile
from z1_jax.data.dataset import open_dataset

try:
    FOUND, WHY = compat.find(), ""
except ValueError as error:
    FOUND, WHY = None, str(error)
pytestmark = pytest.mark.skipif(FOUND is None, reason=WHY)
SIZE = 32


def record(env, rng, path, late: bool):
    """An expert's chunk of steps as LIBERO's script records it (late), or OpenVLA's, from the real simulation."""
    h5py = pytest.importorskip("h5py")
    from robosuite.utils.transform_utils import quat2axisangle

    def seen():
        observed, look = env._observed, env.observe()
        position, turn = observed["robot0_eef_pos"].copy(), quat2axisangle(observed["robot0_eef_quat"].copy())
        # What LIBERO stores is upside down: the frame before the protocol turns it.
        frames = {name: look.images[name][::-1, ::-1] for name in look.images}
        return look, position, turn, observed["robot0_gripper_qpos"].copy(), frames

    looks, rows, actions = [], [], []
    expert = make_expert(env)
    before = seen()
    for _ in range(12):
        actions.append(expert.act())
        looks.append(before[0])
        env.step_chunk(actions[-1][None])
        after = seen()
        rows.append(after if late else before)
        before = after
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if late:
            data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
            data.attrs["bddl_file_name"] = f"bddl_files/{env.spec.task}.bddl"
        demo = data.create_group("demo_0")
        demo["actions"] = np.stack(actions)
        for place, name in enumerate(("ee_pos", "ee_ori", "gripper_states"), start=1):
            demo[f"obs/{name}"] = np.stack([row[place] for row in rows])
        for camera, name in (("agentview", "agentview_rgb"), ("robot0_eye_in_hand", "eye_in_hand_rgb")):
            demo[f"obs/{name}"] = np.stack([row[4][camera] for row in rows])
    return looks, np.stack(actions)


@pytest.mark.parametrize("late", [True, False])
def test_an_imported_demonstration_is_what_the_policy_sees_and_does(late, rng, tmp_path):
    """Pictures, state, words and actions of a file are those of our environment before each of these actions."""
    env = libero.make("libero_object/7", image_size=SIZE)
    env.reset(Episode(int(rng.integers(100_000_000, 800_000_000))))
    path = tmp_path / env.spec.task.partition("/")[0] / f"{env.spec.task.partition('/')[2]}_demo.hdf5"
    path.parent.mkdir()
    looks, actions = record(env, rng, path, late)
    env.close()
    source = LiberoFile(path)
    assert source.episodes[0].task == env.spec.task
    raw = source.read(source.episodes[0], source.cameras, 1)
    first = int(late)
    np.testing.assert_array_equal(raw.actions, actions[first:])
    assert len(raw.state) == len(looks) - first
    for step, look in enumerate(looks[first:]):
        np.testing.assert_array_equal(raw.state[step].astype(np.float32), look.state)
        for camera, image in look.images.items():
            np.testing.assert_array_equal(raw.images[camera][step], image)
    assert raw.instruction == looks[0].instruction
    assert (raw.actions[:, 6] == -1).all()  # the gripper is open on the way down: the sign is the simulator's


def test_openpis_lerobot_layout_is_what_the_policy_sees_and_does(rng, tmp_path):
    """A dataset as openpi's converter writes it, of a replay in the real simulation, with its option for our names."""
    h5py = pytest.importorskip("h5py")
    env = libero.make("libero_object/7", image_size=SIZE)
    env.reset(Episode(int(rng.integers(100_000_000, 800_000_000))))
    looks, actions = record(env, rng, tmp_path / "replay.hdf5", late=False)
    env.close()
    with h5py.File(tmp_path / "replay.hdf5") as file:
        seen = {key: value[()] for key, value in file["data/demo_0/obs"].items()}
    episode = {  # pictures are turned by 180 degrees, as openpi's client turns what it sees
        "image": np.rot90(seen["agentview_rgb"], 2, axes=(1, 2)),
        "wrist_image": np.rot90(seen["eye_in_hand_rgb"], 2, axes=(1, 2)),
        "state": np.concatenate([seen["ee_pos"], seen["ee_ori"], seen["gripper_states"]], axis=1),
        "actions": actions,
        "task": looks[0].instruction,
    }
    root, out = openpi_layout.write(tmp_path / "lerobot", [episode]), tmp_path / "data"
    main(["collect", f"--from={root}", f"--out={out}", "--stride=1", "--chunk=1", *openpi_layout.FLAGS])
    dataset = open_dataset(out)
    assert len(dataset) == len(looks) and dataset.source["fps"] == env.spec.control_hz == 20
    for record_, look, action in zip(dataset.records(range(len(dataset))), looks, actions, strict=True):
        np.testing.assert_array_equal(record_.state, look.state)
        np.testing.assert_array_equal(record_.actions[0], action.astype(np.float32))  # the gripper's sign, too
        assert record_.instruction == look.instruction and set(record_.images) == set(look.images)
        for camera, image in look.images.items():
            np.testing.assert_array_equal(record_.images[camera], image)
