"""From significance to a compaction: what leaves the window, what the policy says, what a flush then does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfkv.fill import Fill
from hfkv.material import LayerMaterial
from hfkv.paging.bounds import most_ahead, most_pages
from hfkv.paging.compaction import Compaction
from hfkv.paging.pool import PagePool
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.paging.sharing import frozen
from hfkv.policy import Candidates, Shares, Thresholds, keeps_quota, observes_new, only_down
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PRUNED
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens

GROUP_TOKENS = 1 << 21
"""Tokens, over all heads, that are decided upon at once: bounds a flush's temporary memory to some 200 MB."""

NAN_SCORE = 8
"""A bit of a plan's flags beside those of what cannot be coded: a score of one's own is NaN."""

Stored = list[tuple[Tensor, dict[str, Tensor]]]
"""What pages hold, per tier by slot: which slots are filled, and `score` and `birth` where a policy selects."""


@dataclass(frozen=True)
class Flush:
    """The part of a flush that concerns layers that are alike, decided, not yet done."""

    layers: list[LayerTokens]
    packed: PackedRows  # the rows of all of them
    plan: Compaction
    incoming: Incoming
    sequences: list[Sequences]
    leaving: Tensor  # int64 [batch]

    @property
    def most(self) -> list[list[int]] | None:
        """Pages that it needs at most, as `Compaction.growth`; None where the host would have to ask the device.

        So it is where the kernels need numbers on the host, where a page table may have to grow, where pages are
        shared, behind a prompt or another change of the rows, and where a policy may make any number of tokens low.
        """
        first, packed = self.layers[0], self.packed
        if not first.kernels.defers or packed.pool.owners is not None or callable(first.config.score):
            return None
        if packed.tiers > 1 and not all(keeps_quota(tokens.policy) for tokens in self.layers):
            return None
        if self.incoming.valid.shape[1] > first.config.flush:
            return None
        return most_pages([tokens.packed for tokens in self.layers])


def plan_flush(layers: list[LayerTokens]) -> list[Flush]:
    """Decide what a flush does to layers, changing nothing."""
    return [_plan_group(group) for group in alike(layers)]


def count_flush(pool: PagePool, flushes: list[Flush]) -> None:
    """Let the host know the numbers of all plans of a pool: its one look at the device."""
    numbers = torch.cat([*(flush.plan.numbers for flush in flushes), pool.used_pages]).tolist()
    for flush in flushes:
        own = flush.plan.numbers.numel()
        flush.packed.count(flush.plan, numbers[:own])
        numbers = numbers[own:]
    pool.note_used(numbers)


def code_flush(flush: Flush) -> Any:
    """The incoming tokens as `apply_flush` wants them.

    Raises:
        ValueError: NaN, infinity, or a scale beyond its format, in a window, where the host knows.
    """
    return code_planned(flush.layers[0], flush.packed, flush.plan, flush.incoming)


def code_planned(tokens: LayerTokens, packed: PackedRows, plan: Compaction, incoming: Incoming) -> Any:
    """What `Kernels.code` makes of the incoming tokens of a plan, made for `tokens` and layers that are alike.

    Raises:
        ValueError: as of `code_flush`; or a score of one's own is NaN.
    """
    if plan.flags & NAN_SCORE:
        name = tokens.config.score
        raise ValueError(f"LeanKVConfig.score = {name!r} returned NaN: a score must be a number for every token")
    return tokens.kernels.code(packed, plan, incoming)


def apply_flush(flush: Flush, coded: Any) -> None:
    """Do what `plan_flush` decided; the pool has room for it."""
    flush.layers[0].kernels.apply(flush.packed, flush.plan, coded)
    flush.packed.settle()
    flush.packed.hand_back([tokens.packed for tokens in flush.layers])
    for tokens, sequences in zip(flush.layers, flush.sequences, strict=True):
        tokens.fill = tokens.cache.fills.left(sequences.fill, flush.leaving, tokens.config.window)
        tokens.window = tokens.window.keep_last(sequences, flush.leaving, tokens.fill)
        tokens.queries.clear()
        tokens.whole, tokens.reconstruction = False, None
    if flush.packed.pool.owners is None:  # tokens of shared pages may stay high beyond their quota
        for tokens, ahead in zip(flush.layers, flush.plan.ahead, strict=True):
            tokens.packed.ahead = ahead


