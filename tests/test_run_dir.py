import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import tiny_policy as tiny

from envs.kitchen import demos
from z1_jax import run_dir
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, DemosConfig, flat
from z1_jax.data.dataset import write_dataset
from z1_jax.data.journal import EpisodeJournal
from z1_jax.errors import UserError
from z1_jax.extending import known_changes
from z1_jax.files import hold
from z1_jax.policy import TOKENIZER
from z1_jax.run_dir import claim_directory, claim_policy, dataset_identity, policy_identity, results_of, write_json

MUJOCO = importlib.metadata.version("mujoco")
ROOT = pathlib.Path(__file__).parents[1]


def test_a_killed_stage_has_noted_its_time_and_a_later_one_adds_to_it(tmp_path):
    path = tmp_path / "wall_seconds.json"
    with run_dir.StageClock(path, every_s=0.05).stage("sft"):
        time.sleep(0.5)
        noted = json.loads(path.read_text())["sft"]  # what a kill at this moment would leave
        killed = path.read_text()
    assert 0.2 < noted <= json.loads(path.read_text())["sft"]
    path.write_text(killed)
    clock = run_dir.StageClock(path)
    began = time.perf_counter()
    with clock.stage("sft"):
        time.sleep(0.1)
    took = time.perf_counter() - began
    assert noted + 0.1 <= clock.seconds["sft"] <= noted + took
    assert json.loads(path.read_text()) == clock.seconds


def test_a_time_that_cannot_be_noted_hides_no_reason(tmp_path):
    clock = run_dir.StageClock(tmp_path / "gone" / "wall_seconds.json")
    with pytest.raises(UserError, match="checkpoint 3 cannot be written"), clock.stage("sft"):
        raise UserError("checkpoint 3 cannot be written")
    with pytest.raises(FileNotFoundError), clock.stage("sft"):
        pass


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)


def test_one_process_at_a_time_on_a_run_directory(tmp_path):
    hold(tmp_path)
    hold(tmp_path)  # this one has it
    code = (
        "import pathlib as p; from z1_jax import files, process; process.run_main(lambda _: files.hold(p.Path({!r})))"  # noqa: E501
    )
    code = code.format(str(tmp_path))
    other = run(code)
    assert other.returncode == 2
    assert (
        other.stderr == f"error: {tmp_path} is in use by process {os.getpid()}: wait until it ends, or stop it first\n"
    )
    mine = tmp_path / "another"
    mine.mkdir()
    code = code.replace(str(tmp_path), str(mine))
    assert [run(code).returncode for _ in range(2)] == [0, 0]  # free again when its process has ended
    shutil.rmtree(mine)
    mine.mkdir()
    hold(mine)


def test_a_collection_is_one_process_too(tmp_path):
    with EpisodeJournal(tmp_path / "journal", {"task": "x"}) as journal, pytest.raises(UserError, match="is in use by"):
        EpisodeJournal(journal.path, {"task": "x"})
    EpisodeJournal(tmp_path / "journal", {"task": "x"}).close()


WRITE = (
    "from z1_jax import process; process.run_main(lambda argv: [print('─' * 9, flush=True) for _ in range(10**6)][:0])"
)


def test_output_that_nobody_reads_ends_in_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().count("\n") == 1 and process.wait() == 141


