import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time

import jax
import numpy as np
import pytest
from seeds import fresh_seed

from z1_jax.data.dataset import Dataset, open_dataset, write_dataset
from z1_jax.data.loader import Loader, batch_observation, collate
from z1_jax.data.tokenizer import PromptTokenizer, train_small_tokenizer
from z1_jax.data.transforms import InputProcessor

SEED = fresh_seed(__name__)
SIZE, CHUNK = 16, 4


@dataclasses.dataclass
class Demonstration:
    images: dict
    state: np.ndarray
    actions: np.ndarray
    instruction: str
    task: str
    seed: int
    success: bool
    control_steps: int


def make_episodes(count=7, seed=SEED) -> list[Demonstration]:
    rng = np.random.default_rng(seed)
    episodes = []
    for index in range(count):
        n = int(rng.integers(1, 5))
        images = {name: rng.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8) for name in ("left", "wrist")}
        state = rng.normal(size=(n, 5)).astype(np.float32)
        actions = rng.normal(size=(n, CHUNK, 3)).astype(np.float32)
        task = ("OpenDrawer", "TurnOnSinkFaucet")[index % 2]
        text = ("open the drawer", "turn on the sink faucet")[index % 2]
        episodes.append(Demonstration(images, state, actions, text, task, 1000 + index, index != 3, 4 * n))
    return episodes


@pytest.fixture(scope="module")
def episodes() -> list[Demonstration]:
    print("seed", SEED)
    return make_episodes()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, episodes) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "demos", iter(episodes), {"made_by": "test", "noise": 0.2})


@pytest.fixture(scope="module")
def processor(dataset) -> InputProcessor:
    tokenizer = PromptTokenizer(train_small_tokenizer(["open the drawer", "turn on the sink faucet"]), 32)
    return InputProcessor(tokenizer, dataset.stats, ("left", None, "wrist"), SIZE, 6)


@pytest.fixture
def broken_copy(dataset, tmp_path):
    """A copy to damage."""
    return shutil.copytree(dataset.path, tmp_path / "copy")


def test_records_read_back_bit_for_bit(dataset, episodes):
    dataset = open_dataset(dataset.path)
    assert len(dataset) == sum(len(e.state) for e in episodes)
    records = iter(dataset.records(range(len(dataset))))
    for number, episode in enumerate(episodes):
        for step in range(len(episode.state)):
            record = next(records)
            assert (record.episode, record.step, record.instruction) == (number, step, episode.instruction)
            np.testing.assert_array_equal(record.state, episode.state[step])
            np.testing.assert_array_equal(record.actions, episode.actions[step])
            for camera in episode.images:
                np.testing.assert_array_equal(record.images[camera], episode.images[camera][step])


def test_jpeg_frames_are_near(tmp_path, episodes):
    ramp = np.arange(64, dtype=np.uint8)
    smooth = np.stack(
        [np.broadcast_to(ramp, (64, 64)), np.broadcast_to(ramp[:, None], (64, 64)), np.full((64, 64), 90)], -1
    )
    episode = dataclasses.replace(
        episodes[0], images={"left": np.array([smooth.astype(np.uint8)] * len(episodes[0].state))}
    )
    exact = {}
    for jpeg in (0, 90):
        dataset = write_dataset(tmp_path / str(jpeg), [episode], {}, jpeg=jpeg)
        frame = dataset[0].images["left"]
        assert frame.dtype == np.uint8 and np.abs(frame.astype(int) - smooth).max() <= (8 if jpeg else 0)
        exact[jpeg] = np.array_equal(frame, smooth)
    assert exact == {0: True, 90: False}  # it is JPEG indeed


def test_table_statistics_and_source(dataset, episodes):
    assert dataset.source == {"made_by": "test", "noise": 0.2}
    first = 0
    for number, (row, episode) in enumerate(zip(dataset.episodes, episodes, strict=True)):
        assert (row.episode, row.task, row.seed, row.success) == (number, episode.task, episode.seed, episode.success)
        assert (row.steps, row.first_record, row.records) == (episode.control_steps, first, len(episode.state))
        first += row.records
    states, actions = (np.concatenate([getattr(e, key) for e in episodes]) for key in ("state", "actions"))
    np.testing.assert_allclose(dataset.stats["state"].mean, states.mean(0, dtype=np.float64), rtol=1e-9)
    q99 = np.quantile(actions.reshape(-1, 3).astype(np.float64), 0.99, axis=0)
    np.testing.assert_allclose(dataset.stats["actions"].q99, q99, rtol=1e-9)
    assert (dataset.state_dim, dataset.chunk, dataset.action_dim) == (5, CHUNK, 3)
    assert dataset.cameras == {"left": (SIZE, SIZE, 3), "wrist": (SIZE, SIZE, 3)}


