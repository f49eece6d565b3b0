"""Demonstrations with one thing broken, as killed writers, torn copies and other conventions leave them.

Each function writes a source and returns the message that is expected, and how many episodes are left with --skip-bad.
"""

import json
import pathlib

import demo_files as files
import numpy as np

CAMERA = files.CAMERAS[0]


def others() -> list[files.Demo]:
    """Three more that are good."""
    return files.make_demos(np.random.default_rng(1))


def edit_hdf5(path: pathlib.Path, change) -> pathlib.Path:
    import h5py

    with h5py.File(path, "r+") as file:
        change(file["data"])
    return path


def replace(group, key: str, values: np.ndarray) -> None:
    del group[key]
    group.create_dataset(key, data=values)


def cut(path: pathlib.Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def truncated_hdf5(root, demos):
    files.write_hdf5(root / "a.hdf5", demos)
    cut(files.write_hdf5(root / "b.hdf5", demos))
    return r"b\.hdf5 cannot be read as robomimic's HDF5 \(.*truncated", 3


def damaged_frames(root, demos):
    """A flipped byte in the compressed frames of one demonstration."""
    path = files.write_hdf5(root / "a.hdf5", demos)
    place = []
    edit_hdf5(path, lambda data: place.append(data[f"demo_2/obs/{CAMERA}_image"].id.get_chunk_info(0)))
    content = bytearray(path.read_bytes())
    middle = place[0].byte_offset + place[0].size // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    return r"a\.hdf5, demo_2 cannot be read", 2


def hdf5_without_a_camera(root, demos):
    def change(data):
        del data[f"demo_3/obs/{CAMERA}_image"]

    edit_hdf5(files.write_hdf5(root / "a.hdf5", demos), change)
    return rf"a\.hdf5, demo_3 has no images of {CAMERA}; it has {files.CAMERAS[1]}, ", 2


def hdf5_with_wide_actions(root, demos):
    change = lambda data: replace(data["demo_1"], "actions", np.zeros((9, 7)))  # noqa: E731
    edit_hdf5(files.write_hdf5(root / "a.hdf5", demos), change)
    return r"a\.hdf5, demo_1: actions have shape \[9, 7\], expected \[steps, 12\]", 2


def hdf5_with_nan(root, demos):
    demos[1].actions[3, 5] = np.nan
    files.write_hdf5(root / "a.hdf5", demos)
    return r"a\.hdf5, demo_2: actions not finite at step 3", 2


def hdf5_with_an_empty_episode(root, demos):
    def change(data):
        for name in ("actions", *(f"obs/{key}" for key in data["demo_2/obs"])):
            replace(data["demo_2"], name, data[f"demo_2/{name}"][:0])

    edit_hdf5(files.write_hdf5(root / "a.hdf5", demos), change)
    return r"a\.hdf5, demo_2 is empty", 2


def hdf5_with_a_shorter_state(root, demos):
    demos[2].observations["robot0_base_quat"] = demos[2].observations["robot0_base_quat"][:-1]
    files.write_hdf5(root / "a.hdf5", demos)
    return r"a\.hdf5, demo_3: obs/robot0_base_quat has 5 steps, expected the 6 of its actions", 2


def hdf5_without_an_instruction(root, demos):
    def change(data):
        data["demo_1"].attrs["ep_meta"] = "{}"

    edit_hdf5(files.write_hdf5(root / "a.hdf5", demos), change)
    return r"a\.hdf5, demo_1 has no instruction", 2


def hdf5_with_an_instruction_of_null(root, demos):
    path = files.write_hdf5(root / "drawer.hdf5", demos)
    edit_hdf5(path, lambda data: data["demo_2"].attrs.update({"ep_meta": json.dumps({"lang": None})}))
    return r"drawer\.hdf5, demo_2 has no instruction", 2


def hdf5_of_another_rate(root, demos):
    files.write_hdf5(root / "a.hdf5", demos)
    files.write_hdf5(root / "b.hdf5", demos, fps=10)
    return r"b\.hdf5 has 10 steps a second, .*a\.hdf5 20", 3


def raw_hdf5_without_images(root, demos, whole="a", raw="b"):
    files.write_hdf5(root / f"{whole}.hdf5", demos)
    for demo in demos:
        demo.images.clear()
    files.write_hdf5(root / f"{raw}.hdf5", demos)
    return rf"{raw}\.hdf5 has no camera {CAMERA}; it has none", 3


def hdf5_with_images_of_other_names(root, demos):
    def change(data):
        for name in data:
            for key in list(data[name]["obs"]):
                if key.endswith("_image"):
                    data[name]["obs"].move(key, key.removesuffix("_image") + "_rgb")

    files.write_hdf5(root / "a.hdf5", demos)
    edit_hdf5(files.write_hdf5(root / "b.hdf5", others()), change)
    return rf"b\.hdf5: images are read from obs/\*_image .*; this file has pictures in {CAMERA}_rgb, ", 3


def hdf5_after_one_without_images(root, demos):
    return raw_hdf5_without_images(root, demos, whole="b", raw="a")


def hdf5_after_a_wide_one(root, demos):
    files.write_hdf5(root / "b.hdf5", others())
    files.write_hdf5(root / "c.hdf5", demos)
    for demo in demos:
        demo.actions = demo.actions[:, :7]
    files.write_hdf5(root / "a.hdf5", demos)
    return r"a\.hdf5 has actions of width 7 and states of 16, expected 12 and 16 as its fellows", 6


def hdf5_of_two_rates_after_one_without(root, demos):
    import h5py

    files.write_hdf5(root / "a.hdf5", others())
    files.write_hdf5(root / "b.hdf5", demos)
    files.write_hdf5(root / "c.hdf5", demos, fps=10)
    with h5py.File(root / "a.hdf5", "r+") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "OpenDrawer", "env_kwargs": None})
    return r"c\.hdf5 has 10 steps a second, .*b\.hdf5 20", 6


