"""The adapter over the real RoboCasa code, of whichever version is installed; on stand-ins where assets are absent.

Without RoboCasa all of this is skipped: see docs/robocasa.md.
"""

import copy
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys

from envs.base import Episode, episodes

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco
import numpy as np
import pytest

from envs import robocasa
from envs.pool import EnvPool
from envs.robocasa import compat, standin, state, tables, walk

try:
    FOUND, WHY = compat.find(), ""
    STANDINS = bool(FOUND.missing_assets())
except ValueError as error:
    FOUND, WHY, STANDINS = None, str(error), True
pytestmark = pytest.mark.skipif(FOUND is None, reason=WHY)
API = FOUND.api if FOUND else "v1"

ROOT = pathlib.Path(__file__).parent.parent
FAUCET, PLACE = "TurnOnSinkFaucet", tables.task_name("PnPCounterToMicrowave", API)
OPTIONS = {"standins": STANDINS, "image_size": 48, "scenes": ("1/1",)}
ARM = np.r_[np.ones(7), np.zeros(4), -1.0]  # what an action may move in arm mode
MODES = {"arm": (ARM, 0.0), "base": (np.r_[np.ones(11), 0.0], 1.0)}  # factor, and what is added to the mode


def make(task: str, **options):
    return robocasa.make(task, **{**OPTIONS, **options})


def random_actions(rng: np.random.Generator, steps: int, mode: str) -> np.ndarray:
    factor, base_mode = MODES[mode]
    actions = rng.uniform(-1, 1, (steps, 12)) * factor
    actions[:, 11] = -1.0 if mode == "arm" else base_mode
    return actions


def fresh_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(100_000_000, 800_000_000))


@pytest.fixture(scope="module")
def envs():
    """One environment of a task, made once and reset by every user."""
    made: dict[str, object] = {}

    def get(task: str, copy_number: int = 0):
        key = f"{task}{copy_number}"
        if key not in made:
            made[key] = make(task)
        return made[key]

    yield get
    for env in made.values():
        env.close()


@pytest.fixture(scope="module")
def other_process():
    """Pools of one worker each, so another process; started once a task."""
    pools: dict[str, EnvPool] = {}

    def get(task: str) -> EnvPool:
        if task not in pools:
            made = functools.partial(robocasa.make, task, **OPTIONS)
            pools[task] = EnvPool(made, 1, 1, timeout_s=900, start_timeout_s=900)
        return pools[task]

    yield get
    for pool in pools.values():
        pool.close()


def assert_same_look(one, other) -> None:
    assert one.instruction == other.instruction and one.state.tobytes() == other.state.tobytes()
    assert one.images.keys() == other.images.keys()
    for camera, image in one.images.items():
        np.testing.assert_array_equal(image, other.images[camera])


def trace(env, actions: np.ndarray) -> list:
    """After every control step: the result, the physics and all observables, to the bit."""
    steps = []
    for action in actions:
        result = env.step_chunk(action[None])
        snapshot = env.snapshot()
        observed = {name: np.asarray(value).tobytes() for name, value in env._observed.items()}
        steps.append((result.steps, result.success, snapshot.physics.tobytes(), observed))
    return steps


def scene_of(env) -> dict:
    """What the members of a group share, as RoboCasa says it."""
    meta = env.raw.get_ep_meta()
    objects = [(cfg["name"], pathlib.Path(cfg["info"]["mjcf_path"]).parts[-3:]) for cfg in meta["object_cfgs"]]
    return {"scene": (meta["layout_id"], meta["style_id"]), "objects": objects, "words": meta["lang"]}


# --- exact copies ---


