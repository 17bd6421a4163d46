"""Packed tokens as tiles of plain numbers: page addresses and dequantisation for kernels outside the decode loop.

A tile is any run of tokens of one row and tier; it may span pages. Keys come token-major, values feature-major, as they
lie in a page, so that neighbouring lanes read neighbouring bytes. x = s * (code - z), see `hfkv.quant`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.triton.constants import (
    DTYPES,
    EXACT,
    FITTED,
    KINDS,
    MINMAX,
    SCALE_BIAS,
    SCALE_STEP,
    SLOT_BITS,
    SLOT_MASK,
)
from hfkv.quant import Codec, PageLayout

if TYPE_CHECKING:
    from hfkv.kernels.triton.pack_attention import PlainPages
    from hfkv.paging.packed import PackedLayer

LOG2E = tl.constexpr(1.4426950408889634)

# A tier is a tuple of numbers, so that one kernel argument carries it: these are its positions.
PAGE_BYTES = tl.constexpr(0)
PAGE_TOKENS = tl.constexpr(1)
ALIGN = tl.constexpr(2)
SCORE = tl.constexpr(3)
BIRTH = tl.constexpr(4)

# One side (keys or values) of a tier likewise.
BITS = tl.constexpr(0)
KIND = tl.constexpr(1)
STORED = tl.constexpr(2)  # 1: 8-bit codes less 128; of exact numbers 16, -16 (bfloat16) or 32
DIM = tl.constexpr(3)
ROWS = tl.constexpr(4)
CODES = tl.constexpr(5)
SCALE = tl.constexpr(6)
ZERO = tl.constexpr(7)
SLOT_STRIDE = tl.constexpr(8)
ROW_STRIDE = tl.constexpr(9)

PROGRAMS = 1024
"""Programs that fill a large device several times over."""

NO_TIER = (0,) * 5
NO_SIDE = (0,) * 10


@dataclass(frozen=True)
class Pages:
    """What a kernel has to know of a layer's packed tokens; it stays right while tokens are only appended.

    Attributes:
        ids: int32 [rows, width], a page table: tier 0 from the left, tier 1 from the right.
        lengths: int32 [rows, 2], tokens per tier.
        addresses: int64 [chunks], first byte of every chunk of the pool.
        layouts: one or two page layouts.
        align: a power of two that divides every page address.
    """

    ids: Tensor
    lengths: Tensor
    addresses: Tensor
    layouts: tuple[PageLayout, ...]
    align: int

    @classmethod
    def of(cls, packed: PackedLayer | PlainPages) -> Pages:
        """The pages of a layer as they are now: a compaction makes another table. No synchronisation, no allocation."""
        table, pool = packed.table, packed.pool
        align = math.gcd(16, pool.chunk_bytes, *(layout.page_bytes for layout in packed.layouts))
        return cls(table.ids, table.lengths, pool.chunk_addresses, tuple(packed.layouts), align)

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def most_tokens(self) -> int:
        """Upper bound of a row's packed tokens, known without asking the device."""
        return self.ids.shape[1] * self.layouts[0].tokens

    def constants(self, half: bool) -> dict[str, Any]:
        """Compile-time arguments `TIERS`, `T0`, `K0`, `V0`, `DOT0` and those of tier 1; `half`: products in fp16."""
        named: dict[str, Any] = {"TIERS": len(self.layouts) if self.ids.shape[1] else 0}
        for i in range(2):
            layout = self.layouts[i] if i < len(self.layouts) else None
            named[f"T{i}"] = NO_TIER if layout is None else tier_constants(layout, self.align)
            named[f"K{i}"] = NO_SIDE if layout is None else side_constants(layout, "key")
            named[f"V{i}"] = NO_SIDE if layout is None else side_constants(layout, "value")
            named[f"DOT{i}"] = _product_dtype(None if layout is None else layout.key, half)
        return named


def tier_constants(layout: PageLayout, align: int) -> tuple[int, ...]:
    """A tier as kernels take it."""
    fields = layout.fields
    return (layout.page_bytes, layout.tokens, align, fields["score"][0], fields["birth"][0])


def side_constants(layout: PageLayout, side: str) -> tuple[int, ...]:
    """The keys (`side="key"`) or values of a tier as kernels take them."""
    codec, fields = layout.key if side == "key" else layout.value, layout.fields
    strides = (codec.rows, 1) if side == "key" else (1, layout.tokens)
    starts = (fields[side][0], fields[f"{side}_scale"][0], fields[f"{side}_zero"][0])
    element = {torch.float16: 16, torch.bfloat16: -16, torch.float32: 32}[codec.dtype] if not codec.bits else 0
    return (codec.bits, KINDS[codec.kind], int(codec.signed) or element, codec.dim, codec.padded, *starts, *strides)


def _product_dtype(codec: Codec | None, half: bool) -> tl.dtype:
    """What a tier's keys and values are multiplied in: exact ones as they are, codes in fp16 unless all is float32."""
    if codec is not None and not codec.bits:
        return DTYPES[codec.dtype]
    return tl.float16 if half else tl.float32


