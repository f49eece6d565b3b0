"""Imports as a whole: what is stored, bad input of every kind, and interruptions."""

import dataclasses
import json
import pathlib
import re

import demo_files as files
import numpy as np
import pytest
import tiny_policy as tiny
from damaged_demos import BROKEN, damaged_frames, edit_hdf5, rewrite_table, video_file, with_column

from z1_jax import initial_policy, opening, train
from z1_jax.collect import importing
from z1_jax.collect.__main__ import main, parse_import
from z1_jax.collect.importers.base import need
from z1_jax.collect.importing import ImportConfig, import_demonstrations
from z1_jax.data.dataset import open_dataset
from z1_jax.errors import UserError

CAMERA = files.CAMERAS[0]


def run(paths, out: pathlib.Path, **options):
    return import_demonstrations(ImportConfig(paths=tuple(paths), **{"cameras": (CAMERA,), **options}), out)[0]


@pytest.fixture
def demos(rng) -> list[files.Demo]:
    return files.make_demos(rng)


@pytest.mark.parametrize(("stride", "chunk", "image_size"), [(4, 8, 0), (3, 5, 24)])
def test_every_decision_holds_its_frames_its_state_and_the_actions_that_follow(
    demos, tmp_path, capsys, stride, chunk, image_size
):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    options = {"stride": stride, "chunk": chunk, "image_size": image_size, "cameras": files.CAMERAS[1:]}
    dataset = run([path], tmp_path / "data", **options)
    assert len(dataset.episodes) == len(demos) and dataset.chunk == chunk
    for row, demo in zip(dataset.episodes, demos, strict=True):
        assert (row.task, row.instruction, row.steps) == ("OpenDrawer", demo.instruction, len(demo.actions))
        starts = range(0, len(demo.actions), stride)
        assert row.records == len(starts)
        for place, start in enumerate(starts):
            record = dataset[row.first_record + place]
            np.testing.assert_array_equal(record.state, demo.state[start].astype(np.float32))
            last = len(demo.actions) - 1
            following = [demo.actions[min(step, last)] for step in range(start, start + chunk)]
            np.testing.assert_array_equal(record.actions, np.array(following, np.float32))
            assert set(record.images) == set(files.CAMERAS[1:])
            for camera in files.CAMERAS[1:]:
                if image_size:
                    assert record.images[camera].shape == (image_size, image_size, 3)
                    drift = record.images[camera].mean() - demo.images[camera][start].mean()
                    assert abs(drift) < 2  # a resized frame keeps its brightness
                else:
                    np.testing.assert_array_equal(record.images[camera], demo.images[camera][start])


def test_statistics_are_those_of_numpy_on_the_whole(demos, tmp_path, capsys):
    dataset = run([files.write_hdf5(tmp_path / "drawer.hdf5", demos)], tmp_path / "data", stride=2, chunk=3)
    actions, states = [], []
    for demo in demos:
        for start in range(0, len(demo.actions), 2):
            states.append(demo.state[start].astype(np.float32))
            actions += [demo.actions[min(s, len(demo.actions) - 1)].astype(np.float32) for s in range(start, start + 3)]
    for key, rows in (("actions", np.array(actions, np.float64)), ("state", np.array(states, np.float64))):
        stats = dataset.stats[key]
        np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats.std, rows.std(0), rtol=1e-9)
        np.testing.assert_allclose([stats.q01, stats.q99], np.quantile(rows, [0.01, 0.99], axis=0), rtol=1e-9)


def test_both_formats_give_the_same_numbers_and_tell_where_they_are_from(demos, tmp_path, capsys):
    hdf5 = run([files.write_hdf5(tmp_path / "drawer.hdf5", demos)], tmp_path / "a")
    lerobot = run([files.write_lerobot(tmp_path / "lerobot", demos)], tmp_path / "b")
    for one, other in zip(hdf5.records(range(len(hdf5))), lerobot.records(range(len(lerobot))), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.state, other.state)
        assert one.instruction == other.instruction
        assert np.abs(one.images[CAMERA].astype(int) - other.images[CAMERA]).mean() < 5
    (a,), (b,) = hdf5.source["sources"], lerobot.source["sources"]
    assert (a["format"], a["version"], a["bytes"]) == (
        "robomimic hdf5",
        "1.5.0",
        (tmp_path / "drawer.hdf5").stat().st_size,
    )
    assert (b["format"], b["version"], len(b["sha256_of_tables"])) == ("lerobot", "v2.1", 64)
    assert hdf5.source["fps"] == lerobot.source["fps"] == 20 and hdf5.source["left_out"] == []