@pytest.mark.parametrize(("task", "mode"), [(FAUCET, "base"), (PLACE, "arm")])
def test_a_snapshot_restores_bit_for_bit_here_and_in_another_process(task, mode, rng, envs, other_process):
    env, seed = envs(task), fresh_seed(rng)
    env.reset(Episode(seed))
    first = env.observe()
    pool = other_process(task)
    assert_same_look(first, pool.reset([0], episodes([seed]))[0])  # equal seeds, equal episodes, in any process
    assert pool.snapshot([0])[0].physics.tobytes() == env.snapshot().physics.tobytes()

    env.step_chunk(random_actions(rng, 12, mode))
    snapshot, look, attributes = env.snapshot(), env.observe(), walk.fingerprints(env.raw)
    actions = random_actions(rng, 40, mode)
    expected, final = trace(env, actions), env.observe()
    assert walk.changed(attributes, walk.fingerprints(env.raw)), "nothing moved: the test would prove nothing"

    env.restore(snapshot)
    # Everything that can be reached is as it was; of the model too. Whoever adds state to the simulator shows here.
    assert walk.changed(attributes, walk.fingerprints(env.raw)) == []
    assert_same_look(env.observe(), look)
    assert trace(env, actions) == expected
    assert_same_look(env.observe(), final)

    pool.reset([0], episodes([seed + 1]))  # another episode: the restore has to build this one anew
    pool.restore([0], [snapshot])
    for start in range(0, 40, 10):
        results, looks = pool.step([0], actions[None, start : start + 10])
        if results[0].done:
            break
        assert pool.snapshot([0])[0].physics.tobytes() == expected[start + 9][2]
    else:
        assert_same_look(looks[0], final)


def test_physics_alone_is_no_snapshot(rng, envs):
    """The reason for all else that a snapshot holds: without it a replay goes another way at once."""
    env = envs(PLACE)
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 12, "arm"))
    snapshot, actions = env.snapshot(), random_actions(rng, 5, "arm")
    expected = trace(env, actions)
    model, data = env.raw.sim.model._model, env.raw.sim.data._data
    mujoco.mj_setState(model, data, snapshot.physics, state.PHYSICS)
    env._steps, env._succeeded = snapshot.extra["steps"], False
    assert trace(env, actions)[-1][2] != expected[-1][2]


def test_an_episode_depends_on_its_seed_and_on_nothing_before(rng, envs):
    env, twin = envs(PLACE), envs(PLACE, 1)
    seed = fresh_seed(rng)
    env.reset(Episode(seed))
    first, scene, physics = env.observe(), scene_of(env), env.snapshot().physics
    env.step_chunk(random_actions(rng, 3, "base"))
    env.reset(Episode(seed + 1))
    other_physics = env.snapshot().physics
    assert physics.shape != other_physics.shape or not np.array_equal(physics, other_physics)
    np.random.random(3)  # somebody else's draws
    outside = np.random.get_state()[1].copy()
    twin.reset(Episode(seed))  # another member of the group
    np.testing.assert_array_equal(np.random.get_state()[1], outside)  # and ours do not disturb them
    assert scene_of(twin) == scene and twin.snapshot().physics.tobytes() == physics.tobytes()
    assert_same_look(twin.observe(), first)


def test_a_reset_that_fails_midway_leaves_nothing_that_restore_trusts(rng, envs, monkeypatch):
    """The failed reset has built another seed's scene; the snapshot's own has to be built again."""
    env, seed = envs(PLACE), fresh_seed(rng)
    env.reset(Episode(seed))
    env.step_chunk(random_actions(rng, 5, "arm"))
    snapshot, look, qpos = env.snapshot(), env.observe(), env.raw.sim.data.qpos.copy()
    actions = random_actions(rng, 5, "arm")
    expected = trace(env, actions)

    def failing(raw):
        raise RuntimeError("the simulator broke")

    with monkeypatch.context() as patch:
        patch.setattr(state, "baseline", failing)  # the first thing after the scene was built
        with pytest.raises(RuntimeError, match="broke"):
            env.reset(Episode(seed + 1))
    env.restore(snapshot)
    assert env.raw.sim.data.qpos.tobytes() == qpos.tobytes()
    assert_same_look(env.observe(), look)
    assert trace(env, actions) == expected


