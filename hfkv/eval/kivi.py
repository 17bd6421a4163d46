"""KIVI as a cache to compare with: keys coded per channel in groups of tokens, values per token, a recent part exact.

It codes and decodes at once and keeps the decoded tensors ("fake quantisation"), so that it says what KIVI costs in
accuracy; `physical_bytes` counts what real codes would take. Source: arXiv 2402.02750, section 3, and its code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

GROUP = 32
RESIDUAL = 128
META_BYTES = 4
"""Of a group: scale and minimum in 16 bits each."""


class KIVILayer(DynamicLayer):
    """One layer.

    Attributes:
        coded: how many of the oldest keys and of the oldest values have been through the codes.
    """

    def __init__(self, bits: int, group: int = GROUP, residual: int = RESIDUAL) -> None:
        if residual % group:
            raise ValueError(f"residual={residual}: it must be a multiple of the group of {group} tokens")
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual
        self.coded = {"keys": 0, "values": 0}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; what attention gets is the past as it was coded before, and the new tokens exact."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        tokens = keys.shape[2]
        # Keys are coded in blocks of `residual` tokens, values as soon as `residual` newer ones follow.
        ends = {"keys": tokens - tokens % self.residual, "values": max(tokens - self.residual, self.coded["values"])}
        self.keys = self._coded(keys, "keys", ends["keys"])
        self.values = self._coded(values, "values", ends["values"])
        return keys, values

    def _coded(self, x: Tensor, side: str, end: int) -> Tensor:
        start = self.coded[side]
        if end <= start:
            return x
        self.coded[side] = end
        part = x[:, :, start:end]
        through = per_channel(part, self.bits, self.group) if side == "keys" else per_token(part, self.bits, self.group)
        return torch.cat([x[:, :, :start], through, x[:, :, end:]], 2)

    @property
    def physical_bytes(self) -> int:
        """Codes, scales and minima, and the exact rest in the dtype of the tensors."""
        assert self.keys is not None and self.values is not None
        total = 0
        for side, x in (("keys", self.keys), ("values", self.values)):
            batch, heads, tokens, dim = x.shape
            coded = self.coded[side]
            groups = coded // self.group * dim if side == "keys" else coded * -(-dim // self.group)
            exact = (tokens - coded) * dim * x.element_size()
            total += batch * heads * (coded * dim * self.bits // 8 + groups * META_BYTES + exact)
        return total


class KIVICache(DynamicCache):
    """A cache of `KIVILayer`s with `bits` bits; every other layer kind of the model stays transformers' own."""

    def __init__(self, bits: int, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [KIVILayer(bits) if type(layer) is DynamicLayer else layer for layer in self.layers]

    @property
    def physical_bytes(self) -> int:
        """Bytes of all layers."""
        layers: list[Any] = self.layers
        exact = [x for layer in layers if not isinstance(layer, KIVILayer) for x in (layer.keys, layer.values)]
        coded = sum(layer.physical_bytes for layer in layers if isinstance(layer, KIVILayer))
        return coded + sum(x.nbytes for x in exact if isinstance(x, Tensor))


def per_channel(x: Tensor, bits: int, group: int) -> Tensor:
    """[batch, heads, tokens, dim] through asymmetric codes of each channel in groups of `group` tokens."""
    return _through(x.unflatten(2, (-1, group)), bits, 3).flatten(2, 3)


def per_token(x: Tensor, bits: int, group: int) -> Tensor:
    """[batch, heads, tokens, dim] through asymmetric codes of each token in groups of `group` channels."""
    return torch.cat([_through(part, bits, -1) for part in x.split(group, -1)], -1)


def _through(x: Tensor, bits: int, dim: int) -> Tensor:
    low, high = x.float().aminmax(dim=dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(torch.finfo(torch.float16).tiny)
    low = low.half().float()
    return (((x.float() - low) / scale).round().clamp(0, 2**bits - 1) * scale + low).to(x.dtype)
