"""Datasets that LeRobot's own writer makes, with contents that a formula tells: what the importer is compared with.

Run it under a Python that has lerobot (0.3.x writes v2.1, 0.4.x v3.0): python tests/lerobot_writer.py DIR. It made
tests/reference/lerobot_datasets with lerobot 0.3.3 and 0.4.4, torch 2.13.0 and PyAV 18.1.0.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

FPS, PIXELS, STATE_DIM, ACTION_DIM = 20, 32, 16, 12
LENGTHS = (7, 10, 5)
TASKS = ("open the drawer", "close the drawer", "open the drawer")
CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand")


def frame(camera: int, episode: int, step: int) -> np.ndarray:
    """uint8 [S, S, 3]: red tells episode and step, green the column, blue the row and the camera."""
    ramp = np.arange(PIXELS)
    image = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    image[..., 0] = 20 + 60 * episode + 6 * step
    image[..., 1] = 60 + 3 * ramp[None]
    image[..., 2] = 30 + 60 * camera + 2 * ramp[:, None]
    return image


def state(episode: int, step: int) -> np.ndarray:
    """float32 [16]."""
    return (np.arange(STATE_DIM) + 0.1 * step + 100 * episode).astype(np.float32)


def action(episode: int, step: int) -> np.ndarray:
    """float32 [12]."""
    return (-np.arange(ACTION_DIM) + 0.01 * step + 10 * episode).astype(np.float32)


def write(root: pathlib.Path, videos: bool) -> None:
    """Writes the dataset to the new directory `root`, in the format of the lerobot that is installed."""
    from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset

    kind = "video" if videos else "image"
    names = ["height", "width", "channel"]
    features = {
        f"observation.images.{c}": {"dtype": kind, "shape": (PIXELS, PIXELS, 3), "names": names} for c in CAMERAS
    }
    for name, width in (("observation.state", STATE_DIM), ("action", ACTION_DIM)):
        features[name] = {"dtype": "float32", "shape": (width,), "names": None}
    dataset = LeRobotDataset.create("local/check", FPS, features, root=root, use_videos=videos)
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            row = {f"observation.images.{c}": frame(i, episode, step) for i, c in enumerate(CAMERAS)}
            row |= {"observation.state": state(episode, step), "action": action(episode, step)}
            if CODEBASE_VERSION.startswith("v2"):
                dataset.add_frame(row, task=TASKS[episode])
            else:
                dataset.add_frame({**row, "task": TASKS[episode]})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


if __name__ == "__main__":
    for videos in (True, False):
        write(pathlib.Path(sys.argv[1]) / ("videos" if videos else "images"), videos)
