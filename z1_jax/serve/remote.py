"""A client of openpi's protocol: a policy behind an address is evaluated as a local one is.

An address is ws://HOST:PORT, or wss://. Servers of other projects do not say which keys they take, nor which policy
they serve; ws://HOST:PORT?inputs=TABLE&policy=NAME says it for them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import queue
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from z1_jax.errors import UserError, first_line
from z1_jax.rl.flow import Chain
from z1_jax.serve import wire
from z1_jax.serve.inputs import Inputs

API_KEY = "Z1_API_KEY"  # environment variable: on the command line everybody on the machine would see the key
CONNECTIONS = 16  # at most, and never more than the server's largest batch
TIMEOUT_S = 600.0  # of one answer: the first may compile


def is_address(path: str) -> bool:
    """Whether a policy's path is the address of a server."""
    return path.startswith(("ws://", "wss://"))


@functools.cache
def metadata(address: str) -> dict[str, Any]:
    """The server's first message.

    Raises:
        UserError: no server answers at the address, or it does not speak this protocol.
    """
    with _connected(address) as connection:
        return connection.told


def document(address: str) -> dict[str, Any]:
    """The document that a checkpoint of ours has; empty for policies of other projects."""
    return dict(metadata(address).get("document", {}))


def identity(address: str) -> str:
    """What distinguishes the policy at an address: the identity that the server tells, or else the address's `policy`.

    If neither is there, the identity does not depend on the policy, and two policies cannot be told apart.

    Raises:
        UserError: the address names a policy although the server does.
    """
    told, named = metadata(address), _options(address).get("policy", "")
    if own := told.get("policy"):
        if named:
            raise UserError(f"{address}: the server says which policy it serves ({own}); leave policy={named} away")
        return str(own)
    return hashlib.sha256(wire.pack([told, named] if named else told)).hexdigest()[:12]


def is_unknown(address: str) -> bool:
    """Whether neither server nor address say which policy is served."""
    return not (metadata(address).get("policy") or _options(address).get("policy"))


def name(address: str) -> str:
    """The address without its options."""
    return urllib.parse.urlsplit(address)._replace(query="").geturl()


def label(address: str) -> str:
    """The policy behind an address in words."""
    if named := _options(address).get("policy"):
        return f"{named} at {name(address)}"
    return name(address) + " (which policy: not told)" * is_unknown(address)


def _options(address: str) -> dict[str, str]:
    """The options behind the question mark of an address.

    Raises:
        UserError: an option is not known, or is empty.
    """
    found = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).query, keep_blank_values=True))
    if unknown := sorted(set(found) - {"inputs", "policy"}):
        raise UserError(
            f"{address}: option {unknown[0]!r} is not known, expected ?inputs=TABLE, ?policy=NAME, or "
            "?inputs=TABLE&policy=NAME"
        )
    if empty := [option for option, value in found.items() if not value.strip()]:
        raise UserError(f"{address}: option {empty[0]!r} is empty, expected a name")
    return found


