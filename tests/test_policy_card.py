"""`convert SRC --describe`: what a policy wants, from its own files; nothing is written."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from z1_jax.config.schema import ConfigError
from z1_jax.convert import __main__ as convert
from z1_jax.errors import UserError

REFERENCE = pathlib.Path(__file__).parent / "reference"
HEADS = ("--heads=4", "--vision-heads=2")


def described(capsys, *arguments: object) -> list[str]:
    assert convert.convert(convert.parse_arguments([str(argument) for argument in arguments])) == 0
    return capsys.readouterr().out.splitlines()


def test_a_policy_of_lerobot(tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(REFERENCE / "lerobot", source)
    config = json.loads((source / "config.json").read_text())
    config |= {"action_feature_names": ["x"] * 5}
    (source / "config.json").write_text(json.dumps(config))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    lines = described(capsys, source, "--describe", *HEADS, "--pad-state=none")
    assert lines[0].endswith("source: LeRobot's checkpoint")
    assert "images: 3 slots of 28 x 28 pixels, RGB" in lines and "  slot 1 (left wrist): left_wrist_0_rgb" in lines
    assert "chunk: 5 control steps, of which 4 are executed before it looks again" in lines
    assert "actions: 5 numbers, raw units, of the model's 7" in lines and "  absolute" in lines
    assert not any("not told" in line for line in lines)
    # Bins of the mean state, by the tokenizer's rule; and each dimension's numbers, by the file itself.
    from safetensors.numpy import load_file

    stats = load_file(source / "policy_preprocessor_step_0_normalizer_processor.safetensors")
    mean, low, high = (stats[f"observation.state.{name}"] for name in ("mean", "q01", "q99"))
    bins = np.digitize((mean - low) / (high - low + 1e-6) * 2 - 1, np.linspace(-1, 1, 257)[:-1]) - 1
    prompt = f"Task: open the drawer, State: {' '.join(map(str, bins))};\nAction: "
    assert f"prompt: at most 10 tokens, for example {prompt!r}" in lines
    rows = [
        line.split() for line in lines[lines.index("state, by dimension: 1 % … 99 %, mean, standard deviation") + 1 :]
    ]
    for dim in range(6):
        expected = [f"{stats[f'observation.state.{name}'][dim]:.4g}" for name in ("q01", "q99", "mean", "std")]
        assert [rows[dim][i] for i in (1, 3, 4, 5)] == expected and rows[dim][0] == str(dim)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # nothing was written


def test_what_openpi_does_not_tell_is_left_open(tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(REFERENCE / "openpi_pytorch", source)
    lines = described(capsys, source, "--describe", *HEADS)
    for told in ("--state-in-prompt", "(--horizon)", "--relative-actions"):
        assert any("not told" in line and told in line for line in lines), told
    assert "  (names of openpi's slots: --cameras=A,B,none gives them the environment's)" in lines
    flags = ("--horizon=5", "--no-state-in-prompt", "--relative-actions=4,-1", "--cameras=left,wrist,none")
    lines = described(capsys, source, "--describe", *HEADS, *flags)
    assert not any("not told" in line for line in lines)
    assert (
        "  action dimensions 0..3 are offsets from the state" in lines
        and "  slot 2 (right wrist): none: masked" in lines
    )
    assert any(line.endswith("for example 'Task: open the drawer'") or "drawer" in line for line in lines)
    [path] = source.rglob("norm_stats.json")
    content = json.loads(path.read_text())
    for name in ("q01", "q99", "mean", "std"):
        content["norm_stats"]["actions"][name][2] = 0.25 * (name != "std")
    path.write_text(json.dumps(content))
    held = [line for line in described(capsys, source, "--describe", *HEADS, *flags) if line.endswith("held constant")]
    assert len(held) == 1 and held[0].split()[0] == "2"
    path.unlink()
    lines = described(capsys, source, "--describe", *HEADS, *flags)
    assert lines[-1] == "statistics: none; SFT takes those of its demonstrations"
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_arguments_without_effect(tmp_path):
    source = REFERENCE / "lerobot"
    for arguments, message in (
        ([source, tmp_path / "x", "--describe"], "DST: got .* with --describe, which writes nothing"),
        ([source], "DST: got none, expected one"),
        ([source, "--describe", "--to=openpi"], "--to: it has no effect with --describe"),
        ([source, "--describe", "--dry-run"], "--dry-run: it has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert.parse_arguments([str(argument) for argument in arguments])
    with pytest.raises(UserError, match="--base=.* has no effect"):
        convert.convert(convert.parse_arguments([str(source), "--describe", f"--base={source}"]))
