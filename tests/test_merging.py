"""Adapters are merged as their own projects apply them; files and names as other programs leave them are read.

reference/openpi_lora.npz: inputs, parameters and outputs of openpi's lora.Einsum and FeedForward (rank 3, alpha 7.5).
reference/peft: a folder that PEFT 0.18 saved over reference/lerobot, and the weights after its merge_and_unload.
"""

import json
import pathlib
import shutil
import sys
import zipfile

import jax
import numpy as np
import pi05_checkpoints as made
import pytest
from safetensors.numpy import load_file, save_file
from seeds import fresh_seed

from z1_jax.convert import __main__ as convert
from z1_jax.convert.merging import MergedReader, openpi_adapters, peft_adapters
from z1_jax.convert.sources import open_source
from z1_jax.convert.store import TensorInfo
from z1_jax.convert.torch_names import plain_names
from z1_jax.errors import UserError

REFERENCE = pathlib.Path(__file__).parent / "reference"
LEROBOT, PEFT = REFERENCE / "lerobot", REFERENCE / "peft"
HEADS = ("--heads=4", "--vision-heads=2", "--pad-state=none")
SEED = fresh_seed(__name__)
LLM = "PaliGemma/llm/layers/"


def run(*arguments: object) -> int:
    return convert.convert(convert.parse_arguments([str(argument) for argument in arguments]))


def arrays_of(place: pathlib.Path) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    return {name: np.asarray(value) for name, value in ocp.load_checkpointables(place / "0")["params"].items()}


class Held:
    """A reader of arrays in memory."""

    def __init__(self, values):
        self._values = values
        self.tensors = {name: TensorInfo(value.shape, value.dtype) for name, value in values.items()}

    def read(self, name, index=()):
        return self._values[name][index]

    def close(self):
        pass


