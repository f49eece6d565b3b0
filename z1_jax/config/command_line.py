"""Reads the command line: a config file and overrides of its keys, or the options of a command without a config.

A user's mistake raises ConfigError: one line that names the key, what was given and what is allowed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import pathlib
import textwrap
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from z1_jax.config.checks import CHOICES, check_given, checked
from z1_jax.config.meanings import meanings, sections
from z1_jax.config.schema import Config, ConfigError, build, flat

PRESETS = pathlib.Path(__file__).parent.parent / "presets"  # configs/NAME.py where there is no such file


def parse_command_line(argv: Sequence[str], default: str = "configs/grpo.py") -> Config:
    """Reads `--config=FILE[:PRESET]`, which is `default` where it is not given, and any `--config.key=value`.

    config_flags reports a mistake as a page of traceback; these few lines report it as one.

    Raises:
        ConfigError: a missing file, an unknown preset, key or flag, or a value of the wrong type: one line.
    """
    asked = [argument for argument in argv[1:] if argument not in ("-h", "--help")]
    if len(asked) < len(argv) - 1:
        _help(asked, default)
    given = [argument.removeprefix("--config=") for argument in argv[1:] if argument.startswith("--config=")]
    if len(given) > 1:
        raise ConfigError(f"got {len(given)} configs, expected one --config=configs/FILE.py[:PRESET]")
    values = load(given[0] if given else default, mine=bool(given))
    known, keys = flat(Config()), []
    for argument in argv[1:]:
        if argument.startswith("--config="):
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ConfigError(f"argument {argument!r} is not understood, expected --config.key=value")
        if key not in known:
            raise ConfigError(f"config key {key} does not exist{_suggestion(key, known)}")
        keys.append(key)
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = _parse_value(key, text, known[key])
    if "task" in keys and "tasks" not in keys:  # in place of those of the config file
        values["tasks"] = ()
    config = checked(values)
    check_given(config, keys)
    return config


def _help(argv: Sequence[str], default: str) -> NoReturn:
    """Prints the usage, and the keys of a config with their values and meanings; ends the process."""
    given = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    values = flat(build(Config, load(given[0] if given else default, mine=bool(given))))
    known, heads, section = meanings(), sections(), ""
    print(f"usage: python -m z1_jax.COMMAND [--config=FILE.py[:PRESET]] [--config.KEY=VALUE ...]  (default: {default})")
    print("       --force (train, evaluate): a run that has begun goes on under other settings, and records them")
    print("       --coordinator=HOST:PORT --processes=N --process=I (train, evaluate): one of N processes of one run")
    print("The config FILE.py is yours or one of these:")
    for path in sorted(PRESETS / f"{name}.py" for name in ("grpo", "sft", "eval")):
        print(f"  configs/{path.name}:{{{','.join(_module(path).PRESETS)}}}")
    for key, value in values.items():
        if "." in key and section != (section := key.partition(".")[0]):
            print(f"\n{section}: {heads[section]}")
        print(f"  --config.{key}={','.join(value) if isinstance(value, list) else value}")
        choices = f"one of {', '.join(CHOICES[key])}" if key in CHOICES else ""
        if told := "; ".join(filter(None, (known.get(key, ""), choices))):
            print(textwrap.fill(told, 118, initial_indent=" " * 8, subsequent_indent=" " * 8))
    raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """Options of a command that takes no config. A mistake raises ConfigError instead of printing the usage."""

    def __init__(self, **how: Any):
        super().__init__(**how, allow_abbrev=False)  # --api-key SECRET is not --api-key-file

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help shows what there is)")


def _suggestion(key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.endswith("." + key)][:1]
    return (
        f"; did you mean {close[0]}?"
        if close
        else f"; sections: {', '.join(dict.fromkeys(k.split('.')[0] for k in known))}"
    )


def load(source: str, mine: bool = True) -> dict[str, Any]:
    """The values of FILE[:PRESET]: of a file that is there if it may be `mine`, or of the package's own presets."""
    file, _, preset = source.partition(":")
    path = pathlib.Path(file)
    if (not mine or not path.is_file()) and path.parent == pathlib.Path("configs") and (PRESETS / path.name).is_file():
        path = PRESETS / path.name
    if not path.is_file():
        raise ConfigError(f"config file {file} does not exist; expected a path such as configs/grpo.py")
    try:
        module = _module(path)
        config = module.get_config(preset) if preset else module.get_config()
        return config.copy_and_resolve_references().to_dict()
    except ConfigError:
        raise
    except Exception as error:  # a config file is the user's own code: anything can be wrong in it
        raise ConfigError(f"config file {file} failed: {type(error).__name__}: {error}") from error


def _module(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("z1_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {path} is no Python file; expected a path such as configs/grpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parse_value(key: str, text: str, current: Any) -> Any:
    """Reads `text` as the type that `current` has."""
    if isinstance(current, str):
        return text
    if isinstance(current, list):
        parts = text.strip("()[]").replace("'", "").replace('"', "").split(",")
        return tuple(part.strip() for part in parts if part.strip())
    if isinstance(current, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"config key {key}: got {text!r}, expected true or false")
    try:
        return type(current)(text)
    except ValueError:
        kind = {"int": "a whole number", "float": "a number"}[type(current).__name__]
        raise ConfigError(f"config key {key}: got {text!r}, expected {kind} (default {current})") from None
