"""From significance to a compaction: what leaves the window, what the policy says, what a flush then does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.fill import Fill
from hfkv.kernels.quantize_pack import Tokens
from hfkv.observe import observe_stored
from hfkv.paging.packed import Compaction, Incoming
from hfkv.policy import Candidates, only_down
from hfkv.quant import EMPTY, HIGH, LOW, NEW
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens


@dataclass(frozen=True)
class Flush:
    """A layer's part of a flush, decided and coded, not yet done."""

    plan: Compaction
    coded: list[Tokens]
    sequences: Sequences
    leaving: Tensor  # int64 [batch]


def plan_flush(tokens: LayerTokens) -> Flush:
    """Decide what a flush does to a layer, changing nothing.

    Raises:
        ValueError: NaN, infinity, or a scale beyond its format, in the window.
    """
    fill, window = tokens.fill, tokens.window
    leaving = (fill.counts - tokens.config.window).clamp_min(0)
    sequences = Sequences(window.k[:, :, : fill.most], window.v[:, :, : fill.most], fill)
    scores, score = observe_stored(tokens, sequences) if tokens.config.selects else (None, None)
    incoming = incoming_tokens(sequences, leaving, tokens.config.window, score)
    plan = plan_tiers(tokens, incoming, scores, fill)
    return Flush(plan, tokens.packed.code_incoming(plan, incoming), sequences, leaving)


def apply_flush(tokens: LayerTokens, flush: Flush) -> None:
    """Do what `plan_flush` decided; the pool has room for it."""
    tokens.packed.apply(flush.plan, flush.coded)
    tokens.fill = tokens.cache.fills.left(flush.sequences.fill, flush.leaving, tokens.config.window)
    tokens.window = tokens.window.keep_last(flush.sequences, flush.leaving, tokens.fill)
    tokens.queries.clear()


def incoming_tokens(sequences: Sequences, leaving: Tensor, window: int, score: Tensor | None) -> Incoming:
    """The first `leaving` int64 [batch] tokens of every sequence, by rows; `score` [rows, n] or None for none."""
    heads, most = sequences.k.shape[1], max(0, sequences.fill.most - window)
    valid = (torch.arange(most, device=leaving.device) < leaving[:, None]).repeat_interleave(heads, 0)
    k, v = sequences.k[:, :, :most].flatten(0, 1), sequences.v[:, :, :most].flatten(0, 1)
    birth = sequences.fill.token_positions[:, :most].repeat_interleave(heads, 0)
    return Incoming(
        k, v, torch.ones(valid.shape, device=valid.device) if score is None else score[:, :most], birth, valid
    )


def plan_tiers(tokens: LayerTokens, incoming: Incoming, scores: list[Tensor] | None, after: Fill) -> Compaction:
    """Ask the layer's policy.

    Args:
        scores: new scores of the stored tokens, per tier [rows, slots]; None: they stay as they are.
        after: fill that counts the incoming tokens as seen.
    """
    packed, selects = tokens.packed, tokens.config.selects
    stored = [packed.slots(tier, ("score", "birth") if selects else ()) for tier in range(packed.tiers)]
    now = [torch.where(filled, (HIGH, LOW)[tier], EMPTY) for tier, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(incoming.valid, NEW, EMPTY)], 1).to(torch.int8)
    if not selects:
        return packed.plan(torch.full_like(current, HIGH), current, [filled.float() for filled, _ in stored])
    old = scores if scores is not None else [parts["score"].float() for _, parts in stored]
    shape = (after.batch, tokens.window.heads, current.shape[1])
    candidates = Candidates(
        score=torch.cat([*old, incoming.score], 1).view(shape),
        birth=torch.cat([*(parts["birth"].long() for _, parts in stored), incoming.birth], 1).view(shape),
        tier=current.view(shape),
        seen=(after.lengths - tokens.config.window).clamp_min(0),
        length=after.lengths,
        tiers=packed.tiers,
        costs=tokens.costs,
    )
    _check_fixed_cost(tokens, candidates)
    target = only_down(candidates, tokens.policy(candidates)).view(current.shape)
    if scores is None:
        target = torch.where(current == NEW, target, current)
    return packed.plan(target, current, old)


def _check_fixed_cost(tokens: LayerTokens, candidates: Candidates) -> None:
    exact = candidates.length * candidates.tier.shape[1] * candidates.costs.exact_token  # [batch]
    ratio = candidates.costs.fixed / max(int(exact.max()), 1)
    if tokens.config.budget is not None and ratio > tokens.config.budget:
        tokens.cache.note_fixed_cost(ratio)
