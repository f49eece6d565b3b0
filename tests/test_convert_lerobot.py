"""LeRobot's configs and processors, key by key: what is read, what is refused, and how the state gets into the prompt.

The keys and steps of each version were written down from LeRobot's own sources.
"""

import copy
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from z1_jax.checkpoint import Checkpoints
from z1_jax.convert import __main__ as convert
from z1_jax.convert.keys import Ignored, read_json
from z1_jax.convert.lerobot import read_config, relative_config, relative_mask
from z1_jax.data.normalize import stats_from_json
from z1_jax.data.transforms import InputProcessor
from z1_jax.errors import UserError

REFERENCE = pathlib.Path(__file__).parent / "reference" / "lerobot"
HEADS = ("--heads=4", "--vision-heads=2")  # the reference's sizes are not those of the names in its config
NORMALIZER, PREPARE = "normalizer_processor", "pi05_prepare_state_tokenizer_processor_step"
# `PI05Config` and its base class in 0.4.0, and what the later versions added, with their defaults.
KEYS_0_4_0 = {
    "type", "n_obs_steps", "input_features", "output_features", "device", "use_amp", "push_to_hub", "repo_id",
    "private", "tags", "license", "pretrained_path", "paligemma_variant", "action_expert_variant", "dtype",
    "chunk_size", "n_action_steps", "max_state_dim", "max_action_dim", "num_inference_steps",
    "time_sampling_beta_alpha", "time_sampling_beta_beta", "time_sampling_scale", "time_sampling_offset", "min_period",
    "max_period", "image_resolution", "empty_cameras", "tokenizer_max_length", "normalization_mapping",
    "gradient_checkpointing", "compile_model", "compile_mode", "optimizer_lr", "optimizer_betas", "optimizer_eps",
    "optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_warmup_steps", "scheduler_decay_steps",
    "scheduler_decay_lr",
}  # fmt: skip
ADDED_0_4_4 = {"rtc_config": None, "freeze_vision_encoder": False, "train_expert_only": False, "use_peft": False}
ADDED_0_5_1 = {"use_relative_actions": False, "relative_exclude_joints": ["gripper"], "action_feature_names": None}
ADDED_0_6_1 = {"pretrained_revision": None}
ADDED_0_6_2 = {
    "use_visual_memory": False, "use_proprioceptive_memory": False, "memory_frames": 6, "memory_stride": 30,
    "memory_temporal_attention_every": 4, "rtc_training_max_delay": 0,
}  # fmt: skip


def made(folder: pathlib.Path, config=None, before=None, after=None, card=None, train=None) -> pathlib.Path:
    """The reference with some of its config replaced; `before` and `after` change the processors' steps in place."""
    shutil.copytree(REFERENCE, folder)
    rewrite(folder / "config.json", lambda content: content.update(config or {}))
    rewrite(folder / "policy_preprocessor.json", lambda content: before and before(content["steps"]))
    rewrite(folder / "policy_postprocessor.json", lambda content: after and after(content["steps"]))
    if card is not None:
        (folder / "README.md").write_text(card)
    if train is not None:
        (folder / "train_config.json").write_text(json.dumps(train))
    return folder


