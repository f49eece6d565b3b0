"""Our SFT step and sampler beside openpi's own π0.5, at the reference's tiny configuration and batch 8 (float32, CPU).

    python benchmarks/tiny_model.py [--rounds 30] [--calls 20]

Both run in one process, round by round in turn, from the same parameters and NumPy inputs. openpi's side is run where
`import openpi.models.pi0` works; otherwise ours alone is printed. openpi pins an old JAX, so install it beside this
project without its pins: put its `src` and `packages/openpi-client/src` on PYTHONPATH and install what its model
imports (augmax, beartype, einops, jaxtyping==0.2.36, torch).

SFT step: openpi's loss over all dimensions without augmentation, one flow time per observation, clip(1.0) and AdamW at
openpi's defaults, everything trained. Sampler: an observation and noise to actions on the host, 10 Euler steps in one
jitted function. Actor: the same by what rollouts and evaluations call, which also draws the noise and keeps the chain.
Before anything is timed, losses and sampled actions from the same noise must agree. Goals are on wall time; the
processor time beside it suffers less where the machine is shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pi05_reference  # noqa: E402
from figures import result_line  # noqa: E402
from flax import nnx, traverse_util  # noqa: E402
from pi05_reference import CAMERAS  # noqa: E402

from z1_jax import sharding  # noqa: E402
from z1_jax.config.schema import FlowConfig, OptimConfig, SftConfig  # noqa: E402
from z1_jax.data.loader import batch_observation  # noqa: E402
from z1_jax.data.normalize import NormStats  # noqa: E402
from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer  # noqa: E402
from z1_jax.data.transforms import InputProcessor  # noqa: E402
from z1_jax.policy import Policy  # noqa: E402
from z1_jax.rl import flow  # noqa: E402
from z1_jax.rl.actor import Actor, stack_ids  # noqa: E402
from z1_jax.sft import SftTrainer  # noqa: E402
from z1_jax.types import Observation  # noqa: E402

BATCH, STEPS = 8, 10  # observations; denoising steps
TOLERANCE = 1e-5  # of the largest value, between our numbers and openpi's
OPTIM = OptimConfig(lr=2.5e-5, warmup_steps=0, schedule="constant", weight_decay=1e-10)
Inputs = dict[str, np.ndarray]


def make_inputs(config: Any, seed: int) -> Inputs:
    """A batch of random observations and actions, some cameras missing, prompts of different lengths."""
    rng = np.random.default_rng(seed)
    size, slots = config.vision.image_size, len(CAMERAS)
    lengths = rng.integers(3, config.prompt_length + 1, BATCH)
    token_mask = np.arange(config.prompt_length) < lengths[:, None]
    image_mask = rng.random((BATCH, slots)) < 0.8
    image_mask[:, 0] = True
    return {
        "images": rng.integers(0, 256, (BATCH, slots, size, size, 3), dtype=np.uint8),
        "image_mask": image_mask,
        "tokens": rng.integers(1, config.vocab_size, token_mask.shape, dtype=np.int32) * token_mask,
        "token_mask": token_mask,
        "actions": rng.standard_normal((BATCH, config.horizon, config.action_dim), np.float32),
        "noise": rng.standard_normal((BATCH, config.horizon, config.action_dim), np.float32),
    }


class Ours:
    """This project's trainer and actor, as its commands use them."""

    def __init__(self, case: pi05_reference.Case):
        self._case, self._mesh = case, sharding.make_mesh(devices=jax.devices()[:1])
        config = case.config
        model = train_small_tokenizer(kitchen_instructions(), vocab_size=config.vocab_size)
        ones = np.ones(config.action_dim)
        stats = NormStats(mean=0 * ones, std=ones, q01=-ones, q99=ones)
        processor = InputProcessor(
            PromptTokenizer(model, config.prompt_length),
            {"state": stats, "actions": stats},
            CAMERAS,
            config.vision.image_size,
            config.action_dim,
        )
        params = jax.device_put(case.state, sharding.param_sharding(case.state, self._mesh))
        policy = Policy(config, case.graphdef, params, processor, config.horizon, STEPS)
        graphdef, *self._params = policy.split("joint")
        self._counted = counted = np.ones((config.horizon, config.action_dim), bool)
        self._graphdef = graphdef
        self._sample = jax.jit(self._sample_impl)
        self._actor = Actor(
            graphdef, FlowConfig(steps=STEPS, sde_steps="all", noise_level=0.5), counted, self._mesh, BATCH
        )
        copied = dataclasses.replace(policy, params=jax.tree.map(jnp.copy, params))  # the trainer consumes its own
        sft = SftConfig(steps=1, batch_size=BATCH, flows=1, loss_dims="all", optim=OPTIM)
        self._trainer = SftTrainer(copied, sft, 0, self._mesh)
        self._done = 0

    def sft_step(self, inputs: Inputs) -> Any:
        self._done += 1
        return self._trainer.step(inputs, self._done)["loss"]

    def sample(self, inputs: Inputs) -> np.ndarray:
        placed = jax.device_put((batch_observation(inputs), inputs["noise"]))
        return np.asarray(self._sample(tuple(self._params), *placed))

    def _sample_impl(self, params: tuple[Any, ...], observation: Observation, noise: jax.Array) -> jax.Array:
        model = nnx.merge(self._graphdef, *params)
        cache = model.encode_prefix(observation)
        unused = jnp.zeros((BATCH, 1, STEPS, *noise.shape[1:]))
        chain = flow.sample(
            lambda x, t: model.velocity(cache, x, t),
            jnp.concatenate([noise[:, None, None], unused], axis=2),
            jnp.zeros((BATCH, 1, STEPS), bool),
            jnp.asarray(self._counted),
            noise_level=0.5,
        )
        return chain.x[:, 0, -1]

    def act(self, inputs: Inputs) -> np.ndarray:
        cache, _ = self._actor.encode(tuple(self._params), batch_observation(inputs))
        ids = stack_ids(np.arange(BATCH)[:, None])
        return self._actor.sample(tuple(self._params), cache, ids, (0,), stochastic=False).x[:, 0, -1]

    def numbers(self, inputs: Inputs, noise: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each step at given noise and time, and the actions sampled from `inputs["noise"]`."""
        given = {**self._case.inputs, "actions": inputs["actions"], "noise": noise, "time": t}
        case = dataclasses.replace(self._case, inputs=given)
        loss = jax.jit(lambda state, obs: pi05_reference.loss(case, state, obs)[1]["loss"])
        return np.asarray(loss(case.state, batch_observation(inputs))), self.sample(inputs)


class Openpi:
    """openpi's model in its tiny configuration, trained and sampled as its scripts do."""

    def __init__(self, case: pi05_reference.Case):
        """Raises ImportError where openpi, or something that it imports, is not installed."""
        import openpi.models.gemma as gemma
        import openpi.models.model as base
        import openpi.models.pi0_config as pi0_config
        import openpi.models.siglip as siglip
        from openpi.shared.nnx_utils import module_jit

        # openpi knows its published sizes by name only; these four replace them by the tiny ones.
        config, size = case.config, (case.config.vision.image_size,) * 2
        vision = config.vision
        sizes = {"gemma_2b": config.language, "gemma_300m": config.expert}
        gemma.get_config = lambda name: gemma.Config(
            sizes[name].width, sizes[name].depth, sizes[name].mlp, *dataclasses.astuple(sizes[name])[3:]
        )
        gemma.PALIGEMMA_VOCAB_SIZE = config.vocab_size
        siglip.decode_variant = lambda _: {
            "width": vision.width,
            "depth": vision.depth,
            "mlp_dim": vision.mlp,
            "num_heads": vision.heads,
            "patch_size": (vision.patch, vision.patch),
        }
        base.IMAGE_RESOLUTION = size
        base.preprocess_observation = functools.partial(base.preprocess_observation, image_resolution=size)
        self._observation = base.Observation
        flat = pi05_reference.section(pi05_reference.load("tiny_pi05.npz"), "params/")
        model = pi0_config.Pi0Config(
            dtype="float32",
            action_dim=config.action_dim,
            action_horizon=config.horizon,
            max_token_len=config.prompt_length,
            pi05=True,
        ).load(jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat, sep="/")))
        self._graphdef, self._params, self._rest = nnx.split(model, nnx.Param, ...)
        self._sample = module_jit(model.sample_actions, static_argnames="num_steps")
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(OPTIM.lr, b1=OPTIM.b1, b2=OPTIM.b2, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay),
        )
        self._trained = jax.tree.map(jnp.copy, self._params)
        self._opt_state = jax.jit(self._optimizer.init)(self._trained)
        self._step = jax.jit(self._step_impl, donate_argnums=(0, 1))
        self._key, self._done = jax.random.key(0), 0

    def observation(self, inputs: Inputs) -> Any:
        images = inputs["images"].astype(np.float32) / 255.0 * 2.0 - 1.0
        return self._observation(
            images={camera: images[:, slot] for slot, camera in enumerate(CAMERAS)},
            image_masks={camera: inputs["image_mask"][:, slot] for slot, camera in enumerate(CAMERAS)},
            state=np.zeros((BATCH, inputs["actions"].shape[-1]), np.float32),
            tokenized_prompt=inputs["tokens"],
            tokenized_prompt_mask=inputs["token_mask"],
        )

    def sft_step(self, observation: Any, actions: np.ndarray) -> Any:
        self._done += 1
        observation, actions = jax.device_put((observation, actions))
        self._trained, self._opt_state, stats = self._step(
            self._trained, self._opt_state, self._rest, observation, actions, jnp.uint32(self._done)
        )
        return stats["loss"]

    def _step_impl(
        self, params: Any, opt_state: Any, rest: Any, observation: Any, actions: jax.Array, step: jax.Array
    ) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(self._graphdef, params, rest)
            return jnp.mean(model.compute_loss(jax.random.fold_in(self._key, step), observation, actions))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        stats = {"loss": value, "grad_norm": optax.global_norm(grads)}
        return optax.apply_updates(params, updates), opt_state, stats

    def sample(self, observation: Any, noise: np.ndarray) -> np.ndarray:
        observation, noise = jax.device_put((observation, noise))
        return np.asarray(self._sample(self._key, observation, num_steps=STEPS, noise=noise))

    def loss(self, observation: Any, actions: np.ndarray, key: jax.Array) -> np.ndarray:
        def run(params: Any, rest: Any, observation: Any, actions: jax.Array) -> jax.Array:
            return nnx.merge(self._graphdef, params, rest).compute_loss(key, observation, actions)

        return np.asarray(jax.jit(run)(self._params, self._rest, *jax.device_put((observation, actions))))


