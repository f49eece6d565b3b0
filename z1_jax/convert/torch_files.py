"""Files of torch.save (.pt, .pth, .bin), read by torch itself with weights_only=True: nothing pickled is executed."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from z1_jax.convert.store import DTYPES, FormatError, Index, TensorInfo
from z1_jax.errors import first_line

SUFFIXES = (".pt", ".pth", ".bin")
_WITHIN = ("state_dict", "model_state_dict", "model", "module", "params")  # where training programs put the arrays


class TorchReader:
    """The tensors of one file; its bytes are mapped, not read at once (files of torch < 1.6 are read whole).

    Raises:
        FormatError: torch is not installed, or the file is damaged, or holds more than tensors and plain values.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import torch
        except ImportError:
            raise FormatError(
                f"{path} is a file of torch.save, which only torch reads: pip install 'z1-jax[torch]', or save it as "
                "safetensors where it was made (safetensors.torch.save_file(state_dict, 'model.safetensors'))"
            ) from None
        self._torch = torch
        self._values = _state_dict(path, _loaded(torch, path))
        self.tensors: dict[str, TensorInfo] = {}
        for name, value in self._values.items():
            kind = str(value.dtype).removeprefix("torch.")
            if kind not in DTYPES:
                raise FormatError(f"{path}: {name} has dtype {kind}; expected one of {', '.join(DTYPES)}")
            self.tensors[name] = TensorInfo(tuple(value.shape), DTYPES[kind])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """See `Reader`."""
        value = self._values[name].detach()
        value = value[index] if index else value
        if value.dtype == self._torch.bfloat16:  # NumPy has none of its own
            return value.contiguous().view(self._torch.int16).numpy().view(DTYPES["bfloat16"])
        return value.contiguous().numpy()

    def close(self) -> None:
        self._values = {}


def _loaded(torch: Any, path: pathlib.Path) -> Any:
    kwargs: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **kwargs)
        except RuntimeError as error:
            if "mmap" not in str(error):  # only files of the newer format can be mapped
                raise
            return torch.load(path, **kwargs)
    except Exception as error:  # noqa: BLE001 - torch has many, by the place where a file is damaged
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise FormatError(
                f"{path} holds pickled objects besides tensors, which are not executed here; save its state_dict "
                "alone, as safetensors"
            ) from None
        raise FormatError(f"{path} cannot be read by torch ({first_line(error)}); fetch or copy it anew") from None


def _state_dict(path: pathlib.Path, content: Any) -> dict[str, Any]:
    """The tensors by name: of the file itself, or of the one part of it that holds them."""
    for _ in range(len(_WITHIN)):
        if not isinstance(content, Mapping):
            break
        tensors = {str(name): value for name, value in content.items() if hasattr(value, "dtype")}
        inner = [name for name in _WITHIN if isinstance(content.get(name), Mapping)]
        if tensors and not inner:
            return tensors
        if len(inner) != 1:
            break
        content = content[inner[0]]
    raise FormatError(f"{path} holds no arrays by name; expected a state_dict, or one under {', '.join(_WITHIN)}")
