"""A long chunk of queries over packed pages of both tiers, over the exact window, and causally over itself.

Pages take the rotated queries and give values in the rotated basis, the exact keys the plain ones: two kernels, joined
by log-sum-exp once the first result is turned back. A tile of pages is unpacked once for a block of queries of all
heads of a GQA group; few queries over a long past are split over its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.triton import tiles
from hfkv.kernels.triton.constants import power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.prompt_attention import prompt_attention
from hfkv.kernels.triton.tiles import LOG2E, PROGRAMS, Pages, section

if TYPE_CHECKING:
    from hfkv.kernels.quantize_pack import Basis

BLOCK_ROWS = 1 << 17
"""Queries times query heads of one pass: what bounds the temporary memory."""
TILES_EACH = 8
"""Tiles of tokens that a program has at least where the past is split."""


@triton.jit
def _attend_packed(
    acc, m, norm, q, added, ids, width, addresses, length, tile, scale, softcap,
    INDEX: tl.constexpr, TIER: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, DOT: tl.constexpr,
    DB: tl.constexpr, DVB: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax over a tile of a tier's tokens, rows q [BM, DB] of type DOT."""
    token = tile * BN + tl.arange(0, BN)
    page = tiles.page_address(ids, width, addresses, token, length, INDEX, TIER)
    slot = token % TIER[1]
    k = tiles.load_keys(page, slot, tl.arange(0, DB), KEY, DOT)
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + added[:, None]
    if SOFTCAP:
        x = tiles.soft_cap(x, softcap)
    x = tl.where((token < length)[None, :], x * LOG2E, float("-inf"))
    top = tl.maximum(m, tl.max(x, 1))
    p = tl.exp2(x - top[:, None])
    shrink = tl.exp2(m - top)
    v = tiles.load_values(page, slot, tl.arange(0, DVB), VALUE, DOT)
    acc = tl.dot(p.to(DOT), tl.trans(v), acc * shrink[:, None], input_precision="ieee")
    return acc, top, norm * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["width", "count"])
