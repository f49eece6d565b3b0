"""Where a policy meets its environments: lockstep chunks over groups of rollouts that share prefixes and branch.

Evaluation is the same walk with groups of one member and the ODE sampler.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from envs.base import Episode, Pool
from z1_jax.data.transforms import InputProcessor
from z1_jax.errors import UserError
from z1_jax.rl.actor import Acted, Actor, act, stack_ids
from z1_jax.rl.prefix_cache import AnyStore
from z1_jax.rl.tree import BranchPlan
from z1_jax.types import Observation


class BrokenIteration(UserError):
    """Numbers that cannot be trained on. `evidence` holds the arrays that show it."""

    def __init__(self, message: str, evidence: Mapping[str, np.ndarray] | None = None):
        super().__init__(message)
        self.evidence = dict(evidence or {})


@dataclasses.dataclass(frozen=True)
class NodeTable:
    """The chunks that were taken, each once. N nodes; a node's members are leader … leader + size − 1 of its group."""

    group: np.ndarray  # int [N]
    chunk: np.ndarray  # int [N], index within the episode
    leader: np.ndarray  # int [N]
    size: np.ndarray  # int [N], members that share the chunk
    look: np.ndarray  # int [N], row of the observation that it was decided on
    trainable: np.ndarray  # bool [N], false in the part that the whole group shares
    steps: np.ndarray  # int [N], control steps executed
    x: np.ndarray  # float32 [N, K + 1, H, A], the denoising chain
    stochastic: np.ndarray  # bool [N, K]
    logp: np.ndarray  # float32 [N], under the policy that acted


@dataclasses.dataclass(frozen=True)
class Share:
    """Of N nodes, which of several processes made each: `part` of `parts` is this one."""

    owner: np.ndarray  # int [N]
    row: np.ndarray  # int [N], in the owner's own table
    part: int
    parts: int


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What one call of `collect` brought home. g groups of G members, O observations."""

    episodes: tuple[Episode, ...]  # [g]
    success: np.ndarray  # bool [g, G]
    unstable: np.ndarray  # bool [g, G], the simulation broke down: a failure
    chunks: np.ndarray  # int [g, G], executed until success or the end
    steps: np.ndarray  # int [g, G], control steps of each member's episode, shared ones included
    nodes: NodeTable
    looks: Observation  # NumPy, [O, …]: each observation once
    caches: AnyStore | None  # prefix caches by look, where they were kept
    seconds: dict[str, float]  # sample, simulate, render
    share: Share | None = None  # where several processes made them; see `shares`

    @property
    def seeds(self) -> np.ndarray:
        """int [g], of the episodes."""
        return np.array([episode.seed for episode in self.episodes])

    @property
    def simulated_steps(self) -> int:
        """Control steps that were simulated; shared ones count once."""
        return int(self.nodes.steps.sum())


def collect(
    pool: Pool,
    actor: Actor,
    params: tuple[Any, Any],
    processor: InputProcessor,
    plan: BranchPlan,
    episodes: Sequence[Episode],
    noise_key: tuple[int, ...],
    *,
    executed: int,
    stochastic: bool = True,
    noise_level: float | None = None,
    store: AnyStore | None = None,
    again: Callable[[Outcome], Sequence[Episode]] | None = None,
) -> Rollouts:
    """Rolls out one group per episode, `pool.num_envs // G` groups at a time.

    Args:
        episodes: [g]; every member of a group starts from its episode's state. The noise of a group follows from the
            seed of its episode.
        noise_key: of the sampler's noise.
        executed: E, steps of each predicted chunk that the environment runs.
        noise_level: of the stochastic sampler; default: the actor's own.
        store: emptied, then filled with the prefix cache of every observation, for an update with a frozen VLM.
        again: asked, when all groups are home, for the episodes of further ones, until it gives none.

    Raises:
        BrokenIteration: the policy drew a number that is not finite; it reaches no environment.
    """
    at_once = pool.num_envs // plan.group_size
    if at_once == 0:
        raise ValueError(f"the pool has {pool.num_envs} environments, expected at least group size {plan.group_size}")
    pool.take_times()
    if store is not None:
        store.clear()
    decide = _Sampling(noise_key, stochastic, noise_level, store)
    walks: list[_Walk] = []
    done, wanted = 0, list(episodes)
    while done < len(wanted):
        wave = wanted[done : done + at_once]
        walk = _Walk(pool, actor, params, processor, plan, wave, decide, done)
        walk.run(executed)
        walks.append(walk)
        done += len(wave)
        if again is not None and done == len(wanted):
            wanted += again(_outcome(walks, wanted))
    return _join(walks, wanted, pool.take_times(), store)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of g groups of G members."""

    episodes: tuple[Episode, ...]  # [g]
    success: np.ndarray  # bool [g, G]
    chunks: np.ndarray  # int [g, G], executed until success or the end


def _outcome(walks: list[_Walk], episodes: Sequence[Episode]) -> Outcome:
    success, chunks = (np.concatenate([getattr(walk, name) for walk in walks]) for name in ("success", "chunks"))
    return Outcome(tuple(episodes), success, chunks)


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """How chunks are decided: `collect`'s arguments of these names."""

    noise_key: tuple[int, ...]
    stochastic: bool
    noise_level: float | None
    store: AnyStore | None


