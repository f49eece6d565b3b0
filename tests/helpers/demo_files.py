"""Files as RoboCasa publishes its demonstrations, with random contents: HDF5 (v0.1) and LeRobot v2.1 (v1.0).

Written from the published layouts with h5py, pyarrow and PyAV, by nothing of the importer.
"""

from __future__ import annotations

import dataclasses
import fractions
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

PIXELS = 32
CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
PROPRIOCEPTION = {
    "robot0_base_pos": 3,
    "robot0_base_quat": 4,
    "robot0_base_to_eef_pos": 3,
    "robot0_base_to_eef_quat": 4,
    "robot0_gripper_qpos": 2,
}
# Where RoboCasa's LeRobot files store each part: (name, columns stored, columns in the simulator).
ACTION_TABLE = (
    ("base_motion", (0, 4), (7, 11)),
    ("control_mode", (4, 5), (11, 12)),
    ("end_effector_position", (5, 8), (0, 3)),
    ("end_effector_rotation", (8, 11), (3, 6)),
    ("gripper_close", (11, 12), (6, 7)),
)
STATE_TABLE = {
    "base_position": (0, 3),
    "base_rotation": (3, 7),
    "end_effector_position_relative": (7, 10),
    "end_effector_rotation_relative": (10, 14),
    "gripper_qpos": (14, 16),
}


@dataclasses.dataclass
class Demo:
    """One demonstration of N steps."""

    images: dict[str, np.ndarray]  # uint8 [N, S, S, 3]
    observations: dict[str, np.ndarray]  # float64 [N, .]
    actions: np.ndarray  # float64 [N, 12], raw order
    instruction: str

    @property
    def state(self) -> np.ndarray:
        """[N, 16]"""
        return np.concatenate([self.observations[name] for name in PROPRIOCEPTION], axis=1)


def make_demos(rng: np.random.Generator, count: int = 3, steps: Sequence[int] = (9, 14, 6)) -> list[Demo]:
    demos = []
    for number in range(count):
        n = steps[number % len(steps)]
        images = {}
        for camera in CAMERAS:  # smooth: a video keeps them nearly
            corner = 20 + 10 * (7 * np.arange(n)[:, None, None, None] % 15) + rng.integers(0, 8, (n, 1, 1, 3))
            slope = rng.integers(0, 3, (n, 1, 1, 3))
            images[camera] = (corner + slope * np.arange(PIXELS)[None, :, None, None]).astype(np.uint8)
            images[camera] = np.broadcast_to(images[camera], (n, PIXELS, PIXELS, 3)).copy()
        observations = {name: rng.normal(size=(n, width)) for name, width in PROPRIOCEPTION.items()}
        text = ("open the drawer", "close the drawer")[number % 2]
        demos.append(Demo(images, observations, rng.uniform(-1, 1, (n, 12)), text))
    return demos


