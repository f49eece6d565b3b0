"""The server from outside: openpi's protocol, many clients, hostile ones, and a stop that loses nothing."""

import concurrent.futures
import contextlib
import functools
import http.client
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
import tiny_policy
from policy_server import HELLO, serving
from seeds import fresh_seed
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from envs.base import EnvObservation
from z1_jax.checkpoint import Checkpoints
from z1_jax.errors import UserError
from z1_jax.serve import __main__ as command
from z1_jax.serve import wire
from z1_jax.serve.engine import Engine
from z1_jax.serve.server import Limits, place

ROOT = pathlib.Path(__file__).parents[1]
CAMERA = tiny_policy.CAMERA
pytestmark = pytest.mark.filterwarnings("ignore:connect\\(\\) must be used:DeprecationWarning")  # as openpi-client does


@functools.cache
def engine() -> Engine:
    return Engine(tiny_policy.policy(), 4, span_factor=1e6)


def client(port, **options):
    """A connection as openpi-client makes it, after its metadata."""
    connection = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options)
    assert wire.unpack(connection.recv()) == HELLO
    return connection


def observation(rng, **more):
    image = rng.integers(0, 256, (28, 28, 3)).astype(np.uint8)
    return {"state": rng.uniform(-1, 1, 16), "images": {CAMERA: image}, "prompt": "turn on the faucet", **more}


def asked(connection, message):
    """The answer's dict, or the text of an error frame."""
    connection.send(message if isinstance(message, (bytes, str)) else wire.pack(message))
    reply = connection.recv(60)
    return reply if isinstance(reply, str) else wire.unpack(reply)


def expected(message):
    look = EnvObservation(message["images"], message["state"], message["prompt"])
    (answer,) = engine().decide([engine().prepare(look, message["noise_seed"])])
    return answer.actions


def test_one_client_the_whole_protocol(rng):
    with serving(engine(), seed=5) as (port, server), client(port) as one:
        message = observation(rng, noise_seed=[1, 2])
        first, again = asked(one, message), asked(one, message)
        np.testing.assert_allclose(first["actions"], expected(message), atol=1e-4)
        np.testing.assert_array_equal(again["actions"], first["actions"])  # nothing is kept between calls
        assert first["actions"].dtype == np.float32 and first["actions"].shape == (8, 12)
        timing = again["server_timing"]
        assert set(timing) == {"infer_ms", "queue_ms", "decide_ms", "batch", "prev_total_ms"}
        assert timing["infer_ms"] >= timing["decide_ms"] == again["policy_timing"]["infer_ms"] > 0
        assert "prev_total_ms" not in first["server_timing"]
        # Without noise_seed the n-th such request has the noise of (seed, n), whoever asks.
        del message["noise_seed"]
        drawn = [asked(one, message)["actions"] for _ in range(2)]
        for n, got in enumerate(drawn):
            np.testing.assert_allclose(got, expected({**message, "noise_seed": (5, n)}), atol=1e-4)
        assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
        left = {"previous_actions": first["actions"][3:], "delay": 2, "noise_seed": [1, 2]}
        look = EnvObservation(message["images"], message["state"], message["prompt"])
        (onwards,) = engine().decide([engine().prepare(look, (1, 2), first["actions"][3:], 2)])
        np.testing.assert_allclose(asked(one, {**message, **left})["actions"], onwards.actions, atol=1e-4)
        assert (server.answered, server.refused) == (5, 0)


def test_health_key_and_pages_of_a_browser():
    with serving(engine(), api_key="secret") as (port, _):
        web = http.client.HTTPConnection("127.0.0.1", port)
        web.request("GET", "/healthz")
        assert (answer := web.getresponse()).status == 200 and answer.read() == b"OK\n"
        for headers, told in (({}, "no API key"), ({"Authorization": "Api-Key secre"}, "wrong API key")):
            with pytest.raises(InvalidStatus) as caught:
                client(port, additional_headers=headers)
            assert caught.value.response.status_code == 401 and told in caught.value.response.body.decode()
        good = {"Authorization": "Api-Key secret"}
        client(port, additional_headers=good).close()
        with pytest.raises(InvalidStatus) as caught:
            client(port, additional_headers=good, origin="http://evil.example")
        assert caught.value.response.status_code == 403


def test_several_clients_share_batches(rng):
    """Each gets its own answer, and there are fewer batches than requests."""
    clients, rounds = 6, 8
    with serving(engine()) as (port, server):

        def drive(number):
            mine = np.random.default_rng([fresh_seed(f"client {number}"), number])
            with client(port) as one:
                for n in range(rounds):
                    message = observation(mine, noise_seed=[number, n])
                    yield message, asked(one, message)

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            told = [pair for pairs in pool.map(lambda n: list(drive(n)), range(clients)) for pair in pairs]
        for message, reply in told:
            np.testing.assert_allclose(reply["actions"], expected(message), atol=1e-4)
        assert sum(server.batches.values()) < sum(k * n for k, n in server.batches.items()) == clients * rounds
        assert max(server.batches) <= 4


