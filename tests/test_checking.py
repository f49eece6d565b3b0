"""`collect --check`: each fault that is planted in good data is found, where it is, and nothing else is."""

import dataclasses
import re

import demo_files as files
import numpy as np
import pytest

from z1_jax.collect.__main__ import main
from z1_jax.collect.checking import check_episodes
from z1_jax.collect.importers.base import BadData
from z1_jax.data.dataset import write_dataset
from z1_jax.data.journal import JournaledEpisode
from z1_jax.errors import UserError
from z1_jax.suites import training_statistics

STRIDE, CHUNK, SIDE = 2, 4, 16


def episodes(rng, count: int = 6, decisions: int = 40) -> list[JournaledEpisode]:
    """Episodes without a fault: everything moves, every frame is another."""
    made = []
    for number in range(count):
        frames = rng.integers(40, 200, (decisions, SIDE, SIDE, 3)).astype(np.uint8)
        made.append(
            JournaledEpisode(
                task="OpenDrawer",
                seed=number,
                instruction=("open the drawer", "pull it")[number % 2],
                success=True,
                control_steps=decisions * STRIDE,
                images={"front": frames, "wrist": frames[::-1].copy()},
                state=rng.uniform(-1, 1, (decisions, 3)).astype("f"),
                actions=rng.uniform(-1, 1, (decisions, CHUNK, 2)).astype("f"),
            )
        )
    return made


def stream(made):
    return ((f"episode {number}", episode) for number, episode in enumerate(made))


def outlier(made):
    made[3].actions[7, 1, 0] = 31.0
    made[4].actions[2, 3, 1] = 99.0  # beyond the stride: the next decision has the real one
    return [("outlier", r"actions dimension 0: 1 of 480 values .* 31 in episode 3, row 15: a label")]


def constant(made):
    for episode in made:
        episode.state[:, 1] = 0.25
    return [("constant", r"state dimension 1 never moves \(0.25\)")]


def nearly_constant(made):
    for episode in made:
        episode.state[:, 2] = 0.0
    made[0].state[:2, 2] = 0.5
    return [("nearly constant", r"state dimension 2 has one value, 0, in 99.2% of the rows")]


def black(made):
    made[2].images["front"][5] = 3
    made[4].images["front"][1] = 0
    return [("black", r"camera front: 2 of 240 frames are black, the first in episode 2, decision 5")]


def frozen(made):
    made[1].images["wrist"][10:18] = made[1].images["wrist"][10]
    made[5].images["wrist"][2:5] = made[5].images["wrist"][2]  # three alike are no hang
    return [("frozen", r"camera wrist shows one frame .*, in 1 episodes; longest in episode 1, decisions 10 to 17")]


def copied(made):
    made[5] = dataclasses.replace(made[0], seed=5)
    made[5] = dataclasses.replace(made[5], instruction=made[0].instruction)
    return [("copy", r"episode 5 is a copy of episode 0 .*leave one of them out")]


def short(made):
    for name in ("state", "actions"):
        object.__setattr__(made[2], name, getattr(made[2], name)[:3])
    object.__setattr__(made[2], "images", {camera: frames[:3] for camera, frames in made[2].images.items()})
    object.__setattr__(made[2], "control_steps", 3 * STRIDE)
    return [("length", r"episode 2 has 6 control steps, the median is 80: look whether it is whole")]


@pytest.mark.parametrize("plant", [outlier, constant, nearly_constant, black, frozen, copied, short])
def test_a_planted_fault_is_found_and_nothing_else(rng, plant):
    made = episodes(rng)
    assert check_episodes(stream(made), STRIDE).findings == ()
    expected = plant(made)
    found = check_episodes(stream(made), STRIDE).findings
    assert [finding.kind for finding in found] == [kind for kind, _ in expected]
    for finding, (_, line) in zip(found, expected, strict=True):
        assert re.search(line, finding.line), finding.line
        assert "\n" not in finding.line


def test_a_camera_that_stands_still_while_the_robot_does_is_no_fault(rng):
    made = episodes(rng)
    made[1].images["wrist"][10:18] = made[1].images["wrist"][10]
    made[1].state[10:18] = made[1].state[10]
    assert check_episodes(stream(made), STRIDE).findings == ()


