"""Calibrated returns, group-relative advantages and the group filter. Pure NumPy."""

from __future__ import annotations

import numpy as np


def calibrated_return(success: np.ndarray, chunks: np.ndarray, discount: float) -> np.ndarray:
    """R = γ^d for a success, d the number of chunks until it (the one in which it happens counts), else 0.

    Args:
        success: bool [...]; chunks: int [...] executed chunks; discount: γ in (0, 1].
    """
    return np.where(success, np.power(float(discount), chunks), 0.0)


def group_advantages(returns: np.ndarray, success: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """Advantages [groups, G] of returns [groups, G] (method: sections 3 and 5).

    (R − mean) / (population std + ε); where every member succeeds, R − min R: the slowest gets 0, nobody is punished
    for a slower success.
    """
    centred = returns - returns.mean(axis=1, keepdims=True)
    standardised = centred / (returns.std(axis=1, keepdims=True) + epsilon)
    above_slowest = returns - returns.min(axis=1, keepdims=True)
    return np.where(success.all(axis=1, keepdims=True), above_slowest, standardised)


def kept_groups(returns: np.ndarray, low: float, high: float) -> np.ndarray:
    """bool [groups]: low ≤ mean calibrated return ≤ high. Groups outside teach little and are left out."""
    mean = returns.mean(axis=1)
    return (mean >= low) & (mean <= high)
