"""A study: its runs, what is refused, its tables by hand, and a whole one that is stopped and goes on."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from seeds import fresh_seed

from z1_jax.config.schema import ConfigError
from z1_jax.errors import UserError
from z1_jax.statistics import mcnemar_exact, paired_difference_interval, wilson_interval
from z1_jax.study import __main__ as program
from z1_jax.study import projection, results
from z1_jax.study.config import cells, parse_study, parsed
from z1_jax.study.table import GIVEN, Outcome, elsewhere, largest_fall, means, rows, training_noise
from z1_jax.study.text import markdown, page
from z1_jax.suites import settled, with_tasks

ROOT = pathlib.Path(__file__).parents[1]


def study(*arguments: str, preset: str = "smoke"):
    return parse_study(["study", f"--config={ROOT / 'configs' / 'study.py'}:{preset}", *arguments])


def test_the_runs_of_a_study(tmp_path):
    made = cells(study(f"--config.folder={tmp_path}", "--config.seeds=3,5", "--joint.group.count=4"))
    assert [cell.name for cell in made] == [
        "sft-seed3", "specialists-OpenDrawer-seed3", "specialists-CloseDrawer-seed3", "joint-seed3",
        "sft-seed5", "specialists-OpenDrawer-seed5", "specialists-CloseDrawer-seed5", "joint-seed5",
    ]  # fmt: skip
    special, joint = made[1], made[3]
    assert special.needs == joint.needs == "sft-seed3" and f"--config.init={tmp_path / 'sft-seed3'}" in special.argv
    assert "--config.task=OpenDrawer" in special.argv and "--config.tasks=drawers" in joint.argv
    assert "--config.group.count=4" in joint.argv and "--config.group.count=2" in special.argv
    assert "--config.eval.episodes=16" in special.argv and "--config.eval.episodes=16" in made[0].argv


def test_the_kitchens_study_has_24_tasks_and_twelve_of_them_three_seeds():
    made = cells(study(preset="kitchen24"))
    trained = [cell for cell in made if not cell.evaluation]
    assert [cell.kind for cell in trained if cell.seed == 0] == ["sft", *["specialists"] * 24, "joint"]
    again = [[cell.task for cell in trained if cell.seed == seed] for seed in (1, 2)]
    assert again[0] == again[1] and len(set(again[0])) == 13 and len(again[0]) == 14  # twelve, and twice all of them
    for cell in made:
        config = parsed(cell)
        assert config.eval.first_seed == 1_600_000_000 and config.env.executed == 4 and config.flow.temperature == 0
    assert {parsed(cell).eval.episodes for cell in trained} == {256} and parsed(made[0]).sft.steps == 24_000


def test_liberos_study_is_one_policy_for_ten_tasks_or_a_line_that_says_what_to_install(tmp_path):
    made = cells(study(preset="libero"))
    assert [cell.kind for cell in made] == ["sft", "joint"]
    joint = parsed(made[1])
    assert len(with_tasks(joint).every_task) == 10 and joint.group.spread == "adaptive" and joint.env.executed == 5
    assert {one.kind for one in cells(study("--config.forms=specialists", preset="libero"))} == {"sft", "specialists"}
    if importlib.util.find_spec("libero") is None:
        with pytest.raises(ConfigError, match="is not installed: pip install 'z1-jax.libero.'"):
            program.main(
                ["study", f"--config={ROOT / 'configs' / 'study.py'}:libero", f"--config.folder={tmp_path / 'study'}"]
            )
        assert not (tmp_path / "study").exists()


def test_further_evaluations_are_runs_of_their_own(tmp_path):
    given = ["--extras.high.env.layouts=high", "--extras.swap.tasks=CloseDrawer", "--extras.swap.eval.words=left:right"]
    made = cells(study(f"--config.folder={tmp_path}", "--grpo.env.workers=0", *given))
    assert [cell.name for cell in made[4:]] == [
        "high-sft-seed0", "high-specialists-OpenDrawer-seed0", "high-specialists-CloseDrawer-seed0", "high-joint-seed0",
        "swap-sft-seed0", "swap-specialists-CloseDrawer-seed0", "swap-joint-seed0",
    ]  # fmt: skip
    special, swapped = made[5], made[-1]
    assert special.needs == "specialists-OpenDrawer-seed0" and swapped.needs == "joint-seed0"
    assert f"--config.checkpoint={tmp_path / 'joint-seed0'}" in swapped.argv
    config = parsed(special)
    assert (config.algorithm, config.env.layouts, config.env.workers) == ("eval", ("high",), 0)
    assert config.eval.episodes == 16 and parsed(swapped).eval.told == {"left": "right"}
    assert settled(parsed(swapped)).every_task == ("CloseDrawer",)
    assert program._command(swapped)[:3] == [sys.executable, "-m", "z1_jax.evaluate"]
    chosen = cells(study("--config.extras=swap", *given))
    assert {cell.evaluation for cell in chosen} == {"", "swap"}
    assert len(cells(study("--config.extras=", *given))) == 4


def test_keys_that_a_given_policy_makes_void_are_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import ml_collections\n\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'tasks': ('drawers',), 'sft': {'sft__steps': 3}})\n"
    )
    parse_study(["study", f"--config={tmp_path / 'mine.py'}", "--config.start=x"])
    assert capsys.readouterr().out == "start=x: no SFT is made; not used of the config: sft.sft.steps\n"


def test_a_given_policy_is_evaluated_once_and_is_the_start_of_all_seeds(tmp_path):
    given = [f"--config.folder={tmp_path}", "--config.start=checkpoints/mine", "--config.seeds=3,5"]
    planned = cells(study(*given, "--extras.high.env.layouts=high", "--every.env.executed=4"))
    assert [cell.name for cell in planned] == [
        "sft-seed3", "specialists-OpenDrawer-seed3", "specialists-CloseDrawer-seed3", "joint-seed3", "high-sft-seed3",
        "high-specialists-OpenDrawer-seed3", "high-specialists-CloseDrawer-seed3", "high-joint-seed3",
        "specialists-OpenDrawer-seed5", "specialists-CloseDrawer-seed5", "joint-seed5",
        "high-specialists-OpenDrawer-seed5", "high-specialists-CloseDrawer-seed5", "high-joint-seed5",
    ]  # fmt: skip
    start, further = planned[0], planned[4]
    assert program._command(start)[:3] == [sys.executable, "-m", "z1_jax.evaluate"]
    for cell in (start, further):
        assert parsed(cell).checkpoint == "checkpoints/mine" and parsed(cell).env.executed == 4
    for cell in planned:
        if cell.kind != "sft" and not cell.evaluation:
            assert parsed(cell).init == "checkpoints/mine" and cell.needs == start.name
    a_run(tmp_path, start.name, "", {"OpenDrawer": "x...", "CloseDrawer": "xx.."}, evaluation=True)
    both = [{"success": 1, "tasks/OpenDrawer/success": 0.75, "tasks/CloseDrawer/success": 0.5}] * 10
    for seed, won in ((3, "xx.."), (5, "xxxx")):
        a_run(tmp_path, f"joint-seed{seed}", "grpo", {"OpenDrawer": won, "CloseDrawer": won}, training=both)
    told = results.collected(tmp_path, planned)
    assert told["means"] == {"sft": 0.375, "joint": 0.75}
    # It is one policy: its rates are counted once, whatever the number of seeds that RL has.
    assert [policy[:2] for policy in told["policies"] if policy[0] == "sft"] == [["sft", GIVEN]] * 2
    start = means(results.outcomes_of(told), 0.95)[0]
    assert start.matrix == (2, 1) and start.interquartile_interval is None
    # Each seed's policy is held against the one start.
    found = {row.task: row for row in rows(results.outcomes_of(told), 0.95) if row.form == "joint"}
    assert [(row.before, row.after, row.seeds) for row in found.values()] == [(0.25, 0.75, 2), (0.5, 0.75, 2)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--config.start=x", "--sft.sft.steps=3"], "--sft.sft.steps=3: with --config.start=x no SFT is made"),
        (["--config.start=x", "--config.sft_preset=smoke"], "--config.sft_preset=smoke: with --config.start=x no SFT"),
        (["--config.seeds=x"], "config key seeds: got 'x', expected whole numbers"),
        (["--config.seeds=1,1"], "config key seeds: got 1, 1, expected each once"),
        (["--config.forms=solo"], "config key forms: got 'solo', expected one or more of specialists, joint"),
        (["--config.tasks="], "config key tasks: got nothing"),
        (["--config.tasks=OpenDrawer"], "config key tasks: got OpenDrawer, expected two tasks or more"),
        (["--config.tasks=drawers,OpenDrawer"], "sft: config key tasks: OpenDrawer is there twice"),
        (["--config.tasks=robocasa24"], "sft: config key tasks: robocasa24 is a set of env.suite=robocasa"),
        (["--config.foldr=x"], "config key foldr does not exist; did you mean folder"),
        (["--joint.group.cuont=3"], "joint: config key group.cuont does not exist; did you mean group.count"),
        (["--grpo.seed=3"], "grpo.seed: the study sets seed of each run itself"),
        (["--specialists.group.spread=adaptive"], "specialists: config key group.spread: .*no effect on one task"),
        (["--joint.eval.episodes=8"], r"joint.eval.episodes: all runs are evaluated alike; give it as --every.eval"),
        *(([f"--{one}.init=x"], f"{one}.init: the study sets init of each run") for one in ("every", "joint")),
        (["--grpo.init=x"], "grpo.init: RL starts from the study's common SFT"),
        (["--config.repeated=TurnOnStove"], "config key repeated: TurnOnStove is no task of the study"),
        (["--config.extras=a"], "config key extras: 'a' does not exist; known: none"),
        (["--extras.a.seed=3"], "extras.a.seed: the study sets seed of each run itself"),
        (["--extras.joint.env.layouts=high"], "extras.joint: expected a name of letters, digits and underscores"),
        (["--extras.a.tasks=TurnOnStove"], "config key extras.a.tasks: TurnOnStove is no task of the study"),
        (["--extras.a.env.layouts=attic"], "a: config key env.layouts: 'attic' does not exist; known: straight"),
        (["--extras.a.group.size=4"], "a: config key group.size: it has no effect, algorithm=eval"),
        (["--solo.seed=3"], "argument '--solo.seed=3' is not understood, expected --config.key=value, --every.key"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, text):
    with pytest.raises(ConfigError, match=text) as error:
        cells(study(*arguments))
    assert "\n" not in str(error.value)


def test_runs_that_evaluate_otherwise_are_refused_and_numbers_are_texts(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    grpo = {'eval__film_seeds': (900000001, 900000002)}\n"
        "    return ml_collections.ConfigDict(\n"
        "        {'tasks': ('drawers',), 'grpo_preset': 'smoke', 'seeds': ('01',), 'grpo': grpo})\n"
    )
    asked = parse_study(["study", f"--config={file}"])
    assert asked.overrides["grpo"] == {"eval.film_seeds": "900000001,900000002"} and asked.seeds == ("1",)
    with pytest.raises(ConfigError, match="specialists: eval.episodes is 64, that of sft 256: .*--every.eval.episodes"):
        cells(asked)


def test_a_report_of_nothing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no run of this study is finished in .*wrong"):
        program.main(["study", "--config=configs/study.py:smoke", f"--config.folder={tmp_path / 'wrong'}", "--report"])
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "A"}', '{"wall_seconds": {}}'])
def test_a_damaged_summary_is_one_line(text, tmp_path):
    cell = cells(study())[0]
    (tmp_path / cell.name).mkdir()
    (tmp_path / cell.name / "summary.json").write_text(text)
    with pytest.raises(UserError, match="summary.json"):
        results.summary_of(tmp_path, cell)


def test_a_folder_of_another_study_is_refused(tmp_path):
    program._claim(study(), tmp_path / "a")
    program._claim(study(), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"belongs to another study \(seeds is \['0'\], asked for \['1'\]\)"):
        program._claim(study("--config.seeds=1"), tmp_path / "a")
    older = json.loads((tmp_path / "a" / "study.json").read_text())
    del older["repeated"], older["eval_preset"]  # of before there were such keys
    (tmp_path / "a" / "study.json").write_text(json.dumps(older))
    program._claim(study("--extras.a.env.layouts=high"), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"repeated is \[\], asked for \['OpenDrawer'\]"):
        program._claim(study("--config.repeated=OpenDrawer"), tmp_path / "a")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "study.json.tmp").touch()  # as it began
    program._claim(study(), tmp_path / "killed")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        program._claim(study(), tmp_path / "b")


def test_a_run_that_was_made_by_itself_is_taken_and_another_is_refused(tmp_path):
    asked = study(f"--config.folder={tmp_path}")
    planned = cells(asked)
    run = tmp_path / planned[0].name
    run.mkdir()
    config = settled(parsed(planned[0]))
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    program._claim(asked, tmp_path, planned)
    program.check_runs(tmp_path, planned)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(config, run_dir="/elsewhere"))))
    program.check_runs(tmp_path, planned)
    longer = dataclasses.replace(config, sft=dataclasses.replace(config.sft, steps=41))
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(longer)))
    with pytest.raises(ConfigError, match=r"sft-seed0 was made with sft.steps=41, the study has 40: move it away"):
        program.check_runs(tmp_path, planned)


def outcome(form: str, task: str, pattern: str, seed: int = 0, evaluation: str = "") -> Outcome:
    return Outcome(form, task, seed, tuple(range(len(pattern))), np.array([c == "x" for c in pattern]), evaluation)


def test_tables_by_hand():
    # A: 2/8 → 8/8, gains 6, loses none: p = 2/64. B: 8/8 → 8/8: p = 1. Holm of two: 2·2/64 and 1.
    found = [
        outcome("sft", "A", "xx......"), outcome("sft", "B", "xxxxxxxx"),
        outcome("specialists", "A", "xxxxxxxx"), outcome("specialists", "B", "xxxxxxxx"),
        outcome("joint", "A", "xxxx...."),
    ]  # fmt: skip
    each = {(row.task, row.form): row for row in rows(found, 0.95)}
    assert (each["A", "specialists"].before, each["A", "specialists"].after) == (0.25, 1.0)
    assert each["A", "specialists"].p_value == pytest.approx(4 / 64) and each["B", "specialists"].p_value == 1.0
    over = means(found, 0.95)
    assert [(mean.form, mean.rate) for mean in over] == [("sft", 0.625), ("specialists", 1.0)]  # joint lacks a task
    assert over[1].difference == 0.375
    assert over[1].difference_interval == (0.0, 0.75)  # two tasks drawn: both B, or both A
    text = markdown(found, over, list(each.values()), [], 0.95)
    # Two of two tasks: Wilson's interval of them. With one training seed the interquartile mean has none.
    assert "| specialists | 100.0 [34.2, 100.0] | +37.5 [+0.0, +75.0] | 100.0 | 2 tasks, 1 training seed |" in text
    assert "specialists: training success falls by more than 10 points on none; intervals and p hold the noise" in text
    low, high = each["B", "specialists"].interval  # eight equal pairs: Tango's ±z²/(8 + z²)
    assert low == -high and high == pytest.approx(3.8415 / (8 + 3.8415), abs=1e-4)
    assert "| A | specialists | 1 | 25.0 | 100.0 | +75.0 [" in text and "| 0.062 | – | – |" in text
    assert page(text, "two").count("<table>") == 2 and "<h2>Each task</h2>" in page(text, "two")


def test_the_kitchens_page_shows_what_its_file_holds():
    """Each task's rates and difference on docs/kitchen-24.md, made again from the episodes."""
    stored = results.read(ROOT / "docs" / "results" / "kitchen_study.json")
    found = results.outcomes_of(stored)
    page = (ROOT / "docs" / "kitchen-24.md").read_text()
    usual = {one.task: one.success for one in found if one.form == "sft" and not one.evaluation}
    assert len(usual) == 24 and all(len(success) == 256 for success in usual.values())
    assert stored["means"]["sft"] == pytest.approx(np.mean([success.mean() for success in usual.values()]))
    for row in rows(found, results.CONFIDENCE):
        ends = [100 * value for value in (row.after - row.before, *row.interval)]
        told = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends)
        assert f"| {row.task} | {100 * row.before:.1f} | {100 * row.after:.1f} | {told} |" in page


