"""Significance of tokens from a block of queries: of exact tokens (a prompt), or of packed pages and window (a flush).

    received_t = max over the GQA group of mean over the queries behind t of exp(logit_t - lse)     (LeanKV, 4.1)

Two passes over the keys and no buffer of logits: the first leaves each query's log-sum-exp, split over the tokens, the
second each token's score. A program's queries are `JB` of each of `GB` query heads of one row (KV head).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.triton import tiles
from hfkv.kernels.triton.constants import LARGEST_HALF, power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.tiles import LOG2E, Pages, section

TILE_ROWS = 64
"""Queries of one product, at most."""

NO_TIERS: dict[str, Any] = {
    "TIERS": 0,
    **{f"{name}{i}": value for i in range(2) for name, value in (("T", tiles.NO_TIER), ("K", tiles.NO_SIDE))},
    **{"DOT0": tl.float16, "DOT1": tl.float16},
}


@triton.jit
def _queries(group, block, QUERIES: tl.constexpr, GROUPS: tl.constexpr, GB: tl.constexpr, JB: tl.constexpr):
    """Of a program's rows [GB * JB]: index of the query among those of a head, index among all of a row, existence."""
    m = tl.arange(0, GB * JB)
    g, j = group * GB + m // JB, block * JB + m % JB
    return j, g * QUERIES + j, (g < GROUPS) & (j < QUERIES)


@triton.jit
def _logits(x, scale, constant, softcap, SOFTCAP: tl.constexpr):
    """Products of queries and keys -> logits in units of log 2."""
    x = x * scale + constant[:, None]
    if SOFTCAP:
        x = tiles.soft_cap(x, softcap)
    return x * LOG2E