def test_frames_may_be_stored_as_jpeg(demos, tmp_path, capsys):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    dataset = run([path], tmp_path / "data", jpeg=95)
    stored = np.concatenate([demo.images[CAMERA] for demo in demos])
    # From the nearest original; a frame of one colour comes back exactly, but not all of them are.
    off = [np.abs(dataset[i].images[CAMERA].astype(int) - stored).max((1, 2, 3)).min() for i in range(len(dataset))]
    assert 0 < max(off) < 12 and dataset.source["jpeg"] == 95
    assert np.abs(dataset[0].images[CAMERA].astype(int) - stored[0]).max() < 12


def test_tasks_and_numbers_of_episodes_are_chosen_over_many_files(demos, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    files.write_hdf5(tmp_path / "in" / "drawer.hdf5", demos)
    for number, (name, task) in enumerate((("deep/stove", "TurnOnStove"), ("faucet", "TurnOnSinkFaucet"))):
        files.write_hdf5(tmp_path / "in" / f"{name}.hdf5", files.make_demos(np.random.default_rng(number)), task=task)
    dataset = run([tmp_path / "in"], tmp_path / "data", tasks=("TurnOnStove", "OpenDrawer"), episodes=2)
    assert [row.task for row in dataset.episodes] == ["TurnOnStove"] * 2 + ["OpenDrawer"] * 2
    with pytest.raises(UserError, match="option --tasks: 'Juggle' is not there; known: TurnOnStove, OpenDrawer"):
        run([tmp_path / "in"], tmp_path / "other", tasks=("Juggle",))
    first = run([tmp_path / "in"], tmp_path / "first", split="first_2")
    assert len(first.episodes) == 6


@pytest.mark.parametrize("damage", BROKEN)
def test_bad_input_is_one_line_and_may_be_left_out(damage, demos, tmp_path, capsys):
    """The line names the file and the episode; the rest is imported, and the dataset tells what is not in it."""
    root = tmp_path / "lerobot"
    if "hdf5" in damage.__name__ or damage is damaged_frames:
        root.mkdir()
    message, left = damage(root, demos)
    out = tmp_path / "data"
    with pytest.raises(UserError, match=message) as error:
        run([root], out)
    assert "\n" not in str(error.value) and not out.exists()
    dataset = run([root], out, skip_bad=True)
    assert len(dataset.episodes) == left and re.search(message, dataset.source["left_out"][0])
    assert not out.with_name("data.episodes").exists()


def test_frames_are_those_of_the_time_stamps(demos, tmp_path, capsys):
    """A trimmed episode: its video begins five frames before it does."""
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    white = np.full((5, files.PIXELS, files.PIXELS, 3), 255, np.uint8)
    files.write_video(video_file(root, 1), np.concatenate([white, demos[1].images[CAMERA]]), 20)
    rewrite_table(root, 1, lambda table: with_column(table, "timestamp", ((5 + np.arange(14)) / 20).astype("f")))
    dataset = run([root], tmp_path / "data", stride=1)
    row = dataset.episodes[1]
    for step in range(14):
        drift = dataset[row.first_record + step].images[CAMERA].astype(int) - demos[1].images[CAMERA][step]
        assert np.abs(drift).mean() < 4  # of 255: as near as the video's own compression


def rename(root: pathlib.Path, features: dict[str, dict[str, list[int]]]) -> None:
    """Splits columns into parts: column -> {new name: its columns}; LeRobot's own names are gone."""
    import pyarrow as pa

    info = json.loads((root / "meta" / "info.json").read_text())
    for old, parts in features.items():
        info["features"].pop(old)
        info["features"] |= {name: {"dtype": "float64", "shape": [len(at)]} for name, at in parts.items()}
    (root / "meta" / "info.json").write_text(json.dumps(info))

    def split(table):
        for old, parts in features.items():
            values = np.array(table.column(old).to_pylist())
            for name, at in parts.items():
                table = table.append_column(name, pa.array(list(values[:, at])))
            table = table.drop_columns([old])
        return table

    for episode in range(info["total_episodes"]):
        rewrite_table(root, episode, split)


def test_columns_of_other_names_and_in_parts(demos, tmp_path, capsys):
    """As openpi's converters name them, and split; joined in the order that is given, frames by their columns."""
    root = files.write_lerobot(tmp_path / "lerobot", demos, modality=False)
    arm, rest = list(range(5)), list(range(5, 12))
    rename(root, {"action": {"actions.arm": arm, "actions.rest": rest}, "observation.state": {"state": [3, 1, 2]}})
    with pytest.raises(UserError, match=r"has no feature action; it has .*; --actions=NAME, or NAME,NAME to join"):
        run([root], tmp_path / "data")
    named = f"--images=left:observation.images.{CAMERA},wrist:observation.images.{files.CAMERAS[2]}"
    options = ["--actions=actions.rest,actions.arm", "--state=state", named, "--stride=1", "--chunk=1"]
    main(["collect", f"--from={root}", f"--out={tmp_path / 'data'}", *options])
    said = capsys.readouterr().out
    assert "actions in the order that is stored in actions.rest + actions.arm, state in the order that is" in said
    assert f"left from observation.images.{CAMERA}, wrist from" in said
    dataset = open_dataset(tmp_path / "data")
    assert tuple(dataset.cameras) == ("left", "wrist")
    for record in (dataset[i] for i in range(len(dataset))):
        demo = demos[record.episode]
        # The stored order with its halves exchanged is the simulator's (demo_files.ACTION_TABLE).
        np.testing.assert_array_equal(record.actions[0], demo.actions[record.step].astype("f"))
        np.testing.assert_array_equal(record.state, demo.state[record.step][[3, 1, 2]].astype("f"))
        for camera, written in (("left", CAMERA), ("wrist", files.CAMERAS[2])):
            assert np.abs(record.images[camera].astype(int) - demo.images[written][record.step]).mean() < 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--state=action,where", "has no feature where; it has .*; --state=NAME"),
        (f"--actions=observation.images.{CAMERA}", "--actions: observation.images.* is of video, expected numbers"),
        ("--images=front:front_image", "--images: .* has no column front_image of images; it has observation.images"),
        ("--images=front", "--images: got front, expected CAMERA:COLUMN"),
        ("--images=a:b,a:c", "--images: got a:b,a:c, expected each camera once"),
    ],
)
def test_columns_that_are_not_there(demos, tmp_path, capsys, option, message):
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    with pytest.raises(UserError, match=message):
        main(["collect", f"--from={root}", f"--out={tmp_path / 'data'}", option])


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_stamps_of_a_real_clock(demos, tmp_path, rng, capsys, version):
    """Jitter of a few milliseconds is refused, with its cure; frames keep their rows; lost ones are never let pass."""
    root = (files.write_lerobot if version == "v2.1" else files.write_lerobot_v3)(tmp_path / "lerobot", demos)
    jitter = rng.uniform(-0.008, 0.008, sum(len(demo.actions) for demo in demos)).astype("f")
    for path in root.glob("data/**/*.parquet"):

        def moved(table):
            stamps, place = np.array(table.column("timestamp")), np.array(table.column("index"))
            return with_column(table, "timestamp", (stamps + jitter[place] * (stamps > 0)).astype("f"))

        pq = need("pyarrow.parquet", "pyarrow", root)
        pq.write_table(moved(pq.read_table(path)), path)
    command = ["collect", f"--from={root}", f"--cameras={CAMERA}", "--stride=1", "--chunk=1"]
    with pytest.raises(UserError, match=r"time stamps .* s apart.*--tolerance-s=0.0\d+ takes stamps of a real") as told:
        main([*command, f"--out={tmp_path / 'data'}"])
    asked = float(re.search(r"--tolerance-s=([\d.]+)", str(told.value))[1])
    assert 0.005 < asked < 0.02
    main([*command, f"--out={tmp_path / 'data'}", "--tolerance-s=0.02"])
    dataset = open_dataset(tmp_path / "data")
    assert dataset.source["tolerance_s"] == 0.02
    for row, demo in zip(dataset.episodes, demos, strict=True):
        for step in range(len(demo.actions)):
            record = dataset[row.first_record + step]
            assert np.abs(record.images[CAMERA].astype(int) - demo.images[CAMERA][step]).mean() < 5
    with pytest.raises(UserError, match="--tolerance-s: 0.05 s is 1 frames of .*hides lost frames; expected less"):
        main([*command, f"--out={tmp_path / 'other'}", "--tolerance-s=0.05"])
    with pytest.raises(UserError, match="--tolerance-s: got -1"):
        main([*command, f"--out={tmp_path / 'other'}", "--tolerance-s=-1"])


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_task_that_changes_within_an_episode(demos, tmp_path, capsys, version, stride):
    """Refused with its cure, or an episode of each part: its own rows, frames and words."""
    root = (files.write_lerobot if version == "v2.1" else files.write_lerobot_v3)(tmp_path / "lerobot", demos)
    (root / "extras/dataset_meta.json").unlink()  # tasks are known by their words
    pq = need("pyarrow.parquet", "pyarrow", root)
    for path in root.glob("data/**/*.parquet"):
        table = pq.read_table(path)
        step, episode = (np.array(table.column(name)) for name in ("frame_index", "episode_index"))
        described = np.array(table.column("annotation.human.task_description"))
        described = np.where((episode == 1) & (step >= 4) & (step < 11), 1 - described, described)
        pq.write_table(with_column(table, "annotation.human.task_description", described), path)
    command = ["collect", f"--from={root}", f"--cameras={CAMERA}", f"--stride={stride}", "--chunk=4"]
    with pytest.raises(UserError, match=r"episode 1: .*\[0, 1\], expected one .*--task-changes=split makes an episode"):
        main([*command, f"--out={tmp_path / 'data'}"])
    main([*command, f"--out={tmp_path / 'split'}", "--task-changes=split"])
    dataset = open_dataset(tmp_path / "split")
    other = {"open the drawer": "close the drawer", "close the drawer": "open the drawer"}
    parts = [(0, 0, 9, False), (1, 0, 4, False), (1, 4, 11, True), (1, 11, 14, False), (2, 0, 6, False)]
    assert len(dataset.episodes) == len(parts) and dataset.source["task_changes"] == "split"
    for row, (number, start, stop, changed) in zip(dataset.episodes, parts, strict=True):
        demo = demos[number]
        text = other[demo.instruction] if changed else demo.instruction
        assert (row.instruction, row.task, row.steps) == (text, text, stop - start)
        for place, step in enumerate(range(start, stop, stride)):
            record = dataset[row.first_record + place]
            np.testing.assert_allclose(record.state, demo.state[step], rtol=1e-6)
            following = [demo.actions[min(step + i, stop - 1)] for i in range(4)]  # nothing of the next part
            np.testing.assert_allclose(record.actions, following, rtol=1e-6)
            assert np.abs(record.images[CAMERA].astype(int) - demo.images[CAMERA][step]).mean() < 5
        assert row.records == len(range(start, stop, stride))