def make_openpi(case: pi05_reference.Case) -> Openpi | None:
    try:
        return Openpi(case)
    except ImportError as error:
        print(f"openpi is not installed ({error}): no comparison")
        return None


def disagreement(ours: Ours, theirs: Openpi, inputs: Inputs) -> dict[str, float]:
    """Largest difference of losses and sampled actions, by the largest value."""
    key, observation = jax.random.key(7), theirs.observation(inputs)
    _, noise_key, time_key = jax.random.split(key, 3)  # as openpi's loss draws them
    noise = jax.random.normal(noise_key, inputs["actions"].shape)
    t = jax.random.beta(time_key, 1.5, 1, (BATCH,)) * 0.999 + 0.001
    mine = ours.numbers(inputs, np.asarray(noise), np.asarray(t))
    reference = theirs.loss(observation, inputs["actions"], key), theirs.sample(observation, inputs["noise"])
    return {
        name: pi05_reference.compare(name, a, b).error
        for name, a, b in zip(("loss", "sampled actions"), mine, reference, strict=True)
    }


def measure(functions: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, np.ndarray]:
    """Milliseconds of a call of each function, wall and processor time [rounds, 2]; the functions take turns."""
    for function in functions.values():
        jax.block_until_ready([function() for _ in range(3)])
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(calls):
                out = function()
            jax.block_until_ready(out)
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: np.array(values) / calls * 1e3 for name, values in taken.items()}