def alike(layers: list[LayerTokens]) -> list[list[LayerTokens]]:
    """Layers whose rows can be changed together, in their order, so many that the temporary memory stays bounded."""
    groups: dict[tuple, list[list[LayerTokens]]] = {}
    for tokens in layers:
        packed, config = tokens.packed, tokens.config
        shared = (id(packed.pool), id(packed.basis.key), id(packed.basis.value), id(tokens.fill), packed.shift)
        shape = (packed.rows, tokens.dtype, type(tokens.kernels))
        score = id(config.score) if callable(config.score) else config.score
        key = (*shared, tuple(packed.layouts), *shape, config.window, config.selects, score)
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
    observes = first.config.selects and first.score is None
    score = _observe(layers, packed, sequences, stored) if observes else None
    incoming = incoming_tokens(sequences, leaving, window, score)
    widths = [filled.shape[1] for filled, _ in stored]
    new = first.config.selects and observes_new(first.score) and not first.whole
    seen = _observe_new(layers, sequences, stored) if new else [None] * len(layers)
    materials = [
        LayerMaterial(t, t.packed, own, widths, incoming.valid.shape[1], t.call, observed=fresh)
        for t, own, fresh in zip(layers, sequences, seen, strict=True)
    ]
    plan = plan_tiers(layers, packed, incoming, stored, fill, materials, rescored=True)
    entering, heads = first.config.flush, first.window.heads
    ahead = most_ahead(plan.lengths, packed.layouts[0].tokens, entering, len(layers), heads)
    plan.numbers, plan.ahead = torch.cat([plan.numbers, ahead.flatten()]), [[] for _ in layers]
    return Flush(layers, packed, plan, incoming, sequences, leaving)


def _observe(layers: list[LayerTokens], packed: PackedRows, sequences: list[Sequences], stored: Stored) -> Tensor:
    """Score every layer's tokens: those in pages get their new scores in `stored`, the window's are [rows, n].

    Tokens in pages that sequences share keep their scores.
    """
    for _, parts in stored:
        parts["score"] = parts["score"].float()
    before = [parts["score"].clone() if packed.pool.owners is not None else parts["score"] for _, parts in stored]
    scores = layers[0].kernels.observe_stored(layers, sequences, [parts for _, parts in stored])
    for tier, (_, parts) in enumerate(stored):
        parts["score"] = _kept_where_shared(packed, tier, parts["score"], before[tier])
    return scores


def _observe_new(layers: list[LayerTokens], sequences: list[Sequences], stored: Stored) -> Sequence[Tensor | None]:
    """Scores of every layer's window tokens, [rows, n] each; what is stored keeps its own."""
    own = [{**parts, "score": parts["score"].to(torch.float32, copy=True)} for _, parts in stored]
    return layers[0].kernels.observe_stored(layers, sequences, own).chunk(len(layers))


def _kept_where_shared(packed: PackedRows, tier: int, new: Tensor, old: Tensor) -> Tensor:
    """New scores [rows, slots], but the old ones in pages that sequences share."""
    shared = frozen(packed, tier, new.shape[1])
    return new if shared is None else torch.where(shared, old, new)


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
    layers: list[LayerTokens],
    packed: PackedRows,
    incoming: Incoming,
    stored: Stored,
    after: Fill,
    materials: list[LayerMaterial],
    rescored: bool,
) -> Compaction:
    """Ask the scores and policies of layers that are alike -> a draft; new scores go into `incoming` and `stored`.

    Args:
        packed: the rows of all of them.
        rescored: a flush; False: a prompt is stored, and the stored tokens stay as they are.
        after: fill that counts the incoming tokens as seen.
        materials: what each layer lets be read.
    """
    check = layers[0].kernels.checker(packed, incoming)
    now = [torch.where(filled, (HIGH, LOW)[tier], EMPTY) for tier, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(incoming.valid, NEW, EMPTY)], 1).to(torch.int8)
    if not layers[0].config.selects or not current.shape[1]:
        empty = [filled.float() for filled, _ in stored]
        return packed.draft(torch.full_like(current, HIGH), current, empty, False, check)
    old = [parts["score"].float() for _, parts in stored]
    birth = torch.cat([*(parts["birth"].long() for _, parts in stored), incoming.birth], 1)
    own = layers[0].score is not None
    fresh = torch.zeros_like(incoming.score) if own else incoming.score
    asked = _candidates(layers, after, torch.cat([*old, fresh], 1), birth, current, materials, prompt=not rescored)
    if own:
        asked = [replace(c, score=_scored(tokens, c)) for tokens, c in zip(layers, asked, strict=True)]
        score = torch.cat([c.score.flatten(0, 1) for c in asked])
        if callable(layers[0].config.score):
            check = _with_nan(check, (score.isnan() & (current != EMPTY)).any())
        *known, incoming.score = score.split([*(part.shape[1] for part in old), fresh.shape[1]], 1)
        if rescored:
            old = [_kept_where_shared(packed, tier, *both) for tier, both in enumerate(zip(known, old, strict=True))]
    target = _ask(layers, asked)
    if not rescored:
        target = torch.where(current == NEW, target, current)
        if layers[0].config.reconstructs:  # the second pass decides what is pruned
            target = torch.where(target == PRUNED, LOW if packed.tiers == 2 else HIGH, target)
    return packed.draft(target, current, old, rescored, check)


