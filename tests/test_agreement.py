"""A run's dataset, environments and policy are compared before it begins, with people's files and real kitchens."""

import dataclasses
import json
import pathlib

import demo_files as files
import pyarrow.parquet as pq
import pytest
import tiny_policy as tiny

from z1_jax import evaluate, initial_policy, opening, train
from z1_jax.agreement import check_worlds, dataset_world, trained_in
from z1_jax.checkpoint import Checkpoints
from z1_jax.collect import __main__ as collect
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError, DemosConfig, EnvConfig, EvalConfig
from z1_jax.data.dataset import open_dataset
from z1_jax.suites import training_statistics
from z1_jax.worlds import World

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
CAMERAS = "robot0_agentview_left,robot0_eye_in_hand"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> pathlib.Path:
    """A LeRobot dataset at 10 steps a second, of task OpenDrawer, whose instructions are bare names of tasks."""
    import numpy as np

    folder = tmp_path_factory.mktemp("foreign")
    demos = files.make_demos(np.random.default_rng(0), count=3, steps=(20,))
    for demo in demos:
        demo.instruction = "OpenDrawer"
        demo.actions[:, 11] = -1.0
    root = files.write_lerobot(folder / "lerobot", demos, fps=10, task="OpenDrawer")
    for file in root.rglob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["annotation.human.task_description"]), file)
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["annotation.human.task_description"]
    (root / "meta/info.json").write_text(json.dumps(info))
    collect.main(["collect", f"--from={root}", f"--out={folder / 'set'}", "--chunk=8", f"--cameras={CAMERAS}"])
    return folder / "set"


def sft(dataset: pathlib.Path, *more: str) -> list[str]:
    options = ["demos.dataset", dataset], ["sft.steps", 2], ["sft.batch_size", 4], ["eval.episodes", 2]
    smoke = f"--config={CONFIGS / 'sft.py'}:smoke"
    return ["train", smoke, *(f"--config.{key}={value}" for key, value in options), "--config.env.workers=0", *more]


def test_a_dataset_of_another_world_is_refused_with_a_line_for_each_difference(foreign, tmp_path, capsys):
    arguments = sft(foreign, "--config.task=TurnOnSinkFaucet", f"--config.run_dir={tmp_path / 'run'}")
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"demos.dataset: .*: task and rate differ .* --config.allow=task,rate$"):
        train.main(arguments)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: ")]
    assert [line.split(": ")[1] for line in told] == ["task", "instruction", "rate", "images"]
    for line, parts in zip(
        told,
        (
            ("set has OpenDrawer,", "the environment TurnOnSinkFaucet"),
            ("says 'OpenDrawer',", "the environment 'turn on the sink faucet'"),
            ("set has 10 control steps a second,", "the environment 20"),
            ("frames of 32×32", "the environment of 64×64"),
        ),
        strict=True,
    ):
        assert all(part in line for part in parts)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r": rate differs .* --config.allow=task,rate$"):
        check_worlds(parse_command_line([*arguments, "--config.allow=task"]))
    with pytest.raises(ConfigError, match=r"does not match the environments: rate differs"):
        check_worlds(parse_command_line([*sft(foreign, "--config.task=OpenDrawer")]))


