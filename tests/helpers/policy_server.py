"""A policy server in a thread of this process, for tests from outside."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import tiny_policy

from z1_jax.serve.inputs import Inputs
from z1_jax.serve.server import PolicyServer

HELLO = {"hello": "client", "none": None}


@contextlib.contextmanager
def serving(
    engine: Any, metadata: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[int, PolicyServer]]:
    """A running server of the tiny policy's observations: yields its port and itself.

    It is stopped at the end, and must end by itself.
    """
    told = metadata or HELLO
    loop, found = asyncio.new_event_loop(), concurrent.futures.Future()

    async def main():
        inputs = Inputs("z1", (tiny_policy.CAMERA,), 16)
        server = PolicyServer(engine, inputs, told, **settings)
        started = loop.create_future()
        running = asyncio.create_task(server.run("127.0.0.1", 0, started))
        server.stop_soon = functools.partial(loop.call_soon_threadsafe, server.stop)
        found.set_result((await started, server))
        await running

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    port, server = found.result(30)
    try:
        yield port, server
    finally:
        with contextlib.suppress(RuntimeError):  # it has stopped already
            server.stop_soon()
        thread.join(60)
        assert not thread.is_alive()
