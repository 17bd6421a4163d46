"""Tensors by name, and transformers' own cache layers as JSON and tensors, for files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.cache_utils
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from hfkv.layer import check_same


class TensorWriter:
    """Collects tensors for a file, on the host and each in memory of its own."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        own = x.detach().cpu().contiguous()
        self.tensors[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()


class TensorReader:
    """Reads tensors of a file to `device`, or, where that is None, to the device that they were on."""

    def __init__(self, read: Callable[[str], Tensor], device: torch.device | None, path: str) -> None:
        self._read, self._device, self.path = read, device, path

    def get(self, name: str, device: Any) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: it is missing, or the device is not here.
        """
        found = self.find(name, device)
        if found is None:
            raise ValueError(f"{self.path}: the tensor {name!r} is missing")
        return found

    def find(self, name: str, device: Any) -> Tensor | None:
        """The tensor of that name, or None."""
        try:
            x = self._read(name)
        except Exception as error:
            if "does not contain" in str(error):
                return None
            raise
        return x.to(self.place(device))

    def place(self, device: Any) -> torch.device:
        """Where something goes that was on `device`."""
        if self._device is not None:
            return self._device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{self.path} was saved on {device}, which is not here: give LeanKVCache.load(path, device=...)"
            ) from error
        return torch.device(device)


def check_native(layer: Any, index: int, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where keys and values do not fit one of transformers' own layers."""
    for name, new in (("keys", k), ("values", v)):
        own = getattr(layer, name, None)
        if isinstance(own, Tensor) and own.dim() == 4 and own.shape[2]:
            check_same(index, name, new, own)


def native_state(layer: Any, index: int, writer: TensorWriter) -> dict[str, Any]:
    """What JSON says of one of transformers' own layers; its tensors go to `writer`.

    Raises:
        ValueError: the layer is of a class that `transformers.cache_utils` does not have.
    """
    kind = type(layer).__name__
    if _layer_class(kind) is not type(layer):
        raise ValueError(
            f"layer {index} is a {type(layer).__module__}.{kind}, which LeanKVCache.save does not know: only layers of "
            "transformers.cache_utils can be written"
        )
    return {"kind": kind, "fields": {name: _encode(x, f"{index}.{name}", writer) for name, x in vars(layer).items()}}


def native_from_state(state: dict[str, Any], reader: TensorReader) -> Any:
    """The layer that `native_state` described."""
    cls = _layer_class(state["kind"])
    if cls is None:
        raise ValueError(
            f"{reader.path} holds a layer {state['kind']}, which transformers {transformers.__version__} does not "
            "have: use the version that it was written with"
        )
    layer = cls.__new__(cls)
    layer.__dict__.update({name: _decode(x, reader) for name, x in state["fields"].items()})
    return layer


def _layer_class(name: str) -> Any:
    found = getattr(transformers.cache_utils, name, None)
    known = isinstance(found, type) and (
        issubclass(found, CacheLayerMixin | LinearAttentionCacheLayerMixin) or name == "DummyLayer"
    )
    return found if known else None


def _encode(value: Any, name: str, writer: TensorWriter) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        writer.add(name, value)
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{name}.{key}", writer)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, f"{name}.{i}", writer) for i, item in enumerate(value)]}
    raise ValueError(f"{name} of the cache is a {type(value).__name__}, which LeanKVCache.save cannot write")


def _decode(value: Any, reader: TensorReader) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return reader.get(value["tensor"], value["device"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "device" in value:
        return reader.place(value["device"])
    if "dict" in value:
        return {key: _decode(item, reader) for key, item in value["dict"]}
    kind = tuple if "tuple" in value else list
    return kind(_decode(item, reader) for item in value["tuple" if kind is tuple else "list"])