def test_training_noise_is_in_the_intervals():
    """Three training seeds that end at 0, 1/2 and 1, of two tasks alike: a deviation of 1/2 with 2 × 2 freedoms."""
    found = [outcome("sft", task, "........", seed) for task in "AB" for seed in range(3)]
    found += [outcome("joint", task, p * 8, seed) for task in "AB" for seed, p in enumerate(".x")]
    found += [outcome("joint", task, "xxxx....", 2) for task in "AB"]
    row = rows(found, 0.95)[0]
    before, after = np.zeros(24, bool), np.concatenate([one.success for one in found[6:] if one.task == "A"])
    low, high = paired_difference_interval(before, after, 0, 0.95)
    wide = 2.7764 * 0.5 / np.sqrt(3)  # Student's t
    expected = (0.5 - np.hypot(0.5 - low, wide), min(1.0, 0.5 + np.hypot(high - 0.5, wide)))
    assert row.interval == pytest.approx(expected, abs=1e-4) and row.after == 0.5
    assert row.seeds == 3 and row.deviation == 0.5  # of 0, 1 and 1/2, n − 1
    assert "nan" not in markdown(found, means(found, 0.95), [row], [], 0.95)
    assert means(found, 0.95)[0].interquartile_interval == (0.0, 0.0)  # of three training seeds that all fail
    with pytest.raises(ValueError, match="on different seeds"):
        rows([*found[:6], Outcome("joint", "A", 0, tuple(range(1, 9)), np.ones(8, bool))], 0.95)


