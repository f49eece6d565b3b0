"""The commands as a user starts them: one line for a mistake, nothing lost by an interruption."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_policy as tiny

from z1_jax.checkpoint import Checkpoints
from z1_jax.interrupt import INTERRUPTED

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = ("z1_jax.train", "--config=configs/grpo.py:smoke", "--config.eval.videos=0", "--config.demos.episodes=6")


def start(*arguments: str) -> subprocess.Popen:
    """A command in its own process group, with one device."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-u", "-m", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    process = start(*arguments)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def run_and_signal(number: int, at: str, delay_s: float, *arguments: str) -> tuple[int, str]:
    """As `run`, with a signal to the whole group, as Ctrl-C sends it, some time after a line with `at` was printed."""
    process, lines, sent = start(*arguments), [], False
    for line in process.stdout:
        lines.append(line)
        if at in line and not sent:
            sent = True
            time.sleep(delay_s)
            if number == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, number)
    code = process.wait(timeout=300)
    assert sent, f"never printed {at!r}:\n{''.join(lines)}"
    return code, "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("z1_jax.train", "--config=configs/grpo.py", "--config.task=Juggle"), "config key task: 'Juggle'"),
        (("z1_jax.train", "--config=configs/grpo.py:huge"), "preset 'huge' of configs/grpo.py does not exist"),
        (("z1_jax.train", "--config=configs/grpo.py", "--config.sft.stepz=3"), "did you mean sft.steps?"),
        (("z1_jax.train", "--config=configs/grpo.py", "--config.run_dir=/dev/null/x"), "cannot be written"),
        (("z1_jax.train", "--config=configs/eval.py", "--config.checkpoint=x"), "for python -m z1_jax.evaluate"),
        (("z1_jax.evaluate", "--config=configs/eval.py", "--config.checkpoint=/nowhere"), "no policy at /nowhere"),
        (("z1_jax.collect", "OpenDrawer"), "--out"),
        (("z1_jax.report", "/nowhere"), "is not a directory"),
        (("z1_jax.convert", "/nowhere", "/tmp/there"), "there is nothing at /nowhere"),
        (("z1_jax.convert", "/nowhere"), "argument DST: got none, expected one"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    code, out = run(*arguments)
    assert code in (1, 2) and out.startswith("error: ") and message in out and out.count("\n") == 1, out


SAME_ORDER = "--xla_gpu_exclude_nondeterministic_ops"
USERS = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    "JAX_DEFAULT_MATMUL_PRECISION": "default",
    "XLA_FLAGS": f"{SAME_ORDER}=false",
}


