"""What a policy's delay costs in the kitchen, and what real-time chunking wins back.

`python benchmarks/real_time.py` trains a policy that predicts 16 steps and executes 8 (SFT alone), then runs the
same held-out episodes under delays of 0 to 4 control steps. The policy looks every 8 steps; its answer is there `delay`
steps later, and until then the robot executes what the chunk before had for these steps. Methods:

- guidance: real-time chunking;
- hard_mask: guidance of the delay's steps alone;
- overwriting: the delay's steps are put into the new chunk as it is sampled;
- neither: the new chunk knows nothing of the old one.

Finished cells are kept in `--results`. Longer tasks want more training:
`--task=OpenDrawer --steps=450 --config.demos.episodes=500 --config.sft.optim.name=muon`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
from typing import Any

import numpy as np
from figures import result_line

from envs import kitchen
from envs.base import Episode
from envs.pool import EnvPool
from z1_jax import api, train
from z1_jax.config.schema import EnvConfig, EvalConfig
from z1_jax.models.presets import PRESETS
from z1_jax.policy import Policy
from z1_jax.run_dir import policy_identity, write_json
from z1_jax.serve.engine import Engine
from z1_jax.statistics import mcnemar_exact, wilson_interval

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results" / "real_time.json"
METHODS = ("guidance", "hard_mask", "overwriting", "neither")
DELAYS = (0, 1, 2, 3, 4)  # control steps of 50 ms
HORIZON, EXECUTED = 16, 8
PARALLEL = 64  # episodes at once
PRESET = "kitchen_horizon16"
CAMERAS = EnvConfig().cameras


def trained_policy(task: str, run_dir: str, steps: int, seed: int, more: list[str]) -> Policy:
    """The policy after SFT on undisturbed demonstrations; trained once."""
    PRESETS[PRESET] = dataclasses.replace(PRESETS["kitchen"], horizon=HORIZON)
    options = {"task": task, "run_dir": run_dir, "seed": seed, "model.preset": PRESET, "env.executed": EXECUTED}
    options["sft.steps"] = steps
    train.main(["", "--config=configs/sft.py", *(f"--config.{key}={value}" for key, value in options.items()), *more])
    return api.load_policy(run_dir).policy


def run_wave(
    engine: Engine, pool: EnvPool, seeds: np.ndarray, method: str, delay: int
) -> tuple[np.ndarray, list[float]]:
    """Runs a wave of episodes to their end.

    Returns:
        success bool [n]; and for each chunk after the first how far its first executed action lies from what the chunk
        before had for that step (root mean square over the dimensions that move).
    """
    success = np.zeros(len(seeds), bool)
    slots = list(range(len(seeds)))
    looks = pool.reset(slots, [Episode(int(seed)) for seed in seeds])
    left: dict[int, np.ndarray] = {}  # slot -> what is left of its chunk
    seams, chunk = [], 0
    moving = engine.policy.processor.counted_dims[: engine.policy.processor.env_action_dim]
    while slots:
        requests = []
        for slot, look in zip(slots, looks, strict=True):
            told = chunk > 0 and method != "neither" and (delay > 0 or method != "hard_mask")
            kept = delay if method == "hard_mask" else HORIZON - EXECUTED
            previous = (left[slot][:kept], delay) if told else (None, 0)
            requests.append(engine.prepare(look, (0, int(seeds[slot]), chunk, 0), *previous))
        starts = range(0, len(requests), engine.largest)
        answers = [answer for start in starts for answer in engine.decide(requests[start : start + engine.largest])]
        actions = []
        for slot, answer in zip(slots, answers, strict=True):
            new = answer.actions
            if chunk:
                seams.append(float(np.sqrt(np.mean((new[delay] - left[slot][delay])[moving] ** 2))))
            old = left[slot][:delay] if chunk else new[:delay]
            actions.append(np.concatenate([old, new[delay:EXECUTED]]))
            left[slot] = new[EXECUTED:]
        results, following = pool.step(slots, np.stack(actions))
        for slot, result in zip(slots, results, strict=True):
            success[slot] = result.success
        alive = [i for i, result in enumerate(results) if not result.done]
        slots, looks = [slots[i] for i in alive], [following[i] for i in alive]
        chunk += 1
    return success, seams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="TurnOnSinkFaucet")
    parser.add_argument("--run-dir", help="default: runs/real-time-TASK")
    parser.add_argument("--steps", type=int, default=300, help="of SFT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options, more = parser.parse_known_args()  # more: --config.KEY=VALUE of the training
    run_dir = options.run_dir or f"runs/real-time-{options.task}"
    policy = trained_policy(options.task, run_dir, options.steps, options.seed, more)
    about = {
        "task": options.task,
        "policy": policy_identity(run_dir),
        "horizon": HORIZON,
        "executed": EXECUTED,
        "denoising_steps": policy.denoising_steps,
        "sft_steps": options.steps,
        "training": more,
        "seed": options.seed,
        "episodes": options.episodes,
    }
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    rows = known[options.task]["rows"] if known.get(options.task, {}).get("about") == about else []
    first = EvalConfig().first_seed
    make = functools.partial(kitchen.make, options.task, cameras=CAMERAS, image_size=EnvConfig().image_size)
    outcomes = {}
    with EnvPool(make, PARALLEL, options.workers) as pool:
        for method, delay in itertools.product(METHODS, DELAYS):
            row = next((row for row in rows if (row["method"], row["delay"]) == (method, delay)), None)
            if row is None:
                row = run_cell(policy, pool, method, delay, np.arange(first, first + options.episodes))
                rows.append(row)
                write_json(options.results, known | {options.task: {"about": about, "rows": rows}})
            outcomes[method, delay] = outcomes_of(row)
            print(line(options.task, row, outcomes["guidance", delay]), flush=True)


def run_cell(policy: Policy, pool: EnvPool, method: str, delay: int, seeds: np.ndarray) -> dict[str, Any]:
    """All episodes of one method and delay."""
    engine = Engine(policy, PARALLEL, span_factor=math.inf, overwrite=method == "overwriting")
    waves = [seeds[start : start + PARALLEL] for start in range(0, len(seeds), PARALLEL)]
    results = [run_wave(engine, pool, wave, method, delay) for wave in waves]
    success = np.concatenate([success for success, _ in results])
    seams = [seam for _, wave in results for seam in wave]
    return {
        "method": method,
        "delay": delay,
        "rate": float(success.mean()),
        "interval": list(wilson_interval(int(success.sum()), len(success), 0.95)),
        "seam": float(np.mean(seams)),
        "success": "".join(str(int(one)) for one in success),  # by seed
    }


def outcomes_of(row: dict[str, Any]) -> np.ndarray:
    """bool [episodes]"""
    return np.array([one == "1" for one in row["success"]])


def line(task: str, row: dict[str, Any], guided: np.ndarray) -> str:
    """The figure of a cell, paired with guidance under the same delay."""
    success = outcomes_of(row)
    more = {} if row["method"] == "guidance" else {"mcnemar_p_against_guidance": float(mcnemar_exact(guided, success))}
    name = f"{task}, delay {row['delay']}, {row['method']}"
    seam = round(row["seam"], 4)
    return result_line(name, row["rate"], "success", n=len(success), spread=row["interval"], seam=seam, **more)


if __name__ == "__main__":
    main()
