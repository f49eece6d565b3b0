"""Stores of prefix caches against plain concatenation; the choice of their place; what is refused."""

import functools

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from z1_jax import sharding
from z1_jax.config.schema import ConfigError
from z1_jax.models.pi05 import cache_bytes
from z1_jax.rl import prefix_cache
from z1_jax.rl.prefix_cache import DevicePrefixStore, PrefixStore, choose_placement, put_taken
from z1_jax.types import Observation, PrefixCache

LAYERS, TOKENS, KV, WIDTH = 3, 5, 2, 4


def batch(rng, size):
    shape = (LAYERS, size, TOKENS, KV, WIDTH)
    return PrefixCache(
        rng.normal(size=shape).astype("f"), rng.normal(size=shape).astype("f"), rng.random((size, TOKENS)) < 0.7
    )


def filled(store, rng):
    """Batches of padded sizes 8, 4 and 8 with 6, 1 and 8 real rows, put on the device; and their rows, joined."""
    parts = [(batch(rng, size), rows) for size, rows in ((8, 6), (4, 1), (8, 8))]
    for part, rows in parts:
        store.add(jax.device_put(part), rows)
    return jax.tree.map(
        lambda *xs: np.concatenate(xs, axis=int(xs[0].ndim == 5)), *(p.take(np.arange(n)) for p, n in parts)
    )


@functools.cache
def eight() -> jax.sharding.Mesh:
    return sharding.make_mesh(8, 1, 1)


@pytest.mark.parametrize("make", [PrefixStore, lambda: DevicePrefixStore(15 + 8, tiny.one_device())])
def test_rows_come_back_as_they_were(make, rng):
    store = make()
    joined = filled(store, rng)
    assert store.rows == 15
    for rows in (np.arange(15), rng.integers(0, 15, 12), np.array([14, 0, 6, 6])):
        taken = store.take(rows)
        for got, expected in zip(jax.tree.leaves(taken), jax.tree.leaves(joined.take(rows)), strict=True):
            np.testing.assert_array_equal(got, expected)
    store.clear()
    assert store.rows == 0
    again = filled(store, rng)  # another iteration: nothing of the first is left
    np.testing.assert_array_equal(store.take(np.arange(15)).k, again.k)


def test_a_device_store_is_spread_over_devices_like_a_batch(rng):
    store = DevicePrefixStore(15 + 8, eight())
    joined = filled(store, rng)
    rows = rng.integers(0, 15, 16)
    taken = store.take(rows)
    np.testing.assert_array_equal(taken.v, joined.take(rows).v)
    assert len(taken.k.sharding.device_set) == 8 and taken.k.sharding.shard_shape(taken.k.shape)[1] == 2
    # Held once in all, not once a device: capacity 23, rounded up to 24 rows.
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(store._all) for shard in leaf.addressable_shards)
    assert held == store.nbytes == 24 * (2 * LAYERS * TOKENS * KV * WIDTH * 4 + TOKENS)


def test_a_device_store_compiles_once_per_batch_size(rng):
    store = DevicePrefixStore(40, tiny.one_device())
    for _ in range(3):
        store.clear()
        filled(store, rng)
        store.take(rng.integers(0, 15, 6))
    assert store.traces == {"write": 2, "take": 1}


def test_a_device_store_refuses_what_it_does_not_hold(rng):
    store = DevicePrefixStore(8, tiny.one_device())
    with pytest.raises(ValueError, match="0 are stored"):
        store.take(np.array([0]))
    store.add(jax.device_put(batch(rng, 4)), 3)
    with pytest.raises(ValueError, match="observation 3 asked for, 3 are stored"):
        store.take(np.array([3]))
    with pytest.raises(ValueError, match="exceed the store's 8"):
        store.add(jax.device_put(batch(rng, 8)), 8)


def test_a_host_store_holds_no_padding(rng):
    store = PrefixStore()
    filled(store, rng)
    assert store.nbytes == 15 * (2 * LAYERS * TOKENS * KV * WIDTH * 4 + TOKENS)


@pytest.mark.parametrize("page_locked", [False, True])
def test_batches_arrive_by_either_way(page_locked, rng, monkeypatch):
    """A CPU has no need of page-locked memory, but it has it: the way of a GPU is walked here too."""
    monkeypatch.setattr(prefix_cache, "page_locked_first", lambda mesh: page_locked)
    cache = batch(rng, 8)
    placed = put_taken(cache, eight())
    for got, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.sharding.memory_kind == jax.devices()[0].default_memory().kind
        assert len(got.sharding.device_set) == 8


def test_planned_bytes_are_those_of_the_real_cache(rng):
    actor, params = tiny.acting()
    looks = Observation(
        rng.integers(0, 256, (4, 1, 28, 28, 3), dtype=np.uint8),
        np.ones((4, 1), bool),
        rng.integers(1, 500, (4, 48)).astype(np.int32),
        np.ones((4, 48), bool),
    )
    cache, _ = actor.encode(params, looks)
    rows = cache.mask.shape[0]
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == rows * cache_bytes(tiny.CONFIG)


def test_the_choice_of_place():
    def choose(asked="auto", vlm=False, planned=100, device=1000, host=1000):
        return choose_placement(asked, vlm, "lora", planned, device, host)

    assert choose() == "device" and choose(planned=400) == "device" and choose(planned=401) == "host"
    assert choose(device=None) == "host"  # device memory is host memory
    assert choose(planned=501) == "recompute" and choose(device=None, host=150) == "recompute"
    assert [choose(asked, planned=10**9) for asked in ("device", "host", "recompute")] == [
        "device",
        "host",
        "recompute",
    ]
    assert choose(vlm=True) == choose("recompute", vlm=True) == "recompute"
    for asked in ("device", "host"):
        with pytest.raises(ConfigError, match=f"got {asked} with train.scope=lora, which trains the VLM") as error:
            choose(asked, vlm=True)
        assert "\n" not in str(error.value)
