"""Which seeds are filmed, and that `evaluate` films any of them, of any checkpoint, when it is asked."""

import json
import pathlib

import pytest
import tiny_policy as tiny
from PIL import Image

from z1_jax import evaluate
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.checks import check, check_given
from z1_jax.config.schema import Config, ConfigError, EvalConfig
from z1_jax.videos import clip_paths, clips_of

ROOT = pathlib.Path(__file__).parents[1]
FIRST = EvalConfig().first_seed


def test_the_seeds_that_are_filmed_do_not_depend_on_what_came_of_them():
    assert EvalConfig(videos=3).filmed == (FIRST, FIRST + 1, FIRST + 2)
    assert EvalConfig(videos=3, episodes=2).filmed == (FIRST, FIRST + 1)
    assert EvalConfig(videos=3, film_seeds=("12", "7")).filmed == (12, 7)
    config = Config(eval=EvalConfig(videos=2))
    seen = {f"checkpoint_seed{FIRST}.webp": True, f"checkpoint_seed{FIRST + 1}.webp": False}
    told = clips_of(config, {"after": ("checkpoint", seen)})
    assert told["videos_rule"].startswith("The first 2 held-out seeds in their order: chosen before anything ran")
    assert [row["after_success"] for row in told["videos"]] == [True, False] and "before" not in told["videos"][0]
    assert clips_of(Config(eval=EvalConfig(videos=0)), {}) == {}


def test_of_several_tasks_the_same_seeds_are_filmed():
    config = Config(task="", tasks=("libero_10/0", "B"), eval=EvalConfig(videos=1))
    paths = clip_paths(config, ROOT, "before")
    assert {key: path.name for key, path in paths.items()} == {
        ("libero_10/0", FIRST): f"before_libero_10-0_seed{FIRST}.webp",
        ("B", FIRST): f"before_B_seed{FIRST}.webp",
    }
    told = clips_of(config, {"before": ("before", {path.name: True for path in paths.values()})})
    assert [(row["task"], row["seed"], row["before_success"]) for row in told["videos"]] == [
        ("libero_10/0", FIRST, True),
        ("B", FIRST, True),
    ]
    assert told["videos_rule"].startswith("The first held-out seed: chosen")


@pytest.mark.parametrize("seeds", [("x",), ("-1",), (str(2**31),), ("7", "07"), ("",)])
def test_seeds_that_are_none_are_one_line(seeds):
    with pytest.raises(ConfigError, match="config key eval.film_seeds: got "):
        check(Config(eval=EvalConfig(film_seeds=seeds)))


def test_both_keys_at_once_are_refused():
    config = Config(algorithm="eval", checkpoint="x", eval=EvalConfig(film_seeds=("7",)))
    with pytest.raises(ConfigError, match=r"eval.videos: it has no effect beside eval.film_seeds"):
        check_given(config, ["eval.film_seeds", "eval.videos"])
    check_given(config, ["eval.film_seeds", "eval.video_size"])


def test_evaluate_films_any_checkpoint_and_seed(tmp_path, capsys):
    """Also one that was evaluated before: what is there is not run again."""
    checkpoints = Checkpoints(tmp_path / "policy")
    for step in (1, 2):
        checkpoints.save(step, tiny.policy(step).parts(), tiny.policy(step).document())
    checkpoints.close()
    run_dir = tmp_path / "run"
    command = [
        "evaluate.py", f"--config={ROOT / 'configs' / 'eval.py'}", f"--config.checkpoint={tmp_path / 'policy' / '1'}",
        f"--config.env.cameras={tiny.CAMERA}", "--config.env.workers=0", "--config.env.horizon=16",
        "--config.eval.episodes=2", "--config.env.parallel=2", "--config.eval.video_size=32",
        f"--config.run_dir={run_dir}",
    ]  # fmt: skip
    evaluate.main([*command, "--config.eval.film_seeds=5"])
    film = run_dir / "videos" / "checkpoint_seed5.webp"
    with Image.open(film) as image:
        # The start and 16 control steps at 20 a second, the last for a second; what looks alike may be one frame.
        durations = [(image.seek(n), image.load(), image.info["duration"])[-1] for n in range(image.n_frames)]
        assert sum(durations) == 16 * 50 + 1000 and image.size == (32, 32)
    results, written = run_dir / "evaluation" / "checkpoint.jsonl", film.stat().st_mtime_ns
    before = results.stat().st_mtime_ns
    evaluate.main([*command, "--config.eval.film_seeds=5,900000001"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [row["seed"] for row in summary["videos"]] == [5, 900000001]
    held_out = json.loads(results.read_text().splitlines()[1])
    assert summary["videos"][1]["after_success"] == held_out["success"] and len(summary["instructions"]) >= 1
    assert (results.stat().st_mtime_ns, film.stat().st_mtime_ns) == (before, written)
    page = (run_dir / "report.html").read_text()
    assert page.count("<img") == 2 and "The seeds that eval.film_seeds names: chosen" in page
    commands = [json.loads(line)["command"] for line in (run_dir / "commands.jsonl").read_text().splitlines()]
    assert len(commands) == 2 and commands[1].startswith("python -m z1_jax.evaluate --config=")
    capsys.readouterr()
    evaluate.main([*command, "--config.eval.film_seeds=5"])
    assert "already finished" in capsys.readouterr().out