def test_a_snapshot_of_something_else_is_refused(rng, envs):
    env = envs(FAUCET)
    env.reset(Episode(fresh_seed(rng)))
    snapshot = env.snapshot()
    assert FOUND.version in snapshot.env and FAUCET in snapshot.env and ("stand-ins" in snapshot.env) == STANDINS
    with pytest.raises(ValueError, match="cannot be restored here: expected"):
        env.restore(dataclasses.replace(snapshot, env="kitchen/TurnOnSinkFaucet"))
    with pytest.raises(ValueError, match="does not fit this scene"):
        env.restore(dataclasses.replace(snapshot, physics=snapshot.physics[:-1]))
    attributes = {**snapshot.extra["attributes"], ("fixtures[nowhere]", "_turned_on"): True}
    with pytest.raises(ValueError, match="nowhere.*which this scene lacks"):
        env.restore(dataclasses.replace(snapshot, extra={**snapshot.extra, "attributes": attributes}))


# --- scenes and splits ---


def test_held_out_seeds_take_the_evaluation_scenes_in_turn():
    env = make(FAUCET, scenes=("training",), heldout_seed=900_000_000)
    evaluation = tables.SCENES[API]["evaluation"]
    scenes = [env.episode_of(900_000_000 + i) for i in range(50)]
    for scene in evaluation:
        assert sum(episode["scene"] == scene for episode in scenes) == 50 // len(evaluation)
    assert {episode["objects"] for episode in scenes} == {"heldout"}
    training = [env.episode_of(seed) for seed in range(200)]
    assert {episode["objects"] for episode in training} == {"train"}
    assert not {episode["scene"] for episode in training} & set(evaluation)
    assert len({episode["scene"] for episode in training}) > 20
    assert training == [env.episode_of(seed) for seed in range(200)]


def test_scenes_that_a_task_excludes_are_left_out():
    excluded = {"v0.2": 8, "v1": 9}[API]  # the layout without a microwave in reach
    env = make(PLACE, scenes=(f"{excluded}/1", "2/2"))
    assert {env.episode_of(seed)["scene"] for seed in range(20)} == {(2, 2)}
    with pytest.raises(ValueError, match="takes place in none of the scenes"):
        make(PLACE, scenes=(f"{excluded}/1",)).episode_of(0)


def test_object_splits_are_apart(rng):
    """The instances of the two splits, drawn through RoboCasa's own sampler, never meet."""
    env = make(PLACE)
    env.episode_of(0)  # imports RoboCasa
    from robocasa.models.objects.kitchen_object_utils import sample_kitchen_object

    drawn = {}
    for split in ("train", "heldout"):
        names = set()
        for _ in range(60):
            _, info = sample_kitchen_object(
                "apple", rng=np.random.default_rng(int(rng.integers(2**31))), split=tables.OBJECTS[API][split]
            )
            names.add(info["mjcf_path"])
        drawn[split] = names
    assert drawn["train"] and drawn["heldout"] and not drawn["train"] & drawn["heldout"]


# --- what the policy sees and does ---


def test_frames_are_drawn_when_the_policy_looks_and_never_else(rng, envs, monkeypatch):
    env = envs(FAUCET)
    env.reset(Episode(fresh_seed(rng)))
    env.observe()
    from robosuite.utils.binding_utils import MjRenderContext

    drawn, real = [], MjRenderContext.render
    monkeypatch.setattr(MjRenderContext, "render", lambda *args, **kw: drawn.append(kw) or real(*args, **kw))
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 5, "arm"))
    env.restore(env.snapshot())
    assert drawn == []
    physics, derived = env.snapshot().physics, copy.deepcopy(env.snapshot().extra["derived"])
    look = env.observe()
    assert len(drawn) == len(env.spec.cameras) == len(look.images) == 3
    after = env.snapshot()  # opening the renderer, too, moved nothing
    assert after.physics.tobytes() == physics.tobytes()
    assert all(after.extra["derived"][name].tobytes() == value.tobytes() for name, value in derived.items())