def test_the_identity_is_that_of_the_demonstrations_in_any_process(dataset, tmp_path):
    """The bytes of records are not: protobuf orders their fields otherwise in each process."""
    program = f"""
        import test_dataset as t
        episodes, source = t.make_episodes(seed={SEED}), {{"made_by": "test", "noise": 0.2}}
        print(t.write_dataset({str(tmp_path / "again")!r}, episodes, source).identity)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here / "helpers"), str(here.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=here, env=os.environ | {"PYTHONPATH": paths}, timeout=300
    )
    assert run.stdout.splitlines()[-1] == dataset.identity, run.stderr
    episodes = make_episodes()
    episodes[2].actions[0, 0, 0] += 1e-6
    changed = write_dataset(tmp_path / "changed", episodes, {"made_by": "test", "noise": 0.2})
    told = write_dataset(tmp_path / "told", make_episodes(), {"made_by": "test", "noise": 0.3})
    episodes = make_episodes()
    episodes[0].seed += 1
    renamed = write_dataset(tmp_path / "renamed", episodes, {"made_by": "test", "noise": 0.2})
    assert len({d.identity for d in (dataset, changed, told, renamed)}) == 4


def test_tfds_itself_reads_it(dataset, episodes):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(dataset.path / "demonstrations" / "1.0.0").as_data_source(split="train")
    np.testing.assert_array_equal(source[0]["images"]["wrist"], episodes[0].images["wrist"][0])


def test_neither_tensorflow_nor_tfds_is_imported_without_need(dataset):
    code = f"""
        import sys
        from z1_jax.data.dataset import open_dataset
        dataset = open_dataset({str(dataset.path)!r})
        assert "tensorflow_datasets" not in sys.modules  # opening stays quick
        dataset[0]
        assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_a_failing_source_leaves_no_dataset_and_may_be_tried_again(tmp_path, episodes):
    def failing():
        yield from episodes[:2]
        raise RuntimeError("the simulator stopped")

    with pytest.raises(RuntimeError, match="^the simulator stopped$"):
        write_dataset(tmp_path / "demos", failing(), {})
    assert not (tmp_path / "demos").exists()
    with pytest.raises(ValueError, match="half written"):
        open_dataset(tmp_path / "demos")
    assert len(write_dataset(tmp_path / "demos", episodes, {}).episodes) == len(episodes)
    assert [p.name for p in tmp_path.iterdir()] == ["demos"]


def test_a_run_directory_is_no_dataset_and_names_its_own(tmp_path, episodes):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"dataset {tmp_path} is a run directory, it has collected none; expected"):
        open_dataset(tmp_path)
    write_dataset(tmp_path / "demonstrations", episodes[:1], {})
    with pytest.raises(ValueError, match=f"a run directory, its own is {tmp_path / 'demonstrations'}; expected"):
        open_dataset(tmp_path)


