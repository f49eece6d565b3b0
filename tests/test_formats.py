"""Files read and written in blocks, against the libraries that define them."""

import json

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from z1_jax.convert.orbax import OrbaxReader, OrbaxWriter, save_frame
from z1_jax.convert.safetensors import SafetensorsReader, SafetensorsWriter
from z1_jax.convert.store import DTYPES, TensorInfo
from z1_jax.convert.transfer import contiguous, require_finite, rows_per_block
from z1_jax.errors import UserError


def arrays(rng) -> dict[str, np.ndarray]:
    return {
        "a.weight": rng.standard_normal((7, 3, 5)).astype("f"),
        "b": rng.standard_normal(11),
        "c/half": rng.standard_normal((4, 6)).astype("f2"),
    }


def test_safetensors_are_read_as_the_library_writes_them(tmp_path, rng):
    values = arrays(rng)
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    assert reader.metadata == {"format": "pt"} and reader.tensors.keys() == values.keys()
    for name, value in values.items():
        assert (reader.tensors[name].shape, reader.tensors[name].dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(reader.read(name), value)
    np.testing.assert_array_equal(reader.read("a.weight", (2, 1)), values["a.weight"][2, 1])
    np.testing.assert_array_equal(reader.read("a.weight", (slice(2, 6),)), values["a.weight"][2:6])
    np.testing.assert_array_equal(reader.read("a.weight", (4, slice(1, 3))), values["a.weight"][4, 1:3])
    reader.close()


def test_safetensors_are_written_as_the_library_reads_them(tmp_path, rng):
    values = arrays(rng)
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in values.items()}
    infos["zeros"] = TensorInfo((3, 2), DTYPES["bfloat16"])
    writer = SafetensorsWriter(tmp_path / "x.safetensors", infos, {"format": "pt"})
    for i in rng.permutation(7):
        writer.write("a.weight", (int(i),), values["a.weight"][i])
    for name in ("c/half", "b"):
        writer.write(name, (), values[name])
    with pytest.raises(ValueError, match="expected float64"):
        writer.write("b", (), values["b"].astype("f"))
    writer.close()
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == {*values, "zeros"}
        for name, value in values.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
    assert (tmp_path / "x.safetensors").read_bytes()[-12:] == bytes(12)  # never written: zeros


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:5],
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b"{", b"[", 1),
        lambda content: content.replace(b"F32", b"F99"),
        lambda content: content.replace(b"[7,3,5]", b"[7,3,6]"),
    ],
)
def test_damaged_safetensors_are_one_line(tmp_path, rng, damage):
    path = tmp_path / "x.safetensors"
    save_file(arrays(rng), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        SafetensorsReader(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(SafetensorError):  # the library refuses it too
        load_file(path)


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_arrays_are_read_as_orbax_writes_them(tmp_path, rng, zarr3, ocdbt):
    import orbax.checkpoint as ocp

    tree = {"a": {"b": rng.standard_normal((6, 2, 4)).astype("f")}, "c": rng.standard_normal(9).astype("f")}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "tree", args=ocp.args.PyTreeSave(tree))
    reader = OrbaxReader(tmp_path / "tree")
    assert {name: info.shape for name, info in reader.tensors.items()} == {"a/b": (6, 2, 4), "c": (9,)}
    for index in [(), (3,), (5, 1), (slice(2, 5),), (0,), (4, slice(0, 1))]:
        np.testing.assert_array_equal(reader.read("a/b", index), tree["a"]["b"][index])
    np.testing.assert_array_equal(reader.read("c", (slice(7, 9),)), tree["c"][7:9])
    reader.close()


def test_orbax_reads_arrays_that_were_put_into_its_frame(tmp_path, rng):
    import orbax.checkpoint as ocp

    big = rng.standard_normal((5, 7, 3)).astype("f")
    short = rng.standard_normal(4).astype("f").astype(DTYPES["bfloat16"])
    infos = {"t/big": TensorInfo(big.shape, big.dtype), "t/short": TensorInfo(short.shape, short.dtype)}
    writer = OrbaxWriter(tmp_path / "arrays", infos, {"t/big": (1, 4, 3), "t/short": (4,)}, zarr=2)
    for i in rng.permutation(5):  # chunks of four rows: the second is uneven
        writer.write("t/big", (int(i), slice(4, 7)), big[i, 4:])
        writer.write("t/big", (int(i), slice(0, 4)), big[i, :4])
    writer.write("t/short", (), short)
    writer.close()
    save_frame(tmp_path / "tree", ("t/big", "t/short"))
    writer.move_into(tmp_path / "tree")
    assert not (tmp_path / "arrays").exists()
    with ocp.PyTreeCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "tree")
    np.testing.assert_array_equal(got["t"]["big"], big)
    assert np.asarray(got["t"]["short"]).tobytes() == short.tobytes()
    assert json.loads((tmp_path / "tree" / "_METADATA").read_text())["use_zarr3"] is False


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((700, 300), (1, 0)), ((257, 513), (1, 0)), ((6, 90, 200), (0, 2, 1)), ((6, 90, 200), (2, 0, 1)),
     ((9, 40, 300), (1, 2, 0)), ((5, 6, 7, 8), (3, 1, 2, 0)), ((3,), (0,))],
)  # fmt: skip
def test_tiled_copies(rng, shape, axes):
    value = rng.standard_normal(shape)
    got = contiguous(value.transpose(axes))
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, value.transpose(axes))


