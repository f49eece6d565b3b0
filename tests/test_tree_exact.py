"""Node tables of the real `collect()` on random plans, against each member played alone; the loss on those tables."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
import tiny_env
from scripted import KEY, PROCESSOR, H, ScriptedActor, scripted_chain

from envs.base import Episode, episodes
from envs.pool import EnvPool
from z1_jax.rl import advantage, rollout
from z1_jax.rl.loss import grpo_loss
from z1_jax.rl.tree import branch_plan, signed_advantage_sums


def share(branching: str, size: int, prefix: int, i: int, j: int, chunk: int) -> bool:
    """Whether members i and j take this chunk and all before it together: the definition, pair by pair."""
    if i == j:
        return True
    if branching == "none":
        return False
    if branching == "prefix":
        return chunk < prefix
    depth = int(math.log2(size))
    return all(i >> depth - level == j >> depth - level or chunk < prefix // 2 ** (depth - level)
               for level in range(1, depth + 1))  # fmt: skip


def play(branching: str, size: int, prefix: int, seed: int, member: int, executed: int) -> dict[str, Any]:
    """One member alone, from its seed, in an environment of its own: what it did at every chunk, and how it ended."""
    env, path, steps, chunk = tiny_env.FleetingEnv(), [], 0, 0
    env.reset(Episode(seed))
    while True:
        members = frozenset(j for j in range(size) if share(branching, size, prefix, member, j, chunk))
        saw = env.observe()
        x, stochastic, logp = scripted_chain(seed, chunk, min(members))
        result = env.step_chunk(PROCESSOR.env_actions(x[-1, :executed]))
        steps += result.steps
        path.append({"members": members, "state": saw.state, "x": x, "stochastic": stochastic, "logp": logp,
                     "steps": result.steps})  # fmt: skip
        chunk += 1
        if result.done:
            return {"path": path, "success": result.success, "chunks": chunk, "steps": steps}


def random_case(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A random plan, horizon and chunk length, collected over more groups than the pool holds at once."""
    branching = str(rng.choice(["none", "prefix", "tree"], p=[0.15, 0.25, 0.6]))
    size = 2 ** int(rng.integers(1, 5)) if branching == "tree" else int(rng.integers(2, 7))
    prefix = 0 if branching == "none" else int(rng.integers(0, 9))
    executed = int(rng.integers(1, H + 1))
    monkeypatch.setattr(tiny_env, "HORIZON", int(rng.integers(3, 16)))
    groups = int(rng.integers(1, 6))
    seeds = rng.choice(10**6, groups, replace=False)
    with EnvPool(tiny_env.FleetingEnv, size * int(rng.integers(1, 4)), 0) as pool:
        plan = branch_plan(branching, size, prefix)
        how = {"executed": executed, "overlap": bool(rng.integers(2))}
        out = rollout.collect(pool, ScriptedActor(), (), PROCESSOR, plan, episodes(seeds), KEY, **how)
    alone = [[play(branching, size, prefix, int(s), m, executed) for m in range(size)] for s in seeds]
    return {"out": out, "alone": alone, "size": size, "what": f"{branching} G={size} P={prefix} E={executed}"}


def test_tables_are_an_enumeration_of_members_played_alone(rng, monkeypatch):
    """For 40 random plans: members, mask, looks, actions, densities, steps and outcomes of every node."""
    seen = {"shared end": 0, "success": 0, "failure": 0, "trained shared": 0}
    for _ in range(40):
        case = random_case(rng, monkeypatch)
        out, alone, size, what = (case[k] for k in ("out", "alone", "size", "what"))
        expected = {}  # (group, chunk, members) -> what each of them did there
        for group, members in enumerate(alone):
            for member, played in enumerate(members):
                got = (out.success[group, member], out.chunks[group, member], out.steps[group, member])
                assert got == (played["success"], played["chunks"], played["steps"]), what
                seen["success" if played["success"] else "failure"] += 1
                for chunk, node in enumerate(played["path"]):
                    expected.setdefault((group, chunk, node["members"]), []).append((member, node))
        nodes = out.nodes
        keys = [
            (int(g), int(c), frozenset(range(first, first + width)))
            for g, c, first, width in zip(nodes.group, nodes.chunk, nodes.leader, nodes.size, strict=True)
        ]
        assert len(keys) == len(expected) and set(keys) == set(expected), what
        for row, (group, chunk, members) in enumerate(keys):
            here = expected[group, chunk, members]
            assert {member for member, _ in here} == members  # nobody of a cluster ended before the others
            assert nodes.trainable[row] == (len(members) < size), what
            for _, node in here:  # followers too: their stored chunk is the one that they would have taken alone
                np.testing.assert_array_equal(nodes.x[row], node["x"])
                np.testing.assert_array_equal(nodes.stochastic[row], node["stochastic"])
                assert nodes.logp[row] == node["logp"] and nodes.steps[row] == node["steps"]
                look = PROCESSOR.prompts(["hold still"], node["state"][None])[0][0]
                np.testing.assert_array_equal(out.looks.tokens[nodes.look[row]], look)
            ended = all(alone[group][m]["chunks"] == chunk + 1 for m in members)
            seen["shared end"] += ended and len(members) > 1
            seen["trained shared"] += 1 < len(members) < size
        assert out.simulated_steps == sum(here[0][1]["steps"] for here in expected.values())
        # One look for all who had been together until then; P = 0 and coinciding branch points included.
        together = {
            (g, c, alone[g][min(m)]["path"][c - 1]["members"] if c else frozenset(range(size)) if size > 1 else m)
            for g, c, m in expected
        }
        assert len(out.looks.tokens) == len(together) == len(np.unique(nodes.look))
    assert min(seen.values()) > 0, seen


