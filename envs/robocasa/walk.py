"""Finds the state that a simulation keeps beside MuJoCo's: every attribute and model field that changes as it steps.

`python -m envs.robocasa.walk TASK` lists what changes, and which of it a snapshot does not restore. Each version of
RoboCasa and robosuite adds state; run it after an update, before a rollout diverges.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from envs.base import Episode
from envs.robocasa.state import same

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_OPAQUE = (mujoco.MjData, type(sys), type)  # MjData has a state of its own: `state.PHYSICS`


def fingerprints(root: Any, name: str = "env", depth: int = 12) -> dict[str, Any]:
    """Every plain value that can be reached from an object through attributes, dictionaries and sequences.

    Returns:
        path → the value, or a hash of it where it is an array or a random generator's state. Each object is visited
        once, by its shortest path; functions and closures are not entered.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    queue: deque[tuple[str, Any, int]] = deque([(name, root, 0)])
    while queue:
        path, value, level = queue.popleft()
        if isinstance(value, _PLAIN):
            found[path] = value
        elif isinstance(value, np.ndarray):
            found[path] = _hash(value)
        elif isinstance(value, np.random.Generator):
            found[path] = repr(value.bit_generator.state)
        elif isinstance(value, _OPAQUE) or id(value) in seen or level == depth:
            continue
        else:
            seen.add(id(value))
            queue.extend((path + step, child, level + 1) for step, child in _children(value))
    return found


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in list(value.items())]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{i}]", child) for i, child in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [(".members", repr(sorted(map(repr, value))))]
    if isinstance(value, mujoco.MjModel):
        fields = ((name, getattr(value, name, None)) for name in dir(value) if not name.startswith("_"))
        return [(f".{name}", field) for name, field in fields if isinstance(field, np.ndarray)]
    module = type(value).__module__.partition(".")[0]
    if module in ("robocasa", "robosuite") and hasattr(value, "__dict__"):
        return [(f".{key}", child) for key, child in list(vars(value).items())]
    return []


def _hash(array: np.ndarray) -> str:
    content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(content).hexdigest()[:12]}"


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Paths whose value differs, or that only one of the two has. NaN equals NaN."""
    return sorted(path for path in {*before, *after} if not same(before.get(path, _ABSENT), after.get(path, _ABSENT)))


_ABSENT = object()


def main(arguments: list[str] | None = None) -> None:
    from envs.robocasa import make

    parser = argparse.ArgumentParser(prog="python -m envs.robocasa.walk", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", help="a RoboCasa task, e.g. OpenDrawer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="random control steps (%(default)s)")
    parser.add_argument("--standins", action="store_true", help="without the downloaded assets")
    given = parser.parse_args(arguments)
    for name in ("seed", "steps"):
        if getattr(given, name) < 0:
            sys.exit(f"error: --{name} {getattr(given, name)}: expected 0 or more")
    try:
        env = make(given.task, standins=given.standins)
        env.episode_of(given.seed)  # imports RoboCasa, for which stand-ins may have to be written
    except ValueError as error:
        sys.exit(f"error: {error}")
    env.reset(Episode(given.seed))
    start = fingerprints(env.raw)
    snapshot = env.snapshot()
    env.step_chunk(np.random.default_rng(given.seed).uniform(-1, 1, (given.steps, env.spec.action_dim)))
    moved = changed(start, fingerprints(env.raw))
    env.restore(snapshot)
    lost = set(changed(start, fingerprints(env.raw)))
    for path in moved:
        print(f"{'LOST' if path in lost else 'kept'}  {path}")
    print(f"{len(moved)} of {len(start)} values changed, {len(lost)} are not brought back by a snapshot")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
