"""Finds out what a path holds (our checkpoint, openpi's, LeRobot's) by its arrays' names, and opens it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.convert import arrays, companions
from z1_jax.convert.architecture import refuse_other_models, style_of
from z1_jax.convert.keys import Ignored, read_json
from z1_jax.convert.merging import PEFT_CONFIG, PEFT_WEIGHTS, MergedReader, openpi_adapters, peft_adapters
from z1_jax.convert.orbax import TREE, OrbaxReader
from z1_jax.convert.safetensors import INDEX, SafetensorsReader, open_sharded
from z1_jax.convert.store import FormatError, Reader, TensorInfo
from z1_jax.convert.torch_files import SUFFIXES, TorchReader
from z1_jax.convert.torch_names import plain_names
from z1_jax.convert.transfer import End
from z1_jax.files import absolute
from z1_jax.models.compute import Compute
from z1_jax.policy import find_policy

Format = Literal["ours", "openpi", "openpi-pytorch", "lerobot"]
FORMATS: tuple[Format, ...] = ("ours", "openpi", "openpi-pytorch", "lerobot")


_PEFT_NOTE, _OPENPI_NOTE = "merged: PEFT's adapters into", "merged: openpi's adapters into"


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading.

    Attributes:
        tensors: by the names of its format's style; `end.rename` turns them into the names in the files.
        folder: where its configs and statistics are.
        document: of our own checkpoints.
        crcs: CRC-32 of our own checkpoints' arrays.
        notes: what was done to names and weights, in words.
    """

    format: Format
    path: pathlib.Path
    folder: pathlib.Path
    reader: Reader
    end: End
    tensors: Mapping[str, TensorInfo]
    document: Mapping[str, Any] | None = None
    crcs: Mapping[str, int | None] | None = None
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def open_source(path: pathlib.Path, base: pathlib.Path | None = None, lora_alpha: float | None = None) -> Source:
    """Opens what is there; adapters are merged while it is read.

    Args:
        base: the checkpoint that PEFT's adapters belong to, needed if their folder does not name one on this disk.
        lora_alpha: alpha of openpi's adapters, needed for ranks other than 16 and 32.

    Raises:
        FormatError: no known format, a damaged file, another model than π0.5, or an argument without effect.
    """
    path = absolute(path)
    found = _opened(path, base, lora_alpha)
    for option, value, used in (
        ("base", base, any(note.startswith(_PEFT_NOTE) for note in found.notes)),
        ("lora-alpha", lora_alpha, any(note.startswith(_OPENPI_NOTE) for note in found.notes)),
    ):
        if value is not None and not used:
            found.reader.close()
            raise FormatError(f"--{option}={value} has no effect: {path} holds no such adapters; leave it out")
    return found


def _opened(path: pathlib.Path, base: pathlib.Path | None, lora_alpha: float | None) -> Source:
    if not path.exists():
        raise FormatError(f"there is nothing at {path}; expected a checkpoint")
    if path.is_file():
        return _open_torch(path, path)
    for folder in (path, path / "pretrained_model"):
        if (folder / PEFT_CONFIG).is_file():
            return _open_peft(path, folder, base)
        if (file := _weights_file(folder)) is not None:
            return _open_torch(path, file)
    if (path / TREE).is_file() or (path / "params" / TREE).is_file():
        return _open_orbax(path, lora_alpha)
    try:
        directory, step = find_policy(path)
    except CheckpointError:
        steps = sorted((p.name for p in path.iterdir() if p.name.isdigit()), key=int)
        hint = f"; it holds the folders {', '.join(steps)}: give one of them" if steps else ""
        raise FormatError(
            f"no checkpoint in {path}{hint or '; expected model.safetensors, its index, or a folder params'}"
        ) from None
    return _open_orbax(directory / str(step), lora_alpha)


def _weights_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The file or index that holds a folder's weights (LeRobot's statistics are in safetensors too)."""
    for name in (INDEX, "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    for suffixes in ((".safetensors",), SUFFIXES):
        others = [path for path in sorted(folder.glob("*")) if path.suffix in suffixes and "processor" not in path.name]
        if len(others) > 1:
            raise FormatError(
                f"{folder} holds {len(others)} files of weights ({', '.join(path.name for path in others[:4])}) and no "
                f"{INDEX}; name the one with the weights"
            )
        if others:
            return others[0]
    return None


def _open_torch(path: pathlib.Path, file: pathlib.Path) -> Source:
    """A file of PyTorch's arrays, by its suffix."""
    try:
        if file.suffix in SUFFIXES:
            reader: Reader = TorchReader(file)
        else:
            reader = open_sharded(file) if file.name.endswith(".json") else SafetensorsReader(file)
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({error.strerror})") from None
    try:
        names = plain_names(reader.tensors)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    if adapters := [name for name in names.stored if "lora" in name]:
        raise FormatError(
            f"{file} holds {len(adapters)} arrays of adapters among its weights ({adapters[0]}); save them with PEFT's "
            "save_pretrained, whose folder is read here, or merge them with merge_and_unload"
        )
    stored = dict(names.stored)
    found = {name: reader.tensors[original] for name, original in stored.items()}
    refuse_other_models_of(found, file)
    _merge_tied(found, reader, stored, file)
    format: Format = "lerobot" if names.lerobot else "openpi-pytorch"
    return Source(format, path, file.parent, reader, End("torch", stored.__getitem__), found, notes=names.notes)


