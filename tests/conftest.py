"""Eight virtual CPU devices for every test, and a compilation cache that outlives one test run."""

import os
import signal
import threading
from collections.abc import Iterator

# Unoptimised code: nearly all the time of these tests would go into compiling what then runs for milliseconds.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Eight devices on two busy cores: a late one is waited for, where XLA would end the process after 40 s.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A collective holds a thread until every device has come, and a device may wait in several. XLA's pool has as many
# threads as there are devices: when all wait, those that would free them get none, for ever. Idle threads cost nothing.
os.environ.setdefault("PJRT_NPROC", "64")

# In a background job (`nohup pytest &`) SIGINT is ignored, here and in what tests start: make it as in a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.environ.get("Z1_TEST_CACHE", "/tmp/z1-test-xla-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from seeds import fresh_seed, run_seed  # noqa: E402

from z1_jax import suites  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="draw the random inputs of an earlier run, whose failures named its seed")


def pytest_configure(config: pytest.Config) -> None:
    config.option.seed = run_seed(config.option.seed)  # pytest-xdist hands the options on to its workers


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed={config.option.seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        report.sections.append(("random inputs", f"drawn again by --seed={item.config.option.seed}"))
    return report


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    """What commands set for the whole process, such as the precision of products, does not reach other tests."""
    precision = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", precision)
    suites.build.cache_clear()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed of this test; a failure shows it, and `--seed` repeats it."""
    return fresh_seed(request.node.nodeid)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator with a fresh seed of this test."""
    return np.random.default_rng(fresh_seed(request.node.nodeid))
