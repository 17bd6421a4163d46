"""What the next flush takes at most, worked out at this one, so that nobody has to wait for the device then.

Between two flushes no page changes. So the device can tell behind each flush what the next will need in the worst case,
and the numbers travel to the host meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfkv.kernels.compaction import pages_for
from hfkv.paging.compaction import Compaction
from hfkv.paging.rows import PackedRows


def most_ahead(lengths: Tensor, tokens: int, entering: int, layers: int, heads: int) -> Tensor:
    """What a compaction takes of every layer at most: int64 [layers, tiers + 1].

    Pages that tier 0, and tier 1, need anew; and pages of the longest row afterwards.

    Args:
        lengths: int64 [layers * sequences * heads, tiers], tokens before.
        tokens: per page.
        entering: tokens that enter a row at most. Of those of a layer and sequence no more become low, all rows
            together, than enter it.
    """
    held = lengths.view(layers, -1, lengths.shape[1])
    most = [(pages_for(held[..., 0] + entering, tokens) - pages_for(held[..., 0], tokens)).sum(1)]
    if lengths.shape[1] == 1:
        return torch.stack([*most, pages_for(held[..., 0] + entering, tokens).amax(1)], 1)
    # A row takes its first page for one token more than its last page has room for, every other one for a whole page.
    first = (-held[..., 1] % tokens + 1).view(layers, -1, heads).sort(2).values.cumsum(2)
    begun = (first <= entering * heads).sum(2)
    spare = entering * heads - first[..., -1]
    most.append((begun + spare.clamp_min(0) // tokens).sum(1))
    # Of n tokens in two tiers p pages are at most (n + 2 (tokens - 1)) / tokens.
    return torch.stack([*most, ((held.sum(2) + entering + 2 * (tokens - 1)) // tokens).amax(1)], 1)


def most_pages(parts: Sequence[PackedRows]) -> list[list[int]] | None:
    """Pages per tier that the next flush of layers that are alike takes, in the form of `Compaction.growth`.

    None where nobody knows, or where a page table does not hold the longest row.
    """
    ahead = [part.ahead for part in parts]
    widths = [part.table.ids.shape[1] for part in parts]
    if not all(ahead) or any(own[-1] > width for own, width in zip(ahead, widths, strict=True)):
        return None
    return [[sum(own[tier] for own in ahead), 0] for tier in range(parts[0].tiers)]


def noting(works: list[tuple[PackedRows, Compaction]]) -> Callable[[list[int]], None]:
    """What notes the numbers of compactions, one plan's behind the other's, that were done without them."""
    pool = works[0][0].pool
    parts = [(rows.classes, plan.widest, plan.ahead, plan.numbers.numel()) for rows, plan in works]

    def note(numbers: list[int]) -> None:
        for classes, widest, ahead, count in parts:
            tiers, own, numbers = len(classes), numbers[:count], numbers[count:]
            for tier, cls in enumerate(classes):
                pool.note_exchange(cls, own[tiers + tier], own[tier])
            widest[:] = own[2 * tiers : 3 * tiers + 1]
            pool.uncodable |= own[3 * tiers + 1]
            for number, most in enumerate(reversed(ahead), 1):
                most[:] = own[count - number * (tiers + 1) :][: tiers + 1]

    return note
