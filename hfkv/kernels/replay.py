"""Replay: the most attention that every token of a prompt gets when the prompt's own queries come once more behind it.

    received_t = max over the block's queries s and the group of softmax_t(turn(q_s) . k_t)

Keys and queries are cut into blocks; a block's queries look at all of its keys, at those just behind it and at the
first of the prompt, before and behind them alike. So the cost is linear in the prompt. It is what KVzip (Kim et al.
2025) takes from a second pass in which the model repeats the prompt: the queries of the first pass are nearly those of
the second, since what a token asks for is mostly its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.at_once import logits_at_once
from hfkv.kernels.decode_attention import cap

BLOCK = 64
OVERLAP = 12
AHEAD = 512
"""By how many positions queries are turned on: far enough to be behind the block, near enough to see it sharply."""

SINKS = 4
"""First tokens of a prompt that take part in every block, as sinks of attention."""

TOGETHER = 64
"""Blocks that are looked at together: bounds the memory for them."""


@dataclass(frozen=True)
class Asking:
    """Where sequences differ: which tokens they have, and which queries belong to them.

    Attributes:
        counts: int64 [batch], each sequence has its first tokens.
        first: int64 [batch], slot of the token that the first query belongs to, the others follow; -1: no query.
    """

    counts: Tensor
    first: Tensor

    def real(self, tokens: int) -> Tensor:
        """bool [batch, tokens]: tokens that there are."""
        return torch.arange(tokens, device=self.counts.device) < self.counts[:, None]

    def asks(self, tokens: int, queries: int) -> tuple[Tensor, Tensor]:
        """Whether each token's own query is there, bool [batch, tokens], and which it is, int64, within `queries`."""
        index = torch.arange(tokens, device=self.first.device) - self.first[:, None]
        asks = (self.first[:, None] >= 0) & (index >= 0) & (index < queries) & self.real(tokens)
        return asks, index.clamp(0, queries - 1)


