"""Tiny π0.5 models by openpi's and LeRobot's own PyTorch code: built, saved and sampled by them, with random weights.

    python tests/helpers/torch_models.py tests/reference

writes what tests/test_convert_torch.py compares with. It needs torch, LeRobot 0.4.4, openpi, and transformers 4.53.2
with openpi's `transformers_replace` copied over it. Both projects fix vocabulary and vision tower to full
size in the code: only those numbers are replaced here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import sys
import types
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy as np

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WIDTH, EXPERT_WIDTH, MLP, EXPERT_MLP = 24, 16, 40, 32
HEADS, HEAD_DIM, DEPTH = 4, 16, 2  # heads x head dimension equals no width
VOCABULARY, IMAGE, HORIZON, ACTION_DIM, PROMPT = 96, 28, 5, 7, 10
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STEPS = 10
STATE_DIM, REAL_ACTIONS = 6, 5


def variant(name: str) -> types.SimpleNamespace:
    """Sizes in place of those that the projects know by name."""
    width, mlp = (WIDTH, MLP) if name == "gemma_2b" else (EXPERT_WIDTH, EXPERT_MLP)
    return types.SimpleNamespace(
        width=width, depth=DEPTH, mlp_dim=mlp, num_heads=HEADS, num_kv_heads=1, head_dim=HEAD_DIM
    )


@contextlib.contextmanager
def shrunk(module: Any) -> Iterator[None]:
    """Models that `module` builds have a small vocabulary and vision tower."""
    paligemma, gemma = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM

    def small_paligemma(config: Any) -> Any:
        for name, value in {**VISION, "image_size": IMAGE, "projection_dim": WIDTH}.items():
            setattr(config.vision_config, name, value)
        config.text_config.vocab_size = VOCABULARY
        return paligemma(config=config)

    def small_gemma(config: Any) -> Any:
        config.vocab_size = VOCABULARY
        return gemma(config=config)

    with (
        unittest.mock.patch.object(module, "PaliGemmaForConditionalGeneration", small_paligemma),
        unittest.mock.patch.object(module, "GemmaForCausalLM", small_gemma),
    ):
        yield


def randomise(model: Any, seed: int) -> None:
    """Random weights, none of them zero, so that one that is lost or turned shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.eval()


def inputs(seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    """An observation with a masked camera and padded prompts, and the noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, len(CAMERAS), IMAGE, IMAGE, 3), dtype=np.uint8)
    mask = np.ones((batch, len(CAMERAS)), bool)
    mask[:, 2] = False
    tokens = rng.integers(1, VOCABULARY, (batch, PROMPT)).astype(np.int32)
    token_mask = np.arange(PROMPT) < np.array([[PROMPT], [PROMPT - 4]])[:batch]
    noise = rng.standard_normal((batch, HORIZON, ACTION_DIM), dtype=np.float32)
    return {"images": images, "image_mask": mask, "tokens": tokens, "token_mask": token_mask, "noise": noise}


def statistics(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Of state and actions, exact in float32 (LeRobot's precision)."""
    rng = np.random.default_rng(seed)

    def one(dim: int) -> dict[str, np.ndarray]:
        low, span = rng.normal(size=dim).astype("f"), (rng.random(dim) + 0.5).astype("f")
        return {"mean": low + span / 2, "std": span / 4, "q01": low, "q99": low + span}

    return {"state": one(STATE_DIM), "actions": one(REAL_ACTIONS)}


def openpi_model(seed: int) -> Any:
    """openpi's PI0Pytorch with random weights."""
    module = importlib.import_module("openpi.models_pytorch.pi0_pytorch")
    config = types.SimpleNamespace(
        pi05=True,
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        dtype="float32",
        action_dim=ACTION_DIM,
        action_horizon=HORIZON,
        pytorch_compile_mode=None,
    )
    parts = importlib.import_module("openpi.models_pytorch.gemma_pytorch")
    with shrunk(parts), unittest.mock.patch.object(module._gemma, "get_config", variant):
        model = module.PI0Pytorch(config)
    randomise(model, seed)
    return model


def openpi_save(model: Any, folder: pathlib.Path, seed: int) -> None:
    """As openpi's train_pytorch.py saves: the model, and the statistics in assets."""
    from safetensors.torch import save_model

    assets = folder / "assets" / "tiny_robot"
    assets.mkdir(parents=True)
    save_model(model, str(folder / "model.safetensors"))
    stats = {k: {n: x.tolist() for n, x in v.items()} for k, v in statistics(seed).items()}
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}, indent=2))