class ServedPolicy:
    """Takes the place of a policy, its processor and its actor in an evaluation: sends observations, receives actions.

    Attributes:
        executed: E, steps of each answer that the environment runs.
        facts: what the evaluation's protocol records about it.
    """

    def __init__(self, address: str, cameras: Sequence[str | None], widths: Mapping[str, int], executed: int):
        """Args:
        cameras: of the environments, in the order of the slots; used if the server does not name its policy's.
        widths: of the environments' "state" and "actions".
        executed: 0: as many as the policy was trained to run, if the server says so.

        Raises:
            UserError: no server answers, it does not say what is needed, or its policy is of another robot.
        """
        told, known = metadata(address), document(address)
        self.address, self._action_dim = address, widths["actions"]
        self._inputs = Inputs(inputs_name(address), known.get("cameras", cameras), widths["state"])
        self._repeats = "noise_seed" in told.get("optional_keys", ())
        self.executed = executed or int(told.get("executed", 0))
        if not self.executed:
            raise UserError(
                f"config key env.executed: {name(address)} does not say how many steps of an answer are to be run; "
                "set it"
            )
        if is_unknown(address):
            print(
                f"{name(address)} does not say which policy it serves: after a restart with another one, results of "
                f"both would be taken for one policy's; name it, as in --policy='{name(address)}?policy=pi05_libero'",
                flush=True,
            )
        if not self._repeats:
            print(f"{name(address)} takes no noise_seed: another evaluation of it will draw other noise", flush=True)
        self._most = min(CONNECTIONS, int(told.get("largest_batch", 1)))
        self._idle: queue.SimpleQueue[_Connection] = queue.SimpleQueue()
        self._stack = contextlib.ExitStack()
        self._threads = concurrent.futures.ThreadPoolExecutor(self._most)
        for _ in range(self._most):
            self._idle.put(self._stack.enter_context(_connected(address)))
        self.facts: dict[str, Any] = {
            "server": told.get("server", "not told"),
            "served_policy": told.get("policy") or _options(address).get("policy", "not told"),
            "predicted_steps_per_chunk": told.get("horizon", "not told"),
            "executed_steps_per_chunk": self.executed,
            "denoising_steps": told.get("denoising_steps", "not told"),
            "inputs": self._inputs.table.name,
            "slots": list(known.get("cameras", cameras)),
            "widths": dict(widths),
            "noise": "noise_seed" if self._repeats else "the server's own",
        }

    @property
    def processor(self) -> ServedPolicy:
        """Itself: normalisation and tokenizer are the server's."""
        return self

    def observation(self, raw: Sequence[Any]) -> Shaped[np.ndarray, " B"]:
        """A message for each observation [B], without options."""
        looks = np.empty(len(raw), object)
        looks[:] = [self._inputs.write(observation) for observation in raw]
        return looks

    def env_actions(
        self, actions: Float[np.ndarray, "*N H A"], states: Float[np.ndarray, "*N D"] | None = None
    ) -> np.ndarray:
        """Answers are in the environment's units."""
        return actions.astype(np.float32)

    def encode(self, params: Any, looks: Shaped[np.ndarray, " B"]) -> tuple[np.ndarray, int]:
        """Nothing is encoded here."""
        return looks, len(looks)

    def sample(
        self,
        params: Any,
        looks: Shaped[np.ndarray, " B"],
        ids: Int[np.ndarray, "B 1 I"],
        noise_key: tuple[int, ...],
        stochastic: bool,
        noise_level: float | None = None,
    ) -> Chain:
        """The server's actions in the form of `Actor.sample`; the denoising steps before the last are not known.

        Raises:
            UserError: the server refused an observation, went away, or answered something else than actions.
        """
        if stochastic or ids.shape[1] != 1:
            raise ValueError("a served policy draws one chunk for each observation, without noise on the way")
        keys = [[*noise_key, *map(int, sample)] for sample in ids[:, 0]]
        options = [{"noise_seed": key} if self._repeats else {} for key in keys]
        answers = list(self._threads.map(self._asked, [{**look, **o} for look, o in zip(looks, options, strict=True)]))
        if len({answer.shape for answer in answers}) > 1:
            raise UserError(f"{name(self.address)} answered with chunks of several lengths; expected one")
        count = len(answers)
        chain: Any = (np.stack(answers)[:, None, None], np.zeros((count, 1, 1), bool), np.zeros((count, 1), np.float32))
        return Chain(*chain)

    def finish(self, params: Any) -> None:
        """The decisions of several processes do not wait for one another: the server makes them."""

    def close(self) -> None:
        """Ends the connections."""
        self._threads.shutdown()
        self._stack.close()

    def _asked(self, message: Mapping[str, Any]) -> np.ndarray:
        connection = self._idle.get()
        try:
            actions: Any = connection.ask(message).get("actions")
        finally:
            self._idle.put(connection)
        good = isinstance(actions, np.ndarray) and actions.ndim == 2 and actions.shape[1] == self._action_dim
        if not good or len(actions) < self.executed:
            raise UserError(
                f"{name(self.address)} answered actions of shape {list(np.shape(actions))}; expected at least "
                f"{self.executed} steps (env.executed) of the environments' width {self._action_dim}"
            )
        return actions


def inputs_name(address: str) -> str:
    """The table of keys that the server takes: as the address says, or else the server.

    Raises:
        UserError: neither says so.
    """
    found = _options(address).get("inputs") or metadata(address).get("inputs")
    if not found:
        raise UserError(
            f"{name(address)} does not say what it calls things: give it, as in --policy={name(address)}?inputs=libero"
        )
    return str(found)


class _Connection:
    """One connection and what the server said on it."""

    def __init__(self, address: str, socket: Any, told: dict[str, Any]):
        self._address, self._socket, self.told = address, socket, told

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        with _told_of(self._address):
            self._socket.send(wire.pack(dict(message)))
            reply = self._socket.recv(TIMEOUT_S)
        if isinstance(reply, str):
            raise UserError(f"{name(self._address)} refused an observation: {reply.strip().splitlines()[-1]}")
        return _dict(self._address, reply)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[_Connection]:
    connect = wire.package("websockets.sync.client").connect
    key = os.environ.get(API_KEY, "")
    headers = {"Authorization": f"Api-Key {key}"} if key else None
    with contextlib.ExitStack() as stack:
        with _told_of(address):
            # No pings: openpi's server computes in its only thread and answers none meanwhile.
            options = {"compression": None, "max_size": None, "ping_interval": None, "additional_headers": headers}
            socket = stack.enter_context(connect(name(address), **options))
            first = socket.recv(TIMEOUT_S)
        yield _Connection(address, socket, _dict(address, first))


def _dict(address: str, message: bytes | str) -> dict[str, Any]:
    try:
        value = wire.unpack(message)
    except wire.MessageError as error:
        raise UserError(f"{name(address)} does not speak openpi's protocol: its message {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name(address)} does not speak openpi's protocol: it sent a {type(value).__name__}")
    return value


@contextlib.contextmanager
def _told_of(address: str) -> Iterator[None]:
    """Turns the library's errors into a UserError of one line."""
    errors = wire.package("websockets.exceptions")
    try:
        yield
    except errors.InvalidStatus as error:
        said = (error.response.body or b"").decode(errors="replace").strip()
        raise UserError(
            f"{name(address)} turned this client away (HTTP {error.response.status_code}: {said}); a key is taken from "
            f"the environment variable {API_KEY}"
        ) from None
    except (errors.WebSocketException, OSError, TimeoutError) as error:
        raise UserError(
            f"no answer from the policy at {name(address)} ({type(error).__name__}: {first_line(error)}); what is "
            "finished is kept: start its server, and the same command continues"
        ) from None