def test_finite_values_pass_and_others_are_counted(rng):
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        values = (rng.standard_normal((50, 3)) * 100).astype(DTYPES[dtype])
        require_finite(values, "x")
        values[3, 1], values[49, 2] = np.inf, np.nan
        with pytest.raises(UserError, match="x holds 2 values"):
            require_finite(values, "x")
    require_finite(np.full(100, 3e38, np.float32), "x")  # their sum overflows, they do not
    opposite = np.array([np.inf, -np.inf], np.float32)
    with pytest.raises(UserError, match="2 values"):
        require_finite(opposite, "x")


def test_blocks_divide_where_they_can():
    assert rows_per_block((16384, 1024)) is None  # 64 MiB of float32: whole
    rows = rows_per_block((257_152, 2048))
    assert rows and 257_152 % rows == 0 and rows * 2048 * 4 <= 64 << 20
    assert rows_per_block((65_537, 2048)) == 8192  # a prime


def one_chunk(folder, value, zarr: int, compressed: bool, chunks, ocdbt: bool) -> None:
    """An array as Orbax lays it out, with chunks of a size of our own; a tree of one name around it."""
    import tensorstore as ts

    folder.mkdir(parents=True)
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": "x/"}
    kvstore = kvstore if ocdbt else {"driver": "file", "path": f"{folder}/x/"}
    if zarr == 2:
        compressor = {"id": "zstd", "level": 1} if compressed else None
        metadata = {"shape": value.shape, "chunks": chunks, "dtype": "<f4", "compressor": compressor}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
    else:
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
        codecs += [{"name": "zstd", "configuration": {"level": 1}}] * compressed
        grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        metadata = {"shape": value.shape, "data_type": "float32", "chunk_grid": grid, "codecs": codecs}
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(value).result()
    entry = {"key_metadata": [{"key": "x", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {"x": entry}, "use_zarr3": zarr == 3}))


@pytest.mark.parametrize("chunks", [(7, 2, 9, 5), (4, 2, 9, 5), (7, 2, 4, 5), (7, 1, 4, 3)])
@pytest.mark.parametrize(
    ("zarr", "compressed", "ocdbt"), [(2, True, True), (2, False, False), (3, True, True), (3, False, True)]
)
def test_rows_of_chunks_that_are_too_large_to_be_read_whole(
    tmp_path, rng, monkeypatch, zarr, compressed, ocdbt, chunks
):
    value = rng.standard_normal((7, 2, 9, 5)).astype("f")
    one_chunk(tmp_path / "tree", value, zarr, compressed, chunks, ocdbt)
    monkeypatch.setattr("z1_jax.convert.orbax._WHOLE_BYTES", 100)
    monkeypatch.setattr("z1_jax.convert.chunk_streams.READ_BYTES", 64)
    reader = OrbaxReader(tmp_path / "tree")
    np.testing.assert_array_equal(reader.read("x"), value)
    # Two threads read ahead: neighbours come in either order; the last layer comes after other arrays.
    for index in [
        (0, 0),
        (0, 1),
        (2, 0),
        (1, 1),
        (2, 1),
        (3, 0),
        (6, 1),
        (4, 0),
        (5, slice(0, 1)),
        (6, 1, slice(3, 8)),
    ]:
        np.testing.assert_array_equal(reader.read("x", index), value[index], err_msg=str(index))
    assert reader._streams is not None
    np.testing.assert_array_equal(reader.read("x", (slice(1, 3),)), value[1:3])
    reader.close()


@pytest.mark.parametrize("cut", [0, 1, 50])
def test_a_damaged_large_chunk_is_one_line(tmp_path, rng, monkeypatch, cut):
    value = rng.standard_normal((7, 2, 9, 5)).astype("f")
    one_chunk(tmp_path / "tree", value, 2, True, value.shape, False)
    monkeypatch.setattr("z1_jax.convert.orbax._WHOLE_BYTES", 100)
    path = tmp_path / "tree" / "x" / "0.0.0.0"
    path.write_bytes(path.read_bytes()[: -cut or None]) if cut else path.unlink()
    reader = OrbaxReader(tmp_path / "tree")
    with pytest.raises(UserError, match="is damaged: x cannot be read") as error:
        reader.read("x", (6, 0))
    assert "\n" not in str(error.value)