class Slow:
    """An engine that takes its time: what a full-size policy is to the server."""

    largest = 1

    def __init__(self, seconds):
        self.seconds, self.began = seconds, threading.Event()

    def prepare(self, *arguments):
        return engine().prepare(*arguments)

    def decide(self, requests):
        self.began.set()
        time.sleep(self.seconds)
        return engine().decide(requests)


def test_a_full_queue_and_too_many_clients_are_told(rng):
    slow = Slow(1.0)
    with serving(slow, limits=Limits(connections=3, queue=1)) as (port, _):
        clients = [client(port) for _ in range(3)]
        with pytest.raises(InvalidStatus) as caught:
            client(port)
        assert caught.value.response.status_code == 503 and b"3 clients are connected" in caught.value.response.body
        message = wire.pack(observation(rng))
        clients[0].send(message)
        assert slow.began.wait(10)
        clients[1].send(message)
        time.sleep(0.3)
        assert asked(clients[2], message) == (
            "error: 1 requests wait already, the most that this server keeps; try again"
        )
        for one in clients[:2]:
            assert wire.unpack(one.recv(10))["actions"].shape == (8, 12)
        assert wire.unpack(wire.pack(asked(clients[2], message)))["actions"].shape == (8, 12)
        for one in clients:
            one.close()
        client(port).close()


def test_observations_older_than_the_deadline_are_refused(rng):
    with serving(Slow(0.3), limits=Limits(deadline_s=0.2)) as (port, _), client(port) as one:
        told = asked(one, observation(rng))
        assert told.startswith("error: the observation is ") and "more than the deadline of 200 ms" in told
    slow = Slow(0.0)
    with serving(slow, limits=Limits(deadline_s=20)) as (port, _), client(port) as one:
        slow.began.clear()
        assert "ms old" in asked(one, observation(rng, age_ms=20_001)) and not slow.began.is_set()
        assert asked(one, observation(rng, age_ms=1))["actions"].shape == (8, 12)


def test_faults_of_the_policy_are_refused(rng):
    policy = tiny_policy.policy()
    narrow = Engine(policy, 1, span_factor=0.0)
    with serving(narrow) as (port, server), client(port) as one:
        told = {asked(one, observation(rng)) for _ in range(4)}
        assert all("spans beyond the statistics' -1 … 1: not sent" in text for text in told) and server.refused == 4

    class Failing(Slow):
        def decide(self, requests):
            raise RuntimeError("out of memory")

    with serving(Failing(0)) as (port, _), client(port) as one:
        for _ in range(2):
            assert asked(one, observation(rng)) == "error: the policy failed (RuntimeError); see the server's log"


def bad_messages(rng):
    """One of each kind of message that gets an error frame."""
    good = observation(rng)
    array = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|O", b"shape": [1]}
    return [
        rng.bytes(200),
        b"",
        "text",
        wire.pack([1, 2]),
        wire.pack({**good, "state": array}),
        wire.pack({**good, "state": np.zeros(3)}),
        wire.pack({**good, "state": np.full(16, np.nan)}),
        wire.pack({**good, "images": {CAMERA: np.zeros((28, 28), np.uint8)}}),
        wire.pack({**good, "images": {CAMERA: np.full((28, 28, 3), 3.0)}}),
        wire.pack({**good, "images": {"other": good["images"][CAMERA]}}),
        wire.pack({key: good[key] for key in ("state", "prompt")}),
        wire.pack({**good, "noise_sed": 3}),
        wire.pack({**good, "noise_seed": [-1]}),
        wire.pack({**good, "delay": 3}),
        wire.pack({**good, "previous_actions": np.zeros((4, 5))}),
        b"\xdd\xff\xff\xff\xff" * 1000,
    ]


def oversized(port, rng):
    """Somewhat too large: an error frame, and the connection goes on. Far too large: it is closed unread."""
    with client(port) as one:
        told = asked(one, b"\0" * int(rng.integers(250_001, 500_000)))
        assert "MB, more than the 0.238 that this server takes (--max-message-mb)" in told
        assert asked(one, observation(rng))["actions"].shape == (8, 12)
        with pytest.raises(ConnectionClosed) as caught:
            for _ in range(3):  # what is on its way may still be accepted
                one.send(b"\0" * 500_001)
                one.recv(20)
        assert caught.value.rcvd.code == 1009 and "500000" in caught.value.rcvd.reason


def half_closed(port, rng):
    with contextlib.suppress(OSError, ConnectionClosed):
        one = client(port)
        one.socket.shutdown(socket.SHUT_WR)
        one.socket.close()


