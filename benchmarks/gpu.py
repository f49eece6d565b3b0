"""Speed and memory of the sampler, the SFT step and the RL update on the accelerator that is there, in one call.

    python benchmarks/gpu.py                  # full-size π0.5 with random weights, under 9 minutes
    python benchmarks/gpu.py --preset tiny    # the same on anything, to see that it works
    python benchmarks/gpu.py --parts sampler_3_cameras --batches 1 --attention cudnn

Each part runs in a process of its own: one that fails, as when memory runs out, is reported and the others go on.
Every number stands beside its floor, from the counts of z1_jax/analytic.py and the table of z1_jax/accelerators.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from figures import result_line

from z1_jax.models.choices import ATTENTION

BATCHES = (1, 8, 32)
PARTS = ("sampler_3_cameras", "sft_batch_32", "rl_update", "sampler_2_cameras", "sft_largest")  # what has goals first
GOALS = {  # on an H200, for full-size π0.5
    "gpu/decision_3_cameras_batch_1_steps_10": ("ms", 16.0),
    "gpu/sft_batch_32_utilisation": ("fraction of peak", 0.45),
}
MINUTES = 9.0
REPEATS = 10
EVERY_STEP = {"sde_steps": "all", "noise_level": 0.5}  # noise in each denoising step


def main() -> None:
    """Runs the parts one after the other, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pi05", help="of z1_jax/models/presets.py (%(default)s)")
    parser.add_argument("--accelerator", default="", help="whose floors to show; default: the one that is there")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="of the samplers (%(default)s)")
    parser.add_argument("--attention", choices=ATTENTION, default=ATTENTION[0], help="(%(default)s)")
    parser.add_argument("--unroll", action="store_true", help="write the layers out instead of looping over them")
    parser.add_argument("--here", action="store_true", help="run the parts in this process")
    arguments = parser.parse_args()
    if arguments.here:
        for part in arguments.parts:
            Bench(arguments).run(part)
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    for part in arguments.parts:
        # What comes later takes the place of what came before.
        command = [sys.executable, __file__, *sys.argv[1:], "--here", "--parts", part]
        try:
            code = subprocess.run(command, timeout=max(deadline - time.monotonic(), 0.1)).returncode
            if code:
                print(f"{part}: failed (exit status {code}), see above", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, the {arguments.minutes:g} minutes are over", flush=True)


class Bench:
    """One part: random weights on the device, functions of the training code, and a line for each number."""

    def __init__(self, arguments: argparse.Namespace):
        import jax  # after the parent has started its children: it must not hold the device

        from z1_jax import sharding
        from z1_jax.models.presets import get_preset
        from z1_jax.plan import accelerators
        from z1_jax.process import start_jax

        start_jax()
        self.device = jax.devices()[0]
        self.mesh = sharding.make_mesh(devices=[self.device])
        self.preset, self.batches, self.attention = arguments.preset, arguments.batches, arguments.attention
        settings = {"remat": "full", "attention": arguments.attention, "unroll": arguments.unroll}
        self.model = get_preset(self.preset, **settings)
        known = accelerators.accelerator_of(self.device.device_kind)
        named = arguments.accelerator
        self.accelerator = accelerators.get_accelerator(named) if named else known
        self.attains_goals = self.preset == "pi05" and known is not None and known.name == "H200"

    def run(self, part: str) -> None:
        """Runs the part of that name, under the mesh."""
        import jax

        how = f"preset {self.preset}, attention {self.attention}" + ", layers written out" * self.model.unroll
        print(f"{part} on {self.device.device_kind}, {how}", flush=True)
        with jax.set_mesh(self.mesh):
            if part.startswith("sampler"):
                self.sampler(int(part.split("_")[1]))
            elif part == "rl_update":
                self.rl_update()
            elif part == "sft_batch_32":
                self.sft([32])
            else:
                self.sft([256, 128, 64, 48, 16, 8, 4, 2, 1])

    def sampler(self, cameras: int) -> None:
        """A decision as the rollout makes it: NumPy observations in, NumPy actions out, ODE."""
        import numpy as np

        from z1_jax.config.schema import FlowConfig
        from z1_jax.plan import analytic
        from z1_jax.rl.actor import make_actor

        cameras = min(cameras, self.model.cameras)
        policy = self.policy()
        graphdef, trainable, frozen = policy.split("expert")
        params = self.filled((trainable, frozen))
        for batch in self.batches:
            actors = {
                steps: make_actor(policy, graphdef, FlowConfig(steps=steps, **EVERY_STEP), self.mesh, batch)
                for steps in (10, 5)
            }
            looks, ids = self.observation(batch, cameras), np.arange(batch)[:, None, None]
            for steps, actor in actors.items():
                # All encode alike: one is compiled.
                def decide(encode: Any = actors[10].encode, actor: Any = actor, looks: Any = looks, ids: Any = ids):
                    cache, _ = encode(params, looks)
                    return actor.sample(params, cache, ids, (0,), False).x

                work = analytic.decision_work(self.model, batch, steps, cameras)
                name = f"gpu/decision_{cameras}_cameras_batch_{batch}_steps_{steps}"
                self.measure(name, decide, self.decision_floor(work, batch, cameras))

    def decision_floor(self, work: Any, batch: int, cameras: int) -> float | None:
        from z1_jax.plan import analytic

        if self.accelerator is None:
            return None
        prefix = batch * analytic.prefix_flops(self.model, cameras)
        denoising = self.accelerator.compute_ms(work.flops - prefix), self.accelerator.memory_ms(work.weight_bytes)
        return self.accelerator.compute_ms(prefix) + max(denoising)

    def sft(self, batches: list[int]) -> None:
        """The optimiser step, everything trained, at the first of these batches that fits."""
        import jax

        from z1_jax.config.schema import SftConfig
        from z1_jax.models.pi05 import count_parameters
        from z1_jax.plan import analytic
        from z1_jax.sft import SftTrainer

        policy = self.policy()
        for batch in batches:
            try:
                whole = dataclasses.replace(policy, params=self.filled(policy.params))
                trainer = SftTrainer(whole, SftConfig(flows=1, batch_size=batch), 0, self.mesh)
                del whole
                looks = self.observation(batch, self.model.cameras)
                data = {
                    "images": looks.images,
                    "image_mask": looks.image_mask,
                    "tokens": looks.tokens,
                    "token_mask": looks.token_mask,
                    "actions": self.random((batch, self.model.horizon, self.model.action_dim)),
                }
                step = lambda trainer=trainer, data=data: jax.block_until_ready(trainer.step(data, 0))  # noqa: E731
                work = analytic.training_work(
                    self.model,
                    batch,
                    1,
                    trainable=count_parameters(policy.params),
                    encoded=True,
                    trains_vlm=True,
                )
                name = f"gpu/sft_batch_{batch}"
                took = self.measure(name, step, self.step_floor(work))
                if self.accelerator is not None:
                    used = work.flops / (took * 1e9 * self.accelerator.tflops)
                    self.result(f"{name}_utilisation", used, "fraction of peak", 1.0, 1, [used, used], higher=True)
                return
            except Exception as error:  # XLA says that memory ran out by a general exception
                if "RESOURCE_EXHAUSTED" not in str(error) or len(batches) == 1:
                    raise
                print(f"  batch {batch}: out of memory", flush=True)
                trainer = step = None

    def rl_update(self) -> None:
        """The update of the expert on 16 nodes of 10 steps, with the prefix cache and with observations."""
        import jax
        import numpy as np

        from z1_jax.config.schema import FlowConfig, OptimConfig, UpdateConfig
        from z1_jax.models.pi05 import count_parameters
        from z1_jax.optim import init_optimizer, make_optimizer
        from z1_jax.plan import analytic
        from z1_jax.plan.programs import abstract_nodes
        from z1_jax.rl import loss
        from z1_jax.rl.update import Updater

        policy, batch, steps = self.policy(), 16, 10
        graphdef, *abstract = policy.split("expert")
        trainable, frozen = self.filled(tuple(abstract))
        optimizer = make_optimizer(OptimConfig(), 1e-6)
        opt_state = init_optimizer(optimizer, trainable, self.mesh)
        counted = np.ones((self.model.horizon, self.model.action_dim), bool)
        config = UpdateConfig(batch_size=batch, micro_batch=batch)
        node_loss = loss.grpo(config.clip_low, config.clip_high, config.ratio_max)
        for cached in (True, False):
            flow = FlowConfig(steps=steps, **EVERY_STEP)
            updater = Updater(graphdef, optimizer, node_loss, flow, config, counted, self.mesh)
            nodes = abstract_nodes(self.model, batch, steps, self.mesh, cached=cached)
            nodes = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), nodes)
            state = [trainable, opt_state]

            def update(updater: Any = updater, nodes: Any = nodes, state: Any = state) -> None:
                state[0], state[1], _ = updater.step(state[0], state[1], frozen, nodes, 1.0)

            work = analytic.training_work(
                self.model, batch, steps, trainable=count_parameters(trainable), encoded=not cached, trains_vlm=False
            )
            self.measure(f"gpu/rl_update_batch_16_{'cached' if cached else 'encoded'}", update, self.step_floor(work))
            trainable, opt_state = state

    def step_floor(self, work: Any) -> float | None:
        if self.accelerator is None:
            return None
        return self.accelerator.compute_ms(work.flops) + self.accelerator.memory_ms(work.optimizer_bytes)

    def policy(self) -> Any:
        """A policy of shapes."""
        from z1_jax.config.schema import Config
        from z1_jax.plan.programs import abstract_policy

        return abstract_policy(Config(), self.model, self.mesh)

    def filled(self, tree: Any) -> Any:
        """Small random numbers in place of shapes, made on the device."""
        import jax
        import jax.numpy as jnp

        leaves, structure = jax.tree.flatten(tree)

        def fill(key: Any) -> list[Any]:
            keys = jax.random.split(key, len(leaves))
            pairs = zip(keys, leaves, strict=True)
            return [0.02 * jax.random.normal(k, x.shape, jnp.bfloat16).astype(x.dtype) for k, x in pairs]

        made = jax.jit(fill, out_shardings=[x.sharding for x in leaves])(jax.random.key(0, impl="rbg"))
        return jax.tree.unflatten(structure, made)

    def observation(self, batch: int, cameras: int) -> Any:
        """A NumPy batch of full prompts and noise images."""
        import numpy as np

        from z1_jax.types import Observation

        size, length = self.model.vision.image_size, self.model.prompt_length
        rng = np.random.default_rng(0)
        return Observation(
            images=rng.integers(0, 256, (batch, cameras, size, size, 3), np.uint8),
            image_mask=np.ones((batch, cameras), bool),
            tokens=rng.integers(0, self.model.vocab_size, (batch, length), np.int32),
            token_mask=np.ones((batch, length), bool),
        )

    def random(self, shape: tuple[int, ...]) -> Any:
        import numpy as np

        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def measure(self, name: str, function: Callable[[], Any], floor_ms: float | None) -> float:
        """Times a call that waits for its result; prints and returns the median in milliseconds."""
        began = time.perf_counter()
        function()
        first_s = time.perf_counter() - began
        function()
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        median = statistics.median(times)
        floor = f"floor {floor_ms:.2f} ms, {median / floor_ms:.2f}×" if floor_ms else "no floor: give --accelerator"
        memory = (self.device.memory_stats() or {}).get("peak_bytes_in_use")
        peak = f"{memory / 1e9:.2f} GB peak" if memory else "memory not told"
        print(f"  {name:45} {median:10.2f} ms  {floor}, {peak}, first call {first_s:.1f} s", flush=True)
        self.result(name, median, "ms", floor_ms, REPEATS, [min(times), max(times)], memory=memory)
        return median

    def result(
        self, name: str, value: float, unit: str, baseline: float | None, n: int, spread: list[float], **more: Any
    ) -> None:
        """One RESULT line; a goal counts only on the machine and for the model that it was set for."""
        goal = GOALS[name][1] if self.attains_goals and name in GOALS else None
        higher = more.pop("higher", False)
        met = None if goal is None else (value >= goal if higher else value <= goal)
        facts = {"device": self.device.device_kind, "preset": self.preset, "peak_bytes": more.get("memory")}
        facts |= {"attention": self.attention, "unroll": self.model.unroll}
        line = result_line(name, value, unit, baseline=baseline, goal=goal, met=met, n=n, spread=spread, **facts)
        print(line, flush=True)


if __name__ == "__main__":
    main()
