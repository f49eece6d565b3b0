"""Ctrl-C that waits for a good moment: the running step ends, is saved, and then the program stops."""

from __future__ import annotations

import signal
from types import FrameType


class GracefulStop:
    """Within this context the first SIGINT or SIGTERM only sets `requested`; a second one interrupts at once.

    Leaving the context raises KeyboardInterrupt when a stop was requested: also one that came during the last step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping: the running step ends and is saved first (again: stop at once)", flush=True)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            raise KeyboardInterrupt