def test_images_are_upright_and_those_of_mujocos_own_renderer(rng, envs):
    env = envs(FAUCET)
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 5, "arm"))
    ours = env.observe().images
    model, data = env.raw.sim.model._model, env.raw.sim.data._data
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    renderer = mujoco.Renderer(model, 48, 48)
    for camera, image in ours.items():
        renderer.update_scene(data, camera, option)
        theirs = renderer.render()
        assert image.dtype == np.uint8 and image.shape == (48, 48, 3) and image.std() > 5
        assert np.abs(image.astype(int) - theirs).mean() < 1
        assert np.abs(image[::-1].astype(int) - theirs).mean() > 3  # the raw frame is upside down
    renderer.close()


def test_the_state_is_mujocos_in_v1s_order_with_quaternions_xyzw(rng, envs):
    from scipy.spatial.transform import Rotation

    env = envs(FAUCET)
    env.reset(Episode(fresh_seed(rng)))
    for mode in ("base", "arm"):
        env.step_chunk(random_actions(rng, 10, mode))
    values, data = env.observe().state, env.raw.sim.data
    assert values.dtype == np.float32 and values.shape == (16,) and env.spec.state_dim == 16
    low, high = map(np.array, zip(*tables.state_bounds(), strict=True))
    assert (low - 0.01 <= values).all() and (values <= high + 0.01).all()
    robot = env.raw.robots[0]
    base = robot.robot_model.base.correct_naming("center")
    base_pos, base_mat = data.get_site_xpos(base), data.get_site_xmat(base)
    # robosuite measures the position between the fingers, and the orientation at the hand that the gripper sits on.
    hand_pos = data.get_site_xpos(robot.gripper["right"].important_sites["grip_site"])
    hand_mat = data.get_body_xmat(robot.robot_model.eef_name["right"])
    np.testing.assert_allclose(values[:3], base_pos, atol=1e-6)
    np.testing.assert_allclose(Rotation.from_quat(values[3:7]).as_matrix(), base_mat, atol=1e-5)
    np.testing.assert_allclose(values[7:10], base_mat.T @ (hand_pos - base_pos), atol=1e-5)
    np.testing.assert_allclose(Rotation.from_quat(values[10:14]).as_matrix(), base_mat.T @ hand_mat, atol=1e-5)
    fingers = [data.qpos[i] for i in robot._ref_gripper_joint_pos_indexes["right"]]
    np.testing.assert_allclose(values[14:], fingers, atol=1e-6)


def moved(env, action: np.ndarray, steps: int = 6) -> np.ndarray:
    before = env.observe().state.astype(float)
    env.step_chunk(np.tile(action, (steps, 1)))
    return env.observe().state.astype(float) - before


def unit(index: int, value: float, mode: float = -1.0) -> np.ndarray:
    action = np.zeros(12)
    action[6], action[11] = -1.0, mode
    action[index] = value
    return action


