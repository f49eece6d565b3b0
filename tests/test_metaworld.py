"""The adapter over the real Meta-World. Without the package all of this is skipped: see docs/metaworld.md."""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import pickle
import subprocess
import sys
import warnings

os.environ.setdefault("MUJOCO_GL", "egl")  # for the package's own renderer; ours needs no setting

import mujoco
import numpy as np
import pytest

from envs import metaworld, opengl
from envs.base import Episode
from envs.metaworld import compat, state, tables
from envs.metaworld.suite import make_expert
from envs.pool import EnvPool

try:
    compat.version()
    opengl.check("Meta-World")
    WHY = ""
except ValueError as error:
    WHY = str(error)
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)

SIZE = 48
ROOT = pathlib.Path(__file__).parent.parent
# Its target is a view of MuJoCo's arrays; its success reads contacts; its goal is drawn as a green ball.
BASKET, STICK, DOOR = "basketball-v3", "stick-push-v3", "door-open-v3"


def make(task: str, **options):
    return metaworld.make(task, **{"image_size": SIZE, "protocol": "quick", **options})


def new_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(100_000_000, 800_000_000))


def random_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    return rng.uniform(-1, 1, (steps, tables.ACTION_DIM))


def assert_same_look(one, other) -> None:
    assert one.instruction == other.instruction and one.state.tobytes() == other.state.tobytes()
    assert one.images.keys() == other.images.keys()
    for camera, image in one.images.items():
        np.testing.assert_array_equal(image, other.images[camera])


def trace(env, actions: np.ndarray) -> list:
    """After every control step: the result, the physics and what the package observes, to the bit."""
    steps = []
    for action in actions:
        result = env.step_chunk(action[None])
        steps.append((result.steps, result.success, env.snapshot().physics.tobytes(), env.observation.tobytes()))
    return steps


@pytest.fixture(scope="module")
def envs():
    """One environment of a task, made once and reset by every user."""
    made: dict[str, object] = {}

    def get(task: str, copy_number: int = 0, protocol: str = "quick"):
        key = f"{task}{copy_number}{protocol}"
        if key not in made:
            made[key] = make(task, protocol=protocol)
        return made[key]

    yield get
    for env in made.values():
        env.close()


def theirs(task: str):
    """As LeRobot makes the package's own environment: `lerobot/envs/metaworld.py`, step by step."""
    import metaworld as package

    benchmark = package.MT1(task, seed=42)
    env = benchmark.train_classes[task](render_mode="rgb_array", camera_name="corner2", width=SIZE, height=SIZE)
    env.set_task(benchmark.train_tasks[0])
    env.model.cam_pos[2] = [0.75, 0.075, 0.7]
    env.reset()
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    return env


# --- exact copies ---


@pytest.mark.parametrize("task", [BASKET, STICK, DOOR])
def test_a_snapshot_restores_bit_for_bit_here_in_a_twin_and_in_another_process(task, rng, envs):
    env, twin, seed = envs(task), envs(task, 1), new_seed(rng)
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

    twin.reset(Episode(seed + 1))
    twin.step_chunk(random_actions(rng, 3))
    twin.restore(snapshot)
    assert_same_look(twin.observe(), look)
    assert trace(twin, actions) == expected
    assert_same_look(twin.observe(), final)

    factory = functools.partial(metaworld.make, task, image_size=SIZE, protocol="quick")
    with EnvPool(factory, 1, 1, timeout_s=300, start_timeout_s=300) as pool:
        assert_same_look(pool.reset([0], [Episode(seed)])[0], first)  # equal seeds, equal episodes, in any process
        pool.reset([0], [Episode(seed + 1)])
        pool.restore([0], [snapshot])
        for start in range(0, 40, 10):
            results, looks = pool.step([0], actions[None, start : start + 10])
            assert results[0].steps == 10
            assert pool.snapshot([0])[0].physics.tobytes() == expected[start + 9][2]
        assert_same_look(looks[0], final)


