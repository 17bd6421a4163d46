"""The two products of attention with the codes of pages, each one expression that `torch.compile` makes one loop of.

The loops read codes where they lie in the pool: nothing is gathered, and nothing widened is ever stored. They are what
a few queries need; many want the matrix products of `hfkv.kernels.decode_attention`. Run eagerly, each term of a sum
would be a tensor of its own, so they are only ever run compiled; tests hold them to the twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hfkv.quant import SCALE_BIAS, SCALE_STEPS, Codec, PageLayout


def fits(layout: PageLayout) -> bool:
    """Whether pages of this layout can be read by loops: codes on both sides, with scales and zeros of one byte."""
    return layout.pack is None and layout.byte_metadata and layout.tokens % 16 == 0


def key_loop(layout: PageLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The logits of queries over pages.

    Its arguments: pages uint8 [any, page_bytes], `which` of them int32 [rows, n], folded queries float32
    [rows, queries, columns] and the sums of the rotated queries [rows, queries, 1]. It returns
    [rows, queries, n, tokens], of any value in free slots.
    """
    codec, tokens = layout.key, layout.tokens

    def key_logits(pages: Tensor, which: Tensor, q: Tensor, total: Tensor) -> Tensor:
        stored = pages[which]  # [rows, n, page_bytes], which is never made
        codes = _part(layout, stored, "key").unflatten(2, (tokens, codec.rows))
        products: Tensor | float = 0.0
        for plane in _planes(codec, codes, 3):
            terms = [field[:, None] * q[:, :, None, None, columns] for columns, field in plane]
            products = products + sum(terms[1:], terms[0]).sum(-1)
        zero = _part(layout, stored, "key_zero")[:, None].float() if codec.zero_bytes else codec.center
        return (products - total[..., None] * zero) * _scales(layout, stored, "key_scale")

    return key_logits


def value_loop(layout: PageLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The weighed sums of values.

    Its arguments: pages and `which` as above, and probabilities float32 [rows, queries, n, tokens], 0 in free slots.
    It returns the sums of codes, and of their zeros or of the weights, [rows, queries, columns + 1].
    """
    codec, tokens = layout.value, layout.tokens

    def value_sums(pages: Tensor, which: Tensor, p: Tensor) -> Tensor:
        stored = pages[which]
        weights = (p * _scales(layout, stored, "value_scale"))[:, :, :, None]  # [rows, queries, n, 1, tokens]
        codes = _part(layout, stored, "value").unflatten(2, (codec.rows, tokens))
        fields = [field for plane in _planes(codec, codes, 2) for _, field in plane]
        sums = [(weights * field[:, None]).sum(2).sum(-1) for field in fields]
        zero = _part(layout, stored, "value_zero")[:, None, :, None].float() if codec.zero_bytes else 1.0
        return torch.cat([*sums, (weights * zero).sum(2).sum(-1)], -1)

    return value_sums


def _part(layout: PageLayout, stored: Tensor, name: str) -> Tensor:
    """The bytes of a part of pages [..., page_bytes]."""
    start, stop = layout.fields[name]
    return stored[..., start:stop]


def _scales(layout: PageLayout, stored: Tensor, name: str) -> Tensor:
    """Scales float32 [rows, 1, n, tokens]: an exp, which the compiler does not do again for every use."""
    return ((_part(layout, stored, name)[:, None].float() - SCALE_BIAS) * (math.log(2) / SCALE_STEPS)).exp()


def _planes(codec: Codec, codes: Tensor, dim: int) -> list[list[tuple[slice, Tensor]]]:
    """Per plane the codes in each field of its bytes, which lie along `dim`, as (columns, float32)."""
    planes, column = [], 0
    for first, width, bits in codec.planes:
        stored, fields = codes.narrow(dim, first, width), []
        stored = stored ^ codec.stored_zero if codec.signed else stored
        for shift in range(0, 8, bits):
            field = stored >> shift if shift else stored
            field = field & (2**bits - 1) if shift + bits < 8 else field
            fields.append((slice(column, column + width), field.float()))
            column += width
        planes.append(fields)
    return planes
