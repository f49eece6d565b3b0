"""π0.5 on LIBERO against openpi's own code: the same prompts, the same pixels, the same actions, the same episodes.

tests/reference/openpi_libero.npz holds what openpi's client loop, LiberoInputs, tokenizer, model with random weights
and LiberoOutputs made of a few pictures; tests/helpers/openpi_libero.py wrote it. Z1_OPENPI=PATH of a clone of openpi
has that file made anew and compared, and, where LIBERO is installed, openpi's client run on the real simulation.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import openpi_libero
import pi05_checkpoints
import pytest
import tiny_policy as tiny

from envs import libero
from envs.base import EnvObservation
from envs.libero import compat, protocols, tables
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import FlowConfig
from z1_jax.convert.__main__ import main as convert
from z1_jax.data.transforms import resize_with_pad
from z1_jax.policy import abstract_params, load_policy
from z1_jax.rl.actor import make_actor
from z1_jax.serve.inputs import Inputs

TESTS = pathlib.Path(__file__).parent
FILE = TESTS / "reference" / "openpi_libero.npz"
CLONE = os.environ.get("Z1_OPENPI", "")
needs_openpi = pytest.mark.skipif(not CLONE, reason="Z1_OPENPI names no clone of openpi")
TOLERANCE = 1e-5  # of the largest action


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def policy(theirs, tmp_path_factory):
    """openpi's weights as its training saves them, converted by the command in docs/libero.md, at a small size."""
    place = tmp_path_factory.mktemp("openpi")
    stats = {
        name: {key: theirs[f"stats/{name}/{key}"].tolist() for key in ("mean", "std", "q01", "q99")}
        for name in ("state", "actions")
    }
    pi05_checkpoints.save_openpi(place / "pi05_libero", openpi_libero.weights(theirs), stats)
    (place / "tokenizer.model").write_bytes(theirs["tokenizer"].tobytes())
    page = (TESTS.parent / "docs" / "libero.md").read_text()
    written = re.search(r"python -m z1_jax\.convert (pi05_libero .*?)\n(?!  )", page, re.DOTALL).group(1)
    source, target, *flags = shlex.split(written.replace("\\\n", " "))
    own = [f"--tokenizer={place / 'tokenizer.model'}", f"--prompt-length={openpi_libero.PROMPT}"]
    assert not convert(["convert", str(place / source), str(place / target), *flags, *own])
    return load_policy(Checkpoints(place / target), 0, tiny.one_device())


def looks(theirs) -> list[EnvObservation]:
    """The pictures as LIBERO draws them, turned as our environment turns them, with the words of openpi's client."""
    assert protocols.protocol("openpi").mirrored
    rows = zip(theirs["frames"], theirs["client/state"], theirs["client/prompt"], strict=True)
    return [
        EnvObservation(dict(zip(tables.CAMERAS, frames[:, ::-1, ::-1], strict=True)), state, str(words))
        for frames, state, words in rows
    ]


def test_prompts_and_pixels_are_openpis(policy, theirs):
    got = policy.processor.observation(looks(theirs))
    assert [str(words) for words in theirs["client/prompt"]] == [w for w in openpi_libero.WORDS for _ in range(2)]
    np.testing.assert_array_equal(got.tokens, theirs["model/tokens"])
    np.testing.assert_array_equal(got.token_mask, theirs["model/token_mask"])
    assert 0 < got.token_mask.sum(axis=1).min() < got.token_mask.sum(axis=1).max() < openpi_libero.PROMPT
    np.testing.assert_array_equal(got.images, theirs["model/images"])
    np.testing.assert_array_equal(got.images[:, 0], theirs["client/image"])
    np.testing.assert_array_equal(got.images[:, 1], theirs["client/wrist_image"])
    # openpi's third picture is black and masked; here it is left out.
    assert policy.processor.used_slots == (0, 1) and theirs["model/masked_image_is_black"].all()
    np.testing.assert_array_equal(theirs["model/image_masks"], [[True, True, False]] * len(got.images))


def test_a_picture_that_is_not_mirrored_would_show(policy, theirs):
    upright = [
        EnvObservation({name: image[:, ::-1] for name, image in look.images.items()}, look.state, look.instruction)
        for look in looks(theirs)
    ]
    assert (policy.processor.observation(upright).images != theirs["model/images"]).mean() > 0.5