def hdf5_with_frames_of_another_size(root, demos):
    for camera, frames in demos[1].images.items():
        demos[1].images[camera] = frames[:, ::2, ::2]
    files.write_hdf5(root / "a.hdf5", demos)
    size = f"{files.PIXELS}×{files.PIXELS} as in the first episode; --image-size=N brings all to one size"
    return rf"demo_2: {CAMERA} has frames of {files.PIXELS // 2}×{files.PIXELS // 2}, expected {size}", 2


def hdf5_of_another_structure(root, demos):
    import h5py

    files.write_hdf5(root / "a.hdf5", demos)
    with h5py.File(root / "a.hdf5", "r+") as file:
        del file[f"data/demo_2/obs/{CAMERA}_image"], file["data/demo_3/obs"]
        file.create_group(f"data/demo_2/obs/{CAMERA}_image")
        file["data/demo_3/obs"] = np.zeros(3)
    return r"a\.hdf5, demo_2 cannot be read \(AttributeError: .*\); get it anew", 1


def hdf5_of_fewer_steps_than_counted(root, demos):
    change = lambda data: data["demo_2"].attrs.update({"num_samples": 15})  # noqa: E731
    edit_hdf5(files.write_hdf5(root / "a.hdf5", demos), change)
    return r"a\.hdf5, demo_2: it has 14 actions, expected the 15 of its num_samples", 2


def hdf5_with_fewer_frames_than_actions(root, demos):
    demos[1].images[CAMERA] = demos[1].images[CAMERA][:-1]
    files.write_hdf5(root / "a.hdf5", demos)
    return rf"a\.hdf5, demo_2: {CAMERA} has 13 steps, expected the 14 of its actions", 2


def hdf5_beside_its_copy(root, demos):
    files.write_hdf5(root / "a.hdf5", demos)
    files.write_hdf5(root / "b.hdf5", demos, task="Another")
    return r"b\.hdf5, demo_1 is a copy of .*a\.hdf5, demo_1 \(same.*expected another episode; --keep-duplicates", 3


def lerobot_beside_its_hdf5(root, demos):
    """The same demonstrations in both formats: their frames differ by what h264 loses."""
    files.write_hdf5(root / "a.hdf5", demos)
    files.write_lerobot(root / "b", demos)
    return r"b, episode 0 is a copy of .*a\.hdf5, demo_1 ", 3


