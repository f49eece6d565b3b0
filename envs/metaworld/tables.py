"""Meta-World's tasks with the words that policies are told, its sets of tasks, and the layout of state and action."""

from __future__ import annotations

# In the order of the package's MT50. The words are those of the benchmark's own paper (Yu et al. 2019, appendix), as in
# LeRobot's dataset and RLinf. Two tasks have the same words: push-v3 and push-back-v3.
INSTRUCTIONS = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "hand-insert-v3": "Insert the gripper into a hole",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "peg-insert-side-v3": "Insert a peg sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "push-v3": "Push the puck to a goal",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "push-back-v3": "Push the puck to a goal",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-open-v3": "Push and open a window",
    "window-close-v3": "Push and close a window",
}
TASKS = tuple(INSTRUCTIONS)


def _tasks(names: str) -> tuple[str, ...]:
    return tuple(f"{name}-v3" for name in names.split())


_MEDIUM = _tasks(
    "basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep sweep-into"
)
_HARD = _tasks("assembly hand-insert pick-out-of-hole pick-place push push-back")
_VERY_HARD = _tasks("shelf-place disassemble stick-pull stick-push pick-place-wall")
# MT10 and MT50 are the benchmark's; the four by difficulty are those that LeRobot and RLinf take means over.
SETS = {
    "MT10": _tasks(
        "reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open "
        "window-close"
    ),
    "MT50": TASKS,
    "easy": tuple(task for task in TASKS if task not in {*_MEDIUM, *_HARD, *_VERY_HARD}),
    "medium": _MEDIUM,
    "hard": _HARD,
    "very_hard": _VERY_HARD,
}

# corner2 stands where LeRobot and RLinf put it, which is where newer versions have corner4.
CAMERAS = ("corner2", "corner", "corner3", "topview", "behindGripper", "gripperPOV")
TURNED = ("corner2", "corner", "corner3")  # mounted upside down
CORNER2 = (0.75, 0.075, 0.7)  # metres
CONTROL_HZ = 80.0

# Position of the hand, metres, and how far the gripper is open, 0 to 1.
STATE = {"hand_pos": slice(0, 3), "gripper_open": slice(3, 4)}
STATE_DIM = 4
# ±1 moves the hand's target by 1 cm a control step; the gripper closes above 0.
ACTION = {"hand_pos": slice(0, 3), "gripper": slice(3, 4)}
ACTION_DIM = 4
NO_OP = (0.0,) * ACTION_DIM


def check_task(task: str) -> str:
    """The task's name. Raises ValueError for an unknown one."""
    if task not in INSTRUCTIONS:
        close = task.rpartition("-v")[0] + "-v3" if "-v" in task else f"{task}-v3"
        hint = f"did you mean {close}?" if close in INSTRUCTIONS else f"expected one of {', '.join(TASKS)}"
        raise ValueError(f"unknown Meta-World task {task!r}: {hint}")
    return task
