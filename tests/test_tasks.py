"""Many tasks in one run: what a config may ask for, what is refused of it, and a whole run."""

import dataclasses
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_policy as tiny
from test_simulators import Counted

from envs.base import Env, Episode
from envs.libero import compat
from z1_jax import stages, suites, train
from z1_jax.agreement import check_worlds
from z1_jax.checkpoint import Checkpoints
from z1_jax.collect import __main__ as collect
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError, EnvConfig, fingerprint
from z1_jax.data.dataset import open_dataset
from z1_jax.metrics import read_records

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


class Several:
    """A suite of one's own: three tasks that cannot be copied, or of which one is wider."""

    name, sets, own_keys = "Several", {"pair": ("A", "B")}, ()
    tasks = ("A", "B", "wide")
    action_dim, state_dim, control_hz, branches, label, instructions = 3, 2, 20.0, True, "", ()

    def __init__(self, env, evaluation):
        pass

    def settle(self, task: str):
        return {"cameras": ("eye",), "image_size": 4}

    def check(self, task: str) -> None:
        pass

    def make_env(self, task: str):
        return functools.partial(of_task, task)

    def horizon(self, task: str) -> int:
        return 12 if task == "A" else 16

    def episode(self, task: str, seed: int) -> Episode:
        return Episode(seed, task)

    def demonstrator(self, task: str):
        return None

    def facts(self, task: str):
        return {"horizon": self.horizon(task), "rules": 1}

    def other_names(self, task: str):
        return ()

    def state_bounds(self):
        return np.zeros(2), np.ones(2)


class Sharing(Several):
    shares = True


class Uncopied(Several):
    branches = False


def of_task(task: str) -> Env:
    env = Counted(task, 12 if task == "A" else 16)
    if task == "wide":
        env.spec = dataclasses.replace(env.spec, action_dim=7)
    return env


def parse(*arguments: str, file: str = "grpo.py:smoke") -> Config:
    return parse_command_line(["main", f"--config={CONFIGS / file}", *(f"--config.{key}" for key in arguments)])


def opened(*arguments: str, file: str = "grpo.py:smoke") -> Config:
    """The config as a run has it, after all that is looked at before anything is computed."""
    config = stages.check_inputs(suites.settled(parse(*arguments, file=file)))
    check_worlds(config)
    return config


def test_names_and_sets_are_the_same_tasks():
    named = suites.settled(parse("tasks=OpenDrawer,CloseDrawer"))
    assert named.every_task == ("OpenDrawer", "CloseDrawer") == suites.settled(parse("tasks=drawers")).every_task
    assert fingerprint(named) == fingerprint(suites.settled(parse("tasks=drawers")))
    assert (
        named.directory.name == "grpo-OpenDrawer+CloseDrawer-seed0" and named.task_words == "OpenDrawer and CloseDrawer"
    )
    many = suites.settled(parse("tasks=kitchen24"))
    assert len(many.every_task) == 24 and many.directory.name.startswith("grpo-24tasks-")
    assert suites.settled(parse("tasks=drawers,TurnOnStove")).task_words == "3 tasks"