def layered(part: str, of: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    """openpi's arrays of one module under their names in a checkpoint: two layers, the second is the reference."""
    prefix = f"{LLM}attn/{part}/" if part != "mlp" else f"{LLM}mlp/"
    names = {
        name: of[name] for name in of.files if name.startswith(part) and name.split("/")[1] not in ("x", "y", "eqn")
    }
    return {prefix + name.split("/")[1]: np.stack([0 * value, value]) for name, value in names.items()}


def merged(part: str) -> tuple[dict[str, np.ndarray], np.lib.npyio.NpzFile]:
    """The weights of the second layer with their adapters in them."""
    of = np.load(REFERENCE / "openpi_lora.npz")
    values = layered(part, of)
    shapes = {name: value.shape for name, value in values.items()}
    adapters, names = openpi_adapters(shapes, 7.5)
    reader = MergedReader(Held(values), Held(values), adapters, hidden=frozenset(names))
    assert not any("lora" in name for name in reader.tensors)
    return {name.rpartition("/")[2]: reader.read(name, (1,)) for name in reader.tensors}, of


@pytest.mark.parametrize("part", ["q_einsum", "kv_einsum", "attn_vec_einsum"])
def test_openpis_attention_with_and_without_adapters(part):
    values, of = merged(part)
    expected = of[f"{part}/y"]
    equation = str(of[f"{part}/eqn"]).replace("2", "c")
    got = np.einsum(equation, of[f"{part}/x"], values["w"])
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
    plain = np.einsum(equation, of[f"{part}/x"], of[f"{part}/w"])
    assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()


def test_openpis_mlp_with_and_without_adapters():
    values, of = merged("mlp")
    x = of["mlp/x"]
    gate, up = values["gating_einsum"]
    got = (jax.nn.gelu(x @ gate) * (x @ up)) @ values["linear"]
    np.testing.assert_allclose(got, of["mlp/y"], atol=2e-4 * np.abs(of["mlp/y"]).max())


def test_blocks_are_those_of_the_whole():
    """Conversion reads one layer, one of a pair, or some rows of it."""
    rng = np.random.default_rng(SEED)
    names = {
        f"{LLM}attn/attn_vec_einsum_1": ((3, 4, 6, 5), (3, 4, 6, 32), (3, 4, 32, 5)),
        f"{LLM}attn/kv_einsum": ((3, 2, 4, 5, 6), (3, 2, 4, 5, 16), (3, 2, 4, 16, 6)),
    }
    values = {}
    for name, shapes in names.items():
        for part, shape in zip(("w", "lora_a", "lora_b"), shapes, strict=True):
            values[f"{name}/{part}"] = rng.normal(size=shape).astype("f")
    adapters, hidden = openpi_adapters({name: value.shape for name, value in values.items()}, None)
    reader = MergedReader(Held(values), Held(values), adapters, hidden=frozenset(hidden))
    for name, indices in (
        ("attn_vec_einsum_1", [(1,), (2, slice(1, 3))]),
        ("kv_einsum", [(1, 0), (2, 1, slice(0, 2))]),
    ):
        whole = reader.read(f"{LLM}attn/{name}/w")
        for index in indices:
            np.testing.assert_allclose(
                reader.read(f"{LLM}attn/{name}/w", index), whole[index], atol=1e-4, err_msg=f"seed {SEED}"
            )


def test_an_orbax_checkpoint_with_adapters(tmp_path, capsys):
    """Language model and expert adapted as in gemma_2b_lora and gemma_300m_lora: every layer by hand."""
    rng = np.random.default_rng(SEED)
    weights, stats = made.jax_weights(rng), made.statistics(rng)
    expected, alpha, rank = dict(weights), 6.0, 3
    for suffix in ("", "_1"):
        for name, attention in (
            (f"{LLM}attn/q_einsum{suffix}/w", True),
            (f"{LLM}attn/kv_einsum{suffix}/w", True),
            (f"{LLM}attn/attn_vec_einsum{suffix}/w", True),
            (f"{LLM}mlp{suffix}/gating_einsum", False),
            (f"{LLM}mlp{suffix}/linear", False),
        ):
            *leading, rows, columns = weights[name].shape
            a, b = (rng.normal(size=(*leading, *size)).astype("f") for size in ((rows, rank), (rank, columns)))
            base = name.removesuffix("/w") + "/lora_" if attention else name + "_lora_"
            weights |= {f"{base}a": a, f"{base}b": b}
            change = np.zeros_like(expected[name])
            for layer in range(len(change)):
                if "attn_vec" in name:  # the output sums over the heads n: so does the low-rank part, then b
                    for n in range(made.N):
                        change[layer, n] = a[layer, n] @ b[layer].sum(axis=0)
                else:
                    change[layer] = np.einsum("...dr,...rh->...dh", a[layer], b[layer])
            expected[name] = expected[name] + (alpha / rank if attention else 1.0) * change
    made.save_openpi(tmp_path / "lora", weights, stats)
    made.save_openpi(tmp_path / "plain", expected, stats)
    flags = ("--horizon=5", "--prompt-length=48", "--state-in-prompt")
    with pytest.raises(UserError, match="has rank 3; openpi's own sizes have 16 .* give --lora-alpha=N"):
        run(tmp_path / "lora", tmp_path / "a", *flags)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a")] == []
    run(tmp_path / "lora", tmp_path / "a", *flags, f"--lora-alpha={alpha}")
    assert "merged: openpi's adapters into 10 weights" in capsys.readouterr().out
    run(tmp_path / "plain", tmp_path / "b", *flags)
    got, wanted = arrays_of(tmp_path / "a"), arrays_of(tmp_path / "b")
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=f"{name}, seed {SEED}")
    with pytest.raises(UserError, match="--lora-alpha=2.0 has no effect"):
        run(tmp_path / "plain", tmp_path / "c", *flags, "--lora-alpha=2")
    half = {name: value for name, value in weights.items() if not name.endswith("q_einsum_1/lora_b")}
    made.save_openpi(tmp_path / "half", half, stats)
    with pytest.raises(UserError, match="q_einsum_1/lora_a is half of an adapter"):
        run(tmp_path / "half", tmp_path / "c", *flags, "--lora-alpha=2")


def peft_folder(place: pathlib.Path, **config) -> pathlib.Path:
    """As LeRobot saves a policy that was trained with PEFT: its configs and processors, adapters, no weights."""
    shutil.copytree(LEROBOT, place, ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copy(PEFT / "adapter_model.safetensors", place)
    content = json.loads((PEFT / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**content, **config}))
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**settings, "use_peft": True}))
    return place


