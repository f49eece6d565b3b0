"""Ctrl-C and SIGTERM: they print one line, are never lost, and wait until a running step is saved, but not for ever.

Python runs a signal's handler when its main thread is back from compiled code, and a step on a large batch may take an
hour. A thread that is woken within the signal answers meanwhile, and ends the process in time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from z1_jax.errors import UserError

STOPS = (signal.SIGINT, signal.SIGTERM)
STOP_SECONDS = "Z1_JAX_STOP_SECONDS"  # set: how long SIGTERM lets the running step take; 0: as long as it does
PATIENCE_S = 60.0  # else
AGAIN_S = 5.0  # how long a second signal leaves to end in order
_SILENT_S = 2.0  # most that a signal goes without a line
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
    """Ctrl-C raises KeyboardInterrupt again, and so does SIGTERM; both end the process in time, whatever it does.

    Raises:
        UserError: Z1_JAX_STOP_SECONDS is no number of seconds.
    """
    found = [number for number in STOPS if signal.getsignal(number) is _leave]
    for number in found:
        signal.signal(number, signal.default_int_handler)
    if found:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reading, _patience_s()), daemon=True).start()


def _patience_s() -> float:
    text = os.environ.get(STOP_SECONDS, "") or str(PATIENCE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{STOP_SECONDS}: got {text!r}, expected seconds, or 0 for as long as a step takes")
    return seconds or float("inf")


_answered = threading.Event()  # a handler has told what happens


def _watch(pipe: int, patience_s: float) -> None:
    """Ends the process where signals that came, their numbers in `pipe`, are not answered in time."""
    never = float("inf")
    speaks_at = ends_at = never
    stops = 0
    while True:
        wakes_at = min(speaks_at, ends_at)
        pause = None if wakes_at == never else max(0.0, wakes_at - time.monotonic())
        if select.select([pipe], [], [], pause)[0]:
            for number in filter(STOPS.__contains__, os.read(pipe, 64)):
                stops, now = stops + 1, time.monotonic()
                patience = AGAIN_S if stops > 1 else patience_s if number == signal.SIGTERM else never
                ends_at = min(ends_at, now + patience)
                speaks_at = now + _SILENT_S if stops == 1 else never
        elif time.monotonic() >= ends_at:
            _say(f"{INTERRUPTED}; what was under way did not end in time and is lost")
            os._exit(130)
        else:
            if ends_at < never:
                left = ends_at - time.monotonic()
                _say(f"stopping: what is under way has {left:.0f} s to end ({STOP_SECONDS}=SECONDS changes this)")
            elif not _answered.is_set():
                _say(f"stopping when the call under way is over (again: within {AGAIN_S:.0f} s)")
            speaks_at = never


def _say(line: str) -> None:
    """Writes a line past Python's streams, whose locks the main thread may hold, unless nobody reads it."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{line}\n".encode())


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
        _answered.set()
        print("\nstopping: the running step ends and is saved first (again: stop at once)", flush=True)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            raise KeyboardInterrupt
