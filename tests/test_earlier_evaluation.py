"""The evaluation before RL, taken from the run that RL starts from."""

import dataclasses
import json

import pytest

from envs.base import Episode
from z1_jax.config.schema import Config, EvalConfig
from z1_jax.earlier_evaluation import take_over

TASKS = ("OpenDrawer", "CloseDrawer")
CONFIG = Config(algorithm="sft", tasks=TASKS, eval=EvalConfig(episodes=3))
EPISODES = [Episode(seed, task) for task in TASKS for seed in range(900_000_000, 900_000_003)]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def runs(tmp_path, rng):
    """A finished SFT run of two tasks, and an RL run of one of them that begins: (its config, their folders, rows)."""
    source, mine = tmp_path / "sft", tmp_path / "grpo"
    rows = [
        {**episode.to_json(), "success": bool(rng.random() < 0.5), "steps": int(rng.integers(1, 60)), "unstable": False}
        for episode in EPISODES
    ]
    write(source / "config.json", dataclasses.asdict(CONFIG))
    write(source / "evaluation" / "policies.json", {"after": "abc-1"})
    (source / "evaluation" / "after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(mine / "policies.json", {"init": "abc-1"})
    for folder in (source, mine):
        write(folder / "environments.json", ["mujoco 3.3.1, envs 12345678"])
    config = dataclasses.replace(CONFIG, algorithm="grpo", tasks=(), task="CloseDrawer", init=str(source))
    return config, source, mine, rows


def changed(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_the_same_policy_on_the_same_episodes_is_not_evaluated_twice(runs, capsys):
    config, source, mine, rows = runs
    config = changed(config, "env", workers=7, parallel=3)  # how many at once, and where
    config = changed(config, "eval", videos=0, confidence=0.9)
    assert take_over(config, mine, EPISODES[3:])
    results = mine / "evaluation" / "before.jsonl"
    assert [json.loads(line) for line in results.read_text().splitlines()] == rows[3:]
    assert f"the 3 episodes that {source} has of this policy" in capsys.readouterr().out
    results.write_text("")  # one that has begun here goes on here
    assert not take_over(config, mine, EPISODES[3:]) and not results.read_text()


OTHER = {
    "policy": lambda config, source, mine: write(mine / "policies.json", {"init": "abd-1"}),
    "trained on since": lambda config, source, mine: write(source / "evaluation" / "policies.json", {"after": "x"}),
    "simulator": lambda config, source, mine: write(mine / "environments.json", ["mujoco 3.4.0, envs 12345678"]),
    "executed": lambda config, source, mine: changed(config, "env", executed=2),
    "layouts": lambda config, source, mine: changed(config, "env", layouts=("heldout",)),
    "noise": lambda config, source, mine: changed(config, "eval", noise_seed=1),
    "temperature": lambda config, source, mine: changed(config, "flow", temperature=0.0),
    "denoising steps": lambda config, source, mine: changed(config, "flow", steps=2),
    "acting": lambda config, source, mine: changed(config, "model", acting="prepared"),
    "damaged": lambda config, source, mine: (source / "config.json").write_text("{"),
    "no run": lambda config, source, mine: (source / "config.json").unlink(),
    "unfinished": lambda config, source, mine: (source / "evaluation" / "after.jsonl").write_text(""),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_evaluation_is_not_taken_over(what, runs):
    config, source, mine, _ = runs
    config = OTHER[what](config, source, mine)
    config = config if isinstance(config, Config) else runs[0]
    assert not take_over(config, mine, EPISODES[3:])
    assert not (mine / "evaluation").exists()


def test_seeds_beyond_those_evaluated_are_not_taken_over(runs):
    config, _, mine, _ = runs
    assert not take_over(config, mine, [*EPISODES[3:], Episode(900_000_003, "CloseDrawer")])
