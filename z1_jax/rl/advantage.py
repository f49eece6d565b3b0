"""Returns, group-relative advantages and the group filter. Pure NumPy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

REWARDS = ("decay", "penalty", "sparse")
STDS = ("population", "sample", "none")


def calibrated_return(success: Bool[np.ndarray, "..."], chunks: Int[np.ndarray, "..."], discount: float) -> np.ndarray:
    """R = γ^d for a success, d the number of chunks until it (the one in which it happens counts), else 0.

    Args:
        success: bool [...]; chunks: int [...] executed chunks; discount: γ in (0, 1].
    """
    return np.where(success, np.power(float(discount), chunks), 0.0)


def returns_of(
    reward: str, success: Bool[np.ndarray, "..."], chunks: Int[np.ndarray, "..."], discount: float, penalty: float
) -> np.ndarray:
    """Returns [...] of one kind of reward (method: section 5).

    `decay`: `calibrated_return`. `penalty`: 1 for a success, else 0, less `penalty` for each executed chunk of either.
    `sparse`: 1 for a success, else 0.

    Raises:
        ValueError: another kind.
    """
    if reward not in REWARDS:
        raise ValueError(f"reward: got {reward!r}, expected one of {', '.join(REWARDS)}")
    if reward == "decay":
        return calibrated_return(success, chunks, discount)
    return success.astype(float) - (penalty * chunks if reward == "penalty" else 0.0)


def group_advantages(
    returns: Float[np.ndarray, "groups G"],
    success: Bool[np.ndarray, "groups G"],
    epsilon: float = 1e-6,
    *,
    std: str = "population",
    all_success: str = "slowest",
) -> np.ndarray:
    """Advantages [groups, G] of returns [groups, G] (method: sections 3 and 5).

    (R − mean) / (std + ε), where `std` is over G (`population`), over G − 1 (`sample`), or not divided by (`none`).
    Where every member succeeds nothing is divided: `all_success="slowest"`: R − min R, nobody is punished for a slower
    success; `"mean"`: R − mean R, as goes with a penalty.
    """
    centred = returns - returns.mean(axis=1, keepdims=True)
    standardised = centred
    if std != "none":
        spread = returns.std(axis=1, keepdims=True, ddof=1 if std == "sample" else 0)
        standardised = centred / (spread + epsilon)
    undivided = returns - returns.min(axis=1, keepdims=True) if all_success == "slowest" else centred
    return np.where(success.all(axis=1, keepdims=True), undivided, standardised)


def kept_groups(values: Shaped[np.ndarray, "groups G"], low: float, high: float) -> np.ndarray:
    """bool [groups]: low ≤ mean of a group's values ≤ high. Groups outside teach little and are left out.

    Args:
        values: [groups, G], returns, or successes for a filter that comes before any decay.
    """
    mean = values.mean(axis=1)
    return (mean >= low) & (mean <= high)