@pytest.mark.parametrize(
    "given, memory, precision, flags",
    [
        ({"XLA_FLAGS": "--xla_dump_to="}, "0.92", "float32", f"--xla_dump_to= {SAME_ORDER}=true"),
        (USERS, "None", "default", f"{SAME_ORDER}=false"),
    ],
)
def test_settings_of_the_process_give_way_to_the_users(given, memory, precision, flags, tmp_path):
    (tmp_path / "jax_cuda13_plugin").mkdir()  # as if JAX were installed for a GPU
    given = given | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = "import os, jax; from z1_jax import process; process.start_jax(); jax.devices()"
    code += "; print(os.environ.get('XLA_CLIENT_MEM_FRACTION'), jax.config.jax_default_matmul_precision)"
    code += "; print(os.environ['XLA_FLAGS'])"
    # Commands that tests ran in this process have left settings of their own behind.
    ours = {name: value for name, value in os.environ.items() if name != "XLA_CLIENT_MEM_FRACTION"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ours | given, capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == [f"{memory} {precision}", flags]


@pytest.mark.parametrize("command, config, key", [("train", "grpo", "init"), ("evaluate", "eval", "checkpoint")])
def test_settings_are_made_before_a_checkpoint_takes_the_device(command, config, key, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    code = f"""
from jax._src import xla_bridge
from z1_jax import opening, {command} as command

def started():
    raise SystemExit(f"too late: {{xla_bridge.backends_are_initialized()}}")

opening.start_jax = started
command.main(["", "--config=configs/{config}.py", "--config.{key}={tmp_path}", "--config.env.cameras={tiny.CAMERA}"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith("too late: False\n"), done.stderr


def test_a_bug_keeps_its_traceback(tmp_path):
    code = "from z1_jax import process; process.run_main(lambda argv: [][1])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "IndexError" in done.stderr


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nmore')", "9 bytes."),
        ("MemoryError('Unable to allocate 7.28 TiB')", "7.28 TiB"),
        ("jax.errors.JaxRuntimeError('INTERNAL: a bug')", ""),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(raised, told):
    code = f"import jax\nfrom z1_jax import process\ndef main(argv): raise {raised}\nprocess.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = done.stderr.startswith("error: memory does not suffice (") and done.stderr.count("\n") == 1
    assert (done.returncode, line) == ((2, True) if told else (1, False)) and told in done.stderr, done.stderr


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    code = """
import gc, signal, time
from z1_jax import interrupt, process

def interrupted(*_):
    gc.callbacks.remove(interrupted)
    signal.raise_signal(signal.SIGINT)

def main(argv):
    gc.callbacks.append(interrupted)
    gc.collect()
    time.sleep(20)
    print("lost")

interrupt.install_hooks()
process.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{INTERRUPTED}\n")


@pytest.mark.parametrize("held", [False, True])
def test_sigterm_is_one_line_and_nothing_is_skipped(held):
    code = f"""
import signal, time
from z1_jax import interrupt, process

def main(argv):
    try:
        if {held}:
            with interrupt.held():
                signal.raise_signal(signal.SIGTERM)
                print("done", end="", flush=True)
        else:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(20)
    finally:
        print(" cleaned", flush=True)

interrupt.install_hooks()
process.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    told = "done cleaned\n" if held else " cleaned\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, told, f"{INTERRUPTED}\n")


STUCK = """
import ctypes, threading
from z1_jax import interrupt, process

interrupt.AGAIN_S = 1.0

def main(argv):
    with interrupt.GracefulStop():
        lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        take(lock)
        threading.Timer(1.0, lambda: print("stuck", flush=True)).start()  # when the main thread is in C
        take(lock)  # for ever, in C: no handler of Python runs

interrupt.install_hooks()
process.run_main(main)
"""


@pytest.mark.parametrize(
    ("signals", "told"),
    [
        ([signal.SIGTERM], "stopping: what is under way has 4 s to end (Z1_JAX_STOP_SECONDS=SECONDS changes this)\n"),
        ([signal.SIGINT, 0], "stopping when the call under way is over (again: within 1 s)\n"),
        ([signal.SIGINT, signal.SIGINT], ""),
    ],
)
def test_a_stop_is_answered_in_time_where_python_cannot_answer(signals, told):
    """By a line, and after SIGTERM or a second signal by the end of the process; the first Ctrl-C waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        cwd=ROOT,
        env=os.environ | {"Z1_JAX_STOP_SECONDS": "6"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(120.0, process.kill)  # a failure must not wait for ever
    killer.daemon = True
    killer.start()
    assert process.stdout.readline() == "stuck\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    if 0 in signals:
        assert process.stderr.readline() == told and process.poll() is None
        process.kill()
        process.communicate()
        return
    _, err = process.communicate(timeout=60)
    lost = f"{INTERRUPTED}; what was under way did not end in time and is lost\n"
    assert (process.returncode, err) == (130, told + lost)


def test_the_seconds_of_a_stop_are_checked():
    code = "from z1_jax import interrupt, process; interrupt.install_hooks(); process.run_main(lambda argv: 0)"
    for text in ("soon", "-1", "nan", "inf"):
        environment = os.environ | {"Z1_JAX_STOP_SECONDS": text}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and done.stderr == (
            f"error: Z1_JAX_STOP_SECONDS: got {text!r}, expected seconds, or 0 for as long as a step takes\n"
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_collecting_loses_no_episode(number, tmp_path):
    command = ("z1_jax.collect", "OpenDrawer", "--episodes=40", f"--out={tmp_path / 'data'}")
    code, out = run_and_signal(number, "1/40", 0.0, *command)
    assert code == 130 and "the same command continues" in out and "Traceback" not in out, out
    collected = (tmp_path / "data.episodes").stat().st_size
    code, out = run(*command)
    assert code == 0 and "40 demonstrations of OpenDrawer" in out, out
    assert collected > 0 and not (tmp_path / "data.episodes").exists()
    assert run(*command)[1].startswith("already collected")


@pytest.mark.slow
def test_interruptions_at_every_stage_change_nothing(tmp_path):
    undisturbed = tmp_path / "undisturbed"
    code, out = run(*SMOKE, f"--config.run_dir={undisturbed}")
    assert code == 0, out
    assert out.count("held constant at their mean (span): state 0 (") == 2, out  # SFT and RL
    command = (*SMOKE, f"--config.run_dir={tmp_path / 'run'}")
    moments = [
        (signal.SIGKILL, "demonstrations ·", 2.0),
        (signal.SIGINT, "sft ·", 0.5),
        (signal.SIGINT, "10/60", 0.0),
        (signal.SIGKILL, "evaluation before RL ·", 1.0),
        (signal.SIGINT, "evaluation before RL ·", 1.0),
        (signal.SIGINT, "grpo ·", 0.5),
    ]
    for number, at, delay_s in moments:
        code, out = run_and_signal(number, at, delay_s, *command)
        assert "Traceback" not in out, out
        assert code == (130 if number == signal.SIGINT else -number), out
    code, out = run(*command)
    assert code == 0, out
    for name in ("before", "after"):
        file = pathlib.Path("evaluation") / f"{name}.jsonl"
        assert (tmp_path / "run" / file).read_text() == (undisturbed / file).read_text()
    one, other = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", undisturbed))
    assert one["sentence"] == other["sentence"] and one["simulated_steps"] == other["simulated_steps"]
    assert "already finished" in run(*command)[1]
    code, out = run(*command, "--config.seed=3")
    assert code == 2 and "belongs to another config (seed is 0, asked for 3)" in out and out.count("\n") == 1, out


@pytest.mark.slow
def test_a_run_that_lost_something_counts_all_or_refuses(tmp_path):
    """Stopped in RL, then the policy before RL is damaged or removed, or the records are gone; the same command."""
    options = (*SMOKE, "--config.sft.steps=30", "--config.train.iterations=3")
    run_dir = tmp_path / "run"
    code, out = run_and_signal(signal.SIGINT, "1/3", 0.0, *options, f"--config.run_dir={run_dir}")
    assert code == 130, out
    stopped = {path for path in run_dir.rglob("*") if path.is_file()}
    kept = tmp_path / "kept"
    shutil.copytree(run_dir, kept)

    def again(lose) -> tuple[int, str]:
        shutil.rmtree(run_dir)
        shutil.copytree(kept, run_dir)
        lose()
        return run(*options, f"--config.run_dir={run_dir}")

    def damage() -> None:
        path = max((run_dir / "checkpoints" / "sft" / "30" / "params").rglob("*"), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-100])

    for lose in (damage, lambda: shutil.rmtree(run_dir / "checkpoints" / "sft")):
        code, out = again(lose)
        assert code == 0 and "goes on from its own checkpoint" in out and "sft ·" not in out, out
        summary = json.loads((run_dir / "summary.json").read_text())
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [10, 20, 30, 0, 1, 2]
        assert summary["iterations"] == 3
        assert summary["simulated_steps"] == sum(row["steps/simulated"] for row in rows[3:])
    code, out = again(lambda: (run_dir / "metrics.jsonl").unlink())
    assert code == 2 and "metrics.jsonl holds 0 of the" in out.splitlines()[-1] and "Traceback" not in out, out
    now = {path for path in run_dir.rglob("*") if path.is_file()}
    assert now == stopped - {run_dir / "metrics.jsonl"}
