"""Significance of a layer's tokens: what the last queries of a prompt, or the kept ones of a step, attend to.

Scores are N times the mean attention probability, so that 1 is what uniform attention would give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfkv.attend import Call, head_rows, sink_rows
from hfkv.fill import newest_last
from hfkv.kernels.decode_attention import attention_received, exact_keys, hidden_bias, join
from hfkv.kernels.observe import received_exact
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
    fill, heads, groups = sequences.fill, sequences.k.shape[1], q.shape[1] // sequences.k.shape[1]
    picked, last, total = newest_queries(sequences, q, valid, lse, count)
    if valid is None and fill.uniform == sequences.k.shape[2]:  # all sequences are alike: what is older, all see
        order = torch.arange(picked.shape[2], device=q.device)
        visible = (order <= order[:, None])[None]
    else:
        slot = torch.arange(sequences.k.shape[2], device=q.device)
        visible = (slot <= last[..., None]).repeat_interleave(heads, 0)  # [rows, count, n]
    if total is not None:
        total = total.flatten(1)
    rows, keys = head_rows(picked, heads, call), sequences.k.flatten(0, 1)
    received = received_exact(rows, keys, visible, groups, call.softcap, sink_rows(picked, heads, call), total)
    seen = pad(visible.any(1), (received.shape[1] - visible.shape[2], 0), value=True)
    return _scored(received, seen, fill.lengths, heads)


def newest_queries(
    sequences: Sequences, q: Tensor, valid: Tensor | None, lse: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The last `count` real queries [batch, q_heads, count, D], the slot of each [batch, count] and its log-sum-exp.

    A sequence with fewer has the slot -1 for those that it lacks.
    """
    fill, heads, queries = sequences.fill, sequences.k.shape[1], q.shape[2]
    groups, count = q.shape[1] // heads, min(count, queries)
    if valid is None:
        last = (fill.counts[:, None] - count + torch.arange(count, device=q.device)).clamp_min(-1)
        return q[:, :, -count:], last, None if lse is None else lse[..., -count:]
    real = valid[:, -queries:]
    own = real.sum(1)[:, None]  # [batch, 1] real queries
    pick = own - count + torch.arange(count, device=q.device)  # [batch, count]; negative: a sequence has fewer
    index = newest_last(real).gather(1, pick.clamp_min(0))
    last = torch.where(pick >= 0, fill.counts[:, None] - own + pick, -1)
    total = None
    if lse is not None:
        total = lse.gather(2, index.repeat_interleave(heads, 0)[:, None].expand(-1, groups, -1))
    return q.take_along_dim(index[:, None, :, None], 2), last, total


def kept_queries(tokens: LayerTokens, sequences: Sequences) -> tuple[Tensor, Tensor] | None:
    """The queries kept of the last steps [batch, q_heads, n, D], and the last slot of the window [batch, n] each sees.

    None where there are none; a query that sees nothing of a window has the slot -1.
    """
    q = tokens.queries.kept()
    if q is None or tokens.call is None:
        return None
    at = torch.tensor(tokens.queries.positions).to(q.device, non_blocking=True)
    position = sequences.fill.token_positions[:, None]  # [batch, 1, n]
    return q, ((position <= at[:, None]) & (position >= 0)).sum(2) - 1


def observe_stored(tokens: LayerTokens, sequences: Sequences, stored: list[dict[str, Tensor]]) -> Tensor:
    """Scores of the window's tokens [rows, n] from the kept queries; packed tokens get theirs in `stored`.

    Args:
        stored: the packed tokens' `score` float32 and `birth`, per tier [rows, slots or more].
    """
    packed, fill, heads = tokens.packed, sequences.fill, tokens.window.heads
    kept, call = kept_queries(tokens, sequences), tokens.call
    if kept is None or call is None:
        return torch.ones(fill.batch * heads, sequences.k.shape[2], device=sequences.k.device)
    q, last = kept
    groups, slot = q.shape[1] // heads, torch.arange(sequences.k.shape[2], device=q.device)
    visible = (slot <= last[..., None]).repeat_interleave(heads, 0)  # [rows, queries, n]
    rows, keys = head_rows(q, heads, call), sequences.k.flatten(0, 1).float()
    window = exact_keys(rows, keys, keys, hidden_bias(~visible).repeat(1, groups, 1), call.softcap)
    work = packed.work()
    joint = join(work, rows, [window], call.softcap, sink_rows(q, heads, call))
    p = joint.logits.softmax(-1)
    if fill.pads is not None:  # the query of a pad may see nothing at all
        p = p.masked_fill(joint.logits.amax(-1, keepdim=True) == float("-inf"), 0.0)
    received = attention_received(p, work, groups)
    in_window = p[..., work.width : work.width + keys.shape[1]].unflatten(1, (groups, -1)).sum(2).amax(1)
    score = _scored(in_window / visible.sum(1).clamp_min(1), visible.any(1), fill.lengths, heads)
    length = fill.lengths.repeat_interleave(heads, 0)[:, None]
    for block, parts in zip(received, stored, strict=True):
        old, birth = (parts[name][:, : block.shape[1]] for name in ("score", "birth"))
        old.copy_(aged(old, block * length, birth, fill.seen, tokens.queries.stands_for))
    return score


def aged(old: Tensor, observed: Tensor, birth: Tensor, seen: int, stands_for: int) -> Tensor:
    """Average a block's observation into scores, weighted by the tokens that it stands for: the mean since birth."""
    block = max(stands_for, 1)
    age = (seen - birth).clamp(min=block, max=max(SCORE_HORIZON, block))
    return old + (observed - old) * (block / age)


def _scored(received: Tensor, seen: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """N times the probability; a token that no query has seen, bool [rows or 1, n], counts as average."""
    return torch.where(seen, received * lengths.repeat_interleave(heads, 0)[:, None], 1.0)
