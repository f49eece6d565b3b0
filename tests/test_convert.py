"""Conversion both ways against tensors that were laid out by hand, and every kind of bad input."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pi05_checkpoints as made
import pytest
import tiny_policy as tiny
from safetensors.numpy import load_file, save_file
from seeds import fresh_seed

from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.config.schema import ConfigError
from z1_jax.convert import __main__ as convert
from z1_jax.convert import openpi_names, targets, transfer
from z1_jax.errors import UserError
from z1_jax.policy import find_policy, load_policy, named

EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
TIED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"


def run(*arguments: object) -> int:
    return convert.convert(convert.parse_arguments([str(argument) for argument in arguments]))


@dataclasses.dataclass(frozen=True)
class Case:
    """One model in both of openpi's formats, on disk and in memory."""

    folder: pathlib.Path
    jax: dict[str, np.ndarray]
    torch: dict[str, np.ndarray]
    stats: dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    seed = fresh_seed(__name__, "case")
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("sources")
    flat, stats = made.jax_weights(rng), made.statistics(rng)
    case = Case(folder, flat, made.torch_weights(flat), stats)
    made.save_openpi(folder / "openpi", flat, stats)
    (folder / "pytorch").mkdir()
    save_file(case.torch, folder / "pytorch" / "model.safetensors")
    made.save_assets(folder / "pytorch", stats)
    return case


@pytest.fixture(scope="module")
def ours(case, tmp_path_factory) -> pathlib.Path:
    """The PyTorch checkpoint, converted."""
    place = tmp_path_factory.mktemp("ours") / "policy"
    assert run(case.folder / "pytorch", place, *made.FLAGS, "--norm-mode=z_score") == 0
    return place


def assert_same(got, expected) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def arrays_of(step: pathlib.Path) -> dict[str, np.ndarray]:
    """A checkpoint of ours by Orbax itself."""
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load_checkpointables(step)["params"]
    return {name: np.asarray(value) for name, value in tree.items()}


def test_openpi_jax_and_pytorch_become_the_same_checkpoint(case, ours, tmp_path, capsys):
    assert (
        run(case.folder / "openpi", tmp_path / "other", "--horizon=5", "--prompt-length=48", "--state-in-prompt") == 0
    )
    table = capsys.readouterr().out
    from_torch, from_jax = arrays_of(ours / "0"), arrays_of(tmp_path / "other" / "0")
    assert_same(from_jax, from_torch)
    # The same by the model's own map, which another test holds against reference numbers.
    config = convert.architecture(Checkpoints(ours).document(0)["architecture"])
    assert_same(from_torch, {k: np.asarray(v) for k, v in named(openpi_names.from_openpi(case.jax, config)).items()})
    assert (config.language.heads, config.language.kv_heads, config.language.head_dim) == (made.N, made.K, made.H)
    assert (config.vision.heads, config.vision.image_size, config.action_dim) == (made.HEADS, 12, made.ACTIONS)
    count = sum(value.size for value in case.jax.values())
    assert f"{count:,}" in table and "51" in table and "float32" in table


def test_every_format_and_back_is_bit_identical(case, ours, tmp_path, capsys):
    run(ours, tmp_path / "openpi", "--to=openpi")
    run(ours, tmp_path / "pytorch", "--to=openpi-pytorch")
    run(ours, tmp_path / "lerobot", "--to=lerobot")
    assert_same(made.load_openpi(tmp_path / "openpi"), case.jax)
    used = {name: value for name, value in case.torch.items() if name != UNUSED}
    exported = load_file(tmp_path / "pytorch" / "model.safetensors")
    assert (exported.pop(UNUSED) == 0).all()
    assert_same(exported, used)
    exported = load_file(tmp_path / "lerobot" / "model.safetensors")
    assert (exported.pop(f"model.{UNUSED}") == 0).all()
    assert_same(exported, {f"model.{name}": value for name, value in used.items()})
    document, checksums = Checkpoints(ours).document(0), Checkpoints(ours).checksums(0, "params")
    for name in ("openpi", "pytorch", "lerobot"):
        run(tmp_path / name, tmp_path / "back" / name)
        again = Checkpoints(tmp_path / "back" / name)
        assert_same(arrays_of(tmp_path / "back" / name / "0"), arrays_of(ours / "0"))
        assert again.checksums(0, "params") == checksums
        expected = {**document, "asset_id": None} if name == "lerobot" else document
        got = {**again.document(0), "asset_id": None} if name == "lerobot" else again.document(0)
        assert got == expected
    # Directly from one to the other, without ours between.
    run(case.folder / "openpi", tmp_path / "direct", "--to=openpi-pytorch", "--horizon=5", "--state-in-prompt")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    direct.pop(UNUSED)
    assert_same(direct, used)