def check_branch_of_an_expert(task: str, rng: np.random.Generator) -> None:
    """A twin that has never seen an episode goes on as the expert's own episode did, its success included."""
    env, twin = make(task), make(task)
    env.reset(Episode(new_seed(rng)))
    expert = make_expert(env)
    for _ in range(int(rng.integers(5, 60))):
        env.step_chunk(expert.act()[None])
    snapshot = env.snapshot()
    actions = []
    expected = []
    for _ in range(120):
        actions.append(expert.act())
        expected += trace(env, actions[-1][None])
    twin.restore(snapshot)
    other = make_expert(twin)
    for action, outcome in zip(actions, expected, strict=True):
        assert other.act().tobytes() == action.tobytes()
        assert trace(twin, action[None]) == [outcome]
    env.close()
    twin.close()


@pytest.mark.parametrize("draw", range(4))
def test_an_experts_episode_can_be_branched(draw, rng):
    task = tables.TASKS[int(rng.integers(50))]
    print(task)
    check_branch_of_an_expert(task, rng)


@pytest.mark.slow
@pytest.mark.parametrize("task", tables.TASKS)
def test_an_experts_episode_can_be_branched_in_every_task(task, rng):
    check_branch_of_an_expert(task, rng)


@pytest.mark.parametrize("part", ["model", "derived", "attributes", "observation"])
def test_each_part_of_a_snapshot_is_needed(part, rng, envs):
    """Without it a copy goes another way, or shows something else."""
    env, twin = (envs("pick-place-v3", copy, "lerobot") for copy in (0, 1))
    env.reset(Episode(new_seed(rng)))
    snapshot, look, observed = env.snapshot(), env.observe(), env.observation
    actions = random_actions(rng, 3)
    expected, final = trace(env, actions), env.observe()

    def equal() -> bool:
        try:
            assert_same_look(twin.observe(), look)
            assert twin.observation.tobytes() == observed.tobytes() and trace(twin, actions) == expected
            assert_same_look(twin.observe(), final)
        except AssertionError:
            return False
        return True

    twin.reset(Episode(new_seed(rng)))
    other = twin.snapshot().extra[part]
    twin.restore(dataclasses.replace(snapshot, extra={**snapshot.extra, part: other}))
    assert not equal()
    twin.restore(snapshot)
    assert equal()


def test_what_calls_itself_initial_and_moves_is_copied_as_a_view(rng, envs):
    """Some tasks keep views of MuJoCo's arrays: a copy of their values would stand still."""
    env, twin = envs("door-lock-v3"), make("door-lock-v3")
    env.reset(Episode(new_seed(rng)))
    twin.restore(env.snapshot())
    for one in (env, twin):
        before = one.raw.init_left_pad.copy(), one.raw.obj_init_pos.copy()
        one.raw.data.xpos += 0.125
        np.testing.assert_allclose(one.raw.init_left_pad, before[0] + 0.125)
        np.testing.assert_allclose(one.raw.obj_init_pos, before[1] + 0.125)
    twin.close()


def test_a_snapshot_of_something_else_is_refused(rng, envs):
    env = envs(DOOR)
    env.reset(Episode(new_seed(rng)))
    snapshot = env.snapshot()
    with pytest.raises(ValueError, match="cannot be restored here: expected"):
        env.restore(dataclasses.replace(snapshot, env=snapshot.env.replace("mujoco ", "mujoco 1")))
    with pytest.raises(ValueError, match="does not fit this scene"):
        env.restore(dataclasses.replace(snapshot, physics=snapshot.physics[:-1]))
    with pytest.raises(ValueError, match="no episode yet: call reset or restore first"):
        make(DOOR).observe()


# --- episodes ---


def check_start(task: str, rng: np.random.Generator) -> None:
    """An episode depends on its seed and on nothing before; what a reset writes into the model, snapshots hold."""
    env, seed = make(task, protocol="rlinf"), new_seed(rng)
    env.reset(Episode(seed))
    assert not env.success and not env.broken
    model = env.raw.model
    fields = [name for name in dir(model) if isinstance(getattr(model, name, None), np.ndarray)]
    before, first = {name: getattr(model, name).tobytes() for name in fields}, pickle.dumps(env.snapshot())
    env.reset(Episode(seed + 1))
    changed = {name for name in fields if getattr(model, name).tobytes() != before[name]}
    assert changed <= set(state.MODEL_FIELDS)
    assert pickle.dumps(env.snapshot()) != first
    env.step_chunk(random_actions(rng, int(rng.integers(1, 30))))
    np.random.random(3)  # somebody else's draws
    env.reset(Episode(seed))
    assert pickle.dumps(env.snapshot()) == first
    env.close()


