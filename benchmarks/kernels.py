"""How many kernels a GPU launches for a decision, an update and an SFT step: counted, without a GPU.

    pip install 'jax[cuda12]'
    python benchmarks/kernels.py                        # full-size π0.5 for an H100
    python benchmarks/kernels.py --programs encode denoise --batch 8 --cameras 2 --steps 5

XLA's GPU compiler compiles each program for a card that need not exist. Counted are the launches of the optimised
module, a loop's body times its trips. Autotuning is off without a card: a product may run as another kernel there,
but the number of products is the same. One whose result has few tiles and whose inner dimension is long is counted as
two kernels, for cuBLAS splits it and adds up the parts (column "split"): a rule, not read from the module.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

from figures import result_line

PROGRAMS = ("encode", "denoise", "update", "sft")
MEASURED = {"decision": 8584}  # kernels of one decision on an H100 by its profile: docs/cost.md
WITHIN = 0.1  # the count of the plain decision must agree with it by this much
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
# A product is taken to be split where its tiles would fill less than a quarter of the multiprocessors of an H100.
_TILE, _FEW_TILES, _LONG = 128, 132 // 4, 768
# No kernel is launched for these.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "copy-done",
    "async-done",
    "opt-barrier",
}
# A fusion of these alone moves numbers and computes none.
_MOVING = _FREE | {
    "copy",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "concatenate",
    "transpose",
    "reshape",
    "pad",
    "broadcast",
    "select",
    "compare",
    "add",
    "iota",
    "clamp",
    "convert",
    "gather",
}
_ARITHMETIC_OF_INDICES = {"select", "compare", "add", "iota", "clamp"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of an HLO computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass
class Counts:
    """What a program launches. Bytes are what each kernel reads and writes, from the shapes."""

    kernels: float = 0
    copies: float = 0
    gemms: float = 0
    split: float = 0  # of the kernels: those that add up a split product's parts
    bytes: float = 0

    def add(self, other: Counts, times: float = 1) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


def main() -> None:
    """Compiles the programs and prints a table, then one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pi05", help="of z1_jax/models/presets.py (%(default)s)")
    parser.add_argument("--accelerator", default="H100", help="H100, H200, A100 or RTX4090 (%(default)s)")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--batch", type=int, default=1, help="observations of a decision (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="K, denoising steps (%(default)s)")
    parser.add_argument("--cameras", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--attention", default="einsum", help="of vision and prefix (%(default)s)")
    parser.add_argument("--remat", default="full", help="of SFT step and update (%(default)s)")
    parser.add_argument("--acting", default="auto", help="plain or prepared parameters (auto: prepared)")
    parser.add_argument("--keep", metavar="DIR", default="", help="write the optimised modules there, as text")
    arguments = parser.parse_args()
    from z1_jax.plan.xla import prepare_cuda

    prepare_cuda(arguments.accelerator)  # before JAX starts
    columns = ("kernels", "copies", "GEMMs", "split", "GB moved", "temporary", "compiled")
    print(f"{'program':<18}" + "".join(f"{column:>11}" for column in columns))
    decision = Counts()
    for name, traced in traced_programs(arguments):
        began = time.perf_counter()
        compiled = traced.lower().compile()
        seconds = time.perf_counter() - began
        text = compiled.as_text()
        if arguments.keep:
            with open(f"{arguments.keep}/{name}.hlo", "w") as file:
                file.write(text)
        counts = count(text)
        if name.startswith(("encode", "denoise")):
            decision.add(counts)
        report(name, counts, arguments, compiled.memory_analysis().temp_size_in_bytes, seconds)
    if {"encode", "denoise"} <= set(arguments.programs):
        report("decision", decision, arguments)


def report(name: str, counts: Counts, arguments: argparse.Namespace, temporary: int = 0, seconds: float = 0.0) -> None:
    """A row of the table and its RESULT line."""
    numbers = (counts.kernels, counts.copies, counts.gemms, counts.split)
    row = f"{name:<18}" + "".join(f"{number:>11.0f}" for number in numbers) + f"{counts.bytes / 1e9:>11.2f}"
    print(row + (f"{temporary / 1e6:>8.0f} MB{seconds:>9.1f} s" if temporary else ""))
    facts = {"preset": arguments.preset, "accelerator": arguments.accelerator, "batch": arguments.batch}
    facts |= {"steps": arguments.steps, "cameras": arguments.cameras, "attention": arguments.attention}
    facts |= {
        "copies": counts.copies,
        "gemms": counts.gemms,
        "split": counts.split,
        "bytes": counts.bytes,
        "temporary_bytes": temporary,
    }
    usual = (arguments.preset, arguments.batch, arguments.steps, arguments.cameras) == ("pi05", 1, 10, 3)
    baseline = MEASURED.get(name) if usual else None
    met = None if baseline is None else abs(counts.kernels / baseline - 1) <= WITHIN
    print(result_line(f"kernels/{name}", counts.kernels, "kernels", baseline=baseline, met=met, n=1, **facts))


def traced_programs(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Name and traced function of each program that is asked for."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "float32")  # as z1_jax.process has it

    from z1_jax import sharding
    from z1_jax.config import schema
    from z1_jax.evaluation import make_actor
    from z1_jax.models.presets import get_preset
    from z1_jax.plan import programs
    from z1_jax.plan.xla import compile_only_mesh

    model = get_preset(arguments.preset, remat=arguments.remat, attention=arguments.attention, acting=arguments.acting)
    mesh = compile_only_mesh(sharding.make_mesh(devices=jax.devices()[:1]), arguments.accelerator)
    flow = schema.FlowConfig(steps=arguments.steps, sde_steps="all", noise_level=0.5)  # each step has a density
    batch, cameras = arguments.batch, arguments.cameras
    wanted = set(arguments.programs)
    if wanted & {"encode", "denoise"}:
        policy = programs.abstract_policy(schema.Config(), model, mesh)
        graphdef, trainable, frozen = policy.split("expert")
        actor = make_actor(policy, graphdef, flow, mesh, batch)
        looks = programs.abstract_observation(model, batch, mesh, cameras)
        cache = programs.abstract_cache(model, batch, mesh, cameras)
        noise = programs.abstract_noise(model, batch, arguments.steps, mesh)
        for name in ("encode", "denoise"):
            if name in wanted:
                with jax.set_mesh(mesh):
                    if name == "encode":
                        traced = actor.trace_encode((trainable, frozen), looks)
                    else:
                        traced = actor.trace_sample((trainable, frozen), cache, *noise)
                yield name, traced
    config = schema.Config()
    config = dataclasses.replace(
        config,
        flow=flow,
        init="none",
        update=dataclasses.replace(config.update, batch_size=16, micro_batch=16),
        sft=dataclasses.replace(config.sft, batch_size=32, flows=1),
    )
    if "update" in wanted:
        found = programs.trace_programs(config, model, mesh)
        yield "update_16_nodes", next(p.traced for p in found if p.name == "rl_update")
    if "sft" in wanted:
        found = programs.trace_programs(dataclasses.replace(config, algorithm="sft"), model, mesh)
        yield "sft_step_32", next(p.traced for p in found if p.name == "sft_step")


# --- counting -------------------------------------------------------------------------------------------------------


def count(text: str, *, rule: bool = True) -> Counts:
    """Launches of an optimised HLO module's entry computation; without `rule` no product is taken to be split."""
    computations = parse(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry, "the text holds no module"
    counts = _count(entry.group(1), computations)
    return counts if rule else dataclasses.replace(counts, kernels=counts.kernels - counts.split, split=0)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The computations of an HLO module by name."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(head.group(1), [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            shape, rest = _shape(found.group(2))
            if call := re.match(r" ([\w\-]+)\(", rest):
                inside, attributes = _balanced(rest[call.end() - 1 :])
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                current.append(Instruction(found.group(1), shape, call.group(1), operands, attributes))
    return computations


def _shape(text: str) -> tuple[str, str]:
    if text.startswith("("):
        inside, rest = _balanced(text)
        return f"({inside})", rest
    shape, _, rest = text.partition(" ")
    return shape, f" {rest}"


def _balanced(text: str) -> tuple[str, str]:
    """What the parenthesis at the start of `text` holds, and what follows it."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:at], text[at + 1 :]
    raise ValueError(f"unbalanced: {text[:80]}")


def _count(name: str, computations: dict[str, list[Instruction]]) -> Counts:
    total = Counts()
    here = computations[name]
    shapes = {instruction.name: instruction.shape for instruction in here}
    for instruction in here:
        if instruction.opcode == "while":
            total.add(_count(_called(instruction, "body"), computations), _trips(instruction))
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"%([\w.\-]+)", branches.group(1)) if branches else _either(instruction)
            total.add(max((_count(n, computations) for n in names), key=lambda c: c.kernels))
        elif instruction.opcode in ("call", "async-start"):
            total.add(_count(_called(instruction, "(?:to_apply|calls|called_computations)"), computations))
        elif instruction.opcode not in _FREE:
            body = computations[_called(instruction, "calls")] if instruction.opcode == "fusion" else [instruction]
            total.add(_kernel(instruction, body, shapes))
    return total


def _called(instruction: Instruction, attribute: str) -> str:
    found = re.search(attribute + r"=\{?%?([\w.\-]+)", instruction.attributes)
    assert found, f"{instruction.name} names no {attribute}"
    return found.group(1)


def _either(instruction: Instruction) -> list[str]:
    return [_called(instruction, "true_computation"), _called(instruction, "false_computation")]


def _trips(instruction: Instruction) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    if not found:
        raise ValueError(f"loop {instruction.name} does not say how often it runs")
    return int(found.group(1))


def _kernel(instruction: Instruction, body: list[Instruction], shapes: dict[str, str]) -> Counts:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    product = bool(target and re.search("cublas|cudnn|gemm", target.group(1)))
    inside = {part.opcode for part in body}
    product = product or bool(inside & {"dot", "convolution"})
    moved = _moved_bytes(instruction, body, shapes)
    split = int(bool(target and "cublas" in target.group(1)) and _is_split(instruction, shapes))
    moving = not target and inside <= _MOVING and bool(inside - _FREE - _ARITHMETIC_OF_INDICES)
    return Counts(1 + split, int(moving and not product), int(product), split, moved)


def _is_split(instruction: Instruction, shapes: dict[str, str]) -> bool:
    rows, columns = _dims(instruction.shape)[-2:]
    batch = math.prod(_dims(instruction.shape)[:-2])
    inner = math.prod(_dims(shapes.get(instruction.operands[0], "f32[]"))) // max(batch * rows, 1)
    tiles = batch * -(-rows // _TILE) * -(-columns // _TILE)
    return tiles <= _FEW_TILES and inner >= _LONG


def _dims(shape: str) -> list[int]:
    """Dimensions of an HLO shape, or of a tuple's first."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(dim) for dim in found.group(1).split(",") if dim] if found else []


def _moved_bytes(instruction: Instruction, body: list[Instruction], shapes: dict[str, str]) -> int:
    """Bytes that a kernel reads and writes; of an operand that it only slices, the slices."""
    if instruction.opcode != "fusion":
        written = nbytes(instruction.shape, workspace=False)
        return written + sum(nbytes(shapes.get(name, "")) for name in instruction.operands)
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for part in body:
        for operand in part.operands:
            users[operand].append(part)
    inner = {part.name: part.shape for part in body}
    total = 0
    for part in body:
        if part.opcode != "parameter":
            continue
        used = users[part.name]
        if used and all(user.opcode in ("slice", "dynamic-slice", "gather") for user in used):
            total += sum(nbytes(user.shape) for user in used)
        elif not (used and all(u.opcode == "dynamic-update-slice" and u.operands[0] == part.name for u in used)):
            total += nbytes(part.shape)
    updates = [part for part in body if part.opcode == "dynamic-update-slice"]
    written = nbytes(instruction.shape)
    for update in updates:
        written += nbytes(inner.get(update.operands[1], "")) - nbytes(update.shape)
    return total + max(written, 0)


def nbytes(shape: str, *, workspace: bool = True) -> int:
    """Bytes of an HLO shape, tuples summed; without `workspace`, those of a library call's scratch space left out."""
    total = 0
    for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
        if kind == "s8" and not workspace:
            continue
        size = _BYTES.get(kind, 1 if kind.startswith("f8") else 4)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


if __name__ == "__main__":
    main()