def test_statistics_and_settings_travel(case, ours, tmp_path):
    document = Checkpoints(ours).document(0)
    for key, fields in case.stats.items():
        for field, values in fields.items():
            assert document["norm_stats"][key][field] == values
        assert document["norm_stats"][key]["rule"] == "openpi"  # acts as it acts there
    assert document["asset_id"] == "tiny_robot" and document["norm_mode"] == "z_score"
    run(ours, tmp_path / "pytorch", "--to=openpi-pytorch")
    written = json.loads((tmp_path / "pytorch/assets/tiny_robot/norm_stats.json").read_text())["norm_stats"]
    assert written == case.stats
    run(ours, tmp_path / "lerobot", "--to=lerobot", "--cameras=front,none,wrist")
    config = json.loads((tmp_path / "lerobot/config.json").read_text())
    assert (config["chunk_size"], config["max_action_dim"], config["normalization_mapping"]["STATE"]) == (
        *(made.HORIZON, made.ACTIONS),
        "MEAN_STD",
    )
    images = [name for name, value in config["input_features"].items() if value["type"] == "VISUAL"]
    assert images == [f"observation.images.{name}" for name in ("front", "empty_camera_0", "wrist")]
    state_file = json.loads((tmp_path / "lerobot/policy_preprocessor.json").read_text())["steps"][2]["state_file"]
    stats = load_file(tmp_path / "lerobot" / state_file)
    np.testing.assert_array_equal(stats["observation.state.q99"], case.stats["state"]["q99"])
    np.testing.assert_array_equal(stats["action.mean"], case.stats["actions"]["mean"])


def test_bfloat16_keeps_norms_and_comes_back(case, tmp_path):
    source = tmp_path / "bf16"
    source.mkdir()
    rounded = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in case.torch.items()}
    write_bfloat16(source / "model.safetensors", rounded)
    made.save_assets(source, case.stats)
    run(source, tmp_path / "a", *made.FLAGS)  # to float32
    run(source, tmp_path / "b", *made.FLAGS, "--dtype=bfloat16")
    run(source, tmp_path / "c", *made.FLAGS, "--dtype=source")
    a, b, c = (arrays_of(tmp_path / name / "0") for name in "abc")
    assert {value.dtype.name for value in a.values()} == {"float32"}
    assert {value.dtype.name for value in c.values()} == {"bfloat16"}
    for name, value in a.items():
        np.testing.assert_array_equal(b[name].astype(np.float32), value)
        np.testing.assert_array_equal(c[name].astype(np.float32), value)
        is_float32 = any(word in name for word in ("norm", "position", "patch", "action_", "time_"))
        assert (b[name].dtype == np.float32) == is_float32, name
    run(tmp_path / "c", tmp_path / "again", "--to=openpi-pytorch", "--dtype=source")
    again = tmp_path / "again" / "model.safetensors"
    assert tensor_bytes(again, skip=UNUSED) == tensor_bytes(source / "model.safetensors", skip=UNUSED)


