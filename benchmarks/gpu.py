"""Speed and memory of decisions, the SFT step and the RL update on the accelerator that is there, in one call.

    python benchmarks/gpu.py                  # full-size π0.5 with random weights, under 9 minutes
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
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import kernels
from figures import result_line

# Parts in the order of their importance, with their limits in seconds.
PARTS = {"decision": 150, "update": 95, "batches": 130, "sft": 150, "sft_largest": 0}
DEFAULT = tuple(name for name, limit in PARTS.items() if limit)
# What XLA puts into CUDA graphs: its own choice leaves loops out.
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
GRAPHS = {
    "usual": {},
    "loop": {"xla_gpu_enable_command_buffer": f"{_GRAPHS},WHILE"},
    "none": {"xla_gpu_enable_command_buffer": ""},
}
GOALS = {  # on an H200, for full-size π0.5
    "gpu/decision_3_cameras_batch_1_steps_10": ("ms", 16.0),
    "gpu/rl_update_batch_16_cached": ("ms", 55.0),
    "gpu/sft_batch_32_utilisation": ("fraction of peak", 0.60),
}
MINUTES = 9.0
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
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's limit (%(default)s)")
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
        left = deadline - time.monotonic()
        limit = min(arguments.patience * PARTS[part] or left, left)
        began = time.monotonic()
        try:
            code = subprocess.run(command, timeout=max(limit, 0.1)).returncode
            ended = f"failed (exit status {code}), see above" if code else "done"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {limit:.0f} s"
        print(f"{part}: {ended} after {time.monotonic() - began:.0f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a decision."""

    batch: int
    cameras: int
    steps: int

    def __str__(self) -> str:
        return f"{self.cameras}_cameras_batch_{self.batch}_steps_{self.steps}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A traced program, to be compiled with options of XLA."""

    traced: Any
    options: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Made:
    """A compiled program and the kernels that its module launches."""

    function: Any
    kernels: float


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
                usual, half = Size(1, 3, 10), Size(1, 3, 5)
                wanted = [(form, usual) for form in (PLAIN, PREPARED, CUDNN)] + [(PLAIN, half), (PREPARED, half)]
                self.decisions(wanted, apart=True)
            elif part == "batches":
                sizes = Size(8, 3, 10), Size(32, 3, 10), Size(1, 2, 10)
                self.decisions([(form, size) for size in sizes for form in (PLAIN, PREPARED)])
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

    # --- decisions ---------------------------------------------------------------------------------------------------

    def decisions(self, wanted: list[tuple[Form, Size]], apart: bool = False) -> None:
        """Decisions as rollouts make them: NumPy observations in, NumPy actions out, ODE.

        `apart`: the halves of a decision too, and other CUDA graphs.
        """
        wanted = [(form, size) for form, size in wanted if form in self.forms(form)]
        policy = self.policy()
        params = self.filled(policy.split("expert")[1:])
        halves, jobs = {}, {}
        for form, size in wanted:
            with self.reported(f"{form}, {size}"):
                half = Halves(self, policy, form, size)
                graphs = GRAPHS if apart and size.steps == 10 and form != PLAIN else {"usual": {}}
                jobs |= half.jobs(graphs, jobs)
                halves[form, size] = half
        compiled = self.compile(jobs)
        expected: dict[Size, Any] = {}
        for (form, size), half in halves.items():
            with self.reported(f"{form}, {size}"):
                self.decision(form, size, half, params, compiled, expected, apart)

    def decision(
        self,
        form: Form,
        size: Size,
        half: Halves,
        params: Any,
        compiled: dict[str, Made],
        expected: dict[Size, Any],
        apart: bool,
    ) -> None:
        """Times one form at one size; `expected` holds the actions of the first form of each size."""
        import numpy as np

        def decide() -> Any:
            return half.decide(params)

        half.use(compiled)
        actions = decide()  # prepares the parameters
        reference = expected.setdefault(size, actions)
        error = float(np.linalg.norm(actions - reference) / np.linalg.norm(reference))
        how = {"acting": form.acting, "attention": form.attention}
        launched = sum(compiled[name].kernels for name in half.names())
        facts = {"kernels": launched, "apart_from_first_form": error}
        self.measure(f"gpu/decision_{size}", decide, self.decision_floor(size), **how, **facts)
        if apart and size.steps == 10:
            for name, call in half.calls(params, compiled):
                with self.reported(name):
                    self.measure(f"gpu/{name}", call, None, **how, kernels=compiled[name].kernels)

    def decision_floor(self, size: Size) -> float | None:
        from z1_jax.plan import analytic

        if self.accelerator is None:
            return None
        work = analytic.decision_work(self.model, size.batch, size.steps, size.cameras)
        prefix = size.batch * analytic.prefix_flops(self.model, size.cameras)
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
        abstract = self.policy()
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
            f"update {form.named('attention', 'remat')}": Job(updater.trace(shapes[0], opt_shapes, shapes[1], nodes))
            for form, updater in updaters.items()
        }
        compiled = self.compile(jobs)
        trainable, frozen = self.filled(shapes)
        state = [trainable, init_optimizer(optimizer, trainable, self.mesh)]
        del trainable
        placed = updaters[forms[0]].place(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), nodes))
        work = analytic.training_work(
            self.model, batch, steps, trainable=count_parameters(shapes[0]), encoded=False, trains_vlm=False
        )
        for form, updater in updaters.items():
            name = f"update {form.named('attention', 'remat')}"

            def step(updater: Any = updater) -> None:
                state[0], state[1], launched = updater.launch(state[0], state[1], frozen, placed, 1.0)
                jax.block_until_ready(launched.stats)

            how = {"attention": form.attention, "remat": form.remat}
            with self.reported(name):
                updater._step = compiled[name].function
                self.measure(
                    "gpu/rl_update_batch_16_cached", step, self.step_floor(work), **how, kernels=compiled[name].kernels
                )

    def sft(self, batch: int, forms: list[Form]) -> bool:
        """The optimiser step, everything trained; the forms take the state over from each other. True: one failed."""
        import jax

        from z1_jax.config.schema import SftConfig
        from z1_jax.models.pi05 import count_parameters
        from z1_jax.plan import analytic, programs
        from z1_jax.sft import SftTrainer

        abstract = self.policy()
        config = SftConfig(flows=1, batch_size=batch)
        shape = (batch, self.model.horizon, self.model.action_dim)
        actions = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding_of_rows(self.mesh))
        looks = programs.abstract_observation(self.model, batch, self.mesh)
        trainers = {
            form: SftTrainer(abstract.with_compute(form.remat, form.attention), config, 0, self.mesh) for form in forms
        }
        traced = {f"sft {f.named('attention', 'remat')}": Job(t.trace(looks, actions)) for f, t in trainers.items()}
        compiled = self.compile(traced)
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
            with self.reported(f"sft {form.named('attention', 'remat')}"):
                trainer.state, state = state, None
                self.time_sft(form, trainer, data, work, compiled)
                state, trainer.state = trainer.state, None  # type: ignore[assignment]
        return state is None

    def time_sft(self, form: Form, trainer: Any, data: dict[str, Any], work: Any, compiled: dict[str, Made]) -> None:
        norms: list[float] = []

        def step() -> None:
            norms.append(float(trainer.step(data, 0)["grad_norm"]))

        trainer._step = compiled[f"sft {form.named('attention', 'remat')}"].function
        name, how = f"gpu/sft_batch_{len(data['tokens'])}", {"attention": form.attention, "remat": form.remat}
        step()
        launched = compiled[f"sft {form.named('attention', 'remat')}"].kernels
        facts = {"kernels": launched, "first_grad_norm": norms[0]}
        took = self.measure(name, step, self.step_floor(work), repeats=5, **how, **facts)
        if self.accelerator is not None:
            used = work.flops / (took * 1e9 * self.accelerator.tflops)
            self.result(f"{name}_utilisation", used, "fraction of peak", 1.0, 1, [used, used], higher=True, **how)

    def largest_sft(self) -> None:
        """The SFT step at the first of these batches that fits: memory runs out at those before."""
        for batch in (256, 128, 64, 48, 16, 8, 4, 2, 1):
            failed = self.sft(batch, self.forms(Form(attention="cudnn" if self.on_gpu else "einsum")))
            if not failed:
                return

    def step_floor(self, work: Any) -> float | None:
        if self.accelerator is None:
            return None
        return self.accelerator.compute_ms(work.flops) + self.accelerator.memory_ms(work.optimizer_bytes)

    # --- what all parts need -----------------------------------------------------------------------------------------

    def policy(self) -> Any:
        """A policy of shapes."""
        from z1_jax.config.schema import Config
        from z1_jax.plan.programs import abstract_policy

        return abstract_policy(Config(), self.model, self.mesh)

    def compile(self, jobs: dict[str, Job]) -> dict[str, Made]:
        """Compiles traced programs, one thread each."""
        began = time.perf_counter()

        def one(named: tuple[str, Job]) -> tuple[float, Any]:
            (name, job), began, compiled = named, time.perf_counter(), None
            with self.reported(name):
                compiled = job.traced.lower().compile(compiler_options=job.options or None)
            return time.perf_counter() - began, compiled

        made = {}
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            for name, (seconds, compiled) in zip(jobs, pool.map(one, jobs.items()), strict=True):
                if compiled is None:
                    continue
                memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
                try:
                    launched = kernels.count(compiled.as_text(), rule=False).kernels
                except Exception as error:  # a loop whose trips XLA does not tell, say: the timing matters more
                    print(f"  {name}: not counted ({type(error).__name__}: {error})"[:200], flush=True)
                    launched = 0.0
                made[name] = Made(compiled, launched)
                print(f"  {name}: {launched:,.0f} kernels, {memory:,.0f} MB temporary, {seconds:.0f} s", flush=True)
        took, since = time.perf_counter() - began, time.perf_counter() - self.began
        print(f"  {len(jobs)} programs compiled in {took:.0f} s, {since:.0f} s since the start", flush=True)
        return made

    @contextlib.contextmanager
    def reported(self, name: str) -> Iterator[None]:
        """One form that fails is told and left out; the others go on."""
        try:
            yield
        except Exception as error:
            print(f"  {name}: left out, {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)

    def filled(self, tree: Any) -> Any:
        """Small random numbers in place of shapes, made on the device; integers are 0, small numbers positive."""
        import jax
        import jax.numpy as jnp

        leaves, structure = jax.tree.flatten(tree)

        def fill(key: Any) -> list[Any]:
            keys = jax.random.split(key, len(leaves))
            pairs = zip(keys, leaves, strict=True)
            return [_small(jax.random.normal(k, x.shape, jnp.bfloat16), x) for k, x in pairs]

        def _small(drawn: Any, like: Any) -> Any:
            drawn = jnp.abs(drawn) if like.size == 1 else drawn  # a count of steps, say
            return (0.02 * drawn).astype(like.dtype)

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


class Halves:
    """Encoding and denoising of one form and size."""

    def __init__(self, bench: Bench, policy: Any, form: Form, size: Size):
        from z1_jax.config.schema import FlowConfig
        from z1_jax.rl.actor import make_actor

        self.bench, self.form, self.size = bench, form, size
        policy = policy.with_compute(form.remat, form.attention, form.acting)
        graphdef, *self.shapes = policy.split("expert")
        flow = FlowConfig(steps=size.steps, **EVERY_STEP)
        self.actor = make_actor(policy, graphdef, flow, bench.mesh, size.batch)
        self.looks = bench.observation(size.batch, size.cameras)

    def names(self) -> tuple[str, str]:
        """Of the two programs."""
        form, size = self.form, self.size
        kind = f"{form.acting}_{form.attention}_{size.cameras}_cameras_batch_{size.batch}"
        return f"encode_{kind}", f"denoise_{kind}_steps_{size.steps}"

    def jobs(self, graphs: dict[str, dict[str, str]], known: dict[str, Job]) -> dict[str, Job]:
        """The programs that are not known yet, denoising with each choice of CUDA graphs."""
        from z1_jax.plan import programs

        model, mesh, size = self.bench.model, self.bench.mesh, self.size
        encode, denoise = self.names()
        made: dict[str, Job] = {}
        if encode not in known:
            looks = programs.abstract_observation(model, size.batch, mesh, size.cameras)
            made[encode] = Job(self.actor.trace_encode(tuple(self.shapes), looks))
        cache = programs.abstract_cache(model, size.batch, mesh, size.cameras)
        noise = programs.abstract_noise(model, size.batch, size.steps, mesh)
        traced = self.actor.trace_sample(tuple(self.shapes), cache, *noise)
        for name, options in graphs.items():
            made[denoise if name == "usual" else f"{denoise}_graphs_{name}"] = Job(traced, options)
        return made

    def use(self, compiled: dict[str, Made]) -> None:
        """What is compiled already: a first call with arrays would compile it once more."""
        self.actor._encode, self.actor._sample = (compiled[name].function for name in self.names())

    def decide(self, params: Any) -> Any:
        """The actions [B, M, H, A], NumPy."""
        import numpy as np

        cache, _ = self.actor.encode(params, self.looks)
        ids = np.arange(self.size.batch)[:, None, None]
        return self.actor.sample(params, cache, ids, (0,), False).x[:, :, -1]

    def calls(self, params: Any, compiled: dict[str, Made]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each program alone, its inputs on the device, until its result is there."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from z1_jax.distributed import put_batch
        from z1_jax.plan import programs

        bench, (encode, denoise) = self.bench, self.names()
        prepared = self.actor.prepared(params)
        looks = put_batch(self.looks, bench.mesh)
        cache = compiled[encode].function(prepared[0], *params, looks)
        shapes = programs.abstract_noise(bench.model, self.size.batch, self.size.steps, bench.mesh)
        noise = put_batch([np.zeros(x.shape, x.dtype) for x in shapes], bench.mesh)
        for name, made in compiled.items():
            if name == encode:
                given: tuple[Any, ...] = (prepared[0], *params, looks)
            elif name == denoise or name.startswith(f"{denoise}_graphs"):
                given = (prepared[1], *params, cache, *noise, jnp.float32(0.5))
            else:
                continue
            yield name, lambda made=made, given=given: jax.block_until_ready(made.function(*given))


def sharding_of_rows(mesh: Any) -> Any:
    """Of arrays whose first dimension is the batch."""
    from z1_jax.sharding import batch_sharding

    return batch_sharding(mesh)


if __name__ == "__main__":
    main()
