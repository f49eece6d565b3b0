"""The kitchen's tasks by name: RoboCasa's 24 single-stage tasks."""

from __future__ import annotations

from envs.kitchen.tasks import buttons, doors, pick_and_place, shelves, sink, stove
from envs.kitchen.tasks.base import Task, TaskInfo

__all__ = ["TASKS", "Task", "TaskInfo"]

# Horizons are about 1.3 times the median that the expert takes with the demonstrations' noise (docs/kitchen-tasks.md).
TASKS: dict[str, TaskInfo] = {
    info.name: info
    for info in (
        TaskInfo("TurnOnSinkFaucet", "faucet", 40, sink.Faucet()),
        TaskInfo("TurnOffSinkFaucet", "faucet_off", 40, sink.FaucetOff()),
        TaskInfo("TurnSinkSpout", "spout", 40, sink.Spout()),
        TaskInfo("OpenDrawer", "drawer", 48, doors.Drawer()),
        TaskInfo("CloseDrawer", "close_drawer", 32, doors.CloseDrawer()),
        TaskInfo("OpenSingleDoor", "open_door", 64, doors.OpenSingleDoor()),
        TaskInfo("CloseSingleDoor", "door", 56, doors.CloseSingleDoor()),
        TaskInfo("OpenDoubleDoor", "open_door", 120, doors.OpenDoubleDoor()),
        TaskInfo("CloseDoubleDoor", "doors", 80, doors.CloseDoubleDoor()),
        TaskInfo("TurnOnStove", "stove", 40, stove.Stove()),
        TaskInfo("TurnOffStove", "stove_off", 32, stove.StoveOff()),
        TaskInfo("TurnOnMicrowave", "button", 48, buttons.MicrowaveButton()),
        TaskInfo("TurnOffMicrowave", "stop_button", 40, buttons.MicrowaveStop()),
        TaskInfo("CoffeePressButton", "button", 48, buttons.CoffeeButton()),
        TaskInfo("CoffeeSetupMug", "into", 80, shelves.SetupMug()),
        TaskInfo("CoffeeServeMug", "out_of", 64, shelves.ServeMug()),
        TaskInfo("PnPCounterToSink", "pick_and_place", 64, pick_and_place.CounterToSink()),
        TaskInfo("PnPSinkToCounter", "onto_dish", 80, pick_and_place.SinkToCounter()),
        TaskInfo("PnPCounterToStove", "onto_dish", 64, pick_and_place.CounterToStove()),
        TaskInfo("PnPStoveToCounter", "onto_dish", 64, pick_and_place.StoveToCounter()),
        TaskInfo("PnPCounterToCab", "into", 72, shelves.CounterToCabinet()),
        TaskInfo("PnPCabToCounter", "out_of", 72, shelves.CabinetToCounter()),
        TaskInfo("PnPCounterToMicrowave", "into", 72, shelves.CounterToMicrowave()),
        TaskInfo("PnPMicrowaveToCounter", "out_of", 88, shelves.MicrowaveToCounter()),
    )
}