def attend_pages_forward(
    q, constant, ids, lengths, addresses, out, lse, width, count, scale, softcap,
    TIERS: tl.constexpr, T0: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr, DOT0: tl.constexpr,
    T1: tl.constexpr, K1: tl.constexpr, V1: tl.constexpr, DOT1: tl.constexpr,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Output [parts, rows, count, DV] and log-sum-exp [parts, rows, count] of q [rows, count, D] over packed tokens.

    A program is (block of BM queries, row, part); the parts divide the tiles of a row evenly.
    """
    row, part, parts = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    here, feature, column = m < count, tl.arange(0, DB), tl.arange(0, DVB)
    at = row * count + m
    inside = here[:, None] & (feature < D)[None, :]
    added = tl.zeros((BM,), tl.float32)
    if CONSTANT:
        added = tl.load(constant + at, mask=here, other=0.0)
    length0 = tl.load(lengths + row * 2)
    count0 = tl.cdiv(length0, BN)
    length1, count1 = 0, 0
    if TIERS > 1:
        length1 = tl.load(lengths + row * 2 + 1)
        count1 = tl.cdiv(length1, BN)
    each = tl.cdiv(count0 + count1, parts)
    first, end = part * each, part * each + each

    acc = tl.zeros((BM, DVB), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    rows = tl.load(q + at[:, None] * D + feature[None, :], mask=inside, other=0.0).to(DOT0)
    low, high = section(first, end, 0, count0)
    for tile in range(low, high):
        acc, top, norm = _attend_packed(
            acc, top, norm, rows, added, ids + row * width, width, addresses, length0, tile, scale, softcap,
            0, T0, K0, V0, DOT0, DB, DVB, BN, SOFTCAP,
        )  # fmt: skip
    if TIERS > 1:
        rows = tl.load(q + at[:, None] * D + feature[None, :], mask=inside, other=0.0).to(DOT1)
        low, high = section(first, end, count0, count1)
        for tile in range(low, high):
            acc, top, norm = _attend_packed(
                acc, top, norm, rows, added, ids + row * width, width, addresses, length1, tile, scale, softcap,
                1, T1, K1, V1, DOT1, DB, DVB, BN, SOFTCAP,
            )  # fmt: skip
    acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    at += tl.num_programs(1).to(tl.int64) * count * part
    tl.store(out + at[:, None] * DV + column[None, :], acc, mask=here[:, None] & (column < DV)[None, :])
    total = tl.where(norm > 0, (top + tl.log2(tl.where(norm > 0, norm, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse + at, total, mask=here)


@triton.jit(do_not_specialize=["count", "parts"])
def join_forward(
    part_out, part_lse, own_out, own_lse, out, lse, count, parts,
    DV: tl.constexpr, DVB: tl.constexpr, BM: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Join partial attentions [parts, count, DV], and with OWN one more [count, DV], by their log-sum-exps."""
    at = (tl.program_id(0).to(tl.int64) * BM) + tl.arange(0, BM)
    column = tl.arange(0, DVB)
    here = at < count
    inside = here[:, None] & (column < DV)[None, :]
    top = tl.full((BM,), float("-inf"), tl.float32)
    if OWN:
        top = tl.load(own_lse + at, mask=here, other=float("-inf"))
    for part in range(parts):
        top = tl.maximum(top, tl.load(part_lse + part * count.to(tl.int64) + at, mask=here, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DVB), tl.float32)
    if OWN:
        weight = tl.exp(tl.load(own_lse + at, mask=here, other=float("-inf")) - safe)
        acc = weight[:, None] * tl.load(own_out + at[:, None] * DV + column[None, :], mask=inside, other=0.0)
    for part in range(parts):
        first = part * count.to(tl.int64) + at
        w = tl.exp(tl.load(part_lse + first, mask=here, other=float("-inf")) - safe)
        acc += w[:, None] * tl.load(part_out + first[:, None] * DV + column[None, :], mask=inside, other=0.0)
        weight += w
    acc = acc / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out + at[:, None] * DV + column[None, :], acc.to(out.dtype.element_ty), mask=inside)
    total = tl.where(weight > 0, safe + tl.log(tl.where(weight > 0, weight, 1.0)), float("-inf"))
    tl.store(lse + at, total, mask=here)


