"""openpi's own code on LIBERO: its client loop, LiberoInputs, tokenizer, model and LiberoOutputs, from a clone of it.

    python tests/helpers/openpi_libero.py CLONE tests/reference/openpi_libero.npz

writes what they make of a few pictures: the client `examples/libero/main.py` runs on a simulation that only counts and
shows pictures, and asks `openpi.policies.policy.Policy` with random weights at a small size. torch and other packages
that openpi's modules import, and that nothing here uses, are replaced by empty modules. Seen on commit 15a9616.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping._decorator
import numpy as np

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
WORDS = ("pick up the black bowl_on the stove and place it on the plate", "turn on the stove")
HORIZON, PROMPT, LOOKS = 10, 48, 2  # actions of a chunk, tokens of a prompt, looks of each episode that are recorded
NO_OP = [0.0] * 6 + [-1.0]


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _client(clone: pathlib.Path, modules: dict[str, types.ModuleType]) -> Any:
    """openpi's client as a module. It is given these modules in place of its own."""
    quiet = _Empty("tqdm")
    quiet.tqdm = lambda items: items
    film = _Empty("imageio")
    film.mimwrite = lambda *args, **kwargs: None
    sys.path.insert(0, str(clone / "packages" / "openpi-client" / "src"))
    sys.modules.update({"tqdm": quiet, "imageio": film, "tyro": _Empty("tyro"), **modules})
    spec = importlib.util.spec_from_file_location("openpi_main", clone / "examples" / "libero" / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["openpi_main"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def run_client(
    clone: pathlib.Path,
    infer: Callable[[dict], dict],
    suite: str,
    trials: int | None,
    simulation: dict[str, types.ModuleType],
    videos: pathlib.Path,
    benchmark: Any = None,
) -> Any:
    """Runs openpi's `eval_libero` with `infer` for the policy behind its websocket; returns its arguments.

    Args:
        trials: episodes a task; None runs nothing.
        simulation: modules in place of LIBERO's; none for the real ones.
        benchmark: in place of LIBERO's module of that name.
    """
    server = _Empty("openpi_client.websocket_client_policy")
    server.WebsocketClientPolicy = lambda host, port: types.SimpleNamespace(infer=infer)
    before, path = dict(sys.modules), list(sys.path)
    try:
        main = _client(clone, {"openpi_client.websocket_client_policy": server, **simulation})
        main.benchmark = benchmark or main.benchmark
        args = main.Args(task_suite_name=suite, video_out_path=str(videos))
        if trials is not None:
            main.eval_libero(dataclasses.replace(args, num_trials_per_task=trials))
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("openpi_client", "openpi_main", "tqdm", "imageio", "tyro"):
                del sys.modules[name]
        sys.modules.update(before)
    return args


# --- a simulation that only counts and shows pictures ----------------------------------------------------------------


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """uint8 [count, 256, 256, 3] of coloured tiles that fall on no border of the resized picture."""
    tiles = rng.integers(0, 256, (count, 13, 13, 3), dtype=np.uint8)
    rows = np.arange(256) // 20
    return np.ascontiguousarray(tiles[:, rows][:, :, rows])


class Simulation:
    """Stands for LIBERO: two tasks; what the client does to the environments is noted in `calls`."""

    def __init__(self, frames: np.ndarray, poses: np.ndarray, ends: dict[int, int]):
        """Args: `ends`: the control step at which an episode of this number succeeds."""
        self.frames, self.poses, self.ends = frames, poses, ends
        self.calls: list[list[Any]] = []  # of each episode: its actions
        self.sizes, self.seeds, self.starts = set(), set(), []

    def observation(self) -> dict[str, np.ndarray]:
        """Every five control steps after the no-ops another picture: the client looks at no other time."""
        steps = max(0, len(self.calls[-1]) - 10)
        look = min(steps // 5, LOOKS - 1) + LOOKS * ((len(self.calls) - 1) % 2)
        pose = self.poses[look]
        return {
            **{name: self.frames[look, place] for place, name in enumerate(CAMERAS)},
            "robot0_eef_pos": pose[:3].copy(),
            "robot0_eef_quat": pose[3:7].copy(),
            "robot0_gripper_qpos": pose[7:].copy(),
        }

    def modules(self) -> dict[str, types.ModuleType]:
        world = self

        class Environment:
            def __init__(self, bddl_file_name: Any, camera_heights: int, camera_widths: int):
                world.sizes |= {camera_heights, camera_widths}

            def seed(self, seed: int) -> None:
                world.seeds.add(seed)

            def reset(self) -> None:
                world.calls.append([])

            def set_init_state(self, state: int) -> dict:
                world.starts.append(state)
                return world.observation()

            def step(self, action: list[float]) -> tuple[dict, float, bool, dict]:
                episode, actions = len(world.calls) - 1, world.calls[-1]
                actions.append(action)
                return world.observation(), 0.0, len(actions) - 10 == world.ends.get(episode), {}

        class Suite:
            n_tasks = len(WORDS)

            def get_task(self, number: int) -> Any:
                return types.SimpleNamespace(language=WORDS[number], problem_folder="folder", bddl_file="file.bddl")

            def get_task_init_states(self, number: int) -> list[int]:
                return list(range(50))

        top, inner, envs = (_Empty(name) for name in ("libero", "libero.libero", "libero.libero.envs"))
        inner.benchmark = types.SimpleNamespace(get_benchmark_dict=lambda: dict.fromkeys(SUITES, Suite))
        inner.get_libero_path = lambda kind: f"/{kind}"
        envs.OffScreenRenderEnv = Environment
        return {"libero": top, "libero.libero": inner, "libero.libero.envs": envs}


# --- openpi's policy -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _openpi(clone: pathlib.Path) -> Iterator[None]:
    """openpi can be imported within."""
    torch = _Empty("torch")
    torch.nn = sys.modules["torch.nn"] = _Empty("torch.nn")
    torch.nn.functional = sys.modules["torch.nn.functional"] = _Empty("torch.nn.functional")
    checks, arrays = _Empty("beartype"), _Empty("numpydantic")
    checks.beartype, arrays.NDArray = lambda function: function, Any
    sys.modules.update({"torch": torch, "beartype": checks, "numpydantic": arrays})
    jaxtyping._decorator.__dict__.setdefault("_check_dataclass_annotations", None)  # openpi wants an older jaxtyping
    for name in ("augmax", "transformers", "openpi.models_pytorch", "openpi.models_pytorch.pi0_pytorch"):
        sys.modules[name] = _Empty(name)
    for name in ("openpi.models.utils", "openpi.models.utils.fsq_tokenizer", "openpi.shared.download"):
        sys.modules[name] = _Empty(name)
    for folder in (clone / "src", clone / "packages" / "openpi-client" / "src"):
        sys.path.insert(0, str(folder))
    yield


def policy(clone: pathlib.Path, given: dict[str, np.ndarray]) -> tuple[Any, list[dict]]:
    """openpi's Policy as its configuration pi05_libero builds it, at a small size; and what reaches its model."""
    with _openpi(clone):
        import flax.traverse_util as traverse_util
        import jax
        import openpi.models.gemma as gemma
        import openpi.models.model as model_module
        import openpi.models.pi0_config as pi0_config
        import openpi.models.siglip as siglip
        import openpi.models.tokenizer as tokenizer
        import sentencepiece
        from flax import nnx
        from openpi import transforms
        from openpi.policies import libero_policy
        from openpi.policies.policy import Policy
        from openpi.shared import normalize

    sizes = {"language": (64, 2, 128, 4, 1, 16), "expert": (32, 2, 64, 4, 1, 16)}  # as in tiny_pi05.npz
    gemma.get_config = lambda name: gemma.Config(*sizes[name])
    gemma.PALIGEMMA_VOCAB_SIZE = 512
    siglip.decode_variant = lambda name: {
        "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2, "patch_size": (14, 14)
    }  # fmt: skip
    config = pi0_config.Pi0Config(
        pi05=True, action_horizon=HORIZON, action_dim=8, max_token_len=PROMPT, discrete_state_input=False,
        paligemma_variant="language", action_expert_variant="expert", dtype="float32",
    )  # fmt: skip
    model = config.create(jax.random.key(0))
    graph, state = nnx.split(model)
    state.replace_by_pure_dict(traverse_util.unflatten_dict(weights(given), sep="/"))
    words = tokenizer.PaligemmaTokenizer.__new__(tokenizer.PaligemmaTokenizer)  # its __init__ downloads
    words._max_len = PROMPT
    words._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=given["tokenizer"].tobytes())
    stats = {
        name: normalize.NormStats(**{key: given[f"stats/{name}/{key}"] for key in ("mean", "std", "q01", "q99")})
        for name in ("state", "actions")
    }
    seen: list[dict] = []

    def note(data: dict) -> dict:
        seen.append(data)
        return data

    # The order of openpi's policy_config.create_trained_policy, LeRobotLiberoDataConfig and ModelTransformFactory.
    inputs = [
        transforms.InjectDefaultPrompt(None),
        libero_policy.LiberoInputs(model_module.ModelType.PI05),
        transforms.Normalize(stats, use_quantiles=True),
        transforms.InjectDefaultPrompt(None),
        transforms.ResizeImages(224, 224),
        transforms.TokenizePrompt(words, discrete_state_input=False),
        transforms.PadStatesAndActions(config.action_dim),
        note,
    ]
    outputs = [transforms.Unnormalize(stats, use_quantiles=True), libero_policy.LiberoOutputs()]
    return Policy(nnx.merge(graph, state), transforms=inputs, output_transforms=outputs), seen


def weights(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """openpi's arrays by their paths: those of tiny_pi05.npz, with positions for pictures of 224² in place of 28²."""
    with np.load(REFERENCE / "tiny_pi05.npz") as file:
        found = {name.removeprefix("params/"): file[name] for name in file.files if name.startswith("params/")}
    return {**found, "PaliGemma/img/pos_embedding": given["pos_embedding"]}


def given_numbers(seed: int) -> dict[str, np.ndarray]:
    """What is put in: pictures, poses, noise, statistics, a tokenizer."""
    from z1_jax.data.tokenizer import kitchen_instructions, train_small_tokenizer

    rng = np.random.default_rng(seed)
    numbers: dict[str, np.ndarray] = {
        "frames": pictures(rng, 4 * LOOKS).reshape(2 * LOOKS, 2, 256, 256, 3),
        "noise": rng.standard_normal((2 * LOOKS, HORIZON, 8)).astype(np.float32),
        "pos_embedding": 0.1 * rng.standard_normal((1, 256, 32)).astype(np.float32),
        "tokenizer": np.frombuffer(train_small_tokenizer([*WORDS, *kitchen_instructions()]), np.uint8),
    }
    quats = rng.standard_normal((2 * LOOKS, 4))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    numbers["poses"] = np.concatenate(
        [rng.uniform(-0.5, 1.0, (2 * LOOKS, 3)), quats, rng.uniform(0, 0.04, (2 * LOOKS, 2))], axis=1
    )
    for name, width in (("state", 8), ("actions", 7)):
        low, high = -rng.uniform(0.5, 1.5, width), rng.uniform(0.5, 1.5, width)
        values = {"mean": (low + high) / 2, "std": (high - low) / 4, "q01": low, "q99": high}
        numbers |= {f"stats/{name}/{key}": value for key, value in values.items()}
    return numbers


def main(clone: pathlib.Path, out: pathlib.Path) -> None:
    given = given_numbers(20)
    actor, seen = policy(clone, given)
    world = Simulation(given["frames"], given["poses"], ends={0: 7})
    sent, answers = [], []

    def infer(element: dict) -> dict:
        """The first looks of each task go to openpi's policy, the others are answered with what it said last."""
        looks = sum(message["prompt"] == element["prompt"] for message in sent)
        sent.append(element)
        if looks < LOOKS:
            answers.append(actor.infer(dict(element), noise=given["noise"][len(answers)])["actions"])
        return {"actions": answers[-1]}

    videos = out.parent / "videos"
    args = run_client(clone, infer, SUITES[0], 1, world.modules(), videos)
    looked = [i for i, message in enumerate(sent) if sum(m["prompt"] == message["prompt"] for m in sent[:i]) < LOOKS]
    found = {
        "client/image": np.stack([sent[i]["observation/image"] for i in looked]),
        "client/wrist_image": np.stack([sent[i]["observation/wrist_image"] for i in looked]),
        "client/state": np.stack([sent[i]["observation/state"] for i in looked]),
        "client/prompt": np.array([sent[i]["prompt"] for i in looked]),
        "client/render_size": np.array(sorted(world.sizes)),
        "client/seeds": np.array(sorted(world.seeds)),
        "client/init_states": np.array(world.starts),
        "client/episodes": np.array(args.num_trials_per_task),
        "client/executed": np.array([np.asarray(actions[10:]) for actions in world.calls][0]),
        "client/no_ops": np.array(world.calls[1][:10]),
        "model/images": np.stack([np.stack([data["image"][slot] for slot in SLOTS[:2]]) for data in seen]),
        "model/masked_image_is_black": np.array([not data["image"][SLOTS[2]].any() for data in seen]),
        "model/image_masks": np.array([[bool(data["image_mask"][slot]) for slot in SLOTS] for data in seen]),
        "model/tokens": np.stack([data["tokenized_prompt"] for data in seen]).astype(np.int32),
        "model/token_mask": np.stack([data["tokenized_prompt_mask"] for data in seen]),
        "actions": np.stack(answers).astype(np.float64),
    }
    steps = {}
    for suite in SUITES:
        plain = Simulation(given["frames"], given["poses"], {})
        run_client(clone, lambda element: {"actions": answers[-1]}, suite, 1, plain.modules(), videos)
        steps[suite] = len(plain.calls[0]) - 10
    found["client/max_steps"] = np.array([steps[suite] for suite in SUITES])
    videos.rmdir()
    np.savez_compressed(out, **given, **found)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB, {len(answers)} looks; steps {steps}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
