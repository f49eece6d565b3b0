"""The policies that come with the project: they load, listen and succeed."""

import json
import pathlib

import pytest

from z1_jax import evaluate
from z1_jax.convert import __main__ as convert

POLICIES = pathlib.Path(__file__).parents[1] / "policies"


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> pathlib.Path:
    """kitchen24-sft in our own format."""
    place = tmp_path_factory.mktemp("policies") / "kitchen24-sft"
    convert.main(["convert", str(POLICIES / "kitchen24-sft"), str(place)])
    return place


def test_the_kitchens_common_policy_succeeds_where_it_is_said_to(common, tmp_path):
    """Sixteen episodes of two tasks in which it did not fail in 256: three failures come once in a thousand runs."""
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
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "evaluation" / "checkpoint.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 16 and sum(row["success"] for row in rows) >= 14
