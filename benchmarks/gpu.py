"""Speed and memory of decisions, the SFT step and the RL update on the accelerator that is there, in one call.

    python benchmarks/gpu.py                  # full-size π0.5 with random weights, under 7.5 minutes
    python benchmarks/gpu.py --preset tiny    # the same on anything, to see that it works
    python benchmarks/gpu.py --parts update sft_largest

Each part runs in a process of its own, with a time limit of its own: one that fails, as when memory runs out, is
reported and the others go on. A part compiles all its programs at once, one thread each, and then times them one after
the other. "plain" and "einsum" are what the other forms are compared with, in the same process.
Every number stands beside its floor, from the counts of z1_jax/plan/analytic.py and the table of accelerators. With
the variable OUT set to a folder, the lines also go to gpu.jsonl in it, as JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import kernels
from figures import result_line

# Parts in the order of their importance, with their limits in seconds.
PARTS = {"decision": 120, "update": 95, "graphs": 50, "no_graphs": 40, "batches": 100, "sft": 90, "sft_largest": 0}
DEFAULT = tuple(name for name, limit in PARTS.items() if limit)
FLAGS = {  # of XLA, for parts that differ in them alone
    "graphs": "--xla_gpu_enable_command_buffer=+WHILE",  # the loop over denoising steps within one CUDA graph
    "no_graphs": "--xla_gpu_enable_command_buffer=",
}
GOALS = {  # on an H200, for full-size π0.5
    "gpu/decision_3_cameras_batch_1_steps_10": ("ms", 16.0),
    "gpu/rl_update_batch_16_cached": ("ms", 55.0),
    "gpu/sft_batch_32_utilisation": ("fraction of peak", 0.60),
}
MINUTES = 7.5
REPEATS = 10
EVERY_STEP = {"sde_steps": "all", "noise_level": 0.5}  # noise in each denoising step


@dataclasses.dataclass(frozen=True)
class Form:
    """How a program computes: settings of `Compute`."""

    acting: str = "plain"
    attention: str = "einsum"
    remat: str = "full"

    def named(self, *keys: str) -> str:
        return ", ".join(getattr(self, key) for key in keys)


PLAIN, PREPARED, CUDNN = Form(), Form("prepared"), Form("prepared", "cudnn")


def main() -> None:
    """Runs the parts one after the other, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pi05", help="of z1_jax/models/presets.py (%(default)s)")
    parser.add_argument("--accelerator", default="", help="whose floors to show; default: the one that is there")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(DEFAULT))
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
        flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.get(part, '')}".strip()
        left = deadline - time.monotonic()
        limit = min(PARTS[part] or left, left)
        began = time.monotonic()
        try:
            code = subprocess.run(command, timeout=max(limit, 0.1), env={**os.environ, "XLA_FLAGS": flags}).returncode
            ended = f"failed (exit status {code}), see above" if code else "done"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {limit:.0f} s"
        print(f"{part}: {ended} after {time.monotonic() - began:.0f} s", flush=True)


