"""`python -m envs.kitchen TASK`: an expert's episode as a picture grid (one row a camera) or, with --out FILE.webp or
FILE.gif, as a video; `all`: three moments of every task's episode in one picture."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageDraw

from envs.base import Episode, Snapshot
from envs.kitchen import (
    CAMERAS,
    LAYOUT_SPLITS,
    LAYOUTS,
    OBJECT_SPLITS,
    STYLE_SPLITS,
    STYLES,
    TASKS,
    KitchenEnv,
    make,
)
from envs.kitchen.experts import make_expert
from envs.video import write_video

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".webp", ".gif")
LABEL = 14  # pixels of the line with a task's name
COLUMNS = 3  # tasks side by side in the picture of all


def moments(env: KitchenEnv, seed: int) -> Iterator[Snapshot]:
    """The states of the expert's episode of a seed, one a control step."""
    env.reset(Episode(seed))
    expert = make_expert(env)
    yield env.snapshot()
    while not env.done:
        env.step_chunk(expert.act()[None])
        yield env.snapshot()


def smooth(env: KitchenEnv, camera: str, size: int, backend: str = "rays") -> np.ndarray:
    """A picture uint8 [size, size, 3] without jagged edges: the mean of four times as many pixels."""
    fine = env.render(camera, 2 * size, backend).reshape(size, 2, size, 2, 3)
    return fine.mean(axis=(1, 3)).round().astype(np.uint8)


def picture_grid(
    env: KitchenEnv,
    seed: int,
    size: int = 160,
    columns: int = 6,
    cameras: tuple[str, ...] = CAMERAS,
    backend: str = "rays",
) -> np.ndarray:
    """Pictures uint8 [cameras * size, columns * size, 3] at even times of the expert's episode of a seed."""
    states = list(moments(env, seed))
    rows: list[list[np.ndarray]] = [[] for _ in cameras]
    for index in np.linspace(0, len(states) - 1, columns).round().astype(int):
        env.restore(states[index])
        for row, camera in zip(rows, cameras, strict=True):
            row.append(smooth(env, camera, size, backend))
    env.restore(states[-1])
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def film(env: KitchenEnv, seed: int, size: int, camera: str = CAMERAS[0], backend: str = "rays") -> np.ndarray:
    """Frames uint8 [N, size, size, 3] of the expert's episode of a seed, one a control step."""
    return np.stack([smooth(env, camera, size, backend) for _ in moments(env, seed)])


def overview(seed: int, size: int, options: Mapping[str, str], backend: str = "rays") -> np.ndarray:
    """Every task with its name: start, middle and end of an episode (seed, seed + 1, …) through the first camera."""
    cells = []
    for i, task in enumerate(TASKS):
        cell = np.full((size + LABEL, 3 * size + 6, 3), 255, np.uint8)
        cell[LABEL:, : 3 * size] = picture_grid(make(task, **options), seed + i, size, 3, CAMERAS[:1], backend)
        image = Image.fromarray(cell)
        ImageDraw.Draw(image).text((2, 1), task, fill=(0, 0, 0))
        cells.append(np.asarray(image))
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def save(path: Path, picture: np.ndarray) -> None:
    """Writes a picture; 256 colours keep a page's worth of them small, where the format has a palette."""
    image = Image.fromarray(picture)
    if path.suffix.lower() == ".png":
        image = image.quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def checked_out(parser: argparse.ArgumentParser, out: str, task: str) -> Path:
    """The path to write to, with its folder made. Raises before an episode is run if it cannot be written."""
    path = Path(out)
    if path.suffix.lower() not in PICTURE_SUFFIXES + VIDEO_SUFFIXES:
        parser.error(f"--out {out}: expected a picture such as {task}.png, or a video, .webp or .gif")
    if out.endswith("/") or path.is_dir():
        parser.error(f"--out {out}: got a folder, expected a file such as {path / task}.png")
    if task == "all" and path.suffix.lower() in VIDEO_SUFFIXES:
        parser.error(f"--out {out}: a video shows one task; expected a picture such as all.png")
    with _one_line(parser):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns a file that cannot be written, or missing OpenGL, into an error of one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows what there is)\n")


def main() -> None:
    """Writes the picture or video and says how the episode went."""
    parser = _Parser(prog="python -m envs.kitchen", description=__doc__)
    parser.add_argument("task", choices=[*sorted(TASKS), "all"])
    parser.add_argument(
        "--out", default=None, help="a picture (.png, .jpg), or a video (.webp, .gif); default TASK.png"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=160, help="pixels of one picture")
    parser.add_argument("--camera", choices=CAMERAS, default=CAMERAS[0], help="of a video")
    parser.add_argument("--layout", choices=[*LAYOUTS, *LAYOUT_SPLITS], default=next(iter(LAYOUTS)))
    parser.add_argument("--style", choices=[*STYLES, *STYLE_SPLITS], default=next(iter(STYLES)))
    parser.add_argument("--objects", choices=OBJECT_SPLITS, default=OBJECT_SPLITS[0])
    parser.add_argument("--backend", choices=("rays", "gl"), default="rays", help="gl has shadows and needs OpenGL")
    arguments = parser.parse_args()
    options = {"layout": arguments.layout, "style": arguments.style, "objects": arguments.objects}
    seed, size, backend = arguments.seed, arguments.size, arguments.backend
    if seed < 0:
        parser.error(f"--seed {seed}: expected 0 or more")
    if size < 1:
        parser.error(f"--size {size}: expected at least 1 pixel")
    out = checked_out(parser, arguments.out or f"{arguments.task}.png", arguments.task)
    if arguments.task == "all":
        with _one_line(parser):
            save(out, overview(seed, size, options, backend))
        print(f"{out}: {', '.join(TASKS)}; seeds from {seed} on, start, middle and end of the expert's episode")
        return
    env = make(arguments.task, **options)
    with _one_line(parser):
        if out.suffix.lower() in VIDEO_SUFFIXES:
            write_video(out, film(env, seed, size, arguments.camera, backend), env.spec.control_hz)
        else:
            save(out, picture_grid(env, seed, size, backend=backend))
    verdict = "success" if env.success else f"failure ({env.broken})" if env.broken else "failure"
    print(f"{out}: seed {seed}, {env.observe().instruction!r}, {verdict} after {env.steps} control steps")


if __name__ == "__main__":
    main()
