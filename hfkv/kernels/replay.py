"""Replay: the most attention that every token of a prompt gets when the prompt's own queries come once more behind it.

    received_t = max over the block's queries s and the group of softmax_t(turn(q_s) . k_t)

Keys and queries are cut into blocks; a block's queries look at all of its keys, at those just behind it and at the
first of the prompt, before and behind them alike. So the cost is linear in the prompt. It is what KVzip (Kim et al.
2025) takes from a second pass in which the model repeats the prompt: the queries of the first pass are nearly those of
the second, since what a token asks for is mostly its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfkv.kernels.decode_attention import cap

BLOCK = 512
OVERLAP = 16
AHEAD = 512
"""By how many positions queries are turned on: far enough to be behind the block, near enough to see it sharply."""

SINKS = 4
LOGIT_BYTES = 64 << 20


def most_received(
    q: Tensor,
    last: Tensor,
    k: Tensor,
    counts: Tensor,
    first: Tensor | None,
    scaling: float,
    softcap: float | None,
    turn: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """The largest probability that each key receives, float32 [batch, kv_heads, tokens].

    Keys whose own query is not among `q` (those of an earlier chunk) get the mean of the others if that is more.

    Args:
        q: [batch, q_heads, queries, D], left-aligned; last: int64 [batch, queries], slot of each query's own token, -1
            for none.
        k: [batch, kv_heads, tokens, D], of which each sequence has the first `counts` int64 [batch].
        first: keys [batch, kv_heads, n, D] of the prompt's first tokens where they are not the first of `k`.
        turn: (x [batch, heads, n, D], positions int64 [1]) -> x turned on by RoPE; None: the model has none.
    """
    batch, heads, tokens = k.shape[:3]
    groups = q.shape[1] // heads
    ahead = torch.tensor([AHEAD], device=q.device)
    slot = torch.arange(tokens, device=k.device)
    real = slot < counts[:, None]  # [batch, tokens]
    best = torch.zeros(batch, heads, tokens, device=k.device)
    own = 0 if first is not None else min(SINKS, tokens)  # sinks among `k`
    index = slot - last[:, :1]  # [batch, tokens], the query that belongs to a slot
    asks = (last[:, :1] >= 0) & (index >= 0) & (index < q.shape[2]) & real
    index = index.clamp(0, q.shape[2] - 1)
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        block = q.take_along_dim(index[:, None, start:stop, None], 2)
        block = block.float() if turn is None else turn(block, ahead)
        begin, end = max(start, own), min(stop + OVERLAP, tokens)
        sinks = k[:, :, :own] if first is None else first
        keys = torch.cat([sinks.float(), k[:, :, begin:end].float()], 2).flatten(0, 1)
        there = torch.cat([real.new_ones(batch, sinks.shape[2]), real[:, begin:end]], 1)
        if first is None:
            there[:, :own] = real[:, :own]
        received = _most(block, keys, there, asks[:, start:stop], heads, groups, scaling, softcap)
        best[:, :, begin:end] = torch.maximum(best[:, :, begin:end], received[..., sinks.shape[2] :])
        if own:
            best[:, :, :own] = torch.maximum(best[:, :, :own], received[..., :own])
    mean = (best * asks[:, None]).sum(2, keepdim=True) / asks.sum(1)[:, None, None].clamp_min(1)
    return torch.where(asks[:, None], best, torch.maximum(best, mean))


def _most(
    q: Tensor, keys: Tensor, there: Tensor, asks: Tensor, heads: int, groups: int, scaling: float, softcap: float | None
) -> Tensor:
    """[batch, heads, keys]: q [batch, q_heads, n, D], keys [rows, keys, D], there [batch, keys], asks [batch, n]."""
    rows = q.reshape(keys.shape[0], groups * q.shape[2], -1) * scaling
    received = keys.new_zeros(keys.shape[0], keys.shape[1])
    hidden = ~there.repeat_interleave(heads, 0)[:, None]
    silent = ~asks.repeat_interleave(heads, 0).repeat(1, groups)[..., None]
    step = max(1, LOGIT_BYTES // max(1, 4 * rows.shape[1] * keys.shape[1]))
    for a in range(0, keys.shape[0], step):
        part = slice(a, a + step)
        logits = cap(torch.bmm(rows[part], keys[part].transpose(1, 2)), softcap)
        p = logits.masked_fill_(hidden[part], float("-inf")).softmax(-1)
        received[part] = p.masked_fill_(silent[part], 0.0).nan_to_num_(0.0).amax(1)
    return received.unflatten(0, (-1, heads))
