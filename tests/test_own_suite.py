"""Environments of one's own: found by name, refused in a line, run by the ordinary commands."""

import dataclasses
import itertools
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, episodes
from envs.demos import run_episode
from envs.pool import EnvPool
from envs.suite import SingleEnv, Suite
from examples.reach import Reach
from z1_jax import stages, suites
from z1_jax.agreement import check_worlds
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError

ROOT = pathlib.Path(__file__).parents[1]


def config_of(name: str, *keys: str) -> Config:
    config = parse_command_line(["", "--config=configs/grpo.py", f"--config.env.suite={name}", *keys])
    suites.check_settings(config)
    return config


class NoCopies:
    """An environment without snapshots."""

    spec = EnvSpec(task="Wait", cameras=("eye",), image_size=8, action_dim=1, state_dim=1, control_hz=5.0, horizon=3)

    def reset(self, episode: Episode) -> None:
        self.left = 3

    def observe(self) -> EnvObservation:
        return EnvObservation({"eye": np.zeros((8, 8, 3), np.uint8)}, np.zeros(1, np.float32), "wait")

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        steps = min(len(actions), self.left)
        self.left -= steps
        return ChunkResult(steps, False, self.left == 0)

    def close(self) -> None: ...


NoCopies.expert = Reach.expert  # never asked
NOTHING, FAILS = 3, lambda: 1 / 0


@dataclasses.dataclass
class Half:
    """Not a whole suite."""

    env: object = None
    evaluation: object = None

    def make_env(self, task):
        return Reach


class Counted(SingleEnv):
    """A suite that says how often it was made."""

    made = 0

    def __init__(self, env, evaluation):
        super().__init__(Reach, "counted", Reach.expert)
        type(self).made += 1


def test_the_suite_of_a_run_is_made_once():
    """All that a run asks on its way: the checks of its config, its inputs and worlds, its environments."""
    config = suites.settled(config_of("test_own_suite:Counted"))
    before = Counted.made
    assert before <= 2  # once as the command line has it, once with what it settles itself
    config = stages.check_inputs(config)
    assert check_worlds(config) == [] and suites.facts(config)["horizon"] == 20
    suites.demonstrator(config), suites.episode_of(config)(3), stages.demonstrations_source(config)
    with stages.make_pool(config) as pool:
        assert pool.spec.task == "Reach"
    assert Counted.made == before + 1 and suites.resolve(config) is suites.resolve(config)


def test_a_new_suite_touches_one_file():
    """This one, and `examples/reach.py`, stand in no list."""
    for path in (p for top in ("envs", "z1_jax", "configs") for p in (ROOT / top).rglob("*.py")):
        text = path.read_text()
        assert "examples.reach" not in text and "NoCopies" not in text, path


def test_a_class_of_an_environment_is_a_suite():
    config = suites.settled(config_of("examples.reach:Reach"))
    suite = suites.resolve(config)
    assert isinstance(suite, Suite) and suite.branches
    assert (config.task, config.env.cameras, config.env.image_size, config.env.horizon) == ("Reach", ("top",), 64, 20)
    assert suites.widths(config) == {"actions": 2, "state": 2} and suites.episode_steps(config) == 20
    assert suites.episode_of(config)(7) == Episode(7, "Reach")
    with EnvPool(suites.make_env(config, "Reach"), 2, 1) as pool:  # a worker imports it too
        looks = pool.reset([0, 1], episodes([3, 4], "Reach"))
    alone = Reach()
    alone.reset(Episode(3))
    np.testing.assert_array_equal(looks[0].images["top"], alone.observe().images["top"])


