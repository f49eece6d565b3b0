"""The scripted experts of LIBERO, on its real simulation. Without LIBERO all of this is skipped."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco
import numpy as np
import pytest

from envs import libero
from envs.base import Episode
from envs.libero import compat, tables
from envs.libero.experts import make_expert
from envs.libero.world import World

try:
    compat.find()
    WHY = ""
except ValueError as error:
    WHY = str(error)
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)


def fresh_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(100_000_000, 800_000_000))


@pytest.fixture(scope="module")
def envs():
    """One environment of a task; few are held at once, since each takes a gigabyte."""
    made: dict[str, object] = {}

    def get(task: str):
        if task not in made:
            for name in list(made)[:-1]:
                made.pop(name).close()
            made[task] = libero.make(task, image_size=32)
        return made[task]

    yield get
    for env in made.values():
        env.close()


def succeeds(env, seed: int) -> bool:
    env.reset(Episode(seed))
    expert, done = make_expert(env), False
    while not done:
        done = env.step_chunk(expert.act()[None]).done
    return env.success


# One of each kind: a box from above, a rim along x in a drawer, a bottle by its neck, a drawer, a plate, a knob.
@pytest.mark.parametrize(
    "task", ["libero_object/8", "libero_spatial/4", "libero_goal/9", "libero_goal/0", "libero_goal/5", "libero_goal/7"]
)
def test_experts_solve_fresh_placements(task, rng, envs):
    """Each of the tasks is solved in at least 90 % of many placements: see docs/libero.md."""
    solved = [succeeds(envs(task), fresh_seed(rng)) for _ in range(3)]
    assert sum(solved) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial", "libero_goal"])
def test_every_task_has_an_expert(suite, rng, envs):
    solved = {task: succeeds(envs(task), fresh_seed(rng)) for task in tables.tasks(suite)}
    assert sum(solved.values()) >= 8, solved


def test_an_action_follows_from_the_state_alone(rng, envs):
    """It can be asked on a branch of the episode, and again after a restore, by an expert made only then."""
    env = envs("libero_goal/3")
    env.reset(Episode(fresh_seed(rng)))
    expert = make_expert(env)
    for _ in range(int(rng.integers(5, 200))):
        env.step_chunk(expert.act()[None])
    snapshot = env.snapshot()
    expected = [expert.act()]
    assert np.array_equal(expert.act(), expected[0])
    for _ in range(8):
        env.step_chunk(expected[-1][None])
        expected.append(expert.act())
    env.reset(Episode(fresh_seed(rng)))
    env.restore(snapshot)
    other = make_expert(env)
    for action in expected:
        assert other.act().tobytes() == action.tobytes()
        env.step_chunk(action[None])


def test_the_privileged_poses_are_mujocos(rng, envs):
    env = envs("libero_goal/0")
    env.reset(Episode(fresh_seed(rng)))
    env.step_chunk(rng.uniform(-1, 1, (5, 7)))
    raw, world = env.raw, World(env.raw)
    world.update()
    before = raw.sim.data._data.site_xpos.copy()
    eef, low, high = world.eef, *world.box("akita_black_bowl_1")
    assert np.array_equal(raw.sim.data._data.site_xpos, before)  # looking changes nothing
    model, data = raw.sim.model._model, raw.sim.data._data
    mujoco.mj_forward(model, data)
    np.testing.assert_array_equal(eef, data.site_xpos[raw.robots[0].eef_site_id])
    np.testing.assert_array_equal(world.position("plate_1"), data.xpos[raw.obj_body_id["plate_1"]])
    assert abs(low[2] - world.table) < 0.004  # it stands on the table
    assert (low < world.position("akita_black_bowl_1") + [0, 0, 0.01]).all() and (high - low > 0.04).all()
    assert 0 < world.gap < 0.09 and abs(world.joint("wooden_cabinet_1_top_region")) < 0.02


def test_what_no_expert_knows_is_refused(envs):
    env = libero.make("libero_object/0")
    with pytest.raises(ValueError, match="the expert needs an episode: call reset first"):
        make_expert(env)
    env = envs("libero_10/0")
    env.reset(Episode(0))
    with pytest.raises(ValueError, match="there is no expert for the goal"):
        make_expert(env)