@pytest.mark.parametrize("draw", range(4))
def test_an_episode_depends_on_its_seed_and_on_nothing_before(draw, rng):
    task = tables.TASKS[int(rng.integers(50))]
    print(task)
    check_start(task, rng)


@pytest.mark.slow
@pytest.mark.parametrize("task", tables.TASKS)
def test_an_episode_depends_on_its_seed_in_every_task(task, rng):
    check_start(task, rng)


@pytest.mark.parametrize("task", [DOOR, "reach-v3"])
def test_lerobots_loop_sees_the_same_pictures_states_and_successes(task, rng, envs):
    env, other, seed = envs(task, protocol="lerobot"), theirs(task), new_seed(rng)
    other.seed(seed)
    observed, _ = other.reset(seed=seed)
    env.reset(Episode(seed))
    for _ in range(3):
        ours = env.observe()
        np.testing.assert_array_equal(ours.images["corner2"], np.flip(other.render(), (0, 1)))
        np.testing.assert_array_equal(ours.state, observed[:4].astype(np.float32))
        np.testing.assert_array_equal(env.observation, observed)
        for action in random_actions(rng, 7).astype(np.float32):
            observed, _, _, _, info = other.step(action)
            assert env.step_chunk(action[None]).success == bool(info["success"])
    other.close()


def test_rlinfs_policies_first_look_after_sixteen_actions_of_zeros(rng):
    env, other, seed = make(DOOR, protocol="rlinf"), theirs(DOOR), new_seed(rng)
    other.seed(seed)
    other.reset()
    for _ in range(16):
        observed, *_ = other.step(np.zeros(4, np.float32))
    env.reset(Episode(seed))
    np.testing.assert_array_equal(env.observation, observed)
    np.testing.assert_array_equal(env.observe().images["corner2"], np.flip(other.render(), (0, 1)))
    assert env.steps == 0 and env.spec.horizon == 100
    env.close()
    other.close()


@pytest.mark.parametrize("task", ["button-press-v3", "drawer-close-v3", STICK])
def test_success_is_the_tasks_own_check_and_not_its_dense_reward(task, rng, envs, monkeypatch):
    """The package's own loop with the package's own expert, from the first step to the one that succeeds."""
    env, other, seed = envs(task, protocol="lerobot"), theirs(task), new_seed(rng)
    policy = compat.load()[1][task]()
    other.seed(seed)
    observed, info = other.reset(seed=seed)
    steps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while steps < 500 and not info.get("success"):
            observed, _, _, _, info = other.step(np.clip(policy.get_action(observed), -1, 1))
            steps += 1
    env.reset(Episode(seed))
    step = env.raw.step
    # The dense reward is taken out of the adapter's sight.
    monkeypatch.setattr(env.raw, "step", lambda action: (lambda o, r, a, b, i: (o, np.nan, a, b, i))(*step(action)))
    expert, done = make_expert(env), False
    while not done:
        done = env.step_chunk(expert.act()[None]).done
    assert (env.success, env.steps) == (bool(info["success"]), steps)
    other.close()


def test_the_versions_that_move_success_stand_in_the_spec(envs):
    version = envs(DOOR).spec.version
    assert f"metaworld {importlib.metadata.version('metaworld')}" in version
    assert f"mujoco {importlib.metadata.version('mujoco')}" in version


# --- names and words ---


def test_the_sets_are_the_packages_own():
    from metaworld import env_dict

    assert tuple(env_dict.MT10_V3) == tables.SETS["MT10"] and tuple(env_dict.MT50_V3) == tables.SETS["MT50"]
    assert set(compat.load()[1]) == set(tables.TASKS)  # an expert for each
    assert sorted(task for name in ("easy", "medium", "hard", "very_hard") for task in tables.SETS[name]) == sorted(
        tables.TASKS
    )
    assert [len(tables.SETS[name]) for name in ("easy", "medium", "hard", "very_hard")] == [28, 11, 6, 5]


