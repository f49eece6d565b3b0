"""Ctrl-C and SIGTERM: they print one line, are never lost, and wait until a running step is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "\ninterrupted: the same command continues where it stopped"


def install_hooks() -> None:
    """Sets up Ctrl-C and SIGTERM for a command: an uncaught interruption prints one line, and none is lost.

    Until `imported` is called, they end the process at once: there is nothing to save yet, and an extension module
    that is interrupted while it loads raises misleading errors.
    """
    sys.excepthook = _tell
    sys.unraisablehook = _deliver_again
    for number, usual in zip(STOPS, (signal.default_int_handler, signal.SIG_DFL), strict=True):
        if signal.getsignal(number) is usual:
            signal.signal(number, _leave)


def imported() -> None:
    """Ctrl-C raises KeyboardInterrupt again, and so does SIGTERM."""
    for number in STOPS:
        if signal.getsignal(number) is _leave:
            signal.signal(number, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the end of this context, for code that would lose them or take them for damage.

    They then take effect as usual. Only the main thread receives them; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in STOPS if callable(handler := signal.getsignal(number))}
    came: list[int] = []
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _deliver_again(caught: sys.UnraisableHookArgs) -> None:
    # Python drops what is raised in a finaliser or a callback of the garbage collector (jax has one), Ctrl-C too.
    # Raised again from here it would be dropped again, so it comes a moment later, when the callback has returned.
    if issubclass(caught.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident or 0  # a running thread has one
        threading.Timer(0.01, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(caught)


class GracefulStop:
    """Within this context the first SIGINT or SIGTERM only sets `requested`; a second one interrupts at once.

    Leaving the context raises KeyboardInterrupt when a stop was requested: also one that came during the last step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        for number in STOPS:
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