class _Walk:
    """One lockstep pass over as many groups as the pool holds."""

    def __init__(
        self,
        pool: Pool,
        actor: Actor,
        params: tuple[Any, Any],
        processor: InputProcessor,
        plan: BranchPlan,
        episodes: Sequence[Episode],
        sampling: _Sampling,
        first_group: int,
    ):
        self.pool, self.actor, self.params, self.processor = pool, actor, params, processor
        self.plan, self.episodes, self.sampling, self.first_group = plan, episodes, sampling, first_group
        self.seeds = np.array([episode.seed for episode in episodes])
        shape = (len(episodes), plan.group_size)
        self.success = np.zeros(shape, bool)
        self.unstable = np.zeros(shape, bool)
        self.chunks = np.zeros(shape, int)
        self.steps = np.zeros(shape, int)
        self.nodes: list[dict[str, np.ndarray]] = []
        self.looks: list[Observation] = []
        self.look_count = 0
        self.sample_s = 0.0

    def run(self, executed: int) -> None:
        groups, members = np.arange(len(self.seeds)), np.zeros(len(self.seeds), int)  # the clusters' leaders
        observations: list[Any] = self.pool.reset(self._slots(groups, members).tolist(), self.episodes)
        chunk = 0
        while observations:
            cluster = self.plan.cluster_size(chunk)
            children = members[:, None] + cluster * np.arange(self.plan.split(chunk))  # [n, M]
            acted = self._decide(observations, groups, children, chunk, executed)
            slots = self._slots(groups[:, None], children)
            if children.shape[1] > 1:
                self._part(slots, groups, chunk)
            actions = acted.actions.reshape(-1, *acted.actions.shape[2:])
            results, following = self.pool.step(slots.ravel().tolist(), actions)
            self._record(groups, children, chunk, cluster, acted.chain, results)
            alive = [i for i, result in enumerate(results) if not result.done]
            groups, members = np.repeat(groups, children.shape[1])[alive], children.ravel()[alive]
            observations = [following[i] for i in alive]
            chunk += 1

    def _part(self, slots: np.ndarray, groups: np.ndarray, chunk: int) -> None:
        """Brings the members that part here to where their leader is: slots [n, M], the leader's first."""
        others, times = slots[:, 1:].ravel().tolist(), slots.shape[1] - 1
        if chunk == 0 and not self.pool.spec.copies:  # where an episode began it can be begun again
            self.pool.reset(others, [self.episodes[group] for group in np.repeat(groups, times)])
        else:
            self.pool.branch(np.repeat(slots[:, 0], times).tolist(), others)

    def _slots(self, groups: np.ndarray, members: np.ndarray) -> np.ndarray:
        """Environment slots, turned by one from group to group: the pool deals slots round-robin to its workers, and
        leaders (members 0, 4, 2, 6 …) would otherwise all live on one worker."""
        size = self.plan.group_size
        return groups * size + (members + groups) % size

    def _decide(
        self, observations: list[Any], groups: np.ndarray, children: np.ndarray, chunk: int, executed: int
    ) -> Acted:
        """One look per observation, one chain per child: the VLM runs once however many members part here."""
        began = time.perf_counter()
        how = self.sampling
        acted = act(
            self.actor,
            self.params,
            self.processor,
            observations,
            stack_ids(self.seeds[groups][:, None], chunk, children),
            how.noise_key,
            executed=executed,
            stochastic=how.stochastic,
            noise_level=how.noise_level,
        )
        if how.store is not None:
            how.store.add(acted.cache, len(observations))
        self.sample_s += time.perf_counter() - began
        self.looks.append(acted.looks)
        chain = acted.chain
        if not np.isfinite(chain.x).all() or not np.isfinite(chain.logp).all():
            raise BrokenIteration(
                f"the policy drew numbers that are not finite at chunk {chunk}",
                {"group": groups + self.first_group, "member": children, "x": chain.x, "logp": chain.logp},
            )
        return acted

    def _record(
        self, groups: np.ndarray, children: np.ndarray, chunk: int, cluster: int, chain: Any, results: list[Any]
    ) -> None:
        looks, split = children.shape
        flat_groups, leaders = np.repeat(groups, split), children.ravel()
        steps = np.array([result.steps for result in results])
        self.nodes.append(
            {
                "group": flat_groups + self.first_group,
                "chunk": np.full(looks * split, chunk),
                "leader": leaders,
                "size": np.full(looks * split, cluster),
                "look": np.repeat(np.arange(looks) + self.look_count, split),
                "trainable": np.full(looks * split, self.plan.trainable(chunk)),
                "steps": steps,
                "x": chain.x.reshape(-1, *chain.x.shape[2:]),
                "stochastic": chain.stochastic.reshape(looks * split, -1),
                "logp": chain.logp.ravel(),
            }
        )
        self.look_count += looks
        for group, leader, result in zip(flat_groups, leaders, results, strict=True):
            members = slice(leader, leader + cluster)
            self.success[group, members] = result.success
            self.unstable[group, members] = result.unstable
            self.chunks[group, members] = chunk + 1
            self.steps[group, members] += result.steps


def _join(walks: list[_Walk], episodes: Sequence[Episode], times: dict[str, float], store: AnyStore | None) -> Rollouts:
    offsets = np.cumsum([0] + [walk.look_count for walk in walks[:-1]])
    tables = [
        {**part, "look": part["look"] + offset}
        for walk, offset in zip(walks, offsets, strict=True)
        for part in walk.nodes
    ]
    nodes = NodeTable(**{name: np.concatenate([table[name] for table in tables]) for name in tables[0]})
    looks = [look for walk in walks for look in walk.looks]
    return Rollouts(
        episodes=tuple(episodes),
        success=np.concatenate([walk.success for walk in walks]),
        unstable=np.concatenate([walk.unstable for walk in walks]),
        chunks=np.concatenate([walk.chunks for walk in walks]),
        steps=np.concatenate([walk.steps for walk in walks]),
        nodes=nodes,
        looks=jax.tree.map(lambda *xs: np.concatenate(xs), *looks),
        caches=store,
        seconds={
            "sample": sum(walk.sample_s for walk in walks),
            "simulate": times["simulate"],
            "render": times["render"],
        },
    )
