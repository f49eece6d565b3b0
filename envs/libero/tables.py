"""LIBERO's suites and tasks, and the layout of state and action."""

from __future__ import annotations

import re

from envs.libero import compat

BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# LIBERO-PRO's: other words, other objects, swapped places, other tasks. What else it registers lacks files.
PERTURBATIONS = ("lan", "object", "swap", "task")
SUITES = (*BASES, "libero_90", *(f"{base}_{kind}" for base in BASES for kind in PERTURBATIONS))
INITIAL_STATES = 50  # of every task
ARM_JOINTS = 7
# σ in radians of each joint about the arm's usual posture, a normal distribution: robosuite's default, and what the
# initial states of libero_spatial, _object, _goal and _10 have (0.0185 to 0.0218). LIBERO's own reset has none.
ARM_NOISE = 0.02

CAMERAS = ("agentview", "robot0_eye_in_hand")
CONTROL_HZ = 20.0
SUBSTEPS = 25

# Position of the gripper's tip in the world, its rotation as an axis times an angle, and both fingers, metres.
STATE = {"eef_pos": slice(0, 3), "eef_axis_angle": slice(3, 6), "gripper_qpos": slice(6, 8)}
STATE_DIM = 8
# (lowest, highest) of each number: where the arm reaches over tables and floors, any rotation (robosuite's angles go
# up to a whole turn), fingers of 4 cm each way, which bend by a little.
STATE_BOUNDS = (
    *((-0.8, 0.7), (-0.9, 0.9), (-0.05, 1.9)),
    *((-6.2832, 6.2832),) * 3,
    *((-0.005, 0.045), (-0.045, 0.005)),
)
# ±1 is 0.05 m or 0.5 rad a control step (operational space control); the gripper opens below 0 and closes above.
ACTION = {"eef_pos": slice(0, 3), "eef_rot": slice(3, 6), "gripper": slice(6, 7)}
ACTION_DIM = 7
NO_OP = (0.0,) * 6 + (-1.0,)


def tasks(suite: str) -> tuple[str, ...]:
    """The names of a suite's tasks as `SUITE/NAME`, in the benchmark's own order: a task's place is its number.

    Raises:
        ValueError: an unknown suite, or LIBERO is not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown LIBERO suite {suite!r}: expected one of {', '.join(SUITES)}")
    return tuple(f"{suite}/{name}" for name in compat.task_maps()[suite])


def task_name(task: str) -> str:
    """`SUITE/NAME` of a task that is given in this form or as `SUITE/NUMBER` (from 0, as in the benchmark).

    Raises:
        ValueError: an unknown suite or task, or LIBERO is not installed.
    """
    suite, slash, name = task.partition("/")
    if not slash:
        raise ValueError(
            f"LIBERO tasks are SUITE/NAME or SUITE/NUMBER, e.g. libero_object/0; got {task!r}. "
            f"Suites: {', '.join(SUITES)}"
        )
    names = tasks(suite)
    if name.isdecimal() and int(name) < len(names):
        return names[int(name)]
    if task not in names:
        short = ", ".join(known.partition("/")[2] for known in names[:10]) + (", …" if len(names) > 10 else "")
        raise ValueError(
            f"{suite} has no task {name!r}: expected a number from 0 to {len(names) - 1}, or one of {short}"
        )
    return task


def instruction(task: str) -> str:
    """The task in words, as policies are told.

    In a plain suite these are the benchmark's words, as in openpi; the task's own file has other words in 29 of 130
    tasks. In LIBERO-PRO's suites of other words and other tasks they are the file's.
    """
    suite, _, name = task.partition("/")
    if not suite.endswith(("_lan", "_task")):
        return compat.task_maps()[suite][name].language
    path = compat.find().task_file(suite, name)
    written = re.search(r"\(:language\s+([^)]+)\)", path.read_text(encoding="utf-8"))
    if written is None:
        raise ValueError(f"{path} says no (:language …): install LIBERO anew, {compat.INSTALL}")
    return " ".join(written.group(1).lower().split())