def write_bfloat16(path: pathlib.Path, values) -> None:
    """A safetensors file by its specification: the library has no bfloat16 in NumPy."""
    header, blobs, offset = {}, [], 0
    for name, value in values.items():
        blob = value.astype(ml_dtypes.bfloat16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def tensor_bytes(path: pathlib.Path, skip: str) -> dict[str, tuple]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    entries = {name: entry for name, entry in header.items() if name not in ("__metadata__", skip)}
    return {
        name: (e["dtype"], tuple(e["shape"]), content[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in entries.items()
    }


def test_large_pieces_move_in_blocks(case, tmp_path, monkeypatch):
    """Blocks of a few rows, uneven ones among them, change nothing."""
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 900)
    assert transfer.rows_per_block((made.VOCABULARY, made.LANGUAGE)) == 10
    assert transfer.rows_per_block((17, made.LANGUAGE)) == 11  # a prime number of rows: the last block is short
    run(case.folder / "pytorch", tmp_path / "a", *made.FLAGS)
    run(tmp_path / "a", tmp_path / "b", "--to=openpi")
    assert_same(made.load_openpi(tmp_path / "b"), case.jax)
    run(tmp_path / "b", tmp_path / "c", "--to=openpi-pytorch")
    exported = load_file(tmp_path / "c" / "model.safetensors")
    exported.pop(UNUSED)
    assert_same(exported, {name: value for name, value in case.torch.items() if name != UNUSED})


def test_shards_the_tied_name_and_a_bare_file(case, ours, tmp_path):
    names = sorted(case.torch)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tied = {TIED if name == EMBEDDING else name: case.torch[name] for name in names}
    shards = [{name: tied[name] for name in list(tied)[i::3]} for i in range(3)]
    index = {}
    for i, shard in enumerate(shards):
        save_file(shard, sharded / f"model-{i}.safetensors")
        index |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    made.save_assets(sharded, case.stats)
    run(sharded, tmp_path / "a", *made.FLAGS)
    assert_same(arrays_of(tmp_path / "a" / "0"), arrays_of(ours / "0"))
    bare = tmp_path / "openpi_names.safetensors"
    save_file({**case.torch, TIED: case.torch[EMBEDDING]}, bare)
    run(bare, tmp_path / "b", *made.FLAGS, "--norm-stats=none")
    assert_same(arrays_of(tmp_path / "b" / "0"), arrays_of(ours / "0"))
    save_file({**case.torch, TIED: case.torch[EMBEDDING] + 1}, bare)
    with pytest.raises(UserError, match="tied, but their values differ"):
        run(bare, tmp_path / "c", *made.FLAGS, "--norm-stats=none")
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-1.safetensors, one of the 3 shards"):
        run(sharded, tmp_path / "d", *made.FLAGS)


def test_a_dry_run_prints_the_same_table_and_writes_nothing(case, tmp_path, capsys):
    run(case.folder / "pytorch", tmp_path / "a", *made.FLAGS, "--dry-run")
    dry = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "nothing was written" in dry
    run(case.folder / "pytorch", tmp_path / "a", *made.FLAGS)
    wet = capsys.readouterr().out
    rows = [line for line in dry.splitlines() if line.startswith(("vision", "language", "expert", "not used"))]
    assert len(rows) == 4 and all(row in wet for row in rows)
    assert f"not used: {UNUSED} [300, 16]" in dry


def test_a_converted_policy_loads_and_one_without_its_tokenizer_says_what_it_needs(case, ours, tmp_path):
    directory, step = find_policy(ours)
    mesh = tiny.one_device()
    with pytest.raises(CheckpointError, match=r"put SentencePiece's tokenizer.model \(300 tokens\) at .*/0/tokenizer"):
        load_policy(Checkpoints(directory), step, mesh)
    run(case.folder / "pytorch", tmp_path / "bare", *made.FLAGS, "--norm-stats=none")
    with pytest.raises(CheckpointError, match="without normalisation statistics"):
        load_policy(Checkpoints(tmp_path / "bare"), 0, mesh)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory) -> pathlib.Path:
    """A policy that this project made itself."""
    root = tmp_path_factory.mktemp("kitchen") / "policy"
    checkpoints = Checkpoints(root)
    checkpoints.save(3, tiny.policy(0).parts(), tiny.policy(0).document())
    checkpoints.close()
    return root


@pytest.mark.parametrize("format", ["openpi", "openpi-pytorch", "lerobot"])
def test_a_policy_of_ours_survives_the_journey(kitchen, tmp_path, format):
    run(kitchen, tmp_path / "theirs", f"--to={format}")
    run(tmp_path / "theirs", tmp_path / "back")
    loaded, policy = load_policy(Checkpoints(tmp_path / "back"), 0, tiny.one_device()), tiny.policy(0)
    assert_same(*({k: np.asarray(v) for k, v in named(p.params).items()} for p in (loaded, policy)))
    assert loaded.config == policy.config
    document = policy.document()
    assert loaded.document() == document
    assert loaded.processor.tokenizer.model_bytes == policy.processor.tokenizer.model_bytes


def test_arrays_of_zeros_are_written(kitchen, tmp_path):
    """A parameter that no gradient reached may be all zeros, which TensorStore would leave out and Orbax then miss."""
    run(kitchen, tmp_path / "theirs", "--to=openpi-pytorch")
    file = tmp_path / "theirs" / "model.safetensors"
    values = load_file(file)
    norms = [name for name in values if "language_model" in name and "post_attention_layernorm" in name]
    save_file({**values, **{name: np.zeros_like(values[name]) for name in norms}}, file)
    run(tmp_path / "theirs", tmp_path / "ours")
    loaded = named(load_policy(Checkpoints(tmp_path / "ours"), 0, tiny.one_device()).params)
    zeros = {name for name, value in loaded.items() if "language" in name and not np.any(value)}
    assert norms and {"language.layers.norm_mlp.scale", "language.last.norm_mlp.scale"} <= zeros


def test_policies_load_in_the_dtype_that_they_were_written_in(kitchen, tmp_path):
    run(kitchen, tmp_path / "theirs", "--to=openpi-pytorch")
    run(tmp_path / "theirs", tmp_path / "back", "--dtype=bfloat16")
    loaded = named(load_policy(Checkpoints(tmp_path / "back"), 0, tiny.one_device()).params)
    narrow = [name for name, value in loaded.items() if value.dtype == "bfloat16"]
    assert "language.embedding" in narrow and not any("norm" in name for name in narrow)
    for name, value in named(tiny.policy(0).params).items():
        assert name in narrow or loaded[name].dtype == np.float32
        np.testing.assert_allclose(loaded[name].astype(np.float32), value, rtol=2**-8, err_msg=name)


# --- bad input: one line each, no DST, SRC as it was


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_tensors(folder: pathlib.Path, case: Case, **changes) -> pathlib.Path:
    """The PyTorch checkpoint with some tensors replaced, or left out (None)."""
    folder.mkdir()
    values = {**case.torch, **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in values.items() if value is not None}, folder / "model.safetensors")
    made.save_assets(folder, case.stats)
    return folder


