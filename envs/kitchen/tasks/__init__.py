"""The kitchen's tasks by name."""

from __future__ import annotations

from envs.kitchen.tasks import buttons, doors, pick_and_place, sink, stove
from envs.kitchen.tasks.base import Task, TaskInfo

__all__ = ["TASKS", "Task", "TaskInfo"]

TASKS: dict[str, TaskInfo] = {
    info.name: info
    for info in (
        TaskInfo("TurnOnSinkFaucet", "faucet", 40, sink.Faucet()),
        TaskInfo("OpenDrawer", "drawer", 48, doors.Drawer()),
        TaskInfo("PnPCounterToSink", "pick_and_place", 64, pick_and_place.PickAndPlace()),
        TaskInfo("CloseSingleDoor", "door", 56, doors.Door()),
        TaskInfo("TurnOnStove", "stove", 40, stove.Stove()),
        TaskInfo("CoffeePressButton", "button", 48, buttons.CoffeeButton()),
        TaskInfo("TurnOnMicrowave", "button", 48, buttons.MicrowaveButton()),
    )
}
