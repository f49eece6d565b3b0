"""Eight virtual CPU devices for every test, and a compilation cache that outlives one test run."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.environ.get("Z1_TEST_CACHE", "/tmp/z1-test-xla-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