LAYER = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"


def nan(case: Case) -> np.ndarray:
    value = case.torch[LAYER].copy()
    value[3, 2] = np.nan
    return value


def inf(case: Case) -> np.ndarray:
    value = case.torch[LAYER].copy()
    value[0, 0], value[1, 1] = np.inf, -np.inf
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: {LAYER: None}, r"1 arrays missing.*missing .*layers.1.mlp.up_proj.weight \[24, 16\]"),
        (lambda case: {"extra.weight": np.zeros(3, "f")}, r"1 unknown.*unknown extra.weight \[3\]"),
        (lambda case: {LAYER: case.torch[LAYER].T.copy()}, r"has shape \[16, 24\], expected \[24, 16\]"),
        (lambda case: {LAYER: nan(case)}, r"up_proj.weight holds 1 values that are not finite"),
        (lambda case: {LAYER: inf(case)}, r"up_proj.weight holds 2 values that are not finite"),
        (lambda case: {LAYER: case.torch[LAYER].astype("i4")}, "has dtype I32; expected one of F32"),
        (lambda case: {"state_proj.weight": np.zeros((3, 3), "f")}, "π0 checkpoint, not π0.5"),
        (lambda case: {"action_in_proj.weight": None, "action_in_proj.bias": None}, "π0-FAST"),
        (
            lambda case: {LAYER.replace("weight", "lora_a"): np.zeros((3, 3), "f")},
            "1 arrays of adapters among .*save_pretrained",
        ),
        (lambda case: dict.fromkeys(case.torch), "no π0.5 weights"),
    ],
)
def test_wrong_tensors(case, tmp_path, change, message):
    source = with_tensors(tmp_path / "source", case, **change(case))
    before = snapshot(source)
    with pytest.raises(UserError, match=message) as error:
        run(source, tmp_path / "out", *made.FLAGS)
    assert "\n" not in str(error.value)
    assert snapshot(source) == before and [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("cut", [3, 200, -1000, -1])
def test_truncated_files(case, tmp_path, cut):
    source = tmp_path / "model.safetensors"
    content = (case.folder / "pytorch" / "model.safetensors").read_bytes()
    source.write_bytes(content[:cut])
    with pytest.raises(UserError, match="truncated|not a whole safetensors|header") as error:
        run(source, tmp_path / "out", *made.FLAGS, "--norm-stats=none")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_damaged_orbax_checkpoint(case, tmp_path):
    for pattern in ("params/manifest.ocdbt", "params/_METADATA", "params/d/*"):
        source = tmp_path / "source"
        shutil.copytree(case.folder / "openpi", source)
        for path in source.glob(pattern):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError) as error:
            run(source, tmp_path / "out", "--horizon=5", "--state-in-prompt")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        shutil.rmtree(source)


