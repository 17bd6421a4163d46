"""`KVHandle`: what the cache returns from `update` instead of tensors, and what the attention function recognises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hfkv.layer import LeanKVLayer

_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.__len__,
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
}
_FORBIDDEN = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.set_, Tensor.resize_}


class Chunk:
    """The exact keys and values of one `update`, and the past that they continue.

    Attributes:
        k, v: [batch, kv_heads, tokens, dim] in the model's dtype.
        layer: the cache layer that they belong to.
        generation: the layer's generation when they came; a flush, crop or reorder makes the chunk stale.
        past: what the layer held before, set when a long chunk is stored, for layers that read it again.
        stored: whether the layer has taken the tokens over.
    """

    __slots__ = ("generation", "k", "layer", "past", "stored", "v")

    def __init__(self, layer: LeanKVLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v
        self.generation = layer.generation
        self.past: Any = None
        self.stored = False


class KVHandle(Tensor):
    """Keys or values of a layer: the logical shape [batch, kv_heads, seen tokens, dim] without storage.

    The `leankv` attention function reads `handle.source`. Any other operation asks the layer for plain tensors: at
    the first chunk the layer then becomes a DynamicLayer of transformers, later it raises, since packed tokens have no
    order.
    """

    source: Chunk
    side: str

    @staticmethod
    def __new__(cls, chunk: Chunk, side: str, tokens: int) -> KVHandle:
        own = chunk.k if side == "k" else chunk.v
        shape = (own.shape[0], own.shape[1], tokens, own.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device, requires_grad=False)

    def __init__(self, chunk: Chunk, side: str, tokens: int) -> None:
        self.source, self.side = chunk, side

    def plain(self) -> Tensor:
        """This side as a plain tensor."""
        k, v = self.source.layer.materialise(self.source)
        return k if self.side == "k" else v

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({self.side}, layer {self.source.layer.index}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (Tensor.detach, Tensor.contiguous) or (func is Tensor.to and _same_place(args[0], args[1:], kwargs)):
            return args[0]
        name = getattr(func, "__name__", str(func))
        if func in _FORBIDDEN or (name.endswith("_") and not name.startswith("__")):
            raise RuntimeError(
                f"{name} on a cache handle: keys and values live packed in LeanKVCache, attention alone reads them"
            )
        return func(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_plain(args), **{key: _plain(value) for key, value in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, KVHandle):
        return value.plain()
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _same_place(handle: KVHandle, args: tuple, kwargs: dict) -> bool:
    """Whether `.to(...)` asks for nothing but the handle's own device and dtype."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype) and value != handle.dtype:
            return False
        if isinstance(value, torch.device | str) and torch.device(value) != handle.device:
            return False
        if not isinstance(value, torch.dtype | torch.device | str | bool):
            return False
    return not kwargs.get("copy", False)
