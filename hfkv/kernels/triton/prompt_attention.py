"""Attention over exact keys and values with what SDPA lacks: softcap, sinks, padding without a mask matrix, the lse.

A program's rows are consecutive queries of all heads of a GQA group, query by query, so that one tile of keys serves
the whole group. Keys may come in two runs: a window that every query sees, then the tokens the queries belong to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.triton import tiles
from hfkv.kernels.triton.constants import power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.tiles import LOG2E


@triton.jit
def attend_tile(
    acc, m, norm, q, k, v, stride_k, stride_v, start, end, last, shown, scale, softcap,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BN: tl.constexpr,
    MASK: tl.constexpr, SHOWN: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax over keys [start, start + BN) of a head, whose first key is at `k`.

    With MASK, a row sees keys up to `last` [rows] and below `end`; with SHOWN, only those that `shown` (bytes) marks.
    """
    slot, feature, column = tl.arange(0, BN), tl.arange(0, DB), tl.arange(0, DVB)
    keys = k + tl.cast(stride_k, tl.int64) * start + slot[None, :] * stride_k + feature[:, None]
    values = v + tl.cast(stride_v, tl.int64) * start + slot[:, None] * stride_v + column[None, :]
    seen = start + slot < end
    if SHOWN:
        seen = seen & (tl.load(shown + start + slot, mask=seen, other=0) != 0)
    if MASK:
        kt = tl.load(keys, mask=seen[None, :] & (feature < D)[:, None], other=0.0)
    elif D < DB:
        kt = tl.load(keys, mask=(feature < D)[:, None], other=0.0)
    else:
        kt = tl.load(keys)
    x = tl.dot(q, kt, input_precision="ieee") * scale
    if SOFTCAP:
        x = tiles.soft_cap(x, softcap)
    x = x * LOG2E
    if MASK:
        x = tl.where(seen[None, :] & (start + slot[None, :] <= last[:, None]), x, float("-inf"))
    top = tl.maximum(m, tl.max(x, 1))
    if MASK:
        safe = tl.where(top == float("-inf"), 0.0, top)
    else:
        safe = top
    p = tl.exp2(x - safe[:, None])
    shrink = tl.exp2(m - safe)
    norm = norm * shrink + tl.sum(p, 1)
    if MASK:
        vs = tl.load(values, mask=seen[:, None] & (column < DV)[None, :], other=0.0)
    elif DV < DVB:
        vs = tl.load(values, mask=(column < DV)[None, :], other=0.0)
    else:
        vs = tl.load(values)
    acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision="ieee")
    return acc, top, norm