def test_a_damaged_array_of_ours_fails_its_checksum(case, tmp_path, monkeypatch):
    run(case.folder / "pytorch", tmp_path / "ours", *made.FLAGS)
    embedding = case.torch[EMBEDDING].tobytes()
    (data,) = [p for p in (tmp_path / "ours/0/params/d").iterdir() if embedding[:4000] in p.read_bytes()]
    content = data.read_bytes().replace(embedding[:4000], embedding[4:4000] + embedding[:4])
    data.write_bytes(content)
    (tmp_path / "ours/0/files.json").unlink()
    with pytest.raises(UserError, match="language.embedding of the source fails its checksum"):
        run(tmp_path / "ours", tmp_path / "out", "--to=openpi-pytorch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vision-heads=3", "--horizon=5"), "24 is heads times head dimension, .* give --heads=N"),
        (("--heads=4", "--horizon=5"), "12 is heads times head dimension, .* give --vision-heads=N"),
        (("--heads=4", "--vision-heads=3"), "tell the horizon; give --horizon=N"),
        (("--heads=5", "--vision-heads=3", "--horizon=5"), "heads=5 does not divide .* 24"),
        (("--heads=3", "--vision-heads=3", "--horizon=5"), "heads=3 gives head dimension 8, which does not fit"),
        (("--heads=4", "--vision-heads=5", "--horizon=5"), "vision_heads=5 does not divide"),
        (("--heads=24", "--vision-heads=3", "--horizon=5"), "head_dim must be even"),
        ((*made.FLAGS, "--executed=9"), "executed=9 does not lie within the horizon of 5"),
        ((*made.FLAGS, "--asset-id=other"), "no statistics 'other'; there: tiny_robot"),
        ((*made.FLAGS, "--norm-stats=/nowhere.json"), "no file /nowhere.json"),
        ((*made.FLAGS, "--tokenizer=/nowhere.model"), "no tokenizer at /nowhere.model"),
    ],
)
def test_settings_that_do_not_fit(case, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        run(case.folder / "pytorch", tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--heads=-3", "--heads=-3: expected at least 1"),
        ("--vision-heads=0", "--vision-heads=0: expected at least 1"),
        ("--horizon=0", "--horizon=0: expected 1 to 1000"),
        ("--horizon=1000000000", "--horizon=1000000000: expected 1 to 1000"),
        ("--prompt-length=-1", "--prompt-length=-1: expected 1 to 8192"),
        ("--executed=0", "--executed=0: expected 1 to 1000"),
        ("--denoising-steps=0", "--denoising-steps=0: expected 1 to 1000"),
        ("--denoising-steps=99999", "--denoising-steps=99999: expected 1 to 1000"),
        ("--pad-state=-2", "--pad-state=-2: expected 1 to 8192"),
        ("--pad-state=all", "'all', expected a number or none"),
        ("--pad-state=6", "--pad-state=6 pads nothing: the state has 6 numbers"),
        ("--cameras=", "--cameras=: expected a camera of its own for each slot"),
        ("--cameras=a,a,b", "--cameras=a,a,b: expected a camera of its own for each slot"),
        ("--cameras=none,none", "--cameras=none,none: expected a camera"),
        ("--asset-id=../other", "--asset-id=../other: expected the name of a folder in assets/"),
        ("--ignore=colour", "--ignore names colour, which is known or not there"),
    ],
)
def test_senseless_values_and_flags_without_effect(case, tmp_path, flag, message):
    with pytest.raises(UserError, match=message) as error:
        run(case.folder / "pytorch", tmp_path / "out", *made.FLAGS, flag)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_flags_against_a_checkpoint_of_ours(ours, tmp_path):
    """Its sizes are what they are; the flags for them had no effect."""
    for flag in ("--heads=2", "--vision-heads=2", "--horizon=4", "--prompt-length=30", "--norm-mode=quantile"):
        with pytest.raises(UserError, match=f"{flag} was given, .* has .*; leave it out"):
            run(ours, tmp_path / "out", "--to=openpi", flag)
    with pytest.raises(UserError, match="--pad-state=32 has no effect on a prompt that holds no state"):
        run(ours, tmp_path / "out", "--to=openpi", "--no-state-in-prompt", "--pad-state=32")
    run(ours, tmp_path / "same", "--to=openpi", "--heads=4", "--norm-mode=z_score")