def test_what_is_allowed_is_trained_and_recorded(foreign, tmp_path, monkeypatch, capsys):
    """The policy says then what it was trained in, and its evaluation elsewhere is refused in turn."""
    monkeypatch.setattr(opening, "start_jax", lambda: None)  # the tests have a cache of their own
    monkeypatch.setattr(opening, "make_mesh", lambda config: tiny.one_device())
    monkeypatch.setattr(initial_policy, "configured_model", lambda config: dataclasses.replace(tiny.CONFIG, cameras=2))
    run = tmp_path / "run"
    task = "--config.task=TurnOnSinkFaucet"
    short = ("--config.env.horizon=8", "--config.env.parallel=8", f"--config.run_dir={run}")
    train.main(sft(foreign, task, "--config.allow=task,rate", *short))
    assert "\nheld constant at their mean (span): actions 11 (0)\n" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["allow"] == ["task", "rate"]
    protocol = json.loads((run / "summary.json").read_text())["protocol"]
    assert protocol["allowed_to_differ"] == ["task", "rate"]
    assert [line.split(":")[0] for line in protocol["differences"]] == ["task", "instruction", "rate", "images"]
    document = initial_policy.policy_document(str(run))
    assert document["world"] == {"tasks": ["OpenDrawer"], "instructions": ["OpenDrawer"], "rate": 10.0,
                                 "images": dict.fromkeys(CAMERAS.split(","), [32, 32])}  # fmt: skip
    capsys.readouterr()
    evaluation = f"--config={CONFIGS / 'eval.py'}", f"--config.checkpoint={run}", "--config.eval.episodes=2"
    with pytest.raises(ConfigError, match="key checkpoint: .*: task, rate and images differ .*allow=task,rate,images$"):
        evaluate.main(["evaluate", *evaluation, task, "--config.env.workers=0", f"--config.run_dir={tmp_path / 'e'}"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: ")]
    assert [line.split(": ")[1] for line in told] == ["task", "instruction", "rate", "images"]
    assert "run has frames of 32×32 (robot0_agentview_left), the environment of 64×64" in told[3]
    assert "run has OpenDrawer, the environment TurnOnSinkFaucet" in told[0] and not (tmp_path / "e").exists()


def test_our_own_demonstrations_agree_and_hold_what_they_held(tmp_path, capsys):
    """The kitchen's base shakes by less than a millimetre: it stays held in the state, as the actions that are zero."""
    collect.main(["collect", "OpenDrawer", "--out", str(tmp_path / "data"), "--episodes=3", "--workers=0"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("held constant at their mean"))
    assert "state 0 (" in line and "actions 7 (0), 8 (0), 9 (0), 10 (0), 11 (0)" in line
    dataset = open_dataset(tmp_path / "data")
    for key, value in training_statistics(dataset.source, dataset.stats).items():
        before = dataclasses.replace(value, rule="millimetre")
        assert value.constant.tolist() == before.constant.tolist() and value.constant.any(), key
    config = Config(
        algorithm="sft",
        task="OpenDrawer",
        run_dir=str(tmp_path / "run"),
        demos=DemosConfig(dataset=str(tmp_path / "data")),
        env=EnvConfig(workers=0),
        eval=EvalConfig(episodes=3),
    )
    assert check_worlds(config) == [] and capsys.readouterr().out == ""
    assert dataset_world(dataset).rate == 20.0
    assert check_worlds(dataclasses.replace(config, allow=("rate",))) == []
    assert "config key allow: rate does not differ" in capsys.readouterr().out


def test_policies_that_are_compared_under_other_protocols_are_told(tmp_path, capsys):
    for name, executed in (("four", 4), ("eight", 8), ("also", 8)):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(1, tiny.policy().parts(), {**tiny.policy().document(), "executed": executed})
        checkpoints.close()
    env = EnvConfig(cameras=(tiny.CAMERA,), workers=0)
    paths = {name: str(tmp_path / name) for name in ("four", "eight", "also")}
    config = Config(algorithm="eval", checkpoint=paths["eight"], compare=paths["four"], env=env)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    line = f"executed: the policy at {paths['eight']} runs 8 steps of each chunk before it looks again, the policy at"
    assert check_worlds(config) == [f"{line} {paths['four']} 4"]
    assert capsys.readouterr().out == f"differs: {line} {paths['four']} 4\n"
    assert check_worlds(dataclasses.replace(config, env=dataclasses.replace(env, executed=4))) == []
    assert check_worlds(dataclasses.replace(config, compare=paths["also"])) == []


def test_a_policy_from_elsewhere_says_little_and_is_not_refused_for_it(tmp_path, capsys):
    policy = tiny.policy()
    checkpoints = Checkpoints(tmp_path / "old")
    checkpoints.save(1, policy.parts(), {key: v for key, v in policy.document().items() if key != "world"})
    checkpoints.close()
    env = EnvConfig(cameras=(tiny.CAMERA,), workers=0)
    config = Config(algorithm="eval", run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "old"), env=env)
    assert check_worlds(config) == []
    known = trained_in(policy, World("", tasks=("OpenDrawer",), instructions=("open the drawer",), rate=20.0))
    both = trained_in(known, World("", tasks=(tiny.TASK,)))  # RL, in words that are not told
    assert both.document()["world"] == {"tasks": ["OpenDrawer", tiny.TASK], "instructions": [], "rate": 20.0}
    again = trained_in(known, World("", tasks=("drawer/0",)), [("drawer/0", "OpenDrawer"), (tiny.TASK,)])
    assert again.world["tasks"] == ["OpenDrawer"] and again.world["instructions"] == ["open the drawer"]
    more = trained_in(known, World("", tasks=("drawer/0", tiny.TASK)), [("drawer/0", "OpenDrawer"), (tiny.TASK,)])
    assert more.world["tasks"] == ["OpenDrawer", tiny.TASK] and more.world["instructions"] == []
    for name, one in (("known", known), ("both", both)):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(1, one.parts(), one.document())
        checkpoints.close()
    assert check_worlds(dataclasses.replace(config, checkpoint=str(tmp_path / "both"))) == []
    start = dataclasses.replace(config, algorithm="grpo", checkpoint="", init=str(tmp_path / "known"))
    with pytest.raises(ConfigError, match="key init: .*: task differs .* --config.allow=task$"):
        check_worlds(start)
    told = check_worlds(dataclasses.replace(start, algorithm="sft"))  # trained on with our own demonstrations
    assert [line.split(":")[0] for line in told] == ["task", "instruction"]