@triton.jit(do_not_specialize=["queries", "tokens", "heads"])
def prompt_forward(
    q, k, v, shown, bounds, sinks, window_k, window_v, window_counts, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_wb, stride_wh, stride_wt, stride_xb, stride_xh, stride_xt, stride_ob, stride_oh, stride_ot,
    queries, tokens, heads, scale, softcap,
    GROUPS: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp [batch, q_heads, queries] of BM rows of a KV head: a program is (block, batch * heads)."""
    block, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    m = block * BM + tl.arange(0, BM)
    query, group = m // GROUPS, m % GROUPS
    here = query < queries
    feature = tl.arange(0, DB)
    first = q + batch * stride_qb + head * GROUPS * stride_qh
    at = group.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qt
    rows = tl.load(first + at[:, None] + feature[None, :], mask=here[:, None] & (feature < D)[None, :], other=0.0)
    low, high = 0, tokens
    if PADDED:
        low = tl.load(bounds + batch * 2)
        high = tl.load(bounds + batch * 2 + 1)
    past = tokens - queries
    if CAUSAL:
        last = past + query
        end = tl.minimum(high, past + tl.minimum((block * BM + BM - 1) // GROUPS, queries - 1) + 1)
    else:
        last = tokens + tl.zeros_like(query)
        end = high

    top = tl.full((BM,), float("-inf"), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    if SINKS:
        top = tl.load(sinks + head * GROUPS + group).to(tl.float32) * LOG2E
        norm = tl.full((BM,), 1.0, tl.float32)
    acc = tl.zeros((BM, DVB), tl.float32)
    keys = k + batch * stride_kb + head * stride_kh
    values = v + batch * stride_vb + head * stride_vh
    if WINDOW:
        count = tl.load(window_counts + batch).to(tl.int32)
        wk = window_k + batch * stride_wb + head * stride_wh
        wv = window_v + batch * stride_xb + head * stride_xh
        for start in tl.range(0, count, BN, num_stages=1):  # short: not worth the registers of a pipeline
            acc, top, norm = attend_tile(
                acc, top, norm, rows, wk, wv, stride_wt, stride_xt, start, count, count + tl.zeros_like(query), shown,
                scale, softcap, D, DB, DV, DVB, BN, True, False, SOFTCAP,
            )  # fmt: skip
    if PADDED:
        marks = shown + batch * tokens
        for start in range(low // BN * BN, end, BN):
            acc, top, norm = attend_tile(
                acc, top, norm, rows, keys, values, stride_kt, stride_vt, start, end, last, marks, scale, softcap,
                D, DB, DV, DVB, BN, True, True, SOFTCAP,
            )  # fmt: skip
    else:
        full = end
        if CAUSAL:
            full = tl.minimum(end, past + block * BM // GROUPS + 1)
        full = full // BN * BN
        for start in range(0, full, BN):
            acc, top, norm = attend_tile(
                acc, top, norm, rows, keys, values, stride_kt, stride_vt, start, end, last, shown, scale, softcap,
                D, DB, DV, DVB, BN, False, False, SOFTCAP,
            )  # fmt: skip
        for start in range(full, end, BN):
            acc, top, norm = attend_tile(
                acc, top, norm, rows, keys, values, stride_kt, stride_vt, start, end, last, shown, scale, softcap,
                D, DB, DV, DVB, BN, True, False, SOFTCAP,
            )  # fmt: skip
    column = tl.arange(0, DVB)
    acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    at = batch * stride_ob + (head * GROUPS + group) * stride_oh + query.to(tl.int64) * stride_ot
    tl.store(
        out + at[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=here[:, None] & (column < DV)[None, :]
    )
    if LSE:
        total = tl.where(norm > 0, (top + tl.log2(tl.where(norm > 0, norm, 1.0))) / LOG2E, float("-inf"))
        tl.store(lse + (batch * heads * GROUPS + head * GROUPS + group) * queries + query, total, mask=here)


@launches
def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    window: tuple[Tensor, Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(softcap(q k^T scaling), sinks) v [batch, q_heads, queries, Dv] and its lse [batch, q_heads, queries].

    A query that sees nothing gets zeros and -inf. The output lies in memory as [batch, queries, q_heads, Dv].

    Args:
        q: [batch, q_heads, queries, D]; k, v: [batch, kv_heads, tokens, D or Dv], all of one dtype.
        causal: queries are the last of the tokens and look no further than themselves.
        sinks: [q_heads] logits of a column without a value.
        valid: bool [batch, tokens], real tokens (any padding); None for all.
        window: (k, v [batch, kv_heads, n, D or Dv], counts int [batch]), keys before `k`, seen by every query, or None.
        dtype: of the output; None for q's.
        with_lse: whether the log-sum-exp is wanted, sinks included; natural logarithm, float32.
    """
    (batch, q_heads, queries, dim), heads, tokens = q.shape, k.shape[1], k.shape[2]
    k, v, q = _rows_contiguous(k), _rows_contiguous(v), _rows_contiguous(q)
    out = q.new_empty(batch, queries, q_heads, v.shape[3], dtype=dtype or q.dtype).transpose(1, 2)
    lse = torch.empty(batch, q_heads, queries, dtype=torch.float32, device=q.device) if with_lse else None
    window_k, window_v, counts = (k, v, q) if window is None else window
    window_k, window_v = _rows_contiguous(window_k), _rows_contiguous(window_v)
    masked = valid is not None
    shape, options = tile_shape(dim, v.shape[3], k.dtype, queries * (q_heads // heads), tiles.major(q.device), masked)
    prompt_forward[(-(-queries * (q_heads // heads) // shape["BM"]), batch * heads)](
        q, k, v, q if valid is None else valid.contiguous().view(torch.uint8), q if valid is None else _bounds(valid),
        q if sinks is None else sinks, window_k, window_v, counts, out, q if lse is None else lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *window_k.stride()[:3], *window_v.stride()[:3],
        *out.stride()[:3], queries, tokens, heads, float(scaling), float(softcap or 0.0),
        GROUPS=q_heads // heads, CAUSAL=causal, SOFTCAP=softcap is not None, SINKS=sinks is not None,
        PADDED=valid is not None, WINDOW=window is not None, LSE=with_lse, **shape, **options,
    )  # fmt: skip
    return out, lse


def tile_shape(
    dim: int, value_dim: int, dtype: torch.dtype, rows: int, major: int, padded: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tile sizes and launch options without spills and within 99 KiB of shared memory; `major`: compute capability."""
    wide, warpgroup = max(power_of_two(dim), power_of_two(value_dim)), major in (9, 10)
    if dtype == torch.float32:
        block, tokens, warps, stages = 32, 16 if wide > 128 else 32, 8, 1
    elif wide > 128:
        block, tokens, warps, stages = 64, 32, 8, 2
    elif padded and not warpgroup:
        block, tokens, warps, stages = 64, 64, 8, 2
    else:
        block, tokens, warps, stages = 128, 64 if warpgroup else 32, 8, 2
        if rows <= 64:
            block, warps = 64, 4
    shape = {"D": dim, "DB": power_of_two(dim), "DV": value_dim, "DVB": power_of_two(value_dim)}
    return {**shape, "BM": block, "BN": tokens}, {"num_warps": warps, "num_stages": stages}


def _bounds(valid: Tensor) -> Tensor:
    """First real token and one behind the last, int32 [batch, 2]."""
    slot = torch.arange(valid.shape[1], device=valid.device, dtype=torch.int32)
    first = torch.where(valid, slot, valid.shape[1]).amin(1)
    return torch.stack([first, torch.where(valid, slot + 1, 0).amax(1)], 1).to(torch.int32)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