def test_pefts_own_merge(tmp_path, capsys):
    """Ranks and alphas by pattern, rank-stabilised, with a module that was trained whole."""
    folder = peft_folder(tmp_path / "peft")
    run(folder, tmp_path / "a", *HEADS, f"--base={LEROBOT}")
    table = capsys.readouterr().out
    assert f"merged: PEFT's adapters into 6 weights of {LEROBOT}, 2 weights replaced" in table
    theirs = load_file(LEROBOT / "model.safetensors") | dict(np.load(PEFT / "merged.npz"))
    shutil.copytree(LEROBOT, tmp_path / "merged")
    save_file(theirs, tmp_path / "merged" / "model.safetensors")
    run(tmp_path / "merged", tmp_path / "b", *HEADS)
    run(LEROBOT, tmp_path / "c", *HEADS)
    got, wanted, before = (arrays_of(tmp_path / name) for name in "abc")
    moved = 0
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        moved += not np.array_equal(value, before[name])
    assert moved == 6  # q and kv of the expert's stack, action_in, time_in, kernel and bias of action_out
    named = peft_folder(tmp_path / "named", base_model_name_or_path=str(LEROBOT))
    run(named, tmp_path / "d", *HEADS)  # a base that is there needs no flag
    np.testing.assert_equal(arrays_of(tmp_path / "d"), got)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "adapters of lerobot/pi05_base, without its weights; give the folder of those with --base=PATH"),
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3', which is not supported; expected 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 8}, "says that .* has rank 8, its lora_A has 4"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a number"),
        ({"new_setting": 1}, "has new_setting, which may change what the policy computes"),
    ],
)
def test_adapters_that_are_not_merged(tmp_path, config, message):
    folder = peft_folder(tmp_path / "peft", **config)
    base = [f"--base={LEROBOT}"] if config else []
    with pytest.raises(UserError, match=message) as error:
        run(folder, tmp_path / "out", *HEADS, *base)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_adapters_without_their_weights_or_of_another_model(tmp_path):
    folder = peft_folder(tmp_path / "peft")
    values = load_file(folder / "adapter_model.safetensors")
    q = "base_model.model.model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
    ninth = {f"{q.replace('layers.0', 'layers.9')}.{x}.weight": values[f"{q}.{x}.weight"] for x in ("lora_A", "lora_B")}
    for change, message in (
        ({f"{q}.lora_B.weight": None}, "lora_B is missing"),
        ({f"{q}.lora_magnitude_vector": np.ones(3, "f")}, "is no adapter that is known"),
        (ninth, "adapts paligemma_with_expert.*layers.9.*which .* does not have"),
    ):
        changed = {name: value for name, value in {**values, **change}.items() if value is not None}
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "out", *HEADS, f"--base={LEROBOT}")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_config.json and no adapter_model.safetensors"):
        run(folder, tmp_path / "out", *HEADS, f"--base={LEROBOT}")
    with pytest.raises(UserError, match="--base=.* has no effect"):
        run(LEROBOT, tmp_path / "out", *HEADS, f"--base={LEROBOT}")
    (folder / "adapter_config.json").unlink()
    shutil.copy(LEROBOT / "model.safetensors", folder)
    with pytest.raises(UserError, match="use_peft=True, but .* has no adapter_config.json"):
        run(folder, tmp_path / "out", *HEADS)


def test_patterns_match_as_in_peft():
    of = np.load(PEFT / "merged.npz")
    shapes = {name: value.shape for name, value in load_file(PEFT / "adapter_model.safetensors").items()}
    found = peft_adapters(PEFT, shapes)
    scales = {name: adapter.scale for name, adapter in found.adapters.items()}
    assert set(scales) | set(found.replaced) == set(of.files)
    base = "model.paligemma_with_expert.gemma_expert.model.layers."
    assert scales[f"{base}0.self_attn.q_proj.weight"] == pytest.approx(3.5 / 2)  # its own alpha; rank 4, its root 2
    assert scales[f"{base}1.self_attn.q_proj.weight"] == pytest.approx(6 / 2)
    assert scales[f"{base}1.self_attn.v_proj.weight"] == pytest.approx(6 / 2**0.5)  # its own rank


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod.", "within"])
def test_wrappers_leave_their_words_in_names(tmp_path, wrap, capsys):
    folder = tmp_path / "wrapped"
    shutil.copytree(LEROBOT, folder)
    weights = load_file(LEROBOT / "model.safetensors")
    place = {
        name: name.replace("layers.", "layers._orig_mod.") if wrap == "within" else wrap + name for name in weights
    }
    save_file({place[name]: value for name, value in weights.items()}, folder / "model.safetensors")
    run(folder, tmp_path / "a", *HEADS)
    assert "taken away" in capsys.readouterr().out
    run(LEROBOT, tmp_path / "b", *HEADS)
    np.testing.assert_equal(arrays_of(tmp_path / "a"), arrays_of(tmp_path / "b"))


