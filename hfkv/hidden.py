"""Packed tokens that a later padding mask hides: what generate had appended to a sequence that ended early."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.fill import Fill
from hfkv.paging.compaction import Compaction
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.paging.sharing import frozen
from hfkv.quant import EMPTY, HIGH, LOW, PRUNED
from hfkv.tiering import alike
from hfkv.tokens import LayerTokens

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache


def drop_hidden(cache: LeanKVCache, mask: Tensor, new: int, valid: Tensor | None) -> bool:
    """Drop what a padding mask [batch, 1, 1, tokens] hides from window and pages of all layers, if that explains it.

    Called before any layer has stored the `new` tokens of a forward. Where a page without births holds such tokens they
    are taken to be the newest of their sequence.

    Returns:
        False where the mask shows more than is held, hides other packed tokens, or such that sequences share; then
        nothing has changed.
    """
    held = cache.compressed
    fill = held[0].fill
    if any(tokens.fill is not fill for tokens in held):
        return False
    after, slots = cache.fills.shown(fill, mask)
    shown = mask[:, 0, 0].bool()
    fresh = new if valid is None else valid.sum(1)
    left = after.lengths + fresh - shown.sum(1)  # int64 [batch] packed tokens that are hidden
    first = torch.where(fill.counts > 0, fill.token_positions[:, 0], fill.seen) if fill.most else left * 0 + fill.seen
    position = torch.arange(shown.shape[1], device=shown.device)
    newest = (position >= (first - left)[:, None]) & (position < first[:, None])
    if bool((left < 0).any() | (newest & shown).any()):
        return False
    work = []
    for group in alike(held):
        packed = PackedRows.stacked([tokens.packed for tokens in group])
        removal = _plan(group, packed, shown, left)
        if removal is None:
            return False
        work.append((group, packed, removal))
    pads = left if after.pads is None else after.pads + left
    after = Fill(after.uniform, after.counts, after.most, after.positions, after.seen, pads)
    with cache.forwards.changing("removal of masked tokens"):
        for group, packed, (plan, coded) in work:
            group[0].kernels.apply(packed, plan, coded)
            packed.hand_back([tokens.packed for tokens in group])
        for tokens in held:
            tokens.window, tokens.fill = tokens.window.keep(slots), after
        cache.forwards.renew()
    return True


def _plan(
    group: list[LayerTokens], packed: PackedRows, shown: Tensor, left: Tensor
) -> tuple[Compaction, object] | None:
    """What removes hidden tokens from the rows of layers that are alike; None where other rows share their pages."""
    first, heads = group[0], group[0].window.heads
    rows = torch.arange(left.numel(), device=left.device).repeat_interleave(heads).repeat(len(group))
    target, current, scores = [], [], []
    for tier, (filled, parts) in enumerate(first.kernels.stored(packed, first.config.selects)):
        slot = torch.arange(filled.shape[1], device=left.device)
        if first.config.selects:
            gone = filled & ~shown[rows].gather(1, parts["birth"].long())
        else:
            gone = filled & (slot >= packed.table.lengths[:, tier, None] - left[rows][:, None])
        shared = frozen(packed, tier, filled.shape[1])
        if shared is not None and bool((gone & shared).any()):
            return None
        now = torch.where(filled, (HIGH, LOW)[tier], EMPTY)
        current.append(now)
        target.append(torch.where(gone, PRUNED, now))
        scores.append(parts["score"].float() if first.config.selects else filled.float())
    none = first.window.k.new_zeros(packed.rows, 0, first.window.k.shape[3])
    empty = Incoming(
        none, none.new_zeros(packed.rows, 0, first.window.v.shape[3]), scores[0][:, :0], rows[:, None][:, :0],
        current[0][:, :0] != EMPTY,
    )  # fmt: skip
    check = first.kernels.checker(packed, empty)
    plan = packed.plan(torch.cat(target, 1).to(torch.int8), torch.cat(current, 1).to(torch.int8), scores, False, check)
    return plan, first.kernels.code(packed, plan, empty)