def test_intervals_of_few_seeds_hold_the_truth():
    """Six tasks of three training seeds whose true gains deviate by 10 points: nine intervals of ten, at least."""
    rng, held = np.random.default_rng(fresh_seed(__name__, "test_intervals_of_few_seeds_hold_the_truth")), []
    for _ in range(30):
        found = []
        for task, seed in itertools.product("ABCDEF", range(3)):
            gain = 0.2 + rng.normal(0, 0.1)
            found.append(Outcome("sft", task, seed, tuple(range(128)), rng.random(128) < 0.4))
            found.append(Outcome("joint", task, seed, tuple(range(128)), rng.random(128) < 0.4 + gain))
        held += [row.interval[0] <= 0.2 <= row.interval[1] for row in rows(found, 0.95)]
    assert np.mean(held) > 0.9


def test_p_values_know_training_noise():
    """Training that gains nothing in the mean, and deviates by 10 points: seldom a task of six is significant."""
    rng, wrong, naive = np.random.default_rng(fresh_seed(__name__, "test_p_values_know_training_noise")), [], []
    for _ in range(60):
        found = []
        for task, seed in itertools.product("ABCDEF", range(3)):
            found.append(Outcome("sft", task, seed, tuple(range(128)), rng.random(128) < 0.5))
            found.append(Outcome("joint", task, seed, tuple(range(128)), rng.random(128) < 0.5 + rng.normal(0, 0.1)))
        wrong.append(min(row.p_value for row in rows(found, 0.95)) < 0.05)
        one = [rows([each for each in found if (each.task, each.seed) == (task, 0)], 0.95)[0] for task in "ABCDEF"]
        naive.append(6 * min(row.p_value for row in one) < 0.05)
    assert np.mean(wrong) < 0.2 < np.mean(naive)


