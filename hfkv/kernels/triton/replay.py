"""Replay on the GPU: a prompt's own queries asked once more behind it; twin: `hfkv.kernels.replay`.

A program has one tile of queries of one head and one block of tokens. It passes over the block's keys twice and keeps
no logits: the first pass leaves each query's log-sum-exp, the second each key's largest probability, which goes into
the output by an atomic maximum, for tiles, heads of a group and neighbouring blocks share keys. A maximum does not
depend on the order. Probabilities are not negative, so that their bits are ordered as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.replay import BLOCK, OVERLAP, SINKS, Asking, at_least_the_mean, turned_back
from hfkv.kernels.triton import tiles
from hfkv.kernels.triton.constants import power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.tiles import LOG2E


@triton.jit
def _tile(
    rows, n0, number, keys, sinks, stride_k, stride_s, begin, count, feature, scale, softcap,
    S: tl.constexpr, OWN: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits [rows, BN] in units of log 2 of keys n0 to n0 + BN, -inf where there is none; slot [BN], -1 for no slot.

    The first S keys are sinks: the first of the prompt, which lie at `sinks` where they are not the sequence's OWN.
    """
    n = n0 + tl.arange(0, BN)
    sink = n < S
    slot = tl.where(sink, n, begin + n - S)
    exists = (n < number) & (slot < count)
    at = keys + slot.to(tl.int64) * stride_k
    if not OWN:
        exists = (n < number) & (sink | (slot < count))
        at = tl.where(sink, sinks + n.to(tl.int64) * stride_s, at)
        slot = tl.where(sink, -1, slot)
    k = tl.load(at[None, :] + feature[:, None], mask=exists[None, :] & (feature < D)[:, None], other=0.0)
    x = tl.dot(rows, k, input_precision="ieee") * scale
    if SOFTCAP:
        x = tiles.soft_cap(x, softcap)
    return tl.where(exists[None, :], x * LOG2E, float("-inf")), tl.where(exists, slot, -1)


@triton.jit(do_not_specialize=["heads", "tokens", "queries"])
def replay_kernel(
    q, k, sinks, first, counts, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_sb, stride_sh, stride_st,
    heads, tokens, queries, scale, softcap,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr, S: tl.constexpr, OWN: tl.constexpr,
    D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The largest probability of every key, bits of float32 -> out int32 [rows, tokens], which holds zeros before.

    A program is (block of tokens * GROUPS * tiles of a block, batch * heads).
    """
    per: tl.constexpr = BLOCK // BM
    part, row = tl.program_id(0), tl.program_id(1)
    block, group, tile = part // (GROUPS * per), part // per % GROUPS, part % per
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    feature = tl.arange(0, DB)
    here, count = tl.load(first + batch).to(tl.int32), tl.load(counts + batch).to(tl.int32)
    own = block * BLOCK + tile * BM + tl.arange(0, BM)
    query = own - here
    asks = (here >= 0) & (query >= 0) & (query < queries) & (own < count)
    if tl.max(asks.to(tl.int32), 0) > 0:
        rows = tl.load(
            q + batch * stride_qb + (head * GROUPS + group) * stride_qh
            + query.to(tl.int64)[:, None] * stride_qt + feature[None, :],
            mask=asks[:, None] & (feature < D)[None, :], other=0.0,
        )  # fmt: skip
        begin = block * BLOCK
        if OWN:
            begin = tl.maximum(begin, S)
        number = S + tl.maximum(tl.minimum(block * BLOCK + BLOCK + OVERLAP, tokens) - begin, 0)
        keys = k + batch * stride_kb + head * stride_kh
        stored = sinks + batch * stride_sb + head * stride_sh
        m = tl.full((BM,), float("-inf"), tl.float32)
        norm = tl.zeros((BM,), tl.float32)
        for n0 in range(0, number, BN):
            x, _ = _tile(
                rows, n0, number, keys, stored, stride_kt, stride_st, begin, count, feature, scale, softcap,
                S, OWN, D, BN, SOFTCAP,
            )  # fmt: skip
            top = tl.maximum(m, tl.max(x, 1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            norm = norm * tl.exp2(m - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
            m = top
        lse = tl.where(norm > 0, m + tl.log2(norm), 0.0)
        for n0 in range(0, number, BN):
            x, slot = _tile(
                rows, n0, number, keys, stored, stride_kt, stride_st, begin, count, feature, scale, softcap,
                S, OWN, D, BN, SOFTCAP,
            )  # fmt: skip
            p = tl.max(tl.where(asks[:, None], tl.exp2(x - lse[:, None]), 0.0), 0)
            at = out + row.to(tl.int64) * tokens + slot
            tl.atomic_max(at, p.to(tl.int32, bitcast=True), mask=slot >= 0, sem="relaxed")


@launches
def most_received(
    q: Tensor,
    k: Tensor,
    asking: Asking | None,
    first: Tensor | None,
    scaling: float,
    softcap: float | None,
    turn: Tensor | None,
) -> Tensor:
    """See `hfkv.kernels.replay.most_received`; keys are rounded to q's dtype once they are turned."""
    (batch, heads, tokens), queries, dim = k.shape[:3], q.shape[2], q.shape[3]
    groups, before = q.shape[1] // heads, tokens - queries
    if q.stride(3) != 1:
        q = q.contiguous()
    keys = turned_back(k, turn).to(q.dtype).contiguous()
    sinks = keys if first is None else turned_back(first, turn).to(q.dtype).contiguous()
    if asking is None:
        sides = [torch.full((batch,), n, dtype=torch.int32, device=q.device) for n in (before, tokens)]
    else:
        sides = [asking.first.to(torch.int32), asking.counts.to(torch.int32)]
    out = torch.zeros(batch, heads, tokens, dtype=torch.int32, device=q.device)
    shape, options = tile_shape(dim, q.dtype)
    replay_kernel[(-(-tokens // BLOCK) * groups * (BLOCK // shape["BM"]), batch * heads)](
        q, keys, sinks, *sides, out, *q.stride()[:3], *keys.stride()[:3], *sinks.stride()[:3],
        heads, tokens, queries, float(scaling), float(softcap or 0.0), GROUPS=groups, BLOCK=BLOCK, OVERLAP=OVERLAP,
        S=min(SINKS, tokens) if first is None else first.shape[2], OWN=first is None, SOFTCAP=softcap is not None,
        **shape, **options,
    )  # fmt: skip
    asks = None if asking is None else asking.asks(tokens, queries)[0]
    return at_least_the_mean(out.view(torch.float32), asks, before)


def tile_shape(dim: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tile sizes and launch options without spills, for every architecture."""
    exact = dtype == torch.float32
    rows, keys = (32, 32) if exact else (64, 64)
    options = {"num_warps": 4, "num_stages": 1 if exact else 2}
    return {"D": dim, "DB": power_of_two(dim), "BM": rows, "BN": keys}, options