def _open_peft(path: pathlib.Path, folder: pathlib.Path, base: pathlib.Path | None) -> Source:
    """A folder of PEFT: adapters, and LeRobot's configs, over the weights of another folder."""
    named = str(read_json(folder / PEFT_CONFIG).get("base_model_name_or_path") or "")
    if base is None and (not named or not absolute(named).is_dir()):
        raise FormatError(
            f"{folder} holds PEFT's adapters of {named or 'an unnamed model'}, without its weights; give the folder of "
            "those with --base=PATH"
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise FormatError(f"{folder} has {PEFT_CONFIG} and no {PEFT_WEIGHTS}; fetch the folder anew")
    below = _opened(base if base is not None else absolute(named), None, None)
    if below.end.style != "torch":
        raise FormatError(f"--base={below.path} is {describe(below)}; PEFT's adapters belong to a PyTorch model")
    extra = SafetensorsReader(folder / PEFT_WEIGHTS)
    found = peft_adapters(folder, {name: info.shape for name, info in extra.tensors.items()})
    stored = {name: below.end.rename(name) for name in below.tensors}
    plain = plain_names([*found.adapters, *found.replaced]).stored
    if lost := [name for name in plain if name not in stored]:
        raise FormatError(f"{folder} adapts {lost[0]}, which {below.path} does not have; give its own base with --base")
    adapters = {stored[name]: found.adapters[told] for name, told in plain.items() if told in found.adapters}
    replaced = {stored[name]: found.replaced[told] for name, told in plain.items() if told in found.replaced}
    reader = MergedReader(below.reader, extra, adapters, replaced)
    tensors = {name: reader.tensors[stored[name]] for name in stored}
    others = f", {len(replaced)} weights replaced" * bool(replaced)
    notes = (*below.notes, f"{_PEFT_NOTE} {len(adapters)} weights of {below.path}{others}")
    settings = folder if (folder / "config.json").is_file() else below.folder
    return Source(below.format, path, settings, reader, below.end, tensors, notes=notes)


def _merge_tied(found: dict[str, TensorInfo], reader: Reader, stored: dict[str, str], file: pathlib.Path) -> None:
    """Drops one of the embedding's two copies. Raises FormatError when they differ."""
    twin = found.pop(arrays.TIED_EMBEDDING, None)
    if twin is None:
        return
    if arrays.EMBEDDING not in found:
        found[arrays.EMBEDDING] = twin
        stored[arrays.EMBEDDING] = stored[arrays.TIED_EMBEDDING]
        return
    if twin != found[arrays.EMBEDDING]:
        raise FormatError(f"{file}: embed_tokens and lm_head are tied, but their shapes or dtypes differ")
    rows = max(1, (32 << 20) // (twin.nbytes // max(1, twin.shape[0])))
    for start in range(0, twin.shape[0], rows):
        block = slice(start, min(start + rows, twin.shape[0]))
        one, other = (reader.read(stored[n], (block,)) for n in (arrays.EMBEDDING, arrays.TIED_EMBEDDING))
        if one.tobytes() != other.tobytes():
            raise FormatError(f"{file}: embed_tokens and lm_head are tied, but their values differ")


def _open_orbax(path: pathlib.Path, lora_alpha: float | None) -> Source:
    folder, tree = (path, path / "params") if (path / "params" / TREE).is_file() else (path.parent, path)
    reader: Reader = OrbaxReader(tree)
    stored = {_plain(name): name for name in reader.tensors}
    found = {plain: reader.tensors[name] for plain, name in stored.items()}
    refuse_other_models_of(found, path)
    end = End(style_of(found), stored.__getitem__)
    if end.style == "openpi":
        notes: tuple[str, ...] = ()
        adapters, names = openpi_adapters({name: info.shape for name, info in found.items()}, lora_alpha)
        if adapters:
            by_name = {
                stored[name]: dataclasses.replace(adapter, a=stored[adapter.a], b=stored[adapter.b])
                for name, adapter in adapters.items()
            }
            reader = MergedReader(reader, reader, by_name, hidden=frozenset(stored[name] for name in names))
            found = {plain: reader.tensors[name] for plain, name in stored.items() if plain not in names}
            notes = (f"{_OPENPI_NOTE} {len(adapters)} weights",)
        return Source("openpi", path, folder, reader, end, found, notes=notes)
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
    """Settings from the source itself: from its document, or the configs beside its weights."""
    if source.document is None:
        return {**companions.read_settings(source.folder, ignored), "assets": companions.asset_ids(source.folder)}
    document = dict(source.document)
    architecture = document.pop("architecture")
    return {**document, **flatten(architecture)}


def flatten(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored architecture that the arrays' shapes do not show."""
    return {
        "heads": architecture["language"]["heads"],
        "vision_heads": architecture["vision"]["heads"],
        "horizon": architecture["horizon"],
        "prompt_length": architecture["prompt_length"],
        "camera_slots": architecture["cameras"],
        "compute": {field.name: architecture[field.name] for field in dataclasses.fields(Compute)},
    }


def describe(source: Source) -> str:
    """The source's format in words, for the table."""
    names = {
        "ours": "a checkpoint of this project",
        "openpi": "openpi's JAX checkpoint (Orbax)",
        "openpi-pytorch": "openpi's PyTorch checkpoint",
        "lerobot": "LeRobot's checkpoint",
    }
    return names[source.format]