def test_a_p_value_is_the_level_at_which_the_interval_ends_at_nothing():
    rng = np.random.default_rng(fresh_seed(__name__, "test_a_p_value_is_the_level"))
    found = []
    for seed, gain in enumerate((0.05, 0.1, 0.15)):
        found.append(Outcome("sft", "A", seed, tuple(range(4000)), rng.random(4000) < 0.4))
        found.append(Outcome("joint", "A", seed, tuple(range(4000)), rng.random(4000) < 0.4 + gain))
    (row,) = rows(found, 0.95)
    low, _ = rows(found, 1 - row.p_value)[0].interval
    assert 0.001 < row.p_value < 0.7 and low == pytest.approx(0, abs=0.003)
    (alone,) = rows([one for one in found if one.seed == 1], 0.95)  # of one training seed: McNemar's
    assert alone.p_value == mcnemar_exact(found[2].success, found[3].success) < 1e-3


def test_no_interval_is_without_width():
    """Every draw of tasks is alike where all have one rate: then episodes are counted."""
    found = [outcome("sft", task, "xx......") for task in "AB"] + [outcome("joint", task, "xxxx....") for task in "AB"]
    start, joint = means(found, 0.95)
    assert start.interval == wilson_interval(4, 16, 0.95) and joint.interval == wilson_interval(8, 16, 0.95)
    low, high = joint.difference_interval
    assert low == pytest.approx(0.25 - 1.96 * np.sqrt(0.1875 / 16), abs=1e-3) and high == pytest.approx(0.5 - low)
    all_won = Outcome("sft", "A", 0, (100, 101, 102, 103), np.ones(4, bool), "far")  # on other episodes
    (far,) = elsewhere([found[0], all_won], 0.95)
    assert far.change == 0.75 and far.change_interval[0] < 0.5 and far.change_interval[1] == 1.0


