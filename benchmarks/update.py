"""What an update and a branch cost, counted and measured: with the prefix cache, nodes and shared looks, or without.

    python benchmarks/update.py                       # kitchen and mid size measured, full size counted
    python benchmarks/update.py --policy runs/…       # real rollouts by a trained policy instead of a random one

"Plain" is the same code without the idea: every member's chunk is a row of its own and its observation goes through
the VLM again in every epoch; or each member looks for itself. Both sides are timed in turns, on this machine as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import result_line
from flax import nnx

from envs.base import episodes
from z1_jax import sharding
from z1_jax.config.schema import Config, FlowConfig, OptimConfig, UpdateConfig
from z1_jax.data.normalize import NormStats
from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer
from z1_jax.initial_policy import given_policy
from z1_jax.models.pi05 import Pi05, Pi05Config, abstract_model, count_parameters, init_model, split_model
from z1_jax.models.presets import get_preset
from z1_jax.optim import make_optimizer
from z1_jax.policy import Policy, fresh_policy, make_processor
from z1_jax.process import start_jax
from z1_jax.rl import flow, loss, rollout
from z1_jax.rl.actor import Actor, counted_coordinates, make_actor, stack_ids
from z1_jax.rl.prefix_cache import PrefixStore
from z1_jax.rl.rollout import NodeTable
from z1_jax.rl.tree import BranchPlan, branch_plan, signed_advantage_sums
from z1_jax.rl.update import Updater, mini_batches
from z1_jax.stages import make_pool
from z1_jax.types import Observation

# The kitchen's defaults; an episode there takes 4.7 chunks on average.
GROUP, PREFIX_CHUNKS, EPISODE_CHUNKS, STEPS = 8, 2, 5, 4
MICRO_BATCHES = (1, 2, 5, 10)  # rows that go through the network at once; each side has what suits it best
REAL_DIMS = 12  # action dimensions that count
GOAL_UPDATE, GOAL_BRANCH, GOAL_COSINE = 10.0, 4.0, 0.999


# --- counting -------------------------------------------------------------------------------------------------------


def prefix_flops(config: Pi05Config) -> float:
    """FLOPs of one observation's prefix: all camera slots through the vision tower, all tokens through the VLM.

    A product of n by m numbers counts 2·n·m; norms, softmax and rotations are left out.
    """
    vision, language = config.vision, config.language
    images, tokens = config.cameras * vision.tokens, config.prefix_length
    block = 2 * (4 * vision.width**2 + 2 * vision.width * vision.mlp) + 4 * vision.tokens * vision.width
    ends = 2 * (3 * vision.patch**2 * vision.width + vision.width * language.width)
    heads = language.heads * language.head_dim
    keys_values = 2 * 2 * language.width * language.kv_heads * language.head_dim
    layer = 2 * (2 * language.width * heads + 3 * language.width * language.mlp) + keys_values + 4 * tokens * heads
    # Of the last layer only keys and values are computed.
    return images * (vision.depth * block + ends) + tokens * ((language.depth - 1) * layer + keys_values)


def velocity_flops(config: Pi05Config) -> float:
    """FLOPs of the expert for one chunk at one flow time."""
    expert, horizon = config.expert, config.horizon
    heads, seen = expert.heads * expert.head_dim, config.prefix_length + horizon
    weights = 2 * expert.width * heads + 2 * expert.width * expert.kv_heads * expert.head_dim
    layer = 2 * (weights + 3 * expert.width * expert.mlp) + 4 * seen * heads
    conditions = 2 * ((2 * expert.depth + 1) * 3 * expert.width**2 + 2 * expert.width**2)
    return horizon * (expert.depth * layer + 4 * config.action_dim * expert.width) + conditions


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs of one observation's prefix and of one chunk's K expert evaluations; bytes of one observation's cache."""

    prefix: float
    chunk: float
    cache_bytes: int

    @classmethod
    def of(cls, config: Pi05Config, steps: int) -> Count:
        width = {"float32": 4, "bfloat16": 2}[config.dtype]
        numbers = config.language.depth * config.prefix_length * 2 * config.language.kv_heads * config.language.head_dim
        return cls(prefix_flops(config), steps * velocity_flops(config), numbers * width)

    def update_gain(self, nodes: int, members: int) -> float:
        """Plain over ours, an epoch: backward through the expert costs twice its forward, the VLM has none."""
        return members * (self.prefix + 3 * self.chunk) / (nodes * 3 * self.chunk)

    def branch_gain(self, members: int) -> float:
        return members * (self.prefix + self.chunk) / (self.prefix + members * self.chunk)


