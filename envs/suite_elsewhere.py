"""A suite whose packages another interpreter has: a process of that interpreter answers for it (see envs.elsewhere)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import multiprocessing
import os
import subprocess
import threading
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from envs import elsewhere
from envs.base import Env
from envs.elsewhere import Elsewhere
from envs.suite import SettingError
from envs.text import shortened

_KEY = "env.python"
_START_S, _ANSWER_S = 120.0, 300.0  # longest that the process may take to start, and to answer
_EXPECTED = (
    f"expected the path of a Python {'.'.join(map(str, elsewhere.OLDEST))} or later that has NumPy and the suite's "
    "packages, such as VENV/bin/python"
)


class SuiteElsewhere:
    """A suite (see envs.suite) whose packages another interpreter has.

    Args:
        kind: its class; where: the same as MODULE:NAME.
        env, evaluation: sections of the config. `env.python` is the interpreter.
    """

    def __init__(self, kind: type, where: str, env: Any, evaluation: Any):
        self._here = kind(env, evaluation)  # for what needs no installation
        self._python = env.python
        self._made = (where, dataclasses.asdict(env), dataclasses.asdict(evaluation))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._here, name)

    def _ask(self, method: str, task: str) -> Any:
        return _process(self._python).ask((*self._made, method, task))

    def settle(self, task: str) -> dict[str, Any]:
        return self._ask("settle", task)

    def planned(self, task: str) -> dict[str, Any]:
        return self._ask("planned" if hasattr(self._here, "planned") else "settle", task)

    def check(self, task: str) -> None:
        self._ask("check", task)

    def make_env(self, task: str) -> Callable[[], Env]:
        return Elsewhere(self._python, self._ask("make_env", task))

    def horizon(self, task: str) -> int:
        return self._ask("horizon", task)

    def demonstrator(self, task: str) -> Any:
        found = self._ask("demonstrator", task)
        return found and dataclasses.replace(found, make_env=Elsewhere(self._python, found.make_env))

    def facts(self, task: str) -> dict[str, Any]:
        return self._ask("facts", task)

    def mujoco_version(self) -> str:
        """Of that interpreter."""
        return self._ask("mujoco_version", "")

    def other_names(self, task: str) -> tuple[str, ...]:
        return self._ask("other_names", task)


@functools.cache
def _process(python: str) -> _Process:
    return _Process(python)


class _Process:
    """A process of another interpreter that answers for its suites. It ends with this one."""

    def __init__(self, python: str):
        self._python, self._lock = python, threading.Lock()
        self._connection, child = multiprocessing.Pipe()
        code = f"{elsewhere.BOOT}\nfrom envs.suite_elsewhere import answer; answer({child.fileno()})"
        try:
            self._child = subprocess.Popen(
                [python, "-c", code],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=elsewhere.environment(),
            )
        except OSError as error:
            raise SettingError(_KEY, f"{python} cannot be started ({error.strerror}): {_EXPECTED}") from None
        finally:
            child.close()
        self._said = b""  # the end of what it wrote to stderr
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._received(_START_S)

    def ask(self, request: tuple[Any, ...]) -> Any:
        """Raises SettingError as the suite does there."""
        with self._lock:
            try:
                self._connection.send(request)
            except OSError:
                raise self._failed("it ended") from None
            kind, value = self._received(_ANSWER_S)
        if kind == "refused":
            key, text = value
            raise SettingError(key, f"{text} [in {self._python}]")
        if kind == "failed":
            raise SettingError(_KEY, f"{self._python}: {value}")
        return value

    def _received(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            raise self._failed(f"no answer within {timeout_s:g} s")
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._failed("it ended") from None
        except Exception as error:  # noqa: BLE001 - of its packages, which this interpreter may lack
            text = f"{self._python} answers what cannot be read here ({error}): {_EXPECTED}"
            raise SettingError(_KEY, text) from None

    def _failed(self, why: str) -> SettingError:
        _process.cache_clear()
        self._connection.close()
        self._child.kill()
        self._reader.join(2.0)
        last = self._said.decode(errors="replace").strip().rpartition("\n")[2]
        return SettingError(_KEY, f"{self._python} cannot be used ({shortened(last or why, 300)}): {_EXPECTED}")

    def _read(self) -> None:
        """Packages may warn more than a pipe holds; workers let it be seen."""
        assert self._child.stderr is not None
        while said := os.read(self._child.stderr.fileno(), 4096):
            self._said = (self._said + said)[-4096:]


def answer(fd: int) -> None:
    """The other side: answers (MODULE:NAME, env, evaluation, method, task) until the pipe closes."""
    connection = Connection(fd)
    connection.send(("ready", None))
    made: list[tuple[Any, Any]] = []
    while True:
        try:
            where, env, evaluation, method, task = connection.recv()
        except EOFError:
            return
        try:
            key = (where, env, evaluation)
            suite = next((one for asked, one in made if asked == key), None)
            if suite is None:
                module, _, name = where.partition(":")
                sections = (types.SimpleNamespace(**section) for section in (env, evaluation))
                suite = getattr(importlib.import_module(module), name)(*sections)
                made.append((key, suite))
            mujoco = method == "mujoco_version"
            reply = ("answer", importlib.metadata.version("mujoco") if mujoco else getattr(suite, method)(task))
        except SettingError as error:
            reply = ("refused", (error.key, str(error)))
        except Exception as error:  # noqa: BLE001 - whatever its packages raise must be said there
            reply = ("failed", shortened(" ".join(f"{type(error).__name__}: {error}".split()), 400))
        connection.send(reply)