def video_file(root, episode: int) -> pathlib.Path:
    return root / "videos" / "chunk-000" / f"observation.images.{CAMERA}" / f"episode_{episode:06d}.mp4"


def rewrite_table(root, episode: int, change) -> None:
    import pyarrow.parquet as pq

    path = root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def with_column(table, name: str, values):
    import pyarrow as pa

    return table.set_column(table.column_names.index(name), name, pa.array(list(values)))


def truncated_video(root, demos):
    files.write_lerobot(root, demos)
    cut(video_file(root, 1))
    return r"episode 1: the video .*episode_000001\.mp4 cannot be decoded", 2


def video_of_too_few_frames(root, demos):
    files.write_lerobot(root, demos)
    files.write_video(video_file(root, 1), demos[1].images[CAMERA][:-2], 20)
    return r"episode 1: the video .*episode_000001\.mp4 ends after 12 of 14 frames", 2


def video_of_too_many_frames(root, demos):
    files.write_lerobot(root, demos)
    frames = demos[1].images[CAMERA]
    files.write_video(video_file(root, 1), np.concatenate([frames[:1]] * 3 + [frames]), 20)
    return r"episode 1: the video .*episode_000001\.mp4 holds 17 frames for 14 rows, expected 14", 2


def video_with_a_hole(root, demos):
    """As many frames as rows, yet one of them was dropped."""
    import av

    files.write_lerobot(root, demos)
    with av.open(str(video_file(root, 1)), "w") as container:
        stream = container.add_stream("h264", rate=20)
        stream.height = stream.width = files.PIXELS
        for number, frame in enumerate(demos[1].images[CAMERA]):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number + (number > 6)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return r"episode 1: frame 7 of .* is shown 0\.1 s after the one before, expected 0\.05 s: frames are missing", 2


def frame_index_with_a_hole(root, demos):
    files.write_lerobot(root, demos)
    numbers = np.arange(14) + (np.arange(14) > 4)
    rewrite_table(root, 1, lambda table: with_column(table, "frame_index", numbers))
    return r"episode_000001\.parquet, episode 1: frame_index goes from 4 to 6 at row 5, expected \+1", 2


def frame_index_that_disagrees_with_stamps(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "frame_index", 3 + np.arange(14)))
    return r"episode_000001\.parquet, episode 1: frame_index begins at 3, expected 0", 2


def rows_out_of_order(root, demos):
    files.write_lerobot(root, demos)
    order = np.arange(14)
    order[[3, 4]] = [4, 3]
    rewrite_table(root, 1, lambda table: with_column(table, "index", 9 + order))
    return r"episode_000001\.parquet, episode 1: index goes from 11 to 13 at row 3, expected \+1", 2


def table_of_another_episode(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "episode_index", np.full(14, 2)))
    return r"episode_000001\.parquet, episode 1: it holds rows of episode_index 2, expected 1 alone", 2


def table_of_another_length(root, demos):
    files.write_lerobot(root, demos)
    path = root / "meta" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 14', '"length": 16'))
    return r"episode_000001\.parquet, episode 1: the table of episodes has 16 steps, expected the 14 of its actions", 2


def stamps_that_drift(root, demos):
    """Each is near the one before; over the episode they are of 19 steps a second."""
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "timestamp", np.arange(14) / 19))
    return r"episode_000001\.parquet, episode 1: 19 time stamps a second over the episode, expected the 20", 2


def missing_video(root, demos):
    files.write_lerobot(root, demos)
    video_file(root, 2).unlink()
    return r"episode 2: the video .*episode_000002\.mp4 is missing", 2


def video_of_another_rate(root, demos):
    files.write_lerobot(root, demos)
    files.write_video(video_file(root, 0), demos[0].images[CAMERA], 30)
    return r"episode 0: the video .* has 30 frames a second, its dataset 20", 2


def stamps_of_another_rate(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "timestamp", np.arange(14) / 10))
    return r"episode_000001\.parquet, episode 1: time stamps 0\.1 s apart, expected 0\.05 s", 2


def lerobot_with_wide_actions(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "action", np.zeros((14, 7))))
    return r"episode 1: action has width 7, expected 12", 2


