"""A run that goes on counts all that was done before, or refuses in one line and touches nothing."""

import dataclasses
import json
import pathlib
import shutil

import pytest
import tiny_policy as tiny
from tiny_grpo import CONFIG, assert_same_bits, compiled, grpo, records, trainer

from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import EvalConfig, TrainConfig
from z1_jax.errors import UserError
from z1_jax.metrics import EPISODES, METRICS, MetricsWriter, read_records
from z1_jax.resuming import Counts, check_records, concluded, counted_grpo, counted_sft, goes_on_alone, own_policy
from z1_jax.rl.loop import train_grpo
from z1_jax.rl.trainer import GrpoTrainer

CUT = dataclasses.replace(CONFIG, train=TrainConfig(iterations=2, checkpoint_every=1))
EVAL = EvalConfig(episodes=4, videos=0)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Two iterations of three, with SFT's records and a checkpoint after it."""
    run_dir = tmp_path_factory.mktemp("cut")
    with MetricsWriter(run_dir) as writer:
        for step in (2, 4):
            writer.write("sft", step, {"loss": 1.0})
    sft = Checkpoints(run_dir / "checkpoints" / "sft")
    sft.save(4, tiny.policy().parts(), {**tiny.policy().document(), "records": 2})
    sft.close()
    grpo(run_dir, trainer(CUT))
    return run_dir