def test_nothing_is_left_for_temporary_files(tmp_path, episodes, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write_dataset(tmp_path / "demos", episodes, {})[0]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_unfit_episodes_are_refused(tmp_path, episodes):
    with pytest.raises(ValueError, match="no episodes"):
        write_dataset(tmp_path / "demos", [], {})
    odd = dataclasses.replace(episodes[1], actions=episodes[1].actions[:, :2])
    with pytest.raises(ValueError, match="episode 1 has arrays"):
        write_dataset(tmp_path / "demos", [episodes[0], odd], {})
    nan = dataclasses.replace(episodes[1], state=episodes[1].state * np.nan)
    grey = dataclasses.replace(episodes[1], images={k: v.astype(np.float32) for k, v in episodes[1].images.items()})
    with pytest.raises(ValueError, match="float32.*expected uint8"):
        write_dataset(tmp_path / "demos", [grey], {})
    with pytest.raises(ValueError, match="NaN"):
        write_dataset(tmp_path / "demos", [nan], {})


def test_existing_data_are_never_overwritten(dataset, episodes):
    with pytest.raises(ValueError, match="exists already"):
        write_dataset(dataset.path, episodes, {})


def test_missing_dataset(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_dataset(tmp_path / "none")


@pytest.mark.parametrize("pattern", ["manifest.json", "episodes.jsonl", "norm_stats.json", "**/*array_record*"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbled"])
def test_damage_is_one_clear_line(broken_copy, pattern, damage, monkeypatch):
    if "array_record" in pattern:  # as for files too large to be hashed at each opening
        monkeypatch.setattr("z1_jax.data.dataset.HASHED_BYTES", 0)
    file = next(iter(broken_copy.glob(pattern)))
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:middle])
    else:
        file.write_bytes(
            content[:middle] + bytes(b ^ 0x55 for b in content[middle : middle + 64]) + content[middle + 64 :]
        )
    with pytest.raises(ValueError, match="damaged|half written") as error:
        copy = open_dataset(broken_copy)
        copy.records(range(len(copy)))
    assert "\n" not in str(error.value) and str(broken_copy) in str(error.value)


def test_other_format_is_refused(broken_copy):
    manifest = json.loads((broken_copy / "manifest.json").read_text())
    (broken_copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, expected 2"):
        open_dataset(broken_copy)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_batch_holds_the_processed_records(dataset, processor):
    batch = next(Loader(dataset, processor, 4, SEED))
    assert batch["actions"].shape == (4, CHUNK, 6) and batch["state"].shape == (4, 5)
    for row, index in enumerate(batch["index"]):
        record = dataset[int(index)]
        expected = processor.observation([record])
        for name in ("images", "image_mask", "tokens", "token_mask"):
            np.testing.assert_array_equal(getattr(batch_observation(batch), name)[row], getattr(expected, name)[0])
        np.testing.assert_array_equal(batch["actions"][row], processor.model_actions(record.actions))
    assert len(jax.tree.leaves(batch_observation(batch))) == 4


def test_every_record_once_an_epoch_in_a_new_order(dataset, processor):
    loader, n = Loader(dataset, processor, 3, SEED), len(dataset)
    order = np.concatenate([next(loader)["index"] for _ in range(n)])  # three epochs
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order[:n].tolist() != order[n : 2 * n].tolist()
    other = Loader(dataset, processor, 3, SEED + 1)
    assert order[:n].tolist() != np.concatenate([next(other)["index"] for _ in range(n)])[:n].tolist()


def test_memory_and_disk_give_the_same_batches(dataset, processor):
    memory, disk = Loader(dataset, processor, 5, SEED), Loader(dataset, processor, 5, SEED, memory_bytes=0)
    assert memory.memory is not None and disk.memory is None
    assert all(same(next(memory), next(disk)) for _ in range(9))


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_resumes_with_the_next_batch(dataset, processor, memory_bytes):
    loader = Loader(dataset, processor, 4, SEED, memory_bytes=memory_bytes)
    for _ in range(5):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(6)]
    resumed = Loader(dataset, processor, 4, SEED, memory_bytes=memory_bytes)
    next(resumed)
    resumed.set_state(state)
    assert all(same(batch, next(resumed)) for batch in expected)


def test_processes_share_the_global_batch(dataset, processor):
    whole = Loader(dataset, processor, 6, SEED)
    parts = [Loader(dataset, processor, 6, SEED, process_index=i, process_count=3) for i in range(3)]
    for _ in range(7):
        expected, got = next(whole), [next(part) for part in parts]
        assert same(expected, {key: np.concatenate([part[key] for part in got]) for key in expected})
    parts[0].set_state(whole.get_state())  # another number of processes may go on


def test_reads_ahead_from_disk_while_a_batch_is_used(dataset, processor, monkeypatch):
    """After the first batch was taken, the next ones are read although nobody asks; not more than were asked for."""
    read, started = Dataset.records, []
    monkeypatch.setattr(
        Dataset, "records", lambda self, indices: (started.append(len(indices)), read(self, indices))[1]
    )
    loader = Loader(dataset, processor, 4, SEED, memory_bytes=0, prefetch=3, threads=2)
    next(loader)
    deadline = time.monotonic() + 30
    while len(started) < 1 + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) >= 1 + 3
    time.sleep(0.2)
    assert len(started) <= 1 + 3 + 2  # what the threads hold beside the buffer


def test_batch_larger_than_the_dataset(dataset, processor):
    n = len(dataset)
    batch = next(Loader(dataset, processor, 2 * n + 1, SEED))
    assert np.bincount(batch["index"], minlength=n).min() == 2


def test_loader_refuses_foreign_states_and_bad_exact(dataset, processor):
    loader = Loader(dataset, processor, 4, SEED)
    with pytest.raises(ValueError, match="seed"):
        loader.set_state(Loader(dataset, processor, 4, SEED + 1).get_state())
    with pytest.raises(ValueError, match="batch_size=5 is not a positive multiple of the 2 processes"):
        Loader(dataset, processor, 5, SEED, process_count=2)
    with pytest.raises(ValueError, match="process_index=2"):
        Loader(dataset, processor, 4, SEED, process_index=2, process_count=2)
    with pytest.raises(IndexError):
        collate(dataset, processor, [len(dataset)])
