import dataclasses

import numpy as np
import pytest

from z1_jax.data.journal import EpisodeJournal, JournaledEpisode
from z1_jax.errors import UserError

SOURCE = {"task": "Stir", "noise": 0.2, "cameras": ["a", "b"]}


def make_episode(rng: np.random.Generator, seed: int, success: bool = True) -> JournaledEpisode:
    n = int(rng.integers(1, 5))
    return JournaledEpisode(
        task="Stir",
        seed=seed,
        instruction="stir the söup",
        success=success,
        control_steps=8 * n,
        images={camera: rng.integers(0, 256, (n, 6, 6, 3), np.uint8) for camera in ("a", "b")},
        state=rng.standard_normal((n, 5)).astype(np.float32),
        actions=rng.standard_normal((n, 8, 3)).astype(np.float32),
    )


def assert_same(got: JournaledEpisode, wanted: JournaledEpisode) -> None:
    one, other = dataclasses.asdict(got), dataclasses.asdict(wanted)
    assert one.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_equal(one[name], value)
    assert got.images["a"].dtype == np.uint8 and got.state.dtype == np.float32


def test_successes_come_back_and_failures_are_counted(rng, tmp_path):
    episodes = [make_episode(rng, seed, success) for seed, success in enumerate((True, False, True, True))]
    with EpisodeJournal(tmp_path / "deep" / "j", SOURCE) as journal:
        for episode in episodes:
            journal.append(episode)
    with EpisodeJournal(tmp_path / "deep" / "j", SOURCE) as journal:
        assert (journal.tried, journal.kept) == (4, 3)
        for got, wanted in zip(journal.episodes(), [e for e in episodes if e.success], strict=True):
            assert_same(got, wanted)


def test_a_kill_at_any_byte_costs_only_the_episode_being_written(rng, tmp_path):
    whole, sizes = tmp_path / "whole", []
    episodes = [make_episode(rng, seed) for seed in range(3)]
    with EpisodeJournal(whole, SOURCE) as journal:
        for episode in episodes:
            journal.append(episode)
            sizes.append(whole.stat().st_size)
    content = whole.read_bytes()
    for cut in [*rng.integers(0, len(content), 20), *sizes, *(np.array(sizes) - 1)]:
        path = tmp_path / "cut"
        path.write_bytes(content[:cut])
        left = sum(size <= cut for size in sizes)
        with EpisodeJournal(path, SOURCE) as journal:
            assert journal.tried == left
            for episode in episodes[left:]:
                journal.append(episode)
        assert path.read_bytes() == content


def test_a_flipped_byte_ends_the_journal_before_its_entry(rng, tmp_path):
    path = tmp_path / "j"
    with EpisodeJournal(path, SOURCE) as journal:
        journal.append(make_episode(rng, 0))
        first = path.stat().st_size
        journal.append(make_episode(rng, 1))
    content = bytearray(path.read_bytes())
    content[int(rng.integers(first + 12, len(content)))] ^= int(rng.integers(1, 256))
    path.write_bytes(content)
    with EpisodeJournal(path, SOURCE) as journal:
        assert journal.tried == 1


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes, which are longer than the header of an entry", b"\xff" * 40]
)
def test_a_file_that_is_no_journal_is_left_alone(content, tmp_path):
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no journal of episodes; move it away"):
        EpisodeJournal(path, SOURCE)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="cannot be written .Is a directory"):
        EpisodeJournal(tmp_path, SOURCE)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_journal_that_was_killed_in_its_first_entry_begins_anew(share, tmp_path):
    path = tmp_path / "j"
    EpisodeJournal(path, SOURCE).close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with EpisodeJournal(path, SOURCE) as journal:
        assert journal.tried == 0
    assert path.read_bytes() == whole


def test_a_journal_without_episodes_gives_way(rng, tmp_path):
    """A command that stopped before its first episode, for its error named the option that it lacked."""
    path = tmp_path / "j"
    with EpisodeJournal(path, SOURCE):
        pass
    other = {**SOURCE, "noise": 0.3}
    with EpisodeJournal(path, other) as journal:
        journal.append(make_episode(rng, 0))
    with EpisodeJournal(path, other) as journal:
        assert journal.tried == 1
    with pytest.raises(UserError, match="earlier command with noise"):
        EpisodeJournal(path, SOURCE)


def test_a_journal_of_another_source_is_refused_and_left_alone(rng, tmp_path):
    path = tmp_path / "j"
    with EpisodeJournal(path, SOURCE) as journal:
        journal.append(make_episode(rng, 0))
    content = path.read_bytes()
    with pytest.raises(UserError, match="earlier command with noise 0.2, asked for 0.3; give that"):
        EpisodeJournal(path, {**SOURCE, "noise": 0.3})
    assert path.read_bytes() == content