def test_the_built_in_suites_are_whole():
    for where in suites.BUILT_IN.values():
        made = suites._found(where)(Config().env, Config().eval)
        assert isinstance(made, Suite)
        assert set().union(*made.sets.values()) <= set(made.tasks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere",
            "'nowhere' does not exist; known: kitchen, robocasa, libero, metaworld, gym:ENV_ID, or package",
        ),
        ("no.such:thing", "cannot be imported: ModuleNotFoundError"),
        ("test_own_suite:missing", "cannot be imported: AttributeError"),
        ("test_own_suite:NOTHING", "is a int; expected a suite or a function"),
        ("test_own_suite:FAILS", "failed: ZeroDivisionError"),
        ("test_own_suite:Half", "is no suite: it lacks name, tasks"),
    ],
)
def test_what_is_no_suite_is_one_line(name, message, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    with pytest.raises(ConfigError, match=f"^config key env.suite: .*{message}") as error:
        config_of(name)
    assert "\n" not in str(error.value)


def test_what_cannot_be_copied_does_not_branch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    with pytest.raises(ConfigError, match="group.branching: got tree, but environments of .* cannot be copied"):
        config_of("test_own_suite:NoCopies")
    apart = ("--config.group.branching=none", "--config.group.prefix_chunks=0", "--config.group.prefix_chunks_end=0")
    assert not suites.resolve(config_of("test_own_suite:NoCopies", *apart)).branches
    with pytest.raises(ConfigError, match="demos.labels: got undisturbed, .* expected recorded"):
        config_of("test_own_suite:NoCopies", *apart, "--config.demos.labels=undisturbed")


class Whim(Reach):
    """Starts anew each time, whatever the seed."""

    expert = Reach.expert
    starts = itertools.count()

    def reset(self, episode: Episode) -> None:
        super().reset(Episode(next(self.starts)))


class Greyish(Reach):
    """Its picture is no picture."""

    def observe(self) -> EnvObservation:
        return dataclasses.replace(super().observe(), images={"top": np.zeros((64, 64), np.uint8)})


def test_what_breaks_the_interface_is_told_before_a_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    for name, message in (
        ("Whim", "seed 0 started differently the second time"),
        ("Greyish", r"images\['top'\]: got uint8 \[64, 64\], expected uint8 \[64, 64, 3\]"),
    ):
        with pytest.raises(ConfigError, match=f"^config key env.suite: test_own_suite:{name} failed: .*{message}"):
            config_of(f"test_own_suite:{name}")


def test_settings_that_it_decides_itself_are_not_overruled():
    for key, value in (("image_size", 32), ("cameras", "side"), ("horizon", 9)):
        with pytest.raises(ConfigError, match=f"env.{key}: got {value}, but environments of .* have"):
            suites.settled(config_of("examples.reach:Reach", f"--config.env.{key}={value}"))
    assert suites.settled(config_of("examples.reach:Reach", "--config.env.horizon=20")).env.horizon == 20
    with pytest.raises(ConfigError, match="config key task: 'Grasp' does not exist; known: Reach"):
        suites.make_env(config_of("examples.reach:Reach"), "Grasp")


def test_the_working_directory_is_looked_in(tmp_path):
    (tmp_path / "their_world.py").write_text("from examples.reach import Reach\n")
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p] + [{str(ROOT)!r}]\n"  # as a console script
        "from z1_jax import suites\nfrom z1_jax.config.command_line import parse_command_line\n"
        "from envs.pool import EnvPool\n"
        "config = parse_command_line(['', '--config.env.suite=their_world:Reach'])\n"
        "with EnvPool(suites.make_env(config, 'Reach'), 1, 1) as pool: print(pool.spec.task)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "Reach\n", done.stderr


def test_keys_of_another_suite_are_refused():
    with pytest.raises(ConfigError, match="env.objects: .* which only env.suite=kitchen and robocasa has"):
        config_of("examples.reach:Reach", "--config.env.objects=heldout")
    with pytest.raises(ConfigError, match="env.styles: got .'steel'., which only env.suite=kitchen has"):
        config_of("examples.reach:Reach", "--config.env.styles=steel")


def test_frames_for_people_are_what_the_policy_sees_where_there_is_no_render():
    with EnvPool(Reach, 1, 0) as pool:
        (look,) = pool.reset([0], [Episode(5)])
        (frame,) = pool.render([0], "top", 128)
    np.testing.assert_array_equal(frame[::2, ::2], look.images["top"])


def test_the_example_of_the_docs_is_a_suite(tmp_path, monkeypatch):
    """Its expert succeeds through it, and it does not branch."""
    example, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-environment.md").read_text(), re.DOTALL)
    (tmp_path / "my_world.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = ("--config.env.executed=4", "--config.demos.labels=recorded", "--config.group.branching=none")
    apart = ("--config.group.prefix_chunks=0", "--config.group.prefix_chunks_end=0")
    config = suites.settled(config_of("my_world:Push", *keys, *apart))
    assert not suites.resolve(config).branches
    demonstrator = suites.demonstrator(config)
    assert pickle.loads(pickle.dumps(demonstrator)) == demonstrator  # workers get it
    shown = [run_episode(demonstrator, demonstrator.make_env(), Episode(seed), labels="recorded") for seed in range(8)]
    assert all(one.success and one.actions.shape[1:] == (8, 1) for one in shown)


@pytest.mark.slow
def test_the_ordinary_command_trains_in_it(tmp_path):
    keys = {
        "env.suite": "examples.reach:Reach",
        "env.parallel": 16,
        "demos.episodes": 60,
        "sft.steps": 40,
        "train.iterations": 2,
        "group.count": 2,
        "eval.episodes": 32,
        "run_dir": tmp_path / "run",
    }
    command = [sys.executable, "-m", "z1_jax.train", *(f"--config.{key}={value}" for key, value in keys.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "success on Reach from" in done.stdout and (tmp_path / "run" / "report.html").exists()