def broken_off(port, rng):
    """A frame that never ends, and a handshake that never does."""
    raw = socket.create_connection(("127.0.0.1", port))
    raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
    raw.close()
    one = client(port)
    one.socket.sendall(b"\x82\xfe\xff\xff\0\0\0\0only the beginning")
    one.socket.close()


def gone_before_the_answer(port, rng):
    one = client(port)
    one.send(wire.pack(observation(rng)))
    one.socket.close()


def test_a_thousand_bad_messages_hurt_nobody_else(rng, seed):
    """Beside them a healthy client, whose every answer is right."""
    with serving(engine(), limits=Limits(message_bytes=250_000)) as (port, server):
        over, told = threading.Event(), []

        def healthy():
            mine = np.random.default_rng([seed, 1])
            with client(port) as one:
                n = 0
                while not over.is_set():
                    message = observation(mine, noise_seed=[n])
                    told.append((message, asked(one, message)))
                    n += 1

        def hostile(number):
            mine = np.random.default_rng([seed, 2, number])
            sent = 0
            while sent < 250:
                kind = mine.integers(10)
                if kind < 4:
                    (oversized, half_closed, broken_off, gone_before_the_answer)[kind](port, mine)
                    sent += 1
                    continue
                with client(port) as one:
                    for message in mine.permutation(np.array([*bad_messages(mine), None], object)[:-1]):
                        reply = asked(one, message)
                        assert isinstance(reply, str) and reply.startswith("error: "), reply
                        assert "\n" not in reply and len(reply) < 400 and "Traceback" not in reply
                        sent += 1
                    assert asked(one, observation(mine))["actions"].shape == (8, 12)  # the connection is still good

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            fine = pool.submit(healthy)
            for worker in [pool.submit(hostile, number) for number in range(4)]:
                worker.result()
            over.set()
            fine.result()
        assert server.refused > 500 and len(told) > 20
        for message, reply in told:
            np.testing.assert_allclose(reply["actions"], expected(message), atol=1e-4)


def handshake(port):
    """A connection that does nothing more than begin."""
    raw = socket.create_connection(("127.0.0.1", port))
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    raw.settimeout(20)
    return raw


def free_again(port):
    """The dropped client's place can be taken, a moment later."""
    until = time.monotonic() + 20
    while True:
        try:
            with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as one:
                return one.recv()
        except InvalidStatus as error:
            assert error.response.status_code == 503 and time.monotonic() < until
            time.sleep(0.1)


def test_who_answers_no_ping_is_dropped(rng):
    with serving(engine(), limits=Limits(ping_s=0.5, send_s=0.5, connections=2)) as (port, _):
        silent = handshake(port)
        with client(port) as one:
            while silent.recv(4096):
                pass
            assert asked(one, observation(rng))["actions"].shape == (8, 12)
            free_again(port)


def test_who_does_not_read_is_dropped():
    size = 16 << 20  # more than the buffers on the way
    told = {"large": np.zeros(size, np.uint8)}
    with serving(engine(), told, limits=Limits(send_s=2.0, connections=1)) as (port, _):
        stuck = handshake(port)
        time.sleep(3.5)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while part := stuck.recv(1 << 20):
                got += len(part)
        assert got < size
        free_again(port)


def test_a_stop_answers_what_is_under_way(rng):
    slow = Slow(0.5)
    with serving(slow) as (port, server):
        busy, waiting, idle = (client(port) for _ in range(3))
        message = observation(rng, noise_seed=3)
        busy.send(wire.pack(message))
        assert slow.began.wait(10)
        waiting.send(wire.pack(message))
        time.sleep(0.2)
        server.stop_soon()
        for one in (busy, waiting):
            np.testing.assert_allclose(
                wire.unpack(one.recv(10))["actions"], expected({**message, "noise_seed": (3,)}), atol=1e-4
            )
        for one in (busy, waiting, idle):
            with pytest.raises(ConnectionClosed) as caught:
                one.recv(10)
            assert caught.value.rcvd.code == 1001
        with pytest.raises(OSError):
            client(port)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(directory / "checkpoints" / "grpo")
    checkpoints.save(3, tiny_policy.policy().parts(), tiny_policy.policy().document())
    checkpoints.close()
    return directory