@pytest.mark.parametrize("format", ["openpi", "pytorch"])
def test_whether_the_prompt_holds_the_state_is_asked_and_printed(case, tmp_path, capsys, format):
    """openpi's checkpoints do not tell; pi05_libero, whose statistics have this name, was trained without."""
    source = tmp_path / "source"
    shutil.copytree(case.folder / format, source)
    flags = made.FLAGS[:-1]
    assert made.FLAGS[-1] == "--state-in-prompt"
    with pytest.raises(UserError, match="give --state-in-prompt .* or --no-state-in-prompt") as error:
        run(source, tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and "trained pi05_libero" not in str(error.value)
    (source / "assets/physical-intelligence").mkdir()
    (source / "assets/tiny_robot").rename(source / "assets/physical-intelligence/libero")
    with pytest.raises(UserError, match="its statistics are physical-intelligence/libero, and openpi trained pi05_l"):
        run(source, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    for flag, line in (("--state-in-prompt", "holds the state"), ("--no-state-in-prompt", "holds no state")):
        run(source, tmp_path / flag, *flags, flag)
        assert f"\nprompt: {line}\n" in capsys.readouterr().out
        assert Checkpoints(tmp_path / flag).document(0)["state_in_prompt"] is (flag == "--state-in-prompt")
        run(tmp_path / flag, tmp_path / "there" / flag, "--to=openpi")
        assert (
            f"pi05=True, action_horizon=5, discrete_state_input={flag == '--state-in-prompt'}"
            in capsys.readouterr().out
        )
        run(tmp_path / "there" / flag, tmp_path / "back" / flag)  # the sidecar tells: nothing is asked
        assert Checkpoints(tmp_path / "back" / flag).document(0) == Checkpoints(tmp_path / flag).document(0)


def test_openpis_config_key_by_key(case, tmp_path):
    source = with_tensors(tmp_path / "source", case)
    written = {"action_dim": 7, "action_horizon": 5, "precision": "float32"}  # as openpi's converter, and a Pi0Config
    whole = {**written, "max_token_len": 48, "pi05": True, "discrete_state_input": False, "pytorch_compile_mode": None}
    flags = ("--heads=4", "--vision-heads=3")
    (source / "config.json").write_text(json.dumps(whole))
    run(source, tmp_path / "ours", *flags)
    document = Checkpoints(tmp_path / "ours").document(0)
    assert (document["horizon"], document["prompt_length"], document["state_in_prompt"]) == (5, 48, False)
    for change, message in (
        ({"action_dim": 32}, "says action_dim=32, the arrays say 7"),
        ({"action_horizon": 0}, "action_horizon is 0; expected a whole number"),
        ({"pi05": False}, "pi05=False; expected a π0.5 checkpoint"),
        ({"discrete_state_input": 1}, "discrete_state_input=1; expected a boolean"),
        ({"delta_actions": True}, "has delta_actions, .*--ignore=delta_actions"),
    ):
        (source / "config.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / "out", *flags)
    run(source, tmp_path / "out", *flags, "--ignore=delta_actions")
    assert Checkpoints(tmp_path / "out").document(0)["ignored"] == ["delta_actions"]


def test_statistics_of_an_unknown_input_are_refused(case, tmp_path):
    source = with_tensors(tmp_path / "source", case)
    file = source / "assets/tiny_robot/norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {**case.stats, "torque": case.stats["state"]}}))
    with pytest.raises(UserError, match="has torque, .*--ignore=torque"):
        run(source, tmp_path / "out", *made.FLAGS)
    run(source, tmp_path / "out", *made.FLAGS, "--ignore=torque")
    assert set(Checkpoints(tmp_path / "out").document(0)["norm_stats"]) == {"state", "actions"}


def test_statistics_of_mean_and_std_alone(case, tmp_path):
    """openpi's of policies without quantile normalisation: q01 and q99 are null or absent."""
    source = tmp_path / "source"
    shutil.copytree(case.folder / "pytorch", source)
    [path] = source.rglob("norm_stats.json")
    moments = {key: {name: value[name] for name in ("mean", "std")} for key, value in case.stats.items()}
    for number, extra in enumerate(({}, {"q01": None, "q99": None})):
        path.write_text(json.dumps({"norm_stats": {key: {**value, **extra} for key, value in moments.items()}}))
        with pytest.raises(UserError, match="mean and std alone.*needs q01 and q99; give --norm-mode=z_score"):
            run(source, tmp_path / "quantile", *made.FLAGS)
        run(source, tmp_path / f"ours{number}", *made.FLAGS, "--norm-mode=z_score")
        stats = Checkpoints(tmp_path / f"ours{number}").document(0)["norm_stats"]
        for key, value in moments.items():
            np.testing.assert_allclose(stats[key]["mean"], value["mean"])
            np.testing.assert_allclose(stats[key]["std"], value["std"])
        run(
            case.folder / "pytorch",
            tmp_path / f"flag{number}",
            *made.FLAGS,
            "--norm-mode=z_score",
            f"--norm-stats={path}",
        )
        assert Checkpoints(tmp_path / f"flag{number}").document(0)["norm_stats"] == stats
    path.write_text(json.dumps({"norm_stats": {"state": {"mean": [0.0]}}}))
    with pytest.raises(UserError, match="is not a norm_stats.json"):
        run(source, tmp_path / "broken", *made.FLAGS)


def test_the_question_for_the_horizon_says_which(case, tmp_path):
    """50, 15 or 10 by the policy; the statistics' names may tell; and it is free where it is trained on."""
    for name, hint in (
        ("droid", "of droid: --horizon=15"),
        ("physical-intelligence/libero", "--horizon=10"),
        ("x", None),
    ):
        source = tmp_path / name
        (source / "assets").mkdir(parents=True)
        shutil.copy(case.folder / "pytorch" / "model.safetensors", source)
        made.save_assets(source, case.stats, name)
        with pytest.raises(
            UserError, match="50 for pi05_base, 15 for pi05_droid, 10 for pi05_libero.*collect --chunk"
        ) as told:
            run(source, tmp_path / "out", "--heads=4", "--vision-heads=3", "--state-in-prompt")
        assert hint is None or hint in str(told.value)
        assert hint is not None or "its statistics are" not in str(told.value)


def test_paths_that_do_not_fit(case, ours, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    source = case.folder / "pytorch"
    for place in (tmp_path / "there", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            run(source, place, *made.FLAGS)
    with pytest.raises(UserError, match="lies in SRC"):
        run(source, source / "out", *made.FLAGS)
    with pytest.raises(UserError, match="there is nothing at"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint in .*expected model.safetensors"):
        run(tmp_path / "there", tmp_path / "out")
    with pytest.raises(UserError, match="is ours already; say what DST shall be"):
        run(ours, tmp_path / "out")
    with pytest.raises(ConfigError, match="invalid choice: 'caffe'"):
        run(source, tmp_path / "out", "--to=caffe")
    shutil.copytree(source, tmp_path / "two")
    made.save_assets(tmp_path / "two", case.stats, "second")
    with pytest.raises(UserError, match="statistics of 2 robots .second, tiny_robot.; choose with --asset-id"):
        run(tmp_path / "two", tmp_path / "out", *made.FLAGS)
    shutil.rmtree(tmp_path / "two" / "assets")
    with pytest.raises(UserError, match="holds no normalisation statistics"):
        run(tmp_path / "two", tmp_path / "out", *made.FLAGS)
    assert not (tmp_path / "out").exists()


def test_a_full_disk(case, tmp_path, monkeypatch):
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="needs 0.00 GB, the disk of .* has 0.00 GB free"):
        run(case.folder / "pytorch", tmp_path / "out", *made.FLAGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["ours", "openpi", "lerobot"])
def test_a_disk_that_fills_up_midway(case, tmp_path, monkeypatch, format):
    """A real one, of 300 kB; what the check of free space says is switched off."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        monkeypatch.setattr(targets, "require_space", lambda *_: None)
        with pytest.raises(UserError, match="no space left on the disk") as error:
            big = with_tensors(tmp_path / "source", case)
            monkeypatch.setattr(transfer, "BLOCK_BYTES", 4096)
            (disk / "filler").write_bytes(bytes(200_000))
            run(big, disk / "out", *made.FLAGS, f"--to={format}")
        assert "\n" not in str(error.value) and [p.name for p in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_interrupt_midway_leaves_nothing_and_a_killed_one_is_cleared_away(case, tmp_path, monkeypatch):
    write, calls = targets.OrbaxWriter.write, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return write(self, *arguments)

    monkeypatch.setattr(targets.OrbaxWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(case.folder / "pytorch", tmp_path / "out", *made.FLAGS)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial" / "new" / "0").mkdir(parents=True)  # as SIGKILL leaves it
    run(case.folder / "pytorch", tmp_path / "out", *made.FLAGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_one_line(case, tmp_path, number):
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts with it ignored
        "from z1_jax.convert import __main__ as convert\n"
        "from z1_jax.convert import targets\n"
        f"targets.OrbaxWriter.write = lambda *_: os.kill(os.getpid(), {int(number)})\n"
        "from z1_jax.process import run_main\n"
        "run_main(convert.main)\n"
    )
    command = [sys.executable, "-c", code, case.folder / "pytorch", tmp_path / "out", *made.FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1])
    assert done.returncode == 130 and done.stderr.strip() == "interrupted: nothing was written", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_do_not_write_one_place(case, tmp_path):
    with (
        targets.written_aside(tmp_path / "out"),
        pytest.raises(UserError, match="out is in use by another process: wait"),
    ):
        run(case.folder / "pytorch", tmp_path / "out", *made.FLAGS)


def test_a_folder_of_the_users_in_its_way_is_left_alone(case, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="out.partial is needed for a while and holds thesis.txt: move it away"):
        run(case.folder / "pytorch", tmp_path / "out", *made.FLAGS)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_checkpoints_stay_loadable_onto_a_mesh(kitchen, tmp_path):
    from z1_jax import sharding

    run(kitchen, tmp_path / "theirs", "--to=openpi")
    run(tmp_path / "theirs", tmp_path / "back")
    loaded = load_policy(Checkpoints(tmp_path / "back"), 0, sharding.make_mesh(2, 2, 2))
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(loaded.params))
    for name, value in named(tiny.policy(0).params).items():
        np.testing.assert_array_equal(named(loaded.params)[name], value)
    assert os.path.isdir(tmp_path / "back" / "0")
