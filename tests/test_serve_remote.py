"""A policy behind an address is evaluated as one that is here: the same episodes, steps and successes."""

import argparse
import functools
import itertools
import json
import os
import subprocess
import threading

import numpy as np
import pytest
import tiny_policy
from policy_server import serving
from websockets.sync.server import serve

from envs.base import Episode
from z1_jax import evaluate as evaluate_command
from z1_jax import train
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import ConfigError, EvalConfig, FlowConfig
from z1_jax.errors import UserError
from z1_jax.evaluation import evaluate
from z1_jax.run_dir import policy_identity
from z1_jax.serve import remote, wire
from z1_jax.serve.__main__ import metadata
from z1_jax.serve.engine import Engine
from z1_jax.serve.inputs import Inputs
from z1_jax.serve.remote import ServedPolicy

CAMERA = tiny_policy.CAMERA
WIDTHS = {"state": 16, "actions": 12}
COUNT = 8


@pytest.fixture(autouse=True)
def fresh():
    """Ports come again: what a server said is forgotten."""
    remote.metadata.cache_clear()


@functools.cache
def engine() -> Engine:
    return Engine(tiny_policy.policy(), 4, span_factor=1e6)


def about(identity: str = "abc") -> dict:
    options = argparse.Namespace(checkpoint="x", deadline_ms=0.0, batch=4)
    return metadata(tiny_policy.policy(), options, Inputs("z1", (CAMERA,), 16), identity)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(policy, actor, params, path, episodes=COUNT):
    return evaluate(
        policy,
        tiny_policy.pool(4),
        tiny_policy.one_device(),
        EvalConfig(episodes=episodes, noise_seed=3),
        FlowConfig(steps=4),
        path,
        title="tiny",
        actor=actor,
        params=params,
    )


def test_the_same_episodes_end_the_same(tmp_path):
    run(tiny_policy.policy(), None, None, tmp_path / "here.jsonl")
    with serving(engine(), metadata=about()) as (port, server):
        served = ServedPolicy(f"ws://127.0.0.1:{port}", (), WIDTHS, 0)
        run(served, served, (None, None), tmp_path / "there.jsonl")
        served.close()
    here = rows(tmp_path / "here.jsonl")
    assert here == rows(tmp_path / "there.jsonl") and len(here) == COUNT
    assert {row["success"] for row in here} == {True, False}  # else it would show little
    assert server.refused == 0 and max(server.batches) > 1


# The policy of a process with NumPy below 2: openpi's client between our messages on its standard input and output.
OPENPIS = """
import sys
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
while size := sys.stdin.buffer.read(8):
    message = msgpack_numpy.unpackb(sys.stdin.buffer.read(int.from_bytes(size, "big")))
    answer = msgpack_numpy.packb({"actions": policy.infer(message)["actions"]})
    sys.stdout.buffer.write(len(answer).to_bytes(8, "big") + answer)
    sys.stdout.buffer.flush()
"""


