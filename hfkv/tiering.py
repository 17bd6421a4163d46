"""From significance to a compaction: what leaves the window, what the policy says, what a flush then does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfkv.fill import Fill
from hfkv.paging.compaction import Compaction
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.policy import Candidates, Shares, Thresholds, only_down
from hfkv.quant import EMPTY, HIGH, LOW, NEW
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens

GROUP_TOKENS = 1 << 21
"""Tokens, over all heads, that are decided upon at once: bounds a flush's temporary memory to some 200 MB."""

Stored = list[tuple[Tensor, dict[str, Tensor]]]
"""What pages hold, per tier by slot: which slots are filled, and `score` and `birth` where a policy selects."""


@dataclass(frozen=True)
class Flush:
    """The part of a flush that concerns layers that are alike, decided and coded, not yet done."""

    layers: list[LayerTokens]
    packed: PackedRows  # the rows of all of them
    plan: Compaction
    coded: Any  # as the layers' kernels want them
    sequences: list[Sequences]
    leaving: Tensor  # int64 [batch]


def plan_flush(layers: list[LayerTokens]) -> list[Flush]:
    """Decide what a flush does to layers, changing nothing.

    Raises:
        ValueError: NaN, infinity, or a scale beyond its format, in a window.
    """
    return [_plan_group(group) for group in _alike(layers)]


def apply_flush(flush: Flush) -> None:
    """Do what `plan_flush` decided; the pool has room for it."""
    flush.layers[0].kernels.apply(flush.packed, flush.plan, flush.coded)
    flush.packed.settle()
    flush.packed.hand_back([tokens.packed for tokens in flush.layers])
    for tokens, sequences in zip(flush.layers, flush.sequences, strict=True):
        tokens.fill = tokens.cache.fills.left(sequences.fill, flush.leaving, tokens.config.window)
        tokens.window = tokens.window.keep_last(sequences, flush.leaving, tokens.fill)
        tokens.queries.clear()


def _alike(layers: list[LayerTokens]) -> list[list[LayerTokens]]:
    """Layers whose rows can be flushed together, in their order, so many that the temporary memory stays bounded."""
    groups: dict[tuple, list[list[LayerTokens]]] = {}
    for tokens in layers:
        packed, config = tokens.packed, tokens.config
        shared = (id(packed.pool), id(packed.basis.key), id(packed.basis.value), id(tokens.fill), packed.shift)
        shape = (packed.rows, tokens.dtype, tokens.kernels.name)
        key = (*shared, tuple(packed.layouts), *shape, config.window, config.selects)
        alike = groups.setdefault(key, [[]])
        if alike[-1] and (len(alike[-1]) + 1) * packed.rows * tokens.fill.seen > GROUP_TOKENS:
            alike.append([])
        alike[-1].append(tokens)
    return [group for alike in groups.values() for group in alike]


def _plan_group(layers: list[LayerTokens]) -> Flush:
    first, kernels = layers[0], layers[0].kernels
    fill, window = first.fill, first.config.window
    leaving = (fill.counts - window).clamp_min(0)
    sequences = [Sequences(t.window.k[:, :, : fill.most], t.window.v[:, :, : fill.most], fill) for t in layers]
    packed = PackedRows.stacked([tokens.packed for tokens in layers])
    stored = kernels.stored(packed, first.config.selects)
    score = _observe(layers, sequences, stored) if first.config.selects else None
    incoming = incoming_tokens(sequences, leaving, window, score)
    plan = plan_tiers(layers, packed, incoming, stored, fill, rescored=True)
    return Flush(layers, packed, plan, kernels.code(packed, plan, incoming), sequences, leaving)


def _observe(layers: list[LayerTokens], sequences: list[Sequences], stored: Stored) -> Tensor:
    """Score every layer's tokens: those in pages get their new scores in `stored`, the window's are [rows, n]."""
    rows, scores = layers[0].packed.rows, []
    for _, parts in stored:
        parts["score"] = parts["score"].float()
    for index, (tokens, own) in enumerate(zip(layers, sequences, strict=True)):
        part = slice(index * rows, (index + 1) * rows)
        held = [{name: x[part] for name, x in parts.items()} for _, parts in stored]
        scores.append(tokens.kernels.observe_stored(tokens, own, held))
    return torch.cat(scores)


