"""RoboCasa's 24 atomic tasks, their horizons, scenes and object splits, in both versions: data alone.

Sources: the task classes and registries of robocasa v0.2 and v1.0.1.
"""

from __future__ import annotations

import itertools

# Control steps of an episode, at 20 Hz.
HORIZONS: dict[str, dict[str, int]] = {
    "v0.2": {
        "PnPCounterToCab": 500,
        "PnPCabToCounter": 500,
        "PnPCounterToSink": 700,
        "PnPSinkToCounter": 500,
        "PnPCounterToMicrowave": 600,
        "PnPMicrowaveToCounter": 500,
        "PnPCounterToStove": 500,
        "PnPStoveToCounter": 500,
        "OpenSingleDoor": 500,
        "CloseSingleDoor": 500,
        "OpenDoubleDoor": 1000,
        "CloseDoubleDoor": 700,
        "OpenDrawer": 500,
        "CloseDrawer": 500,
        "TurnOnStove": 500,
        "TurnOffStove": 500,
        "TurnOnSinkFaucet": 500,
        "TurnOffSinkFaucet": 500,
        "TurnSinkSpout": 500,
        "CoffeeSetupMug": 600,
        "CoffeeServeMug": 600,
        "CoffeePressButton": 300,
        "TurnOnMicrowave": 500,
        "TurnOffMicrowave": 500,
    },
    # v1.0.1's own: they hold the factor 1.5 that clients of earlier versions apply themselves.
    "v1": {
        "PickPlaceCounterToCabinet": 750,
        "PickPlaceCabinetToCounter": 450,
        "PickPlaceCounterToSink": 600,
        "PickPlaceSinkToCounter": 900,
        "PickPlaceCounterToMicrowave": 1050,
        "PickPlaceMicrowaveToCounter": 750,
        "PickPlaceCounterToStove": 600,
        "PickPlaceStoveToCounter": 450,
        "OpenCabinet": 1050,
        "OpenMicrowave": 600,
        "CloseCabinet": 750,
        "CloseMicrowave": 450,
        "OpenDrawer": 750,
        "CloseDrawer": 450,
        "TurnOnStove": 450,
        "TurnOffStove": 750,
        "TurnOnSinkFaucet": 600,
        "TurnOffSinkFaucet": 300,
        "TurnSinkSpout": 300,
        "CoffeeSetupMug": 600,
        "CoffeeServeMug": 450,
        "StartCoffeeMachine": 300,
        "TurnOnMicrowave": 450,
        "TurnOffMicrowave": 300,
    },
}

# What v1 made of a v0.2 task that it renamed or split. The others kept their names; double doors have no exact twin.
TWINS: dict[str, tuple[str, ...]] = {
    "PnPCounterToCab": ("PickPlaceCounterToCabinet",),
    "PnPCabToCounter": ("PickPlaceCabinetToCounter",),
    "PnPCounterToSink": ("PickPlaceCounterToSink",),
    "PnPSinkToCounter": ("PickPlaceSinkToCounter",),
    "PnPCounterToMicrowave": ("PickPlaceCounterToMicrowave",),
    "PnPMicrowaveToCounter": ("PickPlaceMicrowaveToCounter",),
    "PnPCounterToStove": ("PickPlaceCounterToStove",),
    "PnPStoveToCounter": ("PickPlaceStoveToCounter",),
    "OpenSingleDoor": ("OpenCabinet", "OpenMicrowave"),
    "CloseSingleDoor": ("CloseCabinet", "CloseMicrowave"),
    "OpenDoubleDoor": ("OpenCabinet",),
    "CloseDoubleDoor": ("CloseCabinet",),
    "CoffeePressButton": ("StartCoffeeMachine",),
}

Scene = tuple[int, int]  # layout, style

_EVALUATION: tuple[Scene, ...] = ((1, 1), (2, 2), (4, 4), (6, 9), (7, 10))