def older(name: str) -> str:
    """The name that transformers had before 4.52."""
    for new, old in (
        ("paligemma.model.language_model.", "paligemma.language_model.model."),
        ("paligemma.lm_head.", "paligemma.language_model.lm_head."),
        ("paligemma.model.vision_tower", "paligemma.vision_tower"),
        ("paligemma.model.multi_modal", "paligemma.multi_modal"),
    ):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("reference", ["lerobot", "openpi_pytorch"])
def test_names_of_older_transformers(tmp_path, reference, capsys):
    flags = HEADS if reference == "lerobot" else (*HEADS[:2], "--horizon=5", "--no-state-in-prompt")
    folder = tmp_path / "old"
    shutil.copytree(REFERENCE / reference, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({older(name): value for name, value in weights.items()}, folder / "model.safetensors")
    assert set(map(older, weights)) != set(weights)
    run(folder, tmp_path / "a", *flags)
    assert "names: those of transformers before 4.52" in capsys.readouterr().out
    run(REFERENCE / reference, tmp_path / "b", *flags)
    np.testing.assert_equal(arrays_of(tmp_path / "a"), arrays_of(tmp_path / "b"))


def test_two_arrays_of_one_name_are_told():
    with pytest.raises(UserError, match="the arrays a.w and a._orig_mod.w are both a.w"):
        plain_names(["a.w", "a._orig_mod.w"])
    found = plain_names(["module.model.x", "module.model.y"])
    assert found.lerobot and found.stored == {"x": "module.model.x", "y": "module.model.y"}


def torch_saved(file: pathlib.Path) -> None:
    """As torch.save lays out its files, without torch."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("full_weights/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("full_weights/version", b"3\n")


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin"])
def test_files_of_torch_without_torch(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    torch_saved(tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(
            UserError, match="which only torch reads: pip install 'z1-jax.torch.', or save it as"
        ) as error:
            open_source(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["state_dict", "nested", "bfloat16", "legacy"])
def test_files_of_torch(tmp_path, form):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    weights = {name: torch.tensor(value) for name, value in load_file(LEROBOT / "model.safetensors").items()}
    if form == "bfloat16":
        weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    shutil.copytree(LEROBOT, tmp_path / "source", ignore=shutil.ignore_patterns("model.safetensors"))
    content = {"step": 5, "model": {"module." + name: value for name, value in weights.items()}}
    torch.save(
        content if form == "nested" else weights,
        tmp_path / "source" / "weights.pt",
        _use_new_zipfile_serialization=form != "legacy",
    )
    run(tmp_path / "source", tmp_path / "a", *HEADS, "--dtype=source")
    save_file({n: v.to(torch.float32).numpy() for n, v in weights.items()}, tmp_path / "model.safetensors")
    shutil.copytree(LEROBOT, tmp_path / "same")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "same")
    run(tmp_path / "same", tmp_path / "b", *HEADS)
    for name, value in arrays_of(tmp_path / "b").items():
        np.testing.assert_array_equal(arrays_of(tmp_path / "a")[name].astype("f"), value, err_msg=name)


def test_pickled_code_is_not_executed(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")

    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "executed",))

    torch.save({"model": {"x": torch.zeros(2)}, "config": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="holds pickled objects besides tensors, which are not executed") as error:
        open_source(tmp_path / "weights.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
    (tmp_path / "weights.pt").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="cannot be read by torch|holds pickled objects"):
        open_source(tmp_path / "weights.pt")
    torch.save([torch.zeros(2)], tmp_path / "weights.pt")
    with pytest.raises(UserError, match="holds no arrays by name"):
        open_source(tmp_path / "weights.pt")
