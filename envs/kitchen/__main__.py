"""`python -m envs.kitchen TASK`: a picture grid of one expert episode, one row a camera."""

from __future__ import annotations

import argparse

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


def main() -> None:
    """Writes the picture and says how the episode went."""
    parser = argparse.ArgumentParser(prog="python -m envs.kitchen", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--out", default=None, help="picture file; default TASK.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=160, help="pixels of one picture")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default=next(iter(LAYOUTS)))
    parser.add_argument("--style", choices=sorted(STYLES), default=next(iter(STYLES)))
    arguments = parser.parse_args()
    env = make(arguments.task, layout=arguments.layout, style=arguments.style)
    out = arguments.out or f"{arguments.task}.png"
    Image.fromarray(picture_grid(env, arguments.seed, arguments.size)).save(out)
    print(
        f"{out}: seed {arguments.seed}, {env.observe().instruction!r}, "
        f"{'success' if env.success else 'failure'} after {env.steps} control steps"
    )


if __name__ == "__main__":
    main()