def test_videos_without_a_path_are_told(demos, tmp_path, capsys):
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"video_path": None}))
    with pytest.raises(UserError, match=r"info\.json has no video_path, yet observation\.images\.\w+ is a video"):
        run([root], tmp_path / "data")


def test_depth_is_no_picture(demos, tmp_path, capsys):
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    info = json.loads((root / "meta" / "info.json").read_text())
    key = f"observation.images.{files.CAMERAS[2]}"
    info["features"][key]["info"] = {"video.is_depth_map": True}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    dataset = run([root], tmp_path / "data", cameras=())
    assert tuple(dataset.cameras) == files.CAMERAS[:2]
    assert f"depth is left out: {key}" in dataset.source["sources"][0]["order"]

    def stored(table):  # 16 bits a pixel, in a column of images that says nothing of it
        import io

        from PIL import Image

        out = io.BytesIO()
        Image.fromarray(np.full((32, 32), 3000, np.uint16)).save(out, "png")
        return table.append_column(key, pa.array([{"bytes": out.getvalue(), "path": ""}] * table.num_rows))

    import pyarrow as pa

    info["features"][key] = {"dtype": "image", "shape": [32, 32, 3]}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    rewrite_table(root, 0, stored)
    with pytest.raises(UserError, match="episode 0: an image of .* cannot be read .*depth cannot be imported"):
        run([root], tmp_path / "other", cameras=())


