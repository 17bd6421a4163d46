"""Attention of a decode step over packed pages, window and sinks: an expression that a compiler makes loops of.

The expression has elementwise operations, sums and maxima only, so that the compiler turns all of it into loops of one
function: they read codes where they lie in the pool, and what a processor pays for in short steps, calls of operations
and waking of threads, is paid once. It says the same as `hfkv.attend.attend_step`, and is meant for few queries: each
reads all codes anew. Run eagerly every term of its sums would be a tensor, so it is only ever run compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.decode_attention import cap
from hfkv.quant import SCALE_BIAS, SCALE_STEPS, Codec, PageLayout

TierPages = tuple[Tensor, Tensor, Tensor]
"""Pages of a tier: uint8 [any, page_bytes]; which of them belong to a row, int64 [rows, n]; and how many slots of each
are filled, int32 [rows, n]."""


@dataclass(frozen=True)
class StepShape:
    """What loops are made for; all other sizes are open.

    Attributes:
        layouts: of the tiers.
        keys, total, rotated: columns of folded queries, as in `hfkv.kernels.folding.Folding`.
        groups: query heads per KV head.
        slots: of the window.
        scaling, softcap: as in `hfkv.attend.Call`.
        dtype: of queries and of the window.
        absent: whether there are no sinks, and no mean keys.
        single: whether there is one row, and one query. A size of 1 is none that a compiler leaves open.
        threads: how many run them.
    """

    layouts: tuple[PageLayout, ...]
    keys: tuple[tuple[int, int], ...]
    total: tuple[int, int]
    rotated: tuple[int, int]
    groups: int
    slots: int
    scaling: float
    softcap: float | None
    dtype: torch.dtype
    absent: tuple[bool, bool]
    single: tuple[bool, bool]
    threads: int


def fits(layout: PageLayout) -> bool:
    """Whether pages of this layout can be read by loops: codes on both sides, with scales and zeros of one byte."""
    return layout.pack is None and layout.byte_metadata and layout.tokens % 16 == 0


def step_loops(shape: StepShape) -> Callable[..., Tensor]:
    """The attention of a step's queries, whose tokens are the newest of the window; a row is a KV head of a sequence.

    Its arguments: q [rows, groups, queries, D]; keys and values of the window [rows, slots, dim], of which int64 [rows]
    are filled; sinks [rows, groups * queries] or None; `Folding.queries`; mean keys [rows, D] or None; a list of
    `Folding.values`; and a list of the pages of each tier.
    It returns [rows, groups, queries, Dv].
    """

    def step(
        q: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        filled: Tensor,
        sinks: Tensor | None,
        into: Tensor,
        mean: Tensor | None,
        back: Sequence[Tensor],
        tiers: Sequence[TierPages],
    ) -> Tensor:
        queries = q.shape[2]
        x = (q.float() * shape.scaling).flatten(1, 2)  # [rows, groups * queries, D]
        folded = _product(x, into)
        constant = None if mean is None else (folded[..., slice(*shape.rotated)] * mean[:, None]).sum(-1)
        # ---- logits, and the largest of each query
        exact = (x[:, :, None] * window_k.float()[:, None]).sum(-1)  # [rows, groups * queries, slots]
        newest = torch.arange(x.shape[1]) % queries - queries  # of each query, counted from the window's end
        seen = torch.arange(window_k.shape[1]) <= (filled[:, None] + newest)[..., None]
        exact = torch.where(seen, cap(exact, shape.softcap), float("-inf"))
        largest, packed = exact.amax(-1), []
        for tier, (pages, which, used) in enumerate(tiers):
            logits = _logits(shape, tier, pages[which], folded, constant)  # [rows, groups * queries, n, tokens]
            held = torch.arange(shape.layouts[tier].tokens) < used[:, None, :, None]
            logits = torch.where(held, logits, float("-inf"))
            largest = torch.maximum(largest, logits.flatten(2).amax(-1))
            packed.append(logits)
        largest = largest if sinks is None else torch.maximum(largest, sinks)
        largest = torch.where(largest == float("-inf"), 0.0, largest)  # a sequence without a token
        # ---- weights, not yet divided by their sum, and what they weigh
        p = (exact - largest[..., None]).exp()
        total = p.sum(-1) if sinks is None else p.sum(-1) + (sinks - largest).exp()
        out = (p[..., None] * window_v.float()[:, None]).sum(2)  # [rows, groups * queries, Dv]
        for layout, (pages, which, _), logits, matrix in zip(shape.layouts, tiers, packed, back, strict=True):
            p = (logits - largest[..., None, None]).exp()
            total = total + p.flatten(2).sum(-1)
            out = out + _product(_sums(layout, pages[which], p), matrix)
        out = out / total.clamp_min(1e-30)[..., None]
        return out.unflatten(1, (shape.groups, queries)).to(q.dtype)

    return step


def _logits(shape: StepShape, tier: int, stored: Tensor, folded: Tensor, constant: Tensor | None) -> Tensor:
    """Logits of folded queries over pages [rows, n, page_bytes], which are never made."""
    layout, codec, q = shape.layouts[tier], shape.layouts[tier].key, folded[..., slice(*shape.keys[tier])]
    codes = _part(layout, stored, "key").unflatten(2, (layout.tokens, codec.rows))
    products: Tensor | float = 0.0
    for plane in _planes(codec, codes, 3):
        terms = [field[:, None] * q[:, :, None, None, columns] for columns, field in plane]
        products = products + sum(terms[1:], terms[0]).sum(-1)
    zero = _part(layout, stored, "key_zero")[:, None].float() if codec.zero_bytes else codec.center
    logits = (products - folded[..., slice(*shape.total)][..., None] * zero) * _scales(layout, stored, "key_scale")
    return cap(logits if constant is None else logits + constant[..., None, None], shape.softcap)


def _sums(layout: PageLayout, stored: Tensor, p: Tensor) -> Tensor:
    """Sums by p [rows, queries, n, tokens] of codes, and of zeros or of the weights: [rows, queries, columns + 1].

    Pages are added up before tokens are: a token's sum stays in its lane of a vector.
    """
    codec = layout.value
    weights = (p * _scales(layout, stored, "value_scale"))[:, :, :, None]  # [rows, queries, n, 1, tokens]
    codes = _part(layout, stored, "value").unflatten(2, (codec.rows, layout.tokens))
    fields = [field for plane in _planes(codec, codes, 2) for _, field in plane]
    zero = _part(layout, stored, "value_zero")[:, None, :, None].float() if codec.zero_bytes else 1.0
    return torch.cat([*((weights * field[:, None]).sum(2) for field in fields), (weights * zero).sum(2)], 2).sum(-1)


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


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., a] times a small matrix [a, b], by a loop: a library's product would end the function."""
    return (x[..., None] * matrix).sum(-2)
