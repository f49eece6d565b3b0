"""python -m z1_jax.serve --checkpoint=PATH: serves a policy by openpi's websocket protocol (docs/serving.md)."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import ipaddress
import logging
import os
import pathlib
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax

from z1_jax import __version__
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.command_line import Parser
from z1_jax.errors import UserError
from z1_jax.policy import Policy, find_policy, load_policy
from z1_jax.process import run_main, start_jax
from z1_jax.rl.real_time import MAX_GUIDANCE
from z1_jax.run_dir import policy_identity
from z1_jax.serve import wire
from z1_jax.serve.engine import SPAN_FACTOR, Engine
from z1_jax.serve.inputs import OPTIONAL, TABLES, Inputs
from z1_jax.serve.remote import API_KEY
from z1_jax.serve.server import Limits, PolicyServer, place
from z1_jax.sharding import make_mesh


def main(argv: Sequence[str]) -> None:
    """Serves until SIGINT or SIGTERM."""
    options = parse(argv[1:])
    for name in ("msgpack", "websockets.asyncio.server"):
        wire.package(name)
    key = _api_key(options.api_key_file)
    logging.basicConfig(format="%(message)s")
    alone = _check_address(options.host, options.port)
    start_jax()
    policy = _policy(options.checkpoint, options.steps)
    inputs = Inputs(options.inputs, policy.processor.cameras, policy.processor.stats["state"].dim, options.prompt)
    about = metadata(policy, options, inputs, policy_identity(options.checkpoint))
    engine = Engine(policy, options.batch, span_factor=options.span_factor, max_guidance=options.max_guidance)
    del policy
    began = time.perf_counter()
    engine.warm_up()
    print(f"compiled in {time.perf_counter() - began:.1f} s; {_told(about, inputs)}", flush=True)
    if not alone and not key:
        print(f"warning: whoever reaches {options.host} can use this policy: no API key is set ({API_KEY})", flush=True)
    server = PolicyServer(engine, inputs, about, limits=_limits(options), api_key=key, seed=options.seed)
    try:
        server.run_until_signal(options.host, options.port)
    except OSError as error:
        raise _taken(options.host, options.port, error) from error
    print(f"stopped: {server.answered} answered, {server.refused} refused", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the options. Raises ConfigError."""
    limits = Limits()
    parser = Parser(prog="python -m z1_jax.serve", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run directory, its PATH@best, or a checkpoint")
    add("--host", default="127.0.0.1", help="this machine alone; 0.0.0.0: everybody who reaches it")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--inputs", default="z1", choices=list(TABLES), help="what the clients call things (docs/serving.md)")
    add("--prompt", default="", help="the instruction of observations that have none")
    add("--steps", type=int, default=0, help="denoising steps; 0: the policy's own")
    add("--seed", type=int, default=0, help="of the noise of requests without noise_seed")
    add("--batch", type=int, default=16, help="most requests that are decided at once")
    add("--span-factor", type=float, default=SPAN_FACTOR, help="actions are refused that lie more than so many spans"
        " beyond the statistics' 1 %% … 99 %%")  # fmt: skip
    add("--max-guidance", type=float, default=MAX_GUIDANCE, help="largest weight of real-time chunking's guidance")
    add("--deadline-ms", type=float, default=0.0, help="observations older than this are refused; 0: none")
    add("--max-message-mb", type=float, default=limits.message_bytes / (1 << 20), help="of one observation")
    add("--max-connections", type=int, default=limits.connections, help="clients at once")
    add("--max-queue", type=int, default=limits.queue, help="requests that wait at once")
    add("--api-key-file", default="", metavar="FILE", help=f"holds the key that clients must present; or set {API_KEY}")
    given = parser.parse_args(list(arguments))
    for option, lowest, highest in (
        ("port", 0, 65535),
        ("steps", 0, 1000),
        ("seed", 0, 2**31 - 1),
        ("batch", 1, 1024),
        ("span_factor", 0.0, float("inf")),
        ("max_guidance", 0.0, 1e6),
        ("deadline_ms", 0.0, 1e7),
        ("max_message_mb", 0.01, 1024.0),
        ("max_connections", 1, 10_000),
        ("max_queue", 1, 10_000),
    ):
        if not lowest <= getattr(given, option) <= highest:
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: got {getattr(given, option)}, expected {lowest} to {highest}")
    return given


def metadata(policy: Policy, options: argparse.Namespace, inputs: Inputs, identity: str) -> dict[str, Any]:
    """What a client receives when it connects: how the policy wants to be driven, and how it was trained."""
    return {
        "server": f"z1-jax {__version__}",
        "policy": identity,
        "checkpoint": os.path.basename(os.path.abspath(options.checkpoint)),
        "inputs": inputs.table.name,
        "keys": inputs.keys,
        "optional_keys": list(OPTIONAL),
        "cameras": inputs.cameras,
        "horizon": policy.config.horizon,
        "executed": policy.executed,
        "denoising_steps": policy.denoising_steps,
        "widths": {name: stats.dim for name, stats in policy.processor.stats.items()},
        "deadline_ms": options.deadline_ms,
        "largest_batch": options.batch,
        "device": jax.devices()[0].device_kind,
        "document": policy.document(),
    }


def _policy(path: str, steps: int) -> Policy:
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    try:
        policy = load_policy(checkpoints, step, make_mesh(devices=jax.devices()[:1]))
    finally:
        checkpoints.close()
    return dataclasses.replace(policy, denoising_steps=steps or policy.denoising_steps)


def _check_address(host: str, port: int) -> bool:
    """Raises UserError where nobody can listen, before anything is loaded or compiled.

    Returns:
        Whether this machine alone reaches it, by IPv4 or IPv6.
    """
    failures: list[OSError] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _taken(host, port, error) from error
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                tried.bind(address)
        except OSError as error:
            failures.append(error)
    # A name may have an address of a family that this machine has not.
    if failures and (len(failures) == len(addresses) or any(error.errno == errno.EADDRINUSE for error in failures)):
        raise _taken(host, port, failures[-1]) from failures[-1]
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in addresses)


def _taken(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"cannot serve at {place(host, port)} ({error.strerror}); choose others")


def _api_key(path: str) -> str:
    """The key that clients must present; empty: none.

    Raises:
        UserError: the file is absent or empty.
    """
    if not path:
        return os.environ.get(API_KEY, "")
    try:
        key = pathlib.Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"argument --api-key-file: {path} cannot be read ({error})") from error
    if not key:
        raise UserError(f"argument --api-key-file: {path} is empty, expected a key")
    return key


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(
        message_bytes=int(options.max_message_mb * (1 << 20)),
        connections=options.max_connections,
        queue=options.max_queue,
        deadline_s=options.deadline_ms / 1000,
    )


def _told(about: dict[str, Any], inputs: Inputs) -> str:
    unseen = f"; not seen by this policy: {', '.join(inputs.unseen)}" * bool(inputs.unseen)
    return (
        f"an observation has {', '.join(inputs.keys)}; an answer {about['horizon']} steps, of which the policy was "
        f"trained to run {about['executed']}{unseen}"
    )


if __name__ == "__main__":
    run_main(main)
