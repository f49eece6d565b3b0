"""Several real processes over Gloo against one process with as many devices; and what is refused before they begin."""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import process_case
import pytest
import tiny_policy as tiny
from test_line import free_ports

from envs.base import Episode
from z1_jax import detection, distributed, processes, sharding, stages
from z1_jax.config.schema import Config, ConfigError, EnvConfig, GroupConfig, UpdateConfig
from z1_jax.detection import Place
from z1_jax.errors import UserError
from z1_jax.rl import shares
from z1_jax.rl.actor import blank
from z1_jax.rl.rollout import Share

ROOT = pathlib.Path(__file__).parent.parent
# The gradient of an attention's key bias is zero but for rounding, which Adam divides by its own size.
NO_GRADIENT = ("vision.layers.k.bias",)


def run_processes(count: int, devices: int, cases: str, axes: str, out: pathlib.Path) -> None:
    """`process_case` in so many processes of so many devices each."""
    flags = [f"--coordinator=localhost:{free_ports()}", f"--processes={count}"]
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("Z1_TEST_CACHE", "/tmp/z1-test-xla-cache"),
    }
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "process_case.py"), cases, axes, str(out), *flags]
    started = [
        subprocess.Popen([*command, f"--process={i}"], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for i in range(count)
    ]
    try:
        errors = [process.communicate(timeout=500)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, "\n".join(errors)


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-3 if name in NO_GRADIENT else 1e-5)


def against_one(count: int, devices: int, axes: str, tmp_path: pathlib.Path, placement: str = "recompute") -> None:
    (tmp_path / "placement").write_text(placement)
    data, fsdp = map(int, axes.split("x"))
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: count * devices])
    alone = {case: process_case.run(case, mesh, tmp_path) for case in ("sft", "grpo")}
    run_processes(count, devices, "+".join(alone), axes, tmp_path)
    for case, expected in alone.items():
        with np.load(tmp_path / f"{case}-{count}.npz") as found:
            compare(expected, dict(found))


def test_two_processes_train_as_one(tmp_path):
    """20 steps of SFT, and three updates of GRPO on the same rollouts, dealt unevenly: nodes and caches travel."""
    against_one(2, 1, "2x1", tmp_path, "host")


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["4x1", "1x4", "2x2"])
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_every_mesh_trains_alike(tmp_path, count, devices, axes):
    against_one(count, devices, axes, tmp_path, "host" if axes == "2x2" else "recompute")


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_goes_on_with_two_and_with_one(tmp_path):
    mesh = sharding.make_mesh(2, 2, devices=jax.devices()[:4])
    whole = process_case.run("sft", mesh, tmp_path)
    whole["told"] = whole["told"][10:]
    run_processes(4, 1, "first_half", "2x2", tmp_path)
    compare(whole, process_case.run("second_half", mesh, tmp_path))
    run_processes(2, 1, "second_half", "2x1", tmp_path)
    with np.load(tmp_path / "second_half-2.npz") as found:
        compare(whole, dict(found))


def test_every_node_of_a_batch_is_dealt_once_and_its_own_first(rng):
    for _ in range(50):
        parts, room = int(rng.integers(1, 6)), int(rng.integers(1, 9))
        owner = rng.integers(0, parts, 200)
        rows = rng.permutation(200)[: rng.integers(0, parts * room + 1)]
        share = Share(owner, np.arange(200), 0, parts)
        dealt = shares.deal(rows, share, room)
        assert sorted(np.concatenate(dealt).tolist()) == sorted(rows.tolist())
        for part, mine in enumerate(dealt):
            own = rows[owner[rows] == part]
            assert len(mine) <= room
            assert mine[: min(len(own), room)].tolist() == own[:room].tolist()


