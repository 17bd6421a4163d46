"""Sealing pages on the device, by the kernel whose twin is `hfkv.kernels.sealing.seal`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.sealing import PACKS, meta_bytes, pack_format, pack_words
from hfkv.kernels.triton.constants import power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.tiles import side_constants, vectors
from hfkv.packing import BLOCK, HEAD, PACK, REPACKS, WORD, PackedSide
from hfkv.packing import RAW as RAW_FLAG
from hfkv.quant import PageLayout

WARPS = 8
"""Of a program; fewer would spill."""

TOKENS = tl.constexpr(BLOCK)
RUN = tl.constexpr(PACK)
FRONT = tl.constexpr(HEAD)
RAW = tl.constexpr(RAW_FLAG)
NONE, GREEDY, MEDIAN, BUCKET = (tl.constexpr(i) for i in range(len(REPACKS)))
assert (PACK, BLOCK) == (16, 64)

# How one side of a pack lies, a tuple of numbers: these are its positions.
P_DIM = tl.constexpr(0)
P_BITS = tl.constexpr(1)
P_WIDTH_BITS = tl.constexpr(2)
P_PLANE = tl.constexpr(3)
P_HEADER = tl.constexpr(4)
P_RAW = tl.constexpr(5)
P_PACKED = tl.constexpr(6)


def pack_constants(side: PackedSide) -> tuple[int, ...]:
    """One side of a pack as kernels take it."""
    return (side.dim, side.bits, side.width_bits, side.plane, side.header, side.raw_bytes, int(side.packed))


@triton.jit
def bit_length(x):
    """Bits that numbers below 256 need."""
    bits = (x > 0).to(tl.int32) + (x > 1).to(tl.int32) + (x > 3).to(tl.int32) + (x > 7).to(tl.int32)
    return bits + (x > 15).to(tl.int32) + (x > 31).to(tl.int32) + (x > 63).to(tl.int32) + (x > 127).to(tl.int32)


@triton.jit
def halfwords(address):
    """16-bit words at even addresses."""
    return address.to(tl.pointer_type(tl.uint16), bitcast=True)


@triton.jit
def _stable_rank(x):
    """Place of each of [64] in their ascending order, equal ones as they lie."""
    t = tl.arange(0, TOKENS)
    before = (x[None, :] < x[:, None]) | ((x[None, :] == x[:, None]) & (t[None, :] < t[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _median(codes, inside, DIM: tl.constexpr, BITS: tl.constexpr):
    """Lower median of the codes int32 [64, features] of every token."""
    median = tl.zeros([TOKENS], tl.int32)
    for level in range(0, (1 << BITS) - 1):
        below = tl.sum(((codes <= level) & inside[None, :]).to(tl.int32), 1)
        median += (below <= (DIM - 1) // 2).to(tl.int32)
    return median


@triton.jit
def _wider(codes, low, high):
    """Bits [64] of mini-packs with these limits, were each token among them."""
    span = tl.maximum(high[None, :], codes) - tl.minimum(low[None, :], codes)
    return tl.sum(bit_length(span), 1)


@triton.jit
def _greedy_rank(keys, values, KP: tl.constexpr, VP: tl.constexpr):
    t = tl.arange(0, TOKENS)
    left, rank = t >= 0, tl.zeros([TOKENS], tl.int32)
    low_k = tl.max(keys, 0) * 0
    low_v = tl.max(values, 0) * 0
    high_k, high_v = low_k, low_v
    for place in range(0, TOKENS):
        begins = (place & 15) == 0
        cost = tl.zeros([TOKENS], tl.int32)
        if KP[P_PACKED]:
            cost += _wider(keys, low_k, high_k)
        if VP[P_PACKED]:
            cost += _wider(values, low_v, high_v)
        cost = tl.where(begins, 0, cost) * TOKENS + t
        pick = tl.min(tl.where(left, cost, 1 << 30), 0) % TOKENS
        mine = t == pick
        k = tl.sum(tl.where(mine[:, None], keys, 0), 0)
        v = tl.sum(tl.where(mine[:, None], values, 0), 0)
        low_k, high_k = tl.where(begins, k, tl.minimum(low_k, k)), tl.where(begins, k, tl.maximum(high_k, k))
        low_v, high_v = tl.where(begins, v, tl.minimum(low_v, v)), tl.where(begins, v, tl.maximum(high_v, v))
        rank = tl.where(mine, place, rank)
        left = left & (t != pick)
    return rank


@triton.jit
def _rank(keys, values, HOW: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Place of every token of a page, [64]."""
    t = tl.arange(0, TOKENS)
    if HOW == GREEDY:
        rank = _greedy_rank(keys, values, KP, VP)
    elif HOW == MEDIAN:
        if VP[P_PACKED]:
            rank = _stable_rank(_median(values, tl.arange(0, BV) < VP[P_DIM], VP[P_DIM], VP[P_BITS]))
        else:
            rank = _stable_rank(_median(keys, tl.arange(0, BK) < KP[P_DIM], KP[P_DIM], KP[P_BITS]))
    elif HOW == BUCKET:
        total = tl.zeros([TOKENS], tl.int32)
        if KP[P_PACKED]:
            total += tl.sum(keys, 1)
        if VP[P_PACKED]:
            total += tl.sum(values, 1)
        low, high = tl.min(total, 0), tl.max(total, 0)
        rank = _stable_rank((total - low) * 4 // (high - low + 1))
    else:
        rank = t
    return rank


@triton.jit
def _store_planes(at, x, COUNT: tl.constexpr, PLANE: tl.constexpr, B: tl.constexpr, stored):
    """Numbers [features] as `COUNT` bit planes, feature 8 i + j in bit j of byte i."""
    byte = tl.arange(0, B // 8)
    shift = tl.arange(0, 8)
    for j in tl.static_range(COUNT):
        bits = tl.reshape((x >> j) & 1, (B // 8, 8)) << shift[None, :]
        tl.store(at + j * PLANE + byte, tl.sum(bits, 1).to(tl.uint8), mask=(byte < PLANE) & stored)


@triton.jit
def _store_side(at, codes, mine, place, P: tl.constexpr, B: tl.constexpr):
    """One side of a pack: the tokens `mine` [64] at `place` [64] -> (bytes, whether raw)."""
    feature = tl.arange(0, B)
    inside = feature < P[P_DIM]
    low = tl.min(tl.where(mine[:, None], codes, 255), 0)
    width = tl.where(inside, bit_length(tl.max(tl.where(mine[:, None], codes, 0), 0) - low), 0)
    low = tl.where(width == P[P_BITS], 0, low)
    size = P[P_HEADER] + 2 * tl.sum(width, 0)
    limit: tl.constexpr = P[P_RAW] if P[P_PACKED] else 0
    raw = size >= limit
    low = tl.where(raw, 0, low)
    width = tl.where(raw & inside, P[P_BITS], width)
    first = tl.cumsum(width, 0) - width + tl.where(raw, 0, P[P_HEADER] // 2)
    weight = tl.where(mine, 1 << place, 0)
    bits: tl.constexpr = P[P_BITS]
    for j in tl.static_range(bits):
        word = tl.sum((((codes - low[None, :]) >> j) & 1) * weight[:, None], 0)
        tl.store(halfwords(at) + first + j, word.to(tl.uint16), mask=j < width)
    _store_planes(at, low, P[P_BITS], P[P_PLANE], B, size < limit)
    widths = at + P[P_BITS] * P[P_PLANE]
    _store_planes(widths, width, P[P_WIDTH_BITS], P[P_PLANE], B, size < limit)
    return tl.where(raw, P[P_RAW], size), raw


@triton.jit
def seal_kernel(
    pages_ptr,
    packs_ptr,
    words_ptr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    FIELDS: tl.constexpr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    BEFORE: tl.constexpr,
    HOW: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    PACK_BYTES: tl.constexpr,
    META_BYTES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One full page into four packs; `packs` must be 0.

    Of each of the FIELDS parts of metadata: its first byte in a page, bytes per token, and those of the parts before.
    """
    i_page = tl.program_id(0).to(tl.int64)
    page = pages_ptr + i_page * PAGE_BYTES
    t = tl.arange(0, TOKENS)
    keys = vectors(page, t[:, None], tl.arange(0, BK)[None, :], 1.0, 0.0, KEY, tl.int32)
    values = vectors(page, t[:, None], tl.arange(0, BV)[None, :], 1.0, 0.0, VALUE, tl.int32)
    rank = _rank(keys, values, HOW, KP, VP, BK, BV)
    place = rank % RUN
    packs = packs_ptr + i_page * 4 * PACK_BYTES
    target = packs + (rank // RUN).to(tl.int64) * PACK_BYTES + FRONT
    for i in tl.static_range(FIELDS):
        for b in range(0, SIZES[i]):
            x = tl.load(page + STARTS[i] + t * SIZES[i] + b)
            tl.store(target + BEFORE[i] * RUN + place * SIZES[i] + b, x)
    for p in range(0, 4):
        mine = rank // RUN == p
        start = packs + p * PACK_BYTES
        at = start + FRONT + RUN * META_BYTES
        key_size, key_raw = _store_side(at, keys, mine, place, KP, BK)
        value_size, value_raw = _store_side(at + key_size, values, mine, place, VP, BV)
        tl.store(halfwords(start), (key_size + tl.where(key_raw, RAW, 0)).to(tl.uint16))
        tl.store(halfwords(start) + 1, (value_size + tl.where(value_raw, RAW, 0)).to(tl.uint16))
        size = FRONT + RUN * META_BYTES + key_size + value_size
        tl.store(words_ptr + i_page * 4 + p, ((size + 7) // 8).to(tl.int64))


def seal_constants(layout: PageLayout) -> dict[str, Any]:
    """Compile-time arguments of `seal_kernel` for a layout."""
    form, fields = pack_format(layout), [layout.fields[name] for name in layout.meta_names]
    sizes = tuple((stop - first) // layout.tokens for first, stop in fields)
    return {
        "KEY": side_constants(layout, "key"),
        "VALUE": side_constants(layout, "value"),
        "KP": pack_constants(form.key),
        "VP": pack_constants(form.value),
        "FIELDS": len(fields),
        "STARTS": tuple(first for first, _ in fields),
        "SIZES": sizes,
        "BEFORE": tuple(sum(sizes[:i]) for i in range(len(sizes))),
        "HOW": REPACKS.index(form.repack),
        "PAGE_BYTES": layout.page_bytes,
        "PACK_BYTES": pack_words(layout) * WORD,
        "META_BYTES": meta_bytes(layout),
        "BK": power_of_two(form.key.dim),
        "BV": power_of_two(form.value.dim),
    }


@launches
def seal(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pack full pages uint8 [n, page_bytes]; see `hfkv.kernels.sealing.seal`."""
    count = pages.shape[0]
    packs = torch.zeros(count, PACKS, pack_words(layout), dtype=torch.int64, device=pages.device)
    words = torch.empty(count, PACKS, dtype=torch.int64, device=pages.device)
    if count:
        out = packs.view(torch.uint8)
        seal_kernel[(count,)](pages.contiguous(), out, words, **seal_constants(layout), num_warps=WARPS)
    return packs, words