def test_nothing_is_imported_twice(demos, tmp_path, capsys):
    import h5py

    folder = tmp_path / "many" / "below"
    folder.mkdir(parents=True)
    path = files.write_hdf5(folder / "drawer.hdf5", demos)
    files.write_lerobot(tmp_path / "elsewhere", files.make_demos(np.random.default_rng(0), 2))
    (tmp_path / "many" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "many" / "again").symlink_to(folder)  # the same files by another way
    (folder / "around").symlink_to(tmp_path / "many")
    given = [tmp_path / "many", path, tmp_path / "many" / "linked"]
    assert len(run(given, tmp_path / "data").episodes) == 5
    with h5py.File(path, "r+") as file:
        file.create_dataset("mask/doubled", data=np.array(["demo_2", "demo_2", "demo_1"], dtype="S"))
    assert [row.steps for row in run([path], tmp_path / "masked", split="doubled").episodes] == [9, 14]


def test_copies_are_kept_where_that_is_asked_for(demos, tmp_path, monkeypatch, capsys):
    """Also after an interruption a copy of what was imported before it is found."""
    for name in ("a", "b"):
        files.write_hdf5(tmp_path / f"{name}.hdf5", demos)
    both = [tmp_path / "a.hdf5", tmp_path / "b.hdf5"]
    with pytest.raises(UserError, match=r"b\.hdf5, demo_1 is a copy of .*a\.hdf5, demo_1 .*; --skip-bad leaves it out"):
        run(both, tmp_path / "data")
    assert (tmp_path / "data.episodes").exists()
    with pytest.raises(UserError, match=r"b\.hdf5, demo_1 is a copy of"):
        run(both, tmp_path / "data")
    kept = run(both, tmp_path / "data", keep_duplicates=True)  # goes on where it was
    assert len(kept.episodes) == 6 and kept.source["keep_duplicates"]
    with pytest.raises(UserError, match="exists with keep_duplicates True, asked for False"):
        run(both, tmp_path / "data")


