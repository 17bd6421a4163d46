"""Replay: the most attention that every token of a prompt gets when the prompt's own queries come once more behind it.

    received_t = max over the block's queries s and the group of softmax_t(turn(q_s) . k_t)

Keys and queries are cut into blocks; a block's queries look at all of its keys, at those just behind it and at the
first of the prompt, before and behind them alike. So the cost is linear in the prompt. It is what KVzip (Kim et al.
2025) takes from a second pass in which the model repeats the prompt: the queries of the first pass are nearly those of
the second, since what a token asks for is mostly its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.at_once import logits_at_once
from hfkv.kernels.decode_attention import cap

BLOCK = 512
OVERLAP = 16
AHEAD = 512
"""By how many positions queries are turned on: far enough to be behind the block, near enough to see it sharply."""

SINKS = 4


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
    turn: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """The largest probability that each key receives, float32 [batch, kv_heads, tokens].

    Keys whose own query is not among `q` (those of an earlier chunk) get the mean of the others if that is more.

    Args:
        q: [batch, q_heads, queries, D], left-aligned.
        k: [batch, kv_heads, tokens, D].
        asking: which of them there are; None: all, and the queries are those of the newest tokens.
        first: keys [batch, kv_heads, n, D] of the prompt's first tokens where they are not the first of `k`.
        turn: (x [batch, heads, n, D], positions int64 [1]) -> x turned on by RoPE; None: the model has none.
    """
    batch, heads, tokens = k.shape[:3]
    q = q.unflatten(1, (heads, -1))  # [batch, heads, groups, queries, D]
    keys = turned_back(k, turn) * scaling
    sinks = None if first is None else turned_back(first, turn) * scaling
    if asking is not None:
        real, (asks, index) = asking.real(tokens), asking.asks(tokens, q.shape[3])
    best = torch.zeros(batch, heads, tokens, device=k.device)
    own = 0 if sinks is not None else min(SINKS, tokens)  # sinks among `k`
    before = tokens - q.shape[3]  # tokens without a query, where all sequences are alike
    for start in range(0, tokens, BLOCK):
        begin, end = max(start, own), min(start + BLOCK + OVERLAP, tokens)
        block = torch.cat([keys[:, :, :own] if sinks is None else sinks, keys[:, :, begin:end]], 2)
        slots = slice(start if asking is not None else max(start, before), min(start + BLOCK, tokens))
        if slots.start >= slots.stop:
            continue
        if asking is None:
            received = _most(q[:, :, :, slots.start - before : slots.stop - before], block, None, None, softcap)
        else:
            queries = q.take_along_dim(index[:, None, None, slots, None], 3)
            stored = real.new_ones(batch, block.shape[2] - (end - begin))
            there = torch.cat([real[:, :own] if own else stored, real[:, begin:end]], 1)
            received = _most(queries, block, there, asks[:, slots], softcap)
        best[:, :, begin:end] = torch.maximum(best[:, :, begin:end], received[..., block.shape[2] - (end - begin) :])
        if own:
            best[:, :, :own] = torch.maximum(best[:, :, :own], received[..., :own])
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


def turned_back(k: Tensor, turn: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
    """Keys, float32, as queries see them that have been turned on: fewer heads to turn than queries have."""
    return k.float() if turn is None else turn(k, torch.full((1,), -AHEAD, device=k.device))


def _most(q: Tensor, keys: Tensor, there: Tensor | None, asks: Tensor | None, softcap: float | None) -> Tensor:
    """The largest probability of each key, [batch, heads, keys].

    Args:
        q: [batch, heads, groups, n, D]; keys: [batch, heads, keys, D].
        there: bool [batch, keys], keys that there are; asks: bool [batch, n], queries that there are; None for all.
    """
    heads, groups, count = keys.shape[1], q.shape[2], keys.shape[2]
    queries, keys = q.float().flatten(2, 3).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
    received = keys.new_zeros(keys.shape[0], count)
    hidden = None if there is None else ~there.repeat_interleave(heads, 0)[:, None]
    silent = None if asks is None else ~asks.repeat_interleave(heads, 0).repeat(1, groups)[..., None]
    most = logits_at_once(q.device, count)
    rows, each = max(1, most // max(1, queries.shape[1])), max(1, min(most, queries.shape[1]))
    for a, b in itertools.product(range(0, queries.shape[0], rows), range(0, queries.shape[1], each)):
        some, part = slice(a, a + rows), slice(b, b + each)
        logits = cap(torch.bmm(queries[some, part], keys[some]), softcap)
        if hidden is not None:
            logits = logits.masked_fill_(hidden[some], float("-inf"))
        p = logits.softmax(-1)
        if silent is not None:
            p = p.masked_fill_(silent[some, part], 0.0).nan_to_num_(0.0)
        received[some] = torch.maximum(received[some], p.amax(1))
    return received.unflatten(0, (-1, heads))