def _candidates(
    layers: list[LayerTokens],
    after: Fill,
    score: Tensor,
    birth: Tensor,
    current: Tensor,
    materials: list[LayerMaterial],
    prompt: bool,
) -> list[Candidates]:
    """One for each layer, of the rows [layers * rows, T] of all."""
    shape = (after.batch, layers[0].window.heads, current.shape[1])
    shared = layers[0].costs if _one_policy(layers) else None
    parts = (x.chunk(len(layers)) for x in (score, birth, current))
    return [
        Candidates(
            score=own_score.view(shape),
            birth=own_birth.view(shape),
            tier=own_tier.view(shape),
            seen=after.lengths - after.counts.clamp(max=tokens.config.window),
            length=after.lengths,
            tiers=tokens.packed.tiers,
            costs=tokens.costs if shared is None else shared,
            material=material,
            prompt=prompt,
            span=after.seen,
        )
        for tokens, material, own_score, own_birth, own_tier in zip(layers, materials, *parts, strict=True)
    ]


def _scored(tokens: LayerTokens, c: Candidates) -> Tensor:
    """What the layer's own score says.

    Raises:
        ValueError: it is not of the shape that it should have.
    """
    assert tokens.score is not None
    score = tokens.score(c)
    name = tokens.config.score
    if not isinstance(score, Tensor) or score.shape != c.tier.shape:
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"LeanKVConfig.score = {name!r} returned {got}: return float [batch, kv_heads, T] = {tuple(c.tier.shape)}"
        )
    return score.float()


def _with_nan(check: Callable[[list[Tensor]], Tensor] | None, found: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """A check of incoming tokens that also says whether NaN was `found`, bool, among scores: the host asks once."""

    def checked(entering: list[Tensor]) -> Tensor:
        flags = torch.zeros(1, dtype=torch.int32, device=found.device) if check is None else check(entering)
        return flags | found.int() * NAN_SCORE

    return checked


def _ask(layers: list[LayerTokens], asked: list[Candidates]) -> Tensor:
    """The tiers [rows, T] that the layers' policies want: all layers at once where one policy serves them."""
    if len(layers) > 1 and _one_policy(layers):
        asked = [_together(asked)]
    answers = []
    for tokens, c in zip(layers, asked, strict=False):
        _check_fixed_cost(tokens, c)
        answers.append(only_down(c, tokens.policy(c)).view(-1, c.tier.shape[2]))
    return _joined(answers)


def _one_policy(layers: list[LayerTokens]) -> bool:
    """Whether all layers have the same policy, and it looks at numbers per token only."""
    policy = layers[0].policy
    one = isinstance(policy, Thresholds) or (isinstance(policy, Shares) and policy.representatives is None)
    return one and all(tokens.policy == policy for tokens in layers)


def _together(asked: list[Candidates]) -> Candidates:
    """Layers as one batch, for a policy that looks at numbers per token only."""
    score, birth, tier, seen, length = (
        torch.cat([getattr(c, name) for c in asked]) for name in ("score", "birth", "tier", "seen", "length")
    )
    return replace(asked[0], score=score, birth=birth, tier=tier, seen=seen, length=length, material=None)


def _check_fixed_cost(tokens: LayerTokens, candidates: Candidates) -> None:
    if tokens.config.budget is None:
        return
    length = int(candidates.length.max()) if candidates.span is None else candidates.span
    ratio = candidates.costs.fixed / max(length * candidates.tier.shape[1] * candidates.costs.exact_token, 1)
    if ratio > tokens.config.budget:
        tokens.cache.note_fixed_cost(ratio)
