"""Where a policy meets its environments: lockstep chunks over groups of rollouts that share prefixes and branch.

Evaluation is the same walk with groups of one member and the ODE sampler.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from envs.base import Episode, Pool, SlotsLost
from z1_jax.data.transforms import InputProcessor
from z1_jax.errors import UserError
from z1_jax.rl.actor import Acted, Actor, act, stack_ids
from z1_jax.rl.lost import Lost, TooManyLost
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
    seconds: dict[str, float]  # sample; simulate and render, as far as they were waited for; hidden, the rest of these
    first: int  # groups of the episodes that were asked for at first; which came after follows from what came of them
    lost: Mapping[int, str] = dataclasses.field(default_factory=dict)  # dropped groups, by number as drawn, and why
    share: Share | None = None  # where several processes made them; see `shares`

    @property
    def drawn(self) -> int:
        """Groups that were begun."""
        return len(self.episodes) + len(self.lost)

    @property
    def seeds(self) -> np.ndarray:
        """int [g], of the episodes."""
        return np.array([episode.seed for episode in self.episodes])

    @property
    def simulated_steps(self) -> int:
        """Control steps that were simulated; shared ones count once."""
        return int(self.nodes.steps.sum())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of g groups of G members, in the order in which they were drawn. One that was lost has no success."""

    episodes: tuple[Episode, ...]  # [g]
    success: np.ndarray  # bool [g, G]
    unstable: np.ndarray  # bool [g, G]
    chunks: np.ndarray  # int [g, G], executed until success or the end
    steps: np.ndarray  # int [g, G], control steps
    lost: Mapping[int, str]  # groups, and why


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
    overlap: bool = False,
    before: tuple[int, int] = (0, 0),
) -> Rollouts:
    """Rolls out one group per episode, `pool.num_envs // G` groups at a time.

    A group is dropped whole where the environment of a member failed again and again at one state: without that member
    alone, the comparison would favour those that stay away from such states.

    Args:
        episodes: [g]; every member of a group starts from its episode's state. The noise of a group follows from the
            seed of its episode.
        noise_key: of the sampler's noise.
        executed: E, steps of each predicted chunk that the environment runs.
        noise_level: of the stochastic sampler; default: the actor's own.
        store: emptied, then filled with the prefix cache of every observation, for an update with a frozen VLM.
        again: asked, when all groups are home, for the episodes of further ones, until it gives none.
        overlap: in two halves of the groups: while one is simulated, the other's chunks are sampled. A half's batches
            are smaller, which may move the last digits of what the policy computes, as another `pool.num_envs` may.
        before: groups lost and drawn earlier in the run.

    Raises:
        BrokenIteration: the policy drew a number that is not finite; it reaches no environment.
        TooManyLost: of all groups more than 1 %, and more than two; or each one of these.
    """
    how = _Acting(pool, actor, params, processor, plan, noise_key, stochastic, noise_level, store, executed, overlap)
    pool.take_times()
    if store is not None:
        store.clear()
    lost = Lost("groups", *before)
    walks, wanted = _walked(how, episodes, again, lost)
    if len(lost.why) == len(wanted):
        raise TooManyLost(f"each of {len(wanted)} groups was lost: {lost.newest}")
    return _join(walks, wanted, len(episodes), pool.take_times(), store)


