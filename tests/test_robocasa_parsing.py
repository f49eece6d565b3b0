"""Parsing RoboCasa's tables once gives what parsing them every time gives."""

import io
import string

import pytest

from envs.robocasa import compat, parsing

yaml = pytest.importorskip("yaml")


def random_table(rng, depth=0):
    kind = rng.integers(0, 3) if depth < 3 else 3
    if kind == 0:
        return {word(rng): random_table(rng, depth + 1) for _ in range(rng.integers(1, 5))}
    if kind == 1:
        return [random_table(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    return [None, True, False, int(rng.integers(-9, 9)), float(rng.normal()), word(rng)][rng.integers(0, 6)]


def word(rng) -> str:
    return "".join(rng.choice(list(string.ascii_letters + "_"), 6))


def test_tables_are_as_yaml_reads_them(rng):
    for _ in range(50):
        text = yaml.safe_dump({"a": random_table(rng)})
        for source in (text, io.StringIO(text), io.StringIO(text)):
            assert parsing.safe_load(source) == yaml.safe_load(text)


def test_who_writes_into_a_table_spoils_it_for_nobody():
    text = "default: {size: [1, 2], name: a}"
    first = parsing.safe_load(text)
    first["default"]["size"][0] = 7
    first["default"]["more"] = True
    assert parsing.safe_load(text) == {"default": {"size": [1, 2], "name": "a"}}


def test_all_of_robocasas_own_tables():
    try:
        root = compat.find().root
    except ValueError as error:
        pytest.skip(str(error))
    files = list((root / "models" / "assets").rglob("*.yaml"))
    assert len(files) > 20
    for path in files[::7]:
        assert parsing.safe_load(path.read_text()) == yaml.safe_load(path.read_text())
