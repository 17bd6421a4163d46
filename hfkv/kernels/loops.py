"""Attention of a decode step over packed pages, window and sinks: an expression that a compiler makes loops of.

The expression has elementwise operations, sums and maxima only, so that the compiler turns all of it into loops of one
function: they read codes where they lie in the pool, and what a processor pays for in short steps, calls of operations
and waking of threads, is paid once. It says the same as `hfkv.attend.attend_step`, and is meant for few queries: each
reads all codes anew. Run eagerly every term of its sums would be a tensor, so it is only ever run compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.decode_attention import cap
from hfkv.kernels.folding import Folding
from hfkv.quant import SCALE_BIAS, SCALE_STEPS, Codec, PageLayout

AT_ONCE = 4
"""Parts of a group's queries that share a loop: more would make it long to build."""

TierPages = tuple[Tensor, Tensor, Tensor]
"""Pages of a tier: int32 words [any, page_bytes / 4]; which of them belong to a row, int64 [rows, n]; and how many
slots of each are filled, int32 [rows, n]."""

BYTES = 4
"""Of a word. Whole words are what processors load, shift and convert by the vector; single bytes they are not."""


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
    """Whether pages of this layout can be read by loops: codes on both sides, in words; scales and zeros of a byte."""
    if layout.pack is not None or not layout.byte_metadata or layout.tokens % 16:
        return False
    return all(count % BYTES == 0 for first, width, _ in layout.key.planes for count in (first, width))


