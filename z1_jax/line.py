"""The line between the processes of a run: small values, and word from each process that it is alive.

A star of TCP connections with process 0 in the middle; messages are lines of JSON. Whoever is not heard from for
`SILENT_S` counts as dead, a closed connection at once; the others then end, each with a line that says who and why.
Knows nothing of JAX, so that it works while a collective of JAX hangs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from z1_jax.errors import UserError, first_line

BEAT_S = 2.0  # how often a process says that it is alive
SILENT_S = 30.0  # a process that is not heard from for so long is dead or stopped
FAILED, INTERRUPTED = 2, 130  # exit codes
WRONG = "failed: "  # before an error's own words, which say what to do
_PATIENCE_S = 5.0  # within which whoever connects must say who it is
_AGAIN = "the same command, given to all processes, continues where the run stopped"


class _Link:
    """One connection: sends and receives JSON lines."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.settimeout(None)
        # A peer that is stopped takes nothing more: sending must not hang then.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENT_S), 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = connection.makefile("r", encoding="utf-8", newline="\n")
        self._lock = threading.Lock()
        self.heard = time.monotonic()
        self.parted = self.lost = False  # it said goodbye; it ended without a word

    def send(self, **message: Any) -> None:
        """Raises OSError where nobody listens."""
        with self._lock:
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        try:
            text = self._reader.readline()
            message = json.loads(text) if text.endswith("\n") else None
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        return message if isinstance(message, dict) else None

    def receive_within(self, seconds: float) -> dict[str, Any] | None:
        self._socket.settimeout(max(seconds, 0.001))
        try:
            return self.receive()
        finally:
            with contextlib.suppress(OSError):
                self._socket.settimeout(None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _name(number: int, host: str, pid: int) -> str:
    return f"process {number} (pid {pid} on {host})"


class Line:
    """This process's end. `names` says who each process is, and `hosts` where.

    Args:
        links: to the other processes by their number: of process 0 to all, of the others to process 0.
        listening: where process 0 turns away whoever comes late.
    """

    def __init__(
        self, index: int, hosts: Sequence[str], pids: Sequence[int], links: dict[int, _Link], listening: Any = None
    ):
        self.index, self.count, self.hosts = index, len(hosts), list(hosts)
        self.names = list(map(_name, range(len(hosts)), hosts, pids))
        self.over, self.code = False, 0
        self._links, self._listening = links, listening
        self._round = 0
        self._came: dict[int, dict[int, Any]] = {}  # by round, of each process
        self._answers: dict[int, list[Any]] = {}
        self._changed = threading.Condition()
        self._alarm = threading.Lock()
        for number, link in links.items():
            self._start(functools.partial(self._listen, number, link))
        self._start(self._beat)
        if listening is not None:
            self._start(self._turn_away)

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True, name="line").start()

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, JSON, in their order. Waits for all of them, as long as all are alive."""
        self._round += 1
        number = self._round
        if self.index:
            self._send(0, kind="value", round=number, value=value)
            with self._changed:
                self._changed.wait_for(lambda: number in self._answers)
                return self._answers.pop(number)
        with self._changed:
            came = self._came.setdefault(number, {})
            came[0] = json.loads(json.dumps(value))  # as the others see it
            self._changed.wait_for(lambda: len(came) == self.count)
            values = [came[process] for process in range(self.count)]
            del self._came[number]
        for process in self._links:
            self._send(process, kind="values", round=number, values=values)
        return values

    def end(self, why: str, code: int) -> bool:
        """Tells the others that this process ends before its time, which ends them too; whether process 0 heard it."""
        with self._alarm:
            if not self.over:
                self.over, self.code = True, code
                self._tell_all(self.index, why, code)
        return self.index > 0 and not self._links[0].lost

    def close(self) -> None:
        """Parts from the others at the end of the run."""
        self.over = True
        for process in self._links:
            with contextlib.suppress(OSError):
                self._links[process].send(kind="bye")
        if self._listening is not None:
            self._listening.close()
        # The links close with the process: closed now, what was sent last might be lost.

    def _send(self, process: int, **message: Any) -> None:
        try:
            self._links[process].send(**message)
        except OSError:
            self._gone(process)

    def _tell_all(self, process: int, why: str, code: int) -> None:
        for number, link in self._links.items():
            if number != process:
                try:
                    link.send(kind="end", process=process, why=why, code=code)
                except OSError:
                    link.lost = True

    def _listen(self, process: int, link: _Link) -> None:
        while (message := link.receive()) is not None:
            kind = message.get("kind")
            if kind == "bye":
                link.parted = True
            elif kind == "end":
                self._ring(message["process"], message["why"], message["code"])
            elif kind in ("value", "values"):
                with self._changed:
                    if kind == "value":
                        self._came.setdefault(message["round"], {})[process] = message["value"]
                    else:
                        self._answers[message["round"]] = message["values"]
                    self._changed.notify_all()
        if not link.parted:
            link.lost = True
            self._gone(process)

    def _gone(self, process: int) -> None:
        self._ring(process, "ended without a word: it was killed, or its machine failed", FAILED)

    def _beat(self) -> None:
        before = time.monotonic()
        while not self.over:
            time.sleep(BEAT_S)
            now = time.monotonic()
            late, before = now - before > BEAT_S + _PATIENCE_S, now
            for process, link in self._links.items():
                if late:  # this process itself was stopped for a while
                    link.heard = now
                with contextlib.suppress(OSError):  # the listener notices
                    link.send(kind="beat")
                if now - link.heard > SILENT_S and not link.parted:
                    why = f"was not heard from for {SILENT_S:.0f} s: it is stopped, or its machine or network is gone"
                    self._ring(process, why, FAILED)

    def _ring(self, process: int, why: str, code: int) -> None:
        """Ends this process because of another one."""
        with self._alarm:
            if self.over:
                return
            self.over, self.code = True, code
        self._tell_all(process, why, code)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            mine = f"process {self.index}: " * bool(self.index)
            again = "" if why.startswith(WRONG) else f"; {_AGAIN}"
            kind = "" if code == INTERRUPTED else "error: "
            sys.stderr.write(f"\n{mine}{kind}{self.names[process]} {why}{again}\n")
            sys.stderr.flush()
        os._exit(code)  # the main thread may wait in a collective for ever

    def _turn_away(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
                link = _Link(connection)
                if link.receive_within(_PATIENCE_S) is not None:
                    link.send(kind="refused", why=f"a run of {self.count} processes is under way there")
                link.close()
            except OSError:
                if self._listening.fileno() < 0:
                    return


def open_line(host: str, port: int, count: int, index: int, seconds: float) -> Line:
    """Connects the processes of a run.

    Raises:
        UserError: the port is in use, process 0 does not answer, or turns this process away, or some do not come.
    """
    return _gather(port, count, seconds) if index == 0 else _call(host, port, count, index, seconds)


def _gather(port: int, count: int, seconds: float) -> Line:
    jax_port(port)
    listening = _listen_at(port)
    links: dict[int, _Link] = {}
    who: dict[int, tuple[str, int]] = {0: (socket.gethostname(), os.getpid())}
    until = time.monotonic() + seconds
    while len(who) < count:
        listening.settimeout(max(until - time.monotonic(), 0.001))
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            missing = [str(number) for number in range(count) if number not in who]
            why = f"process {', '.join(missing)} of {count} did not come within {seconds:.0f} s"
            for link in links.values():
                with contextlib.suppress(OSError):
                    link.send(kind="refused", why=why)
            raise UserError(f"{why}: start all of them with the same --coordinator and --processes") from None
        link = _Link(connection)
        hello = link.receive_within(_PATIENCE_S)
        if hello is None or hello.get("kind") != "hello":
            link.close()
            continue
        number = hello["index"]
        why = ""
        if hello["count"] != count:
            why = f"it expects {hello['count']} processes, process 0 expects {count}"
        elif number in who:
            why = f"{_name(number, *who[number])} has joined already: do two runs share this coordinator?"
        if why:
            with contextlib.suppress(OSError):
                link.send(kind="refused", why=why)
            link.close()
            continue
        links[number], who[number] = link, (hello["host"], hello["pid"])
    listening.settimeout(None)
    hosts = [who[number][0] for number in range(count)]
    pids = [who[number][1] for number in range(count)]
    for number, link in links.items():
        try:
            link.send(kind="welcome", hosts=hosts, pids=pids)
        except OSError:
            raise UserError(f"process {number} on {hosts[number]} came and ended before all were there") from None
    return Line(0, hosts, pids, links, listening)


def jax_port(port: int) -> int:
    """Where JAX's own coordinator listens beside the line at `port`."""
    return port + 1 if port < 65535 else port - 1