def test_numbers_by_hand(rng):
    made = episodes(rng)
    checked = check_episodes(stream(made), STRIDE)
    state = np.concatenate([episode.state for episode in made]).astype(np.float64)
    actions = np.concatenate([episode.actions[:, :STRIDE].reshape(-1, 2) for episode in made]).astype(np.float64)
    for key, values in (("state", state), ("actions", actions)):
        quantity = checked.quantities[key]
        np.testing.assert_allclose(quantity.stats.mean, values.mean(axis=0), atol=1e-7)
        np.testing.assert_allclose(quantity.stats.q99, np.quantile(values, 0.99, axis=0), atol=1e-7)
        np.testing.assert_allclose((quantity.low, quantity.high), (values.min(axis=0), values.max(axis=0)), atol=1e-7)
    assert checked.decisions == 240 and checked.lengths.tolist() == [80] * 6
    assert checked.words == {"open the drawer": 3, "pull it": 3} and checked.tasks == {"OpenDrawer": 6}
    assert checked.cameras == {"front": (SIDE, SIDE), "wrist": (SIDE, SIDE)}
    np.testing.assert_array_equal(checked.strips["episode 0, front"][1], made[0].images["front"][20])


def test_what_cannot_be_read_is_told_and_the_rest_is_checked(rng):
    made = episodes(rng)
    broken = [("a", BadData("a: the video is missing")), *stream(made)]
    checked = check_episodes(iter(broken), STRIDE)
    assert [(f.kind, f.line) for f in checked.findings] == [("broken", "a: the video is missing")]
    with pytest.raises(BadData, match="no episode can be read, the first: a: the video is missing"):
        check_episodes(iter(broken[:1]), STRIDE)


def test_a_dataset_of_ours_in_the_terminal_and_as_a_page(rng, tmp_path, capsys):
    made = episodes(rng)
    made[0] = dataclasses.replace(made[0], instruction="open <the> drawer")
    copied(made), black(made)
    write_dataset(tmp_path / "data", iter(made), {"made_by": "import", "fps": 20.0, "stride": STRIDE, "left_out": []})
    before = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    main(["collect", f"--check={tmp_path / 'data'}"])
    out = capsys.readouterr().out
    for line in (
        "rate           20 control steps a second",
        "episodes       6, 240 decisions",
        "control steps  480; an episode 80 … 80, median 80",
        "2 things to look at:",
        "  black: camera front: 2 of 240 frames are black",
        "  copy: episode 5 is a copy of episode 0",
    ):
        assert line in out, out
    page = (tmp_path / "data.check.html").read_text()
    assert page.count("data:image/png;base64,") == 4 * 2 * 3 and "open &lt;the&gt; drawer" in page
    assert "camera front: 2 of 240 frames are black" in page and "<script" not in page
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == before
    main(["collect", "--check", str(tmp_path / "data"), f"--html={tmp_path / 'x.html'}"])
    assert (tmp_path / "x.html").read_text() == page
    with pytest.raises(UserError, match="--html: .* cannot be written"):
        main(["collect", f"--check={tmp_path / 'data'}", f"--html={tmp_path / 'no' / 'x.html'}"])


def test_what_counts_as_constant_is_what_training_will_hold(rng, tmp_path, capsys):
    """The kitchen's state is in metres: a tremble of 0.4 mm is held, by SFT and so by the check."""
    made = episodes(rng)
    for episode in made:
        episode.state[:, 1] = rng.uniform(0, 4e-4, len(episode.state))
    assert check_episodes(stream(made), STRIDE).findings == ()
    source = {"made_by": "kitchen expert", "stride": STRIDE}
    dataset = write_dataset(tmp_path / "data", iter(made), source)
    main(["collect", f"--check={tmp_path / 'data'}"])
    told = re.findall(r"constant: state dimension (\d+) moves by (\S+) in all", capsys.readouterr().out)
    [(dim, span)] = told
    state = np.concatenate([episode.state[:, 1] for episode in made])
    assert dim == "1" and float(span) == pytest.approx(np.ptp(state), rel=0.05)
    assert np.flatnonzero(training_statistics(dataset.source, dataset.stats)["state"].constant).tolist() == [1]


def test_data_that_are_not_imported_yet(rng, tmp_path, capsys):
    demos = files.make_demos(rng)
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    [video] = root.glob(f"videos/*/*{files.CAMERAS[0]}/episode_000001.mp4")
    video.unlink()
    main(["collect", f"--check={root}"])
    out = capsys.readouterr().out
    assert "format         lerobot v2.1" in out and f"{files.CAMERAS[0]}: video, 32×32×3" in out
    assert "episodes       2, 15 decisions" in out and "1 thing to look at:" in out
    assert re.search(r"broken: .*episode 1: the video .*episode_000001.mp4 is missing", out)
    path = files.write_hdf5(tmp_path / "drawer.hdf5", demos)
    main(["collect", f"--check={path}"])
    out = capsys.readouterr().out
    assert "format         robomimic hdf5" in out and "episodes       3, 29 decisions" in out
    with pytest.raises(UserError, match="does not exist"):
        main(["collect", f"--check={tmp_path / 'nothing'}"])