def test_one_seed_borrows_the_training_noise_of_others():
    """B's gains over three seeds are 3/8, 1/2 and 5/8; A has one seed, where 2 of 8 are gained and none is lost."""
    found = [outcome("sft", "B", "........", seed) for seed in range(3)] + [outcome("sft", "A", "........")]
    found += [outcome("joint", "B", pattern, seed) for seed, pattern in enumerate(("xxx.....", "xxxx....", "xxxxx..."))]
    found.append(outcome("joint", "A", "xx......"))
    assert training_noise([[0.0, 0.5, 1.0], [0.25]]) == 0.5  # deviation of three, n − 1
    assert training_noise([[0.0, 0.5, 1.0], [0.2, 0.2], [0.7]]) == pytest.approx(np.sqrt(2 * 0.25 / 3))
    assert training_noise([[0.1], [0.2]]) is None
    a = next(row for row in rows(found, 0.95) if row.task == "A")
    alone = rows([one for one in found if one.task == "A"], 0.95)[0]
    wide = 4.3027 * 0.125  # Student's t with two freedoms, times the deviation
    low, high = (0.25 - np.hypot(0.25 - alone.interval[0], wide), 0.25 + np.hypot(alone.interval[1] - 0.25, wide))
    assert a.interval == pytest.approx((low, min(1.0, high)), abs=1e-3) and low < alone.interval[0]
    text = markdown(found, means(found, 0.95), rows(found, 0.95), [], 0.95)
    assert "joint: on 0 of 1 task the end deviates by at most 5 points;" in text
    assert "intervals and p of tasks are widened by the deviation over training seeds that these show together" in text
    over = means(found, 0.95)[1]
    assert over.rate == (0.25 + 0.5) / 2 and over.matrix == (1, 3) and over.interquartile == 0.5


def test_the_mean_over_tasks_with_unequal_seeds_is_the_enumerated_bootstrap():
    """A has one training seed, B two: every draw of tasks, and of B's seeds in each of its places."""
    found = [outcome("sft", "A", "xx......"), outcome("sft", "B", "xxxx...."), outcome("sft", "B", "xxxxxxxx", 1)]
    draws = collections.Counter()
    of_b = [(one + other) / 2 for one, other in itertools.product((0.5, 1.0), repeat=2)]
    for first, second in itertools.product("AB", repeat=2):
        for one, other in itertools.product(of_b, repeat=2):
            draws[((0.25 if first == "A" else one) + (0.25 if second == "A" else other)) / 2] += 1
    values = np.sort(np.repeat(list(draws), list(draws.values())))
    mean = means(found, 0.5)[0]
    assert mean.rate == (0.25 + 0.75) / 2
    for end, share in zip(mean.interval, (0.25, 0.75), strict=True):
        assert np.mean(values < end) <= share + 0.02 and np.mean(values <= end) >= share - 0.02