@functools.lru_cache(maxsize=32)
def major(device: torch.device) -> int:
    """Major compute capability of a device; 8 for the interpreter's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


@triton.jit
def page_address(ids, width, addresses, token, length, INDEX: tl.constexpr, TIER: tl.constexpr):
    """Address [n] of the page of each token int32 [n] of a row with `length` >= 1 tokens, its page table at `ids`.

    Tokens behind the last page get the last page: reading there needs no mask, and free slots hold finite numbers. The
    first token must be a multiple of n.
    """
    page = tl.minimum(token // TIER[PAGE_TOKENS], (length - 1) // TIER[PAGE_TOKENS])
    if INDEX == 1:
        page = width - 1 - page
    page_id = tl.load(ids + page)
    address = tl.load(addresses + (page_id >> SLOT_BITS)) + (page_id & SLOT_MASK).to(tl.int64) * TIER[PAGE_BYTES]
    align: tl.constexpr = TIER[ALIGN]
    run: tl.constexpr = min(TIER[PAGE_TOKENS], token.shape[0])
    return tl.max_constancy(tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), align), run)


@triton.jit
def load_keys(page, slot, feature, SIDE: tl.constexpr, OUT: tl.constexpr):
    """Keys [tokens, features] of slots [tokens] of pages at addresses [tokens]; numbers of type OUT."""
    s, o = _terms(page, slot, SIDE)
    return vectors(page[:, None], slot[:, None], feature[None, :], s[:, None], o[:, None], SIDE, OUT)


@triton.jit
def load_values(page, slot, feature, SIDE: tl.constexpr, OUT: tl.constexpr):
    """Values [features, tokens], likewise."""
    s, o = _terms(page, slot, SIDE)
    return vectors(page[None, :], slot[None, :], feature[:, None], s[None, :], o[None, :], SIDE, OUT)


@triton.jit
def _terms(page, slot, SIDE: tl.constexpr):
    """(s, o) float32 [tokens] with x = s * code + o."""
    if SIDE[KIND] == EXACT:
        s = tl.full(slot.shape, 1.0, tl.float32)
        o = tl.zeros(slot.shape, tl.float32)
    elif SIDE[KIND] == MINMAX:
        s = tl.load((page + SIDE[SCALE]).to(tl.pointer_type(tl.float16), bitcast=True) + slot).to(tl.float32)
        s = tl.where(s > 0, s, 1.0)
        o = tl.load((page + SIDE[ZERO]).to(tl.pointer_type(tl.float16), bitcast=True) + slot).to(tl.float32)
    else:
        s = tl.exp2((tl.load(page + SIDE[SCALE] + slot).to(tl.float32) - SCALE_BIAS) * SCALE_STEP)
        if SIDE[KIND] == FITTED:
            o = s * (-0.5 * ((1 << SIDE[BITS]) - 1))
        else:
            o = -s * tl.load(page + SIDE[ZERO] + slot).to(tl.float32)
    return s, o


@triton.jit
def vectors(page, slot, feature, s, o, SIDE: tl.constexpr, OUT: tl.constexpr):
    first = page + SIDE[CODES]
    inside = feature < SIDE[DIM]
    if SIDE[BITS] == 0:
        at = slot * SIDE[SLOT_STRIDE] + feature * SIDE[ROW_STRIDE]
        if SIDE[STORED] == 16:
            x = tl.load(first.to(tl.pointer_type(tl.float16), bitcast=True) + at, mask=inside, other=0.0)
        elif SIDE[STORED] == -16:
            x = tl.load(first.to(tl.pointer_type(tl.bfloat16), bitcast=True) + at, mask=inside, other=0.0)
        else:
            x = tl.load(first.to(tl.pointer_type(tl.float32), bitcast=True) + at, mask=inside, other=0.0)
        return x.to(OUT)
    else:
        bytes_ = first + slot * SIDE[SLOT_STRIDE]
        if SIDE[BITS] == 8:
            code = tl.load(bytes_ + feature * SIDE[ROW_STRIDE], mask=inside, other=0)
            if SIDE[STORED] == 1:
                code = code ^ 128
        elif SIDE[BITS] == 3:
            code = _plane(bytes_, inside, feature, 2, SIDE)
            high = bytes_ + SIDE[ROWS] // 4 * SIDE[ROW_STRIDE]
            code = code | (_plane(high, inside, feature, 1, SIDE) << 2)
        else:
            code = _plane(bytes_, inside, feature, SIDE[BITS], SIDE)
        return (code.to(tl.float32) * s + o).to(OUT)


@triton.jit
def _plane(bytes_, inside, feature, WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """Codes uint8 of one bit plane: feature f is in byte f % rows, in its slice f // rows."""
    rows: tl.constexpr = SIDE[ROWS] * WIDTH // 8
    packed = tl.load(bytes_ + feature % rows * SIDE[ROW_STRIDE], mask=inside, other=0)
    shift = (feature // rows * WIDTH) & 7  # features that there are not would be shifted out: undefined, not 0
    return (packed >> shift.to(tl.uint8)) & ((1 << WIDTH) - 1)


@triton.jit
def soft_cap(x, softcap):
    """softcap * tanh(x / softcap)."""
    return softcap - 2.0 * softcap / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap)))


@triton.jit
def section(first, last, start, count):
    """The part of a program's tiles [first, last) that falls into the section [start, start + count), inside it."""
    return tl.minimum(tl.maximum(first - start, 0), count), tl.minimum(tl.maximum(last - start, 0), count)
