"""Significance of a layer's tokens: what the last queries of a prompt, or the kept ones of a step, attend to.

Scores are N times the mean attention probability, so that 1 is what uniform attention would give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.attend import Call, head_rows, sink_rows
from hfkv.fill import newest_last
from hfkv.kernels.decode_attention import attend_pages, attention_received
from hfkv.kernels.observe import received_exact
from hfkv.kernels.partial import attend_exact, hidden_bias, merge
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens

SCORE_HORIZON = 4096
"""A score averages over at most this many tokens: beyond it fp16 could no longer take up a new block's share."""


def observe_chunk(
    sequences: Sequences, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None, count: int
) -> Tensor:
    """Scores float32 [rows, n] of window and chunk tokens from the chunk's last `count` real queries.

    Args:
        q: [batch, q_heads, queries, D]; valid: bool [batch, tokens], None for all.
        lse: [rows, groups, queries] over all keys; None where `sequences` is all there is.
    """
    fill, heads, queries = sequences.fill, sequences.k.shape[1], q.shape[2]
    groups, count = q.shape[1] // heads, min(count, queries)
    real = torch.ones(q.shape[0], queries, dtype=torch.bool, device=q.device) if valid is None else valid[:, -queries:]
    own = real.sum(1)[:, None]  # [batch, 1] real queries
    pick = own - count + torch.arange(count, device=q.device)  # [batch, count]; negative: a sequence has fewer
    index = newest_last(real).gather(1, pick.clamp_min(0))
    picked = q.take_along_dim(index[:, None, :, None], 2)
    slot = torch.arange(sequences.k.shape[2], device=q.device)
    last = (fill.counts[:, None] - own + pick)[..., None]  # [batch, count, 1] the query's own slot
    visible = (slot <= last) & (pick >= 0)[..., None] & (slot < fill.counts[:, None, None])
    visible = visible.repeat_interleave(heads, 0)
    total = None
    if lse is not None:
        total = lse.gather(2, index.repeat_interleave(heads, 0)[:, None].expand(-1, groups, -1)).flatten(1)
    rows, keys = head_rows(picked, heads, call), sequences.k.flatten(0, 1)
    received = received_exact(rows, keys, visible, groups, call.softcap, sink_rows(picked, heads, call), total)
    return _scored(received, visible, fill.lengths, heads)


def observe_stored(tokens: LayerTokens, sequences: Sequences) -> tuple[list[Tensor], Tensor]:
    """New scores from the kept queries: of packed tokens, per tier [rows, slots], and of the window's [rows, n]."""
    packed, fill, heads = tokens.packed, sequences.fill, tokens.window.heads
    stored = [packed.slots(tier, ("score", "birth"))[1] for tier in range(packed.tiers)]
    old = [parts["score"].float() for parts in stored]
    q, call = tokens.queries.kept(), tokens.call
    if q is None or call is None:
        return old, torch.ones(fill.batch * heads, sequences.k.shape[2], device=sequences.k.device)
    rows, groups = head_rows(q, heads, call), q.shape[1] // heads
    at = torch.tensor(tokens.queries.positions, device=q.device)
    position = fill.token_positions[:, None]  # [batch, 1, n]
    visible = ((position <= at[:, None]) & (position >= 0)).repeat_interleave(heads, 0)  # [rows, queries, n]
    keys, bias = sequences.k.flatten(0, 1).float(), hidden_bias(~visible).repeat(1, groups, 1)
    work, rotated = packed.work(), packed.basis.rotate_keys(rows)
    constant = packed.basis.constant(rotated)
    over_window = attend_exact(rows, keys, keys[..., :0], bias, call.softcap)
    over_pages = attend_pages(work, rotated, constant, call.softcap, values=False)
    lse = merge([over_window, over_pages], sink_rows(q, heads, call)).lse
    score = _scored(received_exact(rows, keys, visible, groups, call.softcap, None, lse), visible, fill.lengths, heads)
    received = packed.per_slot(attention_received(work, rotated, constant, call.softcap, lse, groups))
    length = fill.lengths.repeat_interleave(heads, 0)[:, None]
    new = [
        aged(score, block * length, parts["birth"], fill.seen, tokens.queries.stands_for)
        for score, block, parts in zip(old, received, stored, strict=True)
    ]
    return new, score


def aged(old: Tensor, observed: Tensor, birth: Tensor, seen: int, stands_for: int) -> Tensor:
    """Average a block's observation into scores, weighted by the tokens that it stands for: the mean since birth."""
    block = max(stands_for, 1)
    age = (seen - birth).clamp(min=block, max=max(SCORE_HORIZON, block))
    return old + (observed - old) * (block / age)


def _scored(received: Tensor, visible: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """N times the probability; a token that no query has seen counts as average."""
    return torch.where(visible.any(1), received * lengths.repeat_interleave(heads, 0)[:, None], 1.0)
