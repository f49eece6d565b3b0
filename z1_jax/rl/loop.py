"""The GRPO loop: collect groups → calibrate returns and advantages → update → log → save."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import numpy as np

from envs.pool import EnvPool
from z1_jax.checkpoint import Checkpoints
from z1_jax.config import Config
from z1_jax.evaluation import make_actor
from z1_jax.interrupt import GracefulStop
from z1_jax.metrics import MetricsWriter, Progress, read_records
from z1_jax.models.pi05 import vlm_is_frozen
from z1_jax.optim import init_optimizer, make_optimizer, schedule
from z1_jax.policy import Policy
from z1_jax.rl import advantage, rollout, tree
from z1_jax.rl.actor import Actor
from z1_jax.rl.prefix_cache import PrefixStore
from z1_jax.rl.update import RatioError, Updater, mini_batches
from z1_jax.training import TrainState

_COLUMNS = {"success": ".1%", "groups/kept": ".0f", "ratio/max": ".3f", "clip_fraction": ".3f", "time/total": ".1f"}
GATES = {"float32": 1e-3, "bfloat16": 0.1}  # largest |ρ − 1| at the first update of an iteration


class GrpoTrainer:
    """Trainable and frozen parameters, optimiser state, and the compiled functions that work on them."""

    def __init__(self, policy: Policy, config: Config, mesh: jax.sharding.Mesh, slots: int):
        self._policy, self.config = policy.without_params(), config
        self.graphdef, self.trainable, self.frozen = policy.split(config.train.scope, config.lora, config.seed)
        # The update consumes its parameters; the caller's policy stays whole.
        self.trainable = jax.tree.map(lambda x: x.copy(), self.trainable)
        optim = config.update.optim
        self._optimizer = make_optimizer(optim, optim.lr)
        self._lr = schedule(optim, config.train.iterations)
        self.opt_state = init_optimizer(self._optimizer, self.trainable, mesh)
        self.actor: Actor = make_actor(policy, self.graphdef, config.flow, mesh, slots)
        self._updater = Updater(self.graphdef, self._optimizer, config.flow, config.update, self.actor.counted, mesh)
        self._gate = config.update.ratio_gate or GATES[policy.config.dtype]

    @property
    def params(self) -> tuple[Any, Any]:
        return self.trainable, self.frozen

    @property
    def traces(self) -> dict[str, int]:
        """How often each function was compiled."""
        return {**self.actor.traces, "update": self._updater.traces}

    def policy(self) -> Policy:
        """The policy as trained so far."""
        return self._policy.with_params(self.trainable, self.frozen)

    def collect(self, pool: EnvPool, iteration: int) -> rollout.Rollouts:
        """One iteration's groups, on seeds and noise of this iteration alone."""
        config = self.config
        group = config.group
        chunks = tree.prefix_schedule(group.prefix_chunks, group.prefix_chunks_end, iteration, config.train.iterations)
        return rollout.collect(
            pool,
            self.actor,
            self.params,
            self._policy.processor,
            tree.branch_plan(group.branching, group.size, chunks),
            training_seeds(config.seed, iteration, group.count),
            (config.seed, 0x6E0, iteration),
            executed=self._policy.executed,
            keep_caches=vlm_is_frozen(self.trainable),
        )

    def update(self, rollouts: rollout.Rollouts, iteration: int) -> dict[str, float]:
        """Epochs of clipped updates on one iteration's nodes; returns their diagnostics.

        Raises:
            RatioError: the first update's importance ratios are not 1, or a number is not finite.
        """
        config = self.config
        returns = advantage.calibrated_return(rollouts.success, rollouts.chunks, config.reward.discount)
        advantages = advantage.group_advantages(returns, rollouts.success)
        rng = np.random.default_rng([config.seed, 0xAD, iteration])
        if config.group.shuffle_advantages:
            advantages = rng.permuted(advantages, axis=1)
        kept = advantage.kept_groups(returns, config.reward.keep_low, config.reward.keep_high)
        nodes = rollouts.nodes
        positive, negative = tree.signed_advantage_sums(advantages, nodes.group, nodes.leader, nodes.size)
        usable = nodes.trainable & kept[nodes.group]
        seen = PrefixStore(rollouts.caches) if rollouts.caches else rollouts.looks
        lr_scale = float(self._lr(iteration)) / config.update.optim.lr
        rows = []
        for _ in range(config.update.epochs):
            batches = mini_batches(nodes, positive, negative, usable, seen, config.update.batch_size, rng)
            for batch, normaliser in batches:
                self.trainable, self.opt_state, stats = self._updater.step(
                    self.trainable, self.opt_state, self.frozen, batch, normaliser, lr_scale
                )
                self._check(stats, first=not rows)
                rows.append(stats)
        return {
            "return": float(returns.mean()),
            "groups/kept": int(kept.sum()),
            "groups/all_success": int(rollouts.success.all(axis=1).sum()),
            "groups/all_fail": int((~rollouts.success).all(axis=1).sum()),
            "chunks": int(rollouts.chunks.sum()),
            "nodes": len(nodes.size),
            "nodes/used": int(usable.sum()),
            "lr": lr_scale * config.update.optim.lr,
            **_update_stats(rows),
        }

    def _check(self, stats: dict[str, float], first: bool) -> None:
        broken = [name for name, value in stats.items() if not np.isfinite(value)]
        if broken:
            raise RatioError(f"{', '.join(broken)} of the update is not finite; lower update.optim.lr or the noise")
        if first and stats["ratio_error"] > self._gate:
            raise RatioError(
                f"the first update's importance ratios are off by {stats['ratio_error']:.3g}, expected at most "
                f"{self._gate:g}: the update does not score what the rollout sampled"
            )


