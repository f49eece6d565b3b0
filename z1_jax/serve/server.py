"""The server of openpi's websocket protocol: many clients, one policy, all waiting requests in one batch.

Each connection gets its answers in the order of its messages. A message that cannot be used is answered by a text frame
with the reason, and the connection stays open. The server keeps no state between calls.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import hmac
import http
import itertools
import logging
import signal
import time
from collections.abc import Mapping
from typing import Any

from z1_jax.serve import wire
from z1_jax.serve.engine import Answer, Engine, Request
from z1_jax.serve.inputs import Inputs

_log = logging.getLogger(__name__)

# Times the limit: a message up to here is read and refused by an error frame, a larger one ends its connection unread.
READ_TO_REFUSE = 2
GRACE_S = 30.0  # longest that a stop waits for answers that are under way


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that keep one client from blocking the others."""

    message_bytes: int = 16 << 20  # beyond it a message is refused, beyond READ_TO_REFUSE times it the client dropped
    connections: int = 64
    queue: int = 64  # requests that wait for the device
    send_s: float = 10.0  # a client that does not read its answer for so long is dropped
    ping_s: float = 20.0  # a client that answers no ping for so long is dropped: dead, half closed, or stuck
    deadline_s: float = 0.0  # oldest observation that is answered; 0: any


