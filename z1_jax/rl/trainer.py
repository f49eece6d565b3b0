"""The state of a GRPO run and what an iteration does to it: collect groups, credit their nodes, update the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from envs.base import Episode, Pool
from z1_jax import distributed, processes
from z1_jax.config.checks import check_horizon
from z1_jax.config.schema import Config, ConfigError, UpdateConfig
from z1_jax.errors import UserError
from z1_jax.host_memory import free_host_bytes
from z1_jax.models.pi05 import cache_bytes, vlm_is_frozen
from z1_jax.optim import schedule
from z1_jax.policy import Policy, named, unnamed
from z1_jax.rl import advantage, diagnostics, loss, rollout, selective, shares, tree
from z1_jax.rl.actor import Actor, make_actor
from z1_jax.rl.lost import check_lost
from z1_jax.rl.parts import EXPERT, PartOptimizer
from z1_jax.rl.prefix_cache import (
    AnyStore,
    DevicePrefixStore,
    PrefixStore,
    choose_placement,
    free_device_bytes,
)
from z1_jax.rl.schedules import scheduled
from z1_jax.rl.task_groups import TaskGroups
from z1_jax.rl.update import Launched, NodeBatch, Updater, fetch, mini_batches
from z1_jax.train_state import TrainState

GATES = {"float32": 1e-3, "bfloat16": 0.1}  # largest |ρ − 1| at the first update of an iteration


@dataclasses.dataclass(frozen=True)
class Credit:
    """What an iteration's rollouts are worth: g groups of G members, N nodes."""

    returns: np.ndarray  # float [g, G]
    advantages: np.ndarray  # float [g, G]
    kept: np.ndarray  # bool [g], groups that the filter lets through
    positive: np.ndarray  # float32 [N], A⁺
    negative: np.ndarray  # float32 [N], A⁻
    usable: np.ndarray  # bool [N], trainable nodes of kept groups

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Of `loss.grpo`."""
        return {"positive": self.positive, "negative": self.negative}


class GrpoTrainer:
    """Trainable and frozen parameters, optimiser state, and the compiled functions that work on them.

    Attributes:
        scope: what is trained now; with `train.scope=auto` it begins as `expert`.
        tasks: which task each group is of, and how training goes on each.
        probe: training success since the last decision, with `train.scope=auto` as long as the expert alone is trained.
        decision: what the last probe led to, once there was one.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        mesh: jax.sharding.Mesh,
        slots: int,
        episode_of: Callable[[str, int], Episode] = lambda task, seed: Episode(seed),
    ):
        """Args: `slots`: environments of the pool; `episode_of`: the episode of a task and a seed."""
        self._episode_of = episode_of
        train, group = config.train, config.group
        window = max(train.stop_window, train.keep_best)
        self.tasks = TaskGroups(config.every_task, group.spread, group.floor, config.seed, window)
        # Without its arrays: what is frozen may be narrower, and must not be held twice.
        self._policy, self.config, self._mesh, self._slots = policy.without_params(), config, mesh, slots
        self._whole = policy if config.train.scope == "auto" else None  # until more than the expert is trained
        optim = config.update.optim
        self._optimizer = PartOptimizer(optim, config.update.vlm_lr_factor)
        self._lr = schedule(optim, config.train.iterations)
        self._gate = config.update.ratio_gate or GATES[policy.config.dtype]
        self._earlier_traces: list[dict[str, int]] = []
        self.probe: list[float] = []
        self.decision: selective.Decision | None = None
        self.lost_before = (0, 0)  # groups lost and drawn before the next iteration
        self.opt_state: Any = None
        self._reference: Any = None  # what is trained, as it was before RL, where the KL to it is a term of the loss
        self._enter(EXPERT if config.train.scope == "auto" else config.train.scope, policy, policy)

    def _enter(self, scope: str, policy: Policy, start: Policy) -> None:
        """Trains `policy` with `scope` from here on; a part that is trained already keeps its optimiser state.

        `start` is the policy before RL.
        """
        self.scope = scope
        self.graphdef, trainable, self.frozen = self._split(policy)
        # The update consumes its parameters; the caller's policy stays whole.
        self.trainable = jax.tree.map(lambda x: x.copy(), trainable)
        self.opt_state = self._optimizer.init_on(self._mesh, self.trainable, self.opt_state)
        config = self.config
        if config.update.kl_coef:
            self._reference = trainable if policy is start else self._split(start)[1]
        vlm = not vlm_is_frozen(self.trainable)
        factor, default = config.update.vlm_lr_factor, UpdateConfig.vlm_lr_factor
        if factor != default and not vlm and config.train.scope != "auto":
            raise ConfigError(
                f"config key update.vlm_lr_factor: got {factor}, which has no effect with "
                f"train.scope={scope}: it trains nothing of the VLM; leave it at {default}"
            )
        largest = rollout.largest_batch(self._slots, config.group.size, config.rollout.overlap)
        self.actor: Actor = make_actor(policy, self.graphdef, config.flow, self._mesh, largest)
        update = config.update
        node_loss = loss.grpo(update.clip_low, update.clip_high, update.ratio_max)
        self._updater = Updater(
            self.graphdef,
            self._optimizer,
            node_loss,
            config.flow,
            update,
            self.actor.counted,
            self._mesh,
            in_place=not policy.config.unroll,
        )
        self._store: AnyStore | None = None
        self.placement = ""  # of the prefix caches; chosen when the length of an episode is known
        if vlm:
            self.placement = choose_placement(config.update.prefix_cache, True, config.train.scope, 0, None, 0)

    def _split(self, policy: Policy) -> tuple[Any, Any, Any]:
        return policy.split(self.scope, self.config.lora, self.config.seed)

    @property
    def params(self) -> tuple[Any, Any]:
        return self.trainable, self.frozen

    @property
    def state(self) -> TrainState:
        """What a checkpoint holds of training."""
        return TrainState(self.trainable, self.frozen, self.opt_state)

    @state.setter
    def state(self, state: TrainState) -> None:
        self.trainable, self.frozen, self.opt_state = state.trainable, state.frozen, state.opt_state

    @property
    def traces(self) -> dict[str, int]:
        """How often each function was compiled."""
        now = {**self.actor.traces, "update": self._updater.traces}
        return {name: count + sum(past[name] for past in self._earlier_traces) for name, count in now.items()}

    def policy(self) -> Policy:
        """The policy as trained so far."""
        return self._policy.with_params(self.trainable, self.frozen)

    def noise_level(self, iteration: int) -> float:
        """a of an iteration."""
        config = self.config.flow
        return scheduled(
            config.noise_schedule, config.noise_level, config.noise_level_end, iteration, self.config.train.iterations
        )

    def collect(self, pool: Pool, iteration: int) -> rollout.Rollouts:
        """One iteration's groups, on seeds and noise of this iteration alone.

        With `group.oversample`, groups that the filter drops are drawn again, of the same task, until `group.count` are
        kept or the budget is spent.
        """
        config = self.config
        count, most = config.group.count, most_groups(config)
        seeds = iter(training_seeds(config.seed, iteration, most).tolist())
        drawn = [self._episode_of(task, next(seeds)) for task in self.tasks.of_groups(iteration, count)]
        mine = _own(range(count))  # of all groups, those of this process
        fresh = range(count)  # those that were not looked at
        at_once = max(self._slots * processes.count() // config.group.size, 1)
        waves = [(0, group // at_once) for group in fresh]

        def again(outcome: rollout.Outcome) -> list[Episode]:
            nonlocal fresh
            while True:
                self.actor.finish(self.params)
                new = [number for number in mine if number in fresh]
                last = slice(len(mine) - len(new), None)
                told = {
                    "groups": new,
                    "success": outcome.success[last].tolist(),
                    "chunks": outcome.chunks[last].tolist(),
                }
                dropped = [drawn[group].task for group in self._dropped(processes.exchange(told))]
                first = len(drawn)
                drawn.extend(self._episode_of(task, next(seeds)) for task in dropped[: most - first])
                fresh = range(first, len(drawn))
                waves.extend((waves[-1][0] + 1, place // at_once) for place in range(len(fresh)))
                own = _own(fresh)
                mine.extend(own)
                if own or not fresh:
                    return [drawn[group] for group in own]

        check_horizon(config, pool.spec.horizon, self._policy.executed)
        if not self.placement:
            self._place_caches(pool.spec.horizon)
        out = rollout.collect(
            pool,
            self.actor,
            self.params,
            self._policy.processor,
            group_plan(config, iteration),
            [drawn[group] for group in mine],
            (config.seed, 0x6E0, iteration),
            executed=self._policy.executed,
            noise_level=self.noise_level(iteration),
            store=self._store,
            again=again if most > count else None,
            overlap=config.rollout.overlap,
            before=(self.lost_before[0], self.lost_before[1] + count - len(_own(range(count)))),
        )
        self.actor.finish(self.params)
        out = shares.merged(out, mine, [sorted(set(waves)).index(wave) for wave in waves])
        if out.lost:
            lost, drawn_before = self.lost_before
            check_lost(lost + len(out.lost), drawn_before + out.drawn, "groups", [*out.lost.values()][-1])
        return out

    def _dropped(self, told: Sequence[Mapping[str, Any]]) -> list[int]:
        """The groups that the filter drops, of those whose outcomes the processes tell: numbers, success, chunks."""
        numbers = [number for one in told for number in one["groups"]]
        success = np.array([row for one in told for row in one["success"]], bool)
        chunks = np.array([row for one in told for row in one["chunks"]], int)
        return sorted(number for number, kept in zip(numbers, self._kept(success, chunks), strict=True) if not kept)

    def _place_caches(self, control_steps: int) -> None:
        """Chooses where the prefix caches of an iteration are kept, by the most that there can be."""
        config, shapes = self.config, self._policy.config
        looks = most_looks(config, control_steps, self._policy.executed)
        planned = looks * cache_bytes(shapes)
        several = processes.count()
        self.placement = choose_placement(
            config.update.prefix_cache,
            not vlm_is_frozen(self.trainable),
            config.train.scope,
            -(-planned // several),
            free_device_bytes(self._mesh) if several == 1 else None,  # each process keeps its own, on its host
            min(processes.exchange(free_host_bytes())),
        )
        self._store = None
        if self.placement == "device":
            self._store = DevicePrefixStore(looks + self.actor.largest, self._mesh)
        elif self.placement == "host":
            self._store = PrefixStore()
        print(f"prefix cache: {self.placement} (at most {looks:,} observations, {planned / 1e6:,.0f} MB)", flush=True)

    def credit(self, rollouts: rollout.Rollouts, rng: np.random.Generator) -> Credit:
        """Returns, advantages and the filter, and what they make of each node."""
        reward, nodes, success = self.config.reward, rollouts.nodes, rollouts.success
        returns = self._returns(success, rollouts.chunks)
        advantages = advantage.group_advantages(
            returns, success, std=reward.std, all_success="mean" if reward.kind == "penalty" else "slowest"
        )
        if self.config.group.shuffle_advantages:
            advantages = rng.permuted(advantages, axis=1)
        kept = self._kept(success, rollouts.chunks)
        positive, negative = tree.signed_advantage_sums(advantages, nodes.group, nodes.leader, nodes.size)
        return Credit(returns, advantages, kept, positive, negative, nodes.trainable & kept[nodes.group])

    def _returns(self, success: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        reward = self.config.reward
        return advantage.returns_of(reward.kind, success, chunks, reward.discount, reward.penalty)

    def _kept(self, success: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """bool [g], groups that the filter lets through; success and chunks [g, G]."""
        reward = self.config.reward
        filtered = success if reward.filter_on == "success" else self._returns(success, chunks)
        return advantage.kept_groups(filtered, reward.keep_low, reward.keep_high)

    def update(self, rollouts: rollout.Rollouts, iteration: int) -> dict[str, Any]:
        """Epochs of clipped updates on one iteration's nodes; returns the iteration's metrics but its times.

        Raises:
            RatioError: the first update's importance ratios are not 1, or a number is not finite.
        """
        rng = np.random.default_rng([self.config.seed, 0xAD, iteration])
        credit = self.credit(rollouts, rng)
        lr_scale = float(self._lr(iteration)) / self.config.update.optim.lr
        noise_level = self.noise_level(iteration)
        with distributed.explicit_transfers():
            rows = self._optimise(rollouts, credit, self._batches(rollouts, credit, rng), lr_scale, noise_level)
        success = rollouts.success
        return {
            "scope": self.scope,
            "return": float(credit.returns.mean()),
            **({"groups/drawn": rollouts.drawn} if self.config.group.oversample > 1 or rollouts.lost else {}),
            **({"groups/lost": len(rollouts.lost)} if rollouts.lost else {}),
            "groups/kept": int(credit.kept.sum()),
            "groups/kept_share": float(credit.kept.mean()),
            "groups/all_success": int(success.all(axis=1).sum()),
            "groups/all_fail": int((~success).all(axis=1).sum()),
            "unstable": int(rollouts.unstable.sum()),
            "nodes/used": int(credit.usable.sum()),
            "lr": lr_scale * self.config.update.optim.lr,
            **shares.summed(
                diagnostics.sharing_metrics(
                    rollouts, self._policy.config.vision.tokens, int(self.actor.counted.sum()), noise_level
                ),
                diagnostics.OF_LOOKS,
            ),
            **diagnostics.update_metrics(rows),
        }

    def _batches(
        self, rollouts: rollout.Rollouts, credit: Credit, rng: np.random.Generator
    ) -> Iterator[tuple[NodeBatch, float]]:
        seen = rollouts.looks if rollouts.caches is None else rollouts.caches
        if rollouts.caches is not None and rollouts.caches.rows != len(rollouts.looks.tokens):
            raise ValueError("the prefix caches are those of other rollouts")  # a bug: never train on them
        config = self.config.update
        for _ in range(config.epochs):
            yield from mini_batches(
                rollouts.nodes, credit.inputs, credit.usable, seen, config.batch_size, rng, rollouts.share
            )

    def _optimise(
        self,
        rollouts: rollout.Rollouts,
        credit: Credit,
        batches: Iterator[tuple[NodeBatch, float]],
        lr_scale: float,
        noise_level: float,
    ) -> list[dict[str, float]]:
        """One step per batch. While one runs, the next is gathered and sent, and the one before is checked."""
        rows: list[dict[str, float]] = []
        done: list[tuple[NodeBatch, Launched]] = []

        def check() -> None:
            stats = fetch(done[len(rows)][1])
            try:
                diagnostics.check_step(stats, not rows, self._gate)
            except diagnostics.RatioError as error:
                error.evidence = _evidence(rollouts, credit, done)
                raise
            rows.append(stats)

        for batch, normaliser in batches:
            self.trainable, self.opt_state, launched = self._updater.launch(
                self.trainable,
                self.opt_state,
                self.frozen,
                self._updater.place(batch),
                normaliser,
                lr_scale=lr_scale,
                noise_level=noise_level,
                reference=self._reference,
            )
            done.append((dataclasses.replace(batch, seen=None), launched))
            if len(done) > 1:
                check()
        if done:
            check()
        return rows

    def observe(self, success: float) -> selective.Decision | None:
        """Tells `train.scope=auto` the training success of the iteration that has ended.

        Returns the decision at the end of a probe, and changes the scope if that is what it says; else the next probe
        begins, for the expert alone may stall later.
        """
        config = self.config.selective
        if self._whole is None:
            return None
        self.probe.append(success)
        if len(self.probe) < config.iterations:
            return None
        self.decision = selective.decide(self.probe, config.confidence, config.enough, config.then)
        self.probe = []
        if self.decision.scope != self.scope:
            self.enter(self.decision.scope)
        return self.decision

    def enter(self, scope: str) -> None:
        """Changes the scope for good: what was trained stays as it is, the rest is the start's own."""
        start, self._whole = self._whole, None
        assert start is not None, "the scope changes once"
        leaves = {**named(start.params), **named(self.trainable)}
        self._earlier_traces.append({**self.actor.traces, "update": self._updater.traces})
        self._enter(scope, start.with_params(unnamed(start.params, leaves)), start)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint's document must say of the scope, JSON values."""
        decision = None if self.decision is None else dataclasses.asdict(self.decision)
        several = {"tasks": self.tasks.progress()} if len(self.tasks.tasks) > 1 else {}
        return {"scope": self.scope, "probe": self.probe, "decision": decision, **several}

    def resume(self, progress: dict[str, Any]) -> None:
        """Takes the scope of a checkpoint, before its arrays are loaded."""
        if "tasks" in progress:
            self.tasks.resume(progress["tasks"])
        self.probe = list(progress["probe"])
        stored = progress["decision"]
        self.decision = stored and selective.Decision(**{**stored, "trend": selective.Trend(**stored["trend"])})
        if progress["scope"] != self.scope:
            if self._whole is None:  # the newest checkpoint was of the later scope, and could not be read
                raise UserError(
                    f"the newest checkpoint with train.scope={progress['scope']} comes before what is set up here: "
                    "give the same command again, and it goes on from there"
                )
            self.enter(progress["scope"])


def group_plan(config: Config, iteration: int) -> tree.BranchPlan:
    """How an iteration's groups branch."""
    group = config.group
    prefix = tree.prefix_schedule(
        group.prefix_chunks, group.prefix_chunks_end, iteration, config.train.iterations, group.prefix_schedule
    )
    return tree.branch_plan(group.branching, group.size, prefix)


def _own(groups: range) -> list[int]:
    """Those of newly drawn groups that this process plays: as many as every other, or one more."""
    return np.array_split(groups, processes.count())[processes.index()].tolist()


def most_groups(config: Config) -> int:
    """Groups that an iteration draws at most."""
    return int(config.group.oversample * config.group.count)


def most_looks(config: Config, control_steps: int, executed: int) -> int:
    """Observations of any iteration at most: no member succeeds before its episode of `control_steps` ends."""
    chunks = -(-control_steps // executed)
    plans = {group_plan(config, iteration) for iteration in range(config.train.iterations)}
    return most_groups(config) * max(plan.most_looks(chunks) for plan in plans)


def _evidence(
    rollouts: rollout.Rollouts, credit: Credit, done: list[tuple[NodeBatch, Launched]]
) -> dict[str, np.ndarray]:
    """The node table, its credit, and the ratios of every step up to the broken one."""
    logp = [distributed.local_rows(launched.logp)[batch.valid] for batch, launched in done]
    node = [batch.node[batch.valid] for batch, _ in done]
    scored = np.concatenate(logp)
    at = np.concatenate(node)
    nodes = {f"nodes/{f.name}": getattr(rollouts.nodes, f.name) for f in dataclasses.fields(rollouts.nodes)}
    return {
        **nodes,
        **{f"credit/{f.name}": getattr(credit, f.name) for f in dataclasses.fields(credit)},
        "seeds": rollouts.seeds,
        "success": rollouts.success,
        "unstable": rollouts.unstable,
        "chunks": rollouts.chunks,
        "update/step": np.repeat(np.arange(len(done)), [len(rows) for rows in node]),
        "update/node": at,
        "update/logp": scored,
        "update/ratio": np.exp(scored - rollouts.nodes.logp[at]),
    }


def training_seeds(seed: int, iteration: int, count: int) -> np.ndarray:
    """Environment seeds of an iteration's groups, within [10^8, 8·10^8): apart from demonstrations and evaluation."""
    drawn = np.random.SeedSequence([seed, 0x5EED, iteration]).generate_state(count, np.uint64)
    return (100_000_000 + drawn % np.uint64(700_000_000)).astype(np.int64)