def test_one_task_is_what_it_was():
    """The same config, run directory and fingerprint, however it is asked for."""
    alone = suites.settled(parse("task=OpenDrawer"))
    assert suites.settled(parse("tasks=OpenDrawer")) == alone and alone.directory.name == "grpo-OpenDrawer-seed0"
    assert alone.every_task == ("OpenDrawer",) and alone.tasks == ()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tasks=OpenDrawer,Juggle"], ["config key tasks: 'Juggle' does not exist", "sets: kitchen24, drawers"]),
        (["tasks=OpenDrawer,drawers"], ["tasks: OpenDrawer is there twice, as OpenDrawer and as drawers"]),
        (["tasks=OpenDrawer,OpenDrawer"], ["tasks: OpenDrawer is there twice", "expected each task once"]),
        (["tasks=robocasa24"], ["tasks: robocasa24 is a set of env.suite=robocasa; sets of env.suite=kitchen: k"]),
        (["tasks=libero_10"], ["tasks: libero_10 is a set of env.suite=libero"]),
        (["tasks=drawers", "task=OpenDrawer"], ["config key task: it has no effect beside tasks"]),
        (["group.spread=adaptive"], ["group.spread: got adaptive, which has no effect on one task"]),
        (["demos.sampling=balanced"], ["demos.sampling: got balanced, which has no effect on one task"]),
        (["tasks=drawers", "group.floor=0.5"], ["group.floor: got 0.5, which has no effect with group.spread=uniform"]),
        (["tasks=drawers", "group.spread=random"], ["group.spread: got 'random', expected one of uniform, adaptive"]),
        (["group.oversample=0.5"], ["group.oversample: got 0.5, expected 1.0 … 100.0"]),
        (["env.suite=test_tasks:Several", "tasks=A,wide", "init=random", "env.workers=0"],
         ["config key tasks", "wide: the environment's spec.action_dim: got 7, expected 3"]),
        (["env.suite=test_tasks:Uncopied", "tasks=pair", "init=random", "env.simulators=2", "group.branching=none",
          "group.prefix_chunks=0", "group.prefix_chunks_end=0"],
         ["env.simulators: got 2, but environments of env.suite=test_tasks:Uncopied cannot be copied", "expected 0"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments, parts):
    with pytest.raises(ConfigError) as error:
        opened(*arguments)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_one_of_two_names_of_a_task_is_enough():
    with pytest.raises(ConfigError, match="PickPlaceCounterToSink is there twice, as PnPCounterToSink and as Pick"):
        suites.check_settings(parse("tasks=PnPCounterToSink,PickPlaceCounterToSink", file="grpo.py:robocasa"))


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_that_no_list_has_is_a_name_of_the_task_all_the_same(order, monkeypatch):
    """LIBERO's tasks are listed by their numbers, and understood by their full names too."""
    monkeypatch.setattr(compat, "task_maps", lambda: {"libero_object": {"get_milk": None, "get_soup": None}})
    given = ["libero_object/1", "libero_object/get_soup"]
    tasks = ("libero_object/get_milk", "libero_object/1")
    config = Config(env=EnvConfig(suite="libero", objects=("train",)), tasks=tasks)
    assert suites.names_of_tasks(config) == (("libero_object/get_milk", "libero_object/0"), tuple(given))
    with pytest.raises(ConfigError, match=f"{given[::order][1]} is there twice"):
        suites.with_tasks(dataclasses.replace(config, tasks=tuple(given[::order])))


def test_tasks_may_differ_in_their_horizon():
    config = opened("env.suite=test_tasks:Several", "tasks=pair", "init=random", "env.workers=0", "env.executed=4")
    assert (suites.episode_steps(config), suites.least_episode_steps(config)) == (16, 12)
    assert suites.facts(config) == {"rules": 1, "by_task": {"A": {"horizon": 12}, "B": {"horizon": 16}}}
    with pytest.raises(ConfigError, match="group.prefix_chunks: got 3, but an episode of 12 steps has 3 chunks"):
        opened(
            "env.suite=test_tasks:Several", "tasks=pair", "init=random", "env.workers=0", "env.executed=4",
            "group.prefix_chunks=3",
        )  # fmt: skip


def test_how_many_simulators_a_worker_keeps():
    def of(*arguments):
        return suites.simulators(suites.settled(parse(*arguments)))

    pair = "env.suite=test_tasks:Sharing", "tasks=pair", "init=random"
    assert of() == 0 and of("tasks=kitchen24") == 0 and of("env.simulators=5") == 5
    assert of(*pair) == 2 and of(*pair, "env.simulators=1") == 1
    assert of(*pair, "env.parallel=8", "env.workers=8") == 1  # never more than environments
    assert of("env.suite=test_tasks:Several", "tasks=pair", "init=random") == 0  # it does not say that they may share


@pytest.fixture(scope="module")
def drawers(tmp_path_factory) -> pathlib.Path:
    """Demonstrations of OpenDrawer and CloseDrawer, two of each."""
    out = tmp_path_factory.mktemp("drawers") / "set"
    collect.main(["collect", "drawers", "--episodes=2", "--workers=0", f"--out={out}"])
    return out


def test_demonstrations_of_several_tasks(drawers, capsys, tmp_path):
    dataset = open_dataset(drawers)
    assert [row.task for row in dataset.episodes] == ["OpenDrawer"] * 2 + ["CloseDrawer"] * 2
    assert dataset.source["tasks"] == ["OpenDrawer", "CloseDrawer"] and "task" not in dataset.source
    assert [path.name for path in drawers.parent.iterdir()] == ["set"]  # no journal is left
    collect.main(["collect", "drawers", "--episodes=2", "--workers=0", f"--out={drawers}"])
    assert "already collected: 4 demonstrations of OpenDrawer and CloseDrawer" in capsys.readouterr().out
    collect.main(["collect", "CloseDrawer", "--episodes=2", "--workers=0", f"--out={tmp_path / 'one'}"])
    alone = open_dataset(tmp_path / "one")  # of each task they are those of the task by itself
    for mine, theirs in zip(alone.episodes, dataset.episodes[2:], strict=True):
        np.testing.assert_array_equal(
            alone[mine.first_record].actions, dataset[theirs.first_record].actions, err_msg=str(mine.seed)
        )


def test_a_dataset_that_lacks_a_task_is_refused(drawers, capsys):
    given = f"demos.dataset={drawers}"
    opened("tasks=drawers", given, "env.workers=0")
    with pytest.raises(ConfigError, match="demos.dataset: does not match the environments: task differs"):
        opened("tasks=drawers,TurnOnStove", given, "env.workers=0")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: task")]
    assert len(told) == 1 and "has OpenDrawer, CloseDrawer, the environment of TurnOnStove TurnOnStove" in told[0]
    opened("tasks=drawers,TurnOnStove", given, "env.workers=0", "allow=task")


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path, capsys):
    policy = dataclasses.replace(tiny.policy(), world={"tasks": ["OpenDrawer"], "instructions": [], "rate": 20.0})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, policy.parts(), policy.document())
    checkpoints.close()
    given = f"init={tmp_path / '1'}", f"env.cameras={tiny.CAMERA}", "env.workers=0"
    opened("task=OpenDrawer", *given)
    with pytest.raises(ConfigError, match="config key init: does not match the environments: task differs"):
        opened("tasks=drawers", *given)
    assert "the environment of CloseDrawer CloseDrawer" in capsys.readouterr().out