def test_a_fall_is_from_where_training_started():
    assert largest_fall([0.5] * 9) is None
    assert largest_fall([0.2] * 10 + [0.9] * 10 + [0.3] * 10) == 0  # from its best it falls by 0.6
    assert largest_fall([0.5] * 10 + [0.0] * 5 + [1.0] * 9) == pytest.approx(0.25)
    dip = [0.5] * 10 + [0.0] * 10 + [0.5] * 140
    assert largest_fall(dip, [8] * 160) == pytest.approx(0.5)
    assert largest_fall(dip, [1] * 160) == pytest.approx(0)  # ten scenes of one group each
    assert largest_fall([1.0] * 80 + [0.5] * 80, [1] * 160) == pytest.approx(0.5)
    assert largest_fall(dip[:79], [1] * 79) is None


def test_only_a_given_start_stands_for_other_training_seeds():
    """Of a study that is under way, the start's further evaluation may be there for one training seed alone."""
    found = [
        outcome("sft", "A", "xx.."), outcome("sft", "A", "....", 1), outcome("joint", "A", "xxx.", 1),
        outcome("sft", "A", ".x..", evaluation="high"), outcome("joint", "A", ".x.x", 1, evaluation="high"),
    ]  # fmt: skip
    assert [one.gain for one in elsewhere(found, 0.95) if one.form == "joint"] == [None]
    assert rows([found[0], found[2]], 0.95) == [] and [row.before for row in rows(found, 0.95)] == [0.0]
    of_one = [dataclasses.replace(one, seed=GIVEN) if one.form == "sft" else one for one in (found[0], *found[2:])]
    assert [one.gain for one in elsewhere(of_one, 0.95) if one.form == "joint"] == [0.25]
    assert [row.before for row in rows(of_one, 0.95)] == [0.5]


def test_other_evaluations_by_hand():
    """A: of x x . . the usual, there . x . x; B all succeed in both. The start fails there in B."""
    found = [
        outcome("sft", "A", "xx.."), outcome("sft", "B", "...."),
        outcome("joint", "A", "xx.."), outcome("joint", "B", "xxxx"),
        outcome("sft", "A", ".x..", evaluation="high"), outcome("sft", "B", "....", evaluation="high"),
        outcome("joint", "A", ".x.x", evaluation="high"), outcome("joint", "B", "xx", evaluation="high"),
        outcome("joint", "B", "...x", evaluation="swap"),
    ]  # fmt: skip
    found[7] = dataclasses.replace(found[7], episodes=(0, 1))
    found[5] = dataclasses.replace(found[5], episodes=(0, 1), success=found[5].success[:2])
    assert means(found[4:], 0.95) == [] and elsewhere(found[4:], 0.95) == []
    assert len(means(found, 0.95)) == 2 and means(found, 0.95)[1].rate == 0.75  # of the runs' own evaluation
    others = {(one.evaluation, one.form, one.task): one for one in elsewhere(found, 0.95)}
    assert set(others) == {
        ("high", "sft", ""), ("high", "sft", "A"), ("high", "sft", "B"),
        ("high", "joint", ""), ("high", "joint", "A"), ("high", "joint", "B"), ("swap", "joint", "B"),
    }  # fmt: skip
    mean = others["high", "joint", ""]
    assert (mean.usual, mean.rate, mean.change, mean.gain) == (0.75, 0.75, 0.0, (0.25 + 1.0) / 2)
    assert others["high", "sft", ""].gain is None and others["high", "joint", "A"].gain == 0.25
    swap = others["swap", "joint", "B"]
    assert (swap.usual, swap.rate, swap.change, swap.gain) == (1.0, 0.25, -0.75, None)
    text = markdown(found, means(found, 0.95), rows(found, 0.95), list(others.values()), 0.95)
    assert "### Elsewhere\n" in text and "| high | mean | joint | 75.0 | 75.0 [" in text
    assert text.index("| swap | B | joint | 100.0 | 25.0 [") < text.index("### Elsewhere, each task")
    assert "| high | B | sft | 0.0 | 0.0 [" in text[text.index("### Elsewhere, each task") :]
    # A change between other episodes is one of rates.
    moved = [*found[:8], Outcome("joint", "A", 0, (7, 8), np.ones(2, bool), "later")]
    assert next(one for one in elsewhere(moved, 0.95) if one.evaluation == "later").change == 0.5