def largest_batch(slots: int, group_size: int, overlap: bool) -> int:
    """The most observations of one decision, in training and in evaluation, with so many environments."""
    if not overlap:
        return slots
    return max(-(-(slots // group_size) // 2) * group_size, -(-slots // 2))


def play(
    pool: Pool,
    actor: Actor,
    params: tuple[Any, Any],
    processor: InputProcessor,
    episodes: Sequence[Episode],
    noise_key: tuple[int, ...],
    *,
    executed: int,
    overlap: bool = False,
    before: tuple[int, int] = (0, 0),
) -> Outcome:
    """What comes of episodes under the ODE sampler, each alone. Arguments and errors: as `collect`."""
    alone = BranchPlan(group_size=1, points=(), fanout=())
    how = _Acting(pool, actor, params, processor, alone, noise_key, False, None, None, executed, overlap)
    lost = Lost("episodes", *before)
    walks, wanted = _walked(how, episodes, None, lost)
    return _outcome(walks, wanted, lost)


def _walked(
    how: _Acting,
    episodes: Sequence[Episode],
    again: Callable[[Outcome], Sequence[Episode]] | None,
    lost: Lost,
) -> tuple[list[_Walk], list[Episode]]:
    """Walks over all groups, and their episodes."""
    slots, size = how.pool.num_envs, how.plan.group_size
    at_once = slots // size
    if at_once == 0:
        raise ValueError(f"the pool has {slots} environments, expected at least group size {size}")
    walks: list[_Walk] = []
    done, wanted = 0, list(episodes)
    while done < len(wanted):
        wave = wanted[done : done + at_once]
        lost.drawn += len(wave)
        walk = _Walk(how, wave, done, lost)
        walk.run()
        walks.append(walk)
        done += len(wave)
        if again is not None and done == len(wanted):
            wanted += again(_outcome(walks, wanted, lost))
    return walks, wanted


def _outcome(walks: list[_Walk], episodes: Sequence[Episode], lost: Lost) -> Outcome:
    names = ("success", "unstable", "chunks", "steps")
    arrays = {name: np.concatenate([getattr(walk, name) for walk in walks]) for name in names}
    arrays["success"][list(lost.why)] = False
    return Outcome(episodes=tuple(episodes), lost=dict(lost.why), **arrays)


@dataclasses.dataclass(frozen=True)
class _Acting:
    """Who acts where, and how: `collect`'s arguments of these names."""

    pool: Pool
    actor: Actor
    params: tuple[Any, Any]
    processor: InputProcessor
    plan: BranchPlan
    noise_key: tuple[int, ...]
    stochastic: bool
    noise_level: float | None
    store: AnyStore | None
    executed: int
    overlap: bool


class _Walk:
    """One pass over as many groups as the pool holds, chunk by chunk."""

    def __init__(self, how: _Acting, episodes: Sequence[Episode], first_group: int, lost: Lost):
        self.how, self.pool, self.plan = how, how.pool, how.plan
        self.episodes, self.first_group, self.lost = episodes, first_group, lost
        self.seeds = np.array([episode.seed for episode in episodes])
        shape = (len(episodes), how.plan.group_size)
        self.success = np.zeros(shape, bool)
        self.unstable = np.zeros(shape, bool)
        self.chunks = np.zeros(shape, int)
        self.steps = np.zeros(shape, int)
        self.nodes: list[dict[str, np.ndarray]] = []
        self.looks: list[Observation] = []
        self.look_count = 0
        self.sample_s = 0.0

    def run(self) -> None:
        """Takes each half of the groups, or all of them, on to where it waits for environments; then the next."""
        shares = np.array_split(np.arange(len(self.seeds)), 2 if self.how.overlap else 1)
        running = collections.deque(self._go(groups) for groups in shares if len(groups))
        while running:
            part = running.popleft()
            if next(part, "home") != "home":
                running.append(part)

    def _go(self, groups: np.ndarray) -> Iterator[None]:
        """Walks some groups to the end of their episodes; yields where it waits for their environments."""
        members, chunk = np.zeros(len(groups), int), 0  # the clusters' leaders
        call = self.pool.begin_reset(self._slots(groups, members).tolist(), [self.episodes[group] for group in groups])
        yield
        observations = self._answers(self.pool.finish, call)
        while True:
            alive = np.array([seen is not None for seen in observations], bool) & ~self._is_lost(groups)
            groups, members = groups[alive], members[alive]
            observations = [seen for seen, stays in zip(observations, alive, strict=True) if stays]
            if not observations:
                return
            cluster = self.plan.cluster_size(chunk)
            children = members[:, None] + cluster * np.arange(self.plan.split(chunk))  # [n, M]
            looks = self.look_count + np.arange(len(groups))
            acted = self._decide(observations, groups, children, chunk)
            slots = self._slots(groups[:, None], children)
            if children.shape[1] > 1:
                self._part(slots, groups, chunk)
            on = np.flatnonzero(~self._is_lost(groups))
            groups, children, looks, slots = groups[on], children[on], looks[on], slots[on]
            chain = jax.tree.map(lambda x: x[on], acted.chain)  # noqa: B023 - it is used at once
            actions = acted.actions[on].reshape(-1, *acted.actions.shape[2:])
            call = self.pool.begin_step(slots.ravel().tolist(), actions)
            yield
            answers = self._answers(self.pool.finish, call)
            self._record(groups, children, looks, chunk, cluster, chain, [answer and answer[0] for answer in answers])
            groups, members = np.repeat(groups, children.shape[1]), children.ravel()
            observations = [answer and answer[1] for answer in answers]
            chunk += 1

    def _is_lost(self, groups: np.ndarray) -> np.ndarray:
        return np.array([self.first_group + group in self.lost.why for group in groups.tolist()], bool)

    def _answers(self, ask: Callable[..., Any], *args: Any) -> list[Any]:
        """What a call of the pool gives, slot by slot; None for slots that are lost, whose groups are noted."""
        try:
            return ask(*args)
        except SlotsLost as error:
            for slot, why in error.lost.items():
                self.lost.add(self.first_group + slot // self.plan.group_size, why)
            return error.answers

    def _part(self, slots: np.ndarray, groups: np.ndarray, chunk: int) -> None:
        """Brings the members that part here to where their leader is: slots [n, M], the leader's first."""
        others, times = slots[:, 1:].ravel().tolist(), slots.shape[1] - 1
        if chunk == 0 and not self.pool.spec.copies:  # where an episode began it can be begun again
            self._answers(self.pool.reset, others, [self.episodes[group] for group in np.repeat(groups, times)])
        else:
            self._answers(self.pool.branch, np.repeat(slots[:, 0], times).tolist(), others)

    def _slots(self, groups: np.ndarray, members: np.ndarray) -> np.ndarray:
        """Environment slots, turned by one from group to group: the pool deals slots round-robin to its workers, and
        leaders (members 0, 4, 2, 6 …) would otherwise all live on one worker."""
        size = self.plan.group_size
        return groups * size + (members + groups) % size

    def _decide(self, observations: list[Any], groups: np.ndarray, children: np.ndarray, chunk: int) -> Acted:
        """One look per observation, one chain per child: the VLM runs once however many members part here."""
        began = time.perf_counter()
        how = self.how
        acted = act(
            how.actor,
            how.params,
            how.processor,
            observations,
            stack_ids(self.seeds[groups][:, None], chunk, children),
            how.noise_key,
            executed=how.executed,
            stochastic=how.stochastic,
            noise_level=how.noise_level,
        )
        if how.store is not None:
            how.store.add(acted.cache, len(observations))
        self.sample_s += time.perf_counter() - began
        self.looks.append(acted.looks)
        self.look_count += len(observations)
        chain = acted.chain
        if not np.isfinite(chain.x).all() or not np.isfinite(chain.logp).all():
            raise BrokenIteration(
                f"the policy drew numbers that are not finite at chunk {chunk}",
                {"group": groups + self.first_group, "member": children, "x": chain.x, "logp": chain.logp},
            )
        return acted

    def _record(
        self,
        groups: np.ndarray,
        children: np.ndarray,
        looks: np.ndarray,
        chunk: int,
        cluster: int,
        chain: Any,
        results: list[Any],
    ) -> None:
        """Notes a chunk of each child, and what came of it: None for one that is lost, whose group will be dropped."""
        split = children.shape[1]
        flat_groups, leaders = np.repeat(groups, split), children.ravel()
        count = len(leaders)
        self.nodes.append(
            {
                "group": flat_groups + self.first_group,
                "chunk": np.full(count, chunk),
                "leader": leaders,
                "size": np.full(count, cluster),
                "look": np.repeat(looks, split),
                "trainable": np.full(count, self.plan.trainable(chunk)),
                "steps": np.array([result.steps if result else 0 for result in results], int),
                "x": chain.x.reshape(-1, *chain.x.shape[2:]),
                "stochastic": chain.stochastic.reshape(count, -1),
                "logp": chain.logp.ravel(),
            }
        )
        for group, leader, result in zip(flat_groups, leaders, results, strict=True):
            if result is None:
                continue
            members = slice(leader, leader + cluster)
            self.success[group, members] = result.success
            self.unstable[group, members] = result.unstable
            self.chunks[group, members] = chunk + 1
            self.steps[group, members] += result.steps


def _join(
    walks: list[_Walk], episodes: Sequence[Episode], first: int, times: dict[str, float], store: AnyStore | None
) -> Rollouts:
    """All walks in one, without the groups that are lost; observations stay, as their prefix caches do."""
    offsets = np.cumsum([0] + [walk.look_count for walk in walks[:-1]])
    tables = [
        {**part, "look": part["look"] + offset}
        for walk, offset in zip(walks, offsets, strict=True)
        for part in walk.nodes
    ]
    nodes = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    lost = walks[0].lost.why
    kept = np.array([group not in lost for group in range(len(episodes))], bool)
    if lost:
        of_kept = kept[nodes["group"]]
        nodes = {name: column[of_kept] for name, column in nodes.items()}
        nodes["group"] = (np.cumsum(kept) - 1)[nodes["group"]]
    looks = [look for walk in walks for look in walk.looks]
    return Rollouts(
        episodes=tuple(episode for episode, stays in zip(episodes, kept, strict=True) if stays),
        success=np.concatenate([walk.success for walk in walks])[kept],
        unstable=np.concatenate([walk.unstable for walk in walks])[kept],
        chunks=np.concatenate([walk.chunks for walk in walks])[kept],
        steps=np.concatenate([walk.steps for walk in walks])[kept],
        nodes=NodeTable(**nodes),
        looks=jax.tree.map(lambda *xs: np.concatenate(xs), *looks),
        caches=store,
        seconds={
            "sample": sum(walk.sample_s for walk in walks),
            **{k: times[k] for k in ("simulate", "render", "hidden")},
        },
        first=int(kept[:first].sum()),
        lost=dict(lost),
    )
