"""Converting a full-size checkpoint: peak memory, and time beside that of `cp` on the same file.

    python benchmarks/convert.py [--dir FOLDER] [--file bfloat16 float32]

Writes a synthetic PyTorch checkpoint of π0.5's full size (7.2 GB in bfloat16, 14.5 GB in float32) to FOLDER, copies it,
converts it, and deletes everything. Both are timed from a cold page cache until the data are on the disk. On a busy
machine the processor seconds tell more: the conversion needs them, `cp` does not.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from figures import result_line

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from z1_jax.convert import arrays  # noqa: E402
from z1_jax.convert.safetensors import SafetensorsWriter  # noqa: E402
from z1_jax.convert.store import DTYPES, TensorInfo  # noqa: E402
from z1_jax.models.presets import get_preset  # noqa: E402

MEMORY_GOAL = 3.0  # GB
SPEED_GOAL = 0.5  # of cp


def write_synthetic(path: pathlib.Path, dtype: str) -> None:
    """A checkpoint as openpi's PyTorch training saves it, of repeated random numbers."""
    config = get_preset("pi05")
    shapes = arrays.shapes(arrays.pieces(config), "torch")
    shapes[arrays.UNUSED_HEAD] = (config.vocab_size, config.expert.width)
    infos = {name: TensorInfo(shape, DTYPES[dtype]) for name, shape in shapes.items()}
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)).astype(DTYPES[dtype])
    writer = SafetensorsWriter(path, infos, {"format": "pt"})
    for name, info in infos.items():
        rows = max(1, min(info.shape[0], len(noise) // max(1, info.size // info.shape[0])))
        for start in range(0, info.shape[0], rows):
            block = slice(start, min(start + rows, info.shape[0]))
            shape = (block.stop - start, *info.shape[1:])
            writer.write(name, (block,), noise[: int(np.prod(shape))].reshape(shape))
    writer.close()


def forget(path: pathlib.Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: pathlib.Path, place: pathlib.Path) -> float:
    forget(source)
    began = time.perf_counter()
    subprocess.run(["cp", source, place], check=True)
    subprocess.run(["sync", place], check=True)
    seconds = time.perf_counter() - began
    place.unlink()
    return seconds


def convert_seconds(source: pathlib.Path, place: pathlib.Path, dtype: str) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak resident memory in GB) of the command itself, in a process of its own."""
    forget(source)
    flags = [f"--dtype={dtype}", "--horizon=50", "--norm-stats=none", "--state-in-prompt"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "z1_jax.convert", source, place, *flags], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"the conversion failed with status {status}")
    shutil.rmtree(place)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def result(name: str, value: float, unit: str, baseline: float | None, goal: float, met: bool, n: int = 1) -> None:
    print(result_line(name, round(value, 3), unit, baseline=baseline, goal=goal, met=met, n=n), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("."), help="45 GB free")
    parser.add_argument("--file", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="convert-benchmark-") as name:
        folder = pathlib.Path(name)
        for dtype in given.file:
            source = folder / "model.safetensors"
            write_synthetic(source, dtype)
            size = source.stat().st_size
            copied = copy_seconds(source, folder / "copy")
            print(f"{dtype}: {size / 1e9:.2f} GB; cp and sync {copied:.1f} s", flush=True)
            for stored in dict.fromkeys((dtype, "float32")):
                seconds, processor, peak = convert_seconds(source, folder / "ours", stored)
                label = f"convert/{dtype}_to_{stored}"
                print(f"{label}: {seconds:.1f} s ({processor:.1f} s of processors), {peak:.2f} GB at most", flush=True)
                result(f"{label}/peak_memory", peak, "GB", None, MEMORY_GOAL, peak <= MEMORY_GOAL)
                fraction = copied / seconds
                result(f"{label}/speed_of_cp", fraction, "fraction", copied, SPEED_GOAL, fraction >= SPEED_GOAL)
            source.unlink()


if __name__ == "__main__":
    main()
