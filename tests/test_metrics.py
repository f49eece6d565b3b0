"""Records survive kills and resumes; the table says what it should, on a terminal and off one."""

import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from z1_jax import metrics
from z1_jax.metrics import MetricsWriter, Progress, read_records


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_on_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(
            "sft", 0, {"loss": np.float32(0.5), "n": np.int64(3), "jax": jnp.float32(0.25), "ok": True, "tag": "a"}
        )
        writer.episode("eval", 7, {"seed": 5, "success": np.bool_(False)})
        assert lines(writer.run_dir / "metrics.jsonl") == [
            {"stage": "sft", "step": 0, "loss": 0.5, "n": 3, "jax": 0.25, "ok": True, "tag": "a"}
        ]
        assert lines(writer.run_dir / "episodes.jsonl") == [{"stage": "eval", "step": 7, "seed": 5, "success": False}]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("grpo", 1, {"loss": float("nan"), "norm": np.float32(np.inf), "fine": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "stage": "grpo", "step": 1, "loss": None, "norm": None, "fine": 1.0,
        "nonfinite": {"loss": "nan", "norm": "inf"},
    }  # fmt: skip


def test_an_array_is_refused_with_its_name(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"'loss' is of shape \(2,\)"):
            writer.write("sft", 0, {"loss": np.zeros(2)})
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_resume_forgets_what_its_own_stage_writes_again_and_nothing_else(tmp_path):
    names = (metrics.METRICS, metrics.EPISODES)

    def run(stage, first, last):
        for step in range(first, last):
            writer.write(stage, step, {"x": step})
            writer.episode(stage, step, {"seed": step})

    with MetricsWriter(tmp_path) as writer:
        run("sft", 0, 20)
        run("grpo", 0, 9)
    before = {name: lines(tmp_path / name) for name in names}
    with open(tmp_path / metrics.METRICS, "a") as file:
        file.write('{"stage": "grpo", "step": 9, "x"')  # the kill
    with MetricsWriter(tmp_path) as writer:
        writer.resume("grpo", 6)
        assert [record["step"] for record in lines(tmp_path / metrics.METRICS) if record["stage"] == "grpo"] == [
            *range(6)
        ]
        run("grpo", 6, 9)
    assert {name: lines(tmp_path / name) for name in names} == before
    with MetricsWriter(tmp_path) as writer:
        writer.resume("sft", 5)  # trained again: what the later stage wrote stays
        run("sft", 5, 20)
    for name in names:
        after = lines(tmp_path / name)
        for stage in ("sft", "grpo"):
            assert [r for r in after if r["stage"] == stage] == [r for r in before[name] if r["stage"] == stage]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_half_a_line_is_dropped_and_a_damaged_one_named(tmp_path):
    path = tmp_path / metrics.METRICS
    path.write_text('{"stage": "sft", "step": 0}\n{"stage": "s')
    assert read_records(path) == [{"stage": "sft", "step": 0}]
    MetricsWriter(tmp_path).close()
    assert path.read_text() == '{"stage": "sft", "step": 0}\n'
    path.write_text('{"stage": "sft", "step": 0}\nrubbish\n{"stage": "sft", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a JSON object"):
        read_records(path)
    assert read_records(tmp_path / "missing.jsonl") == []


def test_constant_fields_stand_in_every_record_also_after_a_resume(tmp_path, monkeypatch):
    recorder = Recorder()
    module = type("tensorboardX", (), {"SummaryWriter": lambda directory: recorder})
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", module)
    for first in (0, 1):
        with MetricsWriter(tmp_path, tensorboard=True, constant={"assets": "stand-ins"}) as writer:
            writer.resume("grpo", first)
            for step in range(first, 3):
                writer.write("grpo", step, {"success": 0.5})
                writer.episode("grpo", step, {"seed": step})
    wanted = [{"stage": "grpo", "step": step, "assets": "stand-ins"} for step in range(3)]
    assert read_records(tmp_path / metrics.METRICS) == [{**record, "success": 0.5} for record in wanted]
    assert read_records(tmp_path / metrics.EPISODES) == [{**record, "seed": record["step"]} for record in wanted]
    assert {call[0] for call in recorder.calls if call != "closed"} == {"grpo/success"}  # words are no curve


@pytest.mark.parametrize(
    ("option", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb_project": "p"}, "wandb")]
)
def test_a_missing_logger_names_the_extra(tmp_path, monkeypatch, option, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)  # makes its import fail
    with pytest.raises(ValueError, match=rf"{package} is not installed: pip install 'z1-jax\[log\]'"):
        MetricsWriter(tmp_path, **option)


class Recorder:
    def __init__(self):
        self.calls = []

    def add_scalar(self, name, value, step):
        self.calls.append((name, value, step))

    def close(self):
        self.calls.append("closed")


def test_tensorboard_gets_the_finite_numbers(tmp_path, monkeypatch):
    recorder = Recorder()
    module = type("tensorboardX", (), {"SummaryWriter": lambda directory: recorder})
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", module)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write("sft", 4, {"loss": 0.5, "bad": float("nan"), "tag": "x"})
    assert recorder.calls == [("sft/loss", 0.5, 4), "closed"]


def test_an_evaluation_is_a_curve_too(tmp_path, monkeypatch):
    recorder = Recorder()
    module = type("tensorboardX", (), {"SummaryWriter": lambda directory: recorder})
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", module)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.evaluation("after", 240, {"rate": 0.5, "interval": [0.25, 0.75], "episodes": 4})
        writer.video("after_seed1", 240, tmp_path / "none.webp", True)  # W&B alone takes videos
    names = [f"evaluation/after/{name}" for name in ("success", "success_low", "success_high")]
    assert recorder.calls == [*((n, v, 240) for n, v in zip(names, (0.5, 0.25, 0.75), strict=True)), "closed"]


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "monotonic", clock.monotonic)
    return clock


def test_off_a_terminal_lines_are_rare_and_the_last_is_shown(clock):
    stream = io.StringIO()
    with Progress(
        "grpo", 40, "iteration", {"success": ".1%", "absent": ".3f"}, interval_s=10, stream=stream
    ) as progress:
        for done in range(1, 41):
            clock.now += 0.5
            progress.report(done, {"success": np.float32(done / 40)})
    header, columns, *rows = stream.getvalue().strip().splitlines()
    assert "grpo" in header and "40 iterations" in header
    assert columns.split() == ["iteration", "s/iteration", "elapsed", "left", "success", "absent"]
    assert len({len(line) for line in (columns, *rows)}) == 1  # cells stand below their headings
    assert [row.split()[0] for row in rows] == ["1/40", "21/40", "40/40"]
    assert rows[1].split() == ["21/40", "0.500", "0:10", "0:10", "52.5%", "-"]  # 19 left at half a second: 9.5 s


def test_alarms_are_shown_when_above_zero(clock):
    stream = io.StringIO()
    progress = Progress("evaluation", 3, columns={"success": ".0%"}, interval_s=0, stream=stream, alarms=("unstable",))
    for done, unstable in ((1, 0), (2, 1200), (3, None)):
        progress.report(done, {"success": 0.5, "unstable": unstable})
    first, second, third = stream.getvalue().strip().splitlines()[2:]
    assert first.endswith("50%") and second.endswith("50%  1,200 unstable") and third.endswith("50%")


def test_on_a_terminal_the_line_is_rewritten(clock, monkeypatch):
    monkeypatch.setattr(metrics.shutil, "get_terminal_size", lambda: metrics.os.terminal_size((40, 20)))
    stream = Terminal()
    progress = Progress("sft", 10, columns={"loss": ".4f"}, interval_s=1e9, stream=stream)
    for done in range(1, 8):
        clock.now += 1
        progress.report(done, {"loss": 1 / done})
    progress.close()
    shown = stream.getvalue().split("loss\n")[1]
    assert "sft · 10 steps" in stream.getvalue()
    assert shown.count("\r\x1b[K") == 7 and shown.count("\n") == 2  # the first line is kept, the last by close
    assert all(len(re.sub(r"\x1b\[K|\n", "", part)) < 40 for part in shown.split("\r"))


def test_slow_steps_show_seconds_and_a_resumed_stage_its_own_rate(clock):
    stream = io.StringIO()
    progress = Progress("grpo", 1000, start=990, interval_s=0, stream=stream)
    clock.now += 100
    progress.report(991)
    clock.now += 4000
    progress.report(992)
    assert stream.getvalue().splitlines()[-1].split() == ["992/1000", "4,000.0", "1:08:20", "8:53:20"]


def test_what_is_compiled_before_the_first_report_is_no_rate(clock):
    stream = io.StringIO()
    with Progress("sft", 300, interval_s=0, stream=stream) as progress:
        for done, seconds in ((50, 60.0), (100, 5.0), (150, 5.0), (300, 15.0)):
            clock.now += seconds
            progress.report(done)
    rows = [line.split() for line in stream.getvalue().splitlines()[3:]]
    assert rows[0] == ["50/300", "-", "1:00", "-"]  # no estimate yet; by this first interval it would be five minutes
    assert rows[1] == ["100/300", "0.100", "1:05", "0:20"]  # 200 left at a tenth of a second
    assert rows[-1] == ["300/300", "0.100", "1:25", "0:00"]
    stream = io.StringIO()
    with Progress("demonstrations", 8, "episode", start=4, stream=stream) as progress:
        clock.now += 2.0
        progress.report(8)  # one report alone: its own time is the rate
    assert stream.getvalue().splitlines()[-1].split() == ["8/8", "0.500", "0:02", "0:00"]


def test_what_is_printed_before_the_first_line_stands_above_the_headings(clock):
    stream = io.StringIO()
    with Progress("grpo", 3, "iteration", {"ratio/max": ".3f", "clip_fraction": ".3f"}, stream=stream) as progress:
        stream.write("prefix cache: device\n")
        progress.report(1, {"ratio/max": 1.5, "clip_fraction": 0.25})
        progress.say("stopping early")
    title, cache, headings, row, said = stream.getvalue().strip().splitlines()
    assert title.startswith("── grpo · 3 iterations") and (cache, said) == ("prefix cache: device", "stopping early")
    assert headings.endswith("ratio max clip fraction") and row.endswith("1.500         0.250")