def place(host: str, port: int) -> str:
    """Both as a client's address has them: an IPv6 address is in brackets there."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Refused(ValueError):
    """Why a request gets no actions: one line, which is sent as the error frame."""


@dataclasses.dataclass
class _Waiting:
    """A request in the queue."""

    request: Request
    late_at: float  # on the monotonic clock; infinite without a deadline
    answer: asyncio.Future[tuple[Answer, dict[str, float]]]
    since: float = dataclasses.field(default_factory=time.monotonic)


class PolicyServer:
    """Serves an engine until it is told to stop.

    Attributes:
        answered, refused: messages so far.
        batches: size of a batch -> how many there were.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Inputs,
        metadata: Mapping[str, Any],
        *,
        limits: Limits = Limits(),
        api_key: str = "",
        seed: int = 0,
    ):
        """Args:
        metadata: the first message to each client.
        api_key: the key that clients must present; empty: none.
        seed: of requests without `noise_seed`: the n-th of them has the noise of (seed, n).
        """
        self._engine, self._inputs, self._limits, self._key, self._seed = engine, inputs, limits, api_key, seed
        self._metadata = wire.pack(dict(metadata))
        self._unseeded = itertools.count()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._arrived = asyncio.Event()
        self._stopping = asyncio.Event()
        self._clients: set[Any] = set()
        self._device = concurrent.futures.ThreadPoolExecutor(1, "device")
        self._readers = concurrent.futures.ThreadPoolExecutor(4, "reader")
        self.answered, self.refused = 0, 0
        self.batches: collections.Counter[int] = collections.Counter()

    def stop(self) -> None:
        """Answers the requests that have arrived, then ends `run`. Call it in the event loop's thread."""
        self._stopping.set()

    async def run(self, host: str, port: int, started: asyncio.Future[int] | None = None) -> None:
        """Serves until `stop`. `started` gets the port when it listens.

        Raises:
            OSError: the address cannot be used.
        """
        serve = wire.package("websockets.asyncio.server").serve
        limits = self._limits
        deciding = asyncio.create_task(self._decide_all())
        server = await serve(
            self._client,
            host,
            port,
            origins=[None],  # refuses browsers: no web page may drive the robot
            compression=None,
            max_size=READ_TO_REFUSE * limits.message_bytes,
            max_queue=2,  # messages of one client that wait in memory
            ping_interval=limits.ping_s,
            ping_timeout=limits.ping_s,
            close_timeout=limits.send_s,
            process_request=self._admit,
            logger=_library_log(),
        )
        if started is not None:
            started.set_result(server.sockets[0].getsockname()[1])
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({stopped, deciding}, return_when=asyncio.FIRST_COMPLETED)
        self._stopping.set()
        server.close(close_connections=False)
        try:  # connections end by themselves when they have sent what is under way
            await asyncio.wait_for(server.wait_closed(), GRACE_S)
        except TimeoutError:
            for connection in self._clients:
                connection.transport.abort()
            for one in self._waiting:
                one.answer.cancel()
            await server.wait_closed()
        self._arrived.set()
        await deciding
        self._device.shutdown()
        self._readers.shutdown()

    def run_until_signal(self, host: str, port: int) -> None:
        """As `run`, in this thread until SIGINT or SIGTERM; a second one stops at once, by KeyboardInterrupt."""

        async def main() -> None:
            loop = asyncio.get_running_loop()
            started = loop.create_future()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._on_signal, loop)
            running = asyncio.create_task(self.run(host, port, started))
            await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                print(f"serving at ws://{place(host, started.result())} (Ctrl-C stops)", flush=True)
            await running

        asyncio.run(main())

    def _on_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        print("\nstopping: answers that are under way are finished first (again: stop at once)", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.stop()

    def _admit(self, connection: Any, request: Any) -> Any:
        """Answers /healthz, and turns clients away before any message: without the key, or when there are too many.

        It does so by an HTTP status. A client takes the first frame for the metadata, so an error frame would end
        openpi's client in a TypeError of msgpack; a status ends it with "HTTP 401".
        """
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        given = request.headers.get("Authorization", "")
        if self._key and not hmac.compare_digest(given.encode(), f"Api-Key {self._key}".encode()):
            self.refused += 1
            wanted = "expected the header Authorization: Api-Key KEY with the server's key"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, f"{'wrong' if given else 'no'} API key; {wanted}\n")
        if len(self._clients) >= self._limits.connections:
            self.refused += 1
            told = (
                f"{self._limits.connections} clients are connected, the most that this server serves; try again later"
            )
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, told + "\n")
        return None

    async def _client(self, connection: Any) -> None:
        """One connection, from its metadata to its end."""
        closed = wire.package("websockets.exceptions").ConnectionClosed
        before_ms = 0.0
        self._clients.add(connection)
        try:
            await self._send(connection, self._metadata)
            while (message := await self._next(connection)) is not None:
                began = time.monotonic()
                reply = await self._reply(message, began, before_ms)
                await self._send(connection, reply)
                before_ms = 1000 * (time.monotonic() - began)
            await connection.close(1001, "the server is stopping")
        except closed:
            pass
        except TimeoutError:
            _log.warning("a client did not read its answer for %g s: dropped", self._limits.send_s)
            connection.transport.abort()
        finally:
            self._clients.discard(connection)

    async def _next(self, connection: Any) -> bytes | str | None:
        """The next message; None when the server stops before one comes."""
        if self._stopping.is_set():
            return None
        receive = asyncio.ensure_future(connection.recv())
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({receive, stop}, return_when=asyncio.FIRST_COMPLETED)
            return receive.result() if receive.done() else None
        finally:
            stop.cancel()
            receive.cancel()

    async def _send(self, connection: Any, reply: bytes | str) -> None:
        async with asyncio.timeout(self._limits.send_s):
            await connection.send(reply)

    async def _reply(self, message: bytes | str, began: float, before_ms: float) -> bytes | str:
        """The answer to one message, or the text that says why there is none."""
        try:
            reply = await self._answer(message, began, before_ms)
        except ValueError as error:
            told = " ".join(str(error).split())
        except Exception:  # a fault of ours in one message must not end the others' service
            _log.exception("a message was not answered")
            told = "the server failed on this message; its log says how"
        else:
            self.answered += 1
            return reply
        self.refused += 1
        return f"error: {told}"

    async def _answer(self, message: bytes | str, began: float, before_ms: float) -> bytes:
        size_mb, most_mb = len(message) / (1 << 20), self._limits.message_bytes / (1 << 20)
        if size_mb > most_mb:
            raise Refused(
                f"the message has {size_mb:.3g} MB, more than the {most_mb:.3g} that this server takes "
                "(--max-message-mb); send smaller images"
            )
        if len(self._waiting) >= self._limits.queue:
            raise Refused(f"{self._limits.queue} requests wait already, the most that this server keeps; try again")
        loop = asyncio.get_running_loop()
        request, age_s = await loop.run_in_executor(self._readers, self._read, message)
        late_at = began + self._limits.deadline_s - age_s if self._limits.deadline_s else float("inf")
        waiting = _Waiting(request, late_at, loop.create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        answer, timing = await waiting.answer
        self._check_age(late_at)
        if answer.fault:
            raise Refused(f"{answer.fault}: not sent")
        done = time.monotonic()
        server = {"infer_ms": 1000 * (done - began), **timing}
        if before_ms:
            server["prev_total_ms"] = before_ms
        policy = {"infer_ms": timing["decide_ms"]}
        return wire.pack(
            {"actions": self._inputs.answer(answer.actions), "server_timing": server, "policy_timing": policy}
        )

    def _read(self, message: bytes | str) -> tuple[Request, float]:
        """The request of a message, and the age of its observation when it was sent."""
        try:
            asked = self._inputs.read(wire.unpack(message))
        except wire.MessageError as error:
            raise Refused(f"the message {error}") from None
        noise = asked.noise
        if noise is None:
            noise = (self._seed, next(self._unseeded))
        return self._engine.prepare(asked.observation, noise, asked.previous, asked.delay), asked.age_s

    def _check_age(self, late_at: float) -> None:
        late_s = time.monotonic() - late_at
        if late_s > 0:
            deadline = self._limits.deadline_s
            raise Refused(
                f"the observation is {1000 * (deadline + late_s):.0f} ms old, more than the deadline of "
                f"{1000 * deadline:g} ms: not answered"
            )

    async def _decide_all(self) -> None:
        """Decides the waiting requests, a batch at a time, until the server has stopped."""
        loop = asyncio.get_running_loop()
        while not (self._stopping.is_set() and not self._clients):
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(self._engine.largest, len(self._waiting)))]
                batch = [one for one in batch if self._in_time(one)]
                if batch:
                    await self._decide(loop, batch)

    def _in_time(self, waiting: _Waiting) -> bool:
        """Whether a request can still be answered before its deadline; it is refused if not."""
        try:
            self._check_age(waiting.late_at)
        except Refused as error:
            waiting.answer.set_exception(error)
        return not waiting.answer.done()  # also cancelled, with its connection

    async def _decide(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        began = time.monotonic()
        self.batches[len(batch)] += 1
        work = functools.partial(self._engine.decide, [one.request for one in batch])
        try:
            answers = await loop.run_in_executor(self._device, work)
        except Exception as error:  # told to those who asked; the next batch may go well
            _log.exception("a batch of %d was not decided", len(batch))
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(
                        Refused(f"the policy failed ({type(error).__name__}); see the server's log")
                    )
            return
        decide_ms = 1000 * (time.monotonic() - began)
        for one, answer in zip(batch, answers, strict=True):
            if not one.answer.done():
                timing = {"queue_ms": 1000 * (began - one.since), "decide_ms": decide_ms, "batch": float(len(batch))}
                one.answer.set_result((answer, timing))


def _library_log() -> logging.Logger:
    """The library's logger, for critical messages only: it logs a traceback for each handshake that breaks off."""
    logger = logging.getLogger("websockets.server")
    logger.setLevel(logging.CRITICAL)
    return logger
