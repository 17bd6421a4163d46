"""Significance of a layer's tokens: what the last queries of a prompt, or the kept ones of a step, attend to.

Scores are N times the mean attention probability, so that 1 is what uniform attention would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfkv.attend import Call, head_rows, sink_rows
from hfkv.fill import newest_last
from hfkv.kernels.decode_attention import attention_received, exact_keys, hidden_bias, join
from hfkv.kernels.observe import received_exact
from hfkv.paging.packed import work_list
from hfkv.paging.rows import PackedRows
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens

STACKED_LOGITS, STACKED_TOKENS = 1 << 21, 1 << 17
"""Logits, and packed tokens over all heads, of layers that are observed together at a flush: some 8 MB each."""

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


def observe_stored(layers: list[LayerTokens], sequences: list[Sequences], stored: list[dict[str, Tensor]]) -> Tensor:
    """Scores of the windows' tokens [rows of all, n] from the kept queries; packed tokens get theirs in `stored`.

    Args:
        layers: alike, as a flush has them together; `sequences` are their windows.
        stored: the packed tokens' `score` float32 and `birth`, per tier [rows of all, slots or more].
    """
    rows, scores = layers[0].packed.rows, []
    slots = sum(parts["score"].shape[1] for parts in stored) + sequences[0].k.shape[2]
    for first, last in _stacks(layers, slots):
        part = slice(first * rows, last * rows)
        own = [{name: x[part] for name, x in parts.items()} for parts in stored]
        scores.append(_observe_stack(layers[first:last], sequences[first:last], own))
    return torch.cat(scores)


def _stacks(layers: list[LayerTokens], slots: int) -> Iterator[tuple[int, int]]:
    """Layers [first, last) that are asked alike, so many that what is made of their `slots` tokens stays small."""
    rows, q, start = layers[0].packed.rows, layers[0].queries.kept(), 0
    logits = slots * (0 if q is None else q.shape[0] * q.shape[1] * q.shape[2])
    most = max(1, min(STACKED_LOGITS // max(1, logits), STACKED_TOKENS // max(1, rows * slots)))
    for index in range(1, len(layers) + 1):
        if index == len(layers) or index - start == most or _asked(layers[index]) != _asked(layers[start]):
            yield start, index
            start = index


def _asked(tokens: LayerTokens) -> tuple:
    """What layers that are observed together have in common."""
    call, kept = tokens.call, tokens.queries
    terms = None if call is None else (call.softcap, call.sinks is None)
    return terms, kept.kept() is None, kept.positions, kept.stands_for


def _observe_stack(layers: list[LayerTokens], sequences: list[Sequences], stored: list[dict[str, Tensor]]) -> Tensor:
    """`observe_stored` of layers that are asked alike."""
    first, fill, heads = layers[0], sequences[0].fill, layers[0].window.heads
    kept, call = kept_queries(first, sequences[0]), first.call
    keys = torch.cat([own.k.flatten(0, 1).float() for own in sequences])
    if kept is None or call is None:
        return torch.ones(keys.shape[:2], device=keys.device)
    q, last = kept
    groups, slot = q.shape[1] // heads, torch.arange(keys.shape[1], device=keys.device)
    visible = (slot <= last[..., None]).repeat_interleave(heads, 0).repeat(len(layers), 1, 1)  # [rows, queries, n]
    rows, sinks = _asking(layers)
    window = exact_keys(rows, keys, keys, hidden_bias(~visible).repeat(1, groups, 1), call.softcap)
    work = first.packed.work() if len(layers) == 1 else work_list(PackedRows.stacked([t.packed for t in layers]))
    joint = join(work, rows, [window], call.softcap, sinks)
    p = joint.logits.softmax(-1)
    if fill.pads is not None:  # the query of a pad may see nothing at all
        p = p.masked_fill(joint.logits.amax(-1, keepdim=True) == float("-inf"), 0.0)
    received = attention_received(p, work, groups)
    in_window = p[..., work.width : work.width + keys.shape[1]].unflatten(1, (groups, -1)).sum(2).amax(1)
    lengths = fill.lengths.repeat(len(layers))
    score = _scored(in_window / visible.sum(1).clamp_min(1), visible.any(1), lengths, heads)
    length = lengths.repeat_interleave(heads, 0)[:, None]
    for block, parts in zip(received, stored, strict=True):
        old, birth = (parts[name][:, : block.shape[1]] for name in ("score", "birth"))
        old.copy_(aged(old, block * length, birth, fill.seen, first.queries.stands_for))
    return score


def _asking(layers: list[LayerTokens]) -> tuple[Tensor, Tensor | None]:
    """The kept queries of layers, one after the other, as `head_rows`, and their sinks as `sink_rows`."""
    rows, sinks = [], []
    for tokens in layers:
        q, call = tokens.queries.kept(), tokens.call
        assert q is not None and call is not None  # they are asked alike
        rows.append(head_rows(q, tokens.window.heads, call))
        sinks.append(sink_rows(q, tokens.window.heads, call))
    return torch.cat(rows), torch.cat([s for s in sinks if s is not None]) if sinks[0] is not None else None


def aged(old: Tensor, observed: Tensor, birth: Tensor, seen: int, stands_for: int) -> Tensor:
    """Average a block's observation into scores, weighted by the tokens that it stands for: the mean since birth."""
    block = max(stands_for, 1)
    age = (seen - birth).clamp(min=block, max=max(SCORE_HORIZON, block))
    return old + (observed - old) * (block / age)


def _scored(received: Tensor, seen: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """N times the probability; a token that no query has seen, bool [rows or 1, n], counts as average."""
    return torch.where(seen, received * lengths.repeat_interleave(heads, 0)[:, None], 1.0)