@triton.jit
def _accumulate(m, norm, x):
    """Running maximum and sum of powers of two, taking up logits x [rows, tokens]."""
    top = tl.maximum(m, tl.max(x, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    return top, norm * tl.exp2(m - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)


@triton.jit
def _packed_products(
    q, ids, width, addresses, length, tile, at, here, feature, D, INDEX: tl.constexpr, TIER: tl.constexpr,
    SIDE: tl.constexpr, DOT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products [rows, BN] of queries and the keys of one tile of a tier, and whether its slots hold tokens [BN]."""
    token = tile * BN + tl.arange(0, BN)
    page = tiles.page_address(ids, width, addresses, token, length, INDEX, TIER)
    k = tiles.load_keys(page, token % TIER[1], feature, SIDE, DOT)
    rows = tl.load(q + at[:, None] * D + feature[None, :], mask=here[:, None] & (feature < D)[None, :], other=0.0)
    return tl.dot(rows.to(DOT), tl.trans(k), input_precision="ieee"), token < length


@triton.jit
def _packed_tiles(lengths, row, TIERS: tl.constexpr, BN: tl.constexpr):
    """Tokens of a row and tiles that they fill, of tier 0 and of tier 1."""
    length0, count0, length1, count1 = 0, 0, 0, 0
    if TIERS > 0:
        length0 = tl.load(lengths + row * 2)
        count0 = tl.cdiv(length0, BN)
    if TIERS > 1:
        length1 = tl.load(lengths + row * 2 + 1)
        count1 = tl.cdiv(length1, BN)
    return length0, count0, length1, count1


@triton.jit
def _exact_keys(k, tile, limit, stride, feature, D: tl.constexpr, BN: tl.constexpr):
    """Exact keys [features, BN] of one tile of a row, whose first key is at `k`."""
    slot = tl.arange(0, BN)
    start = k + tl.cast(stride, tl.int64) * (tile * BN)
    return tl.load(
        start + slot[None, :] * stride + feature[:, None],
        mask=(tile * BN + slot < limit)[None, :] & (feature < D)[:, None],
        other=0.0,
    )


@triton.jit
def _limit(last, QUERIES: tl.constexpr, ALL: tl.constexpr):
    """One behind the last slot of a sequence that any query sees; `last` are its queries'."""
    j = tl.arange(0, ALL)
    return tl.max(tl.load(last + j, mask=j < QUERIES, other=-1), 0) + 1


@triton.jit(do_not_specialize=["width", "heads"])
def observe_lse(
    q, rotated, constant, sinks, k, last, start, ids, lengths, addresses, out,
    width, heads, stride_kb, stride_kh, stride_kt, scale, softcap,
    TIERS: tl.constexpr, T0: tl.constexpr, K0: tl.constexpr, DOT0: tl.constexpr,
    T1: tl.constexpr, K1: tl.constexpr, DOT1: tl.constexpr, EXACT: tl.constexpr,
    QUERIES: tl.constexpr, ALL: tl.constexpr, GROUPS: tl.constexpr, GB: tl.constexpr, JB: tl.constexpr,
    D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, CONSTANT: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each query over one part of its keys -> out float32 [rows, parts, GROUPS * QUERIES].

    A program is (part, row, block of queries); the parts divide the tiles of pages and exact keys evenly.
    """
    part, parts, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    blocks: tl.constexpr = (QUERIES + JB - 1) // JB
    j, at, here = _queries(tl.program_id(2) // blocks, tl.program_id(2) % blocks, QUERIES, GROUPS, GB, JB)
    feature = tl.arange(0, DB)
    batch, head = row // heads, row % heads
    row64 = row.to(tl.int64)
    first_query = row64 * (GROUPS * QUERIES)
    length0, count0, length1, count1 = _packed_tiles(lengths, row64, TIERS, BN)
    limit, begin, count = 0, 0, 0
    if EXACT:
        if START:
            begin = tl.load(start + batch)
        limit = _limit(last + batch * QUERIES, QUERIES, ALL)
        count = tl.cdiv(limit, BN) - begin // BN
        count = tl.maximum(count, 0)
    each = tl.cdiv(count0 + count1 + count, parts)
    first, end = part * each, part * each + each

    m = tl.full((GB * JB,), float("-inf"), tl.float32)
    norm = tl.zeros((GB * JB,), tl.float32)
    if SINKS:  # noqa: SIM102 (compile time, then run time)
        if part == 0:
            m = tl.load(sinks + first_query + at, mask=here, other=0.0) * LOG2E
            norm = tl.full((GB * JB,), 1.0, tl.float32)
    added = tl.zeros((GB * JB,), tl.float32)
    if CONSTANT:
        added = tl.load(constant + first_query + at, mask=here, other=0.0)
    if TIERS > 0:
        low, high = section(first, end, 0, count0)
        for tile in range(low, high):
            x, full = _packed_products(
                rotated + first_query * D, ids + row64 * width, width, addresses, length0, tile, at, here, feature, D,
                0, T0, K0, DOT0, BN,
            )  # fmt: skip
            x = tl.where(full[None, :], _logits(x, scale, added, softcap, SOFTCAP), float("-inf"))
            m, norm = _accumulate(m, norm, x)
    if TIERS > 1:
        low, high = section(first, end, count0, count1)
        for tile in range(low, high):
            x, full = _packed_products(
                rotated + first_query * D, ids + row64 * width, width, addresses, length1, tile, at, here, feature, D,
                1, T1, K1, DOT1, BN,
            )  # fmt: skip
            x = tl.where(full[None, :], _logits(x, scale, added, softcap, SOFTCAP), float("-inf"))
            m, norm = _accumulate(m, norm, x)
    if EXACT:
        own = tl.load(last + batch * QUERIES + j, mask=here, other=-1)
        keys = k + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
        rows = tl.load(
            q + (first_query + at)[:, None] * D + feature[None, :],
            mask=here[:, None] & (feature < D)[None, :],
            other=0.0,
        )
        low, high = section(first, end, count0 + count1, count)
        for tile in range(low + begin // BN, high + begin // BN):
            slot = tile * BN + tl.arange(0, BN)
            x = tl.dot(rows, _exact_keys(keys, tile, limit, stride_kt, feature, D, BN), input_precision="ieee")
            seen = (slot[None, :] <= own[:, None]) & (slot >= begin)[None, :]
            x = tl.where(seen, _logits(x, scale, tl.zeros_like(added), softcap, SOFTCAP), float("-inf"))
            m, norm = _accumulate(m, norm, x)
    lse = tl.where(norm > 0, (m + tl.log2(tl.where(norm > 0, norm, 1.0))) / LOG2E, float("-inf"))
    tl.store(out + (row64 * parts + part) * (GROUPS * QUERIES) + at, lse, mask=here)


@triton.jit
def _received(x, lse, seen, here, GB: tl.constexpr, JB: tl.constexpr, BN: tl.constexpr):
    """Probabilities summed over the queries of each head: logits [GB * JB, BN] -> [GB, BN]."""
    safe = tl.where(lse == float("-inf"), 0.0, lse)
    p = tl.exp2(tl.where(seen & here[:, None], x - safe[:, None], float("-inf")))
    return tl.sum(tl.reshape(p, (GB, JB, BN)), 1)


@triton.jit
def _packed_scores(
    tile, rotated, constant, lse, ids, width, addresses, length, tokens_seen, seen, stands_for, horizon, scale, softcap,
    INDEX: tl.constexpr, TIER: tl.constexpr, SIDE: tl.constexpr, DOT: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, GB: tl.constexpr, JB: tl.constexpr,
    D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Write the aged scores of one tile of a tier into its pages."""
    feature = tl.arange(0, DB)
    token = tile * BN + tl.arange(0, BN)
    page = tiles.page_address(ids, width, addresses, token, length, INDEX, TIER)
    slot = token % TIER[1]
    k = tl.trans(tiles.load_keys(page, slot, feature, SIDE, DOT))
    best = tl.zeros((BN,), tl.float32)
    for group in range((GROUPS + GB - 1) // GB):
        total = tl.zeros((GB, BN), tl.float32)
        for block in range((QUERIES + JB - 1) // JB):
            _, at, here = _queries(group, block, QUERIES, GROUPS, GB, JB)
            rows = tl.load(
                rotated + at[:, None] * D + feature[None, :], mask=here[:, None] & (feature < D)[None, :], other=0.0
            )
            added = tl.zeros((GB * JB,), tl.float32)
            if CONSTANT:
                added = tl.load(constant + at, mask=here, other=0.0)
            x = tl.dot(rows.to(DOT), k, input_precision="ieee")
            x = _logits(x, scale, added, softcap, SOFTCAP)
            own = tl.load(lse + at, mask=here, other=0.0) * LOG2E
            total += _received(x, own, (token < length)[None, :], here, GB, JB, BN)
        best = tl.maximum(best, tl.max(total, 0))
    observed = best * (tokens_seen.to(tl.float32) / QUERIES)
    full = token < length
    old_at = (page + TIER[3]).to(tl.pointer_type(tl.float16), bitcast=True) + slot
    old = tl.load(old_at, mask=full, other=0.0).to(tl.float32)
    birth = tl.load((page + TIER[4]).to(tl.pointer_type(tl.int32), bitcast=True) + slot, mask=full, other=0)
    age = tl.minimum(tl.maximum(seen - birth, stands_for), horizon).to(tl.float32)
    new = old + (observed - old) * (stands_for.to(tl.float32) / age)
    tl.store(old_at, tl.minimum(new, LARGEST_HALF).to(tl.float16), mask=full)


@triton.jit(do_not_specialize=["width", "heads", "exact", "seen", "stands_for", "horizon"])
def observe_scores(
    q, rotated, constant, lse, k, last, start, token_counts, ids, lengths, addresses, out,
    width, heads, stride_kb, stride_kh, stride_kt, exact, seen, stands_for, horizon, scale, softcap,
    TIERS: tl.constexpr, T0: tl.constexpr, K0: tl.constexpr, DOT0: tl.constexpr,
    T1: tl.constexpr, K1: tl.constexpr, DOT1: tl.constexpr, EXACT: tl.constexpr,
    QUERIES: tl.constexpr, ALL: tl.constexpr, GROUPS: tl.constexpr, GB: tl.constexpr, JB: tl.constexpr,
    D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, CONSTANT: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Scores of one part of a row's tokens: packed ones aged, in their pages, exact ones -> out float32 [rows, exact].

    A program is (part, row). `lse` float32 [rows, GROUPS * QUERIES] is over all keys of each query.
    """
    part, parts, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    feature = tl.arange(0, DB)
    batch, head = row // heads, row % heads
    row64 = row.to(tl.int64)
    first_query = row64 * (GROUPS * QUERIES)
    tokens_seen = tl.load(token_counts + batch)
    length0, count0, length1, count1 = _packed_tiles(lengths, row64, TIERS, BN)
    count = 0
    if EXACT:
        count = tl.cdiv(exact, BN)
    each = tl.cdiv(count0 + count1 + count, parts)
    first, end = part * each, part * each + each
    if TIERS > 0:
        low, high = section(first, end, 0, count0)
        for tile in range(low, high):
            _packed_scores(
                tile, rotated + first_query * D, constant + first_query, lse + first_query, ids + row64 * width, width,
                addresses, length0, tokens_seen, seen, stands_for, horizon, scale, softcap,
                0, T0, K0, DOT0, QUERIES, GROUPS, GB, JB, D, DB, BN, SOFTCAP, CONSTANT,
            )  # fmt: skip
    if TIERS > 1:
        low, high = section(first, end, count0, count1)
        for tile in range(low, high):
            _packed_scores(
                tile, rotated + first_query * D, constant + first_query, lse + first_query, ids + row64 * width, width,
                addresses, length1, tokens_seen, seen, stands_for, horizon, scale, softcap,
                1, T1, K1, DOT1, QUERIES, GROUPS, GB, JB, D, DB, BN, SOFTCAP, CONSTANT,
            )  # fmt: skip
    if EXACT:
        begin = 0
        if START:
            begin = tl.load(start + batch)
        limit = _limit(last + batch * QUERIES, QUERIES, ALL)
        keys = k + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
        low, high = section(first, end, count0 + count1, count)
        for tile in range(low, high):
            slot = tile * BN + tl.arange(0, BN)
            column = _exact_keys(keys, tile, limit, stride_kt, feature, D, BN)
            best = tl.zeros((BN,), tl.float32)
            seen_by = tl.zeros((BN,), tl.int32)
            for group in range((GROUPS + GB - 1) // GB):
                total = tl.zeros((GB, BN), tl.float32)
                seen_by = tl.zeros((BN,), tl.int32)
                for block in range((QUERIES + JB - 1) // JB):
                    j, at, here = _queries(group, block, QUERIES, GROUPS, GB, JB)
                    rows = tl.load(
                        q + (first_query + at)[:, None] * D + feature[None, :],
                        mask=here[:, None] & (feature < D)[None, :],
                        other=0.0,
                    )
                    x = tl.dot(rows, column, input_precision="ieee")
                    x = _logits(x, scale, tl.zeros((GB * JB,), tl.float32), softcap, SOFTCAP)
                    own = tl.load(last + batch * QUERIES + j, mask=here, other=-1)
                    sees = (slot[None, :] <= own[:, None]) & (slot >= begin)[None, :]
                    total += _received(
                        x, tl.load(lse + first_query + at, mask=here, other=0.0) * LOG2E, sees, here, GB, JB, BN
                    )
                    one = block * JB + tl.arange(0, JB)
                    newest = tl.load(last + batch * QUERIES + one, mask=one < QUERIES, other=-1)
                    counted = (slot[None, :] <= newest[:, None]) & (slot >= begin)[None, :]
                    seen_by += tl.sum(counted.to(tl.int32), 0)
                best = tl.maximum(best, tl.max(total, 0))
            score = best / tl.maximum(seen_by, 1).to(tl.float32) * tokens_seen.to(tl.float32)
            tl.store(out + row64 * exact + slot, tl.where(seen_by > 0, score, 1.0), mask=slot < exact)


@launches
def observe_exact(
    q: Tensor,
    k: Tensor,
    last: Tensor,
    token_counts: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Scores float32 [batch * kv_heads, tokens] of exact tokens; 1 for a token that no query sees.

    The score is token_counts times the mean probability over the queries that see the token, largest over the group.

    Args:
        q: [batch, q_heads, queries, D], unscaled; k: [batch, kv_heads, tokens, D] of the same dtype.
        last: int [batch, queries], last slot of `k` that a query sees; -1: none, the query does not count.
        token_counts: int [batch], real tokens of every sequence.
        sinks: [q_heads] logits without a value; only used where `lse` is None.
        lse: [batch * kv_heads, groups, queries] log-sum-exp over *all* keys; None where k is all there is.
        start: int [batch], first real slot of `k`; None for 0.
    """
    rows = q.shape[0] * k.shape[1]
    call = Observation(q, k, last, token_counts, scaling, softcap, start)
    if lse is None:
        lse = call.lse(None, None, None, sinks)
    out = torch.empty(rows, k.shape[2], dtype=torch.float32, device=q.device)
    call.scores(None, None, None, lse.float().contiguous().view(rows, -1), out, 0, 1, 1)
    return out


@launches
def observe_pages(
    q: Tensor,
    rotated: Tensor,
    constant: Tensor | None,
    pages: Pages,
    k: Tensor,
    last: Tensor,
    token_counts: Tensor,
    seen: int,
    stands_for: int,
    horizon: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Age the scores of packed tokens in their pages; scores float32 [rows, tokens] of the exact tokens `k`.

    Every query sees all packed tokens: new = old + (N p - old) * stands_for / clamp(seen - birth, stands_for, horizon),
    at most 65504.

    Args:
        q: [batch, q_heads, queries, D], unscaled; rotated: float32 [rows, groups * queries, D], in the pages' basis.
        constant: float32 [rows, groups * queries], added to packed logits; None for 0.
        pages: scored pages; k: [batch, kv_heads, tokens, D], tokens beside them.
        last, token_counts, scaling, softcap, sinks: as for `observe_exact`.
    """
    call = Observation(q, k, last, token_counts, scaling, softcap, None)
    rotated = rotated.contiguous()
    constant = None if constant is None else constant.float().contiguous()
    lse = call.lse(pages, rotated, constant, sinks)
    out = torch.empty(pages.rows, k.shape[2], dtype=torch.float32, device=q.device)
    block = max(stands_for, 1)
    call.scores(pages, rotated, constant, lse, out, seen, block, max(horizon, block))
    return out


class Observation:
    """The arguments that both passes share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        last: Tensor,
        token_counts: Tensor,
        scaling: float,
        softcap: float | None,
        start: Tensor | None,
    ) -> None:
        self.batch, q_heads, self.queries, dim = q.shape
        self.heads, self.tokens = k.shape[1], k.shape[2]
        self.groups, self.rows = q_heads // self.heads, self.batch * self.heads
        self.q, self.k = q.to(k.dtype).contiguous(), k if k.stride(3) == 1 else k.contiguous()
        self.last = last.to(torch.int32).contiguous()
        self.start = None if start is None else start.to(torch.int32)
        self.token_counts = token_counts
        self.scaling, self.softcap = float(scaling), float(softcap or 0.0)
        block = min(power_of_two(self.queries, 8), TILE_ROWS)
        together = max(min(power_of_two(self.groups, 1), TILE_ROWS // block), 16 // block)
        self.shape = {
            "QUERIES": self.queries, "ALL": power_of_two(self.queries),
            "GROUPS": self.groups, "GB": together, "JB": block,
            "D": dim, "DB": power_of_two(dim), "BN": 64 if dim <= 128 and k.dtype != torch.float32 else 32,
            "SOFTCAP": softcap is not None, "EXACT": self.tokens > 0, "START": start is not None,
        }  # fmt: skip

    def lse(self, pages: Pages | None, rotated: Tensor | None, constant: Tensor | None, sinks: Tensor | None) -> Tensor:
        """[rows, groups * queries] over all keys."""
        parts = self._parts(pages, -(-self.groups // self.shape["GB"]) * -(-self.queries // self.shape["JB"]))
        out = torch.empty(self.rows, parts, self.groups * self.queries, dtype=torch.float32, device=self.q.device)
        column = None
        if sinks is not None:
            column = sinks.float()[None, :, None].expand(self.batch, -1, self.queries).contiguous()
        blocks = -(-self.groups // self.shape["GB"]) * -(-self.queries // self.shape["JB"])
        observe_lse[(parts, self.rows, blocks)](
            self.q, _or(rotated, self.q), _or(constant, self.q), _or(column, self.q), self.k, self.last,
            _or(self.start, self.last), *self._memory(pages), out, self._width(pages), self.heads,
            *self.k.stride()[:3], self.scaling, self.softcap,
            SINKS=column is not None, CONSTANT=constant is not None, **self._constants(pages), **self.shape,
            num_warps=4,
        )  # fmt: skip
        return out.logsumexp(1) if parts > 1 else out[:, 0]

    def scores(
        self,
        pages: Pages | None,
        rotated: Tensor | None,
        constant: Tensor | None,
        lse: Tensor,
        out: Tensor,
        seen: int,
        stands_for: int,
        horizon: int,
    ) -> None:
        parts = self._parts(pages, 1, 1)
        observe_scores[(parts, self.rows)](
            self.q, _or(rotated, self.q), _or(constant, self.q), lse, self.k, self.last, _or(self.start, self.last),
            self.token_counts, *self._memory(pages), out, self._width(pages), self.heads,
            *self.k.stride()[:3], self.tokens, seen, stands_for, horizon, self.scaling, self.softcap,
            CONSTANT=constant is not None, **self._constants(pages), **self.shape, num_warps=4,
        )  # fmt: skip

    def _parts(self, pages: Pages | None, blocks: int, tiles_each: int = 4) -> int:
        """Parts of a row's tokens: enough programs to fill a device, each with a few tiles."""
        most = self.tokens + (0 if pages is None else pages.most_tokens)
        wanted = -(-tiles.PROGRAMS // (self.rows * blocks))
        return max(1, min(wanted, -(-most // (tiles_each * self.shape["BN"]))))

    def _constants(self, pages: Pages | None) -> dict[str, Any]:
        if pages is None:
            return NO_TIERS
        named = pages.constants(self.k.dtype != torch.float32)
        return {name: value for name, value in named.items() if name not in ("V0", "V1")}

    def _memory(self, pages: Pages | None) -> tuple[Tensor, Tensor, Tensor]:
        return (self.last,) * 3 if pages is None else (pages.ids, pages.lengths, pages.addresses)

    @staticmethod
    def _width(pages: Pages | None) -> int:
        return 0 if pages is None else pages.ids.shape[1]


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel argument that is not read where it is absent."""
    return other if x is None else x
