"""Broken physics: each of MuJoCo's warnings, and in every kitchen task an episode that ends there as a failure."""

import dataclasses
import pathlib
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from envs import stability
from envs.base import Episode, episodes
from envs.kitchen import TASKS, make
from envs.pool import EnvPool

ROOT = pathlib.Path(__file__).parent.parent
CART = """
<mujoco>
  <option gravity="0 0 0" timestep="0.005"/>
  <worldbody>
    <body><freejoint name="ball"/><geom size="0.1" mass="1"/></body>
    <body pos="5 0 0"><joint name="rail" type="slide"/><geom size="0.1" mass="1"/></body>
  </worldbody>
  <actuator><motor name="push" joint="rail"/></actuator>
</mujoco>
"""
SPEED = np.pi / 0.005  # half a revolution, or as many metres, in one time step


@pytest.fixture
def cart():
    stability.keep_no_log()
    model = mujoco.MjModel.from_xml_string(CART)
    return model, mujoco.MjData(model)


@pytest.fixture(scope="module")
def kitchens():
    """One environment a task, built once: `reset` makes it new."""
    built = {}
    return lambda task: built.setdefault(task, make(task, image_size=8))


# The ball has qpos 0..6 and degrees of freedom 0..5, the rail the next of each.
@pytest.mark.parametrize(
    ("field", "index", "value", "cause"),
    [
        ("qpos", 7, 1e11, "BADQPOS at rail"),
        ("qpos", 2, np.nan, "BADQPOS at ball"),
        ("qvel", 6, np.inf, "BADQVEL at rail"),
        ("qvel", 5, -1e11, "BADQVEL at ball"),
        ("qfrc_applied", 6, 1e11, "BADQACC at rail"),
        ("ctrl", 0, np.nan, "BADCTRL at push"),
        ("qvel", 6, 1.01 * SPEED, f"speed {1.01 * SPEED:.3g} at rail"),
        ("qvel", 4, -1.01 * SPEED, f"speed {1.01 * SPEED:.3g} at ball"),
    ],
)
def test_each_breakdown_is_named_with_its_joint(cart, field, index, value, cause):
    model, data = cart
    mujoco.mj_step(model, data, nstep=10)
    assert stability.breakdown(model, data) == ""
    getattr(data, field)[index] = value
    mujoco.mj_step(model, data, nstep=10)
    assert stability.breakdown(model, data) == cause


def test_what_is_fast_but_resolved_or_another_warning_is_no_breakdown(cart):
    model, data = cart
    data.qvel[:] = 0.99 * SPEED
    mujoco.mj_step(model, data)
    data.warning.number[int(mujoco.mjtWarning.mjWARN_CONTACTFULL)] = 3
    assert stability.breakdown(model, data) == ""


def test_forgiven_and_reset_data_are_sound(cart):
    model, data = cart
    for mend in (lambda: stability.forgive(data), lambda: mujoco.mj_resetData(model, data)):
        data.qvel[:] = 1e12
        mujoco.mj_step(model, data)
        assert stability.breakdown(model, data)
        mend()
        assert stability.breakdown(model, data) == ""