@pytest.mark.parametrize("shell", ["PYTHONIOENCODING=latin-1 {}", "{} >&-"])
def test_output_that_cannot_show_everything_or_is_closed(shell):
    code = "from z1_jax import process; process.run_main(lambda argv: print('─ done'))"
    command = shell.format(f'"{sys.executable}" -c "{code}"')
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout in ("? done\n", "")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x", "home directory that does not exist"),
        ("x" * 300, "File name too long"),
        ("a[1]", "[ or ] in a name, where no checkpoint can be kept"),
    ],
)
def test_paths_that_cannot_be_are_one_line(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        claim_directory(Config(run_dir=path))
    assert message in str(told.value) and "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_a_report_that_a_kill_prevented_is_written_later(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"sentence": "It did."}))
    assert run_dir.finished_sentence(tmp_path) == "It did." and (tmp_path / "report.html").exists()
    assert run_dir.finished_sentence(tmp_path / "elsewhere") is None


def test_help_shows_every_key_and_its_value(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["", f"--config={ROOT / 'configs' / 'grpo.py'}:carry", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--config.demos.episodes=1500\n" in out
    assert out.count("--config.") == len(flat(Config())) + 1
    with pytest.raises(SystemExit):
        parse_command_line(["", "-h"])


def saved(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """A tiny policy, with changes to its document."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, tiny.policy().parts(), {**tiny.policy().document(), **changes})
    checkpoints.close()
    return folder


def test_a_policy_under_other_statistics_or_inputs_is_another(tmp_path):
    """The same parameters converted again with other flags: what was measured before is not said of them."""
    document = tiny.policy().document()
    stats = {key: {**value, "mean": [x + 0.1 for x in value["mean"]]} for key, value in document["norm_stats"].items()}
    known = policy_identity(str(saved(tmp_path / "a")))
    claim_policy(tmp_path, {"checkpoint": known})
    changes = {
        "norm_stats": stats, "norm_mode": "z_score", "state_in_prompt": False, "prompt_state_dim": 32,
        "cameras": ["robot0_eye_in_hand"], "clip": None, "executed": 4, "denoising_steps": 7,
    }  # fmt: skip
    others = [policy_identity(str(saved(tmp_path / "a", **{key: value}))) for key, value in changes.items()]
    assert len({known, *others}) == len(changes) + 1
    with pytest.raises(UserError, match=f"began with policy {known} as checkpoint, the path leads to {others[0]} now"):
        claim_policy(tmp_path, {"checkpoint": others[0]})
    assert policy_identity(str(saved(tmp_path / "b", world={"tasks": ["Juggle"]}, iteration=3))) == known
    write_json(tmp_path / "policies.json", {"checkpoint": known.partition("-")[0]})  # as older runs know it
    claim_policy(tmp_path, {"checkpoint": known})
    assert json.loads((tmp_path / "policies.json").read_text()) == {"checkpoint": known}


def test_a_tokenizer_beside_a_converted_checkpoint_is_part_of_the_policy(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": tiny.policy().parts()["params"]}, tiny.policy().document())
    checkpoints.close()
    (tmp_path / "1" / TOKENIZER).write_bytes(b"one")
    known = policy_identity(str(tmp_path))
    (tmp_path / "1" / TOKENIZER).write_bytes(b"two")
    assert policy_identity(str(tmp_path)) != known


def test_a_run_is_not_told_of_a_dataset_that_was_made_anew(tmp_path):
    data = tmp_path / "data"
    config = dataclasses.replace(Config(), algorithm="sft", demos=DemosConfig(dataset=str(data)))
    for seed in (0, 1):
        shutil.rmtree(data, ignore_errors=True)
        write_dataset(data, demos.collect("OpenDrawer", [seed], processes=0, options={"image_size": 8}), {"seed": seed})
        if seed:
            with pytest.raises(UserError, match="began with dataset .* as demos.dataset, the path leads to"):
                claim_policy(tmp_path, dataset_identity(config))
        for _ in range(2 - 2 * seed):
            claim_policy(tmp_path, dataset_identity(config))
    assert dataset_identity(dataclasses.replace(config, algorithm="grpo", init="somewhere")) == {}


def test_a_run_that_goes_on_in_other_environments_says_so(tmp_path, monkeypatch, capsys):
    first = run_dir.note_environments(tmp_path, MUJOCO)
    assert run_dir.note_environments(tmp_path, MUJOCO) == first and len(first) == 1 and capsys.readouterr().out == ""
    copy = shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(run_dir.envs, "__file__", str(copy / "__init__.py"))
    assert run_dir.note_environments(tmp_path, MUJOCO) == first and capsys.readouterr().out == ""
    (copy / "kitchen" / "env.py").write_text((copy / "kitchen" / "env.py").read_text() + "GRAVITY = -5\n")
    second = run_dir.note_environments(tmp_path, MUJOCO)
    assert second[:1] == first and len(second) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"was simulated with {first[0]}, and goes on with {second[1]}" in out
    third = run_dir.note_environments(tmp_path, "3.17.0")
    assert f"goes on with {third[2]}" in capsys.readouterr().out
    assert third[-1].startswith("mujoco 3.17.0, envs ")
    config = dataclasses.replace(Config(), run_dir=str(tmp_path / "run"))
    directory = claim_directory(config)
    write_json(directory / "environments.json", first)
    clock = run_dir.StageClock(directory / "wall_seconds.json")
    run_dir.conclude(config, tiny.policy(), directory, clock, {}, "Done")
    assert json.loads((directory / "summary.json").read_text())["protocol"]["environments"] == second


def test_episodes_of_a_policy_that_was_trained_again_are_not_believed(tmp_path):
    grpo = Checkpoints(tmp_path / "checkpoints" / "grpo")
    grpo.save(1, tiny.policy().parts(), tiny.policy().document())
    results = results_of(tmp_path, "after", "grpo")
    assert results == tmp_path / "evaluation" / "after.jsonl"
    results.write_text('{"seed": 1, "success": true, "steps": 3}\n')
    for _ in range(2):
        assert results_of(tmp_path, "after", "grpo") == results  # the same policy: it goes on
    grpo.save(2, tiny.policy(1).parts(), tiny.policy(1).document())
    with pytest.raises(
        UserError, match="after.jsonl holds episodes of policy .* now is .* trained again since: move it"
    ):
        results_of(tmp_path, "after", "grpo")
    assert results_of(tmp_path, "before", None) == tmp_path / "evaluation" / "before.jsonl"
    results.unlink()
    assert results_of(tmp_path, "after", "grpo") == results


DAMAGES = [
    b"",
    b"{",
    b"\xff",
    b"3",
    b"[1]",
    b'{"a": 3}',
    b'{"protocol": []}',
    b'{"checkpoint": {"a": 1}}',
    b"[" * 99_999,
]
READERS = {
    "environments.json": lambda path: run_dir.note_environments(path, MUJOCO),
    "policies.json": lambda path: claim_policy(path, {"checkpoint": "abc"}),
    "evaluation/policies.json": lambda path: results_of(path, "after", "grpo"),
    "summary.json": run_dir.finished_sentence,
    "wall_seconds.json": lambda path: run_dir.StageClock(path / "wall_seconds.json").seconds,
    "videos/outcomes.json": run_dir.known_outcomes,
    "lengths.json": known_changes,
}


@pytest.mark.parametrize("content", [*DAMAGES, None], ids=repr)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_side_file_is_a_line_or_no_matter(name, content, tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "policy_identity", lambda path: "abc")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    try:
        READERS[name](tmp_path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000


def test_times_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "wall_seconds.json"
    path.write_text('{"sft": 3.5, "grpo": "long", "evaluation": [1]}')
    assert run_dir.StageClock(path).seconds == {"sft": 3.5}
