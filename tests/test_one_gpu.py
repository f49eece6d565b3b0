"""docs/one-gpu.md, command by command: with tiny weights of the published layout, and in the kitchen or on stand-ins.

Sizes and lengths are overridden; what a command reads and where it writes is the page's own.
"""

import importlib
import json
import pathlib
import re
import shlex
from collections.abc import Sequence

import demo_files
import numpy as np
import openpi_layout
import pi05_checkpoints as made
import pytest
import tiny_policy as tiny

from envs.libero import compat as libero
from envs.robocasa import compat
from z1_jax import opening
from z1_jax.data.tokenizer import load_tokenizer, train_small_tokenizer
from z1_jax.initial_policy import policy_document
from z1_jax.models import presets
from z1_jax.plan import __main__ as plan
from z1_jax.policy import architecture

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "one-gpu.md").read_text()
INSTRUCTIONS = ("open the drawer", "close the drawer", "open the left drawer", "open the right drawer")
MAIN, LIBERO = (part.partition("\n## When something")[0] for part in PAGE.split("\n## LIBERO instead of RoboCasa"))
PRESET = {"24 GB": "sft.py:robocasa_lora", "80 GB": "sft.py:robocasa"}
SHORT = {
    "sft": "sft.steps=2 sft.batch_size=2",
    "grpo": "group.count=1 group.prefix_chunks=1 train.iterations=1 reward.keep_low=0 update.batch_size=4 "
    "update.micro_batch=4 flow.steps=2 eval.video_size=32",
    "eval": "flow.steps=2 eval.video_size=32",
}
ALL = "env.horizon=20 env.parallel=4 env.workers=0 env.image_size=32 eval.episodes=2"
LIBERO_WORDS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "pick up the black bowl next to the ramekin and place it on the plate",
)
LIBERO_ALL = "tasks=libero_spatial/0,libero_spatial/1 env.horizon=10 env.parallel=2 env.workers=1 eval.episodes=1"
LIBERO_SHORT = {
    "sft": "sft.steps=2 sft.batch_size=2",
    "grpo": "group.count=2 group.size=2 train.iterations=1 reward.keep_low=0 update.batch_size=8 "
    "update.micro_batch=4 flow.steps=2 eval.video_size=32",
    "eval": "flow.steps=2 eval.video_size=32",
}
WORLDS = {
    "kitchen": "env.suite=kitchen env.scenes= eval.scenes= eval.objects=",
    "robocasa": "env.standins=true env.scenes=1/1 eval.scenes=1/1",
}


def commands(text: str, card: str) -> list[list[str]]:
    """A text's commands of this project for a card, in their order, each as its words from the module on.

    What stands behind "On 24 GB:" or "On 80 GB:" is for that card, all else for both.
    """
    found, left_out = [], 0
    for said, code in re.findall(r"([^\n]*)\n*^```bash\n(.*?)^```", text, flags=re.M | re.S):
        if (size := re.search(r"On (\d+ GB):$", said)) and size[1] != card:
            left_out += 1
            continue
        lines = code.replace("\\\n", "").splitlines()
        found += [shlex.split(line)[2:] for line in lines if "-m z1_jax." in line]
    assert left_out == text.count("On 24 GB:") == text.count("On 80 GB:") > 0
    return found


def published(
    folder: pathlib.Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, words: Sequence[str] = INSTRUCTIONS
) -> None:
    """What the page downloads: weights with statistics of another robot, a tokenizer, demonstrations."""
    tokenizer = folder / "paligemma_tokenizer.model"
    train_small_tokenizer(words, tokenizer)
    monkeypatch.setattr(made, "ACTIONS", 32)
    monkeypatch.setattr(made, "VOCABULARY", load_tokenizer(tokenizer, 1).vocab_size)
    # Of unit size they would make velocities that bfloat16 rounds by more than the ratios of an update may be off.
    weights = {name: 0.1 * weight for name, weight in made.jax_weights(rng).items()}
    made.save_openpi(folder / "pi05_base", weights, made.statistics(rng))
    (folder / "robocasa-demos").mkdir()
    demos = demo_files.make_demos(rng, steps=(60, 55, 70))
    for demo in demos:
        demo.instruction = "open the drawer"
    demo_files.write_lerobot(folder / "robocasa-demos" / "lerobot", demos)