def xla_flops(config: Pi05Config) -> tuple[float, float]:
    """XLA's own count of prefix and velocity for one observation, of the program before optimisation."""
    config = dataclasses.replace(config, unroll=True)
    graphdef, state = nnx.split(abstract_model(config))
    looks = jax.eval_shape(lambda: fake_looks(config, 1, np.random.default_rng(0)))
    chunk = jax.ShapeDtypeStruct((1, 1, config.horizon, config.action_dim), jnp.float32)

    def encode(state: nnx.State, looks: Observation) -> Any:
        return nnx.merge(graphdef, state).encode_prefix(looks)

    def velocity(state: nnx.State, cache: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state).velocity(cache, x, jnp.ones((1, 1)))

    cache = jax.eval_shape(encode, state, looks)
    counts = [
        jax.jit(f).lower(*args).cost_analysis()
        for f, args in ((encode, (state, looks)), (velocity, (state, cache, chunk)))
    ]
    return counts[0]["flops"], counts[1]["flops"]


# --- a group's nodes ------------------------------------------------------------------------------------------------


def tree_table(plan: BranchPlan, chunks: int) -> dict[str, np.ndarray]:
    """Trainable nodes of one group whose members all take `chunks` chunks: chunk, leader, size, look, child of look."""
    rows, look = [], 0
    for chunk in range(chunks):
        if not plan.trainable(chunk):
            continue
        split = plan.split(chunk)
        for place, leader in enumerate(plan.leaders(chunk)):
            rows.append((chunk, leader, plan.cluster_size(chunk), look + place // split, place % split))
        look += len(plan.leaders(chunk)) // split
    names = ("chunk", "leader", "size", "look", "child")
    return dict(zip(names, np.array(rows).T, strict=True))


def sharing(plan: BranchPlan, chunks: int) -> dict[str, float]:
    """Chunks that are simulated, and that are trained on, per trainable chunk of a member (Σ|B_i|), by the plan."""
    simulated = sum(len(plan.leaders(c)) for c in range(chunks))
    trained = sum(len(plan.leaders(c)) for c in range(chunks) if plan.trainable(c))
    members = plan.group_size * sum(plan.trainable(c) for c in range(chunks))
    return {"simulated": simulated / members, "trained": trained / members}


def fake_looks(config: Pi05Config, count: int, rng: np.random.Generator) -> Observation:
    size = config.vision.image_size
    return Observation(
        images=rng.integers(0, 256, (count, config.cameras, size, size, 3), dtype=np.uint8),
        image_mask=np.ones((count, config.cameras), bool),
        tokens=rng.integers(4, config.vocab_size, (count, config.prompt_length)).astype(np.int32),
        token_mask=np.ones((count, config.prompt_length), bool),
    )


# --- measuring ------------------------------------------------------------------------------------------------------


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """[rounds, 2] of each side: wall and processor seconds. In turns: a busy machine slows both; one round to warm up.

    Processor seconds (all threads of this process) say the same on a machine that others use too; on a GPU, nothing.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return {name: np.array(rows[1:]) for name, rows in seconds.items()}


def best_of(seconds: dict[str, np.ndarray], sides: Iterable[str]) -> dict[str, np.ndarray]:
    """Of each side the variant ("SIDE ROWS") that takes the least processor time in the median; prints all of them."""
    middle = {variant: float(np.median(rows[:, 1])) for variant, rows in seconds.items()}
    print(
        "    processor seconds by rows at once: " + ", ".join(f"{name} {value:.3f}" for name, value in middle.items())
    )
    best = {side: min((v for v in middle if v.startswith(side)), key=middle.__getitem__) for side in sides}
    return {side: seconds[variant] for side, variant in best.items()}


def result(
    name: str, value: float, unit: str, baseline: Any, goal: Any, met: bool, n: int, spread: list[float]
) -> None:
    print(result_line(name, value, unit, baseline=baseline, goal=goal, met=met, n=n, spread=spread), flush=True)


def perturbed(model: Pi05, rng: np.random.Generator) -> Pi05:
    """No parameter zero: a fresh expert's closed gates would leave most of its gradient zero."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, "f"), state))


class Bench:
    """One preset with random parameters, observations and advantages, and the production functions on it."""

    def __init__(self, preset: str, mesh: jax.sharding.Mesh):
        self.rng = np.random.default_rng(0)
        self.preset, self.mesh, self.config = preset, mesh, get_preset(preset)
        self.params = split_model(perturbed(init_model(self.config, 0, mesh), self.rng), "expert")
        self.flow = FlowConfig(steps=STEPS, sde_steps="all", noise_level=0.5)
        dims = np.arange(self.config.action_dim) < REAL_DIMS
        self.counted = counted_coordinates(self.config.horizon, self.config.horizon, dims, "executed")
        self.count = Count.of(self.config, STEPS)

    def actor(self, largest: int) -> Actor:
        actor = Actor(self.params[0], self.flow, self.counted, self.mesh, largest)
        actor._sizes = actor._sizes[-1:]  # one shape to compile
        return actor

    def branch(self, rounds: int) -> None:
        """G members at one look, against G looks: the same chains come out."""
        params, look = self.params[1:], fake_looks(self.config, 1, self.rng)
        looks = jax.tree.map(lambda x: np.repeat(x, GROUP, axis=0), look)
        one, many = self.actor(1), self.actor(GROUP)
        members = np.arange(GROUP)

        def ours() -> np.ndarray:
            cache, _ = one.encode(params, look)
            return one.sample(params, cache, stack_ids(0, members[None]), (1,), True).x[0]

        def plain() -> np.ndarray:
            cache, _ = many.encode(params, looks)
            return many.sample(params, cache, stack_ids(0, members[:, None]), (1,), True).x[:, 0]

        difference = float(np.abs(ours() - plain()).max())
        if difference > 1e-3:
            raise RuntimeError(f"both ways must draw the same chains; they differ by {difference:.3g}")
        seconds = in_turns({"ours": ours, "plain": plain}, rounds)
        self._report("branch", seconds, self.count.branch_gain(GROUP), GOAL_BRANCH, rounds)
        work = {"ours": self.count.prefix + GROUP * self.count.chunk, "plain": GROUP * self.count.prefix}
        self._rates(seconds, {**work, "plain": work["plain"] + GROUP * self.count.chunk})

    def update(self, rounds: int) -> None:
        """One epoch over a group's nodes from cached prefixes, against one over every member's chunk from pixels."""
        table = tree_table(branch_plan("tree", GROUP, PREFIX_CHUNKS), EPISODE_CHUNKS)
        looks, caches, nodes = self._rollout(table)
        each = np.repeat(np.arange(len(nodes.size)), nodes.size)
        leaders = np.concatenate([np.arange(a, a + n) for a, n in zip(nodes.leader, nodes.size, strict=True)])
        fields = {f.name: getattr(nodes, f.name)[each] for f in dataclasses.fields(NodeTable)}
        members = NodeTable(**{**fields, "leader": leaders, "size": np.ones(len(each), int)})
        advantages = self.rng.normal(size=(1, GROUP))
        optim = OptimConfig(lr=1e-4, clip_norm=1e9)
        sides, gradients, losses = {}, {}, {}
        both = {"ours": nodes, "plain": members}
        for name, micro in itertools.product(both, MICRO_BATCHES):
            rows, size = both[name], len(both[name].size)
            if size % micro:
                continue
            config = UpdateConfig(batch_size=size, micro_batch=micro)
            optimizer = make_optimizer(optim, optim.lr)
            node_loss = loss.grpo(config.clip_low, config.clip_high, config.ratio_max)
            updater = Updater(
                self.params[0],
                optimizer,
                node_loss,
                self.flow,
                config,
                self.counted,
                self.mesh,
                in_place=not self.config.unroll,
            )
            state = [jax.tree.map(jnp.copy, self.params[1]), jax.jit(optimizer.init)(self.params[1])]
            positive, negative = signed_advantage_sums(advantages, rows.group, rows.leader, rows.size)
            inputs = {"positive": positive, "negative": negative}

            def epoch(rows=rows, size=size, updater=updater, state=state, inputs=inputs, name=name) -> dict[str, float]:
                seen = PrefixStore(caches) if name == "ours" else looks
                rng = np.random.default_rng(0)
                ((batch, normaliser),) = mini_batches(rows, inputs, rows.trainable, seen, size, rng)
                # A rate of 0: every round starts from the same parameters.
                state[0], state[1], stats = updater.step(*state, self.params[2], batch, normaliser, lr_scale=0.0)
                return stats

            losses[name] = epoch()
            # The first moment after one step is (1 − b1) times the gradient.
            gradients[name] = np.concatenate(
                [np.ravel(x) / (1 - optim.b1) for x in jax.tree.leaves(optax.tree.get(state[1], "mu"))]
            )
            sides[f"{name} {micro}"] = epoch
        error = float(np.linalg.norm(gradients["ours"] - gradients["plain"]) / np.linalg.norm(gradients["plain"]))
        ratio_error = max(stats["ratio_error"] for stats in losses.values())
        print(
            f"{self.preset}: {len(nodes.size)} nodes of {len(each)} members' chunks; gradients differ by {error:.1e} "
            f"of their norm, losses {losses['ours']['loss']:.6f} and {losses['plain']['loss']:.6f}, ratios off by "
            f"at most {ratio_error:.1e}"
        )
        result(f"update/{self.preset}/gradient_difference", error, "relative", 0.0, 1e-4, error < 1e-4, 1, [error] * 2)
        seconds = best_of(in_turns(sides, rounds), both)
        self._report("update", seconds, self.count.update_gain(len(nodes.size), len(each)), GOAL_UPDATE, rounds)
        trained = 3 * self.count.chunk
        self._rates(seconds, {"ours": len(nodes.size) * trained, "plain": len(each) * (self.count.prefix + trained)})

    def _rollout(self, table: dict[str, np.ndarray]) -> tuple[Observation, list[Any], NodeTable]:
        """Random observations for a table's looks, their caches, and chains that the policy itself draws on them."""
        actor, params = self.actor(GROUP), self.params[1:]
        count = int(table["look"].max()) + 1
        looks = fake_looks(self.config, count, self.rng)
        caches, chains = [], []
        for start in range(0, count, GROUP):
            rows = np.arange(start, min(start + GROUP, count))
            caches.append(actor.encode(params, jax.tree.map(lambda x, rows=rows: x[rows], looks)))
            chains.append(actor.sample(params, caches[-1][0], stack_ids(rows[:, None], np.arange(2)), (0,), True))
        chain = jax.tree.map(lambda *parts: np.concatenate(parts)[table["look"], table["child"]], *chains)
        n = len(table["look"])
        nodes = NodeTable(
            group=np.zeros(n, int),
            chunk=table["chunk"],
            leader=table["leader"],
            size=table["size"],
            look=table["look"],
            trainable=np.ones(n, bool),
            steps=np.full(n, self.config.horizon),
            x=chain.x,
            stochastic=chain.stochastic,
            logp=chain.logp,
        )
        return looks, caches, nodes

    def _report(self, name: str, seconds: dict[str, np.ndarray], counted: float, goal: float, rounds: int) -> None:
        ratios = seconds["plain"] / seconds["ours"]
        middle = {side: np.median(rows, axis=0) for side, rows in seconds.items()}
        for clock, unit in enumerate(("wall", "processor")):
            row, ours, plain = ratios[:, clock], middle["ours"][clock], middle["plain"][clock]
            value = float(np.median(row))
            print(
                f"{self.preset}: {name}: ours {ours:.3f}, plain {plain:.3f} {unit} seconds: {value:.1f} times less "
                f"({row.min():.1f} … {row.max():.1f}), by FLOPs {counted:.1f}"
            )
            held = goal if self.preset == "mid" else None  # the goals are for π0.5's proportions
            label = f"{name}/{self.preset}/{'speedup' if unit == 'wall' else 'processor_seconds'}"
            met = held is None or value >= held
            result(label, value, "times", "plain", held, met, rounds, [float(row.min()), float(row.max())])

    def _rates(self, seconds: dict[str, np.ndarray], work: dict[str, float]) -> None:
        rates = {side: work[side] / np.median(seconds[side][:, 1]) / 1e9 for side in seconds}
        print(f"    GFLOP a processor second: ours {rates['ours']:.1f}, plain {rates['plain']:.1f}")


# --- real rollouts, and mixed precision on them ---------------------------------------------------------------------


def kitchen_policy(config: Config, path: str, mesh: jax.sharding.Mesh) -> Policy:
    if path:
        return given_policy(config, path, mesh)
    moving = np.arange(12) < 7
    stats = {
        "state": NormStats(np.zeros(16), np.ones(16), -2 * np.ones(16), 2 * np.ones(16)),
        "actions": NormStats(np.zeros(12), 0.5 * moving, -1.0 * moving, 1.0 * moving),
    }
    shapes = get_preset("kitchen")
    words = train_small_tokenizer(kitchen_instructions(), vocab_size=shapes.vocab_size)
    processor = make_processor(
        shapes, PromptTokenizer.from_bytes(words, shapes.prompt_length), stats, config.env.cameras
    )
    policy = fresh_policy(shapes, processor, 0, mesh, executed=shapes.horizon, denoising_steps=STEPS)
    rng = np.random.default_rng(0)
    return policy.with_params(jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, "f"), policy.params))