def test_each_number_of_an_action_moves_what_the_table_says(rng, envs):
    from scipy.spatial.transform import Rotation

    env = envs(FAUCET)
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(np.tile(unit(6, -1.0), (5, 1)))  # open, at rest
    start = env.snapshot()
    for axis in range(3):
        for sign in (-1.0, 1.0):
            env.restore(start)
            shift = moved(env, unit(tables.ACTION["eef_pos"].start + axis, sign))[7:10]
            assert np.argmax(np.abs(shift)) == axis and np.sign(shift[axis]) == sign and abs(shift[axis]) > 0.05
    for axis in range(3):
        env.restore(start)
        before = Rotation.from_quat(env.observe().state[10:14])
        env.step_chunk(np.tile(unit(tables.ACTION["eef_rot"].start + axis, 0.3), (4, 1)))
        turn = (Rotation.from_quat(env.observe().state[10:14]) * before.inv()).as_rotvec()
        assert np.argmax(np.abs(turn)) == axis and turn[axis] > 0.08
    env.restore(start)
    open_width = np.ptp(env.observe().state[14:])
    env.step_chunk(np.tile(unit(tables.ACTION["gripper"].start, 1.0), (10, 1)))
    assert open_width > 0.06 and np.ptp(env.observe().state[14:]) < 0.02
    for index in range(2):  # forwards, sideways
        env.restore(start)
        drive = moved(env, unit(tables.ACTION["base"].start + index, 0.5, mode=1.0))[:3]
        yaw_free = Rotation.from_quat(env.observe().state[3:7]).inv().apply(drive)
        assert np.argmax(np.abs(yaw_free)) == index and abs(yaw_free[index]) > 0.004
    env.restore(start)
    before = Rotation.from_quat(env.observe().state[3:7])
    env.step_chunk(np.tile(unit(tables.ACTION["base"].start + 2, 0.5, mode=1.0), (6, 1)))
    turn = (Rotation.from_quat(env.observe().state[3:7]) * before.inv()).as_rotvec()
    assert np.argmax(np.abs(turn)) == 2 and abs(turn[2]) > 0.004
    env.restore(start)
    model, data = env.raw.sim.model._model, env.raw.sim.data._data
    torso = next(i for i in range(model.njnt) if "torso" in model.joint(i).name)
    height = data.qpos[model.jnt_qposadr[torso]]
    env.step_chunk(np.tile(unit(tables.ACTION["torso"].start, 1.0, mode=1.0), (6, 1)))
    assert data.qpos[model.jnt_qposadr[torso]] > height + 0.005
    env.restore(start)
    np.testing.assert_allclose(moved(env, unit(6, -1.0))[:7], 0, atol=1e-3)  # zeros keep base and torso still


def test_a_chunk_is_clipped_copied_latched_and_ends_at_the_horizon(rng, envs, monkeypatch):
    env = envs(FAUCET)
    env.reset(Episode(fresh_seed(rng)))
    start = env.snapshot()
    wild = 3 * random_actions(rng, 4, "arm")
    kept = wild.copy()
    env.step_chunk(wild)
    np.testing.assert_array_equal(wild, kept)
    physics = env.snapshot().physics
    env.restore(start)
    env.step_chunk(np.clip(wild, -1, 1))
    assert env.snapshot().physics.tobytes() == physics.tobytes()

    env.restore(start)
    checks = iter([False, True])
    monkeypatch.setattr(env.raw, "_check_success", lambda: next(checks, False))  # once true in four: by step, by us
    monkeypatch.setattr(env.raw, "reward", lambda action: 0.0)
    result = env.step_chunk(random_actions(rng, 6, "arm"))
    assert (result.steps, result.success, result.done) == (2, True, True)
    result = env.step_chunk(random_actions(rng, 6, "arm"))
    assert (result.steps, result.success, result.done) == (0, True, True)
    monkeypatch.undo()

    short = make(FAUCET, horizon=5)
    short.reset(Episode(1))
    assert [short.step_chunk(random_actions(rng, 3, "arm")).steps for _ in range(3)] == [3, 2, 0]
    assert short.steps == 5
    short.close()


def test_broken_physics_ends_the_episode_as_a_failure(rng, envs, monkeypatch):
    """MuJoCo puts the scene back and steps on; neither it nor robosuite raises. A snapshot carries the failure."""
    env, other = envs(FAUCET), envs(FAUCET, 1)
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 3, "arm"))
    sound = env.snapshot()
    monkeypatch.setattr(env.raw, "_check_success", lambda: True)
    monkeypatch.setattr(env.raw, "reward", lambda action: 1.0)
    env.raw.sim.data._data.qvel[rng.integers(env.raw.sim.model._model.nv)] = rng.choice([1e12, np.inf, np.nan])
    result = env.step_chunk(random_actions(rng, 6, "arm"))
    assert (result.steps, result.success, result.done, result.unstable) == (1, False, True, True)
    assert env.broken.startswith("BADQ")
    other.restore(env.snapshot())
    for one in (env, other):
        result = one.step_chunk(random_actions(rng, 6, "arm"))
        assert (result.steps, result.success, result.done, result.unstable) == (0, False, True, True)
    monkeypatch.undo()
    env.restore(sound)  # the warning is not the sound state's
    result = env.step_chunk(random_actions(rng, 2, "arm"))
    assert (result.steps, result.done, result.unstable) == (2, False, False)
    env.reset(Episode(fresh_seed(rng)))
    assert not env.done and not env.step_chunk(random_actions(rng, 1, "arm")).unstable