def _listen_at(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    sockets = []
    for number in (jax_port(port), port):
        try:
            sockets.append(socket.create_server(("", number), family=family, dualstack_ipv6=both, backlog=1024))
        except OSError as error:
            raise UserError(
                f"port {number} cannot be used ({first_line(error)}): a run needs two neighbouring ports, "
                f"{port} and {jax_port(port)}, and another run may have them; choose another --coordinator=HOST:PORT"
            ) from error
    sockets[0].close()
    return sockets[1]


def _call(host: str, port: int, count: int, index: int, seconds: float) -> Line:
    until = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_PATIENCE_S)
            break
        except socket.gaierror as error:
            raise UserError(f"--coordinator: the host {host} is not known here ({first_line(error)})") from error
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"the coordinator {host}:{port} does not answer within {seconds:.0f} s ({first_line(error)}): "
                    "is process 0 running there, and may this machine reach it?"
                ) from error
            time.sleep(0.3)
    link = _Link(connection)
    link.send(kind="hello", index=index, count=count, host=socket.gethostname(), pid=os.getpid())
    answer = link.receive_within(until - time.monotonic() + _PATIENCE_S) or {}
    if answer.get("kind") != "welcome":
        link.close()
        why = answer.get("why", f"something answers there that is no process 0 of such a run, within {seconds:.0f} s")
        raise UserError(f"process {index} cannot join at {host}:{port}: {why}")
    return Line(index, answer["hosts"], answer["pids"], {0: link})
