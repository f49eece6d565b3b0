"""Checkpoints come back bit for bit or say in one line what is wrong; resuming falls back to the one before."""

import logging
import pathlib
import resource
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from z1_jax import sft
from z1_jax.checkpoint import CheckpointError, Checkpoints, Keep, _quiet
from z1_jax.rl import loop
from z1_jax.train_state import TrainState


def parts(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    params = {"a.kernel": rng.normal(size=(64, 96)).astype("f"), "a.bias": rng.normal(size=96).astype("f")}
    return {
        "params": params,
        "optimizer": {"mu": rng.normal(size=(64, 96)).astype("f"), "count": np.array(seed, np.int32)},
    }


def saved(directory: pathlib.Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, parts(step), {"step": step, "loader": {"position": 3 * step}})
    return checkpoints


def test_what_orbax_logs_after_a_failure_is_held_back(capsys):
    """Its threads meet the same full disk a moment later, each with pages."""
    logger = logging.getLogger("absl")
    level = logger.level
    try:
        with _quiet():
            pass
        assert logger.level == level
        with pytest.raises(OSError), _quiet():
            raise OSError("full")
        logger.error("pages")
        assert "pages" not in "".join(capsys.readouterr())
    finally:
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(level)


def like(tree: dict) -> dict:
    return {name: {key: np.zeros_like(leaf) for key, leaf in part.items()} for name, part in tree.items()}


def line(call) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(a[part][key], b[part][key]) for part in b for key in b[part])


def test_round_trip_is_bit_identical(tmp_path):
    checkpoints = saved(tmp_path / "c", 3)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert again.steps() == [3] and again.document(3) == {"step": 3, "loader": {"position": 9}}
    assert same(again.load(3, like(parts(3))), parts(3))
    assert list(again.load(3, {"params": like(parts(3))["params"]})) == ["params"]  # one part alone
    assert again.arrays(3, "params")["a.kernel"] == jax.ShapeDtypeStruct((64, 96), np.float32)


def test_the_newest_two_are_kept(tmp_path):
    assert saved(tmp_path, 1, 2, 5).steps() == [2, 5]


def test_which_checkpoints_are_kept(tmp_path, rng):
    """Against the rule written out by hand, over a restart: the last two, each tenth, and the best so far."""
    seed = int(rng.integers(2**31))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    keep = Keep(last=2, every=10, best=True)
    steps = [1, 3, 5, 8, 10, 13, 15, 20, 22, 25, 27]
    success = {step: float(rng.integers(0, 5)) / 8 for step in steps} | {1: None}  # ties, and one that is not rated
    there: list[int] = []
    for count, step in enumerate(steps):
        if count in (0, 5):
            checkpoints = Checkpoints(tmp_path, keep)
        checkpoints.save(step, {"params": {"a": np.full(3, step, np.float32)}}, {"step": step}, success=success[step])
        there.append(step)
        rated = [s for s in there if success[s] is not None]
        best = max(rated, key=lambda s: (success[s], s)) if rated else None
        there = [s for s in there if s in there[-2:] or s % 10 == 0 or s == best]
        assert checkpoints.steps() == there
        assert checkpoints.best() == (best and (best, success[best]))
    checkpoints.close()


def test_saving_twice_is_harmless(tmp_path):
    checkpoints = saved(tmp_path, 4)
    checkpoints.save(4, parts(99), {"step": 99})
    assert same(checkpoints.load(4, like(parts(4))), parts(4)) and checkpoints.document(4)["step"] == 4


def test_digest_follows_the_content(tmp_path):
    a, b = saved(tmp_path / "a", 1, 2), saved(tmp_path / "b", 1)
    assert a.digest(1, ("params",)) == b.digest(1, ("params",)) != a.digest(2, ("params",))
    assert "no part 'assets'" in line(lambda: a.digest(1, ("assets",)))