def test_episodes_that_share_only_some_are_no_copies(demos, tmp_path, capsys):
    """The same movements under other pictures, in other words, or longer."""
    files.write_hdf5(tmp_path / "a.hdf5", demos[:1])
    brighter = {camera: frames + np.uint8(15) for camera, frames in demos[0].images.items()}
    described = dataclasses.replace(demos[0], instruction="pull the drawer")
    nudged = dataclasses.replace(demos[0], actions=demos[0].actions + 1e-3)
    files.write_hdf5(tmp_path / "b.hdf5", [dataclasses.replace(demos[0], images=brighter), described, nudged])
    assert len(run([tmp_path], tmp_path / "data").episodes) == 4


def test_several_options_from_are_all_taken(tmp_path):
    config, _ = parse_import(["--from", "/a", "/b", "--from=/c", "--out=/d"])
    assert config.paths == tuple(map(pathlib.Path, ("/a", "/b", "/c")))


def test_what_is_not_ours_is_never_deleted(demos, tmp_path, capsys):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    partial = tmp_path / "data.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="data.partial is needed .* and holds thesis.txt: move it away"):
        run([path], tmp_path / "data")
    assert (partial / "thesis.txt").read_text() == "mine"
    (partial / "thesis.txt").rename(tmp_path / "thesis.txt")
    (partial / "demonstrations").mkdir()  # as a killed run leaves it
    assert len(run([path], tmp_path / "data").episodes) == 3 and not partial.exists()


def test_what_was_left_out_once_is_not_left_out_unasked(demos, tmp_path, monkeypatch, capsys):
    demos[0].actions[2] = np.nan
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    read = importing.read_episode

    def interrupted(source, episode, *arguments):
        if episode.name == "demo_3":
            raise KeyboardInterrupt
        return read(source, episode, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importing, "read_episode", interrupted)
        run([path], tmp_path / "data", skip_bad=True)
    with pytest.raises(UserError, match="begun with --skip-bad and left out 1, the first: .*demo_1.*; give --skip-bad"):
        run([path], tmp_path / "data")
    assert len(run([path], tmp_path / "data", skip_bad=True).episodes) == 2


def test_a_v3_directory_that_was_never_finished(tmp_path, demos):
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v3.0"}))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"task_index": [0], "task": ["x"]}), root / "meta" / "tasks.parquet")
    with pytest.raises(UserError, match="half written: it has no meta/episodes"):
        run([root], tmp_path / "data")
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (root / "meta" / "episodes" / "chunk-000" / "file-000.parquet").write_bytes(b"PAR1 no footer")
    with pytest.raises(UserError, match=r"file-000\.parquet cannot be read .*its episodes are lost"):
        run([root], tmp_path / "data")
    (root / "meta" / "info.json").unlink()
    with pytest.raises(UserError, match=r"half written: it has no meta/info\.json"):
        run([root], tmp_path / "data")


