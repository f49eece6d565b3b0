"""The built-in kitchen: exact branching, randomisation, controller, thresholds, renderer, experts."""

import itertools
import os
import pathlib
import pickle
import subprocess
import sys

import mujoco
import numpy as np
import pytest
from PIL import Image

from envs.base import Env, Episode
from envs.kitchen import CAMERAS, DEFAULT_CAMERAS, LAYOUTS, STYLES, TASKS, KitchenEnv, make
from envs.kitchen import render as renderer
from envs.kitchen.experts import make_expert
from envs.kitchen.fixtures import BURNERS
from envs.kitchen.robot import angles_of, exponential, logarithm, rotation
from envs.kitchen.scene import material_rgb

ALL_TASKS = tuple(TASKS)


def wandering(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Random actions [steps, 12] of which about a fifth move the base."""
    actions = rng.uniform(-1, 1, (steps, 12))
    actions[:, 11] = np.where(rng.random(steps) < 0.2, 1.0, -1.0)
    return actions


def expert_actions(env: KitchenEnv, steps: int) -> None:
    """Lets the expert act, so that the hand gets into contact."""
    expert = make_expert(env)
    for _ in range(steps):
        env.step_chunk(expert.act()[None])


def trace(env: KitchenEnv, actions: np.ndarray) -> list[np.ndarray]:
    """Full physics after each action, and the last picture."""
    states = []
    for action in actions:
        env.step_chunk(action[None])
        states.append(env.snapshot().physics)
    return [*states, *env.observe().images.values(), env.observe().state]


def assert_same(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_replay_after_restore_is_exact_to_the_bit(task, seed):
    rng = np.random.default_rng(seed)
    env = make(task, image_size=16, style=tuple(STYLES))
    env.reset(Episode(seed))
    expert_actions(env, 12)
    snapshot = env.snapshot()
    actions = wandering(rng, 15)
    expected = trace(env, actions)
    after = (env.steps, env.success)

    env.restore(snapshot)
    assert_same(trace(env, actions), expected)
    assert (env.steps, env.success) == after

    other = make(task, image_size=16, style=tuple(STYLES))
    other.reset(Episode(seed + 1))
    expert_actions(other, 5)
    other.restore(pickle.loads(pickle.dumps(snapshot)))
    assert_same(trace(other, actions), expected)
    assert other.observe().instruction == env.observe().instruction


def test_replay_in_another_process_is_exact_to_the_bit(seed, tmp_path):
    rng = np.random.default_rng(seed)
    env = make("PnPCounterToSink", image_size=16)
    env.reset(Episode(seed))
    expert_actions(env, 25)
    given = tmp_path / "in.pickle"
    actions = wandering(rng, 15)
    given.write_bytes(pickle.dumps((env.snapshot(), actions)))
    expected = trace(env, actions)
    code = (
        "import pickle, sys, pathlib; from envs.kitchen import make; from test_kitchen import trace\n"
        "snapshot, actions = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "env = make('PnPCounterToSink', image_size=16); env.restore(snapshot)\n"
        "pathlib.Path(sys.argv[2]).write_bytes(pickle.dumps(trace(env, actions)))"
    )
    out = tmp_path / "out.pickle"
    subprocess.run([sys.executable, "-c", code, given, out], check=True, timeout=120, env=_child_environment())
    assert_same(pickle.loads(out.read_bytes()), expected)


def _child_environment() -> dict[str, str]:
    tests = pathlib.Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}


def test_restore_brings_back_latches_counters_and_rng(seed):
    env = make("CoffeePressButton", image_size=48)
    env.reset(Episode(seed))
    fresh = env.snapshot()
    env.world.set_joint("coffee_button", 0.012)
    env.task.update(env.world)
    lit = env.observe().images[CAMERAS[0]]
    pressed = env.snapshot()
    env.restore(fresh)
    assert not env.world.memory["on"] and not np.array_equal(env.observe().images[CAMERAS[0]], lit)
    env.restore(pressed)
    assert env.world.memory["on"]
    assert env.snapshot().extra["rng"] == fresh.extra["rng"]


def test_restore_rejects_another_task():
    snapshot = make("OpenDrawer", image_size=8).snapshot()
    with pytest.raises(ValueError, match="kitchen/OpenDrawer.*expected 'kitchen/TurnOnStove'"):
        make("TurnOnStove", image_size=8).restore(snapshot)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_equal_seeds_give_equal_episodes_and_others_differ(task, seed):
    first, second = make(task, image_size=16), make(task, image_size=16)
    second.reset(Episode(seed + 1))
    expert_actions(second, 3)
    actions = wandering(np.random.default_rng(seed), 5)
    runs = []
    for env in (first, second):
        env.reset(Episode(seed))
        runs.append([*env.observe().images.values(), *trace(env, actions)])
    assert_same(*runs)

    first.reset(Episode(seed))
    one = first.observe()
    first.reset(Episode(seed + 1))
    two = first.observe()
    assert not np.array_equal(one.state, two.state)
    assert all(not np.array_equal(one.images[camera], two.images[camera]) for camera in DEFAULT_CAMERAS)


def test_rendering_changes_no_physics(seed):
    actions = wandering(np.random.default_rng(seed), 10)
    seen, unseen = make("TurnOnSinkFaucet", image_size=8), make("TurnOnSinkFaucet", image_size=8)
    for env in (seen, unseen):
        env.reset(Episode(seed))
    for action in actions:
        seen.observe()
        seen.render(CAMERAS[2], 20)
        seen.step_chunk(action[None])
        unseen.step_chunk(action[None])
    np.testing.assert_array_equal(seen.snapshot().physics, unseen.snapshot().physics)


def test_no_object_is_ever_welded():
    assert all(make(task, image_size=8).world.model.neq == 0 for task in ALL_TASKS)


# --- the robot -------------------------------------------------------------------------------------------------------


def still(env: KitchenEnv, steps: int = 10) -> None:
    action = np.zeros(12)
    action[11] = -1.0
    env.step_chunk(np.tile(action, (steps, 1)))


@pytest.mark.parametrize("axis, sign", list(itertools.product(range(3), (1.0, -1.0))))
def test_a_unit_of_position_moves_the_hand_five_centimetres(axis, sign, seed):
    env = make("TurnOnMicrowave", image_size=8)
    env.reset(Episode(seed))
    still(env, 3)
    before = env.observe().state
    action = np.zeros(12)
    action[axis], action[11] = sign, -1.0
    env.step_chunk(action[None])
    still(env)
    after = env.observe().state
    moved = np.zeros(3)
    moved[axis] = 0.05 * sign
    np.testing.assert_allclose(after[7:10] - before[7:10], moved, atol=0.003)
    np.testing.assert_allclose(after[:7], before[:7], atol=1e-3)
    np.testing.assert_allclose(after[10:14], before[10:14], atol=0.01)


def _matrix_of_xyzw(quat: np.ndarray) -> np.ndarray:
    """The textbook formula, written out."""
    x, y, z, w = quat
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@pytest.mark.parametrize("axis", range(3))
def test_a_unit_of_rotation_turns_the_hand_half_a_radian_about_the_bases_axis(axis, seed):
    env = make("TurnOnMicrowave", image_size=8)
    env.reset(Episode(seed))
    still(env, 3)
    before = _matrix_of_xyzw(env.observe().state[10:14])
    action = np.zeros(12)
    action[3 + axis], action[11] = 1.0, -1.0
    env.step_chunk(action[None])
    still(env)
    state = env.observe().state
    turn = _matrix_of_xyzw(state[10:14]) @ before.T
    cos, sin = np.cos(0.5), np.sin(0.5)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    expected = np.eye(3)
    expected[i, i], expected[i, j], expected[j, i], expected[j, j] = cos, -sin, sin, cos
    np.testing.assert_allclose(turn, expected, atol=0.02)
    assert state[13] >= 0


def test_state_is_the_hands_pose_in_the_bases_frame(seed):
    env = make("OpenDrawer", image_size=8)
    env.reset(Episode(seed))
    env.step_chunk(wandering(np.random.default_rng(seed), 20))
    world, state = env.world, env.observe().state
    base = world.data.body("base")
    frame = base.xmat.reshape(3, 3)
    np.testing.assert_allclose(state[:3], base.xpos, atol=1e-6)
    np.testing.assert_allclose(_matrix_of_xyzw(state[3:7]), frame, atol=1e-6)
    np.testing.assert_allclose(state[7:10], frame.T @ (world.site("eef") - base.xpos), atol=1e-6)
    hand = world.data.site("eef").xmat.reshape(3, 3)
    np.testing.assert_allclose(_matrix_of_xyzw(state[10:14]), frame.T @ hand, atol=1e-6)


def test_base_mode_moves_the_base_and_arm_mode_holds_it(seed):
    env = make("TurnOnSinkFaucet", image_size=8)
    env.reset(Episode(seed))
    action = np.zeros(12)
    action[[0, 7, 8, 9, 10]] = 1.0, -1.0, 1.0, -1.0, 1.0
    action[11] = -1.0
    before = env.observe().state
    env.step_chunk(action[None])
    still(env)
    held = env.observe().state
    np.testing.assert_allclose(held[:7], before[:7], atol=1e-3)
    assert held[7] - before[7] > 0.04
    action[11] = 1.0
    env.step_chunk(np.tile(action, (4, 1)))
    still(env)
    moved = env.observe().state
    assert moved[0] < -0.05 and moved[1] > 0.05  # backwards, to the left
    assert 2 * np.arctan2(moved[5], moved[6]) == pytest.approx(-4 * 0.05, abs=0.03)
    np.testing.assert_allclose(moved[7:10] - held[7:10], [0, 0, 4 * 0.01], atol=0.005)  # the torso rose, the arm held


def test_gripper_closes_with_plus_one_and_opens_with_minus_one(seed):
    env = make("TurnOnSinkFaucet", image_size=8)
    env.reset(Episode(seed))
    action = np.zeros(12)
    action[11] = -1.0
    widths = []
    for command in (1.0, -1.0):
        action[6] = command
        env.step_chunk(np.tile(action, (10, 1)))
        state = env.observe().state
        widths.append(state[14] - state[15])
    assert widths[0] < 0.005 and widths[1] > 0.08


def test_rotations_invert(seed):
    rng = np.random.default_rng(seed)
    angles = rng.uniform([-0.9, -1.2, -2.9], [2.1, 1.2, 2.9])
    np.testing.assert_allclose(angles_of(rotation(angles)), angles, atol=1e-9)
    vector = rng.uniform(-1, 1, 3)
    np.testing.assert_allclose(logarithm(exponential(vector)), vector, atol=1e-9)


@pytest.mark.parametrize("shape", [(12,), (3, 11), (2, 3, 12)])
def test_wrong_action_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"actions have shape .*expected \[E, 12\]"):
        make("OpenDrawer", image_size=8).step_chunk(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_rejected_before_anything_moves(bad):
    env = make("OpenDrawer", image_size=8)
    before = env.snapshot().physics
    actions = np.zeros((4, 12))
    actions[2, 5] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[2\]"):
        env.step_chunk(actions)
    np.testing.assert_array_equal(env.snapshot().physics, before)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"task": "OpenDoor"}, "unknown kitchen task 'OpenDoor'.*OpenDrawer"),
        ({"cameras": ("left",)}, "unknown camera.*robot0_agentview_left"),
        ({"layout": "round"}, "unknown layout.*straight"),
        ({"style": ("oak", "gold")}, "unknown style.*gold.*oak"),
        ({"horizon": 0}, "must be positive"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        make(**{"task": "OpenDrawer", **arguments})


# --- episodes --------------------------------------------------------------------------------------------------------


def test_spec_and_observation_agree(seed):
    env = make("TurnOnStove", cameras=CAMERAS[1:], image_size=24, horizon=40)
    assert isinstance(env, Env)
    env.reset(Episode(seed))
    seen = env.observe()
    assert tuple(seen.images) == env.spec.cameras == CAMERAS[1:]
    assert all(image.shape == (24, 24, 3) and image.dtype == np.uint8 for image in seen.images.values())
    assert seen.state.shape == (16,) and seen.state.dtype == np.float32
    assert (env.spec.horizon, env.spec.control_hz, env.spec.action_dim) == (40, 20.0, 12)
    assert seen.instruction in {f"turn on the {burner} burner of the stove" for burner in BURNERS}


def test_chunk_stops_at_the_horizon(seed):
    env = make("OpenDrawer", image_size=8, horizon=10)
    env.reset(Episode(seed))
    idle = np.zeros((8, 12))
    first, second, third = (env.step_chunk(idle) for _ in range(3))
    assert (first.steps, first.done) == (8, False)
    assert (second.steps, second.done, second.success) == (2, True, False)
    assert (third.steps, third.done) == (0, True)
    assert first.simulate_s > 0


def test_success_is_latched_and_ends_the_chunk(seed):
    env = make("TurnOnSinkFaucet", image_size=8)
    env.reset(Episode(seed))
    expert, actions = make_expert(env), []
    while not env.success:
        actions.append(expert.act())
        env.step_chunk(actions[-1][None])
    steps = env.steps
    env.reset(Episode(seed))
    beyond = np.concatenate([actions, np.zeros((5, 12))])
    result = env.step_chunk(beyond)
    assert (result.steps, result.success, result.done) == (steps, True, True)
    assert env.step_chunk(beyond).steps == 0 and env.success


# RoboCasa's thresholds: (task, joint, values that solve it, values that do not).
THRESHOLDS = [
    ("TurnOnSinkFaucet", "faucet_handle", (0.41, 1.4), (0.0, 0.39)),
    ("OpenDrawer", "drawer", (0.951 * 0.25, 0.25), (0.0, 0.949 * 0.25)),
    ("CloseSingleDoor", "door", (0.0, 0.049 * np.pi / 2), (0.051 * np.pi / 2, 1.5)),
]


@pytest.mark.parametrize("task, joint, solved, unsolved", THRESHOLDS)
def test_success_thresholds(task, joint, solved, unsolved):
    env = make(task, image_size=8)
    for value, expected in [(v, True) for v in solved] + [(v, False) for v in unsolved]:
        env.world.set_joint(joint, value)
        assert env.task.success(env.world) is expected, value


def test_stove_counts_only_the_burner_that_was_asked_for(seed):
    env = make("TurnOnStove", image_size=8)
    env.reset(Episode(seed))
    world, knob = env.world, env.world.memory["knob"]
    assert BURNERS[knob] in env.observe().instruction
    world.set_joint(f"knob {(knob + 1) % 4}", 1.0)
    assert not env.task.success(world)
    for value, expected in ((0.34, False), (0.36, True)):
        world.set_joint(f"knob {knob}", value)
        assert env.task.success(world) is expected


@pytest.mark.parametrize(
    "task, button", [("CoffeePressButton", "coffee_button"), ("TurnOnMicrowave", "microwave_start")]
)
def test_buttons_latch_and_ask_the_hand_to_leave(task, button, seed):
    env = make(task, image_size=8)
    env.reset(Episode(seed))
    world = env.world

    def hand_at(distance: float) -> None:
        address = world.controller.arm_qpos[:3]
        world.data.qpos[address] += world.site(button) - [distance, 0, 0] - world.eef
        world.update()

    hand_at(0.16)
    assert not env.task.success(world)
    world.set_joint(button, 0.007)
    env.task.update(world)
    world.set_joint(button, 0.0)
    world.update()
    env.task.update(world)
    for distance, expected in ((0.14, False), (0.16, True)):
        hand_at(distance)
        assert env.task.success(world) == expected


def test_pick_and_place_needs_the_right_object_in_the_basin_and_a_free_hand(seed):
    env = make("PnPCounterToSink", image_size=8)
    env.reset(Episode(seed))
    world = env.world
    target = world.memory["target"]
    other = next(name for name in env.task.things if name != target)
    bottom = world.position("sink") + [0, 0, -0.10]

    def solved(name: str, place: np.ndarray) -> bool:
        env.reset(Episode(seed))
        world.place(name, place, 0.0)
        world.update()
        return env.task.success(world)

    assert target in env.observe().instruction
    assert solved(target, bottom)
    assert not solved(other, bottom)
    assert not solved(target, bottom + [0, 0, 0.12])  # above the rim
    assert not solved(target, bottom + [0, 0.25, 0])  # beside the basin
    env.reset(Episode(seed))
    world.place(target, bottom, 0.0)
    world.update()
    address = world.controller.arm_qpos[:3]
    for distance, expected in ((0.24, False), (0.26, True)):
        world.data.qpos[address] += world.position(target) + [0, 0, distance] - world.eef
        world.update()
        assert env.task.success(world) == expected


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("camera", CAMERAS)
def test_a_point_shows_where_a_pinhole_camera_puts_it(camera, seed):
    """The coffee machine's lamp, lit: its pixels surround its projection, computed here without the renderer."""
    env = make("CoffeePressButton", image_size=64)
    env.reset(Episode(seed))
    world, size = env.world, 200
    dark = env.render(camera, size).astype(int)
    world.memory["on"] = True
    env.task.update(world)
    changed = np.argwhere(np.abs(env.render(camera, size) - dark).sum(axis=-1) > 30)
    view = world.data.camera(camera)
    lamp = view.xmat.reshape(3, 3).T @ (world.data.geom("lamp/coffee").xpos - view.xpos)
    focal = size / 2 / np.tan(np.radians(world.model.camera(camera).fovy[0]) / 2)
    expected = np.array([size / 2 - focal * lamp[1] / -lamp[2], size / 2 + focal * lamp[0] / -lamp[2]])
    low, high = changed.min(axis=0), changed.max(axis=0)
    assert (low - 1 <= expected).all() and (expected <= high + 2).all(), (expected, low, high)


@pytest.mark.skipif("normal" not in (mujoco.mj_multiRay.__doc__ or ""), reason="this MuJoCo gives no normals")
@pytest.mark.parametrize("task", ["TurnOnSinkFaucet", "PnPCounterToSink", "TurnOnStove"])
def test_normals_agree_with_mujocos(task, seed):
    env = make(task, image_size=8)
    env.reset(Episode(seed))
    model, data = env.world.model, env.world.data
    rng = np.random.default_rng(seed)
    rays = rng.normal(size=(3000, 3)) + [1.0, 0, -0.3]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    eye = env.task.focus(LAYOUTS[env.layout]) + [-0.4, 0.1, 0.3]
    ids, distance, normal = np.empty(3000, np.int32), np.empty(3000), np.empty((3000, 3)).ravel()
    groups = np.array([1, 1, 0, 0, 0, 0], np.uint8)
    mujoco.mj_multiRay(model, data, eye, rays.ravel(), groups, 1, -1, ids, distance, normal, 3000, 20.0)
    hit = ids >= 0
    assert hit.mean() > 0.5
    frames = data.geom_xmat[ids[hit]].reshape(-1, 3, 3)
    points = eye + rays[hit] * distance[hit, None] - data.geom_xpos[ids[hit]]
    local = renderer._local_normals(model, ids[hit], np.einsum("nji,nj->ni", frames, points))
    ours = np.einsum("nij,nj->ni", frames, local)
    alignment = np.einsum("ni,ni->n", ours, normal.reshape(-1, 3)[hit])
    assert np.mean(alignment > 0.999) > 0.995  # the rest grazes an edge


@pytest.mark.skipif("normal" not in (mujoco.mj_multiRay.__doc__ or ""), reason="this MuJoCo gives no normals")
def test_pictures_are_the_same_on_an_older_mujoco(seed, monkeypatch):
    """Which returns no normals, so that they are computed here."""
    env = make("PnPCounterToSink", image_size=48)
    env.reset(Episode(seed))
    newer = [env.render(camera, 48).astype(int) for camera in CAMERAS]
    with_normals = mujoco.mj_multiRay
    monkeypatch.setattr(renderer, "RETURNS_NORMALS", False)
    monkeypatch.setattr(mujoco, "mj_multiRay", lambda **arguments: with_normals(**arguments, normal=None))
    for before, camera in zip(newer, CAMERAS, strict=True):
        differs = np.abs(env.render(camera, 48) - before).max(axis=-1) > 1
        assert differs.mean() < 0.005  # what grazes an edge


def test_light_and_colours_vary_but_stay_near_the_style(seed):
    env = make("OpenDrawer", image_size=8)
    env.reset(Episode(seed))
    world = env.world
    base = np.array([material_rgb(material, STYLES["oak"]) for material in world.materials])
    ratio = world.model.geom_rgba[:, :3] / base
    assert ratio.min() >= 0.9 - 1e-6 and ratio.max() <= 1.1 + 1e-6 and ratio.std() > 0.02


# --- experts and commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL_TASKS)
def test_experts_solve_fresh_seeds(task, seed):
    """Seven of eight; or as large a share of 32, for an expert of 95 % misses the former in one run of seventeen."""
    env = make(task, image_size=4)
    solved = []
    for i in range(32):
        env.reset(Episode(seed + i))
        expert_actions(env, env.spec.horizon)
        solved.append(env.success)
        if i == 7 and sum(solved) >= 7:
            return
    assert sum(solved) >= 28, solved


def test_envs_never_import_jax():
    code = "import sys, envs.kitchen.demos, envs.kitchen.__main__; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=_child_environment())


def test_command_writes_a_picture_grid(tmp_path):
    out = tmp_path / "faucet.png"
    command = [sys.executable, "-m", "envs.kitchen", "TurnOnSinkFaucet", "--out", out, "--size", "24"]
    result = subprocess.run(command, check=True, timeout=120, env=_child_environment(), capture_output=True, text=True)
    assert "success" in result.stdout
    assert Image.open(out).size == (6 * 24, 3 * 24)