def test_a_whole_run_of_two_tasks(drawers, tmp_path, capsys):
    """Evaluation, groups, films and report know each task; the same command again says that it is finished."""
    run_dir = tmp_path / "run"
    policy = dataclasses.replace(tiny.policy(), world={"tasks": ["OpenDrawer", "CloseDrawer"], "instructions": []})
    checkpoints = Checkpoints(tmp_path / "policy")
    checkpoints.save(1, policy.parts(), policy.document())
    checkpoints.close()
    command = [
        "train.py", f"--config={CONFIGS / 'grpo.py'}:smoke", "--config.tasks=drawers",
        f"--config.init={tmp_path / 'policy' / '1'}", f"--config.env.cameras={tiny.CAMERA}", "--config.env.workers=0",
        "--config.env.horizon=16", "--config.env.parallel=8", "--config.group.size=4", "--config.group.count=2",
        "--config.group.oversample=2", "--config.group.spread=adaptive", "--config.reward.keep_low=0.1",
        "--config.eval.episodes=3", "--config.eval.videos=1", "--config.eval.video_size=16", "--config.flow.steps=0",
        "--config.group.prefix_chunks=1", "--config.mesh.data=8", f"--config.run_dir={run_dir}",
    ]  # fmt: skip
    train.main(command)
    out = capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["task"] == ["OpenDrawer", "CloseDrawer"] == list(summary["tasks"])
    assert summary["before"]["episodes"] == 6 and summary["tasks"]["OpenDrawer"]["before"]["episodes"] == 3
    assert "\n  OpenDrawer: " in out and "3 held-out seeds of each" in summary["sentence"]
    rows = read_records(run_dir / "evaluation" / "after.jsonl")
    assert [row["task"] for row in rows] == ["OpenDrawer"] * 3 + ["CloseDrawer"] * 3
    records = read_records(run_dir / "metrics.jsonl")
    for record in records:
        assert record["tasks/OpenDrawer/groups"] + record["tasks/CloseDrawer/groups"] == 2
        assert record["groups/drawn"] == 4  # a policy that always fails: all that the budget allows
    assert sum(part["groups"] for part in summary["training_by_task"].values()) == 2 * len(records)
    page = (run_dir / "report.html").read_text()
    for text in (
        "Each task",
        "largest fall",
        "Training success: OpenDrawer",
        "OpenDrawer, seed",
        "OpenDrawer, CloseDrawer",
    ):
        assert text in page
    assert len(list((run_dir / "videos").glob("*_CloseDrawer_seed*.webp"))) == 2
    train.main(command)
    assert "already finished" in capsys.readouterr().out
    shutil.rmtree(run_dir / "checkpoints" / "grpo" / "2")  # as if it had been killed in the second iteration
    for name in ("summary.json", "evaluation/after.jsonl"):
        (run_dir / name).unlink()
    train.main(command)
    again = json.loads((run_dir / "summary.json").read_text())
    assert [again[key] for key in ("tasks", "training_by_task")] == [
        summary[key] for key in ("tasks", "training_by_task")
    ]
    untimed = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in records]
    assert untimed == [
        {k: v for k, v in row.items() if not k.startswith("time/")} for row in read_records(run_dir / "metrics.jsonl")
    ]
