"""What differs between a dataset, an environment and a policy, from facts made by hand."""

import dataclasses

import numpy as np
import pytest

from z1_jax.data.normalize import NormStats
from z1_jax.worlds import World, differences, must_agree


def stats(low, high, **more) -> NormStats:
    low, high = np.array(low, float), np.array(high, float)
    return NormStats((low + high) / 2, (high - low) / 4, low, high, **more)


DATA = World(
    name="the dataset D",
    tasks=("OpenDrawer",),
    instructions=("open the drawer",),
    rate=20.0,
    images={"left": (64, 64), "wrist": (64, 64)},
    stats={"state": stats([0, -1, 5], [0, 1, 6]), "actions": stats([-1, -1], [1, 0.5])},
)
ENV = World(
    name="the environment",
    tasks=("OpenDrawer",),
    instructions=("open the drawer",),
    rate=20.0,
    images={"left": (64, 64), "wrist": (64, 64)},
    states=np.array([[0.0, 0.1, 5.5], [1e-4, 0.2, 6.2]]),
    executed=8,  # of a policy that acts in it
)


def lines(one: World, other: World) -> dict[str, str]:
    return {difference.kind: difference.line for difference in differences(one, other)}


def test_what_agrees_or_is_not_known_is_no_difference():
    assert lines(DATA, ENV) == {}
    assert lines(World(name="the policy P"), ENV) == lines(World(name="the policy P"), DATA) == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"tasks": ("CloseDrawer",)}, "task", "the dataset D has CloseDrawer, the environment OpenDrawer"),
        ({"tasks": tuple("abcde")}, "task", "the dataset D has a, b, c and 2 more, the environment OpenDrawer"),
        ({"instructions": ("OpenDrawer",)}, "instruction", "D says 'OpenDrawer', the environment 'open the drawer'"),
        ({"rate": 10.0}, "rate", "the dataset D has 10 control steps a second, the environment 20"),
        ({"rate": 20.5}, "rate", "D has 20.5 control"),
        ({"executed": 4}, "executed", "the dataset D runs 4 steps of each chunk before it looks again, the env"),
        ({"images": {"left": (64, 64)}}, "cameras", "the environment has wrist, the dataset D does not"),
        ({"images": {**DATA.images, "top": (64, 64)}}, "cameras", "the dataset D has top, the environment does not"),
        ({"images": {**DATA.images, "left": (48, 64)}}, "images", "frames of 48×64 (left), the environment of 64×64"),
        ({"actions": stats([-1, -200], [1, 5])}, "actions", "D has -200..5 (dimension 1), the environment takes -1..1"),
        ({"actions": stats([-4e-4, -1], [4e-4, 1])}, "actions", "-0.0004..0.0004 (dimension 0), less than 1% of"),
        ({"state": stats([0, -1, 9], [0, 1, 9.5])}, "state", "9..9.5 (dimension 2), the environment starts at 5.5..6"),
        ({"state": stats([3, -1, 5], [3, 1, 6])}, "state", "3..3 (dimension 0), the environment starts at 0..0.0001"),
    ],
)  # fmt: skip
def test_each_difference_is_one_line(change, kind, words):
    moved = {key: change[key] for key in change if key in ("state", "actions")}
    others = {key: value for key, value in change.items() if key not in moved}
    found = lines(dataclasses.replace(DATA, stats={**DATA.stats, **moved}, **others), ENV)
    assert list(found) == [kind] and words in found[kind] and "\n" not in found[kind]


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 20.1},  # clocks
        {"tasks": ("CloseDrawer", "OpenDrawer")},  # one in common
        {"tasks": ("OpenCabinet",), "other_names": ("OpenDrawer",)},
        {"tasks": ("open the drawer",)},  # a dataset without names of tasks
        {"instructions": ("open_the drawer\n", "shut it")},  # as the tokenizer takes it
        {"images": {"left": (64, 64), "wrist": None}},
        {"stats": {"state": stats([0, -1, 5], [0, 1, 5.4])}},  # the environment starts just beside the data
        {"stats": {"actions": stats([0, -1], [0, 1])}},  # held
        {"stats": {"state": stats([0], [1])}},  # widths are refused elsewhere
    ],
)
def test_what_is_close_enough_is_not_told(change):
    assert lines(dataclasses.replace(DATA, **change), ENV) == {}


def test_a_policys_ranges_are_compared_with_the_data():
    policy = World(name="the policy P", stats={"actions": stats([-1, 0, 0, 0.1], [1, 0, 1, 0.11])})
    data = World(name="the dataset D", stats={"actions": stats([-0.5, -1, 7, 0], [0.5, 1, 8, 1])})
    told = lines(data, policy)["actions"]
    assert "dimension 0" not in told  # within
    for words in ("-1..1 (dimension 1), 7..8 (dimension 2)", "0..1 (dimension 3)", "P 0..0 (dimension 1)"):
        assert words in told
    assert lines(policy, policy) == {}


def test_pictures_must_be_of_the_size_that_a_policy_saw():
    found = differences(dataclasses.replace(DATA, images={"left": (48, 64), "wrist": (64, 64)}), ENV)
    assert must_agree(found, ()) == ["images"] and must_agree(found, ("images",)) == []
    assert must_agree(found, (), pictures=False) == []


def test_task_and_rate_must_agree_unless_they_are_allowed():
    found = differences(dataclasses.replace(DATA, rate=5.0, tasks=("Juggle",), instructions=("juggle",)), ENV)
    assert must_agree(found, ()) == ["task", "rate"] and must_agree(found, ("rate",)) == ["task"]
    assert must_agree(found, ("task", "rate")) == []