def openpi_sample(model: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    """Actions by openpi's sampler. Its preprocessing resizes to full size, so that the inputs pass it by."""
    import torch

    images = torch.from_numpy(given["images"].astype("f") / 255 * 2 - 1).permute(1, 0, 4, 2, 3)
    prepared = (
        list(images),
        list(torch.from_numpy(given["image_mask"]).T),
        torch.from_numpy(given["tokens"]).long(),
        torch.from_numpy(given["token_mask"]),
        torch.zeros(len(given["tokens"]), ACTION_DIM),
    )
    observation = types.SimpleNamespace(state=prepared[-1])
    with torch.no_grad(), unittest.mock.patch.object(model, "_preprocess_observation", lambda *_, **__: prepared):
        return model.sample_actions("cpu", observation, noise=torch.from_numpy(given["noise"]), num_steps=STEPS).numpy()


def lerobot_policy(seed: int) -> Any:
    """LeRobot's PI05Policy with random weights."""
    module = importlib.import_module("lerobot.policies.pi05.modeling_pi05")
    with shrunk(module), unittest.mock.patch.object(module, "get_gemma_config", variant):
        policy = module.PI05Policy(lerobot_config())
    randomise(policy, seed)
    return policy


def lerobot_config() -> Any:
    """The configuration of a LeRobot policy of these sizes."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    def feature(kind: str, *shape: int) -> Any:
        return PolicyFeature(type=FeatureType[kind], shape=shape)

    return PI05Config(
        device="cpu",
        chunk_size=HORIZON,
        n_action_steps=HORIZON - 1,
        max_state_dim=8,
        max_action_dim=ACTION_DIM,
        num_inference_steps=STEPS,
        image_resolution=(IMAGE, IMAGE),
        tokenizer_max_length=PROMPT,
        input_features={
            **{f"observation.images.{name}": feature("VISUAL", 3, IMAGE, IMAGE) for name in CAMERAS},
            "observation.state": feature("STATE", STATE_DIM),
        },
        output_features={"action": feature("ACTION", REAL_ACTIONS)},
    )


def lerobot_save(policy: Any, folder: pathlib.Path, seed: int) -> None:
    """The policy and its processors' statistics, by LeRobot's own saving."""
    import torch
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, UnnormalizerProcessorStep

    policy.save_pretrained(folder)
    stats = statistics(seed)
    named = {"observation.state": stats["state"], "action": stats["actions"]}
    tensors = {key: {name: torch.from_numpy(x) for name, x in value.items()} for key, value in named.items()}
    config = policy.config
    features = {**config.input_features, **config.output_features}
    norm = {"norm_map": config.normalization_mapping, "stats": tensors}
    before = PolicyProcessorPipeline([NormalizerProcessorStep(features=features, **norm)], name="policy_preprocessor")
    after = PolicyProcessorPipeline(
        [UnnormalizerProcessorStep(features=config.output_features, **norm)], name="policy_postprocessor"
    )
    before.save_pretrained(folder)
    after.save_pretrained(folder)


def lerobot_load(folder: pathlib.Path) -> Any:
    """A policy by LeRobot's own loading."""
    module = importlib.import_module("lerobot.policies.pi05.modeling_pi05")
    with shrunk(module), unittest.mock.patch.object(module, "get_gemma_config", variant):
        return module.PI05Policy.from_pretrained(folder, strict=True)


def lerobot_sample(policy: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    """Actions [B, H, real] by LeRobot's policy; a camera that is masked for all is left out of its batch."""
    import torch

    images = torch.from_numpy(given["images"].astype("f") / 255).permute(1, 0, 4, 2, 3)
    batch = {
        f"observation.images.{name}": image
        for name, image, mask in zip(CAMERAS, images, given["image_mask"].T, strict=True)
        if mask.any()
    }
    batch["observation.language.tokens"] = torch.from_numpy(given["tokens"]).long()
    batch["observation.language.attention_mask"] = torch.from_numpy(given["token_mask"])
    return policy.predict_action_chunk(batch, noise=torch.from_numpy(given["noise"])).numpy()


def main(out: pathlib.Path) -> None:
    """Writes both checkpoints and their actions."""
    given = inputs(0)
    model, policy = openpi_model(1), lerobot_policy(2)
    openpi_save(model, out / "openpi_pytorch", 1)
    lerobot_save(policy, out / "lerobot", 2)
    expected = {"openpi_pytorch": openpi_sample(model, given), "lerobot": lerobot_sample(policy, given)}
    np.savez_compressed(out / "torch_actions.npz", **given, **expected)
    print({name: float(np.abs(value).max()) for name, value in expected.items()})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