def test_actions_are_openpis(policy, theirs, monkeypatch):
    """Ten denoising steps from the same noise, in float32; 7 numbers in the simulation's units."""
    model = dataclasses.replace(policy.config, dtype="float32")
    policy = dataclasses.replace(policy, config=model, graphdef=abstract_params(model, tiny.one_device())[0])
    assert (model.horizon, policy.executed, policy.denoising_steps) == (openpi_libero.HORIZON, 5, 10)
    graphdef, *params = policy.split("everything")
    count = len(theirs["noise"])
    actor = make_actor(policy, graphdef, FlowConfig(steps=policy.denoising_steps), tiny.one_device(), count)
    noise = np.zeros((count, 11, *theirs["noise"].shape[1:]), np.float32)
    noise[:, 0] = theirs["noise"]
    monkeypatch.setattr(actor, "_draw", lambda key: (noise[key[-1]], np.zeros(10, bool)))
    cache, _ = actor.encode(tuple(params), policy.processor.observation(looks(theirs)))
    chain = actor.sample(tuple(params), cache, np.arange(count)[:, None, None], (0,), stochastic=False)
    got = policy.processor.env_actions(chain.x[:, 0, -1])
    assert got.shape == theirs["actions"].shape == (4, openpi_libero.HORIZON, 7)
    scale = np.abs(theirs["actions"]).max()
    error = np.abs(got - theirs["actions"]).max() / scale
    print(f"largest difference {error:.1e} of the largest action")
    assert error <= TOLERANCE
    # Another picture and other words give other actions: the comparison would show a mistake in either.
    assert min(np.abs(theirs["actions"][i] - theirs["actions"][0]).max() for i in (1, 2, 3)) > 100 * TOLERANCE * scale


def test_the_protocol_is_what_openpis_client_does(policy, theirs):
    protocol = protocols.protocol("openpi")
    assert [protocol.horizon(suite) for suite in openpi_libero.SUITES] == theirs["client/max_steps"].tolist()
    np.testing.assert_array_equal(theirs["client/no_ops"], [tables.NO_OP] * protocol.settle_steps)
    assert theirs["client/render_size"].tolist() == [protocol.image_size]
    assert theirs["client/seeds"].tolist() == [protocol.seed] and int(theirs["client/episodes"]) == protocol.episodes
    assert theirs["client/init_states"].tolist() == [0, 0]  # the first of each task: initial states in their order
    assert protocol.evaluation("libero_spatial/0")[0].init_state == 0
    # The first episode ended after 7 steps: 5 actions of its first chunk and 2 of its second.
    executed = [*theirs["actions"][0][: policy.executed], *theirs["actions"][1][:2]]
    np.testing.assert_array_equal(theirs["client/executed"], executed)


def test_what_the_server_reads_of_openpis_client_is_what_an_evaluation_sees(policy, theirs):
    """The client resizes before it sends, and the server's policy gets the same inputs."""
    inputs = Inputs("libero", policy.processor.cameras, 8)
    keys = ("observation/image", "observation/wrist_image", "observation/state", "prompt")
    rows = zip(*(theirs[f"client/{key.rpartition('/')[2]}"] for key in keys), strict=True)
    sent = [inputs.read(dict(zip(keys, (*row[:3], str(row[3])), strict=True))).observation for row in rows]
    served, seen = policy.processor.observation(sent), policy.processor.observation(looks(theirs))
    for name in ("images", "image_mask", "tokens", "token_mask"):
        np.testing.assert_array_equal(getattr(served, name), getattr(seen, name))


@needs_openpi
def test_the_file_is_what_openpis_code_gives(theirs, tmp_path):
    command = [sys.executable, openpi_libero.__file__, str(pathlib.Path(CLONE).resolve()), str(tmp_path / "again.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "again.npz") as file:
        again = dict(file)
    assert again.keys() == theirs.keys()
    for name, value in theirs.items():
        if name == "actions":
            np.testing.assert_allclose(again[name], value, atol=TOLERANCE * np.abs(value).max(), rtol=0)
        elif name not in ("tokenizer", "client/executed"):
            np.testing.assert_array_equal(again[name], value, err_msg=name)


@needs_openpi
def test_openpis_client_and_ours_have_the_same_episode_in_the_real_simulation(rng, tmp_path):
    """Its `eval_libero` itself, on the benchmark's environment, to the end of the first task's first episode."""
    try:
        compat.find()
    except ValueError as error:
        pytest.skip(str(error))
    compat.load()
    chunks = rng.uniform(-1, 1, (3, 10, 7))
    sent = []

    def infer(element: dict) -> dict:
        sent.append(element)
        if len(sent) > len(chunks):
            raise EOFError("enough")  # which its loop takes for an episode's end
        return {"actions": chunks[len(sent) - 1]}

    class OneTask:
        n_tasks = 1

        def __init__(self):
            self._suite = benchmark.get_benchmark_dict()["libero_goal"]()
            self.get_task, self.get_task_init_states = self._suite.get_task, self._suite.get_task_init_states

    from libero.libero import benchmark

    inner = types.SimpleNamespace(get_benchmark_dict=lambda: {"libero_goal": OneTask})
    openpi_libero.run_client(pathlib.Path(CLONE), infer, "libero_goal", 1, {}, tmp_path, benchmark=inner)
    assert len(sent) == 4
    env = libero.make("libero_goal/0")
    env.reset(env.protocol.evaluation("libero_goal/0")[0])
    for number, message in enumerate(sent):
        look = env.observe()
        assert look.instruction == message["prompt"]
        np.testing.assert_array_equal(look.state, message["observation/state"].astype(np.float32))
        for camera, key in zip(tables.CAMERAS, ("image", "wrist_image"), strict=True):
            np.testing.assert_array_equal(resize_with_pad(look.images[camera], 224, 224), message[f"observation/{key}"])
        if number < len(chunks):
            env.step_chunk(chunks[number, :5])
    env.close()