def most_received(
    q: Tensor,
    k: Tensor,
    asking: Asking | None,
    first: Tensor | None,
    scaling: float,
    softcap: float | None,
    turn: Tensor | None,
) -> Tensor:
    """The largest probability that each key receives, float32 [batch, kv_heads, tokens].

    Keys whose own query is not among `q` (those of an earlier chunk) get the mean of the others if that is more.

    Args:
        q: [batch, q_heads, queries, D], left-aligned.
        k: [batch, kv_heads, tokens, D].
        asking: which of them there are; None: all, and the queries are those of the newest tokens.
        first: keys [batch, kv_heads, n, D] of the prompt's first tokens where they are not the first of `k`.
        turn: float32 [D, D], `k @ turn` are keys that RoPE has turned by -AHEAD positions; None: the model has none.
    """
    (batch, heads, tokens), queries = k.shape[:3], q.shape[2]
    q = q.unflatten(1, (heads, -1))  # [batch, heads, groups, queries, D]
    keys = turned_back(k, turn, scaling)
    own = 0 if first is not None else min(SINKS, tokens)  # sinks among `k`
    sinks = keys[:, :, :own] if first is None else turned_back(first, turn, scaling)
    before = tokens - queries  # tokens without a query, where all sequences are alike
    if asking is not None:
        real, (asks, index) = asking.real(tokens), asking.asks(tokens, queries)
    best = torch.zeros(batch, heads, tokens, device=k.device)
    for start, stop in _runs(tokens, own, before if asking is None else 0):
        begin, end = max(start, own), min(stop + OVERLAP, tokens)
        count = max(1, (stop - start) // BLOCK)
        width = BLOCK + OVERLAP if count > 1 else end - begin
        blocks = keys[:, :, begin:end].unfold(2, width, BLOCK).transpose(3, 4)  # [batch, heads, count, width, D]
        blocks = torch.cat([sinks[:, :, None].expand(-1, -1, count, -1, -1), blocks], 3)
        there = silent = None
        if asking is None:
            asked = q[:, :, :, max(start, before) - before : stop - before]
        else:
            asked = q.take_along_dim(index[:, None, None, start:stop, None], 3)
            stored = real[:, :own] if own else real.new_ones(batch, sinks.shape[2])
            there = real[:, begin:end].unfold(1, width, BLOCK)  # [batch, count, width]
            there = torch.cat([stored[:, None].expand(-1, count, -1), there], 2)
            silent = ~asks[:, start:stop].unfold(1, min(BLOCK, stop - start), BLOCK)
        asked = asked.unfold(3, min(BLOCK, asked.shape[3]), BLOCK).permute(0, 1, 3, 2, 5, 4)
        received = _most(asked, blocks, there, silent, softcap)
        _raise(best[:, :, :own, None], received[..., :own].transpose(2, 3).amax(3, keepdim=True))
        for column in range(0, width, BLOCK):  # those of a block, then those behind it
            part = received[..., sinks.shape[2] + column :][..., :BLOCK]
            _raise(best[:, :, begin + column : end].unfold(2, part.shape[3], BLOCK), part)
    return at_least_the_mean(best, None if asking is None else asks, before)


def at_least_the_mean(best: Tensor, asks: Tensor | None, before: int) -> Tensor:
    """`best` [batch, heads, tokens], but for tokens without a query of their own the mean of the others if it is more.

    Args:
        asks: bool [batch, tokens], which have one; None: all but the first `before`.
    """
    if asks is None:
        mean = best[..., before:].mean(2, keepdim=True)
        return torch.cat([torch.maximum(best[..., :before], mean), best[..., before:]], 2) if before else best
    mean = (best * asks[:, None]).sum(2, keepdim=True) / asks.sum(1)[:, None, None].clamp_min(1)
    return torch.where(asks[:, None], best, torch.maximum(best, mean))


def turned_back(k: Tensor, turn: Tensor | None, factor: float = 1.0) -> Tensor:
    """Keys times `factor`, float32, as queries see them that are turned on; queries have more heads to turn."""
    return k.float() * factor if turn is None else k.float() @ (turn * factor)


def _runs(tokens: int, own: int, before: int) -> Iterator[tuple[int, int]]:
    """Blocks that are alike, first token and the one behind the last: whole ones together, the others one by one.

    A whole block has all of its queries, all of its keys and the overlap behind it, and no sink of its own.
    """
    whole = range(-(-max(own, before) // BLOCK) * BLOCK, max(0, tokens - OVERLAP - BLOCK + 1), BLOCK)
    start = before // BLOCK * BLOCK
    while start < tokens:
        stop = start + BLOCK
        if start in whole:
            stop = min(start + TOGETHER * BLOCK, whole[-1] + BLOCK)
        yield start, min(stop, tokens)
        start = stop


def _raise(best: Tensor, received: Tensor) -> None:
    """To at least what was received, in place."""
    best.copy_(torch.maximum(best, received))


def _most(q: Tensor, keys: Tensor, there: Tensor | None, silent: Tensor | None, softcap: float | None) -> Tensor:
    """The largest probability of each key of a block, [batch, heads, blocks, keys].

    Args:
        q: [batch, heads, blocks, groups, n, D]; keys: [batch, heads, blocks, keys, D].
        there: bool [batch, blocks, keys], keys that there are; silent: bool [batch, blocks, n], queries that there are
            not; None where all are.
    """
    shape, groups = keys.shape[:4], q.shape[3]
    queries, keys = q.float().flatten(3, 4).flatten(0, 2), keys.flatten(0, 2).transpose(1, 2)
    if there is not None:
        there = there[:, None].expand(shape).flatten(0, 2)[:, None]  # [rows, 1, keys]
    if silent is not None:
        silent = silent[:, None, :, None].expand(*shape[:3], groups, -1).flatten(3).flatten(0, 2)[..., None]
    received = keys.new_zeros(keys.shape[0], shape[3])
    most = logits_at_once(q.device, shape[3])
    rows, each = max(1, most // max(1, queries.shape[1])), max(1, min(most, queries.shape[1]))
    for a, b in itertools.product(range(0, queries.shape[0], rows), range(0, queries.shape[1], each)):
        some, part = slice(a, a + rows), slice(b, b + each)
        logits = cap(torch.bmm(queries[some, part], keys[some]), softcap)
        if there is not None:
            logits = logits.masked_fill_(~there[some], float("-inf"))
        p = logits.softmax(-1)
        if silent is not None:
            p = p.masked_fill_(silent[some, part], 0.0).nan_to_num_(0.0)
        received[some] = torch.maximum(received[some], p.amax(1))
    return received.view(shape)
