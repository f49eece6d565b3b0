"""Eight virtual CPU devices for every test, and a compilation cache that outlives one test run."""

import os

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

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.environ.get("Z1_TEST_CACHE", "/tmp/z1-test-xla-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fresh seed; a failing test shows the seed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)
