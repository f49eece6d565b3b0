"""The policies that come with the project: they load and succeed."""

import pathlib

from z1_jax import evaluate
from z1_jax.convert import __main__ as convert
from z1_jax.metrics import read_records

POLICIES = pathlib.Path(__file__).parents[1] / "policies"


def test_the_kitchens_common_policy_succeeds_where_it_is_said_to(tmp_path):
    """Sixteen episodes of two tasks in which it did not fail in 256: three failures come once in a thousand runs."""
    common = tmp_path / "kitchen24-sft"
    convert.main(["convert", str(POLICIES / "kitchen24-sft"), str(common)])
    evaluate.main(
        [
            "evaluate",
            "--config=configs/eval.py:kitchen",
            f"--config.checkpoint={common}",
            "--config.tasks=CloseDrawer,CloseSingleDoor",
            "--config.env.executed=4",
            "--config.flow.temperature=0",
            "--config.eval.episodes=8",
            "--config.eval.videos=0",
            "--config.env.workers=0",
            f"--config.run_dir={tmp_path / 'run'}",
        ]
    )
    rows = read_records(tmp_path / "run" / "evaluation" / "checkpoint.jsonl")
    assert len(rows) == 16 and sum(row["success"] for row in rows) >= 14