# Named sets of scenes. v1 numbers layouts anew, from 1 (its layout 9 is v0.2's 8): equal pairs are different kitchens.
# `evaluation`: the five of the v0.2 literature; the ten target scenes of v1's own benchmark. `training`: all that v0.2
# has besides (our choice: its demonstrations come from all); v1's pretraining scenes. `5x1`: a set that v1 names.
SCENES: dict[str, dict[str, tuple[Scene, ...]]] = {
    "v0.2": {
        "evaluation": _EVALUATION,
        "training": tuple(pair for pair in itertools.product(range(10), range(12)) if pair not in _EVALUATION),
    },
    "v1": {
        "evaluation": tuple((i, i) for i in range(1, 11)),
        "training": tuple(itertools.product(range(11, 61), range(11, 61))),
        "5x1": tuple((layout, 34) for layout in (11, 15, 18, 40, 50)),
    },
}
KNOWN: dict[str, tuple[range, range]] = {  # layouts and styles that there are
    "v0.2": (range(10), range(12)),
    "v1": (range(1, 61), range(1, 61)),
}

# Our name of a split of the object instances → RoboCasa's; None: all instances.
OBJECTS: dict[str, dict[str, str | None]] = {
    "v0.2": {"train": "A", "heldout": "B", "all": None},
    "v1": {"train": "pretrain", "heldout": "target", "all": None},
}

CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right")
CONTROL_HZ = 20.0

# The raw action, each in [-1, 1]: slices of its parts. Base and torso act in both modes: zeros keep them still.
ACTION: dict[str, slice] = {
    "eef_pos": slice(0, 3),  # × 0.05 m
    "eef_rot": slice(3, 6),  # axis-angle, × 0.5 rad
    "gripper": slice(6, 7),  # −1 open, +1 close
    "base": slice(7, 10),  # velocity
    "torso": slice(10, 11),
    "base_mode": slice(11, 12),  # above 0: the base moves, else the arm
}
ACTION_DIM = 12

# The 16-d state in v1's order: (robosuite's observable without "robot0_", the range of each value). Metres; quaternions
# are x, y, z, w.
STATE: tuple[tuple[str, tuple[tuple[float, float], ...]], ...] = (
    ("base_pos", ((-10.0, 10.0), (-10.0, 10.0), (0.0, 2.0))),
    ("base_quat", ((-1.0, 1.0),) * 4),
    ("base_to_eef_pos", ((-1.5, 1.5),) * 3),
    ("base_to_eef_quat", ((-1.0, 1.0),) * 4),
    ("gripper_qpos", ((0.0, 0.04), (-0.04, 0.0))),
)
STATE_DIM = 16


def state_bounds() -> list[tuple[float, float]]:
    """(lowest, highest) of each value of the state, in its order."""
    return [bounds for _, part in STATE for bounds in part]


def task_name(task: str, api: str) -> str:
    """The name of a task in a version. v1 also accepts v0.2's names of tasks that it only renamed.

    Raises:
        ValueError: the task does not exist, or v1 split it into several.
    """
    known = HORIZONS[api]
    if task in known:
        return task
    twins = TWINS.get(task, ()) if api == "v1" else tuple(old for old, new in TWINS.items() if task in new)
    if api == "v1" and len(twins) == 1:
        return twins[0]
    if twins:
        raise ValueError(f"RoboCasa {api} has no task {task!r}, but {' and '.join(twins)}: choose one")
    raise ValueError(f"unknown RoboCasa task {task!r}: expected one of {', '.join(known)}")


def scenes(names: tuple[str, ...], api: str) -> tuple[Scene, ...]:
    """The scenes of the named sets and of pairs such as "1/2" (layout/style), each once.

    Raises:
        ValueError: nothing, an unknown set, or a pair that does not exist.
    """
    found: list[Scene] = []
    for name in names:
        found += SCENES[api][name] if name in SCENES[api] else [_pair(name, api)]
    if not found:
        raise ValueError(f"no scenes: expected {', '.join(SCENES[api])}, or pairs layout/style such as 1/2")
    return tuple(dict.fromkeys(found))


def _pair(name: str, api: str) -> Scene:
    parts = name.split("/")
    layouts, styles = KNOWN[api]
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        layout, style = int(parts[0]), int(parts[1])
        if layout in layouts and style in styles:
            return layout, style
    raise ValueError(
        f"unknown RoboCasa scene {name!r}: expected {', '.join(SCENES[api])}, or layout/style with layouts "
        f"{layouts[0]}…{layouts[-1]} and styles {styles[0]}…{styles[-1]}"
    )


def other_names(task: str) -> tuple[str, ...]:
    """The names of the same task in the versions of RoboCasa."""
    return (*TWINS.get(task, ()), *(old for old, new in TWINS.items() if task in new))
