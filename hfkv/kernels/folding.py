"""The linear maps between a layer's vectors and the codes of its pages, folded into one matrix on either side.

Rotations, the planes that a code is split into, and the zeros of values are linear. So a query takes on the first two
before it meets the codes, and the output takes on all three after:

    q . code_t = (q R U') . c_t          sum_t p_t v_t = (sum_t p_t vs_t [c_t, vz_t]) [U; -1] R'

with R the rotation, c_t a token's codes plane by plane, and U what puts the planes together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.quant import Codec, PageLayout


@dataclass(frozen=True, eq=False)
class Folding:
    """The maps of a layer's tiers under its rotations; the same only as itself.

    Attributes:
        queries: float32 [key_dim, n]: a plain query times it holds, side by side, what each tier's `keys` name, the
            sum of the rotated query (`total`, one column), and the rotated query itself (`rotated`).
        values: per tier [columns, value_dim]: weighted sums of codes, and of their zeros, to the output in the plain
            basis. Where all zeros are one number, the last row has it, and takes the sum of the weights.
    """

    queries: Tensor
    keys: tuple[slice, ...]
    total: slice
    rotated: slice
    values: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.queries, *self.values]


def fold(layouts: list[PageLayout], key: Tensor | None, value: Tensor | None, device: torch.device) -> Folding:
    """The maps of tiers under rotations [dim, dim], None for none; layers that are alike share them."""
    return _fold(tuple((layout.key, layout.value) for layout in layouts), _Same(key), _Same(value), device)


@functools.lru_cache(maxsize=64)
def _fold(codecs: tuple[tuple[Codec, Codec], ...], key: _Same, value: _Same, device: torch.device) -> Folding:
    rotations = [
        torch.eye(dim) if same.tensor is None else same.tensor.cpu()
        for same, dim in ((key, codecs[0][0].dim), (value, codecs[0][1].dim))
    ]
    into, out = rotations[0].double(), rotations[1].T.double()
    parts = [into @ planes_together(codec).T.double() for codec, _ in codecs]
    parts += [into.sum(1, keepdim=True), into]
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0).tolist()
    slices = [slice(end - part.shape[1], end) for part, end in zip(parts, ends, strict=True)]
    values = []
    for _, codec in codecs:
        zero = 1.0 if codec.zero_bytes else codec.center
        matrix = planes_together(codec).double() @ out
        values.append(torch.cat([matrix, -out.sum(0, keepdim=True) * zero]) if codec.bits else matrix)
    on = [x.float().to(device) for x in (torch.cat(parts, 1), *values)]
    return Folding(on[0], tuple(slices[:-2]), slices[-2], slices[-1], tuple(on[1:]))


@functools.cache
def planes_together(codec: Codec) -> Tensor:
    """float32 [codec.columns, dim]: codes plane by plane times it are the codes."""
    parts, shift = [], 0
    for _, _, bits in codec.planes:
        parts.append(torch.eye(codec.padded) * 2**shift)
        shift += bits
    return torch.cat(parts)[:, : codec.dim]


class _Same:
    """A tensor, or None, that equals itself alone, as the key of a cache that keeps it."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)