@launches
def attend_chunk(
    pages: Pages,
    basis: Basis,
    window: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    q: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A long chunk over pages, window and, causally, over itself.

    Args:
        window: (k, v [batch, kv_heads, n, D or Dv], counts int [batch]), all of it before the chunk.
        k, v: [batch, kv_heads, tokens, D or Dv], the chunk; valid: bool [batch, tokens], real tokens, None for all.
        q: [batch, q_heads, queries, D], the last queries of the chunk.

    Returns:
        (output [batch, q_heads, queries, Dv] in q's dtype, log-sum-exp over all keys [rows, groups, queries] or None).
    """
    (batch, q_heads, queries, _), heads, skipped = q.shape, k.shape[1], k.shape[2] - q.shape[2]
    terms, groups = (scaling, softcap, sinks), (batch * heads, q_heads // heads, queries)
    before = window if window[0].shape[2] else None
    if not pages.ids.shape[1]:
        own, own_lse = prompt_attention(q, k, v, True, *terms, valid, before, None, with_lse)
        return own, None if own_lse is None else own_lse.view(groups)
    out = q.new_empty(batch, queries, q_heads, v.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, q_heads, queries, dtype=torch.float32, device=q.device)
    step = max(64, BLOCK_ROWS // (batch * q_heads))
    for first in range(0, queries, step):
        part = slice(first, first + step)
        block = q[:, :, part]
        end = skipped + first + block.shape[2]
        shown = None if valid is None else valid[:, :end]
        own, own_lse = prompt_attention(block, k[:, :, :end], v[:, :, :end], True, *terms, shown, before,
                                        torch.float32, True)  # fmt: skip
        assert own_lse is not None
        rotated = basis.rotate_keys(block.reshape(batch * heads, -1, q.shape[3]))  # [rows, groups * step, D]
        constant = basis.constant(rotated)
        constant = None if constant is None else constant * scaling
        turned, total = attend_pages(pages, rotated, constant, scaling, softcap, q.dtype != torch.float32)
        turned = basis.unrotate_values(turned)
        joined, all_lse = _join(
            turned[None], total[None], own.reshape(turned.shape), own_lse.view(total.shape), q.dtype
        )
        out[:, :, part], lse[:, :, part] = joined.view(own.shape), all_lse.view(own_lse.shape)
    return out, lse.view(groups) if with_lse else None


@launches
def attend_pages(
    pages: Pages, q: Tensor, constant: Tensor | None, scaling: float, softcap: float | None, half: bool
) -> tuple[Tensor, Tensor]:
    """Attention over all packed tokens -> (float32 [rows, count, Dv] in the rotated basis, lse float32 [rows, count]).

    A row without packed tokens gives zeros and -inf.

    Args:
        q: float32 [rows, count, D], rotated, unscaled; every query sees every packed token.
        constant: float32 [rows, count], added to the scaled products; None for 0.
        half: multiply codes in fp16 (else float32).
    """
    rows, count, dim = q.shape
    value_dim = pages.layouts[0].value.dim
    shape, options = tile_shape(dim, value_dim, half, count, tiles.major(q.device))
    blocks = -(-count // shape["BM"])
    parts = min(-(-PROGRAMS // (2 * rows * blocks)), -(-pages.most_tokens // (TILES_EACH * shape["BN"])))
    parts = max(1, min(parts, 64))
    out = torch.empty(parts, rows, count, value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(parts, rows, count, dtype=torch.float32, device=q.device)
    q = q.contiguous()
    constant = None if constant is None else constant.float().contiguous()
    attend_pages_forward[(blocks, rows, parts)](
        q, q if constant is None else constant, pages.ids, pages.lengths, pages.addresses, out, lse,
        pages.ids.shape[1], count, float(scaling), float(softcap or 0.0),
        SOFTCAP=softcap is not None, CONSTANT=constant is not None, **pages.constants(half), **shape, **options,
    )  # fmt: skip
    if parts == 1:
        return out[0], lse[0]
    return _join(out, lse, None, None, torch.float32)


def tile_shape(dim: int, value_dim: int, half: bool, rows: int, major: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tile sizes and launch options of `attend_pages_forward`; `major`: compute capability."""
    wide, stages = max(power_of_two(dim), power_of_two(value_dim)), 2 if major == 9 else 1
    if not half:
        block, tokens, warps = 32, 16 if wide > 64 else 32, 8
    elif wide > 128:
        block, tokens, warps, stages = 64, 32, 8, 1
    else:
        block, tokens, warps = (128, 64, 8) if rows > 64 else (64, 64, 4)
    shape = {"D": dim, "DB": power_of_two(dim), "DV": value_dim, "DVB": power_of_two(value_dim)}
    return {**shape, "BM": block, "BN": tokens}, {"num_warps": warps, "num_stages": stages}


def _join(
    part_out: Tensor, part_lse: Tensor, own_out: Tensor | None, own_lse: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """parts [parts, rows, count, Dv] and one more [rows, count, Dv], or none -> ([rows, count, Dv], [rows, count])."""
    part_out, part_lse = part_out.contiguous(), part_lse.contiguous()
    parts, rows, count, dim = part_out.shape
    out = part_out.new_empty(rows, count, dim, dtype=dtype)
    lse = torch.empty(rows, count, dtype=torch.float32, device=out.device)
    block = max(1, 2048 // power_of_two(dim))
    join_forward[(-(-rows * count // block),)](
        part_out, part_lse, part_out if own_out is None else own_out.contiguous(),
        part_lse if own_lse is None else own_lse.contiguous(), out, lse, rows * count, parts,
        DV=dim, DVB=power_of_two(dim), BM=block, OWN=own_out is not None,
    )  # fmt: skip
    return out, lse