def real_rollouts(policy: Policy, config: Config, mesh: jax.sharding.Mesh, groups: int) -> rollout.Rollouts:
    """Rolls groups out in the kitchen under each branching, from the same seeds; prints what sharing saves."""
    graphdef, *params = policy.split("expert")
    with make_pool(config) as pool:
        actor = make_actor(
            policy,
            graphdef,
            FlowConfig(steps=policy.denoising_steps, sde_steps="all", noise_level=0.5),
            mesh,
            pool.num_envs,
        )
        for branching, prefix in (("none", 0), ("prefix", PREFIX_CHUNKS), ("tree", PREFIX_CHUNKS)):
            plan = branch_plan(branching, GROUP, prefix)
            seeds = np.arange(500_000_000, 500_000_000 + groups)
            out = rollout.collect(
                pool, actor, tuple(params), policy.processor, plan, episodes(seeds), (3,), executed=policy.executed
            )
            nodes, members = out.nodes, out.nodes.size[out.nodes.trainable].sum()
            simulated, steps = float(len(nodes.size) / members), float(out.simulated_steps / members)
            print(
                f"kitchen rollouts, {branching}, P = {prefix}: {groups} groups of {GROUP}, success "
                f"{out.success.mean():.0%}, {out.chunks.mean():.1f} chunks an episode; per trainable chunk: "
                f"{simulated:.3f} chunks simulated, {nodes.trainable.sum() / members:.3f} trained on, "
                f"{len(out.looks.tokens) / members:.3f} looks, {steps:.2f} control steps; "
                f"{1 - out.simulated_steps / out.steps.sum():.0%} of the steps saved"
            )
            for what, value in (("chunks", simulated), ("steps", steps)):
                name = f"rollout/{branching}/{what}_per_trainable_chunk"
                result(name, value, what, None, None, True, int(members), [value, value])
    return out