def test_nothing_to_import_is_told(tmp_path, demos, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    libero = files.write_hdf5(tmp_path / "libero.hdf5", [dataclasses.replace(d, images={}) for d in demos])
    edit_hdf5(libero, lambda data: data["demo_1/obs"].create_dataset("agentview_rgb", data=demos[0].images[CAMERA]))
    with pytest.raises(
        UserError, match=r"images are read from obs/\*_image .*; this file has pictures in agentview_rgb: name"
    ):
        run([libero], tmp_path / "data", cameras=())
    for path, message in (("empty", "holds nothing to import"), ("none", "does not exist"), ("notes.txt", "no HDF5")):
        with pytest.raises(UserError, match=message):
            run([tmp_path / path], tmp_path / "data")
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    run([path], tmp_path / "data")
    with pytest.raises(UserError, match="is a dataset already; train on it with --config.demos.dataset="):
        run([tmp_path / "data"], tmp_path / "again")
    with pytest.raises(UserError, match="has no camera sideways; it has robot0_agentview_left"):
        run([path], tmp_path / "again", cameras=("sideways",))
    for demo in demos:
        demo.actions[:] = np.nan
    with pytest.raises(UserError, match="nothing is left to import: 3 left out, the first: .*demo_1: actions not"):
        run([files.write_hdf5(tmp_path / "nan.hdf5", demos)], tmp_path / "again", skip_bad=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda info: info["features"]["action"].pop("dtype"), r"lerobot cannot be read \(KeyError: 'dtype'\)"),
        (lambda info: info.update(features=[]), r"lerobot cannot be read \(AttributeError: "),
        (lambda info: info.update(fps=0), r"info\.json: fps is 0, expected frames a second above 0"),
        (lambda info: info["splits"].update(train="a:b"), r"split 'train' is 'a:b', expected numbers first:end"),
        (lambda info: info.update(data_path="{nowhere}.parquet"), r"episode 0 cannot be read \(KeyError: 'nowhere'\)"),
    ],
)
def test_tables_of_another_structure_are_one_line(tmp_path, demos, capsys, change, message):
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    info = json.loads((root / "meta" / "info.json").read_text())
    change(info)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=message) as error:
            run([root], tmp_path / "data", split="train", skip_bad=skip_bad)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_import_goes_on_where_it_was(demos, tmp_path, monkeypatch, capsys, stop_after):
    demos[0].actions[2] = np.nan  # left out before the interruption, and told after it
    demos += files.make_demos(np.random.default_rng(1))
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    whole = run([path], tmp_path / "whole", skip_bad=True)
    read, seen = importing.read_episode, []

    def interrupted(source, episode, *arguments):
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(episode.name)
        return read(source, episode, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importing, "read_episode", interrupted)
        run([path], tmp_path / "data", skip_bad=True)
    assert not (tmp_path / "data").exists()

    def counted(source, episode, *arguments):
        assert episode.name not in seen, "a finished episode was read again"
        return read(source, episode, *arguments)

    monkeypatch.setattr(importing, "read_episode", counted)
    resumed = run([path], tmp_path / "data", skip_bad=True)
    assert resumed.identity == whole.identity and len(resumed.source["left_out"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "drawer.hdf5", "whole"]


def test_a_bad_episode_costs_none_of_those_before_it(demos, tmp_path, monkeypatch, capsys):
    demos[2].actions[0] = np.inf
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    with pytest.raises(UserError, match="demo_3: actions not finite at step 0 .*; --skip-bad leaves it out"):
        run([path], tmp_path / "data")
    read, seen = importing.read_episode, []
    monkeypatch.setattr(importing, "read_episode", lambda s, e, *a: (seen.append(e.name), read(s, e, *a))[1])
    assert len(run([path], tmp_path / "data", skip_bad=True).episodes) == 2
    assert seen == ["demo_3"]


def test_an_import_of_something_else_is_refused(demos, tmp_path, capsys):
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    dataset = run([path], tmp_path / "data")
    again, known = import_demonstrations(ImportConfig((path,), (CAMERA,)), tmp_path / "data")
    assert known and again.identity == dataset.identity
    with pytest.raises(UserError, match="exists with stride 4, asked for 2; choose another --out"):
        run([path], tmp_path / "data", stride=2)
    files.write_hdf5(path, demos[:2])
    with pytest.raises(UserError, match="exists with sources .*; choose another --out"):
        run([path], tmp_path / "data")


def test_the_command(demos, tmp_path, capsys):
    path = files.write_lerobot(tmp_path / "lerobot", demos)
    arguments = ["collect", f"--from={path}", f"--out={tmp_path / 'data'}", "--stride=2", f"--cameras={CAMERA}"]
    main(arguments)
    said = capsys.readouterr().out
    assert "actions in raw order by meta/modality.json" in said and "3 demonstrations of 1 task, 15 decisions" in said
    assert f"--config.demos.dataset={tmp_path / 'data'} --config.env.cameras={CAMERA}" in said
    main(arguments)
    assert "already imported: 3 demonstrations" in capsys.readouterr().out
    for wrong, message in (
        ("--stride=0", "--stride: got 0"),
        ("--chunk=100000", "got 100000"),
        ("--noise=1", "unrecognized arguments: --noise=1"),
    ):
        with pytest.raises(UserError, match=message):
            parse_import([*arguments[1:], wrong])


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match=r"reading a\.hdf5 needs the package h5py: pip install 'z1-jax\[data\]'"):
        need("h5py", "h5py", pathlib.Path("a.hdf5"))