def test_nothing_is_written_into_the_users_folder(tmp_path):
    """In a process of its own, where no handler of MuJoCo's warnings was there before."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import numpy as np; from envs.kitchen import make\n"
        "env = make('TurnOffStove', image_size=8); env.world.data.qvel[:] = 1e12\n"
        "print(env.step_chunk(np.zeros((1, 12))).unstable)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_the_users_stays(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import mujoco, numpy as np; from envs.kitchen import make\n"
        "mujoco.set_mju_user_warning(lambda text: print('mine:', text[:20]))\n"
        "env = make('TurnOffStove', image_size=8); env.world.data.qvel[:] = 1e12\n"
        "env.step_chunk(np.zeros((1, 12)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("mine: Nan, Inf or huge")


@pytest.mark.parametrize("task", TASKS)
def test_no_task_succeeds_before_its_first_action_nor_by_broken_physics(task, kitchens, rng):
    env = kitchens(task)
    width, idle = env.spec.action_dim, np.zeros((1, env.spec.action_dim))
    for seed in rng.integers(2**31, size=4).tolist():
        print(f"episode {seed}")
        env.reset(Episode(seed))
        env.task.update(env.world)
        assert not env.task.success(env.world) and not env.done
        assert not env.step_chunk(idle).success
        env.step_chunk(rng.uniform(-0.1, 0.1, (int(rng.integers(1, 8)), width)))
        assert not env.done  # else the next lines would show nothing
        sound, steps = env.snapshot(), env.steps
        env.world.data.qvel[rng.integers(env.world.model.nv)] = rng.choice([1e12, -1e12, np.inf, np.nan])
        result = env.step_chunk(rng.uniform(-1, 1, (8, width)))
        assert (result.steps, result.success, result.done, result.unstable) == (1, False, True, True)
        assert env.broken.startswith("BADQVEL") and env.world.data.time < steps / env.spec.control_hz  # MuJoCo's reset
        again = env.step_chunk(rng.uniform(-1, 1, (8, width)))
        assert (again.steps, again.success, again.done, again.unstable) == (0, False, True, True)

        broken = env.snapshot()
        env.restore(sound)  # the warning is not the sound state's
        assert not env.done and not env.step_chunk(idle).unstable and env.steps == steps + 1
        env.restore(broken)
        assert env.done and env.broken and not env.success and env.step_chunk(idle).steps == 0
        env.reset(Episode(seed))
        assert not env.done and not env.step_chunk(idle).unstable


def test_actions_that_broke_the_physics_no_longer_succeed():
    """All nine were successes: MuJoCo put the faucet back into its compiled pose, which counts as turned off. Another
    MuJoCo or processor rounds otherwise, so that they need not break there."""
    env, unstable = make("TurnOffSinkFaucet", image_size=8), 0
    plans = {12: np.random.default_rng([12, 7]).uniform(-1, 1, (40, 12))}
    for seed in (40, 74, 121, 259, 361, 638, 660, 932):
        plans[seed] = np.repeat(np.random.default_rng([seed, 8]).choice([-1.0, 1.0], (5, 12)), 8, axis=0)
    for seed, actions in plans.items():
        env.reset(Episode(seed))
        result = env.step_chunk(actions)
        assert result.done and not result.success
        unstable += result.unstable
    if not unstable:
        pytest.skip(f"none of them breaks under MuJoCo {mujoco.__version__} on this processor")


class BreaksAtFour:
    """A kitchen whose physics breaks at its fourth control step, made in a worker."""

    def __call__(self):
        env = make("CloseDrawer", image_size=8)
        step = env.step_chunk

        def one_by_one(actions):
            executed = 0
            for action in actions:
                if env.steps == 4:
                    env.world.data.qvel[:] = 1e12
                result = step(action[None])
                executed += result.steps
            return dataclasses.replace(result, steps=executed)

        env.step_chunk = one_by_one
        return env


@pytest.mark.parametrize("workers", [0, 2])
def test_branches_of_an_unstable_episode_are_unstable(workers, rng):
    """Through the pool, its snapshots and the replay of its journal in a worker that was replaced."""
    with EnvPool(BreaksAtFour(), 3, workers) as pool:
        pool.reset([0, 1, 2], episodes(rng.integers(2**31, size=3).tolist()))
        chunk = rng.uniform(-0.2, 0.2, (1, 4, 12))
        assert [r.done for r in pool.step([0], chunk)[0]] == [False]
        results, seen = pool.step([0], chunk)
        assert (results[0].unstable, results[0].done, results[0].success, seen[0]) == (True, True, False, None)
        pool.branch([0, 0], [1, 2])
        if workers:
            pool._crew.workers[1]._process.kill()  # that of slot 1
        for result in pool.step([0, 1, 2], np.repeat(chunk, 3, axis=0))[0]:
            assert (result.unstable, result.done, result.success) == (True, True, False)