def test_mistakes_are_one_line(envs):
    env = envs(FAUCET)
    with pytest.raises(ValueError, match="no episode yet: call reset or restore first"):
        make(FAUCET).observe()
    env.reset(Episode(0))
    for actions, text in (
        (np.zeros((2, 7)), "expected .E, 12."),
        (np.full((2, 12), np.nan), "NaN or infinity in rows"),
    ):
        with pytest.raises(ValueError, match=text):
            env.step_chunk(actions)
    with pytest.raises(ValueError, match="unknown camera 'top': expected one of robot0_agentview_left"):
        env.render("top")
    for options, text in (
        ({"cameras": ("top",)}, "unknown camera"),
        ({"scenes": ("99/99",)}, "unknown RoboCasa scene"),
        ({"objects": "A"}, "unknown object split 'A': expected one of train, heldout, all"),
        ({"horizon": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=text):
            make(FAUCET, **options)
    if STANDINS:
        with pytest.raises(ValueError, match="lacks its assets .*download_kitchen_assets.*standins"):
            make(FAUCET, standins=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--steps", "-1"], "--steps -1: expected 0 or more"),
        ([], "stand-ins cannot be written to /proc/x: .*"),
    ],
)
def test_mistakes_with_the_walk_are_one_line(arguments, message):
    command = [sys.executable, "-m", "envs.robocasa.walk", FAUCET, "--standins", *arguments]
    told = subprocess.run(
        command, env={**os.environ, "Z1_STANDINS": "/proc/x"}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 1 and re.fullmatch(f"error: {message}\n", told.stderr), told.stderr


def test_the_spec_says_version_and_label():
    env = make(PLACE)
    assert env.spec.version == f"robocasa {FOUND.version}" and env.spec.task == PLACE
    assert env.spec.label == (standin.LABEL if STANDINS else "")
    assert env.spec.horizon == tables.HORIZONS[API][PLACE] and env.spec.control_hz == 20


# --- long ones ---


@pytest.mark.slow
@pytest.mark.parametrize("task", tables.HORIZONS[API])
def test_every_task_branches_exactly_and_is_the_same_elsewhere(task, rng):
    env, seed = make(task), fresh_seed(rng)
    env.reset(Episode(seed))
    with EnvPool(functools.partial(robocasa.make, task, **OPTIONS), 1, 1, timeout_s=900) as pool:
        assert_same_look(env.observe(), pool.reset([0], episodes([seed]))[0])
    env.step_chunk(random_actions(rng, 5, "base"))
    snapshot, attributes = env.snapshot(), walk.fingerprints(env.raw)
    actions = np.concatenate([random_actions(rng, 20, "arm"), random_actions(rng, 20, "base")])
    expected = trace(env, actions)
    env.restore(snapshot)
    assert walk.changed(attributes, walk.fingerprints(env.raw)) == []
    assert trace(env, actions) == expected
    env.close()


@pytest.mark.slow
def test_a_whole_grpo_iteration_on_stand_ins(tmp_path):
    from z1_jax import train
    from z1_jax.metrics import read_records

    preset = ROOT / "configs" / "grpo.py"
    train.main(
        ["train", f"--config={preset}:robocasa_standin", f"--config.run_dir={tmp_path}", "--config.env.workers=1"]
    )
    records = [record for record in read_records(tmp_path / "metrics.jsonl") if record["stage"] == "grpo"]
    assert len(records) == 1 and records[0]["ratio/first_update_max_error"] < 1e-3
    assert standin.LABEL in (tmp_path / "summary.json").read_text()
    for path in ("metrics.jsonl", "episodes.jsonl", "evaluation/before.jsonl", "evaluation/after.jsonl"):
        rows = read_records(tmp_path / path)
        assert rows and {row["assets"] for row in rows} == {standin.LABEL}, path