def test_what_is_not_there(tmp_path):
    checkpoints = saved(tmp_path, 2)
    assert "no checkpoint 7" in line(lambda: checkpoints.load(7, like(parts(2)))) and "[2]" in line(
        lambda: checkpoints.document(7)
    )
    assert "has no part 'assets'" in line(lambda: checkpoints.load(2, {"assets": {"x": np.zeros(1)}}))


def test_another_architecture_is_named_and_not_called_damaged(tmp_path):
    checkpoints = saved(tmp_path, 2)
    other = like(parts(2))
    other["params"]["b.kernel"] = other["params"].pop("a.kernel")
    message = line(lambda: checkpoints.load(2, other))
    assert "another architecture" in message and "b.kernel" in message and "a.kernel" in message
    for shape in ((64, 95), (65, 96), (32, 96), (96, 64), (64, 96, 1)):
        wider = like(parts(2))
        wider["params"]["a.kernel"] = np.zeros(shape, "f")
        message = line(lambda wider=wider: checkpoints.load(2, wider))
        assert "another architecture" in message and "damaged" not in message
        assert "a.kernel" in message and "(64, 96)" in message and str(shape) in message


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 0x40
    path.write_bytes(bytes(data))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"flipped": flip, "truncated": truncate, "deleted": lambda path: path.unlink()}


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_largest_file_is_one_line(tmp_path, damage):
    saved(tmp_path, 2).close()
    DAMAGES[damage](largest(tmp_path / "2"))
    checkpoints = Checkpoints(tmp_path)
    message = line(lambda: checkpoints.load(2, like(parts(2))))
    assert str(tmp_path / "2") in message and "damaged" in message and "delete that folder" in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_noticed_or_harmless(tmp_path, damage):
    """Each file of a checkpoint in turn: either all comes back as it was, or there is one line."""
    saved(tmp_path / "whole", 2).close()
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file())
    noticed = 0
    for number, name in enumerate(files):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "whole", copy)
        DAMAGES[damage](copy / name)
        try:
            checkpoints = Checkpoints(copy)
            document = checkpoints.document(2)
            loaded = checkpoints.load(2, like(parts(2)))
        except CheckpointError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert same(loaded, parts(2)) and document == {"step": 2, "loader": {"position": 6}}, name
    assert noticed > 0


def test_half_written_folders_are_no_checkpoints(tmp_path):
    saved(tmp_path, 1).close()
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-123")
    (tmp_path / "2.orbax-checkpoint-tmp-123" / "params").rename(tmp_path / "2.orbax-checkpoint-tmp-123" / "p")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, parts(2), {"step": 2})
    assert checkpoints.steps() == [1, 2] and same(checkpoints.load(2, like(parts(2))), parts(2))


def stub(tree: dict) -> types.SimpleNamespace:
    """As much of a trainer as restoring touches."""
    params, optimizer = ({k: jnp.zeros_like(v) for k, v in tree[part].items()} for part in ("params", "optimizer"))
    return types.SimpleNamespace(state=TrainState(params, {}, optimizer))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_resuming_falls_back_to_the_one_before(tmp_path, capsys, stage, damage):
    saved(tmp_path, 2, 4).close()
    DAMAGES[damage](largest(tmp_path / "4"))
    checkpoints, trainer, positions = Checkpoints(tmp_path), stub(parts(0)), []
    if stage == "sft":
        start, _ = sft._restore(checkpoints, trainer, types.SimpleNamespace(set_state=positions.append))
        assert positions == [{"position": 6}]
    else:
        start, _ = loop._restore(checkpoints, trainer)
    assert start == 2
    assert same({"params": trainer.state.trainable, "optimizer": trainer.state.opt_state}, parts(2))
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1 and "damaged" in out
    assert checkpoints.steps() == [2] and (tmp_path / "4.damaged").is_dir()  # kept for inspection, out of the way
    checkpoints.save(4, parts(4), {"step": 4})
    assert same(Checkpoints(tmp_path).load(4, like(parts(4))), parts(4))


OLD = {"rl": {"iteration": 5}, "sft": {"loader": {"position": {"next_index": 5}}}}