def lerobot_with_nan(root, demos):
    demos[0].observations["robot0_gripper_qpos"][4] = np.inf
    files.write_lerobot(root, demos)
    return r"lerobot, episode 0: state not finite at step 4", 2


def lerobot_with_an_empty_episode(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 2, lambda table: table.slice(0, 0))
    return r"episode_000002\.parquet, episode 2 is empty: no row .* tells of 6 steps", 2


def lerobot_with_an_action_of_none(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "action", [None, *np.zeros((13, 12)).tolist()]))
    return r"episode 1: action holds values that are no numbers", 2


def lerobot_beyond_float32(root, demos):
    demos[1].actions[3, 2] = 1e300
    files.write_lerobot(root, demos)
    return r"lerobot, episode 1: actions not finite at step 3", 2


def stamps_before_the_start(root, demos):
    files.write_lerobot(root, demos)
    rewrite_table(root, 1, lambda table: with_column(table, "timestamp", np.arange(14) / 20 - 0.05))
    return r"episode_000001\.parquet, episode 1: the first time stamp is -0\.05 s", 2


def lerobot_without_an_instruction(root, demos):
    files.write_lerobot(root, demos)
    path = root / "meta" / "tasks.jsonl"
    path.write_text(path.read_text().replace('"close the drawer"', "null"))
    return r"episode 1 has no instruction; the table of tasks has None", 2


def list_of_doubled_episodes(root, demos):
    files.write_lerobot(root, demos)
    path = root / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[0], lines[2]]))
    return r"meta/info\.json counts 3 episodes, its table lists 2", 2


def truncated_table(root, demos):
    files.write_lerobot(root, demos)
    cut(root / "data" / "chunk-000" / "episode_000002.parquet")
    return r"episode_000002\.parquet, episode 2 cannot be read", 2


def missing_table(root, demos):
    files.write_lerobot(root, demos)
    (root / "data" / "chunk-000" / "episode_000000.parquet").unlink()
    return r"episode_000000\.parquet, episode 0: the file is missing; the dataset is half written", 2


def cut_list_of_episodes(root, demos):
    files.write_lerobot(root, demos)
    path = root / "meta" / "episodes.jsonl"
    path.write_text(path.read_text()[:-9])
    return r"episodes\.jsonl was only half written: line 3 is cut off", 2


def list_of_fewer_episodes(root, demos):
    files.write_lerobot(root, demos)
    path = root / "meta" / "episodes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    return r"half written or half copied: meta/info\.json counts 3 episodes, its table lists 2", 2


BROKEN = [
    truncated_hdf5,
    damaged_frames,
    hdf5_without_a_camera,
    hdf5_with_wide_actions,
    hdf5_with_nan,
    hdf5_with_an_empty_episode,
    hdf5_with_a_shorter_state,
    hdf5_without_an_instruction,
    hdf5_with_an_instruction_of_null,
    hdf5_of_another_rate,
    raw_hdf5_without_images,
    hdf5_with_images_of_other_names,
    hdf5_after_one_without_images,
    hdf5_after_a_wide_one,
    hdf5_of_two_rates_after_one_without,
    hdf5_with_frames_of_another_size,
    hdf5_of_another_structure,
    hdf5_of_fewer_steps_than_counted,
    hdf5_with_fewer_frames_than_actions,
    hdf5_beside_its_copy,
    lerobot_beside_its_hdf5,
    truncated_video,
    video_of_too_few_frames,
    video_of_too_many_frames,
    video_with_a_hole,
    missing_video,
    video_of_another_rate,
    stamps_of_another_rate,
    stamps_that_drift,
    frame_index_with_a_hole,
    frame_index_that_disagrees_with_stamps,
    rows_out_of_order,
    table_of_another_episode,
    table_of_another_length,
    lerobot_with_wide_actions,
    lerobot_with_nan,
    lerobot_with_an_empty_episode,
    lerobot_with_an_action_of_none,
    lerobot_beyond_float32,
    stamps_before_the_start,
    lerobot_without_an_instruction,
    list_of_doubled_episodes,
    truncated_table,
    missing_table,
    cut_list_of_episodes,
    list_of_fewer_episodes,
]
