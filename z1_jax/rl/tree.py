"""Who shares which chunk: branch plans and the members of each node. Pure NumPy; no environment, no policy.

A group's G members follow one leader until they branch. A cluster is a run of consecutive members that still share
everything; its first member leads it. A node is one chunk taken by one cluster.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from z1_jax.rl.schedules import scheduled

BRANCHING = ("none", "prefix", "tree")


@dataclasses.dataclass(frozen=True)
class BranchPlan:
    """When the clusters of a group split.

    Attributes:
        group_size: G, members of a group.
        points: chunk indices, ascending; at points[i] every cluster splits into `fanout[i]` equal parts.
        fanout: parts that a cluster splits into, one per branch point.
    """

    group_size: int
    points: tuple[int, ...]
    fanout: tuple[int, ...]

    def cluster_size(self, chunk: int) -> int:
        """Members that share a node at `chunk`."""
        size = self.group_size
        for point, parts in zip(self.points, self.fanout, strict=True):
            size //= parts if chunk >= point else 1
        return size

    def leaders(self, chunk: int) -> np.ndarray:
        """First member of each cluster at `chunk`, ascending."""
        return np.arange(0, self.group_size, self.cluster_size(chunk))

    def split(self, chunk: int) -> int:
        """Nodes at `chunk` that look at one observation: 1 where nothing branches."""
        before = self.group_size if chunk == 0 else self.cluster_size(chunk - 1)
        return before // self.cluster_size(chunk)

    def most_looks(self, chunks: int) -> int:
        """Observations that a group of this plan makes at most, in episodes of `chunks` chunks."""
        before = (self.group_size if c == 0 else self.cluster_size(c - 1) for c in range(chunks))
        return sum(self.group_size // size for size in before)

    def trainable(self, chunk: int) -> bool:
        """False while the whole group shares the chunk: no comparison can credit it (method: section 4)."""
        return self.group_size == 1 or self.cluster_size(chunk) < self.group_size


def branch_plan(branching: str, group_size: int, prefix_chunks: int) -> BranchPlan:
    """The plan of a group.

    `none`: G separate rollouts from one start state. `prefix`: one leader runs chunks [0, P), then all separate.
    `tree`: G = 2^k; at b_ℓ = ⌊P / 2^(k−ℓ)⌋, ℓ = 1…k, every cluster splits in two (method: section 4).

    Raises:
        ValueError: unknown branching, G below 2, a negative P, or a tree whose G is no power of two.
    """
    if branching not in BRANCHING:
        raise ValueError(f"branching: got {branching!r}, expected one of {', '.join(BRANCHING)}")
    if group_size < 2:
        raise ValueError(f"group size: got {group_size}, expected at least 2 members to compare")
    if prefix_chunks < 0:
        raise ValueError(f"prefix_chunks: got {prefix_chunks}, expected 0 or more chunks")
    if branching == "none":
        return BranchPlan(group_size, (0,), (group_size,))
    if branching == "prefix":
        return BranchPlan(group_size, (prefix_chunks,), (group_size,))
    depth = group_size.bit_length() - 1
    if 2**depth != group_size:
        raise ValueError(f"group size: got {group_size} with branching=tree, expected a power of two (2, 4, 8, 16…)")
    points = tuple(prefix_chunks // 2 ** (depth - level) for level in range(1, depth + 1))
    return BranchPlan(group_size, points, (2,) * depth)


def prefix_schedule(start: int, end: int, iteration: int, iterations: int, kind: str = "linear") -> int:
    """P of an iteration: from `start` at the first to `end` at the last, as `scheduled`, rounded to whole chunks."""
    return int(round(scheduled(kind, start, end, iteration, iterations)))


def signed_advantage_sums(
    advantages: Float[np.ndarray, "groups G"],
    group: Int[np.ndarray, " nodes"],
    leader: Int[np.ndarray, " nodes"],
    size: Int[np.ndarray, " nodes"],
) -> tuple[np.ndarray, np.ndarray]:
    """A⁺ = Σ max(A_i, 0) and A⁻ = Σ min(A_i, 0) over the members of each node.

    Args:
        advantages: [groups, G].
        group, leader, size: [nodes]; a node's members are leader … leader + size − 1 of its group.
    """
    members = np.arange(advantages.shape[1])
    inside = (members >= leader[:, None]) & (members < (leader + size)[:, None])
    of_node = advantages[group]
    positive = np.where(inside, np.maximum(of_node, 0.0), 0.0).sum(axis=1)
    negative = np.where(inside, np.minimum(of_node, 0.0), 0.0).sum(axis=1)
    return positive.astype(np.float32), negative.astype(np.float32)