def _update_stats(rows: list[dict[str, float]]) -> dict[str, float]:
    if not rows:
        return {"updates": 0}
    nodes = sum(row["nodes"] for row in rows)
    return {
        "updates": len(rows),
        "loss": float(np.mean([row["loss"] for row in rows])),
        "ratio/first_update_max_error": rows[0]["ratio_error"],
        "ratio/mean": sum(row["ratio_sum"] for row in rows) / nodes,
        "ratio/max": max(row["ratio_max"] for row in rows),
        "clip_fraction": sum(row["clipped"] for row in rows) / nodes,
        "approx_kl": sum(row["kl_sum"] for row in rows) / nodes,
        "grad_norm": float(np.mean([row["grad_norm"] for row in rows])),
        "update_to_weight": float(np.mean([row["update_to_weight"] for row in rows])),
    }


def training_seeds(seed: int, iteration: int, count: int) -> np.ndarray:
    """Environment seeds of an iteration's groups, within [10^8, 8·10^8): apart from demonstrations and evaluation."""
    drawn = np.random.SeedSequence([seed, 0x5EED, iteration]).generate_state(count, np.uint64)
    return (100_000_000 + drawn % np.uint64(700_000_000)).astype(np.int64)


def train_grpo(trainer: GrpoTrainer, pool: EnvPool, directory: pathlib.Path, writer: MetricsWriter) -> Policy:
    """Trains to `train.iterations`, from the newest checkpoint in `directory` where there is one.

    Order of an iteration: stop if asked → collect → update → log → save.

    Raises:
        KeyboardInterrupt: after an interruption; the last finished iteration is saved.
        RatioError: a broken ratio or number; the last checkpoint stays.
    """
    config = trainer.config
    checkpoints = Checkpoints(directory)
    start = _restore(checkpoints, trainer)
    writer.resume("grpo", start)
    history = [r for r in read_records(writer.run_dir / "metrics.jsonl") if r["stage"] == "grpo"]
    total_steps = history[-1]["steps/total"] if history else 0
    recent = [record["success"] for record in history]

    def save(step: int) -> None:
        saved = trainer.policy()
        checkpoints.save(step, _state(trainer).parts(saved), {**saved.document(), "iteration": step})

    last = config.train.iterations
    with GracefulStop() as stop, Progress("grpo", last, "iteration", _COLUMNS, start=start) as progress:
        for iteration in range(start, last):
            if _settled(recent, config):
                last = iteration
                print(f"training success is at least {config.train.stop_success:.0%}: stopping early", flush=True)
                break
            if stop.requested:
                save(iteration)
                checkpoints.close()
                raise KeyboardInterrupt
            began = time.perf_counter()
            rollouts = trainer.collect(pool, iteration)
            collected = time.perf_counter()
            try:
                stats = trainer.update(rollouts, iteration)
            except RatioError as error:
                raise RatioError(f"iteration {iteration}: {error}") from None
            finished = time.perf_counter()
            total_steps += rollouts.simulated_steps
            recent.append(float(rollouts.success.mean()))
            values = {
                "success": recent[-1],
                **stats,
                "steps/simulated": rollouts.simulated_steps,
                "steps/unshared": int(rollouts.steps.sum()),
                "steps/total": total_steps,
                **_times(rollouts, collected - began, finished - collected),
            }
            writer.write("grpo", iteration, values)
            _write_episodes(writer, rollouts, iteration)
            progress.report(iteration + 1, values)
            if (iteration + 1) % config.train.checkpoint_every == 0 or iteration + 1 == last:
                save(iteration + 1)
        save(last)  # within the context: a stop that was asked for late must find it written
    checkpoints.close()
    return trainer.policy()


def _settled(recent: list[float], config: Config) -> bool:
    window = config.train.stop_window
    return len(recent) >= window and float(np.mean(recent[-window:])) >= config.train.stop_success


def _times(rollouts: rollout.Rollouts, collect_s: float, update_s: float) -> dict[str, float]:
    seconds = rollouts.seconds
    known = seconds["simulate"] + seconds["render"] + seconds["sample"]
    return {
        "time/simulate": seconds["simulate"],
        "time/render": seconds["render"],
        "time/sample": seconds["sample"],
        "time/update": update_s,
        "time/idle": max(collect_s - known, 0.0),
        "time/total": collect_s + update_s,
    }


def _write_episodes(writer: MetricsWriter, rollouts: rollout.Rollouts, iteration: int) -> None:
    for group, seed in enumerate(rollouts.seeds):
        for member in range(rollouts.success.shape[1]):
            writer.episode(
                "grpo",
                iteration,
                {
                    "group": group,
                    "member": member,
                    "seed": int(seed),
                    "success": bool(rollouts.success[group, member]),
                    "chunks": int(rollouts.chunks[group, member]),
                    "control_steps": int(rollouts.steps[group, member]),
                },
            )


def _state(trainer: GrpoTrainer) -> TrainState:
    return TrainState(trainer.trainable, trainer.frozen, trainer.opt_state)


def _restore(checkpoints: Checkpoints, trainer: GrpoTrainer) -> int:
    """Loads the newest intact checkpoint into the trainer; returns its iteration, 0 for none."""
    newest = _state(trainer).restored(checkpoints)
    if newest is None:
        return 0
    step, state, _ = newest
    trainer.trainable, trainer.frozen, trainer.opt_state = state.trainable, state.frozen, state.opt_state
    return step
