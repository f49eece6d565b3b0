"""Settings of how a model computes, independent of its shape."""

from __future__ import annotations

import dataclasses

from z1_jax.models.choices import ACTING, ATTENTION, DTYPES, REMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Settings of the computation. They change results by rounding alone.

    Raises:
        ValueError: a setting that is not among its choices, or attention cudnn without bfloat16.
    """

    dtype: str = "bfloat16"  # of the computation
    remat: str = "none"  # activations kept for the backward pass: none (all) | dots | full (recompute all)
    unroll: bool = False  # write the layers out instead of looping: faster for a few small layers on a CPU
    attention: str = "einsum"  # einsum | xla | cudnn
    # Parameters that decisions read: plain | prepared (see acting) | auto: prepared on accelerators, if there are no
    # adapters. A CPU has no kernel launches to save, and would compile the unrolled layers for longer.
    acting: str = "auto"

    def __post_init__(self):
        for name, allowed in (("dtype", DTYPES), ("remat", REMAT), ("attention", ATTENTION), ("acting", ACTING)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention {self.attention} computes in bfloat16 only; got dtype {self.dtype}")

    @property
    def compute(self) -> Compute:
        """The settings of this class alone, taken from a configuration that has more."""
        return Compute(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Compute)})