class Bench:
    """One part: random weights on the device, functions of the training code, and a line for each number."""

    def __init__(self, arguments: argparse.Namespace):
        self.began = time.perf_counter()
        # Compiled anew: what a user waits for the first time. Threads and calls share it.
        os.environ["Z1_JAX_CACHE"] = tempfile.mkdtemp()
        import jax  # after the parent has started its children: it must not hold the device

        from z1_jax import sharding
        from z1_jax.models.presets import get_preset
        from z1_jax.plan import accelerators
        from z1_jax.process import start_jax

        start_jax()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self.device = jax.devices()[0]
        self.mesh = sharding.make_mesh(devices=[self.device])
        self.preset = arguments.preset
        self.model = get_preset(self.preset)
        self.on_gpu = self.device.platform == "gpu" and self.model.dtype == "bfloat16"
        known = accelerators.accelerator_of(self.device.device_kind)
        named = arguments.accelerator
        self.accelerator = accelerators.get_accelerator(named) if named else known
        self.attains_goals = self.preset == "pi05" and known is not None and known.name == "H200"

    def run(self, part: str) -> None:
        """Runs the part of that name, under the mesh."""
        import jax

        print(f"{part} on {self.device.device_kind}, preset {self.preset}, jax {jax.__version__}", flush=True)
        with jax.set_mesh(self.mesh):
            if part == "decision":
                self.decisions(((1, 3, 10), (1, 3, 5)), self.forms(PLAIN, PREPARED, CUDNN))
            elif part in FLAGS:
                self.decisions(((1, 3, 10),), self.forms(PREPARED, CUDNN), FLAGS[part])
            elif part == "batches":
                self.decisions(((8, 3, 10), (32, 3, 10), (1, 2, 10)), self.forms(PLAIN, PREPARED, CUDNN))
            elif part == "update":
                kinds = [Form(attention=a, remat=r) for a, r in (("einsum", "full"), ("cudnn", "full"))]
                self.update(self.forms(*kinds, Form(attention="cudnn", remat="none"), Form(remat="none")))
            elif part == "sft":
                self.sft(32, self.forms(Form(), Form(attention="cudnn")))
            else:
                self.largest_sft()

    def forms(self, *forms: Form) -> list[Form]:
        """Those that can run here."""
        return [form for form in forms if self.on_gpu or form.attention != "cudnn"]

    def with_form(self, form: Form) -> Any:
        """The model computing so."""
        return dataclasses.replace(self.model, **dataclasses.asdict(form))

    # --- decisions ---------------------------------------------------------------------------------------------------

    def decisions(self, sizes: tuple[tuple[int, int, int], ...], forms: list[Form], flags: str = "") -> None:
        """Decisions as rollouts make them: NumPy observations in, NumPy actions out. Sizes: (batch, cameras, K)."""
        import numpy as np

        from z1_jax.config.schema import Config, FlowConfig
        from z1_jax.plan import analytic, programs
        from z1_jax.rl.actor import make_actor

        policy = programs.abstract_policy(Config(), self.model, self.mesh)
        graphdef, trainable, frozen = policy.split("expert")
        params = self.filled((trainable, frozen))
        actors, jobs = {}, {}
        for form in forms:
            acting = dataclasses.replace(policy.with_compute(form.remat, form.attention, form.acting))
            graphdef, *_ = acting.split("expert")
            for batch, cameras, steps in sizes:
                cameras = min(cameras, self.model.cameras)
                flow = FlowConfig(steps=steps, **EVERY_STEP)
                actor = actors[form, batch, cameras, steps] = make_actor(acting, graphdef, flow, self.mesh, batch)
                looks = programs.abstract_observation(self.model, batch, self.mesh, cameras)
                cache = programs.abstract_cache(self.model, batch, self.mesh, cameras)
                noise = programs.abstract_noise(self.model, batch, steps, self.mesh)
                shapes = (trainable, frozen)
                name = f"{form.named('acting', 'attention')}, {cameras} cameras, batch {batch}"
                jobs[f"encode {name}"] = actor.trace_encode(shapes, looks)
                jobs[f"denoise {name}, K = {steps}"] = actor.trace_sample(shapes, cache, *noise)
        counted = self.compile(jobs)
        expected: dict[Any, Any] = {}
        for (form, batch, cameras, steps), actor in actors.items():
            looks, ids = self.observation(batch, cameras), np.arange(batch)[:, None, None]

            def decide(actor: Any = actor, looks: Any = looks, ids: Any = ids) -> Any:
                cache, _ = actor.encode(params, looks)
                return actor.sample(params, cache, ids, (0,), False).x[:, :, -1]

            work = analytic.decision_work(self.model, batch, steps, cameras)
            name = f"{form.named('acting', 'attention')}, {cameras} cameras, batch {batch}"
            launched = counted.get(f"encode {name}", 0) + counted.get(f"denoise {name}, K = {steps}", 0)
            actions = decide()
            reference = expected.setdefault((batch, cameras, steps), actions)
            apart = float(np.linalg.norm(actions - reference) / np.linalg.norm(reference))
            self.measure(
                f"gpu/decision_{cameras}_cameras_batch_{batch}_steps_{steps}",
                decide,
                self.decision_floor(work, batch, cameras),
                acting=form.acting,
                attention=form.attention,
                kernels=launched,
                apart_from_first_form=apart,
                flags=flags,
            )

    def decision_floor(self, work: Any, batch: int, cameras: int) -> float | None:
        from z1_jax.plan import analytic

        if self.accelerator is None:
            return None
        prefix = batch * analytic.prefix_flops(self.model, cameras)
        denoising = self.accelerator.compute_ms(work.flops - prefix), self.accelerator.memory_ms(work.weight_bytes)
        return self.accelerator.compute_ms(prefix) + max(denoising)

    # --- training ----------------------------------------------------------------------------------------------------

    def update(self, forms: list[Form]) -> None:
        """The update of the expert on 16 nodes of 10 steps with the prefix cache."""
        import jax
        import numpy as np

        from z1_jax.config.schema import FlowConfig, OptimConfig, UpdateConfig
        from z1_jax.models.pi05 import count_parameters
        from z1_jax.optim import init_optimizer, make_optimizer
        from z1_jax.plan import analytic, programs
        from z1_jax.rl import loss
        from z1_jax.rl.update import Updater

        batch, steps = 16, 10
        abstract = programs.abstract_policy(self.schema(), self.model, self.mesh)
        optimizer = make_optimizer(OptimConfig(), 1e-6)
        config = UpdateConfig(batch_size=batch, micro_batch=batch)
        node_loss = loss.grpo(config.clip_low, config.clip_high, config.ratio_max)
        counted = np.ones((self.model.horizon, self.model.action_dim), bool)
        shapes = abstract.split("expert")[1:]
        nodes = programs.abstract_nodes(self.model, batch, steps, self.mesh, cached=True)
        updaters = {}
        for form in forms:
            graphdef, *_ = abstract.with_compute(form.remat, form.attention).split("expert")
            flow = FlowConfig(steps=steps, **EVERY_STEP)
            updaters[form] = Updater(graphdef, optimizer, node_loss, flow, config, counted, self.mesh)
        opt_shapes = init_optimizer(optimizer, shapes[0], self.mesh)
        jobs = {
            f"update {form.named('attention', 'remat')}": updater.trace(shapes[0], opt_shapes, shapes[1], nodes)
            for form, updater in updaters.items()
        }
        counts = self.compile(jobs)
        trainable, frozen = self.filled(shapes)
        state = [trainable, init_optimizer(optimizer, trainable, self.mesh)]
        del trainable
        rng = np.random.default_rng(0)
        batch_of_nodes = jax.tree.map(
            lambda x: np.ones(x.shape, x.dtype) if x.dtype != np.float32 else rng.standard_normal(x.shape, np.float32),
            nodes,
        )
        batch_of_nodes = updaters[forms[0]].place(batch_of_nodes)
        work = analytic.training_work(
            self.model, batch, steps, trainable=count_parameters(shapes[0]), encoded=False, trains_vlm=False
        )
        for form, updater in updaters.items():

            def step(updater: Any = updater) -> None:
                state[0], state[1], launched = updater.launch(state[0], state[1], frozen, batch_of_nodes, 1.0)
                jax.block_until_ready(launched.stats)

            self.measure(
                "gpu/rl_update_batch_16_cached",
                step,
                self.step_floor(work),
                attention=form.attention,
                remat=form.remat,
                kernels=counts.get(f"update {form.named('attention', 'remat')}"),
            )

    def sft(self, batch: int, forms: list[Form]) -> None:
        """The optimiser step, everything trained; the forms take the state over from each other."""
        import jax

        from z1_jax.config.schema import SftConfig
        from z1_jax.models.pi05 import count_parameters
        from z1_jax.plan import analytic, programs
        from z1_jax.sft import SftTrainer

        abstract = programs.abstract_policy(self.schema(), self.model, self.mesh)
        config = SftConfig(flows=1, batch_size=batch)
        shape = (batch, self.model.horizon, self.model.action_dim)
        actions = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding_of_rows(self.mesh))
        looks = programs.abstract_observation(self.model, batch, self.mesh)
        trainers = {
            form: SftTrainer(abstract.with_compute(form.remat, form.attention), config, 0, self.mesh) for form in forms
        }
        traced = {f"sft {f.named('attention', 'remat')}": t.trace(looks, actions) for f, t in trainers.items()}
        counts = self.compile(traced)
        state = self.filled(trainers[forms[0]].state)
        seen = self.observation(batch, self.model.cameras)
        data = {
            "images": seen.images,
            "image_mask": seen.image_mask,
            "tokens": seen.tokens,
            "token_mask": seen.token_mask,
            "actions": self.random(shape),
        }
        work = analytic.training_work(
            self.model, batch, 1, trainable=count_parameters(abstract.params), encoded=True, trains_vlm=True
        )
        for form, trainer in trainers.items():
            trainer.state, state = state, None
            how = {"attention": form.attention, "remat": form.remat}
            launched = counts.get(f"sft {form.named('attention', 'remat')}")

            def step(trainer: Any = trainer) -> None:
                jax.block_until_ready(trainer.step(data, 0))

            name = f"gpu/sft_batch_{batch}"
            took = self.measure(name, step, self.step_floor(work), repeats=5, kernels=launched, **how)
            if self.accelerator is not None:
                used = work.flops / (took * 1e9 * self.accelerator.tflops)
                self.result(f"{name}_utilisation", used, "fraction of peak", 1.0, 1, [used, used], higher=True, **how)
            state, trainer.state = trainer.state, None  # type: ignore[assignment]

    def largest_sft(self) -> None:
        """The SFT step at the first of these batches that fits."""
        for batch in (256, 128, 64, 48, 16, 8, 4, 2, 1):
            try:
                return self.sft(batch, self.forms(Form(attention="cudnn" if self.on_gpu else "einsum")))
            except Exception as error:  # XLA says that memory ran out by a general exception
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"  batch {batch}: out of memory", flush=True)

    def step_floor(self, work: Any) -> float | None:
        if self.accelerator is None:
            return None
        return self.accelerator.compute_ms(work.flops) + self.accelerator.memory_ms(work.optimizer_bytes)

    # --- what all parts need -----------------------------------------------------------------------------------------

    def schema(self) -> Any:
        from z1_jax.config.schema import Config

        return Config()

    def compile(self, jobs: dict[str, Any]) -> dict[str, float]:
        """Compiles traced programs, one thread each; returns the kernels of each that they launch."""
        began = time.perf_counter()
        counts: dict[str, float] = {}

        def one(job: tuple[str, Any]) -> tuple[str, float, Any]:
            began = time.perf_counter()
            compiled = job[1].lower().compile()
            return job[0], time.perf_counter() - began, compiled

        lowered = {text: job for job, text in ((job, job[0]) for job in jobs.items())}
        with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
            for name, seconds, compiled in pool.map(one, lowered.values()):
                temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
                try:
                    counts[name] = kernels.count(compiled.as_text(), rule=False).kernels
                except Exception as error:  # a loop whose trips XLA does not tell, say: the timing matters more
                    print(f"  {name}: not counted ({type(error).__name__}: {error})"[:200], flush=True)
                launched = f"{counts.get(name, 0):,.0f} kernels in its module"
                print(
                    f"  {name}: {seconds:.0f} s to compile, {launched}, {temporary / 1e6:,.0f} MB temporary", flush=True
                )
        took, since = time.perf_counter() - began, time.perf_counter() - self.began
        print(f"  {len(jobs)} programs compiled in {took:.0f} s, {since:.0f} s since the start", flush=True)
        return counts

    def filled(self, tree: Any) -> Any:
        """Small random numbers in place of shapes, made on the device; integers are 0, small numbers positive."""
        import jax
        import jax.numpy as jnp

        leaves, structure = jax.tree.flatten(tree)

        def fill(key: Any) -> list[Any]:
            keys = jax.random.split(key, len(leaves))
            pairs = zip(keys, leaves, strict=True)
            drawn = [(x, 0.02 * jax.random.normal(k, x.shape, jnp.bfloat16)) for k, x in pairs]
            return [(jnp.abs(value) if x.size == 1 else value).astype(x.dtype) for x, value in drawn]

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

    def measure(
        self, name: str, function: Callable[[], Any], floor_ms: float | None, repeats: int = REPEATS, **how: Any
    ) -> float:
        """Times a call that waits for its result; prints and returns the median in milliseconds."""
        began = time.perf_counter()
        function()
        first_s = time.perf_counter() - began
        function()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        median = statistics.median(times)
        floor = f"floor {floor_ms:.2f} ms, {median / floor_ms:.2f}×" if floor_ms else "no floor: give --accelerator"
        memory = (self.device.memory_stats() or {}).get("peak_bytes_in_use")
        peak = f"{memory / 1e9:.2f} GB peak" if memory else "memory not told"
        form = ", ".join(str(value) for value in how.values() if isinstance(value, str) and value)
        print(f"  {name} ({form}): {median:.2f} ms  {floor}, {peak}, first call {first_s:.1f} s", flush=True)
        self.result(name, median, "ms", floor_ms, repeats, [min(times), max(times)], memory=memory, **how)
        return median

    def result(
        self, name: str, value: float, unit: str, baseline: float | None, n: int, spread: list[float], **more: Any
    ) -> None:
        """One RESULT line; a goal counts only on the machine and for the model that it was set for."""
        goal = GOALS[name][1] if self.attains_goals and name in GOALS else None
        higher = more.pop("higher", False)
        met = None if goal is None else (value >= goal if higher else value <= goal)
        facts = {
            "device": self.device.device_kind,
            "preset": self.preset,
            "peak_bytes": more.pop("memory", None),
            **more,
        }
        line = result_line(name, value, unit, baseline=baseline, goal=goal, met=met, n=n, spread=spread, **facts)
        print(line, flush=True)
        if folder := os.environ.get("OUT"):
            with (pathlib.Path(folder) / "gpu.jsonl").open("a") as file:
                file.write(json.dumps(json.loads(line.removeprefix("RESULT "))) + "\n")


def sharding_of_rows(mesh: Any) -> Any:
    """Of arrays whose first dimension is the batch."""
    from z1_jax.sharding import batch_sharding

    return batch_sharding(mesh)


if __name__ == "__main__":
    main()
