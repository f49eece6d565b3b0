"""What --help tells of each key."""

import pytest

from z1_jax.config.command_line import parse_command_line
from z1_jax.config.meanings import _fields, meanings, sections
from z1_jax.config.schema import Config, flat


def test_every_key_has_a_meaning():
    told = meanings()
    assert set(told) == set(flat(Config())) and all(told.values())
    assert (
        told["group.count"] == "groups an iteration" and told["sft.optim.lr"] == told["update.optim.lr"] == "the peak"
    )
    assert sections()["mesh"] == "Devices along each axis; data = −1 takes the rest."


def test_comments_are_those_of_their_own_field():
    source = (
        "# not a field's\nclass A:\n    # above\n    # it\n    a: int = 1  # beside\n    b: str = '# no comment'\n"
        "    c: tuple = (\n        1,  # inside\n    )  # at the end\n"
    )
    assert _fields(source) == {("A", "a"): "above it beside", ("A", "b"): "", ("A", "c"): "at the end"}


def test_help_needs_no_config_and_shows_meanings_and_choices(capsys):
    for arguments, default in (([], "configs/grpo.py"), ([], "configs/eval.py"), (["--config=configs/sft.py"], "")):
        with pytest.raises(SystemExit) as ended:
            parse_command_line(["", *arguments, "--help"], default)
        out = capsys.readouterr().out
        assert not ended.value.code and "configs/grpo.py:{kitchen,long," in out
        assert "--config.group.count=8\n        groups an iteration\n" in out and "one of none, prefix, tree" in out
