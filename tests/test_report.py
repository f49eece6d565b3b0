"""The report of a made-up run: what it says, what it leaves out, and that it needs nothing else."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from seeds import fresh_seed

from envs.video import write_video
from z1_jax.metrics import MetricsWriter
from z1_jax.report import charts, tasks
from z1_jax.report import html as page_parts
from z1_jax.report.write import write_report
from z1_jax.statistics import mcnemar_exact, paired_difference_interval, wilson_interval


def moving_square(frames: int, seed: int) -> np.ndarray:
    film = np.full((frames, 64, 64, 3), np.random.default_rng(seed).integers(60, 200, 3), np.uint8)
    for i in range(frames):
        film[i, 20:36, i : i + 16] = 255 - film[i, 0, 0]
    return film


def write_run(run_dir, seed=0, iterations=90, videos=True):
    """A plausible run; returns its summary."""
    rng = np.random.default_rng(seed)
    with MetricsWriter(run_dir) as writer:
        for step in range(0, 1200, 10):
            writer.write("sft", step, {"loss": 0.3 + 2 * np.exp(-step / 200) + 0.05 * rng.random()})
        total = 0
        for step in range(iterations):
            rate, steps = 1 / (1 + np.exp(-(step - 30) / 12)), int(rng.integers(2000, 3000))
            total += steps
            kept = int(rng.integers(1, 9))
            times = {
                f"time/{name}": rng.uniform(0.3, 1.2) for name in ("simulate", "render", "sample", "update", "idle")
            }
            writer.write(
                "grpo",
                step,
                {
                    "success": np.clip(rate + rng.normal(0, 0.06), 0, 1),
                    "groups/kept": kept,
                    "groups/all_success": 8 - kept,
                    "groups/all_fail": 0,
                    "ratio/first_update_max_error": 10 ** rng.uniform(-5.5, -4.5),
                    "ratio/mean": rng.normal(1, 0.01),
                    "ratio/max": rng.uniform(1.1, 1.6),
                    "clip_fraction": rng.uniform(0, 0.2),
                    "approx_kl": np.nan if step == 40 else rng.uniform(0, 0.01),
                    "grad_norm": rng.uniform(0.2, 1),
                    "steps/simulated": steps,
                    "steps/total": total,
                    **times,
                },
            )
    before, after = rng.random(256) < 0.34, rng.random(256) < 0.95
    summary = {
        "task": "TurnOnSinkFaucet",
        "seeds": {"train": 0, "eval": "1000000..1000255"},
        "protocol": {"sampler": "ode", "denoising_steps": 4, "episodes": 256, "early_stop": True},
        "before": row(before),
        "after": row(after),
        "difference": float(after.mean() - before.mean()),
        "difference_interval": paired_difference_interval(before, after, seed=0),
        "mcnemar_p": mcnemar_exact(before, after),
        "simulated_steps": total,
        "wall_seconds": {"collect": 34.0, "sft": 221.5, "grpo": 290.1, "evaluate": 40.0},
        "sentence": f"GRPO raised success from {before.mean():.1%} to {after.mean():.1%} on 256 held-out seeds.",
        "videos": [],
    }
    if videos:
        for k in range(3):
            for side in ("before", "after"):
                write_video(run_dir / f"videos/{side}_seed{k}.webp", moving_square(20, k), fps=20)
            pair = {"before": f"videos/before_seed{k}.webp", "after": f"videos/after_seed{k}.webp"}
            summary["videos"].append({"seed": k, **pair, "before_success": k == 1, "after_success": True})
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "config.json").write_text(json.dumps({"seed": 0, "group": {"size": 8, "kinds": ["a<b"]}, "empty": {}}))
    return summary


def row(outcomes):
    successes, n = int(outcomes.sum()), len(outcomes)
    return {"successes": successes, "episodes": n, "rate": successes / n, "interval": wilson_interval(successes, n)}


class Page(HTMLParser):
    """Collects text, links out of the page, and checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.words, self.sources, self.tags = [], [], [], []
        self.feed(text)
        assert self.stack == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "img", "link", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)


