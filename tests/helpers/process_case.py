"""One process of several that train the tiny policy: python process_case.py CASES MESH OUT [--coordinator=… …].

CASES, joined by +: sft (20 steps on random batches), its first_half and second_half (with a checkpoint between them),
grpo (3 updates on the rollouts that one process left in OUT). MESH: DATAxFSDP. Writes OUT/CASE-P.npz, P the number of
processes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import sys

import jax
import numpy as np

from z1_jax import distributed, processes, sharding

SEED = 7


def policy_on(mesh: jax.sharding.Mesh):
    """The tiny policy with numbers in every parameter, on a mesh."""
    import tiny_policy as tiny

    fresh = tiny.fresh_policy(tiny.CONFIG, tiny.processor(), 0, mesh, executed=8, denoising_steps=4)
    rng = np.random.default_rng(0)

    def perturbed(x: jax.Array) -> jax.Array:
        return x + sharding.place(0.1 * rng.standard_normal(x.shape, "f"), x.sharding)

    return fresh.with_params(jax.tree.map(perturbed, fresh.params))


def first_half(mesh: jax.sharding.Mesh, out: pathlib.Path):
    """The first ten steps of `sft`, and a checkpoint."""
    return sft(mesh, out, range(10), save=True)


def second_half(mesh: jax.sharding.Mesh, out: pathlib.Path):
    """The last ten steps, from the checkpoint of `first_half`, however many processes wrote it."""
    return sft(mesh, out, range(10, 20))


def sft(mesh: jax.sharding.Mesh, out: pathlib.Path, steps: range = range(20), save: bool = False):
    import tiny_policy as tiny

    from z1_jax.checkpoint import Checkpoints
    from z1_jax.config.schema import OptimConfig, SftConfig
    from z1_jax.sft import SftTrainer

    config = SftConfig(
        steps=20, batch_size=8, flows=2, ema=0.0, augment=True, optim=OptimConfig(lr=1e-3, warmup_steps=2)
    )
    trainer = SftTrainer(policy_on(mesh), config, SEED, mesh)
    if steps.start:
        step, trainer.state, document = trainer.state.restored(Checkpoints(out / "checkpoints"))
        assert (step, document) == (10, {"processes": "any"})
    part, parts = distributed.share_of_batch(mesh)
    rng, losses = np.random.default_rng(SEED), []
    for step in range(config.steps):
        size, model = config.batch_size, tiny.CONFIG
        batch = {
            "images": rng.integers(0, 255, (size, 1, tiny.PIXELS, tiny.PIXELS, 3), np.uint8),
            "image_mask": np.ones((size, 1), bool),
            "tokens": rng.integers(0, model.vocab_size, (size, model.prompt_length)).astype(np.int32),
            "token_mask": np.arange(model.prompt_length)[None] < rng.integers(4, model.prompt_length, (size, 1)),
            "actions": rng.standard_normal((size, model.horizon, model.action_dim), np.float32),
        }
        mine = {key: np.split(value, parts)[part] for key, value in batch.items()}
        if step in steps:
            losses.append(float(trainer.step(mine, step)["loss"]))
    if save:
        checkpoints = Checkpoints(out / "checkpoints")
        checkpoints.save(10, trainer.state.parts(trainer.policy()), {"processes": "any"})
        checkpoints.close()
    return trainer.policy(), np.array(losses)


def own_part(whole, part: int, parts: int):
    """One process's groups of another run's rollouts, uneven on purpose; their numbers."""
    count = len(whole.episodes)
    groups = np.arange(part, count, parts) if count <= parts else np.arange(count)[part + (part > 0) :: parts]
    if parts == 2:
        groups = np.arange(count - 1) if part == 0 else np.array([count - 1])
    nodes = whole.nodes
    mine = np.flatnonzero(np.isin(nodes.group, groups))
    looks, look = np.unique(nodes.look[mine], return_inverse=True)
    table = {f.name: getattr(nodes, f.name)[mine] for f in dataclasses.fields(nodes)}
    table |= {"group": np.searchsorted(groups, table["group"]), "look": look}
    from z1_jax.rl.prefix_cache import PrefixStore

    caches = None if whole.caches is None else PrefixStore([(whole.caches.take(looks), len(looks))])
    outcome = {name: getattr(whole, name)[groups] for name in ("success", "unstable", "chunks", "steps")}
    return groups.tolist(), dataclasses.replace(
        whole,
        episodes=tuple(whole.episodes[group] for group in groups),
        nodes=dataclasses.replace(nodes, **table),
        looks=jax.tree.map(lambda x: x[looks], whole.looks),
        caches=caches,
        **outcome,
    )


def grpo(mesh: jax.sharding.Mesh, out: pathlib.Path):
    """Alone: collects, updates and keeps the rollouts. With others: updates on those that one process has kept."""
    import tiny_grpo
    import tiny_policy as tiny

    from z1_jax.rl import shares
    from z1_jax.rl.trainer import GrpoTrainer

    placement = (out / "placement").read_text() if (out / "placement").exists() else "recompute"
    update = dataclasses.replace(tiny_grpo.CONFIG.update, prefix_cache=placement, micro_batch=4, kl_coef=0.01)
    config = dataclasses.replace(tiny_grpo.CONFIG, seed=SEED, update=update)
    trainer = GrpoTrainer(policy_on(mesh), config, mesh, 16 // processes.count())
    losses = []
    for iteration in range(3):
        kept = out / f"rollouts-{iteration}.pkl"
        if processes.count() == 1:
            rollouts = trainer.collect(tiny.pool(16), iteration)
            kept.write_bytes(pickle.dumps(rollouts))
        else:
            whole = pickle.loads(kept.read_bytes())
            groups, mine = own_part(whole, processes.index(), processes.count())
            rollouts = shares.merged(mine, groups, [0] * len(whole.episodes))
            for field in dataclasses.fields(whole.nodes):
                if field.name not in ("x", "look"):
                    one, other = getattr(whole.nodes, field.name), getattr(rollouts.nodes, field.name)
                    np.testing.assert_array_equal(one, other, err_msg=field.name)
        stats = trainer.update(rollouts, iteration)
        assert stats["ratio/first_update_max_error"] < 1e-4  # rounding alone, so it is not compared itself
        losses.append([stats[key] for key in ("loss", "looks", "tokens/encoded")])
    return trainer.policy(), np.array(losses)


CASES = {"sft": sft, "grpo": grpo, "first_half": first_half, "second_half": second_half}


def run(case: str, mesh: jax.sharding.Mesh, out: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters by name, and under "told" what the case says."""
    from z1_jax.policy import named

    with jax.set_mesh(mesh):
        policy, told = CASES[case](mesh, out)
        return {"told": told, **{name: distributed.whole(leaf) for name, leaf in named(policy.params).items()}}


def main() -> None:
    argv = processes.join(sys.argv)
    data, fsdp = map(int, argv[2].split("x"))
    mesh, out = sharding.make_mesh(data, fsdp), pathlib.Path(argv[3])
    distributed.connect(mesh)
    for case in argv[1].split("+"):
        found = run(case, mesh, out)
        if processes.leads():
            np.savez(out / f"{case}-{processes.count()}.npz", **found)
    processes.depart()


if __name__ == "__main__":
    main()
