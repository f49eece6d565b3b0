"""What a run writes down while it runs: metrics.jsonl, episodes.jsonl, a live console table, TensorBoard and W&B.

Records are flushed line by line, so that a killed run loses at most the line it was writing.
"""

from __future__ import annotations

import collections
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from z1_jax.errors import UserError
from z1_jax.files import require_file, write_whole, writing
from z1_jax.wandb_run import WandbRun

METRICS = "metrics.jsonl"
EPISODES = "episodes.jsonl"
NUMBERED: dict[str, type] = {"stage": str, "step": int}  # what each record of these two says
# Shown when there are any: episodes in which the simulation broke down; groups and episodes lost by their environments.
ALARMS = ("unstable", "groups lost", "episodes lost")


class MetricsWriter:
    """Appends records to `run_dir`/metrics.jsonl and episodes.jsonl, and to TensorBoard and W&B when asked.

    A metrics record is {"stage": "sft" | "grpo", "step": int, name: number, ...}. A number that is not finite
    is written as null, and named with its value under "nonfinite".

    Args:
      run_dir: created when missing. Existing records stay; see `resume`.
      tensorboard: also write `run_dir`/tensorboard (needs tensorboardX).
      wandb_project: also log to this Weights & Biases project (needs wandb).
      config: what W&B shows as the run's config.
      constant: fields that every record gets, e.g. what must stand beside a run's figures.

    Raises:
      ValueError: a package of the extra [log] is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        constant: Mapping[str, str] | None = None,
    ) -> None:
        self._constant = dict(constant or {})
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _open_tensorboard(self.run_dir / "tensorboard") if tensorboard else None
        self._wandb = WandbRun(wandb_project, self.run_dir, config) if wandb_project else None
        self._files: dict[str, IO[str]] = {}
        for name in (METRICS, EPISODES):
            drop_half_line(self.run_dir / name)
            self._files[name] = open(self.run_dir / name, "a", encoding="utf-8")

    def resume(self, stage: str, step: int) -> None:
        """Removes the records that a stage wrote after the checkpoint that it continues from, and will write again.

        The records of `stage` with a step >= `step` go; those of other stages stay.
        """
        for name, file in self._files.items():
            path = self.run_dir / name
            with writing(path):
                file.close()
            _drop(path, stage, step)
            self._files[name] = open(path, "a", encoding="utf-8")

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one metrics record and returns it as written.

        Args:
          values: numbers (Python, NumPy or JAX scalars), booleans, strings or None by name.

        Raises:
          ValueError: a value is none of these.
        """
        record = _record(stage, step, {**self._constant, **values})
        self._append(METRICS, record)
        numbers = {
            f"{stage}/{name}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log(numbers | {f"{stage}/step": int(step)})
        return record

    def episode(self, stage: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one record to episodes.jsonl (seed, success, chunks, ...) and returns it as written."""
        record = _record(stage, step, {**self._constant, **values})
        self._append(EPISODES, record)
        return record

    def evaluation(self, name: str, step: int, summary: Mapping[str, Any]) -> None:
        """Sends an evaluation's rate and interval to TensorBoard and W&B; a second time changes nothing.

        Args:
          name: e.g. "before"; step: of training, at which the policy was evaluated; summary: see `Evaluation.summary`.
        """
        low, high = summary["interval"]
        numbers = {"success": summary["rate"], "success_low": low, "success_high": high}
        numbers = {f"evaluation/{name}/{key}": float(value) for key, value in numbers.items()}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log_once(f"evaluation/{name}@{step}", {**numbers, f"evaluation/{name}/step": float(step)})

    def video(self, name: str, step: int, path: Path, success: bool) -> None:
        """Sends a video to W&B; a second time changes nothing."""
        if self._wandb is not None:
            caption = f"after {step} iterations: {'success' if success else 'failure'}"
            self._wandb.video_once(f"videos/{name}@{step}", f"videos/{name}", path, caption)

    def close(self) -> None:
        for name, file in self._files.items():
            with writing(self.run_dir / name):
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with writing(self.run_dir / name):
            self._files[name].write(json.dumps(record, allow_nan=False) + "\n")
            self._files[name].flush()


class SilentWriter(MetricsWriter):
    """The writer of a process that leaves writing to another one: takes everything, checks it, and keeps nothing."""

    def __init__(self, run_dir: str | os.PathLike) -> None:
        self._constant, self.run_dir = {}, Path(run_dir)
        self._tensorboard = self._wandb = None
        self._files = {}

    def resume(self, stage: str, step: int) -> None:
        """Nothing was written."""

    def _append(self, name: str, record: dict[str, Any]) -> None:
        pass


class Progress:
    """A live table of one stage: a title, then lines of step, total, seconds a step, time left and chosen columns.

    On a terminal the last line is rewritten at each report and kept every `interval_s`; elsewhere a line is printed at
    most every `interval_s`. The first and the last report are always kept.

    Args:
      stage: title, e.g. "sft".
      total: steps of the stage.
      unit: what a step is, e.g. "iteration".
      columns: name of a metric -> format, e.g. {"loss": ".4f"}; its heading is the name in words, and a metric that a
        report lacks shows as a dash.
      start: first step, where a resumed run goes on.
      alarms: counts that are shown at the end of a line, with their names, when they are above zero.

    The time until the first report compiles and starts what is needed: it is no part of the rate, and there is no
    estimate of the time left before the second report.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str = "step",
        columns: Mapping[str, str] | None = None,
        start: int = 0,
        interval_s: float = 10.0,
        stream: IO[str] | None = None,
        alarms: Sequence[str] = (),
    ) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._columns = dict(columns or {})
        self._alarms = tuple(alarms)
        self._headings = {name: name.replace("/", " ").replace("_", " ") for name in self._columns}
        self._interval_s = interval_s
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._begin, self._start = time.monotonic(), start
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)  # the rate is that of these
        self._kept_at = -math.inf
        self._pending = False
        self._headed = False
        title = f"{stage} · {total:,} {unit}{'' if total == 1 else 's'}"
        self._stream.write(f"\n── {title} {'─' * max(2, 60 - len(title))}\n")
        self._stream.flush()

    def report(self, done: int, values: Mapping[str, Any] | None = None) -> None:
        """Shows that `done` steps of the total are finished, with the latest metrics."""
        now = time.monotonic()
        self._marks.append((now, done))
        keep = done >= self._total or now - self._kept_at >= self._interval_s
        if keep or self._live:
            self._print(self._line(done, values or {}), keep)
        if keep:
            self._kept_at = now

    def say(self, text: str) -> None:
        """Prints a line between those of the table."""
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the table: keeps a line that was still being rewritten."""
        if self._pending:
            self._stream.write("\n")
            self._stream.flush()
            self._pending = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self, done: int, values: Mapping[str, Any]) -> str:
        now = self._marks[-1][0]
        # The first report has no earlier one: only when it is the last too is its own time the rate.
        first_time, first_step = self._marks[0] if len(self._marks) > 1 else (self._begin, self._start)
        known = done > first_step and (len(self._marks) > 1 or done >= self._total)
        each = (now - first_time) / (done - first_step) if known else math.inf
        left = 0.0 if done >= self._total else (self._total - done) * each
        head = self._row(f"{done}/{self._total}", _seconds(each), _clock(now - self._begin), _clock(left))
        cells = self._cells(head, {name: _cell(values.get(name), spec) for name, spec in self._columns.items()})
        return " ".join([cells, *(f" {values[name]:,} {name}" for name in self._alarms if values.get(name))])

    def _heading(self) -> str:
        return self._cells(self._row(self._unit, f"s/{self._unit}", "elapsed", "left"), self._headings)

    def _row(self, done: str, each: str, elapsed: str, left: str) -> str:
        return f"{done:>13} {each:>{max(9, len(self._unit) + 2)}} {elapsed:>8} {left:>8}"

    def _cells(self, head: str, cells: Mapping[str, str]) -> str:
        return " ".join([head, *(f"{cell:>{max(10, len(self._headings[name]))}}" for name, cell in cells.items())])

    def _print(self, line: str, keep: bool) -> None:
        if not self._headed:  # not before the first line: what is printed meanwhile stands above both
            self._stream.write(self._heading() + "\n")
            self._headed = True
        if not self._live:
            self._stream.write(line + "\n")
        else:
            line = line[: max(20, shutil.get_terminal_size().columns - 1)]  # a wrapped line cannot be rewritten
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if keep else ""))
            self._pending = not keep
        self._stream.flush()


def read_records(path: str | os.PathLike, kinds: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """The records of a .jsonl file, in order; [] when it is missing. A half-written last line is left out.

    Args:
      kinds: of values that every record has.

    Raises:
      ValueError: another line is not a JSON object with such values; names the file and the line.
    """
    path = Path(path)
    require_file(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # after the last newline stands nothing, or half a record
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number} is not a JSON object: the file is damaged; mend or delete that line")
        for name, kind in (kinds or {}).items():
            if type(record.get(name)) is not kind:
                raise UserError(
                    f"{path}:{number} has {name}={record.get(name)!r:.80}, expected {kind.__name__}: the file is "
                    "damaged; mend or delete that line"
                )
        records.append(record)
    return records


def _record(stage: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"stage": stage, "step": int(step)}
    nonfinite: dict[str, str] = {}
    for name, value in values.items():
        plain = _plain(name, value)
        if isinstance(plain, float) and not math.isfinite(plain):
            nonfinite[name], plain = str(plain), None
        record[name] = plain
    if nonfinite:
        record["nonfinite"] = nonfinite
    return record


def _plain(name: str, value: Any) -> Any:
    if getattr(value, "ndim", None) == 0:  # NumPy and JAX scalars
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    got = f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
    raise ValueError(f"metric {name!r} is of {got}: expected one number, boolean or string; reduce it first")


def drop_half_line(path: Path) -> None:
    """Cuts off what a kill left behind the last whole line of a file."""
    if path.exists():
        content = path.read_bytes()
        _cut(path, content.rfind(b"\n") + 1)


def _drop(path: Path, stage: str, step: int) -> None:
    """Removes the records of `stage` at or after `step`: a kill leaves the old file or the new one."""
    lines = path.read_bytes().splitlines(keepends=True)
    again = [r.get("stage") == stage and r.get("step", -1) >= step for r in read_records(path, NUMBERED)]
    if any(again):
        write_whole(path, b"".join(line for line, dropped in zip(lines, again, strict=True) if not dropped))


def _cut(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        os.truncate(path, size)


def _open_tensorboard(directory: Path) -> Any:
    try:
        import tensorboardX
    except ImportError:
        raise UserError("TensorBoard is on but tensorboardX is not installed: pip install 'z1-jax[log]'") from None
    return tensorboardX.SummaryWriter(str(directory))


def _seconds(each: float) -> str:
    if not math.isfinite(each):
        return "-"
    return f"{each:.3f}" if each < 1 else f"{each:.2f}" if each < 10 else f"{each:,.1f}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "-"
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return value[:10] if isinstance(value, str) else format(value, spec)
