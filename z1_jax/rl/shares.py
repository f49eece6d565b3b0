"""One iteration's rollouts over several processes: what all must know, and which process trains on which nodes.

The outcomes and the table of nodes are everyone's; frames, prefix caches and denoising chains stay where they were
made, and travel only for the few nodes of a batch that its other processes have more room for.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Int

from envs.base import Episode
from z1_jax import distributed, processes
from z1_jax.rl.actor import pad_rows
from z1_jax.rl.rollout import NodeTable, Rollouts, Share
from z1_jax.types import PrefixCache

_OWN = ("x",)  # columns of the node table that stay where they were made


def merged(local: Rollouts, groups: Sequence[int], waves: Sequence[int]) -> Rollouts:
    """The rollouts of all processes, in the order in which one process would have made them.

    `looks`, `caches` and `nodes.x` hold this process's alone, and `nodes.look` counts in its owner's.

    Args:
        local: of this process; groups: the number of each of its groups among all of them.
        waves: of every group of the run, its place in time.
    """
    if processes.count() == 1:
        return local
    lost = {groups[number]: why for number, why in local.lost.items()}
    groups = [group for group in groups if group not in lost]
    columns = {f.name: getattr(local.nodes, f.name) for f in dataclasses.fields(NodeTable) if f.name not in _OWN}
    columns["group"] = np.asarray(groups, int)[columns["group"]]
    outcome = {name: getattr(local, name) for name in ("success", "unstable", "chunks", "steps")}
    message = {
        "groups": list(groups),
        "lost": sorted(lost.items()),
        "first": local.first,
        "episodes": [episode.to_json() for episode in local.episodes],
        "nodes": {name: _packed(column) for name, column in columns.items()},
        **{name: _packed(column) for name, column in outcome.items()},
    }
    everyone = processes.exchange(message)
    table = {name: np.concatenate([_unpacked(one["nodes"][name]) for one in everyone]) for name in columns}
    sizes = [len(_unpacked(one["nodes"]["group"])) for one in everyone]
    owner = np.repeat(np.arange(len(everyone)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes])
    order = np.lexsort((table["leader"], table["group"], table["chunk"], np.asarray(waves)[table["group"]]))
    numbers = np.concatenate([one["groups"] for one in everyone])
    place = np.argsort(numbers)
    table["group"] = np.searchsorted(numbers[place], table["group"])  # without the lost ones
    told = [episode for one in everyone for episode in one["episodes"]]
    together: dict[str, Any] = {
        name: np.concatenate([_unpacked(one[name]) for one in everyone])[place] for name in outcome
    }
    return dataclasses.replace(
        local,
        episodes=tuple(Episode(**told[at]) for at in place),
        **together,
        nodes=NodeTable(x=local.nodes.x, **{name: column[order] for name, column in table.items()}),
        first=sum(one["first"] for one in everyone),
        lost={group: why for one in everyone for group, why in one["lost"]},
        share=Share(owner[order], row[order], processes.index(), processes.count()),
    )


def summed(metrics: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """The metrics with some of them added up over the processes, each of which tells its own."""
    everyone = processes.exchange({name: metrics[name] for name in names})
    return metrics | {name: sum(one[name] for one in everyone) for name in names}


def _packed(x: np.ndarray) -> list[Any]:
    return [x.dtype.str, list(x.shape), base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()]


def _unpacked(message: Sequence[Any]) -> np.ndarray:
    dtype, shape, data = message
    return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape)


def deal(rows: Int[np.ndarray, " n"], share: Share, room: int) -> list[np.ndarray]:
    """Which process trains on which nodes of a batch, at most `room` each: its own first, then what others cannot hold.

    Args:
        rows: node numbers; the processes have room for all of them together.
    """
    own = [rows[share.owner[rows] == part] for part in range(share.parts)]
    surplus = np.concatenate([some[room:] for some in own])
    dealt, at = [], 0
    for some in own:
        free = max(room - len(some), 0)
        dealt.append(np.concatenate([some[:room], surplus[at : at + free]]))
        at += min(free, len(surplus) - at)
    return dealt


def brought(rows: Int[np.ndarray, " n"], share: Share, room: int, own: Callable[..., Any]) -> tuple[Any, ...]:
    """This process's part of a batch; every process must call it.

    Args:
        rows: the nodes of the whole batch.
        own: node numbers of this process -> (frames or caches, chains) of these.

    Returns:
        The nodes [n] that this process trains on, the same padded to `room`, and their arrays [room, …] as of `own`.
    """
    mine = deal(rows, share, room)[share.part]
    here = mine[share.owner[mine] == share.part]
    some = here if len(here) else np.flatnonzero(share.owner == share.part)[:1]  # what is padding is never looked at
    sent = [rows[share.owner[rows] == part][room:] for part in range(share.parts)]
    most = max(map(len, sent))
    if not most:
        padded = pad_rows(some, room)
        return mine, padded, own(padded)
    quarter = -(-room // 4)
    size = -(-most // quarter) * quarter  # one of few: each is compiled once
    giving = sent[share.part] if len(sent[share.part]) else some
    came = distributed.gathered(_rows_first(own(pad_rows(giving[:most], size))))
    place = {node: part * size + at for part, nodes in enumerate(sent) for at, node in enumerate(nodes.tolist())}
    wanted = np.array([place[node] for node in mine[len(here) :].tolist()], int)
    numbers = mine if len(mine) else some
    kept = _rows_first(own(some))

    def joined(kept: np.ndarray, came: np.ndarray) -> np.ndarray:
        return pad_rows(np.concatenate([kept[: len(here)], came[wanted]]) if len(mine) else kept, room)

    return mine, pad_rows(numbers, room), _rows_first(jax.tree.map(joined, kept, came))


def _rows_first(tree: Any) -> Any:
    """(seen, chains) with caches [layers, B, …] turned to [B, layers, …], and back."""
    seen, chains = tree
    if isinstance(seen, PrefixCache):
        k, v = (cast(Any, np.moveaxis(np.asarray(x), 1, 0)) for x in (seen.k, seen.v))
        seen = PrefixCache(k, v, seen.mask)
    return seen, chains