def test_what_travels_arrives(rng, monkeypatch):
    """Each part's arrays are those of the nodes that it was dealt, whoever made them."""
    parts, room = 3, 4
    owner = np.array([0] * 9 + [1] * 2 + [2] * 1)
    values, rows = rng.standard_normal((12, 5)), rng.permutation(12)

    def own(part):
        def arrays(of):
            assert (owner[of] == part).all()
            return values[of], 10 * values[of]

        return arrays

    shared = [Share(owner, np.arange(12), part, parts) for part in range(parts)]
    sent = []
    monkeypatch.setattr(distributed, "gathered", lambda tree: sent.append(tree) or tree)
    for part in range(parts):  # what each gives, which does not hang on what it gets
        with contextlib.suppress(IndexError):  # nobody else has given anything yet
            shares.brought(rows, shared[part], room, own(part))
    together = jax.tree.map(lambda *xs: np.concatenate(xs), *sent)
    monkeypatch.setattr(distributed, "gathered", lambda tree: together)
    seen = []
    for part in range(parts):
        mine, padded, (first, second) = shares.brought(rows, shared[part], room, own(part))
        assert len(padded) == len(first) == room
        np.testing.assert_array_equal(first, values[padded])
        np.testing.assert_array_equal(second, 10 * values[padded])
        seen += mine.tolist()
    assert sorted(seen) == list(range(12))


def test_a_blank_observation_has_the_shape_of_a_real_one():
    processor = tiny.processor()
    seen = tiny.pool(16).reset([0], [Episode(3)])
    real, nothing = processor.observation(seen), blank(processor)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), nothing)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_slurm_says_who_is_who(monkeypatch):
    assert detection.detected() is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = detection.detected()
    assert found == Place("node003", found.port, 8, 5, [1]) and found.port >= 61440
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert detection.detected().port == 1234
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert detection.detected() is None
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(UserError, match="slurm says that this is one of several .* --processes=1 to work alone"):
        detection.detected()
    assert processes.join(["train", "--processes=1", "--config=a"]) == ["train", "--config=a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2", "--process=0"], "--coordinator is missing"),
        (["--coordinator=here", "--processes=2", "--process=0"], "expected HOST:PORT"),
        (["--coordinator=here:99999", "--processes=2", "--process=0"], "expected HOST:PORT"),
        (["--coordinator=here:1", "--processes=two", "--process=0"], "--processes: got 'two', expected a whole number"),
        (["--coordinator=here:1", "--processes=2", "--process=2"], "--process: got 2, expected 0 to 1"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        processes.join(["train", *flags])


class TwoOnPaper:
    """A line to a second process that answers what it is told to."""

    count, index, hosts, over = 2, 0, ["a", "b"], False

    def __init__(self, answer):
        self.answer = answer

    def exchange(self, value):
        return [value, self.answer(value)]


def two(monkeypatch, answer=lambda value: value):
    monkeypatch.setattr(processes, "_line", TwoOnPaper(answer))


def test_what_differs_is_named_with_its_process(monkeypatch):
    facts = {"config key seed": 3, "the code": "abc"}
    two(monkeypatch)
    processes.require_agreement(facts)
    two(monkeypatch, lambda told: {**told, "config key seed": 4})
    with pytest.raises(UserError, match="^config key seed: process 1 on b has 4, process 0 has 3: all processes"):
        processes.require_agreement(facts)


def test_a_directory_that_one_does_not_see_is_refused(monkeypatch, tmp_path):
    two(monkeypatch, lambda told: False if told is True else told)
    with pytest.raises(UserError, match="process 1 on b does not see"):
        processes.require_shared(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(group=GroupConfig(count=1, size=4), env=EnvConfig(parallel=8)), "group.count: got 1 groups for 2"),
        (Config(group=GroupConfig(count=4, size=4), env=EnvConfig(parallel=4)), "env.parallel: got 4 .* multiple of 8"),
        (
            Config(
                group=GroupConfig(count=4, size=4),
                env=EnvConfig(parallel=8),
                update=UpdateConfig(prefix_cache="device"),
            ),
            "update.prefix_cache: got device with 2 processes",
        ),
    ],
)
def test_what_processes_cannot_share_is_one_line(monkeypatch, config, message):
    two(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        stages.check_processes(config, tiny.one_device())


def test_unequal_devices_are_one_line():
    distributed.check_alike([2, 2])
    with pytest.raises(UserError, match="process 1 has 1 devices, process 0 has 2"):
        distributed.check_alike([2, 1])