def sft(dataset: pathlib.Path, run_dir: pathlib.Path, *more: str) -> None:
    options = {"demos.dataset": dataset, "run_dir": run_dir, "env.cameras": CAMERA, "sft.steps": 3, "sft.batch_size": 8}
    settings = [f"--config.{key}={value}" for key, value in options.items()]
    train.main(["train", "--config=configs/sft.py:smoke", *settings, *more])


def test_sft_trains_on_an_import(demos, tmp_path, monkeypatch, capsys):
    """A few steps on RoboCasa's LeRobot files, without an environment; the policy keeps the data's statistics."""
    monkeypatch.setattr(initial_policy, "configured_model", lambda config: tiny.CONFIG)
    monkeypatch.setattr(opening, "start_jax", lambda: None)  # the tests have a cache of their own
    monkeypatch.setattr(opening, "make_mesh", lambda config: tiny.one_device())
    dataset = run([files.write_lerobot(tmp_path / "lerobot", demos)], tmp_path / "data", cameras=(CAMERA,))
    sft(tmp_path / "data", tmp_path / "run", "--config.eval.episodes=0", "--config.log.every=1")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all() and len(set(losses)) == 3
    document = initial_policy.policy_document(str(tmp_path / "run"))
    assert document["norm_stats"]["actions"]["q99"] == dataset.stats["actions"].q99.tolist()
    assert document["cameras"] == [CAMERA]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "not evaluated" in summary["sentence"] and (tmp_path / "run" / "report.html").exists()


def test_a_dataset_that_does_not_fit_is_refused_before_the_run(demos, tmp_path, monkeypatch, capsys):
    path = files.write_lerobot(tmp_path / "lerobot", demos)
    run([path], tmp_path / "data")
    run([path], tmp_path / "short", chunk=4)
    info = json.loads((path / "meta" / "info.json").read_text())
    info["features"]["action"]["shape"] = [14]
    (path / "meta" / "info.json").write_text(json.dumps(info))
    (path / "meta" / "modality.json").unlink()
    for episode, demo in enumerate(demos):
        wide = np.zeros((len(demo.actions), 14))
        rewrite_table(path, episode, lambda table, wide=wide: with_column(table, "action", wide))
    run([path], tmp_path / "wide")
    trains_only = "--config.eval.episodes=0"
    for name, more, message in (
        (
            "data",
            ("--config.env.cameras=front", trains_only),
            "env.cameras: got front, the dataset .* has robot0_agent",
        ),
        ("short", (), "model.preset: kitchen predicts chunks of 8 steps, the dataset .* has chunks of 4"),
        ("wide", (trains_only,), "model.preset: kitchen predicts actions of width 12, the dataset .* has width 14"),
        ("wide", ("--config.model.preset=mid",), "width 14, the environments of env.suite=kitchen 12; sft with eval"),
    ):
        with pytest.raises(UserError, match=message):
            sft(tmp_path / name, tmp_path / "run", *more)
    with pytest.raises(
        UserError, match="eval.episodes: got 0, expected at least 1; 0 is for algorithm=sft with a demos"
    ):
        train.main(["train", "--config=configs/grpo.py:smoke", trains_only])
    assert not (tmp_path / "run").exists()
