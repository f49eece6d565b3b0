"""Latency and throughput of the policy server at 1, 4 and 16 clients, against one call at a time.

    python benchmarks/serve.py                  # a kitchen policy with random weights, about two minutes
    python benchmarks/serve.py --preset pi05    # full-size π0.5 with random weights, on an accelerator

Clients live in a process of their own; each sends its next observation when it has its answer. "batches" is the
server's dynamic batching, "one call at a time" the same server with batches of one. Latencies are the clients', from
sending to the answer. "onwards" requests carry `previous_actions`: real-time chunking's guidance.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import multiprocessing
import threading
import time

import jax
import numpy as np
from figures import result_line

from z1_jax.data.normalize import NormStats
from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer
from z1_jax.models.presets import PRESETS, get_preset
from z1_jax.policy import Policy, fresh_policy, make_processor
from z1_jax.process import start_jax
from z1_jax.serve import wire
from z1_jax.serve.engine import Engine
from z1_jax.serve.inputs import Inputs
from z1_jax.serve.server import PolicyServer
from z1_jax.sharding import make_mesh

CAMERAS = ("base", "left_wrist", "right_wrist")
PROMPT = "open the drawer"
STATE, ACTIONS = 16, 12


def random_policy(preset: str) -> Policy:
    """A policy with random weights on the first device."""
    dtype = "bfloat16" if preset == "pi05" else "float32"
    config = get_preset(preset, dtype=dtype)
    model = train_small_tokenizer(kitchen_instructions(), vocab_size=512)
    one = {
        width: NormStats(np.zeros(width), np.ones(width), -np.ones(width), np.ones(width)) for width in (STATE, ACTIONS)
    }
    processor = make_processor(
        config,
        PromptTokenizer.from_bytes(model, config.prompt_length),
        {"state": one[STATE], "actions": one[ACTIONS]},
        CAMERAS[: config.cameras],
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    steps = 10 if preset == "pi05" else 4
    return fresh_policy(config, processor, 0, mesh, executed=config.horizon, denoising_steps=steps)


class Served:
    """A server in a thread of this process."""

    def __init__(self, engine: Engine):
        self._loop, self._ready = asyncio.new_event_loop(), concurrent.futures.Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(engine),))

    async def _main(self, engine: Engine) -> None:
        inputs = Inputs("z1", engine.policy.processor.cameras, STATE)
        server = PolicyServer(engine, inputs, {})
        started = self._loop.create_future()
        running = asyncio.create_task(server.run("127.0.0.1", 0, started))
        self._ready.set_result((await started, server))
        await running

    def __enter__(self) -> tuple[int, PolicyServer]:
        self._thread.start()
        port, self._server = self._ready.result()
        return port, self._server

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join()


def drive(port: int, clients: int, seconds: float, size: int, cameras: int, horizon: int) -> list[tuple[float, float]]:
    """Runs in a process of its own: (moment, latency in ms) of each answer after the first second.

    Args:
        horizon: steps of `previous_actions`; 0: none.
    """
    from websockets.sync.client import connect

    over = time.monotonic() + 1 + seconds

    def client(number: int) -> list[tuple[float, float]]:
        rng, told = np.random.default_rng(number), []
        message = {
            "images": {camera: rng.integers(0, 256, (size, size, 3)).astype(np.uint8) for camera in CAMERAS[:cameras]},
            "state": rng.uniform(-1, 1, STATE).astype(np.float32),
            "prompt": PROMPT,
        }
        if horizon:
            message |= {"previous_actions": np.zeros((horizon, ACTIONS), np.float32), "delay": 1}
        packed = wire.pack(message)
        with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
            connection.recv()
            while (began := time.monotonic()) < over:
                connection.send(packed)
                reply = connection.recv()
                if isinstance(reply, str):
                    raise RuntimeError(reply)
                told.append((began, 1000 * (time.monotonic() - began)))
        return [one for one in told if one[0] > over - seconds]

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [one for told in pool.map(client, range(clients)) for one in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="kitchen", choices=list(PRESETS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, after a second of warming up")
    parser.add_argument("--rounds", type=int, default=1, help="of all measurements, one after the other")
    options = parser.parse_args()
    start_jax()
    policy = random_policy(options.preset)
    size, cameras, horizon = policy.config.vision.image_size, len(policy.processor.used_slots), policy.config.horizon
    device = jax.devices()[0].device_kind
    engines = {}
    for name, largest in (("batches", max(options.clients)), ("one call at a time", 1)):
        engines[name] = Engine(policy, largest, span_factor=1e9)
        engines[name].warm_up()
    print(f"{options.preset} on {device}: {cameras} cameras of {size} pixels, {policy.denoising_steps} denoising steps")
    kinds = [(name, 0) for name in engines] + [("batches, onwards", horizon // 2)]
    found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        for _ in range(options.rounds):
            for (name, left), count in [(kind, count) for count in options.clients for kind in kinds]:
                with Served(engines[name.partition(",")[0]]) as (port, server):
                    told = clients.submit(drive, port, count, options.seconds, size, cameras, left).result()
                batch = sum(size * n for size, n in server.batches.items()) / sum(server.batches.values())
                latencies = [latency for _, latency in told]
                p50, p90, p99 = np.percentile(latencies, [50, 90, 99])
                found.setdefault((name, count), []).append((len(told) / options.seconds, p50, p99, batch))
                print(
                    result_line(
                        f"serve/{options.preset}, {count} clients, {name}",
                        round(len(told) / options.seconds, 1),
                        "answers/s",
                        n=len(told),
                        p50_ms=round(float(p50), 2),
                        p90_ms=round(float(p90), 2),
                        p99_ms=round(float(p99), 2),
                        mean_batch=round(batch, 2),
                        device=device,
                    ),
                    flush=True,
                )
    print("\n| clients | | answers/s | p50 ms | p99 ms | mean batch |\n|---|---|---|---|---|---|")
    for (name, count), rows in found.items():
        rate, p50, p99, batch = np.median(rows, axis=0)
        print(f"| {count} | {name} | {rate:.0f} | {p50:.1f} | {p99:.1f} | {batch:.1f} |")


if __name__ == "__main__":
    main()