def start(*arguments, **environment):
    ours = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "Z1_API_KEY")}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "z1_jax.serve", *arguments],
        cwd=ROOT,
        env={**ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_stops(number, checkpoint, rng):
    process = start(f"--checkpoint={checkpoint}", "--port=0", "--batch=1", "--span-factor=1e6")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("serving at ws://127.0.0.1:"):
            break
    else:
        raise AssertionError("".join(lines))
    address = lines[-1].split()[2]
    assert "an observation has state, images/robot0_agentview_left, prompt; an answer 8 steps" in lines[-2]
    with connect(address, compression=None) as one:
        about = wire.unpack(one.recv())
        assert (about["horizon"], about["executed"], about["widths"]) == (8, 8, {"state": 16, "actions": 12})
        message = observation(rng, noise_seed=[3])
        np.testing.assert_allclose(asked(one, message)["actions"], expected(message), atol=1e-3)
        process.send_signal(number)
        assert process.wait(60) == 0
    assert process.stdout.read().endswith("stopped: 1 answered, 0 refused\n")


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((), "the following arguments are required: --checkpoint"),
        (("--checkpoint=/nowhere",), "no policy at /nowhere"),
        (("--checkpoint=x", "--port=70000"), "argument --port: got 70000, expected 0 to 65535"),
        (("--checkpoint=x", "--batch=0"), "argument --batch: got 0"),
        (("--checkpoint=x", "--span-factor=nan"), "argument --span-factor: got nan"),
        (("--checkpoint=x", "--inputs=ur5"), "invalid choice: 'ur5'"),
        (("--checkpoint=x", "--api-key-file=/nowhere"), "argument --api-key-file: /nowhere cannot be read"),
        (("--checkpoint=RUN", "--inputs=droid"), "inputs droid: the client's state has width 8, the policy's 16"),
        (("--checkpoint=/nowhere", "--host=203.0.113.1"), "cannot serve at 203.0.113.1:0"),
        (("--checkpoint=/nowhere", "--host=nowhere.invalid"), "cannot serve at nowhere.invalid:0"),
        (("--checkpoint=/nowhere", "--port=TAKEN"), r"\(Address already in use\); choose others"),
        (("--checkpoint=x", "--api-key=secret"), "unrecognized arguments: --api-key=secret"),
    ],
)
def test_mistakes(arguments, told, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        named = {"RUN": str(checkpoint), "TAKEN": str(taken.getsockname()[1])}
        given = [functools.reduce(lambda text, name: text.replace(name, named[name]), named, a) for a in arguments]
        with pytest.raises(UserError, match=told):
            command.main(["", "--port=0", *given])


@pytest.mark.parametrize(
    "host, leads, alone",
    [("robot.example", "::1", True), ("robot.example", "127.0.0.2", True), ("a", "::", False), ("a", "0.0.0.0", False)],
)
def test_a_name_is_what_it_leads_to(host, leads, alone, monkeypatch):
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *rest, **how: look_up(leads, *rest, **how))
    assert command._check_address(host, 0) is alone


def test_the_address_that_is_told_is_one_that_clients_take():
    for host, told in (("::1", "[::1]:80"), ("127.0.0.1", "127.0.0.1:80"), ("robot.example", "robot.example:80")):
        assert place(host, 80) == told and urllib.parse.urlsplit(f"ws://{told}").hostname == host


def test_without_the_extra_it_says_so(checkpoint):
    code = (
        "import sys; sys.modules['websockets'] = None; sys.modules['websockets.asyncio.server'] = None\n"
        f"sys.argv = ['x', '--checkpoint={checkpoint}']\n"
        "from z1_jax.process import run_main; from z1_jax.serve.__main__ import main; run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "install it with pip install 'z1-jax[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1


OPENPI = os.environ.get("Z1_OPENPI_CLIENT", "")  # a Python with openpi-client, which wants NumPy below 2


@pytest.mark.skipif(not OPENPI, reason="Z1_OPENPI_CLIENT names no Python that has openpi-client")
def test_openpis_own_client_drives_it(rng, tmp_path):
    code = """
import sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="secret")
assert policy.get_server_metadata() == {"hello": "client", "none": None}
observation = dict(np.load(sys.argv[2]))
observation = {"state": observation["state"], "images": {sys.argv[3]: observation["image"]}, "prompt": "turn on"}
observation["noise_seed"] = [4, 5]
broker = ActionChunkBroker(policy, 8)
rows = [broker.infer(observation)["actions"] for _ in range(8)]
broker.reset()
assert np.array_equal(broker.infer(observation)["actions"], rows[0])
try:
    policy.infer({**observation, "state": np.zeros(3)})
except RuntimeError as error:
    print(error)
np.save(sys.argv[4], np.stack(rows))
try:
    WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="wrong")
except Exception as error:
    print(type(error).__name__, error)
"""
    message = observation(rng)
    with serving(engine(), api_key="secret") as (port, _):
        np.savez(tmp_path / "in.npz", state=message["state"], image=message["images"][CAMERA])
        command = [OPENPI, "-c", code, str(port), str(tmp_path / "in.npz"), CAMERA, str(tmp_path / "out.npy")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "error: the message has state of shape [3]; expected [16]" in done.stdout
    assert "InvalidStatus server rejected WebSocket connection: HTTP 401" in done.stdout
    got = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(got, expected({**message, "prompt": "turn on", "noise_seed": (4, 5)}), atol=1e-4)
