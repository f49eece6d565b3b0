"""Peak numbers of accelerators, and where each comes from. Dense bfloat16 products with float32 sums, decimal units."""

from __future__ import annotations

import dataclasses

from z1_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device."""

    name: str
    tflops: float  # bfloat16, 10^12 operations a second; a multiply-add counts as two
    bandwidth: float  # of its memory, 10^9 bytes a second
    memory: float  # 10^9 bytes
    source: str

    def compute_ms(self, flops: float) -> float:
        """Least time for that many operations, in milliseconds."""
        return flops / self.tflops / 1e9

    def memory_ms(self, nbytes: float) -> float:
        """Least time to move that many bytes from or to memory, in milliseconds."""
        return nbytes / self.bandwidth / 1e6


# Without the sparsity that datasheets double their numbers with.
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("H200", 790, 4300, 141, "measured on large products and copies; datasheet: 989, 4800, 141"),
        Accelerator("H100", 989, 3350, 80, "NVIDIA H100 datasheet, SXM"),
        Accelerator("A100", 312, 2039, 80, "NVIDIA A100 datasheet, SXM 80 GB"),
        Accelerator("RTX4090", 165.2, 1008, 24, "NVIDIA Ada architecture whitepaper, table of the RTX 4090"),
        Accelerator("TPUv5e", 197, 819, 16, "Google Cloud documentation, TPU v5e"),
        Accelerator("TPUv5p", 459, 2765, 95, "Google Cloud documentation, TPU v5p"),
        Accelerator("TPUv6e", 918, 1640, 32, "Google Cloud documentation, TPU v6e"),
    )
}


def get_accelerator(name: str) -> Accelerator:
    """The accelerator of that name, however it is written ("RTX 4090", "tpu-v5p").

    Raises:
        UserError: it is not in the table.
    """
    wanted = _plain(name)
    for known, accelerator in ACCELERATORS.items():
        if _plain(known) == wanted:
            return accelerator
    raise UserError(f"accelerator {name!r} is not in the table; known: {', '.join(ACCELERATORS)}")


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The entry for what JAX calls a device ("NVIDIA H100 80GB HBM3", "TPU v5"); None where there is none."""
    plain = _plain(device_kind).replace("v5lite", "v5e").replace("v6lite", "v6e")
    plain = "tpuv5p" if plain == "tpuv5" else plain
    found = [accelerator for name, accelerator in ACCELERATORS.items() if _plain(name) in plain]
    return found[0] if found else None


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
