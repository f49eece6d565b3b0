"""Converting a full-size checkpoint: peak memory, and time beside that of `cp` on the same file.

    python benchmarks/convert.py [--dir FOLDER] [--file bfloat16 float32 orbax]

Writes a synthetic PyTorch checkpoint of π0.5's full size (7.2 GB in bfloat16, 14.5 GB in float32) to FOLDER, copies it,
converts it, and deletes everything. Both are timed from a cold page cache until the data are on the disk. On a busy
machine the processor seconds tell more: the conversion needs them, `cp` does not.

`orbax` is openpi's JAX format in float32 as a single device saves it: every array one chunk compressed by zstd, the
largest of 4.8 GB. Writing that source takes up to 13 GB of memory.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
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
from z1_jax.convert.orbax import MANIFEST, save_frame  # noqa: E402
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


def write_orbax(folder: pathlib.Path) -> None:
    """A checkpoint as openpi saves it on one device: each array one zstd chunk, all in one OCDBT store."""
    import tensorstore as ts

    params = folder / "params"
    shapes = {
        f"params/{name}/value": s for name, s in arrays.shapes(arrays.pieces(get_preset("pi05")), "openpi").items()
    }
    save_frame(params, shapes)
    for path in params.iterdir():
        if path.name in (MANIFEST, "d") or path.name.startswith("ocdbt.process_"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    largest = max(map(math.prod, shapes.values()))
    noise = np.memmap(folder / "noise", np.float32, "w+", shape=(largest,))  # on the disk: memory stays free for zstd
    rng = np.random.default_rng(0)
    for start in range(0, largest, 1 << 24):
        part = noise[start : start + (1 << 24)]
        part[:] = 0.02 * rng.standard_normal(len(part), dtype=np.float32)
    for name, shape in shapes.items():
        kvstore = {"driver": "ocdbt", "base": f"file://{params}/", "path": name.replace("/", ".") + "/"}
        zstd = {"id": "zstd", "level": 1}
        metadata = {"shape": shape, "chunks": shape, "dtype": "<f4", "compressor": zstd}
        store = ts.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True).result()
        values = noise[: math.prod(shape)].reshape(shape)
        store.write(values, can_reference_source_data_indefinitely=True).result()
    del noise, values
    (folder / "noise").unlink()


def forget(path: pathlib.Path) -> None:
    """Drops a file, or those below a folder, from the page cache."""
    for place in filter(pathlib.Path.is_file, path.rglob("*") if path.is_dir() else [path]):
        with open(place, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: pathlib.Path, place: pathlib.Path) -> float:
    forget(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, place], check=True)
    subprocess.run(["sync", "-f", place], check=True)
    seconds = time.perf_counter() - began
    remove(place)
    return seconds


def remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    parser.add_argument(
        "--dir", type=pathlib.Path, default=pathlib.Path("."), help="32 GB free, for float32 and orbax 45"
    )
    parser.add_argument("--file", nargs="+", choices=("bfloat16", "float32", "orbax"), default=["bfloat16"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="convert-benchmark-") as name:
        folder = pathlib.Path(name)
        for dtype in given.file:
            if dtype == "orbax":
                source = folder / "openpi"
                source.mkdir()
                # In a process of its own: Linux counts what a parent held towards the peak of the child that it starts.
                writing = multiprocessing.get_context("spawn").Process(target=write_orbax, args=(source,))
                writing.start()
                writing.join()
                if writing.exitcode:
                    raise SystemExit(f"writing {source} failed with status {writing.exitcode}")
            else:
                source = folder / "model.safetensors"
                write_synthetic(source, dtype)
            size = sum(path.stat().st_size for path in (source, *source.rglob("*")) if path.is_file())
            copied = copy_seconds(source, folder / "copy")
            print(f"{dtype}: {size / 1e9:.2f} GB; cp and sync {copied:.1f} s", flush=True)
            for stored in dict.fromkeys((dtype.replace("orbax", "float32"), "float32")):
                seconds, processor, peak = convert_seconds(source, folder / "ours", stored)
                label = f"convert/{dtype}_to_{stored}"
                print(f"{label}: {seconds:.1f} s ({processor:.1f} s of processors), {peak:.2f} GB at most", flush=True)
                result(f"{label}/peak_memory", peak, "GB", None, MEMORY_GOAL, peak <= MEMORY_GOAL)
                fraction = copied / seconds
                result(f"{label}/speed_of_cp", fraction, "fraction", copied, SPEED_GOAL, fraction >= SPEED_GOAL)
            remove(source)


if __name__ == "__main__":
    main()