def rewrite(path: pathlib.Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def step(name: str, **config) -> dict:
    return {"registry_name": name, "config": config}


def as_0_6_2(steps: list) -> None:
    """The preprocessor that LeRobot 0.6.2 saves."""
    tokenizer = {"max_length": 10, "task_key": "task", "padding_side": "right", "padding": "max_length"}
    name = {"truncation": True, "tokenizer_name": "google/paligemma-3b-pt-224"}
    steps[:0] = [
        step("rename_observations_processor", rename_map={}),
        step("to_batch_processor"),
        step("relative_actions_processor", enabled=False, exclude_joints=[], action_names=None),
    ]
    steps += [step(PREPARE), step("tokenizer_processor", **tokenizer, **name)]
    steps += [step("device_processor", device="cpu", float_dtype=None)]


def settings(folder: pathlib.Path, *ignored: str) -> dict:
    return read_config(folder, read_json(folder / "config.json"), Ignored(ignored))


def run(*arguments: object) -> int:
    return convert.convert(convert.parse_arguments([str(argument) for argument in arguments]))


def document(place: pathlib.Path) -> dict:
    return dict(Checkpoints(place).document(0))


def test_the_keys_of_every_version_are_known(tmp_path):
    config = json.loads((REFERENCE / "config.json").read_text())
    assert KEYS_0_4_0 | set(ADDED_0_4_4) == set(config)  # LeRobot 0.4.4 itself saved the reference
    shutil.copytree(REFERENCE, tmp_path / "0.4.0")
    (tmp_path / "0.4.0/config.json").write_text(json.dumps({key: config[key] for key in KEYS_0_4_0}))
    expected = settings(REFERENCE)
    assert settings(tmp_path / "0.4.0") == expected
    newer = {**ADDED_0_5_1, **ADDED_0_6_1, **ADDED_0_6_2}
    for number, added in enumerate((ADDED_0_5_1, ADDED_0_5_1 | ADDED_0_6_1, newer)):
        assert settings(made(tmp_path / str(number), added, as_0_6_2)) == {**expected, "pads_state": False}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_visual_memory": True}, "use_visual_memory=True.*images of earlier steps"),
        ({"use_proprioceptive_memory": True}, "use_proprioceptive_memory=True"),
        ({"use_peft": True}, "use_peft=True.*has no adapter_config.json"),
        ({"min_period": 0.02}, "min_period=0.02.*expected 0.004"),
        ({"max_period": 8.0}, "max_period=8.0.*expected 4.0"),
        ({"n_obs_steps": 2}, "n_obs_steps=2.*expected 1"),
        ({"swap_channels": True}, "has swap_channels, .*--ignore=swap_channels"),
        ({"paligemma_variant": "gemma_9b"}, "paligemma_variant='gemma_9b'; expected one of gemma_2b"),
        ({"chunk_size": -3}, "chunk_size is -3; expected a whole number of at least 1"),
        ({"num_inference_steps": "ten"}, "num_inference_steps is 'ten'"),
        ({"image_resolution": [28, 56]}, r"image_resolution=\[28, 56\]; expected a square"),
        ({"normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "QUANTILES", "ACTION": "QUANTILES"}}, "images by"),
        ({"normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}}, "make them say the same"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, config, message):
    source = made(tmp_path / "source", config)
    with pytest.raises(UserError, match=message) as error:
        run(source, tmp_path / "ours", *HEADS, "--pad-state=none")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["source"]


def norm_map(mode: str):
    return lambda steps: steps[-1]["config"].update(norm_map={"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode})


def changed(name: str, **config):
    """The steps of 0.6.2 with one of them changed."""

    def change(steps: list) -> None:
        as_0_6_2(steps)
        next(entry for entry in steps if entry["registry_name"] == name)["config"].update(config)

    return change


def moved_last(steps: list) -> None:
    as_0_6_2(steps)
    steps.append(steps.pop(3))


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (lambda steps: steps.insert(0, step("my_flip_images_processor")), "--ignore=my_flip_images_processor"),
        (lambda steps: steps.insert(0, {"class": "mine.Flip", "config": {}}), "has mine.Flip, "),
        (lambda steps: steps.append(copy.deepcopy(steps[0])), f"has {NORMALIZER} twice"),
        (moved_last, "has its steps in the order .*expected .*normalizer_processor, pi05_prepare"),
        (lambda steps: steps.append(step("tokenizer_processor")), "tokenizer_processor without pi05_prepare"),
        (norm_map("MEAN_STD"), "preprocessor.json normalises .*MEAN_STD.*config.json says .*QUANTILES"),
        (changed("relative_actions_processor", enabled=True), "says that actions are relative to the state"),
        (changed("relative_actions_processor", enabled="yes"), "relative_actions_processor has enabled='yes'"),
        (changed(PREPARE, include_state_in_prompt=False), "include_state_in_prompt=False"),
        (changed(PREPARE, task_key="words"), "task_key='words'"),
        (changed(PREPARE, bins=1024), f"--ignore={PREPARE}.bins"),
        (changed("tokenizer_processor", tokenizer_name="google/gemma-2b"), "tokenizer_name='google/gemma-2b'"),
        (changed("tokenizer_processor", padding_side="left"), "padding_side='left'"),
        (changed("device_processor", float_dtype="float16"), "float_dtype='float16'"),
        (changed(NORMALIZER, eps=0.1), "eps=0.1"),
        (changed(NORMALIZER, features={}), "does not normalise observation.state"),
        (changed(NORMALIZER, normalize_observation_keys=["x"]), "does not normalise observation.state"),
        (changed("rename_observations_processor", rename_map={"observation.images.base_0_rgb": "x"}), "renames"),
    ],
)  # fmt: skip
def test_processors_that_are_refused(tmp_path, before, message):
    with pytest.raises(UserError, match=message) as error:
        settings(made(tmp_path / "source", before=before))
    assert "\n" not in str(error.value)


def test_postprocessors_that_are_refused(tmp_path):
    source = made(tmp_path / "a", after=norm_map("MEAN_STD"))
    with pytest.raises(UserError, match="policy_postprocessor.json normalises"):
        settings(source)
    source = made(tmp_path / "b", after=lambda steps: steps.append(step("absolute_actions_processor", enabled=True)))
    with pytest.raises(UserError, match="absolute_actions_processor. says that actions are"):
        settings(source)
    source = made(tmp_path / "c")
    file = source / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    values = load_file(file)
    values["action.q99"][0] += 1
    save_file(values, file)
    with pytest.raises(UserError, match="hold different statistics of the actions"):
        run(source, tmp_path / "ours", *HEADS, "--pad-state=none")


def test_what_the_arrays_contradict_is_refused(tmp_path):
    for number, (config, message) in enumerate(
        [
            ({"image_resolution": [224, 224]}, "says image_size=224, the arrays say 28"),
            ({"max_action_dim": 32}, "says action_dim=32, the arrays say 7"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            run(made(tmp_path / str(number), config), tmp_path / "ours", *HEADS, "--pad-state=none")


def test_what_processors_say_is_what_counts(tmp_path):
    """As LeRobot, which runs them: the prompt's length, cameras by the environment's names."""
    renamed = {"observation.images.front": "observation.images.base_0_rgb"}
    assert settings(made(tmp_path / "a", None, changed("tokenizer_processor", max_length=77)))["prompt_length"] == 77
    cameras = settings(made(tmp_path / "b", None, changed("rename_observations_processor", rename_map=renamed)))
    assert cameras["cameras"] == ["front", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    assert settings(made(tmp_path / "c", {"empty_cameras": 1}))["cameras"][3:] == [None]


def test_an_unknown_key_that_is_ignored_is_recorded(tmp_path, capsys):
    source = made(tmp_path / "source", {"swap_channels": True}, lambda steps: steps.insert(0, step("my_step")))
    ignored = ("--ignore=my_step,swap_channels", "--pad-state=none")
    run(source, tmp_path / "ours", *HEADS, *ignored)
    assert document(tmp_path / "ours")["ignored"] == ["my_step", "swap_channels"]
    assert "ignored as without effect: my_step, swap_channels" in capsys.readouterr().out
    with pytest.raises(UserError, match="--ignore names chunk_size, which is known or not there"):
        run(source, tmp_path / "other", *HEADS, *ignored, "--ignore=my_step,swap_channels,chunk_size")


# --- the state in the prompt

OLD_CARD, NEW_CARD = "| LeRobot version | 0.4.3 |", "| LeRobot version | 0.6.1 |"


def without_relative(steps: list) -> None:
    as_0_6_2(steps)
    del steps[2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"before": without_relative}, None),
        ({"before": as_0_6_2}, False),
        ({"config": ADDED_0_5_1}, False),
        ({"config": ADDED_0_6_2}, False),
        ({"card": NEW_CARD}, False),
        ({"card": OLD_CARD}, True),
        ({"train": {"steps": 3, "cudnn_deterministic": False}}, False),  # 0.5.0 and later write it
        ({"train": {"steps": 3}}, True),
        ({"train": {"steps": 3}, "config": ADDED_0_5_1}, None),  # trained by an old one, saved again by a new one
    ],
)
def test_which_lerobot_padded_the_state(tmp_path, changes, expected):
    assert settings(made(tmp_path / "source", **changes))["pads_state"] is expected


class Numbers:
    """Stands for a tokenizer and keeps the numbers that it is given to write."""

    prompt_length = 10

    def encode_batch(self, texts, values):
        self.values = values
        return np.zeros((len(texts), 10), np.int32), np.ones((len(texts), 10), bool)


def numbers_in_prompt(place: pathlib.Path) -> int:
    content, tokenizer = document(place), Numbers()
    stats = stats_from_json(content["norm_stats"])
    processor = InputProcessor(
        tokenizer=tokenizer, stats=stats, cameras=tuple(content["cameras"]), image_size=28, action_dim=7,
        state_in_prompt=content["state_in_prompt"], prompt_state_dim=content["prompt_state_dim"],
    )  # fmt: skip
    processor.prompts(["pick the cup"], stats["state"].mean[None])
    return tokenizer.values.shape[1]


def test_the_numbers_in_the_prompt(tmp_path, capsys):
    """Six, the state's width, from a new LeRobot; padded from an old one; asked where nothing tells."""
    new = made(tmp_path / "new", {"max_state_dim": 32, **ADDED_0_5_1, **ADDED_0_6_2}, as_0_6_2)
    run(new, tmp_path / "ours", *HEADS)
    assert numbers_in_prompt(tmp_path / "ours") == 6
    assert "prompt: holds the state\n" in capsys.readouterr().out
    old = made(tmp_path / "old", {"max_state_dim": 32}, train={"steps": 3})
    run(old, tmp_path / "padded", *HEADS)
    assert numbers_in_prompt(tmp_path / "padded") == 32
    assert "prompt: holds the state, padded to 32 numbers" in capsys.readouterr().out
    unknown = made(tmp_path / "unknown", {"max_state_dim": 32})
    with pytest.raises(
        UserError, match="give --pad-state=32 if LeRobot 0.4.4 .*--pad-state=none if a newer one"
    ) as error:
        run(unknown, tmp_path / "none", *HEADS)
    assert "\n" not in str(error.value)
    for flag, expected in (("none", 6), ("32", 32)):
        run(unknown, tmp_path / flag, *HEADS, f"--pad-state={flag}")
        assert numbers_in_prompt(tmp_path / flag) == expected
    whole = made(tmp_path / "whole", {"max_state_dim": 6})  # nothing to pad: nothing to ask
    run(whole, tmp_path / "six", *HEADS)
    assert document(tmp_path / "six")["prompt_state_dim"] is None


def test_the_export_keeps_how_prompts_are_made_or_is_refused(tmp_path, capsys):
    run(made(tmp_path / "source", {"max_state_dim": 32}), tmp_path / "padded", *HEADS, "--pad-state=32")
    with pytest.raises(
        UserError, match="padded to 32 numbers, as only LeRobot 0.4.4 and older do; give --pad-state=32"
    ):
        run(tmp_path / "padded", tmp_path / "back", "--to=lerobot")
    assert not (tmp_path / "back").exists()
    run(tmp_path / "padded", tmp_path / "old", "--to=lerobot", "--pad-state=32")
    assert "only LeRobot 0.4.4 and older pads" in capsys.readouterr().out
    run(tmp_path / "padded", tmp_path / "new", "--to=lerobot", "--pad-state=none")
    for name, width in (("old", 32), ("new", 6)):  # LeRobot pads to this, or leaves a state of six as it is
        assert json.loads((tmp_path / name / "config.json").read_text())["max_state_dim"] == width
        steps = json.loads((tmp_path / name / "policy_preprocessor.json").read_text())["steps"]
        assert {"max_state_dim": width} in [entry["config"] for entry in steps]
    (tmp_path / "new/z1_jax.json").unlink()
    run(tmp_path / "new", tmp_path / "again", *HEADS)  # without a question: there is nothing to pad
    assert numbers_in_prompt(tmp_path / "again") == 6
    run(tmp_path / "padded", tmp_path / "stateless", "--to=openpi", "--no-state-in-prompt")
    run(tmp_path / "stateless", tmp_path / "ours")
    assert document(tmp_path / "ours")["state_in_prompt"] is False
    with pytest.raises(UserError, match="prompt holds no state, and LeRobot always writes it there"):
        run(tmp_path / "ours", tmp_path / "none", "--to=lerobot")
    with pytest.raises(UserError, match="is LeRobot's, whose prompts hold the state"):
        run(tmp_path / "source", tmp_path / "none", *HEADS, "--no-state-in-prompt")


JOINTS = ["j1", "j2", "j3", "j4", "gripper"]


def relative(folder: pathlib.Path, exclude=("gripper",), names=tuple(JOINTS), **config) -> pathlib.Path:
    """The reference with relative actions, as LeRobot 0.5.1 and later save such a policy."""
    settings = {"use_relative_actions": True, "relative_exclude_joints": list(exclude), "action_feature_names": names}
    offsets = step("relative_actions_processor", enabled=True, exclude_joints=list(exclude), action_names=names)

    def before(steps: list) -> None:
        as_0_6_2(steps)
        steps[2] = offsets

    def after(steps: list) -> None:
        steps.insert(1, step("absolute_actions_processor", enabled=True))

    return made(folder, {**settings, **config}, before, after)


@pytest.mark.parametrize(
    ("exclude", "names", "expected"),
    [
        (("gripper",), JOINTS, [True] * 4 + [False]),
        (("J",), JOINTS, [False] * 4 + [True]),  # a part of a name counts, in any case
        (("j1", "GRIP"), JOINTS, [False] + [True] * 3 + [False]),
        ((), JOINTS, [True] * 5),
        (("gripper",), None, [True] * 5),  # LeRobot leaves nothing out where it has no names
    ],
)
def test_relative_actions_are_read_as_lerobot_runs_them(tmp_path, exclude, names, expected):
    got = settings(relative(tmp_path / "source", exclude, names))["relative_actions"]
    assert got == {"mask": expected, "names": names or []}


def test_relative_actions_travel_there_and_back(tmp_path, capsys):
    source = relative(tmp_path / "source")
    run(source, tmp_path / "ours", *HEADS)
    assert "actions: action dimensions 0..3 are offsets from the state" in capsys.readouterr().out
    assert document(tmp_path / "ours")["relative_actions"]["mask"] == [True] * 4 + [False]
    run(tmp_path / "ours", tmp_path / "back", "--to=lerobot")
    assert settings(tmp_path / "back") == {**settings(source), "max_state_dim": 6}  # nothing is padded
    for name in ("policy_preprocessor", "policy_postprocessor"):
        steps = [s["registry_name"] for s in json.loads((tmp_path / "back" / f"{name}.json").read_text())["steps"]]
        expected = [s["registry_name"] for s in json.loads((source / f"{name}.json").read_text())["steps"]]
        assert [s for s in steps if "device" not in s] == [s for s in expected if "device" not in s]
    run(tmp_path / "ours", tmp_path / "openpi", "--to=openpi")
    assert "DeltaActions and AbsoluteActions with the mask (True, True, True, True, False)" in (capsys.readouterr().out)
    run(tmp_path / "openpi", tmp_path / "again")  # the sidecar tells what openpi's files have no place for
    assert document(tmp_path / "again")["relative_actions"] == document(tmp_path / "ours")["relative_actions"]


def test_names_that_do_not_tell_dimensions_apart_are_made_up(tmp_path):
    """Leaving out j1 would leave out j10 as well."""
    values = {"mask": [True, False], "names": ["j10", "j1"]}
    written = relative_config(values, 2)
    assert written["action_feature_names"] == ["relative_0", "absolute_1"]
    for content in (written, relative_config({"mask": [False, True], "names": []}, 3)):
        mask = relative_mask(content["action_feature_names"], content["relative_exclude_joints"], 3)
        assert mask[:2] in ([True, False], [False, True])
    assert relative_config(None, 7) == {}


def test_relative_actions_that_the_files_tell_in_two_ways_are_refused(tmp_path):
    source = relative(tmp_path / "a")
    rewrite(source / "policy_postprocessor.json", lambda content: content["steps"].pop(1))
    with pytest.raises(
        UserError, match=r"config.json, policy_preprocessor.json .* says that actions are relative.*not"
    ):
        settings(source)
    with pytest.raises(UserError, match="policy_preprocessor.json .* says that actions are relative"):
        settings(relative(tmp_path / "b", use_relative_actions=False))
    with pytest.raises(UserError, match="leave out all of"):
        settings(relative(tmp_path / "c", exclude=("j", "gripper")))
    with pytest.raises(
        UserError, match="--relative-actions was given, .* says that action dimensions 0..3 are offsets"
    ):
        run(relative(tmp_path / "d"), tmp_path / "ours", *HEADS, "--relative-actions=5")
    run(relative(tmp_path / "e"), tmp_path / "ours", *HEADS, "--relative-actions=4,-1")  # the same again does no harm


def test_openpis_checkpoints_need_the_flag(tmp_path, capsys):
    """Nothing in them tells; the table says what was assumed."""
    source = REFERENCE.parent / "openpi_pytorch"
    flags = (*HEADS, "--horizon=6", "--no-state-in-prompt")
    run(source, tmp_path / "a", *flags)
    assert (
        "actions: absolute; nothing in openpi's checkpoints tells: give --relative-actions" in capsys.readouterr().out
    )
    run(source, tmp_path / "b", *flags, "--relative-actions=2,-1,2")
    assert document(tmp_path / "b")["relative_actions"]["mask"] == [True, True, False, True, True]
    for mask, message in (("9", "dimension 8 is relative"), ("six", "is no mask"), ("-6", "no dimension is relative")):
        with pytest.raises(UserError, match=f"--relative-actions.*{message}"):
            run(source, tmp_path / "c", *flags, f"--relative-actions={mask}")
