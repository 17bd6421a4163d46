"""Exact vectors straight into pages: rotate, shift, quantise, pack; the kernel of `hfkv.kernels.quantize_pack`.

A program codes BLOCK tokens of one row, keys or values. Features lie as [BLOCK, SLICES, WP], one slice for every
position of a code inside its byte, so that packing is a sum of shifted codes over the slices and no feature moves
between threads. Codes differ from the twin's only where rounding falls the other way: sums in another order,
approximate logarithms and powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.quantize_pack import Basis
from hfkv.kernels.triton.constants import (
    AFFINE,
    EXACT,
    FITTED,
    KINDS,
    LARGEST_HALF,
    MINMAX,
    SCALE_BIAS,
    SCALE_STEP,
    SCALE_STEPS,
    SLOT_BITS,
    SLOT_MASK,
    power_of_two,
)
from hfkv.kernels.triton.launch import launches
from hfkv.quant import GAUSS_STEP, Codec, PageLayout

BLOCK = 32
SLICES = {0: 1, 8: 1, 4: 2, 3: 8, 2: 4}
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even
LARGEST = tl.constexpr(3.4028234663852886e38)
HALF_LIMIT = tl.constexpr(65520.0)  # the least number that rounds to infinity in fp16


class TierPages(NamedTuple):
    """Where a tier's pages lie.

    Attributes:
        ids: int32 [rows, width], the rows' two-ended page table, contiguous.
        addresses: int64 [chunks], bytes.
        layout: of the tier's pages.
        tier: 0 counts from the left of the table, 1 from the right.
    """

    ids: Tensor
    addresses: Tensor
    layout: PageLayout
    tier: int


def side_constants(layout: PageLayout, side: str) -> dict[str, Any]:
    """Compile-time constants of a tier's keys (`side="key"`) or values."""
    codec: Codec = getattr(layout, side)
    slices = SLICES[codec.bits]
    width = codec.padded // slices
    return {
        "KIND": KINDS[codec.kind],
        "BITS": codec.bits,
        "TOP": codec.top,
        "BOUND": codec.bound if codec.kind == "bounded" else 0.0,
        "UNBIASED": codec.unbiased,
        "SIGNED": codec.signed,
        "GAUSS": GAUSS_STEP.get(codec.bits, 0.0),
        "PADDED": codec.padded,
        "SLICES": slices,
        "W": width,
        "WP": power_of_two(width, 16 // slices),
        "ROWS": codec.rows,
        "ELEMENT": codec.element,
        "START": layout.fields[side][0],
        "SCALE": layout.fields[f"{side}_scale"][0],
        "ZERO": layout.fields[f"{side}_zero"][0],
    }


def page_constants(layout: PageLayout) -> dict[str, Any]:
    """Compile-time constants of a tier's pages."""
    return {
        "TOKENS": layout.tokens,
        "PAGE_BYTES": layout.page_bytes,
        "SCORE": layout.fields["score"][0],
        "BIRTH": layout.fields["birth"][0],
    }


# ---- addresses ---------------------------------------------------------------------------------------------------


@triton.jit
def page_address(table, width, addresses, row, page, mask, TIER: tl.constexpr, PAGE_BYTES: tl.constexpr):
    """Addresses int64 of pages of a row; a tier's pages count from its end of the table."""
    column = page if TIER == 0 else width - 1 - page
    number = tl.load(table + row.to(tl.int64) * width + column, mask=mask, other=0)
    chunk = tl.load(addresses + (number >> SLOT_BITS), mask=mask, other=0)
    return chunk + (number & SLOT_MASK).to(tl.int64) * PAGE_BYTES


@triton.jit
def features_of(SLICES: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, DIM: tl.constexpr):
    """Feature of each column of [SLICES * WP], and whether there is one."""
    column = tl.arange(0, SLICES * WP)
    feature = (column // WP) * W + column % WP
    return feature, (column % WP < W) & (feature < DIM)


@triton.jit
def byte_offset(inside, index, ROWS: tl.constexpr, TOKENS: tl.constexpr, VALUE: tl.constexpr):
    """Element `index` of token `inside`: keys lie token-major, values feature-major."""
    if VALUE:
        return index[None, :] * TOKENS + inside[:, None]
    else:
        return inside[:, None] * ROWS + index[None, :]


# ---- one block of vectors ----------------------------------------------------------------------------------------


@triton.jit
def round_even(x):
    return (x + ROUNDER) - ROUNDER


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def scale_of(code):
    return tl.exp2((code - SCALE_BIAS) * SCALE_STEP)


@triton.jit
def scale_code(scale, ROUND: tl.constexpr):
    """Scales -> (scale byte as float, whether no byte holds it); ROUND: down (-1), to the nearest (0), up (1)."""
    code = tl.log2(tl.maximum(scale, 2.0**-30)) * SCALE_STEPS
    if ROUND == 0:
        code = round_even(code)
    elif ROUND > 0:
        code = tl.ceil(code)
    else:
        code = tl.floor(code)
    code += SCALE_BIAS
    return clamp(code, 1.0, 255.0), code > 255


@triton.jit
def quantise(
    x, real,
    KIND: tl.constexpr, TOP: tl.constexpr, BOUND: tl.constexpr, UNBIASED: tl.constexpr, GAUSS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Vectors float32 [n, columns], 0 where not `real` -> (codes float, scale, zero, flag bits int32 [n])."""
    flag = tl.max(tl.where(tl.abs(x) <= LARGEST, 0, 1), 1)
    scale = tl.zeros_like(tl.max(x, 1))
    zero = scale
    levels = x
    if KIND == AFFINE:
        low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
        if BOUND > 0:
            scale, beyond = scale_code((high - low) * BOUND, -1)
        else:
            scale, beyond = scale_code(tl.div_rn(high - low, tl.full(low.shape, TOP - 0.5, tl.float32)), 1)
        step = scale_of(scale)
        zero = round_even(clamp(-tl.div_rn(low, step), 0.0, TOP))
        y = tl.div_rn(x, tl.broadcast_to(step[:, None], x.shape)) + zero[:, None]
        levels = round_even(clamp(y, 0.0, TOP))
        flag |= tl.where(beyond, 2, 0)
    if KIND == FITTED:
        CENTER: tl.constexpr = TOP / 2
        energy = tl.sum(x * x, 1)
        step = tl.maximum(tl.sqrt_rn(energy / DIM) * GAUSS, 1e-30)
        y = tl.div_rn(x, tl.broadcast_to(step[:, None], x.shape)) + CENTER
        levels = round_even(clamp(y, 0.0, TOP))
        centred = tl.where(real, levels - CENTER, 0.0)
        overlap = tl.sum(x * centred, 1)
        if UNBIASED:
            fitted = tl.div_rn(energy, tl.maximum(overlap, 1e-30))
        else:
            fitted = tl.div_rn(overlap, tl.maximum(tl.sum(centred * centred, 1), 0.25))
        scale, beyond = scale_code(fitted, 0)
        flag |= tl.where(beyond, 2, 0)
    if KIND == MINMAX:
        low = tl.min(tl.where(real, x, float("inf")), 1)
        high = tl.max(tl.where(real, x, float("-inf")), 1)
        scale = tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32))
        flag |= tl.where((scale >= HALF_LIMIT) | (tl.abs(low) >= HALF_LIMIT), 4, 0)
        scale = clamp(scale, 0.0, LARGEST_HALF).to(tl.float16).to(tl.float32)
        zero = clamp(low, -LARGEST_HALF, LARGEST_HALF).to(tl.float16).to(tl.float32)
        step = tl.maximum(scale, 1e-12)
        y = tl.div_rn(x - zero[:, None], tl.broadcast_to(step[:, None], x.shape))
        levels = round_even(clamp(y, 0.0, TOP))
    return levels, scale, zero, flag


@triton.jit
def store_vectors(
    base, inside, ok, x, scale, zero, feature, real, element,
    KIND: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, SLICES: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, ROWS: tl.constexpr, START: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    ELEMENT: tl.constexpr, TOKENS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Write codes (or exact vectors) x [n, columns], scales and zeros of tokens `inside` of the pages at `base`."""
    if KIND == EXACT:
        at = base[:, None] + START + byte_offset(inside, feature, ROWS, TOKENS, VALUE) * ELEMENT
        tl.store(at.to(tl.pointer_type(element)), x.to(element), mask=ok[:, None] & real[None, :])
    else:
        N: tl.constexpr = x.shape[0]
        levels = tl.where(real[None, :], x, 0.0).to(tl.int32)
        if SIGNED:
            levels = levels ^ 128
        cube = tl.reshape(levels, (N, SLICES, WP))
        piece = tl.arange(0, SLICES)[None, :, None]
        byte = tl.arange(0, WP)
        mask = ok[:, None] & (byte < W)[None, :]
        if BITS == 3:
            for half in tl.static_range(2):
                low = tl.sum(tl.where(piece % 2 == half, (cube & 3) << (piece // 2 * 2), 0), 1)
                at = base[:, None] + START + byte_offset(inside, byte + half * W, ROWS, TOKENS, VALUE)
                tl.store(at.to(tl.pointer_type(tl.uint8)), low.to(tl.uint8), mask=mask)
            high = tl.sum((cube >> 2) << piece, 1)
            at = base[:, None] + START + byte_offset(inside, byte + 2 * W, ROWS, TOKENS, VALUE)
            tl.store(at.to(tl.pointer_type(tl.uint8)), high.to(tl.uint8), mask=mask)
        else:
            packed = tl.sum(cube << (piece * BITS), 1)
            at = base[:, None] + START + byte_offset(inside, byte, ROWS, TOKENS, VALUE)
            tl.store(at.to(tl.pointer_type(tl.uint8)), packed.to(tl.uint8), mask=mask)
        if KIND == MINMAX:
            tl.store((base + SCALE + inside * 2).to(tl.pointer_type(tl.float16)), scale.to(tl.float16), mask=ok)
            tl.store((base + ZERO + inside * 2).to(tl.pointer_type(tl.float16)), zero.to(tl.float16), mask=ok)
        else:
            tl.store((base + SCALE + inside).to(tl.pointer_type(tl.uint8)), scale.to(tl.int32).to(tl.uint8), mask=ok)
            if KIND == AFFINE:
                tl.store((base + ZERO + inside).to(tl.pointer_type(tl.uint8)), zero.to(tl.int32).to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=["width", "n"])
def pack_kernel(
    x_ptr, stride_row, stride_token, rotation, mean, slots, scores, births, table, width, addresses, flags, n,
    TIER: tl.constexpr, VALUE: tl.constexpr, DIM: tl.constexpr, DIMP: tl.constexpr, ROTATE: tl.constexpr,
    SHIFT: tl.constexpr, SCORED: tl.constexpr, STORE: tl.constexpr, SAFE: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, SCORE: tl.constexpr, BIRTH: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, TOP: tl.constexpr, BOUND: tl.constexpr, UNBIASED: tl.constexpr, SIGNED: tl.constexpr,
    GAUSS: tl.constexpr, PADDED: tl.constexpr, SLICES: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    ROWS: tl.constexpr, ELEMENT: tl.constexpr, START: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of tokens). Without STORE tokens whose norm shows that they can be coded are not quantised."""
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row.to(tl.int64) * n + token
    slot = tl.load(slots + place, mask=token < n, other=-1)
    ok = slot >= 0
    source = x_ptr + row.to(tl.int64) * stride_row + token.to(tl.int64) * stride_token
    doubtful = tl.max(slot, 0) >= 0
    if not STORE:
        energy = tl.zeros((BLOCK,), tl.float32)
        shift = 0.0
        for first in range(0, DIMP, STEP):
            d = first + tl.arange(0, STEP)
            part = tl.load(source[:, None] + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
            energy += tl.sum(part.to(tl.float32) * part.to(tl.float32), 1)
            if SHIFT:
                centre_part = tl.load(mean + row.to(tl.int64) * DIM + d, mask=d < DIM, other=0.0)
                shift += tl.sum(centre_part * centre_part, 0)
        room = SAFE - tl.sqrt(shift + energy * 0.0)
        doubtful = tl.max(tl.where((room > 0) & (energy <= room * room), 0, 1), 0) > 0  # NaN is doubtful
    if doubtful:
        feature, real = features_of(SLICES, W, WP, DIM)
        if ROTATE:
            x = tl.zeros((BLOCK, SLICES * WP), tl.float32)
            for first in range(0, DIMP, STEP):
                d = first + tl.arange(0, STEP)
                part = tl.load(source[:, None] + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
                turn = tl.load(
                    rotation + d[:, None] * DIM + feature[None, :], mask=(d < DIM)[:, None] & real[None, :], other=0.0
                )
                x = tl.dot(part.to(tl.float32), turn, x, input_precision="ieee")
        else:
            x = tl.load(source[:, None] + feature[None, :], mask=ok[:, None] & real[None, :], other=0.0).to(tl.float32)
        if SHIFT:
            centre = tl.load(mean + row.to(tl.int64) * DIM + feature, mask=real, other=0.0)
            x = tl.where(ok[:, None], x - centre[None, :], 0.0)
        codes, scale, zero, flag = quantise(x, real[None, :], KIND, TOP, BOUND, UNBIASED, GAUSS, DIM)
        found = tl.max(tl.where(ok, flag, 0), 0)
        if found > 0:
            tl.atomic_or(flags, found)
        if STORE:
            base = page_address(table, width, addresses, row, slot // TOKENS, ok, TIER, PAGE_BYTES)
            inside = slot % TOKENS
            store_vectors(
                base, inside, ok, codes, scale, zero, feature, real, x_ptr.dtype.element_ty, KIND, BITS, SIGNED,
                SLICES, W, WP, ROWS, START, SCALE, ZERO, ELEMENT, TOKENS, VALUE,
            )  # fmt: skip
            if SCORED:
                score = tl.minimum(tl.load(scores + place, mask=ok, other=0.0), LARGEST_HALF)
                tl.store((base + SCORE + inside * 2).to(tl.pointer_type(tl.float16)), score.to(tl.float16), mask=ok)
                birth = tl.load(births + place, mask=ok, other=0)
                tl.store((base + BIRTH + inside * 4).to(tl.pointer_type(tl.int32)), birth.to(tl.int32), mask=ok)


@launches
def pack_rows(
    pages: TierPages,
    basis: Basis,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    birth: Tensor,
    slots: Tensor,
    flags: Tensor,
    store: bool = True,
) -> None:
    """Code tokens and write them into their slots.

    Args:
        pages: of the tier, those of new slots included.
        k: [rows, n, D]; v: [rows, n, Dv], in the model's dtype, features adjacent.
        score: float32 [rows, n]; birth: int64 [rows, n].
        slots: int32 [rows, n], slot in the row's tier; -1 for tokens that do not enter it.
        flags: int32 [1], gets the bits NOT_FINITE, BEYOND_BYTE, BEYOND_HALF where a token cannot be coded.
        store: False only looks for what cannot be coded.
    """
    rows, n = slots.shape
    if not slots.numel():
        return
    score, birth = score.contiguous(), birth.contiguous()
    for side, x, turn in (("key", k, basis.key), ("value", v, basis.value)):
        dim, value = x.shape[2], side == "value"
        assert x.stride(2) == 1 and slots.is_contiguous()
        mean = None if value else basis.mean
        pack_kernel[(rows, triton.cdiv(n, BLOCK))](
            x, x.stride(0), x.stride(1), turn, mean, slots, score, birth, pages.ids, pages.ids.shape[1],
            pages.addresses, flags, n, TIER=pages.tier, VALUE=value, DIM=dim, DIMP=power_of_two(dim),
            ROTATE=turn is not None, SHIFT=mean is not None, SCORED=pages.layout.scored and not value, STORE=store,
            SAFE=getattr(pages.layout, side).safe_norm, BLOCK=BLOCK, STEP=16, **page_constants(pages.layout),
            **side_constants(pages.layout, side), num_warps=4,
        )  # fmt: skip