def step_loops(shape: StepShape) -> Callable[..., Tensor]:
    """The attention of a step's queries, whose tokens are the newest of the window; a row is a KV head of a sequence.

    Its arguments: q [rows, groups, queries, D]; keys and values of the window [rows, slots, dim], of which int64 [rows]
    are filled; sinks [rows, groups * queries] or None; `Folding.queries` as `by_bytes` has them; mean keys [rows, D] or
    None; a list of `Folding.values`; and a list of the pages of each tier.
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
            logits = _logits(shape, tier, pages[which], folded, constant)  # [rows, groups * queries, n, BYTES, words]
            token = torch.arange(shape.layouts[tier].tokens).view(-1, BYTES).T
            logits = torch.where(token < used[:, None, :, None, None], logits, float("-inf"))
            largest = torch.maximum(largest, logits.flatten(2).amax(-1))
            packed.append(logits)
        largest = largest if sinks is None else torch.maximum(largest, sinks)
        largest = torch.where(largest == float("-inf"), 0.0, largest)  # a sequence without a token
        # ---- weights, not yet divided by their sum, and what they weigh
        p = (exact - largest[..., None]).exp()
        total = p.sum(-1) if sinks is None else p.sum(-1) + (sinks - largest).exp()
        out = (p[..., None] * window_v.float()[:, None]).sum(2)  # [rows, groups * queries, Dv]
        for layout, (pages, which, _), logits, matrix in zip(shape.layouts, tiers, packed, back, strict=True):
            p = (logits - largest[..., None, None, None]).exp()
            total = total + p.flatten(2).sum(-1)
            out = out + _product(_sums(shape, layout, pages[which], p), matrix)
        out = out / total.clamp_min(1e-30)[..., None]
        return out.unflatten(1, (shape.groups, queries)).to(q.dtype)

    return step


@functools.lru_cache(maxsize=64)
def by_bytes(folding: Folding, layouts: tuple[PageLayout, ...]) -> Tensor:
    """`Folding.queries` with the columns of each field of keys by their bytes in words: first bytes, then second ..."""
    order = torch.arange(folding.queries.shape[1])
    for columns, layout in zip(folding.keys, layouts, strict=True):
        first = columns.start
        for _, width, bits in layout.key.planes:
            for _ in range(0, 8, bits):
                order[first : first + width] = order[first : first + width].view(-1, BYTES).T.flatten()
                first += width
    return folding.queries[:, order]


def _logits(shape: StepShape, tier: int, stored: Tensor, folded: Tensor, constant: Tensor | None) -> Tensor:
    """Logits [rows, queries, n, BYTES, words] of folded queries over pages [rows, n, words], which are never made.

    The tokens of a page are ordered as their values and metadata lie: by the byte of a word, then by word.
    """
    layout, codec, q = shape.layouts[tier], shape.layouts[tier].key, folded[..., slice(*shape.keys[tier])]
    codes = _part(layout, stored, "key").unflatten(2, (-1, BYTES, codec.rows // BYTES)).transpose(2, 3)
    planes = _planes(codec, codes, 4, in_words=True)

    def products(q: Tensor) -> Tensor:
        """q [rows, any, columns] -> [rows, any, n, BYTES, words]"""
        total: Tensor | float = 0.0
        for plane in planes:
            terms = [field[:, None] * q[:, :, None, None, None, columns] for columns, field in plane]
            total = total + sum(terms[1:], terms[0]).sum(-1)
        assert isinstance(total, Tensor)
        return total

    zero = _bytes(layout, stored, "key_zero")[:, None] if codec.zero_bytes else codec.center
    shifted = _by_query(shape, q, products) - folded[..., slice(*shape.total)][..., None, None] * zero
    logits = shifted * _scales(layout, stored, "key_scale")
    return cap(logits if constant is None else logits + constant[..., None, None, None], shape.softcap)


def _sums(shape: StepShape, layout: PageLayout, stored: Tensor, p: Tensor) -> Tensor:
    """Sums by p [rows, queries, n, BYTES, words] of codes, then of zeros or weights: [rows, queries, columns + 1].

    Pages are added up before words are: a word's sum stays in its lane of a vector.
    """
    codec = layout.value
    codes = _part(layout, stored, "value").unflatten(2, (codec.rows, layout.tokens // BYTES))
    fields: list[list[Tensor]] = []  # per field the codes of each byte, [rows, n, width, words]
    for plane in _planes(codec, codes, 2, in_words=False):
        parts = [field for _, field in plane]
        fields += [parts[first : first + BYTES] for first in range(0, len(parts), BYTES)]
    zero = _bytes(layout, stored, "value_zero")[:, None] if codec.zero_bytes else 1.0

    def sums(weights: Tensor) -> Tensor:
        """Weights [rows, any, n, BYTES, words]"""
        found = []
        for field in fields:
            terms = [weights[:, :, :, j, None] * codes[:, None] for j, codes in enumerate(field)]
            found.append(sum(terms[1:], terms[0]).sum(2).sum(-1))  # [rows, any, width]
        return torch.cat([*found, (weights * zero).sum(3).sum(2).sum(-1, keepdim=True)], 2)

    return _by_query(shape, p * _scales(layout, stored, "value_scale"), sums)


def _by_query(shape: StepShape, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of` x [rows, queries, ...]; where it is known how many queries there are, in up to AT_ONCE parts.

    The compiler then fuses these into one loop, in which a code is taken out of its word once for all of them. They are
    put together flat: of four dimensions and more, one of which is 1, it may take the queries for the innermost.
    """
    if not shape.single[1]:
        return of(x)
    parts = [of(part) for part in x.split(-(-shape.groups // AT_ONCE), 1)]
    return torch.cat([part.flatten(2) for part in parts], 1).unflatten(2, parts[0].shape[2:])


def _part(layout: PageLayout, stored: Tensor, name: str) -> Tensor:
    """The words of a part of pages [..., words]."""
    start, stop = layout.fields[name]
    return stored[..., start // BYTES : stop // BYTES]


def _bytes(layout: PageLayout, stored: Tensor, name: str) -> Tensor:
    """Metadata of a byte, float32 [rows, n, BYTES, words]."""
    shifts = torch.arange(0, 8 * BYTES, 8, dtype=torch.int32)[:, None]
    return ((_part(layout, stored, name)[:, :, None] >> shifts) & 255).float()


def _scales(layout: PageLayout, stored: Tensor, name: str) -> Tensor:
    """Scales float32 [rows, 1, n, BYTES, words]: an exp, which the compiler does not do again for every use."""
    return ((_bytes(layout, stored, name)[:, None] - SCALE_BIAS) * (math.log(2) / SCALE_STEPS)).exp()


def _planes(codec: Codec, words: Tensor, dim: int, in_words: bool) -> list[list[tuple[slice, Tensor]]]:
    """Per plane the codes in each field of its bytes, float32, field by field and byte by byte.

    Args:
        words: int32, rows of codes along `dim`: `in_words` four of them in one word, else each in words of its own.

    Returns:
        Of each field and byte (columns of `by_bytes`, codes).
    """
    planes, column, rows = [], 0, BYTES if in_words else 1
    for first, width, bits in codec.planes:
        stored, fields = words.narrow(dim, first // rows, width // rows), []
        stored = stored ^ _repeated(codec.stored_zero) if codec.signed else stored
        for field in range(0, 8, bits):
            for byte in range(BYTES):
                shift, columns = 8 * byte + field, slice(column, column + width // BYTES)
                codes = stored >> shift if shift else stored
                fields.append((columns, (codes & (2**bits - 1)).float()))
                column += width // BYTES
        planes.append(fields)
    return planes


def _repeated(byte: int) -> int:
    """The int32 that has a byte four times."""
    word = byte * 0x01010101
    return word - (1 << 32) if word >> 31 else word


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., a] times a small matrix [a, b], by a loop: a library's product would end the function."""
    return (x[..., None] * matrix).sum(-2)