def mixed_precision(policy: Policy, out: rollout.Rollouts, groups: int) -> None:
    """The first update's gradient in bfloat16 against float32, on real nodes; masters and log π stay float32."""
    rows = np.flatnonzero(out.nodes.trainable)[:64]
    nodes = NodeTable(**{f.name: getattr(out.nodes, f.name)[rows] for f in dataclasses.fields(NodeTable)})
    looks = jax.tree.map(lambda x: x[nodes.look], out.looks)
    advantages = np.random.default_rng(0).normal(size=(groups, GROUP))
    positive, negative = signed_advantage_sums(advantages, nodes.group, nodes.leader, nodes.size)
    counted = counted_coordinates(policy.config.horizon, policy.executed, policy.processor.counted_dims, "executed")
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        typed = dataclasses.replace(policy.config, dtype=dtype)
        graphdef = split_model(abstract_model(typed), "expert")[0]
        _, trainable, frozen = policy.split("expert")

        @jax.jit
        def gradient(trainable: nnx.State, graphdef: Any = graphdef, frozen: nnx.State = frozen) -> nnx.State:
            def value(trainable: nnx.State) -> jax.Array:
                model = nnx.merge(graphdef, trainable, frozen)
                cache = model.encode_prefix(looks)
                logp = flow.chain_logp(
                    lambda x, t: model.velocity(cache, x, t), nodes.x, nodes.stochastic, counted, noise_level=0.5
                )
                old = jax.lax.stop_gradient(logp)  # as the rollout stored it, in the same precision
                return loss.grpo_loss(logp, old, positive, negative, np.ones(len(rows), bool), float(nodes.size.sum()))[
                    0
                ]

            return jax.grad(value)(trainable)

        gradients[dtype] = jax.device_get(jax.tree.leaves(gradient(trainable)))
    pairs = list(zip(gradients["float32"], gradients["bfloat16"], strict=True))
    whole = cosine(*(np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (0, 1)))
    worst = min(cosine(np.ravel(a), np.ravel(b)) for a, b in pairs)
    print(f"kitchen: gradient in bfloat16 against float32: cosine {whole:.6f}, of the worst parameter {worst:.6f}")
    result(
        "update/kitchen/bfloat16_cosine", whole, "cosine", "float32", GOAL_COSINE, whole >= GOAL_COSINE, 1, [worst, 1.0]
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# --- the whole ------------------------------------------------------------------------------------------------------


def print_counts() -> None:
    """Operations and bytes of each preset, before anything is run."""
    print("Counted: FLOPs of one prefix and of one chunk's K expert evaluations; bytes of one prefix cache")
    table = tree_table(branch_plan("tree", GROUP, PREFIX_CHUNKS), EPISODE_CHUNKS)
    nodes, members = len(table["size"]), int(table["size"].sum())
    for preset, steps, horizon in (("kitchen", 4, 8), ("mid", 4, 8), ("pi05", 10, 50), ("pi05", 5, 10)):
        config = get_preset(preset, horizon=horizon)
        count = Count.of(config, steps)
        name = f"{preset}, K = {steps}, H = {horizon}"
        update, branch = count.update_gain(nodes, members), count.branch_gain(GROUP)
        print(
            f"  {name:<22} {count_parameters(abstract_model(config)) / 1e6:8.1f} M parameters; prefix "
            f"{count.prefix / 1e9:9.3f} G, chunk {count.chunk / 1e9:8.3f} G, ratio {count.prefix / count.chunk:5.1f}; "
            f"cache {count.cache_bytes / 1e6:6.2f} MB; gain of the update {update:5.1f}, of a branch {branch:4.1f}"
        )
        if preset == "pi05":
            label = f"update/pi05-K{steps}-H{horizon}"
            result(f"{label}/counted_speedup", update, "times", "plain", None, True, 1, [update] * 2)
            result(f"{label}/counted_branch_speedup", branch, "times", "plain", None, True, 1, [branch] * 2)
        else:
            prefix, velocity = xla_flops(config)
            print(
                f"  {'':<22} XLA counts {prefix / count.prefix:.3f} and {velocity * steps / count.chunk:.3f} times that"
            )
    print("By the plan, per trainable chunk of a member (chunks simulated, chunks trained on):")
    for title, size, prefix_chunks, chunks in (
        (f"kitchen: G = {GROUP}, P = {PREFIX_CHUNKS}, {EPISODE_CHUNKS} chunks", GROUP, PREFIX_CHUNKS, EPISODE_CHUNKS),
        ("the paper's tree: G = 4, P = 15, 30 chunks", 4, 15, 30),
    ):
        for branching in ("none", "prefix", "tree"):
            plan = branch_plan(branching, size, 0 if branching == "none" else prefix_chunks)
            shared = sharing(plan, chunks)
            print(f"  {title}: {branching:<6} {shared['simulated']:.3f} {shared['trained']:.3f}")


def main() -> None:
    """Counts, measures, and prints one RESULT line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="", help="run directory or checkpoint of a kitchen policy")
    parser.add_argument("--task", default="TurnOnSinkFaucet")
    parser.add_argument("--groups", type=int, default=2, help="groups of the real rollouts")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each pair")
    parser.add_argument("--only", default="", help="count, kitchen, mid or real: that part alone")
    arguments = parser.parse_args()
    start_jax()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    device = jax.devices()[0]
    print(f"{device.device_kind}; G = {GROUP}, P = {PREFIX_CHUNKS}, {EPISODE_CHUNKS} chunks an episode, K = {STEPS}")

    def real() -> None:
        defaults = Config()
        env = dataclasses.replace(defaults.env, parallel=arguments.groups * GROUP)
        config = dataclasses.replace(defaults, task=arguments.task, env=env)
        policy = kitchen_policy(config, arguments.policy, mesh)
        mixed_precision(policy, real_rollouts(policy, config, mesh, arguments.groups), arguments.groups)

    def measured(preset: str) -> None:
        bench = Bench(preset, mesh)
        bench.branch(arguments.rounds)
        bench.update(arguments.rounds)

    parts: dict[str, Callable[[], None]] = {
        "count": print_counts,
        "kitchen": functools.partial(measured, "kitchen"),
        "mid": functools.partial(measured, "mid"),
        "real": real,
    }
    if arguments.only and arguments.only not in parts:
        parser.error(f"--only: got {arguments.only!r}, expected one of {', '.join(parts)}")
    with jax.set_mesh(mesh):
        for name, part in parts.items():
            if arguments.only in ("", name):
                part()


if __name__ == "__main__":
    main()
