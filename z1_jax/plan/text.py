"""A plan in words, and as a document for machines."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

from z1_jax.plan import rendering
from z1_jax.plan.planning import Plan

GB = 1e9
NOTE = (
    "Bytes are of one device, in units of 10^6 or 10^9. 'estimate' is read from the traced program and supposes the "
    "fusions of an accelerator's compiler; planned with is 1.7 times that, which GPU compilations of full-size π0.5 "
    "stayed below, or 'compiled' where that is for a GPU: XLA's buffer assignment for the named target. One for cpu "
    "says little about a GPU: XLA's CPU compiler widens bfloat16 to float32 and fuses otherwise. Nothing is measured."
)
_COUNTS = (
    "on paper: matrix products from the shapes, nothing recomputed; the floor is theirs, and the optimiser's traffic. "
    "traced: those of the program itself, loops times their trips, recomputation included. compiled: XLA's count, "
    "which takes each loop's body once and element-wise work too, with the further trips added from the traced one."
)


def document(plan: Plan) -> dict[str, Any]:
    """The plan for machines: bytes, operations and milliseconds per device."""
    return {
        "accelerator": dataclasses.asdict(plan.accelerator),
        "devices": plan.devices,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "functions": [
            {**dataclasses.asdict(row), "temporary": row.temporary, "activations": row.activations, "total": row.total}
            for row in plan.rows
        ],
        "prefix_cache_bytes": plan.cache_bytes,
        "rendering_bytes": plan.rendering,
        "host_cache_bytes": plan.host_cache_bytes,
        "host_memory_bytes": None if math.isinf(plan.host_memory) else plan.host_memory,
        "prefix_caches_recomputed": plan.recomputed,
        "changes": [{"settings": name, "bytes": nbytes} for name, nbytes in plan.changes],
        "note": NOTE,
    }


def lines(plan: Plan) -> list[str]:
    """The plan for people."""
    accelerator = plan.accelerator
    text = [
        f"{plan.devices} × {accelerator.name}: {accelerator.tflops:g} TFLOP/s bfloat16, "
        f"{accelerator.bandwidth:g} GB/s, {accelerator.memory:g} GB ({accelerator.source})",
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan),
        "",
        f"prefix cache: {_bytes(plan.cache_bytes)} an observation"
        + (f"; at most {_bytes(plan.host_cache_bytes)} of host memory an iteration" * bool(plan.host_cache_bytes))
        + (
            f"; recomputed: those of an iteration exceed half of the hosts' {_bytes(plan.host_memory)}"
            * plan.recomputed
        ),
        *_rendering(plan),
        *_verdict(plan),
        "",
    ]
    return text + textwrap.wrap(NOTE, 118)


def _memory_lines(plan: Plan) -> list[str]:
    unit, scale = ("GB", GB) if plan.peak >= GB else ("MB", 1e6)
    names = ("params", "acting", "optim", "inputs", "results", "grads", "activ.", "total", "estimate")
    text = [f"{f'{unit} per device':17}" + "".join(f"{name:>9}" for name in names) + "   compiled"]
    for row in plan.rows:
        parts = (
            row.parameters,
            row.prepared,
            row.optimizer,
            row.inputs,
            row.outputs,
            row.gradients,
            row.activations,
            row.total,
        )
        numbers = "".join(f"{part / scale:9.2f}" for part in (*parts, row.temporary_estimate))
        compiled = row.compiled
        text.append(
            f"{row.name:17}{numbers}"
            + (f"{compiled.temporary / scale:9.2f} for {compiled.target}, {compiled.seconds:.0f} s" if compiled else "")
        )
    return [*text, "estimate, compiled: gradients and activations together, by two ways (see below)"]


def _time_lines(plan: Plan) -> list[str]:
    unit, scale = ("TFLOP", 1e12) if max(row.flops_traced for row in plan.rows) >= 1e11 else ("MFLOP", 1e6)
    text = [f"{f'{unit} per device':17}{'on paper':>9}{'traced':>9}{'compiled':>9}{'floor':>14}{'optimiser':>14}"]
    for row in plan.rows:
        counted = row.compiled and row.compiled.flops_with_trips(row.flops_traced, row.flops_traced_once)
        text.append(
            f"{row.name:17}{row.flops_analytic / scale:9.3f}{row.flops_traced / scale:9.3f}"
            + (f"{counted / scale:9.3f}" if counted else f"{'-':>9}")
            + f"{row.floor_ms:11.3f} ms{row.optimizer_ms:11.3f} ms"
        )
    return [*text, *textwrap.wrap(_COUNTS, 118)]


def _rendering(plan: Plan) -> list[str]:
    if not plan.rendering:
        return []
    return textwrap.wrap(rendering.advice(plan.rendering, plan.peak, plan.accelerator.memory * GB), 118)


def _bytes(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:.0f} bytes"


def _verdict(plan: Plan) -> list[str]:
    worst = max(plan.rows, key=lambda row: row.total)
    need = f"{worst.name} needs {_bytes(plan.peak)} of the {_bytes(plan.memory)} that a device may use"
    if plan.host_cache_bytes > plan.host_memory:
        caches = f"prefix caches need {_bytes(plan.host_cache_bytes)} of the hosts' {_bytes(plan.host_memory)}"
        need = f"{need}, {caches} (--host-memory)" if plan.peak > plan.memory else f"{caches} (--host-memory)"
    if plan.fits:
        return [f"fits: {need}"]
    text = [f"does not fit: {need}. What would need less:"]
    for name, nbytes in plan.changes:
        text.append(f"  {_bytes(nbytes):>10}  {'fits' if nbytes <= plan.memory else '    '}  {name}")
    return text
