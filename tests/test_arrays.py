"""Names, shapes and axes of every format's arrays."""

import json
import pathlib

import numpy as np
import pi05_checkpoints as made
import pytest

from z1_jax.convert import arrays
from z1_jax.convert.architecture import read_architecture
from z1_jax.errors import UserError
from z1_jax.models.presets import PRESETS, get_preset

REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def full() -> list[arrays.Piece]:
    return arrays.pieces(get_preset("pi05"))


def listed(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    content = json.loads((REFERENCE / f"pi05_{name}_full_shapes.json").read_text())
    return {key: (tuple(entry["shape"]), entry["dtype"].removeprefix("torch.")) for key, entry in content.items()}


def test_full_size_pytorch_names_shapes_and_dtypes(full):
    expected = listed("pytorch")
    shapes = arrays.shapes(full, "torch")
    assert len(expected) == 813
    assert expected.keys() - shapes.keys() == {arrays.TIED_EMBEDDING, arrays.UNUSED_HEAD}
    assert {name: expected[name][0] for name in shapes} == shapes
    for piece in full:
        name, _ = piece.torch
        assert expected[name][1] == ("float32" if piece.float32_in("torch") else "bfloat16"), name


def test_full_size_jax_names_and_shapes(full):
    shapes = arrays.shapes(full, "openpi")
    assert shapes == {name: shape for name, (shape, _) in listed("openpi_jax").items()}
    assert arrays.parameters(shapes) == arrays.parameters(arrays.shapes(full, "ours")) == 3_353_433_872


@pytest.mark.parametrize("style", ["torch", "openpi"])
def test_the_published_sizes_need_no_heads(full, style):
    config = read_architecture(arrays.shapes(full, style), style, {"horizon": 50})
    assert config == PRESETS["pi05"]
    for name in ("heads", "vision_heads"):
        with pytest.raises(UserError, match=f"{name}=4 was given, the shapes say {8 if name == 'heads' else 16}"):
            read_architecture(arrays.shapes(full, style), style, {"horizon": 50, name: 4})


def test_pieces_follow_each_other_in_memory(full):
    """Within an array of ours the indices count up, so that one checksum can run over them."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    for piece in full:
        seen.setdefault(piece.ours[0], []).append(piece.ours[1])
    for name, indices in seen.items():
        assert indices == sorted(indices), name
    names = [piece.ours[0] for piece in full]
    assert len(set(names)) == 1 + sum(a != b for a, b in zip(names, names[1:], strict=False))


def test_layouts_agree_with_the_formulas(rng):
    """Every piece, taken from hand-made PyTorch tensors, equals the same piece of the JAX arrays; and back."""
    flat = made.jax_weights(rng)
    torch = made.torch_weights(flat)
    settings = {"heads": made.N, "vision_heads": made.HEADS, "horizon": made.HORIZON}
    shapes = {name: value.shape for name, value in torch.items()}
    pieces = arrays.pieces(read_architecture(shapes, "torch", settings))
    for piece in pieces:
        name, index = piece.openpi
        expected, tensor = flat[name][index], torch[piece.torch[0]]
        assert piece.shape == expected.shape and piece.shape_in("torch") == tensor.shape
        got = tensor if piece.layout is None else piece.layout.to_ours(tensor, piece.shape)
        np.testing.assert_array_equal(got, expected, err_msg=piece.torch[0])
        back = expected if piece.layout is None else piece.layout.to_torch(expected).reshape(tensor.shape)
        np.testing.assert_array_equal(back, tensor, err_msg=piece.torch[0])
    assert {piece.torch[0] for piece in pieces} == torch.keys() - {arrays.UNUSED_HEAD}
    assert {piece.openpi[0] for piece in pieces} == flat.keys()
