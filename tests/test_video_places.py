"""Every frame is its own step's: the frame's number is written into its picture and read back."""

import dataclasses
import fractions
import pathlib

import demo_files as files
import numpy as np
import pytest

from z1_jax.collect.importers.base import BadData
from z1_jax.collect.importers.lerobot import LeRobotDirectory
from z1_jax.collect.importers.video import Stretch, VideoPlace, read_frames
from z1_jax.collect.importing import ImportConfig, import_demonstrations

SIDE, BITS = 32, 9  # a picture is a 4 × 4 board of 8 pixels; the first squares are the number's bits
CAMERA = files.CAMERAS[0]


def picture(number: int) -> np.ndarray:
    bits = [number >> i & 1 for i in range(BITS)] + [0] * (16 - BITS)
    board = np.kron(np.array(bits).reshape(4, 4), np.ones((8, 8))) * 200 + 20
    return np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    squares = frames.reshape(len(frames), 4, 8, 4, 8, 3).mean((2, 4, 5)).reshape(len(frames), 16)
    return [int(sum(1 << i for i in range(BITS) if row[i] > 120)) for row in squares]


def write(
    path: pathlib.Path, shown: list[int], times: np.ndarray, tick: fractions.Fraction, container="mp4", **options
):
    """Pictures of the numbers `shown` at `times` seconds, rounded to ticks."""
    import av

    with av.open(str(path), "w", format=container) as file:
        rate = fractions.Fraction((len(times) - 1) / (times[-1] - times[0])).limit_denominator(1001)
        stream = file.add_stream("h264", rate=rate, options={"crf": "10", "preset": "veryfast", **options})
        stream.height = stream.width = SIDE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", tick
        for number, second in zip(shown, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = round(second / tick), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@dataclasses.dataclass
class Case:
    """A file of several episodes with true tables, and what may be changed in it."""

    fps: float
    lengths: list[int]
    shown: list[int]
    times: np.ndarray
    stretches: list[Stretch]
    style: dict

    def read(self, root: pathlib.Path, episode: int, stride: int, complete: bool = True) -> list[int]:
        if not (root / "v.mp4").exists():
            write(root / "v.mp4", self.shown, self.times, **self.style)
        place = VideoPlace("v.mp4", self.stretches[episode], tuple(self.stretches), complete)
        return numbers(read_frames(root, place, 0.0, self.fps, stride))

    def truth(self, episode: int, stride: int) -> list[int]:
        first = sum(self.lengths[:episode])
        return list(range(first, first + self.lengths[episode], stride))


def make(rng: np.random.Generator, episodes: int) -> Case:
    """Random rate, rate error, offset, time base, container and order of storing; tables in either's time."""
    fps = float(rng.choice([5, 10, 20, 25, 30, 50]))
    # A container's own rate differs by up to 0.8 %, as 29.97 from 30 or 20.01 from 20.
    error = rng.choice([1.0, 1000 / 1001, 20.01 / 20, rng.uniform(0.992, 1.008)])
    lengths = rng.integers(2, 400 // episodes, episodes).tolist()
    total = sum(lengths)
    tick = fractions.Fraction(1, int(rng.choice([1000, 12800, 90000])))
    container = str(rng.choice(["mp4", "matroska", "mpegts"]))
    offset = float(rng.choice([0.0, rng.uniform(0, 0.4), rng.uniform(0, 5)])) / fps
    jitter = rng.uniform(-0.1, 0.1, total) / fps * (rng.random() < 0.3)
    times = offset + np.arange(total) / (fps * error) + jitter - jitter[0]
    ends = np.cumsum([0, *lengths]) / (fps * rng.choice([1.0, error]))  # LeRobot adds up the videos' durations
    stretches = [Stretch(i, n, a, b) for i, (n, a, b) in enumerate(zip(lengths, ends[:-1], ends[1:], strict=True))]
    if episodes == 1 and rng.random() < 0.5:
        stretches = [Stretch(0, total, 0.0)]  # v2
    style = {"tick": tick, "container": container, "bf": str(rng.integers(0, 4)), "g": str(rng.integers(1, 40))}
    return Case(fps, lengths, list(range(total)), times, stretches, style)


def apart(lengths: list[int], times: np.ndarray, rate: float, **style) -> Case:
    """Episodes one after another, whose tables are in time of `rate`."""
    ends = np.cumsum([0, *lengths]) / rate
    stretches = [Stretch(i, n, a, b) for i, (n, a, b) in enumerate(zip(lengths, ends[:-1], ends[1:], strict=True))]
    style = {"tick": fractions.Fraction(1, 12800), **style}
    return Case(20, lengths, list(range(sum(lengths))), times, stretches, style)


def test_an_offset_and_a_rate_of_its_own_at_once(tmp_path):
    """Neither the file's time nor the table's rate gives the last episode's frame; time from the first frame does."""
    case = apart([120] * 3, 0.15 + np.arange(360) / 20.1, 20.1)
    assert [case.read(tmp_path, episode, 7) for episode in range(3)] == [case.truth(i, 7) for i in range(3)]


def test_a_place_behind_the_next_episode_costs_one_episode(tmp_path):
    case = apart([40, 3, 5, 40], np.arange(88) / 20, 20)
    case.stretches[1] = Stretch(1, 3, 49 / 20, 52 / 20)
    for episode in (0, 2, 3):
        assert case.read(tmp_path, episode, 1) == case.truth(episode, 1)
    with pytest.raises(
        BadData, match=r"episode 1: .* begin at 2\.45 s of .*, expected frame 40, 2 s: .* the 88 frames"
    ):
        case.read(tmp_path, 1, 1)


@pytest.mark.parametrize("episodes", [1, 4])
def test_rates_offsets_and_time_bases_move_no_frame(rng, tmp_path, episodes):
    for trial in range(4):
        case = make(rng, episodes)
        (tmp_path / str(trial)).mkdir()
        for episode in rng.permutation(episodes):
            stride = int(rng.integers(1, 5))
            assert case.read(tmp_path / str(trial), episode, stride) == case.truth(episode, stride), case


def shift(case, rng):
    at, by = rng.integers(len(case.lengths)), rng.integers(1, 8) / case.fps * rng.choice([-1, 1])
    old = case.stretches[at]
    case.stretches[at] = dataclasses.replace(old, start_s=max(0.0, old.start_s + by), stop_s=old.stop_s + by)


def wrong_stop(case, rng):
    at = rng.integers(len(case.lengths))
    old = case.stretches[at]
    case.stretches[at] = dataclasses.replace(old, stop_s=old.stop_s + rng.integers(1, 8) / case.fps)


def leading_frames(case, rng):
    more = int(rng.integers(1, 8))
    case.shown = [0] * more + case.shown
    case.times = np.concatenate([case.times, case.times[-1] + np.arange(1, more + 1) / case.fps])


def dropped_frame(case, rng):
    at = int(rng.integers(1, len(case.shown) - 1))
    case.shown = case.shown[:at] + case.shown[at + 1 :]
    case.times = np.delete(case.times, at if rng.random() < 0.5 else -1)  # a hole, or all that follow come earlier


def doubled_frame(case, rng):
    at = int(rng.integers(len(case.shown)))
    case.shown = case.shown[: at + 1] + case.shown[at:]
    case.times = np.append(case.times, case.times[-1] + 1 / case.fps)


def twice_the_same(case, rng):
    at = int(rng.integers(1, len(case.lengths)))
    case.stretches[at] = dataclasses.replace(case.stretches[at], start_s=case.stretches[at - 1].start_s)


FAULTS = [shift, wrong_stop, leading_frames, dropped_frame, doubled_frame, twice_the_same]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_and_never_a_wrong_frame(rng, tmp_path, fault):
    for trial in range(4):
        case = make(rng, 3)
        fault(case, rng)
        (tmp_path / str(trial)).mkdir()
        refused = 0
        for episode in range(3):
            try:
                got = case.read(tmp_path / str(trial), episode, 1)
            except BadData as error:
                refused += 1
                assert str(error).startswith(f"{tmp_path / str(trial)}, episode {episode}: ") and "v.mp4" in str(error)
                assert "\n" not in str(error)
            else:
                assert got == case.truth(episode, 1), case
        # A shift may be that of the file's beginning; the clock of mpegts never begins at zero.
        begins = case.times[0] or case.style["container"] == "mpegts"
        assert refused or (fault is shift and begins), case
        if fault is wrong_stop:
            assert refused == 1, case  # the others' frames are told by all that there is


def test_one_wrong_place_costs_one_episode(rng, tmp_path):
    """The file has exactly its episodes' frames, so the one that lies elsewhere is the wrong one."""
    case = make(rng, 4)
    case.times, case.style["container"] = case.times - case.times[0], "mp4"  # others may begin two frames after 0
    before = case.stretches.copy()
    shift(case, rng)
    ((old, new),) = [pair for pair in zip(before, case.stretches, strict=True) if pair[0] != pair[1]]
    told = []
    for episode in range(4):
        try:
            assert case.read(tmp_path, episode, 1) == case.truth(episode, 1)
        except BadData as error:
            told.append(str(error))
    assert all("expected frame" in text or "expected them within" in text for text in told)
    within = abs(new.stop_s - old.stop_s) * case.fps < 1.5 and not told  # one frame: the error of the file's rate
    in_order = sorted(case.stretches, key=lambda stretch: stretch.start_s) == case.stretches
    assert within or len(told) == 1 or (told and not in_order), told


def test_what_two_readings_make_two_frames_is_refused(tmp_path):
    """Frames at 29.97 a second behind 2,000 of which no table tells: two frames later or not?"""
    times = np.arange(400) / (5 * 0.995)
    style = {"tick": fractions.Fraction(1, 12800)}
    case = Case(5, [390], list(range(400)), times, [Stretch(0, 90, 300 / 5, 390 / 5)], style)
    with pytest.raises(BadData, match=r"begin at 60 s of .*, which may be frame 29[89] or 300: the file begins at 0 s"):
        case.read(tmp_path, 0, 1, complete=False)
    case.times[:] = np.arange(400) / 5
    (tmp_path / "v.mp4").unlink()
    assert case.read(tmp_path, 0, 1, complete=False) == list(range(300, 390))


def demos_that_tell_their_step(steps=(8, 6, 9)) -> list[files.Demo]:
    demos = files.make_demos(np.random.default_rng(0), len(steps), steps)
    for episode, demo in enumerate(demos):
        for camera, frames in demo.images.items():
            level = 20 + 70 * episode + 7 * np.arange(len(frames)) + 2 * files.CAMERAS.index(camera)
            frames[:] = level[:, None, None, None]
    return demos


def imported(root: pathlib.Path, demos, tmp_path):
    """(what was left out; whether each frame of the others is its own step's)"""
    dataset = import_demonstrations(ImportConfig((root,), stride=1, chunk=4, skip_bad=True), tmp_path / "out")[0]
    for record in (dataset[i] for i in range(len(dataset))):
        demo = demos[dataset.episodes[record.episode].seed]
        for camera, frame in record.images.items():
            assert abs(frame.mean() - demo.images[camera][record.step].mean()) < 2.5
    return dataset.source["left_out"], [row.seed for row in dataset.episodes]


def test_a_v3_directory_reads_back(tmp_path, capsys):
    demos = demos_that_tell_their_step()
    assert imported(files.write_lerobot_v3(tmp_path / "v3", demos, 10), demos, tmp_path) == ([], [0, 1, 2])


def test_an_episode_within_the_next_one_is_left_out_alone(tmp_path, capsys):
    demos = demos_that_tell_their_step()
    later = {f"{end}_timestamp": lambda episode, value: value + 0.3 * (episode == 1) for end in ("from", "to")}
    (line,), kept = imported(files.write_lerobot_v3(tmp_path / "v3", demos, 10, **later), demos, tmp_path)
    assert kept == [0, 2] and "v3, episode 1: " in line
    assert "begin at 1.1 s" in line and "expected frame 8, 0.8 s" in line and "file-000.mp4" in line


def test_two_episodes_of_one_stretch_are_both_left_out_where_frames_are_over(tmp_path, capsys):
    demos = demos_that_tell_their_step()
    later = {f"{end}_timestamp": lambda episode, value: value + 0.3 * (episode == 1) for end in ("from", "to")}
    root = files.write_lerobot_v3(tmp_path / "v3", demos, 10, **later)
    for camera in files.CAMERAS:
        frames = np.concatenate([demo.images[camera] for demo in demos])
        files.write_video(files.v3_video(root, camera), np.concatenate([frames, frames[-2:]]), 10)
    source, lines = LeRobotDirectory(root), []
    for episode in source.episodes:
        with pytest.raises(BadData) as error:
            source.read(episode, (CAMERA,), 1)
        lines.append(str(error.value))
    assert "holds 25 frames, expected the 23 of its 3 episodes" in lines[0]
    assert "gives it 1.1 to 1.7 s" in lines[1] and "episode 2 1.4 to 2.3 s; expected frames of its own" in lines[1]
    assert "gives it 1.4 to 2.3 s" in lines[2] and "episode 1 1.1 to 1.7 s" in lines[2]


def test_stamps_that_run_on_over_episodes_are_left_out(tmp_path, capsys):
    import pyarrow.parquet as pq
    from damaged_demos import with_column

    demos = demos_that_tell_their_step()
    root = files.write_lerobot_v3(tmp_path / "v3", demos, 10)
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(with_column(pq.read_table(path), "timestamp", (np.arange(23) / 10).astype("f")), path)
    lines, kept = imported(root, demos, tmp_path)
    assert kept == [0] and len(lines) == 2
    assert "episode 1: its time stamps want frames from 1.6 to 2.2 s" in lines[0]
    assert "expected them within from_timestamp 0.8 to to_timestamp 1.4 s" in lines[0]
