"""The evaluation before RL, taken from the run that RL starts from."""

import dataclasses
import json
import os

import pytest
import tiny_policy as tiny

from envs.base import Episode
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import Config, EnvConfig, EvalConfig
from z1_jax.earlier_evaluation import take_over
from z1_jax.initial_policy import with_pinned_init
from z1_jax.run_dir import policy_identity, protocol
from z1_jax.train import main

TASKS = ("OpenDrawer", "CloseDrawer")
CONFIG = Config(
    algorithm="sft",
    tasks=TASKS,
    eval=EvalConfig(episodes=3),
    env=EnvConfig(cameras=(tiny.CAMERA,), image_size=tiny.PIXELS),
)
EPISODES = [Episode(seed, task) for task in TASKS for seed in range(900_000_000, 900_000_003)]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(source, rows):
    (source / "evaluation" / "after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run directory with the policy of its SFT."""
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    checkpoints = Checkpoints(run_dir / "checkpoints" / "sft")
    checkpoints.save(3, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    return run_dir


@pytest.fixture
def runs(checkpoint, tmp_path, rng):
    """A finished SFT run of two tasks, and an RL run of one of them that begins: (its config, their folders, rows)."""
    source, mine = checkpoint, tmp_path / "grpo"
    rows = [
        {**episode.to_json(), "success": bool(rng.random() < 0.5), "steps": int(rng.integers(1, 60)), "unstable": False}
        for episode in EPISODES
    ]
    write(source / "config.json", dataclasses.asdict(CONFIG))
    write(source / "summary.json", {"protocol": protocol(CONFIG, tiny.policy())})
    write(source / "evaluation" / "policies.json", {"after": policy_identity(str(source))})
    write_rows(source, rows)
    write(mine / "policies.json", {"init": policy_identity(str(source))})
    for folder in (source, mine):
        write(folder / "environments.json", ["mujoco 3.3.1, envs 12345678"])
    config = dataclasses.replace(CONFIG, algorithm="grpo", tasks=(), task="CloseDrawer", init=str(source))
    config = with_pinned_init(config)  # as every run has it
    assert config.init.endswith("checkpoints/sft/3")
    return config, source, mine, rows


def changed(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_the_same_policy_on_the_same_episodes_is_not_evaluated_twice(runs, capsys):
    config, source, mine, rows = runs
    config = changed(config, "env", workers=7, parallel=3)  # how many at once, and where
    config = changed(config, "eval", videos=0, confidence=0.9)
    config = changed(config, "model", preset="pi05", dtype="bfloat16")  # the checkpoint's count
    assert take_over(config, tiny.policy(), mine, EPISODES[3:])
    results = mine / "evaluation" / "before.jsonl"
    assert [json.loads(line) for line in results.read_text().splitlines()] == rows[3:]
    assert f"the 3 episodes that {source} has of this policy" in capsys.readouterr().out
    assert json.loads((mine / "evaluation" / "before_from.json").read_text()) == {"run": str(source)}
    results.write_text("")  # one that has begun here goes on here
    assert not take_over(config, tiny.policy(), mine, EPISODES[3:]) and not results.read_text()


def test_what_differs_by_task_is_compared_for_the_tasks_that_are_asked_for(runs):
    config, source, mine, _ = runs
    told(source, physics=None, by_task={"OpenDrawer": {"physics": 9}, "CloseDrawer": {"physics": 8}})
    assert not take_over(config, tiny.policy(), mine, EPISODES[3:])
    own = protocol(CONFIG, tiny.policy())["physics"]
    told(source, physics=None, by_task={"OpenDrawer": {"physics": 9}, "CloseDrawer": {"physics": own}})
    assert take_over(config, tiny.policy(), mine, EPISODES[3:])


def test_what_a_run_says_of_its_own_start_does_not_matter(runs):
    """An RL run that took over the evaluation of its start, or one whose dataset had other words."""
    config, source, mine, _ = runs
    told(source, before_from="runs/sft", allowed_to_differ=["rate"], differences=["instruction: other words"])
    assert take_over(config, tiny.policy(), mine, EPISODES[3:])


def told(source, **values):
    """The source's summary says something else."""
    write(source / "summary.json", {"protocol": {**protocol(CONFIG, tiny.policy()), **values}})


def rows_of(source):
    return [json.loads(line) for line in (source / "evaluation" / "after.jsonl").read_text().splitlines()]


OTHER = {
    "policy": lambda config, source, mine: write(mine / "policies.json", {"init": "abd-1"}),
    "trained on since": lambda config, source, mine: write(source / "evaluation" / "policies.json", {"after": "x"}),
    "simulator": lambda config, source, mine: write(mine / "environments.json", ["mujoco 3.4.0, envs 12345678"]),
    "layouts": lambda config, source, mine: changed(config, "env", layouts=("heldout",)),
    "horizon": lambda config, source, mine: changed(config, "env", horizon=20),
    "noise": lambda config, source, mine: changed(config, "eval", noise_seed=1),
    "denoising steps": lambda config, source, mine: changed(config, "flow", steps=2),
    "acting": lambda config, source, mine: changed(config, "model", acting="prepared"),
    "code": lambda config, source, mine: told(source, revision="another"),
    "jax": lambda config, source, mine: told(source, jax="0.1"),
    "devices": lambda config, source, mine: told(source, devices="8 × TPU"),
    "forced": lambda config, source, mine: told(source, forced=[{"key": "env.parallel"}]),
    "damaged": lambda config, source, mine: (source / "summary.json").write_text("{"),
    "no run": lambda config, source, mine: (source / "config.json").unlink(),
    "unfinished": lambda config, source, mine: (source / "summary.json").unlink(),
    "row": lambda config, source, mine: write_rows(source, [{**row, "steps": "many"} for row in rows_of(source)]),
    "lost": lambda config, source, mine: write_rows(source, [{**row, "lost": True} for row in rows_of(source)]),
    "untrained": lambda config, source, mine: dataclasses.replace(config, init="random"),
    "a checkpoint alone": lambda config, source, mine: alone(config, source, mine),
}


def alone(config, source, mine):
    """The policy by itself, copied out of its run."""
    os.symlink(source / "checkpoints" / "sft", mine.parent / "policies")
    return dataclasses.replace(config, init=str(mine.parent / "policies" / "3"))


@pytest.mark.parametrize("what", OTHER)
def test_another_evaluation_is_not_taken_over(what, runs):
    config, source, mine, _ = runs
    config = OTHER[what](config, source, mine)
    config = config if isinstance(config, Config) else runs[0]
    assert not take_over(config, tiny.policy(), mine, EPISODES[3:])
    assert not (mine / "evaluation").exists()


def test_seeds_beyond_those_evaluated_are_not_taken_over(runs):
    config, _, mine, _ = runs
    assert not take_over(config, tiny.policy(), mine, [*EPISODES[3:], Episode(900_000_003, "CloseDrawer")])


@pytest.mark.slow
def test_the_command_takes_it_over(tmp_path, capsys):
    """SFT of two tasks, then RL of one from there, by their commands; its evaluation is not made."""
    small = ["env.parallel=2", "env.workers=0", "env.horizon=24", "eval.episodes=2"]
    source, mine = tmp_path / "sft", tmp_path / "grpo"

    def run(file, *keys):
        main(["train.py", f"--config=configs/{file}.py:smoke", *(f"--config.{key}" for key in (*small, *keys))])

    run("sft", "tasks=OpenDrawer,CloseDrawer", f"run_dir={source}", "demos.episodes=1", "sft.steps=5")
    rows = rows_of(source)
    capsys.readouterr()
    alone = ["group.branching=none", "group.prefix_chunks=0", "group.prefix_chunks_end=0"]
    more = ["train.iterations=1", "group.count=1", "group.size=2", "eval.videos=0"]
    run("grpo", "task=CloseDrawer", f"run_dir={mine}", f"init={source}", *alone, *more)
    out = capsys.readouterr().out
    assert f"the 2 episodes that {source} has" in out
    assert [json.loads(line) for line in (mine / "evaluation" / "before.jsonl").read_text().splitlines()] == rows[2:]
    summary = json.loads((mine / "summary.json").read_text())
    assert summary["protocol"]["before_from"] == str(source)
    assert summary["before"]["successes"] == sum(row["success"] for row in rows[2:])