def incoming_tokens(sequences: list[Sequences], leaving: Tensor, window: int, score: Tensor | None) -> Incoming:
    """The first `leaving` int64 [batch] tokens of every sequence, by rows; `score` [rows, n] or None for none.

    Args:
        sequences: one of each layer, all of one fill.
    """
    fill, heads = sequences[0].fill, sequences[0].k.shape[1]
    most, layers = max(0, fill.most - window), len(sequences)
    valid = (torch.arange(most, device=leaving.device) < leaving[:, None]).repeat_interleave(heads, 0)
    birth = fill.token_positions[:, :most].repeat_interleave(heads, 0)
    k, v = (
        _joined([side[:, :, :most].flatten(0, 1) for side in sides])
        for sides in ([s.k for s in sequences], [s.v for s in sequences])
    )
    valid, birth = valid.repeat(layers, 1), birth.repeat(layers, 1)
    return Incoming(
        k, v, torch.ones(valid.shape, device=valid.device) if score is None else score[:, :most], birth, valid
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def plan_tiers(
    layers: list[LayerTokens], packed: PackedRows, incoming: Incoming, stored: Stored, after: Fill, rescored: bool
) -> Compaction:
    """Ask the policies of layers that are alike.

    Args:
        packed: the rows of all of them.
        rescored: the scores in `stored` are new; False: the stored tokens stay as they are.
        after: fill that counts the incoming tokens as seen.
    """
    check = layers[0].kernels.checker(packed, incoming)
    now = [torch.where(filled, (HIGH, LOW)[tier], EMPTY) for tier, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(incoming.valid, NEW, EMPTY)], 1).to(torch.int8)
    if not layers[0].config.selects:
        empty = [filled.float() for filled, _ in stored]
        return packed.plan(torch.full_like(current, HIGH), current, empty, False, check)
    old = [parts["score"].float() for _, parts in stored]
    score = torch.cat([*old, incoming.score], 1)
    birth = torch.cat([*(parts["birth"].long() for _, parts in stored), incoming.birth], 1)
    target = _ask(layers, after, score, birth, current)
    if not rescored:
        target = torch.where(current == NEW, target, current)
    return packed.plan(target, current, old, rescored, check)


def _ask(layers: list[LayerTokens], after: Fill, score: Tensor, birth: Tensor, current: Tensor) -> Tensor:
    """The tiers [rows, T] that the layers' policies want: all layers at once where one policy serves them."""
    first, heads, width = layers[0].policy, layers[0].window.heads, current.shape[1]
    one = isinstance(first, Shares | Thresholds) and all(tokens.policy == first for tokens in layers)
    groups, answers = [layers] if one else [[tokens] for tokens in layers], []
    parts = (x.chunk(len(groups)) for x in (score, birth, current))
    for group, own_score, own_birth, own_tier in zip(groups, *parts, strict=True):
        shape = (len(group) * after.batch, heads, width)
        length = after.lengths.repeat(len(group))
        candidates = Candidates(
            score=own_score.view(shape),
            birth=own_birth.view(shape),
            tier=own_tier.view(shape),
            seen=(length - group[0].config.window).clamp_min(0),
            length=length,
            tiers=group[0].packed.tiers,
            costs=group[0].costs,
        )
        _check_fixed_cost(group[0], candidates)
        answers.append(only_down(candidates, group[0].policy(candidates)).view(-1, width))
    return _joined(answers)


def _check_fixed_cost(tokens: LayerTokens, candidates: Candidates) -> None:
    if tokens.config.budget is None:
        return
    exact = candidates.length * candidates.tier.shape[1] * candidates.costs.exact_token  # [batch]
    ratio = candidates.costs.fixed / max(int(exact.max()), 1)
    if ratio > tokens.config.budget:
        tokens.cache.note_fixed_cost(ratio)