def page_of(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_whole_run_is_told(tmp_path):
    seed = fresh_seed(__name__, "test_a_whole_run_is_told")
    summary = write_run(tmp_path, seed)
    page = page_of(tmp_path)
    assert summary["sentence"] in page.text
    for side in ("before", "after"):
        low, high = summary[side]["interval"]
        assert f"{summary[side]['successes']} of 256" in page.text
        assert f"{low:.1%} – {high:.1%}" in page.text
    low, high = summary["difference_interval"]
    assert f"{100 * summary['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]" in page.text
    assert re.search(r"p = \d\.\de-\d+", page.text)
    for text in ("denoising_steps 4", "group.size 8", '["a<b"]', "3 min 42 s", f"{summary['simulated_steps']:,}"):
        assert text in page.text
    for title in ("Success of training rollouts", "SFT loss", "Clip fraction", "Groups", "Time per iteration"):
        assert title in page.text
    assert page.tags.count("img") == 6 and page.tags.count("svg") == 11
    assert "Left out" not in page.text


def test_unstable_episodes_are_shown_when_there_are_any(tmp_path):
    summary = write_run(tmp_path, iterations=3, videos=False)
    with MetricsWriter(tmp_path) as writer:
        writer.write("grpo", 3, {"success": 0.5, "unstable": 0})
        summary["before"]["unstable"] = summary["after"]["unstable"] = 0
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert "nstable" not in page_of(tmp_path).text
        writer.write("grpo", 4, {"success": 0.5, "unstable": 7})
    summary["after"]["unstable"] = 1234
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = page_of(tmp_path).text
    assert "Unstable episodes" in text and "After RL: failures by unstable physics 1,234" in text
    assert "Before RL: failures" not in text


def test_where_a_run_comes_from_stands_on_the_page(tmp_path):
    summary = write_run(tmp_path)
    summary |= {"instructions": ["turn on the sink faucet"], "ended": "2026-03-01 12:10 UTC", "repeats": "it varies"}
    summary["videos_rule"] = "The first 3 held-out seeds."
    summary["best_checkpoint"] = {"step": 230, "success": 0.975, "window": 10}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    command = "python -m z1_jax.train --config=configs/grpo.py --config.env.layouts='a 3 s'"
    rows = [
        {"began": "2026-03-01 12:00 UTC", "command": "x"},
        {"began": "2026-03-01 12:03 UTC", "command": command},
    ]
    (tmp_path / "commands.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path)
    header = page.text[: page.text.index("Result")]
    assert "TurnOnSinkFaucet: “turn on the sink faucet”" in header and command in header
    assert "begun 2026-03-01 12:00 UTC, ended 2026-03-01 12:10 UTC, 9 min 46 s in all stages, 2 starts" in header
    code = re.search("<code>(.*)</code>", (tmp_path / "report.html").read_text())[1]
    assert html.unescape(re.sub("</?span>", "", code)) == command  # to be copied: its spaces are plain
    for text in (
        "all stages 9 min 46 s",
        "Repeated: it varies.",
        "The first 3 held-out seeds.",
        "Left out",
        "Best checkpoint: grpo/230, training success 97.5 % over the 10 iterations before it.",
    ):
        assert (text in page.text) == (text != "Left out")
    (tmp_path / "commands.jsonl").write_text("rubbish\n")
    assert "No command: " in page_of(tmp_path).text


def test_a_comparison_says_which_is_subtracted(tmp_path):
    summary = write_run(tmp_path, videos=False)
    assert "After RL minus before RL, paired by seed" in page_of(tmp_path).text
    summary["labels"] = ["A: runs/one/sft/300", "B: runs/one/grpo/240"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = page_of(tmp_path).text
    assert "B minus A, paired by seed" in text and "A: runs/one/sft/300" in text


def test_numbers_and_their_units_do_not_part():
    for given, wanted in {
        "from 42.6 % to 96.1 % (+53.5 points, 95 % CI +47.3": "from 42.6_% to 96.1_% (+53.5_points, 95_%_CI +47.3",
        "exact McNemar p = 9e-38, 256 held-out seeds": "exact McNemar p_=_9e-38, 256 held-out seeds",
        "12 sofas and 3 min 2 s at 20 Hz": "12 sofas and 3_min 2_s at 20_Hz",
    }.items():
        assert page_parts.text(given) == wanted.replace("_", "\u00a0")
    assert page_parts.duration(119.7) == "2 min 0 s"


def texts_of(chart):
    """x, anchor and words of each text."""
    words = re.findall(r'<text(?: class="\w+")? x="([-\d.]+)" y="[-\d.]+"(?: text-anchor="(\w+)")?>([^<]*)', chart)
    assert len(words) == chart.count("<text")
    return [(float(x), anchor or "start", text) for x, anchor, text in words]


def test_no_label_leaves_its_chart():
    seed = fresh_seed(__name__, "test_no_label_leaves_its_chart")
    rng = np.random.default_rng(seed)
    names = ["".join(rng.choice(list("abmW/-03"), length)) for length in rng.integers(1, 120, 6)]
    made = [charts.interval_chart([(name, 0.5, (0.4, 0.6)) for name in names])]
    for scale in (1e-7, 3e-4, 1.0, 12_345.0, 8e8):
        for form in (charts.short, lambda v: f"{v:.6f} seconds", lambda v: f"{100 * v:.3g}%"):
            line, area = charts.Series("y", [0, 1999], [0, scale]), charts.Series("y", [0, 160], [0.1, scale])
            made.append(charts.line_chart([line], "iteration", form))
            made.append(charts.stacked_chart([area], "iteration", form))
    for chart in made:
        for x, anchor, text in texts_of(chart):
            width = charts.text_width(text)
            left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
            assert left >= 0 and left + width <= charts.WIDTH, (text, left, width)
    assert names[0] in made[0]  # whole in the title where it was shortened


def test_intervals_say_at_what_confidence(tmp_path):
    summary = write_run(tmp_path)
    assert "95 % (Wilson)" in page_of(tmp_path).text
    summary["protocol"]["confidence"] = 0.9
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "90 % (Wilson)" in page_of(tmp_path).text


def test_the_page_needs_nothing_else(tmp_path):
    write_run(tmp_path, iterations=3)
    page = page_of(tmp_path)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    text = (tmp_path / "report.html").read_text()
    assert "script" not in page.tags and "link" not in page.tags and "url(" not in text and "@import" not in text


def test_a_run_without_a_summary_still_has_its_curves(tmp_path):
    write_run(tmp_path, videos=False)
    (tmp_path / "summary.json").unlink()
    page = page_of(tmp_path)
    assert "no summary yet" in page.text and "summary.json is missing" in page.text and "Clip fraction" in page.text


def test_records_of_two_runs_draw_no_curve(tmp_path):
    write_run(tmp_path, videos=False)
    path = tmp_path / "metrics.jsonl"
    again = [line for line in path.read_text().splitlines(keepends=True) if '"stage": "grpo"' in line][-3:]
    path.write_text(path.read_text() + "".join(again))
    page = page_of(tmp_path)
    assert "No curves of grpo: metrics.jsonl tells of steps twice" in page.text
    assert "SFT loss" in page.text and "Clip fraction" not in page.text


def test_missing_and_damaged_parts_become_notes(tmp_path):
    summary = write_run(tmp_path)
    (tmp_path / summary["videos"][0]["before"]).unlink()
    summary["videos"][1]["after"] = "../secret.webp"
    write_video(tmp_path.parent / "secret.webp", moving_square(2, 0), fps=5)
    summary["before"] = {"successes": "many"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text('{"half": ')
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("rubbish\n")
    page = page_of(tmp_path)
    assert page.tags.count("img") == 4
    for text in ("before_seed0.webp is missing", "../secret.webp is missing", "“results” could not be made",
                 "config.json is damaged", "No curves", "is not a JSON object"):  # fmt: skip
        assert text in page.text


def test_names_from_files_are_escaped(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"task": "<script>alert(1)</script>", "sentence": "a <b> & c"}))
    page = page_of(tmp_path)
    assert "script" not in page.tags and "a <b> & c" in page.text


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_run_is_one_line(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("")
    done = subprocess.run([sys.executable, "-m", "z1_jax.report", str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"error: {re.escape(str(path))} is not a (run )?directory: expected .*\n", done.stderr)


def test_the_command_prints_the_page(tmp_path):
    write_run(tmp_path, iterations=2, videos=False)
    done = subprocess.run([sys.executable, "-m", "z1_jax.report", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'report.html'}\n")


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_videos_play_back_their_frames(tmp_path, suffix):
    film = moving_square(12, seed=4)
    path = write_video(tmp_path / "deep" / f"film.{suffix}", film, fps=20)
    with Image.open(path) as image:
        assert image.n_frames == 12 and image.info["loop"] == 0
        for i in range(12):
            image.seek(i)
            error = np.abs(np.asarray(image.convert("RGB")).astype(int) - film[i])
            assert error.mean() < 4, "lossy, but the same picture"
            assert image.info["duration"] == (1000 if i == 11 else 50)


def test_bad_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected .webp or .gif"):
        write_video(tmp_path / "film.mp4", moving_square(2, 0), fps=20)
    with pytest.raises(ValueError, match=r"float64 \(2, 64, 64, 3\)"):
        write_video(tmp_path / "film.webp", moving_square(2, 0) / 255, fps=20)
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "film.webp", moving_square(2, 0), fps=0)


def points_of(chart):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", re.search(r' d="M([^"]*)"', chart)[1]) if pair]


def test_a_line_lies_where_its_numbers_are():
    chart = charts.line_chart([charts.Series("y", [0, 5, 10], [0.0, None, 1.0])], "x", charts.short, y_range=(0, 1))
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert points_of(chart) == [(left, charts.HEIGHT - charts.BOTTOM), (right, charts.TOP)]
    assert chart.count("M", chart.index(' d="')) >= 2  # the gap is not bridged


def test_a_logarithmic_axis_spaces_decades_equally():
    chart = charts.line_chart([charts.Series("y", [0, 1, 2, 3], [1e-4, 1e-3, 0.0, 1e-2])], "x", charts.short, log=True)
    heights = [y for _, y in points_of(chart)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11) and len(heights) == 3


def test_long_curves_are_averaged_not_thinned():
    rng = np.random.default_rng(fresh_seed(__name__, "test_long_curves_are_averaged_not_thinned"))
    values = rng.random(10_000)
    binned = charts._binned(charts.Series("y", range(10_000), list(values)))
    assert len(binned.xs) <= charts.MAX_POINTS
    size = np.diff(binned.xs)[0]
    np.testing.assert_allclose(binned.ys[0], values[:size].mean())


def test_numbers_are_short():
    shown = [charts.short(value) for value in (0, 0.25, 64, 1200, 12_000, 3_400_000, 2e-5)]
    assert shown == ["0", "0.25", "64", "1200", "12k", "3.4M", "2e-05"]


def test_each_task_of_two_policies_has_their_names():
    """In an evaluation neither is "before"; training that is too short to have a fall shows none."""

    def rate(successes):
        return {"successes": successes, "episodes": 4, "rate": successes / 4, "interval": [0.1, 0.9], "unstable": 0}

    pair = {"before": rate(1), "after": rate(3), "difference": 0.5, "difference_interval": [0, 1], "mcnemar_p": 0.5}
    summary = {"after": {**rate(3), "tasks": {"OpenDrawer": rate(3)}}, "tasks": {"OpenDrawer": pair}}
    names = re.findall("<th>(.*?)</th>", tasks.table({**summary, "labels": ["A: run/sft/300", "B: run/grpo/240"]}))
    assert names == ["task", "A", "B", "difference", "McNemar"]
    trained = {"OpenDrawer": {"groups": 3, "success": 0.25, "best": None, "fall": None}}
    shown = tasks.table({**summary, "training_by_task": trained})
    assert re.findall("<th>(.*?)</th>", shown)[:3] == ["task", "before", "after"]
    assert re.findall("<td>(.*?)</td>", shown)[-3:] == ["3", "25.0%", "–"]


def test_of_many_tasks_a_page_shows_a_few_films_of_as_many_tasks_as_it_can(tmp_path):
    """24 tasks with 4 seeds, before and after: 192 films, of which 16 are embedded; of one task all are."""
    summary = write_run(tmp_path, iterations=3)
    film = summary["videos"][0]["before"]
    pairs = [{"task": f"T{t}", "seed": s, "before": film, "after": film} for t in range(24) for s in range(4)]

    def shown(rows):
        (tmp_path / "summary.json").write_text(json.dumps({**summary, "videos": rows}))
        page = page_of(tmp_path)
        return page.tags.count("img"), page.text

    films, page = shown(pairs)
    assert films == 16 and all(f"T{t}, seed" in page for t in range(8)) and "T8, seed" not in page
    assert "Of 96 filmed episodes 8 are shown; all films are in " in page and str(tmp_path / "videos") in page
    films, page = shown([pair for pair in pairs if pair["task"] in ("T3", "T5")][:6])  # four of T3, two of T5
    assert films == 12 and "are shown" not in page
    films, page = shown([pair for pair in pairs if pair["task"] in ("T3", "T5", "T7")])
    assert page.count("T3, seed") == 3 and page.count("T5, seed") == 3 and page.count("T7, seed") == 2
    films, page = shown([{**pair, "task": "T1"} for pair in pairs[:20]])
    assert films == 40 and "are shown" not in page
    films, page = shown([{key: pair[key] for key in ("task", "seed", "after")} for pair in pairs])
    assert films == 16 and "T15, seed" in page
