"""What the ordinary command gains in an environment of one's own: `examples/reach.py`, a few minutes on one core.

`python benchmarks/reach.py` runs it (or goes on with it) and prints its figures; docs/results/reach.json holds those of
one run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

from figures import result_line

ROOT = pathlib.Path(__file__).parents[1]
KEYS = ("--config=configs/grpo.py:small_world", "--config.env.suite=examples.reach:Reach")
KEPT = ("task", "before", "after", "difference", "difference_interval", "mcnemar_p", "wall_seconds", "protocol")


def main() -> None:
    """Runs the command, prints one line a figure, and writes what it found where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=pathlib.Path, default=pathlib.Path("runs/reach"))
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file, e.g. docs/results/reach.json")
    arguments = parser.parse_args()
    directory = arguments.run_dir.absolute()
    command = [sys.executable, "-m", "z1_jax.train", *KEYS]
    subprocess.run([*command, f"--config.run_dir={directory}"], cwd=ROOT, check=True)
    found = json.loads((directory / "summary.json").read_text())
    low, high = found["difference_interval"]
    minutes = sum(found["wall_seconds"].values()) / 60
    count = found["after"]["episodes"]
    for stage in ("before", "after"):
        spread = [round(100 * edge, 1) for edge in found[stage]["interval"]]
        value = round(100 * found[stage]["rate"], 1)
        print(result_line(f"reach/{stage}_rl", value, "percent", n=count, spread=spread))
    gain, spread = round(100 * found["difference"], 1), [round(100 * edge, 1) for edge in (low, high)]
    goal = "an interval above zero"
    print(result_line("reach/gain", gain, "points", baseline="SFT", goal=goal, met=low > 0, n=count, spread=spread))
    print(result_line("reach/minutes", round(minutes, 1), "minutes", n=1))
    if arguments.out:
        kept = {"command": " ".join(("python -m z1_jax.train", *KEYS)), **{key: found[key] for key in KEPT}}
        arguments.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
