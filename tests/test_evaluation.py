"""The paired evaluation: the same policy gives the same outcome, interrupted or not; comparisons by hand."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import tiny_policy as tiny
from seeds import fresh_seed

from envs.base import EnvObservation, SlotsLost, episodes
from z1_jax import processes
from z1_jax.config.schema import EvalConfig, FlowConfig
from z1_jax.errors import UserError
from z1_jax.evaluation import (
    Evaluation,
    compare,
    evaluate,
    instructions,
    rate_sentence,
    sentence,
    task_lines,
    versus_sentence,
)
from z1_jax.videos import film

FIRST = 900_000_000 + fresh_seed(__name__) % 10**8
CONFIG = EvalConfig(episodes=24, first_seed=FIRST)


def run(results, config=CONFIG, flow=None, held_out=None):
    actor, params = tiny.acting(flow)
    return evaluate(
        tiny.policy(),
        tiny.pool(16),
        tiny.one_device(),
        config,
        flow or tiny.EVERY_STEP,
        results,
        title="evaluation",
        actor=actor,
        params=params,
        held_out=held_out,
    )


@functools.cache
def whole(directory):
    print(f"first seed {FIRST}")
    return run(directory / "whole.jsonl")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


def equal(a: Evaluation, b: Evaluation) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("seeds", "success", "steps", "unstable"))


def test_every_held_out_seed_once(directory):
    out = whole(directory)
    np.testing.assert_array_equal(out.seeds, np.arange(FIRST, FIRST + 24))
    assert out.success.dtype == bool and ((out.steps > 0) & (out.steps <= tiny.HORIZON)).all()
    assert (out.steps[~out.success & ~out.unstable] == tiny.HORIZON).all()
    rows = [json.loads(line) for line in (directory / "whole.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == out.seeds.tolist()
    assert [row["success"] for row in rows] == out.success.tolist()


def test_the_same_policy_twice_is_the_same(directory):
    assert equal(run(directory / "again.jsonl"), whole(directory))


def test_how_rollouts_draw_noise_has_no_part_in_it(directory):
    flow = dataclasses.replace(tiny.EVERY_STEP, sde_steps="one", last_step="ode", noise_level=1.3)
    assert equal(run(directory / "other_sampler.jsonl", flow=flow), whole(directory))


@pytest.mark.parametrize("kept", [0, 5, 16, 23])
def test_it_resumes_wherever_it_was_killed(directory, kept):
    """Some finished rows, and half a line: a wave that was written in part is played whole again, as it was."""
    expected = whole(directory)
    lines = (directory / "whole.jsonl").read_text().splitlines(keepends=True)
    path = directory / f"cut{kept}.jsonl"
    path.write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    assert equal(run(path), expected)
    assert path.read_text() == "".join(lines)


def test_what_must_stand_beside_a_figure_stands_in_each_row(directory, monkeypatch):
    """Also in those after a resume; the outcome is that of environments without a label."""
    pool = tiny.pool(16)
    monkeypatch.setattr(pool, "spec", dataclasses.replace(pool.spec, label="stand-ins"))
    path = directory / "labelled.jsonl"
    assert equal(run(path), whole(directory))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    assert equal(run(path), whole(directory)) and path.read_text() == "".join(lines)
    assert [json.loads(line).pop("assets") for line in lines] == ["stand-ins"] * 24
    assert "assets" not in (directory / "whole.jsonl").read_text()


def test_finished_results_are_read_and_nothing_runs(directory):
    expected = whole(directory)
    again = evaluate(
        tiny.policy(), None, tiny.one_device(), CONFIG, tiny.EVERY_STEP, directory / "whole.jsonl", title="evaluation"
    )
    assert equal(again, expected)


@pytest.mark.parametrize("damage", [b"\xff", b"5", b"{}", b'{"seed": 1', b'{"seed": 900000001, "steps": 3}'])
def test_damaged_results_are_one_line_and_stay(directory, damage):
    whole(directory)
    lines = (directory / "whole.jsonl").read_bytes().splitlines(keepends=True)
    path = directory / "damaged.jsonl"
    path.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[3:]]))
    before = path.read_bytes()
    with pytest.raises(UserError, match="damaged.jsonl:3 is .*: the file is damaged; mend or delete that line") as told:
        run(path)
    assert "\n" not in str(told.value) and path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"success": 2},
        {"success": "false"},
        {"success": None},
        {"steps": -5},
        {"steps": 2.5},
        {"steps": 10**30},
        {"unstable": "no"},
    ],
)
def test_edited_results_are_not_counted(directory, change):
    whole(directory)
    rows = [json.loads(line) for line in (directory / "whole.jsonl").read_text().splitlines()]
    path = directory / "edited.jsonl"
    path.write_text(
        "".join(json.dumps(row | (change if number == 2 else {})) + "\n" for number, row in enumerate(rows))
    )
    with pytest.raises(UserError, match="edited.jsonl:3 has success=.*: the file was edited"):
        run(path)


def test_results_of_other_seeds_are_refused(directory):
    whole(directory)
    other = EvalConfig(episodes=24, first_seed=FIRST + 1)
    before = (directory / "whole.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds other episodes"):
        run(directory / "whole.jsonl", other)
    assert (directory / "whole.jsonl").read_bytes() == before


def test_films_show_the_evaluations_own_episodes(directory):
    """Compared with an evaluation of the same waves: in others rounding may tip a pixel, and with it an outcome."""
    order = np.argsort(~whole(directory).success, kind="stable")[:3]  # successes first: these end early
    actor, params = tiny.acting()
    shown = episodes(whole(directory).seeds[order])
    expected = run(directory / "shown.jsonl", held_out=shown)
    clips = film(tiny.policy(), tiny.pool(16), actor, params, shown, CONFIG, tiny.CAMERA, 32)
    assert [len(clip.frames) for clip in clips] == (expected.steps + 1).tolist()
    assert [clip.success for clip in clips] == expected.success.tolist()
    assert all(clip.frames.shape[1:] == (32, 32, 3) and clip.frames.dtype == np.uint8 for clip in clips)
    assert all((clip.frames[0] != clip.frames[-1]).any() for clip in clips)
    # More episodes than environments: one wave after the other.
    shown = episodes(whole(directory).seeds[:18])
    expected = run(directory / "many.jsonl", held_out=shown)
    many = film(tiny.policy(), tiny.pool(16), actor, params, shown, CONFIG, tiny.CAMERA, 16)
    assert [len(clip.frames) for clip in many] == (expected.steps + 1).tolist()
    assert [clip.success for clip in many] == expected.success.tolist()


def outcome(pattern: str) -> Evaluation:
    success = np.array([c == "x" for c in pattern])
    return Evaluation(np.arange(len(pattern)), success, np.where(success, 10, 24), np.zeros(len(pattern), bool))


def test_compare_by_hand():
    # 8 seeds: both 1, gained 5, lost 1, neither 1.  2/8 → 6/8: +50 points.
    # Exact McNemar on 6 pairs that differ, 1 against 5: 2·(C(6,0) + C(6,1))/2^6 = 14/64.
    before, after = outcome("xx......"), outcome("x.xxxxx.")
    result = compare(before, after, 0.95)
    assert (result["gained"], result["lost"]) == (5, 1)
    assert result["difference"] == pytest.approx(0.5)
    assert result["mcnemar_p"] == pytest.approx(14 / 64)
    assert result["before"]["successes"] == 2 and result["after"]["successes"] == 6
    assert result["after"]["rate"] == 0.75 and result["after"]["episodes"] == 8
    assert result["before"]["control_steps"] == 2 * 10 + 6 * 24
    # Wilson, 6 of 8, z = 1.959964: centre (p + z²/2n)/(1 + z²/n), half z/(1 + z²/n)·√(pq/n + z²/4n²)
    z, n, p = 1.959964, 8, 0.75
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    assert result["after"]["interval"] == pytest.approx([(centre - half) / scale, (centre + half) / scale], rel=1e-5)
    low, high = result["difference_interval"]
    assert -0.25 <= low <= 0.5 <= high <= 1.0 and low < high
    line = sentence("OpenDrawer", "GRPO", result, 0.95)
    assert line.startswith("GRPO raised success on OpenDrawer from 25.0 % to 75.0 % (after minus before: +50.0 points")
    assert "exact McNemar p = 0.22, 8 held-out seeds" in line and "\n" not in line


def test_unstable_episodes_are_counted_and_said(directory, tmp_path, capsys):
    """Odd seeds break in their second chunk, unless they end in the first; kept over an interruption."""
    (actor, params), path = tiny.acting(), tmp_path / "broken.jsonl"

    def measured():
        pool = tiny.breaking_pool(16)
        known = {"title": "evaluation", "actor": actor, "params": params}
        return evaluate(tiny.policy(), pool, tiny.one_device(), CONFIG, FlowConfig(), path, **known)

    out = measured()
    natural = whole(directory)
    breaks = (out.seeds % 2 == 1) & (natural.steps > 8)
    np.testing.assert_array_equal(out.unstable, breaks | natural.unstable)
    assert breaks.any() and (out.steps[breaks] == 9).all() and not out.success[out.unstable].any()
    count = int(out.unstable.sum())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["unstable"] for row in rows] == out.unstable.tolist()
    assert f"{count} unstable" in capsys.readouterr().out
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:16]))
    assert equal(measured(), out)

    summary = out.summary(0.95)
    assert summary["unstable"] == count
    assert rate_sentence("it", "T", summary, 0.95).endswith(f"; failures by unstable physics: {count}")
    both = compare(dataclasses.replace(out, unstable=np.zeros(24, bool)), out, 0.95)
    assert sentence("T", "GRPO", both, 0.95).endswith(f"; failures by unstable physics: 0 and {count}")
    assert "unstable" not in sentence("T", "GRPO", compare(outcome("x."), outcome("xx"), 0.95), 0.95)


def test_episodes_whose_environment_fails_are_failures_and_told(directory, tmp_path, capsys):
    (actor, params), path = tiny.acting(), tmp_path / "lost.jsonl"
    natural = whole(directory)
    longer = natural.seeds[natural.steps > 8]
    assert len(longer) > 2

    def measured(seeds, path=path):
        known = {"title": "evaluation", "actor": actor, "params": params}
        with tiny.failing_pool(16, frozenset(seeds.tolist())) as pool:
            return evaluate(tiny.policy(), pool, tiny.one_device(), CONFIG, tiny.EVERY_STEP, path, **known)

    out = measured(longer[[0, -1]])
    lost = np.isin(out.seeds, longer[[0, -1]])
    np.testing.assert_array_equal(out.lost, lost)
    assert not out.success[lost].any() and (out.steps[lost] == 8).all()
    np.testing.assert_array_equal(out.success[~lost], natural.success[~lost])
    np.testing.assert_array_equal(out.steps[~lost], natural.steps[~lost])
    told = capsys.readouterr().out
    assert "2 episodes lost" in told and "counts as a failure: worker 0 failed on slot" in told
    summary = out.summary(0.95)
    assert summary["lost"] == 2 and summary["episodes"] == 24 and "lost" not in natural.summary(0.95)
    assert rate_sentence("it", "T", summary, 0.95).endswith("; failures by environments that broke down: 2")

    path.write_text("".join(path.read_text().splitlines(keepends=True)[:16]))
    again = measured(longer[[0, -1]])
    assert equal(again, out) and np.array_equal(again.lost, out.lost)
    with pytest.raises(UserError, match=r"3 of \d+ episodes were lost.*ValueError: no such contact"):
        measured(longer[:3], tmp_path / "many.jsonl")


def test_what_a_run_bears_is_counted_over_all_processes(directory, tmp_path, monkeypatch):
    """Two lost episodes are borne; where another process tells of as many, they are four of 24."""
    told = processes.exchange
    monkeypatch.setattr(processes, "exchange", lambda x: 2 * told(x) if x and isinstance(x[0], str) else told(x))
    (actor, params), natural = tiny.acting(), whole(directory)
    seeds = natural.seeds[natural.steps > 8][[0, -1]]
    with (
        tiny.failing_pool(16, frozenset(seeds.tolist())) as pool,
        pytest.raises(UserError, match=r"[34] of \d+ episodes were lost"),
    ):
        known = {"title": "evaluation", "actor": actor, "params": params}
        evaluate(tiny.policy(), pool, tiny.one_device(), CONFIG, tiny.EVERY_STEP, tmp_path / "two.jsonl", **known)


class Lost:
    """A pool that loses the first of two episodes as it begins."""

    num_envs = 2

    def reset(self, slots, episodes):
        self.slots = [*slots]
        look = EnvObservation({"c": np.zeros((8, 8, 3), np.uint8)}, np.zeros(1, np.float32), "look")
        raise SlotsLost({0: "it broke"}, [None, look][: len(slots)])


def test_an_episode_that_cannot_begin_ends_nothing():
    assert instructions(Lost(), episodes([1, 2])) == ["look"]
    (clip,) = film(tiny.policy(), Lost(), None, None, episodes([1]), CONFIG, "c", 6)
    assert not clip.success and clip.frames.shape == (1, 6, 6, 3) and not clip.frames.any()


def test_results_of_before_there_was_such_a_count_are_read(directory, tmp_path):
    expected = whole(directory)
    rows = [json.loads(line) for line in (directory / "whole.jsonl").read_text().splitlines()]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "unstable"}) + "\n" for row in rows))
    assert equal(run(path), expected)


def test_equal_policies_differ_by_nothing():
    result = compare(outcome("x.x."), outcome("x.x."), 0.95)
    assert result["difference"] == 0 and result["mcnemar_p"] == 1.0
    low, high = result["difference_interval"]
    assert low == -high and high == pytest.approx(3.8415 / (4 + 3.8415), abs=1e-4)  # four pairs know little
    assert "left success" in sentence("T", "GRPO", result, 0.95)


def test_which_is_subtracted_from_which_is_said_in_words():
    result = compare(outcome("xxx."), outcome("x..."), 0.95)  # A, then B
    line = versus_sentence("run/sft/300", "run/grpo/240", "OpenDrawer", result, 0.95)
    assert line.startswith(
        "On OpenDrawer A (run/grpo/240) succeeds in 75.0 %, B (run/sft/300) in 25.0 %: B minus A is -50.0 points, 95 %"
    )


def test_the_instructions_are_those_of_the_held_out_episodes():
    told = instructions(tiny.pool(3), episodes(range(FIRST, FIRST + 4)))  # more than slots: in two waves
    assert told == list(
        dict.fromkeys(o.instruction for o in tiny.pool(16).reset(range(4), episodes(range(FIRST, FIRST + 4))))
    )


def of_tasks(patterns: dict[str, str]) -> Evaluation:
    parts = [outcome(pattern) for pattern in patterns.values()]
    tasks = tuple(task for task, pattern in patterns.items() for _ in pattern)
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("seeds", "success", "steps")}
    return Evaluation(**arrays, unstable=np.zeros(len(tasks), bool), tasks=tasks)


def test_several_tasks_by_hand():
    # A 1/4 → 3/4, B 4/4 → 2/4: in all 5/8 → 5/8; of each its own McNemar: A gains 2, B loses 2, p = 2·1/4.
    before, after = of_tasks({"A": "x...", "B": "xxxx"}), of_tasks({"A": "xxx.", "B": "xx.."})
    result = compare(before, after, 0.95)
    assert (result["before"]["rate"], result["after"]["rate"], result["difference"]) == (5 / 8, 5 / 8, 0.0)
    assert {task: part["rate"] for task, part in result["before"]["tasks"].items()} == {"A": 0.25, "B": 1.0}
    assert {task: part["difference"] for task, part in result["tasks"].items()} == {"A": 0.5, "B": -0.5}
    assert [result["tasks"][task]["mcnemar_p"] for task in "AB"] == [0.5, 0.5]
    low, high = result["difference_interval_over_tasks"]  # of two tasks drawn: both A, both B, or one of each
    assert low <= -0.5 and high >= 0.5
    assert "4 held-out seeds of each" in sentence("A and B", "GRPO", result, 0.95)
    lines = task_lines(result, 0.95)
    assert [line[: line.index(" (")] for line in lines] == ["A: 25.0 % → 75.0 %", "B: 100.0 % → 50.0 %"]
    alone = task_lines({"after": after.summary(0.95)}, 0.95)
    assert alone[0].startswith("A: 75.0 % (95 % CI ") and alone[0].endswith("4 held-out seeds)")
    assert task_lines(compare(outcome("x"), outcome("x"), 0.95), 0.95) == []
    with pytest.raises(ValueError, match="different episodes"):
        compare(before, dataclasses.replace(after, tasks=tuple("AAAABBBA")), 0.95)


def test_tasks_that_all_differ_alike_are_few_all_the_same():
    """Tango's interval of as many pairs as tasks: ±z²/(n + z²) where none differs; not the bootstrap's [0, 0]."""
    same = of_tasks({"A": "x...", "B": "xxxx", "C": "...."})
    low, high = compare(same, same, 0.95)["difference_interval_over_tasks"]
    assert low == -high and high == pytest.approx(3.8415 / (3 + 3.8415), abs=1e-4)
    low, high = compare(of_tasks({"A": "..", "B": ".."}), of_tasks({"A": "xx", "B": "xx"}), 0.95)[
        "difference_interval_over_tasks"
    ]
    assert high == 1.0 and low == pytest.approx((2 - 3.8415) / (2 + 3.8415), abs=1e-4)


def test_only_the_same_seeds_are_compared():
    moved = Evaluation(np.arange(1, 5), np.ones(4, bool), np.ones(4, int), np.zeros(4, bool))
    with pytest.raises(ValueError, match="different episodes"):
        compare(outcome("x.x."), moved, 0.95)