@pytest.mark.parametrize("age", ["new", *OLD])
def test_a_number_that_is_not_its_content_s_is_refused(tmp_path, capsys, age, monkeypatch):
    """A folder that was copied under a later number: old checkpoints hold their iteration or position alone."""
    checkpoints = Checkpoints(tmp_path)
    write = ocp.training.Checkpointer.save_checkpointables

    def as_before(orbax, step, parts, custom_metadata, metrics):
        del custom_metadata["step"]
        return write(orbax, step, parts, custom_metadata=custom_metadata)

    if age != "new":
        monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables", as_before)
    checkpoints.save(4, parts(4), {})
    checkpoints.save(5, parts(5), OLD.get(age, {}))
    checkpoints.close()
    shutil.copytree(tmp_path / "5", tmp_path / "6")
    again = Checkpoints(tmp_path)
    text = f"checkpoint {tmp_path / '6'} holds step 5: the folder was copied or renamed"
    for read in (
        lambda: again.document(6),
        lambda: again.load(6, like(parts(5))),
        lambda: again.digest(6, ("params",)),
    ):
        assert text in line(read)
    step, loaded, _ = again.load_newest(like(parts(5)))
    assert step == 5 and same(loaded, parts(5))
    assert f"warning: {text}; moved aside" in capsys.readouterr().out
    assert (tmp_path / "6.damaged").is_dir() and again.steps() == [4, 5]


def test_ctrl_c_while_a_checkpoint_is_read_comes_afterwards(tmp_path, monkeypatch, capsys):
    """Orbax's event loops would turn it into an error, and a healthy checkpoint would be called damaged."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"params": {"w": np.arange(3.0)}}, {})
    abstract, finished = {"params": {"w": np.zeros(3)}}, []
    for name in ("load_checkpointables", "checkpointables_metadata"):
        call = getattr(ocp.training.Checkpointer, name)

        def interrupted(*arguments, call=call, name=name):
            signal.raise_signal(signal.SIGINT)
            result = call(*arguments)
            finished.append(name)
            return result

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ocp.training.Checkpointer, name, interrupted)
            checkpoints.load_newest(abstract)
    assert set(finished) == {"load_checkpointables", "checkpointables_metadata"}
    step, loaded, _ = checkpoints.load_newest(abstract)
    assert step == 2 and loaded["params"]["w"].tolist() == [0, 1, 2]
    assert "damaged" not in capsys.readouterr().out and not list(tmp_path.glob("*.damaged*"))


def test_a_checkpoint_of_others_is_not_only_called_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"params": {"w": np.arange(3.0)}}, {})
    (tmp_path / "2" / "files.json").unlink()
    (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()  # openpi's have none of ours
    with pytest.raises(CheckpointError, match="none of this project's .*python -m z1_jax.convert SRC DST"):
        Checkpoints(tmp_path).document(2)


def test_with_every_checkpoint_damaged_the_stage_starts_over(tmp_path):
    saved(tmp_path, 2, 4).close()
    for step in ("2", "4"):
        truncate(largest(tmp_path / step))
    checkpoints = Checkpoints(tmp_path)
    assert loop._restore(checkpoints, stub(parts(0)))[0] == 0 and checkpoints.steps() == []


def test_the_same_step_may_be_damaged_twice(tmp_path):
    for _ in range(2):
        checkpoints = saved(tmp_path, 2)
        checkpoints.close()
        flip(largest(tmp_path / "2"))
        assert loop._restore(Checkpoints(tmp_path), stub(parts(0)))[0] == 0


def test_a_full_disk_is_told_with_its_reason_however_long_the_path(tmp_path):
    checkpoints = Checkpoints(tmp_path / ("a" * 120) / ("b" * 120))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # no file may be larger
    try:
        with pytest.raises(CheckpointError) as told:
            checkpoints.save(1, parts(1), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(told.value)
    assert str(checkpoints.directory / "1") in message and "File too large" in message and "source loc" not in message
    assert len(message) < 1000 and "\n" not in message