def naive_loss(case: dict[str, Any], logp: np.ndarray, advantages: np.ndarray, low: float, high: float) -> Any:
    """Value and slope in each node's log π, member by member and chunk by chunk, by hand in float64.

    A member's term is min(ρA, clip(ρ)A): where it is ρA, its slope in log π is ρA; where it is the clipped one, 0.

    Returns:
        Value, slopes, count of terms, and Σ|terms| of the value and of each slope: what their rounding is relative to.
    """
    nodes = case["out"].nodes
    row_of = {(g, c, first): row for row, (g, c, first) in enumerate(zip(nodes.group, nodes.chunk, nodes.leader, strict=True))}  # noqa: E501  # fmt: skip
    total, count, slope = 0.0, 0, np.zeros(len(logp))
    size_of_terms, size_of_slopes = 0.0, np.zeros(len(logp))
    for group, members in enumerate(case["alone"]):
        for member, played in enumerate(members):
            for chunk, node in enumerate(played["path"]):
                if len(node["members"]) == case["size"]:
                    continue  # B_i: not the part that all share
                row = row_of[group, chunk, min(node["members"])]
                a = float(advantages[group, member])
                ratio = math.exp(float(logp[row]) - float(nodes.logp[row].astype("f")))
                free, clipped = ratio * a, min(max(ratio, 1 - low), 1 + high) * a
                total, count = total + min(free, clipped), count + 1
                size_of_terms += abs(min(free, clipped))
                slope[row] += free if free <= clipped else 0.0
                size_of_slopes[row] += abs(free) if free <= clipped else 0.0
    return -total / count, -slope / count, count, size_of_terms / count, size_of_slopes / count


@pytest.mark.parametrize("seed", [None, 698964184])  # a fresh one, and one whose slopes nearly cancel
def test_deduplicated_loss_is_the_naive_one_on_collected_trees(seed, rng, monkeypatch):
    """Value and gradient to 1e-6 of their Σ|terms|, in float32; both signs, ratios inside and outside the clip."""
    rng = rng if seed is None else np.random.default_rng(seed)
    low, high = 0.2, 0.3
    compiled = jax.jit(jax.value_and_grad(grpo_loss, has_aux=True))
    rows = 512  # one shape for every tree
    tried = sloping = 0
    while tried < 12:
        case = random_case(rng, monkeypatch)
        nodes = case["out"].nodes
        if not nodes.trainable.any() or len(nodes.size) > rows:
            continue
        tried += 1
        n = len(nodes.size)
        old = nodes.logp.astype("f")
        away = rng.choice([-0.6, -0.1, 0.0, 0.1, 0.6], n) + rng.uniform(-0.04, 0.04, n)  # not at the kinks
        logp = (old + away).astype("f")
        advantages = rng.normal(size=case["out"].success.shape)
        value, slope, count, magnitude, steepness = naive_loss(case, logp, advantages, low, high)
        positive, negative = signed_advantage_sums(advantages, nodes.group, nodes.leader, nodes.size)
        assert count == nodes.size[nodes.trainable].sum()  # the normaliser counts members: Σ_i |B_i|

        def padded(x):
            return np.concatenate([x, np.zeros(rows - len(x), x.dtype)])  # noqa: B023

        inputs = [padded(x) for x in (logp, old, positive, negative, nodes.trainable)]
        (got, _), gradient = compiled(*inputs, np.float32(count), low, high)
        assert abs(float(got) - value) < 1e-6 * magnitude
        difference = np.linalg.norm(np.asarray(gradient, float)[:n] - slope)
        assert difference <= 1e-6 * np.linalg.norm(steepness)
        sloping += np.linalg.norm(slope) > 0  # a small tree may have all of its terms clipped
        np.testing.assert_array_equal(gradient[n:], 0.0)
    assert sloping >= 6


def test_returns_of_collected_groups_are_those_of_members_played_alone(rng, monkeypatch):
    """d counts chunks up to the first, latched success: γ^d, the all-success rule and the filter, in plain Python."""
    rules = set()
    for number in range(2000):  # one group in a hundred is mixed
        if number >= 60 and rules == {"all", "mixed", "none"}:
            break
        case = random_case(rng, monkeypatch)
        out, discount = case["out"], 0.9
        returns = advantage.calibrated_return(out.success, out.chunks, discount)
        got = advantage.group_advantages(returns, out.success)
        kept = advantage.kept_groups(returns, 0.1, 0.8)
        for group, members in enumerate(case["alone"]):
            slow = [discount ** played["chunks"] if played["success"] else 0.0 for played in members]
            mean = sum(slow) / len(slow)
            if all(played["success"] for played in members):
                expected = [r - min(slow) for r in slow]
                rules.add("all")
            else:
                std = math.sqrt(sum((r - mean) ** 2 for r in slow) / len(slow))
                expected = [(r - mean) / (std + 1e-6) for r in slow]
                rules.add("mixed" if std else "none")
            np.testing.assert_allclose(got[group], expected, rtol=1e-9, atol=1e-9)
            assert kept[group] == (0.1 <= mean <= 0.8)
    assert rules == {"all", "mixed", "none"}