def a_run(folder, name, stage, patterns, *, task=None, training=(), evaluation=False, seconds=60.0):
    """A run directory as a study reads it."""
    run = folder / name
    (run / "evaluation").mkdir(parents=True)
    lines = [
        json.dumps({"seed": 900 + number, "task": of, "success": mark == "x", "steps": 3})
        for of, pattern in patterns.items()
        for number, mark in enumerate(pattern)
    ]
    (run / "evaluation" / f"{'checkpoint' if evaluation else 'after'}.jsonl").write_text("\n".join(lines) + "\n")
    records = [json.dumps({"stage": stage, "step": step, **row}) for step, row in enumerate(training)]
    (run / "metrics.jsonl").write_text("\n".join([*records, ""]))
    told = {"task": task or list(patterns), "wall_seconds": {"all": seconds}, "simulated_steps": 1000}
    (run / "summary.json").write_text(json.dumps(told))


def test_finished_runs_become_a_file_and_the_file_the_tables(tmp_path, capsys):
    folder = tmp_path / "study"
    planned = cells(study(f"--config.folder={folder}", "--extras.high.env.layouts=high"))
    a_run(folder, "sft-seed0", "sft", {"OpenDrawer": "x...", "CloseDrawer": "xx.."})
    half = [{"success": 0.5}] * 10 + [{"success": 0.25}] * 10
    a_run(folder, "specialists-OpenDrawer-seed0", "grpo", {"OpenDrawer": "xxx."}, task="OpenDrawer", training=half)
    both = [{"success": 1, "tasks/OpenDrawer/success": 0.75, "tasks/CloseDrawer/success": 0.5}] * 10
    both += [{"success": 1, "tasks/CloseDrawer/success": 0.1}] * 10
    a_run(folder, "joint-seed0", "grpo", {"OpenDrawer": "xx..", "CloseDrawer": "xxxx"}, training=both)
    high = {"OpenDrawer": "x", "CloseDrawer": "."}
    a_run(folder, "high-joint-seed0", "", high, evaluation=True, seconds=6.0)
    program.conclude(folder, planned)
    shown = capsys.readouterr().out
    assert "| joint | 75.0 [" in shown and "| specialists |" not in shown  # a task of theirs is not there yet
    told = json.loads((folder / "results.json").read_text())
    assert told["means"] == {"sft": 0.375, "joint": 0.75}
    assert told["columns"] == ["policy", "seed", "success"] and len(told["rows"]) == 8 + 4 + 8 + 2
    by_policy = collections.defaultdict(list)
    for policy, seed, success in told["rows"]:
        by_policy[tuple(told["policies"][policy])].append((seed, success))
    assert by_policy["joint", 0, "OpenDrawer", ""] == [(900, 1), (901, 1), (902, 0), (903, 0)]
    assert by_policy["joint", 0, "CloseDrawer", "high"] == [(900, 0)]
    assert told["runs"]["specialists-OpenDrawer-seed0"]["largest_fall"] == {"OpenDrawer": pytest.approx(0.25)}
    falls = told["runs"]["joint-seed0"]["largest_fall"]
    assert falls["OpenDrawer"] == 0 and falls["CloseDrawer"] == pytest.approx(0.4)
    assert told["simulated_steps"] == {"specialists": 1000, "joint": 1000}
    table = (folder / "table.md").read_text()
    assert "| OpenDrawer | specialists | 1 | 25.0 | 75.0 | +50.0 [" in table and "| – | 25.0 |" in table
    assert "joint: training success falls by more than 10 points on CloseDrawer;" in table
    assert "RL: specialists 1,000, joint 1,000. Hours of all runs: 0.05." in table
    program.main(["study", f"--table={folder / 'results.json'}"])
    assert capsys.readouterr().out == table
    (folder / "table.md").unlink()
    given = [f"--config={ROOT / 'configs' / 'study.py'}:smoke", f"--config.folder={folder}"]
    for cell in planned[:2]:
        (folder / cell.name / "config.json").write_text(json.dumps(dataclasses.asdict(settled(parsed(cell)))))
    for name in ("results.json", "study.html"):
        (folder / name).unlink()
    program.main(["study", *given, "--extras.high.env.layouts=high", "--report"])
    assert (folder / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda told: told.pop("rows"), "KeyError: 'rows'"),
        (lambda told: told["rows"].append([9, 1, 1]), "IndexError"),
        (lambda told: told["rows"].append([0, 1, 2]), "a row"),
        (lambda told: told.update(columns=["seed"]), "columns"),
        (lambda told: told.update(rows=[]), "no rows"),
    ],
)
def test_a_file_that_holds_no_results_is_one_line(tmp_path, change, text):
    told = {"means": {"sft": 1.0}, "runs": {}, "simulated_steps": {}, "columns": results.COLUMNS}
    told |= {"policies": [["sft", 0, "A", ""]], "rows": [[0, 5, 1]]}
    path = tmp_path / "results.json"
    results.write(path, told)
    assert results.read(path) == told and "| sft | 100.0 [" in results.tables(told)
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="holds no results of a study") as error:
        results.read(path)
    assert text in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"nowhere.json does not exist; expected"):
        results.read(tmp_path / "nowhere.json")