# --- what the policy sees and does ---


def test_pictures_are_upright_and_not_mirrored(rng, envs):
    """The goal's green ball is where the camera's own numbers say."""
    env, size = envs(DOOR), 240
    env.reset(Episode(new_seed(rng)))
    env.step_chunk(np.zeros((1, 4)))
    raw = env.raw
    camera = raw.model.camera("corner2").id
    local = raw.data.cam_xmat[camera].reshape(3, 3).T @ (raw.data.site("goal").xpos - raw.data.cam_xpos[camera])
    focal = 0.5 * size / np.tan(np.radians(raw.model.cam_fovy[camera]) / 2)
    column, row = size / 2 + focal * local[0] / -local[2], size / 2 - focal * local[1] / -local[2]
    column, row = size - 1 - column, size - 1 - row  # the camera hangs upside down
    picture = env.render("corner2", size).astype(int)
    green = np.argwhere((picture[..., 1] > 120) & (picture[..., 1] > 2 * picture[..., [0, 2]].max(-1)))
    assert len(green) > 5
    np.testing.assert_allclose(green.mean(0), [row, column], atol=2)
    up = raw.data.cam_xmat[camera].reshape(3, 3)[2, 1]
    assert up < 0  # so that higher things stand higher once it is turned
    grip = env.observe().images["corner2"]
    assert grip.dtype == np.uint8 and grip.shape == (SIZE, SIZE, 3) and grip.std() > 5


def test_quick_pictures_are_means_of_four_pixels_of_larger_ones(rng):
    """Held against pictures twice as large, from a model that asks for no smoothing of edges."""
    env = make(DOOR, image_size=SIZE)
    env.reset(Episode(new_seed(rng)))
    got, raw = env.observe().images["corner2"], env.raw
    samples, raw.model.vis.quality.offsamples = raw.model.vis.quality.offsamples, 0
    plain = opengl.Renderer(raw.model, 2 * SIZE, shadows=False, reflections=False)
    large = plain.render(raw.model, raw.data, raw.model.camera("corner2").id)[::-1, ::-1]
    plain.close()
    corners = [large[row::2, column::2].astype(float) for row in (0, 1) for column in (0, 1)]
    np.testing.assert_array_equal(got, np.floor(np.mean(corners, 0) + 0.5))
    assert samples == 4  # the package's: what other protocols draw with, and `quick` has put back
    env.close()


def test_every_camera_draws_and_environments_share_renderers(rng):
    env, twin = make(DOOR, cameras=tables.CAMERAS), make(DOOR, cameras=tables.CAMERAS)
    env.reset(Episode(new_seed(rng)))
    twin.reset(Episode(new_seed(rng)))
    looks = [one.observe() for one in (env, twin, env, twin)]
    assert_same_look(looks[0], looks[2])
    assert_same_look(looks[1], looks[3])
    assert len({image.tobytes() for look in looks[:2] for image in look.images.values()}) == 2 * len(tables.CAMERAS)
    assert list(env._renderers.values()) == list(twin._renderers.values())
    twin.close()
    assert_same_look(env.observe(), looks[0])
    env.close()


def test_frames_are_drawn_when_the_policy_looks_and_never_else(rng, envs, monkeypatch):
    env = envs(DOOR)
    env.reset(Episode(new_seed(rng)))
    drawn, real = [], mujoco.mjr_render
    monkeypatch.setattr(mujoco, "mjr_render", lambda *args: drawn.append(1) or real(*args))
    env.reset(Episode(new_seed(rng)))
    env.step_chunk(random_actions(rng, 5))
    env.restore(env.snapshot())
    assert drawn == []
    before = pickle.dumps(env.snapshot())
    env.observe()
    assert len(drawn) == 1 and pickle.dumps(env.snapshot()) == before


