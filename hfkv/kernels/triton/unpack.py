"""Packed tokens of rows as the vectors that they came as; twin: `PackedRows.vectors`.

A program takes BLOCK slots of one row, keys or values: codes to numbers, the mean added, turned back. Which slots there
are the kernel sees for itself, so nobody waits for a list of pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.quantize_pack import Basis
from hfkv.kernels.triton.compaction import load_vectors
from hfkv.kernels.triton.constants import DTYPES, power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.quantize_pack import (
    TierPages,
    features_of,
    page_address,
    page_constants,
    side_constants,
)

BLOCK, STEP = 32, 16
NAMES = ("KIND", "BITS", "SIGNED", "PADDED", "SLICES", "W", "WP", "ROWS", "ELEMENT", "START", "SCALE", "ZERO")


@triton.jit(do_not_specialize=["width", "slots"])
def unpack_kernel(
    out, rotation, mean, table, width, addresses, lengths, slots,
    element: tl.constexpr, TIER: tl.constexpr, VALUE: tl.constexpr, DIM: tl.constexpr, DIMP: tl.constexpr,
    ROTATE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr,
    PADDED: tl.constexpr, SLICES: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, ROWS: tl.constexpr,
    ELEMENT: tl.constexpr, START: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of slots): out float32 [rows, slots, DIM], 0 in free slots."""
    row = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = slot < tl.load(lengths + row * 2 + TIER)
    base = page_address(table, width, addresses, row, slot // TOKENS, ok, TIER, PAGE_BYTES)
    feature, real = features_of(SLICES, W, WP, DIM)
    x = load_vectors(
        base, slot % TOKENS, ok, feature, real, element, KIND, BITS, SIGNED, PADDED, ROWS, START, SCALE, ZERO, ELEMENT,
        TOKENS, VALUE,
    )  # fmt: skip
    if SHIFT:
        centre = tl.load(mean + row.to(tl.int64) * DIM + feature, mask=real, other=0.0)
        x = tl.where(ok[:, None], x + centre[None, :], 0.0)
    target = out + (row.to(tl.int64) * slots + slot) * DIM
    held = slot < slots
    if ROTATE:
        for first in range(0, DIMP, STEP):
            d = first + tl.arange(0, STEP)
            turn = tl.load(
                rotation + d[None, :] * DIM + feature[:, None], mask=(d < DIM)[None, :] & real[:, None], other=0.0
            )
            part = tl.dot(x, turn, input_precision="ieee")
            tl.store(target[:, None] + d[None, :], part, mask=held[:, None] & (d < DIM)[None, :])
    else:
        tl.store(target[:, None] + feature[None, :], x, mask=held[:, None] & real[None, :])


@launches
def unpack_rows(pages: TierPages, lengths: Tensor, basis: Basis, side: str, slots: int) -> Tensor:
    """The keys (`side="key"`) or values of the first `slots` slots, float32 [rows, slots, dim], 0 in free ones.

    Args:
        pages: of the tier.
        lengths: int32 [rows, 2], tokens per tier.
        basis: what they were packed with.
    """
    codec, value = getattr(pages.layout, side), side == "value"
    rows, turn, mean = lengths.shape[0], (basis.value if value else basis.key), (None if value else basis.mean)
    out = torch.empty(rows, slots, codec.dim, device=lengths.device)
    if not out.numel():
        return out
    sizes = page_constants(pages.layout)
    given = side_constants(pages.layout, side)
    unpack_kernel[(rows, triton.cdiv(slots, BLOCK))](
        out, turn, mean, pages.ids, pages.ids.shape[1], pages.addresses, lengths, slots, element=DTYPES[codec.dtype],
        TIER=pages.tier, VALUE=value, DIM=codec.dim, DIMP=power_of_two(codec.dim), ROTATE=turn is not None,
        SHIFT=mean is not None, BLOCK=BLOCK, STEP=STEP, TOKENS=sizes["TOKENS"], PAGE_BYTES=sizes["PAGE_BYTES"],
        **{name: given[name] for name in NAMES}, num_warps=4,
    )  # fmt: skip
    return out
