"""`python -m envs.kitchen TASK`: a picture grid of one expert episode, one row a camera; `all`: one row a task."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from envs.kitchen import CAMERAS, LAYOUTS, STYLES, TASKS, KitchenEnv, make
from envs.kitchen.experts import make_expert


def picture_grid(env: KitchenEnv, seed: int, size: int = 160, columns: int = 6) -> np.ndarray:
    """Pictures uint8 [cameras * size, columns * size, 3] at even times of the expert's episode of a seed."""
    env.reset(seed)
    expert = make_expert(env)
    moments = [env.snapshot()]
    while not env.success and env.steps < env.spec.horizon:
        env.step_chunk(expert.act()[None])
        moments.append(env.snapshot())
    rows: list[list[np.ndarray]] = [[] for _ in CAMERAS]
    for index in np.linspace(0, len(moments) - 1, columns).round().astype(int):
        env.restore(moments[index])
        for row, camera in zip(rows, CAMERAS, strict=True):
            row.append(env.render(camera, size))
    env.restore(moments[-1])
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def overview(seed: int, size: int, columns: int, options: Mapping[str, str]) -> np.ndarray:
    """Every task's episode through the first camera, one row a task."""
    return np.concatenate([picture_grid(make(task, **options), seed, size, columns)[:size] for task in TASKS])


def save(path: str, picture: np.ndarray) -> None:
    """Writes a picture; 256 colours keep a page's worth of them small."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Writes the picture and says how the episode went."""
    parser = argparse.ArgumentParser(prog="python -m envs.kitchen", description=__doc__)
    parser.add_argument("task", choices=[*sorted(TASKS), "all"])
    parser.add_argument("--out", default=None, help="picture file; default TASK.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=160, help="pixels of one picture")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default=next(iter(LAYOUTS)))
    parser.add_argument("--style", choices=sorted(STYLES), default=next(iter(STYLES)))
    arguments = parser.parse_args()
    options = {"layout": arguments.layout, "style": arguments.style}
    out = arguments.out or f"{arguments.task}.png"
    if arguments.task == "all":
        save(out, overview(arguments.seed, arguments.size, columns=5, options=options))
        print(f"{out}: {', '.join(TASKS)}; seed {arguments.seed}, from the start to the end of the expert's episode")
        return
    env = make(arguments.task, **options)
    save(out, picture_grid(env, arguments.seed, arguments.size))
    print(
        f"{out}: seed {arguments.seed}, {env.observe().instruction!r}, "
        f"{'success' if env.success else 'failure'} after {env.steps} control steps"
    )


if __name__ == "__main__":
    main()
