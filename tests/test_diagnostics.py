"""Metrics of an iteration by hand, and the refusal of broken steps."""

import dataclasses

import numpy as np
import pytest
import tiny_policy as tiny
from tiny_grpo import trainer

from z1_jax.rl.diagnostics import RatioError, check_step, save_broken, sharing_metrics, times, update_metrics

STEP = {
    "loss": 1.0,
    "ratio_error": 0.0,
    "ratio_sum": 4.0,
    "ratio_max": 1.5,
    "clipped": 2.0,
    "clipped_positive": 2.0,
    "clipped_negative": 1.0,
    "kl_sum": 0.4,
    "grad_norm": 3.0,
    "grad_norm/expert": 3.0,
    "update_to_weight": 0.1,
    "nodes": 4.0,
}


def test_means_over_nodes_maxima_and_means_over_steps():
    second = {**STEP, "loss": 3.0, "ratio_error": 0.5, "ratio_sum": 8.0, "ratio_max": 2.5, "nodes": 6.0, "kl_sum": 0.6}
    metrics = update_metrics([STEP, second])
    assert metrics == pytest.approx(
        {
            "updates": 2,
            "loss": 2.0,
            "ratio/first_update_max_error": 0.0,
            "ratio/mean": 1.2,
            "ratio/max": 2.5,
            "clip_fraction": 0.4,
            "clip_fraction/positive": 0.4,
            "clip_fraction/negative": 0.2,
            "approx_kl": 0.1,
            "grad_norm": 3.0,
            "grad_norm/expert": 3.0,
            "update_to_weight": 0.1,
        }
    )
    assert update_metrics([]) == {"updates": 0}
    assert update_metrics([{**STEP, "kl_reference": 0.25}])["kl/reference"] == 0.25


def test_broken_steps_are_refused():
    check_step(STEP, True, 1e-3)
    check_step({**STEP, "ratio_error": 0.7}, False, 1e-3)  # later steps may move
    with pytest.raises(RatioError, match="off by 0.002, expected at most 0.001"):
        check_step({**STEP, "ratio_error": 0.002}, True, 1e-3)
    for name in STEP:
        for value in (np.nan, np.inf):
            with pytest.raises(RatioError, match=f"{name} of the update is not finite"):
                check_step({**STEP, name: value}, False, 1e-3)


def test_sharing_by_counting():
    """Tokens, looks and saved steps from the rollouts' own tables; a replayed iteration would need `unshared`."""
    out = trainer().collect(tiny.pool(16), 0)
    metrics = sharing_metrics(out, tiny.CONFIG.vision.tokens, counted=56, noise_level=0.5)
    words = [int(row.sum()) for row in out.looks.token_mask]
    assert metrics["tokens/encoded"] == sum(words) + 4 * len(words)  # 28 pixels of patches of 14: 4 tokens
    assert metrics["tokens/denoised"] == len(out.nodes.size) * 4 * 8 and metrics["looks"] == len(words)
    assert metrics["chunks"] == (out.nodes.size).sum() == out.chunks.sum()
    assert metrics["steps/unshared"] == (out.nodes.size * out.nodes.steps).sum()
    assert metrics["steps/saved"] == pytest.approx(1 - out.nodes.steps.sum() / out.steps.sum())
    # Entropy of four steps: std of step k is 0.5·√(t/(max(1 − t, 1/4)))·√(1/4).
    std = [0.5 * np.sqrt(t / max(1 - t, 0.25)) * 0.5 for t in (1, 0.75, 0.5, 0.25)]
    assert metrics["sampler/entropy"] == pytest.approx(56 * sum(0.5 * np.log(2 * np.pi * np.e * s**2) for s in std))
    alone = dataclasses.replace(out, nodes=dataclasses.replace(out.nodes, steps=np.zeros(len(out.nodes.size), int)))
    assert sharing_metrics(alone, 4, 56, 0.5)["steps/saved"] == 1.0


def test_idle_is_what_nothing_accounts_for():
    class Timed:
        seconds = {"simulate": 1.0, "render": 2.0, "sample": 0.5, "hidden": 0.0}

    split = times(Timed, collect_s=4.0, update_s=1.0)
    assert split["time/idle"] == 0.5 and split["time/total"] == 5.0
    assert "time/hidden" not in split and times(Timed, collect_s=3.0, update_s=1.0)["time/idle"] == 0.0
    Timed.seconds = {**Timed.seconds, "hidden": 0.75}  # it fell into the seconds of sampling
    assert times(Timed, collect_s=4.0, update_s=1.0) == {**split, "time/hidden": 0.75}


def test_evidence_is_written_as_it_is(tmp_path, rng):
    arrays = {"nodes/x": rng.normal(size=(3, 2)), "update/ratio": np.array([np.nan, 1.0])}
    path = save_broken(tmp_path, 7, arrays)
    assert path == tmp_path / "broken" / "iteration-7.npz"
    with np.load(path) as kept:
        assert set(kept) == set(arrays)
        for name in arrays:
            np.testing.assert_array_equal(kept[name], arrays[name])
