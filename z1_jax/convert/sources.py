"""Finds out what a path holds (our checkpoint, openpi's, LeRobot's) by its arrays' names, and opens it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.convert import arrays, companions
from z1_jax.convert.architecture import refuse_other_models, style_of
from z1_jax.convert.keys import Ignored
from z1_jax.convert.orbax import TREE, OrbaxReader
from z1_jax.convert.safetensors import INDEX, SafetensorsReader, open_sharded
from z1_jax.convert.store import FormatError, Reader, TensorInfo
from z1_jax.convert.transfer import End
from z1_jax.files import absolute
from z1_jax.models.compute import Compute
from z1_jax.policy import find_policy

Format = Literal["ours", "openpi", "openpi-pytorch", "lerobot"]
FORMATS: tuple[Format, ...] = ("ours", "openpi", "openpi-pytorch", "lerobot")
LEROBOT_PREFIX = "model."


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading.

    Attributes:
        tensors: by the names of its style; `end.rename` gives those in the files.
        folder: where its configs and statistics stand.
        document: of our own checkpoints.
        crcs: CRC-32 of our own checkpoints' arrays.
    """

    format: Format
    path: pathlib.Path
    folder: pathlib.Path
    reader: Reader
    end: End
    tensors: Mapping[str, TensorInfo]
    document: Mapping[str, Any] | None = None
    crcs: Mapping[str, int | None] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def open_source(path: pathlib.Path) -> Source:
    """Opens what is there.

    Raises:
        FormatError: nothing that is known, a damaged file, or another model than π0.5.
    """
    path = absolute(path)
    if not path.exists():
        raise FormatError(f"there is nothing at {path}; expected a checkpoint")
    if path.is_file():
        return _open_safetensors(path, path)
    for folder in (path, path / "pretrained_model"):
        if (file := _weights_file(folder)) is not None:
            return _open_safetensors(path, file)
    if (path / TREE).is_file() or (path / "params" / TREE).is_file():
        return _open_orbax(path)
    try:
        directory, step = find_policy(path)
    except CheckpointError:
        steps = sorted((p.name for p in path.iterdir() if p.name.isdigit()), key=int)
        hint = f"; it holds the folders {', '.join(steps)}: give one of them" if steps else ""
        raise FormatError(
            f"no checkpoint in {path}{hint or '; expected model.safetensors, its index, or a folder params'}"
        ) from None
    return _open_orbax(directory / str(step))


def _weights_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The safetensors file or index that holds a folder's weights (LeRobot's statistics are in such files too)."""
    for name in (INDEX, "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    others = [path for path in sorted(folder.glob("*.safetensors")) if "processor" not in path.name]
    if len(others) > 1:
        raise FormatError(
            f"{folder} holds {len(others)} safetensors files and no {INDEX}; name the one with the weights"
        )
    return others[0] if others else None


def _open_safetensors(path: pathlib.Path, file: pathlib.Path) -> Source:
    try:
        reader = open_sharded(file) if file.name.endswith(".json") else SafetensorsReader(file)
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({error.strerror})") from None
    names = list(reader.tensors)
    prefixed = bool(names) and all(name.startswith(LEROBOT_PREFIX) for name in names)
    prefix = LEROBOT_PREFIX if prefixed else ""
    found = {name.removeprefix(prefix): info for name, info in reader.tensors.items()}
    refuse_other_models_of(found, file)
    _merge_tied(found, reader, prefix, file)
    end = End("torch", lambda name: _stored(name, prefix, reader.tensors))
    return Source("lerobot" if prefixed else "openpi-pytorch", path, file.parent, reader, end, found)


def _stored(name: str, prefix: str, stored: Mapping[str, TensorInfo]) -> str:
    """A tensor's name in the file: the embedding may stand under that of its tied twin."""
    if name == arrays.EMBEDDING and prefix + name not in stored:
        name = arrays.TIED_EMBEDDING
    return prefix + name


def _merge_tied(found: dict[str, TensorInfo], reader: Reader, prefix: str, file: pathlib.Path) -> None:
    """Leaves one of the embedding's two names. Raises FormatError when both are there and differ."""
    twin = found.pop(arrays.TIED_EMBEDDING, None)
    if twin is None:
        return
    if arrays.EMBEDDING not in found:
        found[arrays.EMBEDDING] = twin
        return
    if twin != found[arrays.EMBEDDING]:
        raise FormatError(f"{file}: embed_tokens and lm_head are tied, but their shapes or dtypes differ")
    rows = max(1, (32 << 20) // (twin.nbytes // max(1, twin.shape[0])))
    for start in range(0, twin.shape[0], rows):
        block = slice(start, min(start + rows, twin.shape[0]))
        one, other = (reader.read(prefix + n, (block,)) for n in (arrays.EMBEDDING, arrays.TIED_EMBEDDING))
        if one.tobytes() != other.tobytes():
            raise FormatError(f"{file}: embed_tokens and lm_head are tied, but their values differ")


def _open_orbax(path: pathlib.Path) -> Source:
    folder, tree = (path, path / "params") if (path / "params" / TREE).is_file() else (path.parent, path)
    reader = OrbaxReader(tree)
    stored = {_plain(name): name for name in reader.tensors}
    found = {plain: reader.tensors[name] for plain, name in stored.items()}
    refuse_other_models_of(found, path)
    end = End(style_of(found), stored.__getitem__)
    if end.style == "openpi":
        return Source("openpi", path, folder, reader, end, found)
    if not folder.name.isdigit():
        raise FormatError(f"{path} holds our arrays, but is no step of a checkpoint directory; give the folder <step>")
    checkpoints = Checkpoints(folder.parent)
    try:
        document, crcs = checkpoints.document(int(folder.name)), checkpoints.checksums(int(folder.name), "params")
    finally:
        checkpoints.close()
    return Source("ours", path, folder, reader, end, found, document, crcs)


def refuse_other_models_of(found: Mapping[str, TensorInfo], path: pathlib.Path) -> None:
    """As `refuse_other_models` and `style_of`, naming the path."""
    try:
        style_of(found)
        refuse_other_models(found)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _plain(name: str) -> str:
    """openpi's tree stands under "params", and every path of NNX ends in "value"."""
    return name.removeprefix("params/").removesuffix("/value")


def source_settings(source: Source, ignored: Ignored) -> dict[str, Any]:
    """Settings that the source itself holds: its document, or the configs beside its weights."""
    if source.document is None:
        return companions.read_settings(source.folder, ignored)
    document = dict(source.document)
    architecture = document.pop("architecture")
    return {**document, **flatten(architecture)}


def flatten(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a stored architecture that shapes do not tell."""
    return {
        "heads": architecture["language"]["heads"],
        "vision_heads": architecture["vision"]["heads"],
        "horizon": architecture["horizon"],
        "prompt_length": architecture["prompt_length"],
        "camera_slots": architecture["cameras"],
        "compute": {field.name: architecture[field.name] for field in dataclasses.fields(Compute)},
    }


def describe(source: Source) -> str:
    """In words, for the table."""
    names = {
        "ours": "a checkpoint of this project",
        "openpi": "openpi's JAX checkpoint (Orbax)",
        "openpi-pytorch": "openpi's PyTorch checkpoint",
        "lerobot": "LeRobot's checkpoint",
    }
    return names[source.format]
