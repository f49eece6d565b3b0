"""Every mistake on the command line is one line that names the key; a run directory belongs to one config."""

import dataclasses
import json
import pathlib

import ml_collections
import pytest

from z1_jax.config import checks
from z1_jax.config import schema as z1_config
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError, flat
from z1_jax.extending import take_forced
from z1_jax.run_dir import claim_directory

ROOT = pathlib.Path(__file__).parent.parent
GRPO = f"--config={ROOT / 'configs' / 'grpo.py'}"
# Leaves that take any text here: their values are checked where the things they name are known.
FREE_TEXT = {
    "task",
    "tasks",
    "run_dir",
    "init",
    "checkpoint",
    "compare",
    "model.preset",
    "env.cameras",
    "demos.dataset",
    "rollout.address",
}
FREE_TEXT |= {"inputs.tokenizer", "inputs.relative_actions", "inputs.slots", "env.layouts", "env.styles", "env.objects"}
FREE_TEXT |= {
    "tasks",
    "env.suite",
    "env.options",
    "env.protocol",
    "env.python",
    "env.train_on",
    "allow",
    "env.version",
    "env.scenes",
    "eval.scenes",
    "eval.objects",
    "eval.film_seeds",
    "eval.words",
    "log.profile",
}


def parse(*arguments: str) -> Config:
    return parse_command_line(["train", *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_and_overrides():
    kitchen = parse(GRPO)
    assert kitchen == Config() == parse()  # the first command uses the defaults, and is what a command alone runs
    assert (kitchen.flow.sde_steps, kitchen.train.iterations) == ("one", 240)
    long = parse(f"{GRPO}:long")
    assert (long.demos.episodes, long.sft.steps, long.sft.optim.name) == (500, 450, "muon")
    assert dataclasses.replace(long, demos=kitchen.demos, sft=kitchen.sft) == kitchen
    brief, carry = parse(f"{GRPO}:brief"), parse(f"{GRPO}:carry")
    assert dataclasses.replace(brief, group=long.group) == long and brief.group.branching == "none"
    assert (carry.demos.episodes, carry.sft.steps, carry.group.branching) == (1500, 1600, "none")
    assert {kitchen.demos.labels, long.demos.labels, carry.demos.labels} == {"recorded"}
    config = parse(
        GRPO,
        "--config.group.size=4",
        "--config.update.optim.lr=1",
        "--config.group.shuffle_advantages=True",
        "--config.task=OpenDrawer",
        "--config.env.cameras=('a', 'b')",
    )
    assert (config.group.size, config.update.optim.lr, config.group.shuffle_advantages) == (4, 1.0, True)
    assert type(config.update.optim.lr) is float
    assert config.task == "OpenDrawer" and config.env.cameras == ("a", "b")
    assert config.sft == Config().sft and config.demos == kitchen.demos  # nothing else moved


def test_presets():
    assert parse(f"{GRPO}:kitchen") == parse(GRPO)
    assert parse(f"{GRPO}:smoke").train.iterations == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.group.sise=4"], ["group.sise does not exist", "did you mean group.size?"]),
        (["--config.lr=4"], ["config key lr does not exist", "did you mean"]),
        (["--config.zzz=4"], ["config key zzz does not exist"]),
        (["--config.group=4"], ["config key group does not exist"]),
        (["--config.group.size=four"], ["group.size", "'four'", "a whole number"]),
        (["--config.group.size=4.5"], ["group.size", "'4.5'", "a whole number"]),
        (["--config.update.optim.lr=fast"], ["update.optim.lr", "'fast'", "a number"]),
        (["--config.group.shuffle_advantages=1"], ["group.shuffle_advantages", "'1'", "true or false"]),
        (["--config.group.size=1"], ["group.size", "got 1", "2 … 1024"]),
        (["--config.flow.steps=1"], ["flow.steps", "got 1", "2 … 1000"]),
        (["--config.flow.temperature=-0.5"], ["flow.temperature", "got -0.5", "0 … 1, or -1 for the policy's own"]),
        (["--config.flow.steps=0"], ["flow.steps", "got 0", "2 … 1000"]),
        (["--config.flow.steps=1", "--config.init=x"], ["flow.steps", "got 1", "2 … 1000, or 0 for those that"]),
        (["--config.sft.optim.schedule=constant", "--config.sft.optim.lr_end=1e-6"], ["sft.optim.lr_end", "no effect"]),
        (["--config.checkpoint=x"], ["config key checkpoint", "no effect"]),
        (["--config.env.timeout_s=inf"], ["env.timeout_s", "got inf"]),
        (["--config.algorithm=sft", "--config.eval.film_seeds=2"], ["eval.film_seeds", "no effect"]),
        (["--config.train.keep_every=15"], ["train.keep_every", "multiple of train.checkpoint_every = 10"]),
        (["--config.init=x", "--config.sft.steps=9"], ["sft.steps", "no effect, RL starts from init"]),
        (["--config.init=x", "--config.demos.noise=0"], ["demos.noise", "no effect, RL starts from init"]),
        (["--config.algorithm=sft", "--config.group.size=4"], ["group.size", "no effect, algorithm=sft"]),
        (["--config.algorithm=sft", "--config.flow.noise_level=1"], ["flow.noise_level", "no effect, algorithm=sft"]),
        (["--config.algorithm=sft", "--config.sft.optim.muon_rms=0.2"], ["muon_rms", "sft.optim.name=adamw"]),
        (["--config.algorithm=eval", "--config.checkpoint=x", "--config.init=y"], ["config key init", "no effect"]),
        (["--config.reward.discount=nan"], ["reward.discount", "nan"]),
        (["--config.flow.noise_level=0"], ["flow.noise_level", "got 0.0"]),
        (["--config.update.epochs=0"], ["update.epochs", "got 0, expected 1 … 1000"]),
        (["--config.sft.batch_size=1000000000000"], ["sft.batch_size", "expected 1 … 65536"]),
        (["--config.update.kl_coef=inf"], ["update.kl_coef", "got inf", "0.0 … 1000.0"]),
        (["--config.env.cameras=robot0_eye_in_hand,robot0_eye_in_hand"], ["env.cameras", "robot0_eye_in_hand twice"]),
        (["--config.sft.optim.warmup_steps=400"], ["sft.optim.warmup_steps", "got 400", "at most sft.steps = 300"]),
        (["--config.update.optim.warmup_steps=241"], ["update.optim.warmup_steps", "train.iterations = 240"]),
        (["--config.sft.optim.lr=1e-6"], ["sft.optim.lr_end", "got 1e-05", "at most sft.optim.lr = 1e-06"]),
        (["--config.update.optim.lr_end=0.1"], ["update.optim.lr_end", "got 0.1", "at most update.optim.lr"]),
        (["--config.seed=-1"], ["seed", "-1"]),
        (["--config.group.branching=star"], ["group.branching", "'star'", "none, prefix, tree"]),
        (["--config.group.size=6", "--config.env.parallel=66"], ["group.size", "got 6", "power of two"]),
        (["--config.env.parallel=63"], ["env.parallel", "got 63", "multiple of group.size = 8"]),
        (["--config.update.micro_batch=48"], ["update.batch_size", "got 128", "multiple of update.micro_batch = 48"]),
        (["--config.reward.keep_low=0.9", "--config.reward.keep_high=0.5"], ["reward.keep_low", "0.9", "0.5"]),
        (["--config.group.branching=none"], ["group.prefix_chunks", "none"]),
        (["--config.group.branching=none", "--config.group.prefix_chunks=0"], ["group.prefix_chunks", "none"]),
        (["--config.group.prefix_schedule=constant", "--config.group.prefix_chunks_end=0"], ["prefix_chunks_end"]),
        (
            ["--config.flow.noise_schedule=constant", "--config.flow.noise_level_end=0.2"],
            ["flow.noise_level_end", "no effect with flow.noise_schedule=constant"],
        ),
        (["--config.reward.kind=sparse", "--config.reward.discount=0.9"], ["reward.discount", "reward.kind=sparse"]),
        (["--config.reward.penalty=0.1"], ["reward.penalty", "no effect with reward.kind=decay"]),
        (["--config.reward.kind=sparse", "--config.reward.filter_on=success"], ["reward.filter_on", "no effect"]),
        (["--config.update.optim.schedule=constant", "--config.update.optim.lr_end=1e-6"], ["update.optim.lr_end"]),
        (
            ["--config.train.scope=expert", "--config.update.vlm_lr_factor=0.1"],
            ["update.vlm_lr_factor", "no effect with train.scope=expert"],
        ),
        (
            ["--config.train.scope=expert", "--config.selective.confidence=0.8"],
            ["selective.confidence", "no effect with train.scope=expert"],
        ),
        (["--config.update.ratio_max=0.9"], ["update.ratio_max", "got 0.9", "more than 1"]),
        (
            ["--config.train.scope=auto", "--config.selective.iterations=300"],
            ["selective.iterations", "300", "train.iterations"],
        ),
        (["--config.train.scope=joint", "--config.update.prefix_cache=host"], ["update.prefix_cache", "host", "stale"]),
        (["--config.train.scope=auto", "--config.update.prefix_cache=device"], ["update.prefix_cache", "stale"]),
        (["--config.inputs.norm=minmax"], ["inputs.norm", "'minmax'", "quantile, z_score"]),
        (["--config.inputs.slots=robot0_agentview_left,none"], ["inputs.slots", "robot0_eye_in_hand", "once"]),
        (["--config.mesh.data=0"], ["mesh.data", "got 0", "-1"]),
        (["--config.mesh.fsdp=0"], ["mesh.fsdp", "got 0", "1 … 65536"]),
        (["--config.algorithm=eval"], ["checkpoint", "expected a run directory"]),
        (["--config.algorithm=ppo"], ["algorithm", "'ppo'", "grpo, sft, eval"]),
        (["--conf.seed=1"], ["'--conf.seed=1' is not understood"]),
        (["--config.seed"], ["'--config.seed' is not understood"]),
        (["seed=1"], ["'seed=1' is not understood"]),
        ([GRPO], ["got 2 configs, expected one"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, parts):
    message = refusal(GRPO, *arguments)
    for part in parts:
        assert part in message


def test_mistakes_in_the_config_file(tmp_path):
    assert "no/such.py does not exist" in refusal("--config=no/such.py")
    assert "is no Python file" in refusal(f"--config={ROOT / 'pyproject.toml'}")
    message = refusal(f"{GRPO}:gigantic")
    assert "preset 'gigantic'" in message and "smoke" in message

    def written(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text("import ml_collections\ndef get_config():\n    " + body)
        return f"--config={path}"

    assert "ZeroDivisionError" in refusal(written("return 1 / 0"))
    assert "mine.py failed" in refusal(written("return None"))
    assert "did you mean group.size?" in refusal(written("return ml_collections.ConfigDict({'group': {'sizes': 4}})"))
    assert "group.size: got '4' (str), expected int" in refusal(
        written("return ml_collections.ConfigDict({'group': {'size': '4'}})")
    )
    assert "config key group: got 4" in refusal(written("return ml_collections.ConfigDict({'group': 4})"))
    # A file need not name every key, and any key can still be given.
    short = written("return ml_collections.ConfigDict({'task': 'OpenDrawer'})")
    config = parse(short, "--config.group.size=4")
    assert config.task == "OpenDrawer" and config.group.size == 4


def test_every_leaf_is_checked():
    """A new key must get a range or a list of choices, or be named here as free text."""
    values = flat(Config())
    for key, value in values.items():
        kinds = [key in checks.CHOICES, key in checks._RANGES, key in FREE_TEXT, isinstance(value, bool)]
        assert sum(kinds) == 1, f"{key} must be in exactly one of CHOICES, _RANGES and FREE_TEXT"
        if key in checks._RANGES:
            assert isinstance(value, int | float)
    assert set(checks.CHOICES) | set(checks._RANGES) | FREE_TEXT <= set(values)


@pytest.mark.parametrize("key", sorted(checks._RANGES))
def test_every_bound_is_enforced(key):
    low, high = checks._RANGES[key]
    kind = type(flat(Config())[key])
    for bound, outside in ((low, -1), (high, +1)):
        beyond = bound + outside if kind is int else bound + outside * max(1e-9, abs(bound) * 1e-3)
        assert f"config key {key}: got" in refusal(GRPO, f"--config.{key}={beyond}")
    for nonsense in (10**12,) if kind is int else ("nan", "inf", "-inf"):
        assert f"config key {key}: got" in refusal(GRPO, f"--config.{key}={nonsense}")


def test_a_task_that_is_given_takes_the_place_of_the_files_tasks():
    assert parse("--config=configs/grpo.py:libero").tasks == ("libero_spatial",)
    one = parse("--config=configs/grpo.py:libero", "--config.task=libero_spatial/3")
    assert (one.task, one.tasks) == ("libero_spatial/3", ())


def test_a_run_that_is_made_short_keeps_its_warm_up_and_says_so(capsys):
    config = parse(GRPO, "--config.sft.steps=20")
    assert (config.sft.steps, config.sft.optim.warmup_steps) == (20, 50)
    assert (
        capsys.readouterr().err == "sft.optim.warmup_steps=50 is more than sft.steps=20: the learning rate only rises\n"
    )
    assert "sft.optim.warmup_steps: got 50" in refusal(
        GRPO, "--config.sft.steps=20", "--config.sft.optim.warmup_steps=50"
    )


@pytest.mark.parametrize("key", sorted(checks.CHOICES))
def test_every_choice_is_enforced(key):
    message = refusal(GRPO, f"--config.{key}=nonsense")
    assert f"config key {key}: got 'nonsense'" in message
    assert all(choice in message for choice in checks.CHOICES[key])


def test_a_prefix_as_long_as_the_episode_is_refused():
    for key, changes in (("prefix_chunks", {}), ("prefix_chunks_end", {"prefix_chunks": 4})):
        config = dataclasses.replace(Config(), group=z1_config.GroupConfig(**{**changes, key: 5}))
        checks.check_horizon(config, 41, 8)  # five chunks and a step
        with pytest.raises(ConfigError, match=f"group.{key}: got 5, but an episode of 40 steps has 5 chunks of 8"):
            checks.check_horizon(config, 40, 8)
    constant = z1_config.GroupConfig(prefix_chunks=2, prefix_chunks_end=5, prefix_schedule="constant")
    checks.check_horizon(dataclasses.replace(Config(), group=constant), 40, 8)


def test_keys_without_effect_are_real_keys():
    values = flat(Config())
    for key, by, without in checks._INERT:
        assert key in values and set(without) < set(checks.CHOICES[by])


def with_run_dir(path: pathlib.Path, **changes) -> Config:
    values = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    values.update_from_flattened_dict({"run_dir": str(path), **changes})
    return checks.checked(values.copy_and_resolve_references().to_dict())


def test_a_run_directory_belongs_to_its_config(tmp_path):
    run = tmp_path / "a" / "run"
    config = with_run_dir(run)
    assert claim_directory(config) == run
    assert (run / "config.json").exists()
    (run / "metrics.jsonl").write_text("")
    assert claim_directory(config) == run  # again: the same run goes on
    with pytest.raises(ConfigError) as error:
        claim_directory(with_run_dir(run, **{"group.size": 4, "seed": 3}))
    message = str(error.value)
    assert "seed is 0, asked for 3" in message and "group.size is 8, asked for 4" in message and "\n" not in message


def test_free_keys_may_change_and_are_told(tmp_path, capsys):
    run = tmp_path / "run"
    claim_directory(with_run_dir(run))
    changes = {"log.every": 7, "env.workers": 5, "env.timeout_s": 9.0, "train.checkpoint_every": 3}
    claim_directory(with_run_dir(run, **changes))
    told = "env.workers 2 → 5, env.timeout_s 60.0 → 9.0, train.checkpoint_every 10 → 3, log.every 50 → 7"
    assert capsys.readouterr().out == f"changed, moves no number: {told}\n"
    run.rename(tmp_path / "moved")
    claim_directory(with_run_dir(tmp_path / "moved"))
    assert capsys.readouterr().out == ""
    for key in (*z1_config.FREE_KEYS, *z1_config.FORCIBLE):  # none of them is misspelt
        assert any(leaf == key or leaf.startswith(key + ".") for leaf in flat(Config()))


def test_one_place_may_be_spelled_in_several_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs")
    given = {"demos.dataset": "runs/data"}
    claim_directory(with_run_dir(tmp_path / "run", **given))
    for spelled in (str(tmp_path / "runs" / "data"), "runs/../runs/data/", "link/data"):
        claim_directory(with_run_dir(tmp_path / "run", **{"demos.dataset": spelled}))
    for other in ("runs/data@best", "runs/data2", "data"):
        with pytest.raises(ConfigError, match="demos.dataset is 'runs/data', asked for"):
            claim_directory(with_run_dir(tmp_path / "run", **{"demos.dataset": other}))


def test_what_is_forced_goes_on_and_is_recorded(tmp_path, capsys):
    claim_directory(with_run_dir(tmp_path))
    changed = with_run_dir(tmp_path, **{"update.kl_coef": 0.1, "group.size": 4})
    with pytest.raises(ConfigError, match=r"another config .group.size is 8, asked for 4, .*, or --force to go on"):
        claim_directory(changed)
    assert claim_directory(changed, force=True) == tmp_path
    (tmp_path / "checkpoints" / "grpo" / "30" / "params").mkdir(parents=True)
    take_forced(changed, tmp_path)
    assert "changed by force, recorded in" in capsys.readouterr().out
    rows = [("group.size", 8, 4), ("update.kl_coef", 0.0, 0.1)]
    assert json.loads((tmp_path / "forced.json").read_text()) == [
        {"key": key, "was": was, "now": now, "done": {"grpo": 30}} for key, was, now in rows
    ]
    claim_directory(changed)  # it is the run's own now
    take_forced(changed, tmp_path)
    assert len(json.loads((tmp_path / "forced.json").read_text())) == 2
    other = with_run_dir(tmp_path, **{"update.kl_coef": 0.2, "group.size": 4, "seed": 3})
    for force in (False, True):  # demonstrations and checkpoints are of the other seed
        with pytest.raises(ConfigError, match="seed is 0, asked for 3") as error:
            claim_directory(other, force=force)
        assert "--force" not in str(error.value)


def test_directories_that_are_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        claim_directory(with_run_dir(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="cannot be written"):
        claim_directory(with_run_dir(tmp_path / "thesis.tex"))
    (tmp_path / "empty").mkdir()
    claim_directory(with_run_dir(tmp_path / "empty"))


@pytest.mark.parametrize("content", [b'{"seed": 0', b"\xff\xfe\x00", b"[1]", b'{"group": 4}', b'{"colour": 1}'])
def test_a_damaged_config_json_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json cannot be read") as error:
        claim_directory(with_run_dir(tmp_path))
    assert "\n" not in str(error.value)


def test_a_killed_claim_can_be_repeated(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    claim_directory(with_run_dir(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_fingerprint_follows_what_moves_numbers(tmp_path):
    base = with_run_dir(tmp_path)
    assert z1_config.fingerprint(base) == z1_config.fingerprint(with_run_dir(tmp_path / "b", **{"log.every": 9}))
    assert z1_config.fingerprint(base) != z1_config.fingerprint(with_run_dir(tmp_path, seed=1))


def test_a_key_that_is_new_and_at_its_default_leaves_fingerprints_as_they_were():
    """An evaluation's directory is named by its fingerprint: a moved one would begin anew. 44efc8ffd5fb is the first
    that left out new keys, of the same defaults before env.protocol, env.train_on, model.acting and tasks were there.
    """
    assert z1_config.fingerprint(Config()) == "44efc8ffd5fb", "a new key must be in schema._YOUNGER"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("log.profile=3,240",), "log.profile: got '240', expected iterations of 0 … 239"),
        (("log.profile=x,",), "log.profile: got 'x', expected iterations of 0 … 239"),
        (("log.profile=3,3",), "log.profile: got 3, 3, expected each iteration once"),
        (("log.profile=3,4", "algorithm=sft"), "log.profile: got 3, 4 with algorithm=sft, which has no iterations"),
    ],
)
def test_iterations_to_trace_are_there(given, message):
    assert parse(GRPO, "--config.log.profile=3,4").log.profiled == {3, 4}
    assert message in refusal(GRPO, *(f"--config.{setting}" for setting in given))