def report(name: str, ours: np.ndarray, theirs: np.ndarray | None) -> None:
    """Prints medians with quartiles, and the RESULT line."""
    for side, taken in (("ours", ours), ("openpi", theirs)):
        if taken is not None:
            (low, _), (wall, processor), (high, _) = np.quantile(taken, [0.25, 0.5, 0.75], axis=0)
            print(f"{name:8} {side:6} {wall:8.2f} ms [{low:.2f}, {high:.2f}]   processor {processor:8.2f} ms")
    median = float(np.median(ours[:, 0]))
    baseline = None if theirs is None else float(np.median(theirs[:, 0]))
    if theirs is not None:
        ratios = np.median(ours, axis=0) / np.median(theirs, axis=0)
        print(f"{name:8} ours / openpi: {ratios[0]:.2f}, processor {ratios[1]:.2f}")
    met = None if baseline is None else median <= baseline
    spread = np.quantile(ours[:, 0], [0.25, 0.75]).tolist()
    name = f"tiny_model/{name}"
    print(result_line(name, median, "ms", baseline=baseline, goal=baseline, met=met, n=len(ours), spread=spread))


def main() -> None:
    parser = argparse.ArgumentParser(description="SFT step and sampler, ours and openpi's.")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each (%(default)s)")
    parser.add_argument("--calls", type=int, default=20, help="calls in a measurement (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    given = parser.parse_args()
    case = pi05_reference.load_case()
    inputs = make_inputs(case.config, given.seed)
    ours, theirs = Ours(case), make_openpi(case)
    steps: dict[str, Callable[[], Any]] = {"ours": lambda: ours.sft_step(inputs)}
    samples: dict[str, Callable[[], Any]] = {"ours": lambda: ours.sample(inputs), "actor": lambda: ours.act(inputs)}
    if theirs is not None:
        for name, error in disagreement(ours, theirs, inputs).items():
            print(f"{name}: ours and openpi's differ by {error:.1e} of the largest value")
            if error > TOLERANCE:
                sys.exit(f"{name} differ by more than {TOLERANCE:g}: not the same model, nothing to compare")
        observation = theirs.observation(inputs)
        steps["openpi"] = lambda: theirs.sft_step(observation, inputs["actions"])
        samples["openpi"] = lambda: theirs.sample(observation, inputs["noise"])
    taken = measure(steps, given.rounds, given.calls)
    report("sft_step", taken["ours"], taken.get("openpi"))
    taken = measure(samples, given.rounds, given.calls)
    for name, side in (("sampler", "ours"), ("actor", "actor")):
        report(name, taken[side], taken.get("openpi"))


if __name__ == "__main__":
    main()