@pytest.mark.skipif("Z1_OPENPI_CLIENT" not in os.environ, reason="Z1_OPENPI_CLIENT names no Python with openpi-client")
def test_openpis_own_client_ends_the_same_episodes_the_same(tmp_path):
    run(tiny_policy.policy(), None, None, tmp_path / "here.jsonl")
    here = rows(tmp_path / "here.jsonl")
    env = tiny_policy.make_env()
    with serving(engine(), metadata=about()) as (port, _):
        command = [os.environ["Z1_OPENPI_CLIENT"], "-c", OPENPIS, str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:

            def decided(look, noise_seed):
                message = {"state": look.state, "images": look.images, "prompt": look.instruction}
                sent = wire.pack({**message, "noise_seed": noise_seed})
                client.stdin.write(len(sent).to_bytes(8, "big") + sent)
                client.stdin.flush()
                return wire.unpack(client.stdout.read(int.from_bytes(client.stdout.read(8), "big")))["actions"]

            for row in here:
                env.reset(Episode(row["seed"]))
                for chunk in itertools.count():
                    actions = decided(env.observe(), [3, row["seed"], chunk, 0])
                    if env.step_chunk(actions[: tiny_policy.CONFIG.horizon]).done:
                        break
                assert (env.success, env.steps) == (row["success"], row["steps"]), row
            client.stdin.close()
    assert len(here) == COUNT and {row["success"] for row in here} == {True, False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(directory / "checkpoints" / "grpo")
    checkpoints.save(3, tiny_policy.policy().parts(), tiny_policy.policy().document())
    checkpoints.close()
    return directory


def command(policy, run_dir, *more):
    settings = {"run_dir": run_dir, "env.cameras": CAMERA, "env.image_size": 28, "env.horizon": 24}
    settings |= {"env.parallel": 4, "env.workers": 0, "eval.episodes": 4, "eval.noise_seed": 3, "eval.videos": 1}
    evaluate_command.main(["", f"--policy={policy}", *(f"--config.{k}={v}" for k, v in settings.items()), *more])


def test_the_command_says_the_same_of_both(checkpoint, tmp_path, capsys):
    identity = policy_identity(str(checkpoint))
    command(checkpoint, tmp_path / "here")
    with serving(engine(), metadata=about(identity)) as (port, _):
        address = f"ws://127.0.0.1:{port}"
        command(address, tmp_path / "there")
        command(address, tmp_path / "there")
        assert "already finished" in capsys.readouterr().out
    here, there = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("here", "there"))
    assert here["after"] == there["after"] and here["policies"] == there["policies"]
    assert rows(tmp_path / "here/evaluation/checkpoint.jsonl") == rows(tmp_path / "there/evaluation/checkpoint.jsonl")
    for key in ("predicted_steps_per_chunk", "executed_steps_per_chunk", "denoising_steps", "slots", "widths"):
        assert here["protocol"][key] == there["protocol"][key]
    assert there["protocol"]["noise"] == "noise_seed" and there["labels"] == ["", address]
    assert (tmp_path / "there/videos/checkpoint_seed900000000.webp").exists()
    assert address in there["sentence"]


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path):
    with serving(engine(), metadata=about()) as (port, _):
        address = f"ws://127.0.0.1:{port}"
        for more, told in (
            (("--config.env.cameras=robot0_eye_in_hand",), "wants robot0_agentview_left"),
            (("--config.flow.steps=7",), "acts with its own 4: leave it at 0, or serve it with --steps=7"),
            (("--config.flow.temperature=0",), "got 0; .* acts with its own: leave it at -1"),
            (("--config.env.executed=9",), "predicts chunks of 8 steps"),
            (("--config.inputs.norm=z_score",), "was trained with 'quantile'"),
        ):
            with pytest.raises(UserError, match=told):
                command(address, tmp_path / "run", *more)
        with pytest.raises(UserError, match="option 'input' is not known"):
            command(f"{address}?input=libero", tmp_path / "run")
    remote.metadata.cache_clear()
    with pytest.raises(UserError, match=f"no answer from the policy at {address}"):
        command(address, tmp_path / "run")
    with serving(engine(), metadata=about(), api_key="secret") as (port, _):
        with pytest.raises(UserError, match=r"turned this client away \(HTTP 401: no API key.*Z1_API_KEY"):
            command(f"ws://127.0.0.1:{port}", tmp_path / "run")
    assert not (tmp_path / "run/evaluation").exists()


def test_a_served_policy_cannot_be_trained():
    with pytest.raises(ConfigError, match="config key init: a policy behind ws://127.0.0.1:9 cannot be trained"):
        train.main(["", "--config=configs/grpo.py", "--config.init=ws://127.0.0.1:9"])


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(remote.API_KEY, "secret")
    with serving(engine(), metadata=about("xyz"), api_key="secret") as (port, _):
        assert remote.identity(f"ws://127.0.0.1:{port}") == "xyz"


class Peer:
    """A server as openpi's is: empty metadata, one message after the other, no key of ours known."""

    def __init__(self, answer):
        self.answer, self.seen = answer, []

    def __enter__(self):
        self.server = serve(self.handle, "127.0.0.1", 0, compression=None)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"ws://127.0.0.1:{self.server.socket.getsockname()[1]}"

    def __exit__(self, *error):
        self.server.shutdown()

    def handle(self, connection):
        connection.send(wire.pack({}))
        for message in connection:
            self.seen.append(wire.unpack(message))
            connection.send(self.answer(self.seen[-1]))


def still(message):
    return wire.pack({"actions": np.zeros((50, 12)), "server_timing": {}})


def test_a_peers_policy_is_measured_by_the_same_rule(tmp_path, capsys):
    peer = Peer(still)
    with peer as address:
        for policy, more, told in (
            (
                address,
                (),
                "does not say what it calls things: give it, as in --policy=ws://127.0.0.1:[0-9]+.inputs=libero",
            ),
            (f"{address}?inputs=libero", (), "inputs libero: the client's state has width 8, the policy's 16"),
            (f"{address}?inputs=z1", (), "config key env.executed: .* does not say how many steps"),
        ):
            with pytest.raises(UserError, match=told):
                command(policy, tmp_path / policy.partition("=")[2], *more)
        command(f"{address}?inputs=z1", tmp_path / "run", "--config.env.executed=8")
    assert all(set(message) == {"state", "images", "prompt"} for message in peer.seen) and len(peer.seen) >= 12
    assert [row["steps"] for row in rows(tmp_path / "run/evaluation/checkpoint.jsonl")] == [24] * 4
    protocol = json.loads((tmp_path / "run/summary.json").read_text())["protocol"]
    assert protocol["noise"] == "the server's own" and protocol["denoising_steps"] == "not told"
    assert "takes no noise_seed: another evaluation of it will draw other noise" in capsys.readouterr().out


