"""The codes of gathered pages as the two matrix products of attention take them, with their scales and zeros.

Pages are uint8 [rows * n, page_bytes], n of each row; a slot is a token's place in them. Fields of a byte are read
where they lie contiguous in a page: strided operations on single vectors cost a processor several times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.quant import PageLayout, affine_terms, scale_from_code, spread_plane

NARROW = 32
"""Fields of fewer features are put side by side before they are multiplied, wider ones are not moved."""


class Scratch:
    """Memory in which one block's codes after the other's are widened: what was just read is still in the cache."""

    def __init__(self, device: torch.device) -> None:
        self._floats = torch.empty(0, device=device)

    def take(self, shape: Sequence[int]) -> Tensor:
        """float32 of this shape, of any content; the next call may take the same memory."""
        count = math.prod(shape)
        if self._floats.numel() < count:
            self._floats = torch.empty(count, device=self._floats.device)
        return self._floats[:count].view(*shape)


@dataclass(slots=True)
class Terms:
    """What a block's codes are scaled by and measured from, each float32 [rows, 1, pages * tokens].

    Attributes:
        ks, vs: scales of keys and of values; None for exact ones.
        kz: zeros of keys, or the one number that they all are.
        vz: zeros of values that are not stored as bytes; else None.
    """

    ks: Tensor | None
    kz: Tensor | float
    vs: Tensor | None
    vz: Tensor | None

    @classmethod
    def of(cls, layout: PageLayout, pages: Tensor, rows: int) -> Terms:
        """Of pages uint8 [rows * n, page_bytes]."""
        if not layout.byte_metadata:
            (ks, kz), (vs, vz) = (_side_terms(layout, pages, rows, side) for side in ("key", "value"))
            return cls(ks, kz, vs, vz if isinstance(vz, Tensor) and layout.value.kind == "minmax" else None)
        key, start = layout.key, layout.fields["key_scale"][0]
        names = 2 + key.zero_bytes
        stored = pages[:, start : start + names * layout.tokens].view(rows, -1, names, layout.tokens)
        terms = torch.empty(names, *stored.shape[:2], layout.tokens, device=pages.device)
        terms.copy_(stored.permute(2, 0, 1, 3))
        scale_from_code(terms[:2])
        ks, vs, *zeros = terms.view(names, rows, 1, -1).unbind()
        if zeros and key.stored_zero:
            zeros[0].sub_(key.stored_zero)
        return cls(ks, zeros[0] if zeros else key.center, vs, None)


def _side_terms(layout: PageLayout, pages: Tensor, rows: int, side: str) -> tuple[Tensor | None, Tensor | float]:
    codec = layout.key if side == "key" else layout.value
    if not codec.bits:
        return None, 0.0
    zero = layout.view(pages, f"{side}_zero") if codec.zero_bytes else None
    s, z = affine_terms(codec, layout.view(pages, f"{side}_scale"), zero)
    return s.reshape(rows, 1, -1), z.reshape(rows, 1, -1) if isinstance(z, Tensor) else z


def code_products(layout: PageLayout, pages: Tensor, q: Tensor, scratch: Scratch) -> Tensor:
    """Products of q [r, queries, columns] with the keys' codes (numbers of exact tiers): [r, queries, slots]."""
    stored, products, column = layout.view(pages, "key"), None, 0  # [n, tokens, rows]
    for first, width, bits in layout.key.planes:
        codes = spread_plane(stored[..., first : first + width], bits)  # [fields, n, tokens, width]
        if layout.key.signed:
            codes = codes.view(torch.int8)
        if width < NARROW:
            codes = codes.movedim(0, 2).flatten(2)[None]  # [1, n, tokens, fields * width]
        wide = scratch.take(codes.shape).copy_(codes).view(codes.shape[0], q.shape[0], -1, codes.shape[-1])
        for field in wide.transpose(2, 3).unbind():
            own, column = q[..., column : column + field.shape[1]], column + field.shape[1]
            products = torch.bmm(own, field) if products is None else products.baddbmm_(own, field)
    assert products is not None
    return products


def widen_values(layout: PageLayout, pages: Tensor, rows: int, scratch: Scratch) -> Tensor:
    """The values' codes (numbers of exact tiers), float32 [rows, columns, slots].

    Codes have one column more: their zeros, where those are bytes, or else ones.
    """
    codec, stored, column = layout.value, layout.view(pages, "value"), 0  # [n, bytes, tokens]
    shape = (rows, codec.columns + (1 if codec.bits else 0), pages.shape[0] // rows, layout.tokens)
    wide = scratch.take(shape)
    for first, width, bits in codec.planes:
        codes = spread_plane(stored[:, first : first + width], bits)  # [fields, n, width, tokens]
        part = wide[:, column : column + codes.shape[0] * width].unflatten(1, (-1, width))
        part.copy_(codes.unflatten(1, (rows, -1)).permute(1, 0, 3, 2, 4))
        column += codes.shape[0] * width
    if codec.bits:
        wide[:, -1] = layout.view(pages, "value_zero").unflatten(0, (rows, -1)) if codec.zero_bytes == 1 else 1
    return wide.flatten(2)
