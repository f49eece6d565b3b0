"""Ctrl-C: told in one line, never lost, and where work is under way it waits until the running step is saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

INTERRUPTED = "\ninterrupted: the same command continues where it stopped"


def install_hooks() -> None:
    """For a process that is a command: an interruption that nobody caught is one line, and none is swallowed."""
    sys.excepthook = _tell
    sys.unraisablehook = _deliver_again


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _deliver_again(caught: sys.UnraisableHookArgs) -> None:
    # Python drops what is raised in a finaliser or a callback of the garbage collector (jax has one), Ctrl-C too.
    # Raised again from here it would be dropped again, so it comes a moment later, when the callback has returned.
    if issubclass(caught.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.01, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(caught)


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