@pytest.fixture
def run_dir(cut, tmp_path):
    """A copy to damage."""
    shutil.copytree(cut, tmp_path / "run")
    (tmp_path / "run" / "evaluation").mkdir()
    rows = [{"seed": EVAL.first_seed + n, "success": False, "steps": 24} for n in range(4)]
    (tmp_path / "run" / "evaluation" / "before.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def document(run_dir: pathlib.Path, step: int = 2) -> dict:
    return Checkpoints(run_dir / "checkpoints" / "grpo").document(step)


def kept(path: pathlib.Path, keep) -> None:
    rows = [row for row in read_records(path) if keep(row)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(path: pathlib.Path, stage: str, step: int, **values) -> None:
    rows = [row | values if (row["stage"], row["step"]) == (stage, step) else row for row in read_records(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_checkpoint_keeps_the_counts_of_all_that_was_done(cut):
    rows = [row for row in read_records(cut / METRICS) if row["stage"] == "grpo"]
    by_hand = Counts(
        iterations=2,
        simulated_steps=sum(row["steps/simulated"] for row in rows),
        episodes=sum(row["stage"] == "grpo" for row in read_records(cut / EPISODES)),
        recent=tuple(row["success"] for row in rows),
        groups=8,
    )
    assert counted_grpo(cut, 2, document(cut)) == by_hand
    old = {key: value for key, value in document(cut).items() if key != "counts"}
    assert counted_grpo(cut, 2, old) == by_hand  # an old checkpoint's are read from the records
    more = Counts(3, by_hand.simulated_steps + 10, 48, (by_hand.recent[1], 0.5), 12, 1)
    assert by_hand.plus(10, 16, 0.5, 2, groups=4, lost=1) == more
    assert (by_hand.episodes, counted_sft(cut, 4, {"records": 2})) == (32, 2)
    config = dataclasses.replace(CUT, eval=EVAL)
    assert concluded(config, cut) == {"iterations": 2, "simulated_steps": by_hand.simulated_steps}
    with pytest.raises(UserError, match="newest checkpoint in .*grpo is 2, expected 3"):
        concluded(CONFIG, cut)


LOSSES = {
    "no metrics": (lambda run: (run / METRICS).unlink(), "metrics.jsonl holds 0 of the 2 GRPO iterations"),
    "one iteration": (
        lambda run: kept(run / METRICS, lambda row: (row["stage"], row["step"]) != ("grpo", 0)),
        "metrics.jsonl holds 1 of the 2 GRPO iterations",
    ),
    "steps": (
        lambda run: changed(run / METRICS, "grpo", 1, **{"steps/total": 438}),
        r"metrics.jsonl tells of .* simulated steps",
    ),
    "no episodes": (
        lambda run: (run / EPISODES).unlink(),
        "episodes.jsonl holds (0 of the 32|not all of the) episodes",
    ),
    "some episodes": (
        lambda run: kept(run / EPISODES, lambda row: row["step"] == 0 or row["group"] > 0),
        "episodes.jsonl holds (28 of the 32|not all of the) episodes",
    ),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_lost_records_are_refused_and_nothing_is_touched(run_dir, loss, old):
    lose, message = LOSSES[loss]
    lose(run_dir)
    before = content(run_dir)
    message = rf"{message}.* that checkpoint .*grpo/2 stands on: bring the file back, or .*--config.init=.*grpo/2$"
    with pytest.raises(UserError, match=message) as caught:
        if old:
            counted_grpo(run_dir, 2, {key: value for key, value in document(run_dir).items() if key != "counts"})
        else:
            check_records(run_dir)
    assert "\n" not in str(caught.value) and content(run_dir) == before
    if not old:
        with pytest.raises(UserError, match="stands on"):
            grpo(run_dir, trainer())


def test_lost_records_of_sft_are_refused(run_dir):
    check_records(run_dir)
    kept(run_dir / METRICS, lambda row: (row["stage"], row["step"]) != ("sft", 4))
    with pytest.raises(UserError, match=r"metrics.jsonl holds 1 of the 2 SFT records .*sft/4 stands on"):
        check_records(run_dir)


def alone_config(**changes):
    config = dataclasses.replace(CONFIG, eval=EVAL)
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, steps=4))
    return dataclasses.replace(config, **changes)


def damage(run_dir: pathlib.Path) -> None:
    path = max((run_dir / "checkpoints" / "sft" / "4" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("gone", ["damaged", "removed"])
def test_rl_goes_on_without_the_policy_before_it(run_dir, tmp_path, capsys, gone):
    """It ends with the bits and the records of a run that was left alone."""
    config = alone_config()
    assert not goes_on_alone(config, run_dir)
    damage(run_dir) if gone == "damaged" else shutil.rmtree(run_dir / "checkpoints" / "sft")
    before = content(run_dir)
    assert goes_on_alone(config, run_dir) and content(run_dir) == before
    said = capsys.readouterr().out
    assert said.startswith("warning: checkpoint") and "continues from its own checkpoint" in said
    made = GrpoTrainer(own_policy(run_dir, tiny.one_device()), config, tiny.one_device(), 16)
    made.actor, made._updater = compiled().actor, compiled()._updater
    with MetricsWriter(run_dir) as writer:
        policy = train_grpo(made, tiny.pool(16), run_dir / "checkpoints" / "grpo", writer, alone=True)
    untouched = grpo(tmp_path / "untouched", trainer(dataclasses.replace(CONFIG, eval=EVAL)))
    assert_same_bits(policy, untouched)
    assert [row for row in records(run_dir) if row["stage"] == "grpo"] == records(tmp_path / "untouched")
    assert records(run_dir, EPISODES) == records(tmp_path / "untouched", EPISODES)
    assert concluded(config, run_dir)["iterations"] == 3


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"train": TrainConfig(scope="lora")}, "train.scope=lora"),
        ({"train": TrainConfig(scope="auto")}, "train.scope=auto"),
        ({"update": dataclasses.replace(CONFIG.update, kl_coef=0.1)}, "update.kl_coef=0.1"),
        ({"eval": dataclasses.replace(EVAL, episodes=5)}, "the evaluation before RL, which is not complete,"),
        ({"eval": dataclasses.replace(EVAL, videos=1)}, "the videos before RL"),
    ],
)
def test_rl_that_needs_the_policy_before_it_is_refused(run_dir, changes, what):
    shutil.rmtree(run_dir / "checkpoints" / "sft")
    before = content(run_dir)
    with pytest.raises(UserError, match=f"sft/4 is gone, and {what} needs it, so that RL cannot continue: restore it"):
        goes_on_alone(alone_config(**changes), run_dir)
    assert content(run_dir) == before


def test_rl_never_begins_with_its_own_policy(run_dir, capsys):
    """Where the optimiser's state alone is damaged, the policy can be read, and RL cannot go on."""
    shutil.rmtree(run_dir / "checkpoints" / "sft")
    for step in (1, 2):
        folder = run_dir / "checkpoints" / "grpo" / str(step)
        (folder / "files.json").unlink()
        # Every file: where an iteration has updated nothing, the state is zeros, which the largest need not hold.
        for data in filter(pathlib.Path.is_file, (folder / "optimizer").rglob("*")):
            flipped = bytearray(data.read_bytes())
            flipped[len(flipped) // 2] ^= 0x40
            data.write_bytes(flipped)
    made = GrpoTrainer(own_policy(run_dir, tiny.one_device()), CONFIG, tiny.one_device(), 16)
    before = [(run_dir / name).read_bytes() for name in (METRICS, EPISODES)]
    with MetricsWriter(run_dir) as writer, pytest.raises(UserError, match="no checkpoint in .* can be read, and"):
        train_grpo(made, tiny.pool(16), run_dir / "checkpoints" / "grpo", writer, alone=True)
    assert [(run_dir / name).read_bytes() for name in (METRICS, EPISODES)] == before
    shutil.rmtree(run_dir / "checkpoints" / "grpo")
    assert not goes_on_alone(alone_config(), run_dir)  # nothing is left of either: both are trained