def test_a_whole_studys_file_is_small_enough_to_keep(tmp_path):
    """24 tasks × 256 episodes × 3 forms × 3 seeds, one row an episode: below 20 bytes each."""
    policies = [[form, seed, f"Task{task}", ""] for form in ("a", "b", "c") for seed in range(3) for task in range(24)]
    told = {"means": {}, "columns": results.COLUMNS, "policies": policies}
    told["rows"] = [[p, 1_300_000_000 + n, n % 2] for p in range(len(policies)) for n in range(256)]
    results.write(tmp_path / "results.json", told)
    assert (tmp_path / "results.json").stat().st_size < 20 * 24 * 256 * 9
    assert json.loads((tmp_path / "results.json").read_text()) == told


def test_hours_are_projected_from_counts(tmp_path):
    """By hand: drawers of 48 and 32 control steps, a look every 4: 12 and 8 looks."""
    given = ["--every.env.executed=4", "--every.eval.episodes=10", "--sft.demos.episodes=5", "--sft.sft.steps=7"]
    given += ["--extras.high.eval.episodes=3", "--specialists.train.iterations=2"]
    planned = cells(study(f"--config.folder={tmp_path}", *given, "--specialists.group.size=4"))
    by_name = {cell.name: cell for cell in planned}

    def counted(name):
        return projection.counts(with_tasks(parsed(by_name[name])), by_name[name], 8)

    assert counted("sft-seed0") == {"demonstration": 5 * 80, "sft": 7, "look": 10 * 20}
    # Two groups of 4 a run of two iterations; one evaluation, for that before RL is SFT's.
    assert counted("specialists-CloseDrawer-seed0") == {"look": 10 * 8 + 2 * 2 * 4 * 8, "update": 2 * 2 * 4 * 8}
    assert counted("high-joint-seed0") == {"look": 3 * 20}
    rates = {"demonstration": 0.5, "sft": 10.0, "look": 2.0, "executed": 4}
    assert projection.projected(by_name["sft-seed0"], rates) == 200 + 70 + 400
    assert projection.projected(by_name["joint-seed0"], rates) is None  # an update was not measured
    text = projection.told(tmp_path, planned, rates)
    assert text.startswith("8 of 8 runs left: ") and "and what is unknown" in text.splitlines()[0]
    assert (
        "  sft: 1 run, 0.19 h, counted\n  specialists: 2 × unknown\n" in text and "less where policies succeed" in text
    )
    a_run(tmp_path, "joint-seed0", "grpo", {"OpenDrawer": "x"}, seconds=7200.0)
    assert "joint" not in projection.told(tmp_path, planned, rates).replace("of joint", "")
    a_run(tmp_path, "specialists-OpenDrawer-seed0", "grpo", {"OpenDrawer": "x"}, seconds=7200.0)
    text = projection.told(tmp_path, planned, rates)
    assert "specialists: 1 run, 2.00 h, as 1 took that is finished" in text and text.startswith("6 of 8 runs left")
    assert projection.unknown(tmp_path, planned)
    assert projection.told(tmp_path, planned, {}).count("unknown") == 5  # head, sft, three further evaluations


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on(tmp_path):
    """Of two tasks, with a run that is taken away in between; a second program finds nothing to do."""
    command = [
        sys.executable, "-m", "z1_jax.study", f"--config={ROOT / 'configs' / 'study.py'}:smoke",
        f"--config.folder={tmp_path / 'study'}", "--every.eval.episodes=4", "--sft.demos.episodes=6",
        "--sft.sft.steps=10", "--every.env.workers=0", "--extras.swap.tasks=CloseDrawer",
        "--extras.swap.eval.words=left:right,right:left",
    ]  # fmt: skip
    folder = tmp_path / "study"
    ran = subprocess.run([*command, "--config.forms=joint"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
    told = json.loads((folder / "results.json").read_text())
    assert set(told["means"]) == {"sft", "joint"} and len(told["rows"]) == 2 * 2 * 4 + 2 * 4
    assert "measured in" in ran.stdout and "and what is unknown" not in ran.stdout and "counted: as if" in ran.stdout
    assert (folder / "study.html").exists() and "| joint | " in (folder / "table.md").read_text()
    before = (folder / "joint-seed0" / "summary.json").stat().st_mtime_ns
    (folder / "table.md").unlink()
    again = subprocess.run([*command, "--config.forms=joint"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and (folder / "table.md").exists() and "══" not in again.stdout
    assert (folder / "joint-seed0" / "summary.json").stat().st_mtime_ns == before
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and other.stderr.startswith("error: ") and "belongs to another study" in other.stderr
