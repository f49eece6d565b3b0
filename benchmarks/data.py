"""How fast demonstrations come off the disk, and how long SFT waits for them.

    python benchmarks/data.py                  # both figures
    python benchmarks/data.py --only frames    # frames a second of 224², from a dataset on disk, on two cores
    python benchmarks/data.py --only wait      # share of SFT's time spent waiting, at the kitchen preset

Frames: expert demonstrations of the kitchen, two cameras rendered at 224² and stored so (PNG), read in random order by
the loader with its memory switched off; `--noise 3` adds pixel noise, which stands for textures and makes PNG work
harder; `--jpeg 95` stores JPEG of that quality instead.
Wait: SFT's own loop, policy and batch size on demonstrations at the kitchen's settings; the time in `next(loader)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from figures import result_line

from envs.kitchen import demos
from z1_jax import initial_policy, stages
from z1_jax.config.schema import Config, SftConfig
from z1_jax.data.dataset import Dataset, write_dataset
from z1_jax.data.loader import Loader
from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer
from z1_jax.data.transforms import InputProcessor
from z1_jax.process import start_jax
from z1_jax.sft import SftTrainer

FRAMES_GOAL, WAIT_GOAL = 1000.0, 0.01
CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand")
REPEATS = 5


def demonstrations(size: int, episodes: int, noise: float) -> Iterator[demos.Episode]:
    """Expert episodes with frames of `size` pixels, and pixel noise of that standard deviation."""
    rng = np.random.default_rng(0)
    options = {"cameras": CAMERAS, "image_size": size}
    for episode in demos.collect("OpenDrawer", range(episodes), processes=0, options=options):
        if noise:
            images = {
                name: np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)
                for name, frames in episode.images.items()
            }
            episode = dataclasses.replace(episode, images=images)
        yield episode


def frames_a_second(dataset: Dataset, batch: int, batches: int, threads: int) -> tuple[list[float], list[float]]:
    """Frames that the loader delivers a second of wall time, once a repeat, after a first batch; the same of CPU time.

    The second is what a core delivers when nothing else runs on it.
    """
    tokenizer = PromptTokenizer(train_small_tokenizer(kitchen_instructions()), 64)
    size = dataset.cameras[CAMERAS[0]][0]
    processor = InputProcessor(tokenizer, dataset.stats, CAMERAS, size, 32)
    wall, cpu = [], []
    for repeat in range(REPEATS):
        loader = Loader(dataset, processor, batch, repeat, memory_bytes=0, prefetch=2 * threads, threads=threads)
        next(loader)
        began, spent = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(loader)
        frames = batches * batch * len(CAMERAS)
        wall.append(frames / (time.perf_counter() - began))
        cpu.append(frames / (time.process_time() - spent))
    return wall, cpu


def waiting_share(dataset: Dataset, steps: int) -> tuple[list[float], float]:
    """(share of each repeat's time in `next(loader)`, seconds of a step) of SFT at the kitchen preset."""
    config = Config(algorithm="sft")
    mesh = stages.make_mesh(config)
    shares, spent = [], 0.0
    with jax.set_mesh(mesh):
        policy = initial_policy.new_policy(config, dataset, mesh)
        loader = Loader(dataset, policy.processor, config.sft.batch_size, 0)
        trainer = SftTrainer(policy, dataclasses.replace(SftConfig(), steps=10**6), 0, mesh)
        jax.block_until_ready(trainer.step(next(loader), 0))  # compiles
        for repeat in range(REPEATS):
            waited, began = 0.0, time.perf_counter()
            for step in range(steps):
                asked = time.perf_counter()
                batch = next(loader)
                waited += time.perf_counter() - asked
                stats = trainer.step(batch, 1 + repeat * steps + step)
            jax.block_until_ready(stats)
            spent += time.perf_counter() - began
            shares.append(waited / (time.perf_counter() - began))
    return shares, spent / (REPEATS * steps)


def result(name: str, values: list[float], unit: str, goal: float, met: bool) -> str:
    """The figure's RESULT line: the median of the repeats."""
    spread = [float(f"{edge:.4g}") for edge in (min(values), max(values))]
    value = float(f"{statistics.median(values):.4g}")
    return result_line(name, value, unit, goal=goal, met=met, n=len(values), spread=spread)


def cached(path: pathlib.Path, size: int, episodes: int, noise: float, jpeg: int = 0) -> Dataset:
    """A dataset made anew: what it takes is not measured."""
    shutil.rmtree(path, ignore_errors=True)
    return write_dataset(path, demonstrations(size, episodes, noise), {"made_by": "benchmark"}, jpeg=jpeg)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("frames", "wait"))
    parser.add_argument("--size", type=int, default=224, help="pixels of the frames on disk and in the batch")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of pixel noise, of 255")
    parser.add_argument("--jpeg", type=int, default=0, metavar="QUALITY", help="store JPEG instead of PNG")
    parser.add_argument("--episodes", type=int, default=12, help="expert episodes to make for the measurement")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=40, help="of each repeat")
    parser.add_argument("--steps", type=int, default=20, help="of SFT, of each repeat")
    given = parser.parse_args()
    start_jax()
    cores = len(os.sched_getaffinity(0))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        load = os.getloadavg()[0]
        if given.only != "wait":
            dataset = cached(root / "frames", given.size, given.episodes, given.noise, given.jpeg)
            bytes_a_frame = sum(f.stat().st_size for f in dataset.path.rglob("*array_record*"))
            bytes_a_frame /= len(dataset) * len(CAMERAS)
            rates, by_cpu = frames_a_second(dataset, given.batch, given.batches, threads=cores)
            rate = statistics.median(rates)
            print(
                f"{rate:.0f} frames/s of {given.size}² on {cores} cores (load {load:.1f}), stored at that size as "
                f"{f'JPEG {given.jpeg}' if given.jpeg else 'PNG'}, "
                f"{bytes_a_frame / 1024:.1f} KiB a frame, noise {given.noise:g}; "
                f"{statistics.median(by_cpu):.0f} frames a CPU second"
            )
            lines.append(result("data/frames_per_second", rates, "frames/s", FRAMES_GOAL, rate >= FRAMES_GOAL))
        if given.only != "frames":
            dataset = cached(root / "kitchen", 64, given.episodes, 0.0)
            shares, seconds = waiting_share(dataset, given.steps)
            share = statistics.median(shares)
            print(f"SFT waits {100 * share:.3f} % of a step of {seconds:.2f} s on {cores} cores (load {load:.1f})")
            lines.append(result("data/sft_waiting_share", shares, "share", WAIT_GOAL, share < WAIT_GOAL))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