def test_each_number_of_an_action_moves_what_the_table_says(rng, envs):
    env = envs("reach-v3")
    env.reset(Episode(new_seed(rng)))
    start, before = env.snapshot(), env.observation

    def after(index: int, value: float) -> np.ndarray:
        env.restore(start)
        action = np.zeros(4)
        action[index] = value
        env.step_chunk(np.tile(action, (10, 1)))
        return env.observation

    for axis in range(3):
        for sign in (-1.0, 1.0):
            shift = (after(axis, sign) - before)[:3]
            assert np.argmax(np.abs(shift)) == axis and np.sign(shift[axis]) == sign and 0.03 < abs(shift[axis]) < 0.12
    assert after(3, 1.0)[3] < 0.7 < 0.95 < after(3, -1.0)[3] <= 1.0  # closed, open


def test_a_chunk_is_clipped_copied_latched_and_ends_at_the_horizon(rng, envs, monkeypatch):
    env = envs("reach-v3")
    env.reset(Episode(new_seed(rng)))
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
    checks, evaluate = iter([0.0, 1.0]), env.raw.evaluate_state
    monkeypatch.setattr(
        env.raw, "evaluate_state", lambda *args: (0.0, {**evaluate(*args)[1], "success": next(checks, 0.0)})
    )
    result = env.step_chunk(random_actions(rng, 6))
    assert (result.steps, result.success, result.done) == (2, True, True)
    result = env.step_chunk(random_actions(rng, 6))
    assert (result.steps, result.success, result.done) == (0, True, True)
    monkeypatch.undo()

    env.restore(start)
    monkeypatch.setattr(env, "_spec", dataclasses.replace(env.spec, horizon=5))
    assert [env.step_chunk(np.zeros((3, 4))).steps for _ in range(3)] == [3, 2, 0]
    for actions, text in ((np.zeros((2, 7)), "expected .E, 4."), (np.full((2, 4), np.nan), "NaN or infinity in rows")):
        with pytest.raises(ValueError, match=text):
            env.step_chunk(actions)
    with pytest.raises(ValueError, match="unknown camera 'top': expected one of corner2"):
        env.render("top")
    for wrong, text in (
        (Episode(0, "push-v3"), "got an episode of 'push-v3'"),
        (Episode(0, init_state=3), "init_state of an"),
    ):
        with pytest.raises(ValueError, match=text):
            env.reset(wrong)


def test_an_episode_may_be_longer_than_the_packages_own(rng):
    env = make("reach-v3", horizon=600)
    env.reset(Episode(new_seed(rng)))
    away = np.tile([0.0, -1.0, 1.0, 0.0], (600, 1))
    assert env.step_chunk(away).steps == 600 and not env.success
    env.close()


@pytest.mark.parametrize("damage", [1e12, np.nan])
def test_physics_that_breaks_is_a_failure_and_the_next_episode_is_whole(damage, rng, envs):
    env = envs(DOOR)
    env.reset(Episode(5))
    whole = env.snapshot()
    env.raw.data.qvel[:] = damage
    result = env.step_chunk(np.zeros((6, 4)))
    assert (result.steps, result.success, result.done, result.unstable) == (1, False, True, True) and env.broken
    broken = env.snapshot()
    assert env.step_chunk(np.zeros((6, 4))).steps == 0
    env.restore(whole)
    assert not env.broken and env.step_chunk(np.zeros((2, 4))).steps == 2
    env.restore(broken)
    assert env.broken and env.step_chunk(np.zeros((2, 4))).unstable
    env.reset(Episode(5))
    assert pickle.dumps(env.snapshot()) == pickle.dumps(whole) and not env.broken


def test_a_process_that_closes_nothing_ends_quietly_and_needs_no_setting():
    script = (
        "from envs import metaworld\nfrom envs.base import Episode\n"
        "env = metaworld.make('reach-v3', image_size=16)\nenv.reset(Episode(0))\nenv.render(size=16)\n"
    )
    variables = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout + done.stderr == ""


# --- the experts ---


# Sure of 50 of 50 seeds in docs/metaworld.md.
@pytest.mark.parametrize("task", ["assembly-v3", "drawer-open-v3", "window-close-v3"])
def test_experts_solve_fresh_placements(task, rng, envs):
    env = envs(task)
    for _ in range(3):
        env.reset(Episode(new_seed(rng)))
        expert, done = make_expert(env), False
        while not done:
            action = expert.act()
            assert action.shape == (4,) and np.abs(action).max() <= 1.0
            done = env.step_chunk(action[None]).done
        assert env.success