def write_hdf5(path: pathlib.Path, demos: Sequence[Demo], task: str = "OpenDrawer", fps: float = 20) -> pathlib.Path:
    """RoboCasa v0.1: robomimic's layout."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(len(demo.actions) for demo in demos)
        data.attrs["env_args"] = json.dumps(
            {"env_name": task, "env_version": "1.5.0", "type": 1, "env_kwargs": {"control_freq": fps}}
        )
        for number, demo in enumerate(demos, 1):
            group = data.create_group(f"demo_{number}")
            group.attrs["model_file"] = "<mujoco/>"
            group.attrs["ep_meta"] = json.dumps({"lang": demo.instruction, "layout_id": 1})
            group.attrs["num_samples"] = len(demo.actions)
            group.create_dataset("actions", data=demo.actions)
            group.create_dataset("states", data=np.zeros((len(demo.actions), 40)))
            for camera, frames in demo.images.items():
                group.create_dataset(f"obs/{camera}_image", data=frames, compression="gzip")
            for name, values in demo.observations.items():
                group.create_dataset(f"obs/{name}", data=values)
            group.create_dataset("obs/robot0_joint_pos", data=np.zeros((len(demo.actions), 7)))
        names = [f"demo_{number}" for number in range(1, len(demos) + 1)]
        file.create_dataset("mask/first_2", data=np.array(names[:2], dtype="S"))
    return path


def write_lerobot(
    root: pathlib.Path, demos: Sequence[Demo], fps: int = 20, modality: bool = True, task: str = "OpenDrawer"
) -> pathlib.Path:
    """RoboCasa v1.0: LeRobot v2.1 with h264 videos, its base first in the actions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "meta").mkdir(parents=True)
    texts = sorted({demo.instruction for demo in demos})
    features: dict[str, Any] = {
        f"observation.images.{c}": {"dtype": "video", "shape": [PIXELS, PIXELS, 3], "names": None} for c in CAMERAS
    }
    features |= {
        "observation.state": {"dtype": "float64", "shape": [16]},
        "action": {"dtype": "float64", "shape": [12]},
        "annotation.human.task_description": {"dtype": "int64", "shape": [1]},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    lines, first = [], 0
    for number, demo in enumerate(demos):
        n = len(demo.actions)
        stored = np.empty_like(demo.actions)
        for _, (start, end), (raw_start, raw_end) in ACTION_TABLE:
            stored[:, start:end] = demo.actions[:, raw_start:raw_end]
        described = texts.index(demo.instruction)
        table = pa.table(
            {
                "observation.state": list(demo.state),
                "action": list(stored),
                "annotation.human.task_description": np.full(n, described),
                "timestamp": (np.arange(n) / fps).astype(np.float32),
                "frame_index": np.arange(n),
                "episode_index": np.full(n, number),
                "index": first + np.arange(n),
                "task_index": np.zeros(n, np.int64),  # RoboCasa's annotation is what counts
            }
        )
        folder = root / "data" / "chunk-000"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"episode_{number:06d}.parquet")
        for camera, frames in demo.images.items():
            folder = root / "videos" / "chunk-000" / f"observation.images.{camera}"
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"episode_{number:06d}.mp4", frames, fps)
        lines.append({"episode_index": number, "tasks": [demo.instruction], "length": n})
        first += n
    tasks = [{"task_index": index, "task": text} for index, text in enumerate([*texts, task])]
    write_lines(root / "meta" / "episodes.jsonl", lines)
    write_lines(root / "meta" / "tasks.jsonl", tasks)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "PandaOmron",
        "total_episodes": len(demos),
        "total_frames": first,
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(demos)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "extras").mkdir()
    (root / "extras" / "dataset_meta.json").write_text(json.dumps({"env_args": {"env_name": task}}))
    if modality:
        (root / "meta" / "modality.json").write_text(json.dumps(modality_of()))
    return root


def write_lerobot_v3(root: pathlib.Path, demos: Sequence[Demo], fps: int = 20, **changes: Any) -> pathlib.Path:
    """LeRobot v3.0: all episodes in one table and one video a camera.

    Args:
        changes: of each episode's row in meta/episodes: column -> function of (episode, value as it should be); the
            columns of videos are named from_timestamp and to_timestamp.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_lerobot(root, demos, fps)
    tables = [pq.read_table(file) for file in sorted((root / "data").rglob("*.parquet"))]
    shutil.rmtree(root / "data"), shutil.rmtree(root / "videos")
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    rows, first = [], 0
    for episode, demo in enumerate(demos):
        row: dict[str, Any] = {"episode_index": episode, "tasks": [demo.instruction], "length": len(demo.actions)}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        end = first + len(demo.actions)
        for camera in CAMERAS:
            key = f"videos/observation.images.{camera}"
            times = {"from_timestamp": first / fps, "to_timestamp": end / fps}
            times = {name: changes.get(name, lambda _, value: value)(episode, value) for name, value in times.items()}
            row |= {f"{key}/chunk_index": 0, f"{key}/file_index": 0, **{f"{key}/{k}": v for k, v in times.items()}}
        rows.append(row)
        first = end
    for camera in CAMERAS:
        path = v3_video(root, camera)
        path.parent.mkdir(parents=True)
        write_video(path, np.concatenate([demo.images[camera] for demo in demos]), fps)
    (root / "meta/episodes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/file-000.parquet")
    tasks = [json.loads(line) for line in (root / "meta/tasks.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(tasks), root / "meta/tasks.parquet")
    info = json.loads((root / "meta/info.json").read_text())
    info |= {
        "codebase_version": "v3.0",
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def v3_video(root: pathlib.Path, camera: str) -> pathlib.Path:
    return root / f"videos/observation.images.{camera}/chunk-000/file-000.mp4"


def modality_of() -> dict[str, Any]:
    """RoboCasa's meta/modality.json."""
    actions = {name: {"original_key": "action", "start": s, "end": e} for name, (s, e), _ in ACTION_TABLE}
    state = {name: {"original_key": "observation.state", "start": s, "end": e} for name, (s, e) in STATE_TABLE.items()}
    video = {camera: {"original_key": f"observation.images.{camera}"} for camera in CAMERAS}
    return {"state": state, "action": actions, "video": video}


def write_lines(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_video(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    """h264, as RoboCasa's."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=fractions.Fraction(fps), options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