def require(world: str) -> None:
    if world == "robocasa":
        try:
            compat.find()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize(
    ("card", "world"),
    [
        ("24 GB", "kitchen"),
        pytest.param("80 GB", "kitchen", marks=pytest.mark.slow),
        pytest.param("24 GB", "robocasa", marks=pytest.mark.slow),
        pytest.param("80 GB", "robocasa", marks=pytest.mark.slow),
    ],
)
def test_the_page_works_command_by_command(card, world, tmp_path, monkeypatch, rng, capfd):
    require(world)
    monkeypatch.chdir(tmp_path)
    published(tmp_path, rng, monkeypatch)
    monkeypatch.setattr(opening, "make_mesh", lambda config: tiny.one_device())  # the tests have eight devices
    told: dict[str, str] = {}
    for module, *arguments in commands(MAIN, card):
        name = module.removeprefix("z1_jax.")
        if arguments[:2] == ["pi05_base", "checkpoints/pi05"]:
            arguments += ["--heads=4", "--vision-heads=3", "--prompt-length=96"]
            arguments += ["--dtype=bfloat16"] * (card == "24 GB")
        if name in ("train", "evaluate", "plan"):
            kind = arguments[0].removeprefix("--config=configs/").partition(".")[0]
            arguments += [f"--config.{setting}" for setting in f"{ALL} {SHORT[kind]} {WORLDS[world]}".split()]
        main = importlib.import_module(f"{module}.__main__" if name in ("convert", "collect", "plan") else module).main
        assert not main([module, *arguments]), f"{module} {' '.join(arguments)}"
        out = told[name] = told.get(name, "") + capfd.readouterr().out
        assert "error" not in out
        if name == "convert" and not (tmp_path / "data").exists():
            monkeypatch.setitem(
                presets.PRESETS, "pi05", architecture(policy_document("checkpoints/pi05")["architecture"])
            )
    assert "it takes those of the dataset" in told["train"]
    summary = json.loads((tmp_path / "runs/drawer-grpo/summary.json").read_text())
    assert summary["task"] == "OpenDrawer" and summary["after"]["episodes"] == 2
    compared = json.loads((tmp_path / "runs/drawer-evaluation/summary.json").read_text())
    assert (tmp_path / "drawer-openpi/params").is_dir() and compared["after"]["episodes"] == 2
    own = json.loads((tmp_path / "drawer-openpi" / "z1_jax.json").read_text())
    assert own["executed"] == 5 and len(own["cameras"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("card", ["24 GB", "80 GB"])
def test_the_part_about_libero_works_command_by_command(card, tmp_path, monkeypatch, rng, capfd):
    """In the real LIBERO, two tasks of the suite; random demonstrations in the layout of openpi's dataset."""
    try:
        libero.find()
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    published(tmp_path, rng, monkeypatch, words=LIBERO_WORDS)
    openpi_layout.write(tmp_path / "libero-demos", [openpi_episode(rng, words) for words in 2 * LIBERO_WORDS])
    monkeypatch.setattr(opening, "make_mesh", lambda config: tiny.one_device())
    told: dict[str, str] = {}
    for module, *arguments in commands(LIBERO, card):
        name = module.removeprefix("z1_jax.")
        if arguments[0] == "pi05_base":
            arguments += ["--heads=4", "--vision-heads=3", "--prompt-length=96"]
            arguments += ["--dtype=bfloat16"] * (card == "24 GB")
        if name in ("train", "evaluate"):
            kind = arguments[0].removeprefix("--config=configs/").partition(".")[0]
            arguments += [f"--config.{setting}" for setting in f"{LIBERO_ALL} {LIBERO_SHORT[kind]}".split()]
        main = importlib.import_module(f"{module}.__main__" if name in ("convert", "collect") else module).main
        assert not main([module, *arguments]), f"{module} {' '.join(arguments)}"
        told[name] = told.get(name, "") + capfd.readouterr().out
        if name == "convert" and not (tmp_path / "data").exists():
            converted = policy_document("checkpoints/pi05-libero")
            monkeypatch.setitem(presets.PRESETS, "pi05", architecture(converted["architecture"]))
    assert "it takes those of the dataset" in told["train"] and "0 left out" in told["collect"]
    assert "differs: rate" not in told["train"] and "differs: frame" not in told["train"]
    summary = json.loads((tmp_path / "runs/libero-grpo/summary.json").read_text())
    compared = json.loads((tmp_path / "runs/libero-evaluation/summary.json").read_text())
    assert summary["after"]["episodes"] == compared["after"]["episodes"] == 2
    own = json.loads((tmp_path / "libero-openpi" / "z1_jax.json").read_text())
    assert own["executed"] == 5 and own["cameras"] == ["agentview", "robot0_eye_in_hand", None]


def openpi_episode(rng: np.random.Generator, words: str, steps: int = 20) -> dict[str, object]:
    pictures = rng.integers(0, 256, (2, steps, 256, 256, 3), dtype=np.uint8)
    numbers = {"state": rng.normal(size=(steps, 8)), "actions": rng.uniform(-1, 1, (steps, 7))}
    return {"image": pictures[0], "wrist_image": pictures[1], **numbers, "task": words}


@pytest.mark.slow
@pytest.mark.parametrize("column", [1, 2])
def test_the_pages_memory_is_what_the_plan_says(column, capfd):
    cards = ("RTX4090", "H100")
    table = PAGE.partition("<!-- planned -->")[2].partition("<!-- end planned -->")[0].strip().splitlines()
    assert len(table) == 5
    for line in table[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        arguments = [f"--config=configs/{cells[0].strip('`')}", "--config.task=OpenDrawer", "--compile=no", "--json"]
        failed = plan.main(["", *arguments, f"--accelerator={cards[column - 1]}"])
        document = json.loads(capfd.readouterr().out)
        peak = document["peak_bytes"] / 1e9
        if failed:
            assert cells[column] == "does not fit", line
        else:
            assert cells[column].startswith(f"{peak:.1f} of {document['memory_bytes'] / 1e9:.1f} GB"), line
