"""The order of the parts of an action and a state: as sources store them, and the raw order used everywhere else.

RoboCasa's HDF5 files store actions in raw order, its LeRobot directories with the base first, as their
`meta/modality.json` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Parts = Sequence[tuple[str, int]]

# (part, width) in the order of the simulator: arm, gripper, base, then the mode that chooses between them.
ACTION_PARTS: Parts = (
    ("end_effector_position", 3),
    ("end_effector_rotation", 3),
    ("gripper_close", 1),
    ("base_motion", 4),
    ("control_mode", 1),
)
STATE_PARTS: Parts = (
    ("base_position", 3),
    ("base_rotation", 4),
    ("end_effector_position_relative", 3),
    ("end_effector_rotation_relative", 4),
    ("gripper_qpos", 2),
)
# The same parts as observations of the simulator, and so of the HDF5 files.
STATE_OBSERVATIONS: Parts = (
    ("robot0_base_pos", 3),
    ("robot0_base_quat", 4),
    ("robot0_base_to_eef_pos", 3),
    ("robot0_base_to_eef_quat", 4),
    ("robot0_gripper_qpos", 2),
)


def columns(section: Mapping[str, Any], parts: Parts, width: int, original_key: str) -> np.ndarray | None:
    """Where each raw column is stored: raw = stored[:, columns].

    Args:
        section: "action" or "state" of a modality.json: part -> {"start", "end", "original_key"}.
        parts: the raw order.
        width: of the stored array.
        original_key: name of the stored array.

    Returns:
        int [width]; None where the section names other parts than `parts`: another robot.

    Raises:
        ValueError: the parts have other widths, or do not fill the stored array exactly.
    """
    if set(section) != {name for name, _ in parts}:
        return None
    found: list[int] = []
    for name, size in parts:
        entry = section[name]
        start, end = int(entry["start"]), int(entry["end"])
        if end - start != size:
            raise ValueError(f"{name} has columns {start}:{end}, expected {size} of them")
        if entry.get("original_key", original_key) != original_key:
            raise ValueError(f"{name} is read from {entry['original_key']}, expected {original_key}")
        found += range(start, end)
    if sorted(found) != list(range(width)):
        raise ValueError(f"its parts cover columns {sorted(found)}, expected each of the {width} columns once")
    return np.array(found)