def test_a_server_that_says_nothing_is_named_by_its_address(tmp_path, capsys):
    """Else two of them, or one before and after a restart, count as one policy."""
    with Peer(still) as one, Peer(lambda message: wire.pack({"actions": np.full((50, 12), 0.1)})) as other:
        unnamed, settings = f"{one}?inputs=z1", ("--config.env.executed=8", "--config.eval.videos=0")
        with pytest.raises(UserError, match="count as one: name each, ws://HOST:PORT.policy=NAME"):
            command(unnamed, tmp_path / "both", f"--config.compare={other}?inputs=z1", *settings)
        command(unnamed, tmp_path / "unnamed", *settings)
        summary = json.loads((tmp_path / "unnamed/summary.json").read_text())
        assert f"{one} (which policy: not told)" in summary["sentence"]
        assert summary["protocol"]["served_policy"] == "not told"
        assert "does not say which policy it serves: after a restart" in capsys.readouterr().out

        named = f"{unnamed}&policy=mine"
        command(named, tmp_path / "both", f"--config.compare={other}?inputs=z1&policy=theirs", *settings)
        summary = json.loads((tmp_path / "both/summary.json").read_text())
        assert summary["labels"] == [f"A: theirs at {other}", f"B: mine at {one}"]
        assert summary["policies"]["checkpoint"] != summary["policies"]["compare"] and summary["difference"] == 0
        assert summary["protocol"]["served_policy"] == "mine" and "does not say which" not in capsys.readouterr().out
        with pytest.raises(UserError, match="belongs to another config|began with policy"):
            command(f"{unnamed}&policy=newer", tmp_path / "both", f"--config.compare={other}?inputs=z1&policy=theirs")
        for options, told in (("policy=", "option 'policy' is empty"), ("name=x", "option 'name' is not known")):
            with pytest.raises(UserError, match=told):
                command(f"{one}?{options}", tmp_path / "run")
    remote.metadata.cache_clear()
    with serving(engine(), metadata=about("xyz")) as (port, _):
        with pytest.raises(UserError, match=r"says which policy it serves \(xyz\); leave policy=mine away"):
            command(f"ws://127.0.0.1:{port}?policy=mine", tmp_path / "run")


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda message: "Traceback ...\nKeyError: 'state'", "refused an observation: KeyError: 'state'"),
        (lambda message: b"\xc1", "does not speak openpi's protocol: its message is no msgpack"),
        (lambda message: wire.pack([1]), "does not speak openpi's protocol: it sent a list"),
        (lambda message: wire.pack({"action": 1}), r"answered actions of shape \[\]; expected at least 8 steps"),
        (lambda message: wire.pack({"actions": np.zeros((4, 12))}), r"shape \[4, 12\]; expected at least 8 steps"),
        (lambda message: wire.pack({"actions": np.zeros((50, 7))}), r"shape \[50, 7\]; .* width 12"),
        (lambda message: wire.pack({"actions": np.full((50, 12), np.nan)}), "numbers that are not finite"),
    ],
)
def test_answers_that_are_none_are_one_line(answer, told, tmp_path):
    with Peer(answer) as address:
        with pytest.raises(UserError, match=told):
            command(f"{address}?inputs=z1", tmp_path / "run", "--config.env.executed=8")


def test_a_server_that_goes_away_costs_nothing_that_is_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    with serving(engine(), metadata=about()) as (port, server):
        served = ServedPolicy(f"ws://127.0.0.1:{port}", (), WIDTHS, 0)
        run(served, served, (None, None), path, episodes=4)
        server.stop_soon()
    with pytest.raises(UserError, match="what is finished is kept: start its server"):
        run(served, served, (None, None), path)
    served.close()
    assert len(rows(path)) == 4
    remote.metadata.cache_clear()
    with serving(engine(), metadata=about()) as (port, _):
        served = ServedPolicy(f"ws://127.0.0.1:{port}", (), WIDTHS, 0)
        run(served, served, (None, None), path)
        served.close()
    run(tiny_policy.policy(), None, None, tmp_path / "here.jsonl")
    assert rows(path) == rows(tmp_path / "here.jsonl")
