"""What rows do with pages that several of them own: share them, count them once, copy those that they are to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.kernels.compaction import touched_pages
from hfkv.paging.table import PageTable

if TYPE_CHECKING:
    from hfkv.paging.pool import PagePool
    from hfkv.paging.rows import PackedRows


def share_pages(parts: Sequence[PackedRows], index: Tensor) -> None:
    """In each of `parts`, which are alike, make row i share the pages of today's row `index[i]`, int64 [n]."""
    rows = parts[0].stacked(parts)
    first = torch.arange(len(parts), device=index.device)[:, None] * parts[0].rows
    select_rows(rows, (first + index).flatten())
    rows.hand_back(parts)


def select_rows(rows: PackedRows, index: Tensor) -> None:
    """Make row i share the pages of today's row `index[i]`, int64 [n]; no page is copied."""
    old, fresh = rows.table, PageTable.of(rows.table.ids[index], rows.table.lengths[index])
    both = min(index.numel(), rows.rows)
    same = index[:both] == torch.arange(both, device=index.device)  # rows that keep what they have
    for tier, (cls, layout) in enumerate(zip(rows.classes, rows.layouts, strict=True)):
        gained, lost = (table.page_counts(tier, layout.tokens) for table in (fresh, old))
        gained[:both], lost[:both] = gained[:both] * ~same, lost[:both] * ~same
        rows.pool.share(fresh.pages(tier, gained)[0])
        rows.pool.release(cls, old.pages(tier, lost)[0])
    rows.table = fresh
    rows.has_mean = rows.has_mean[index]
    if rows.basis.mean is not None:
        rows.basis.mean = rows.basis.mean[index]
    rows.changed()


def close_up(pool: PagePool, parts: Sequence[PackedRows]) -> None:
    """Move the pages of `parts`, all that there are in the pool, closer together and give back what is empty then."""
    pool.tighten()
    for cls in pool.classes:
        old, new = pool.close_up(cls)
        old, order = old.sort()
        for rows in parts:
            for tier in (tier for tier, own in enumerate(rows.classes) if own == cls and old.numel()):
                ids, row, index = rows.table.pages(tier, rows.page_counts(tier))
                at = torch.searchsorted(old, ids).clamp(max=old.numel() - 1)
                rows.table.write(tier, row, index, torch.where(old[at] == ids, new[order[at]], ids))
    for rows in parts:
        rows.table = PageTable.of(rows.table.ids, rows.table.lengths)  # plans made of the other one are made anew
        rows.changed()
    pool.trim()


def pages_once(rows: PackedRows, tier: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pages of a tier, one that rows share at the first of them: its id, its row, its filled slots, [pages]."""
    tokens = rows.layouts[tier].tokens
    ids, row, index = rows.table.pages(tier, rows.page_counts(tier))
    filled = (rows.table.lengths[row, tier] - index * tokens).clamp(max=tokens)
    if rows.pool.owners is None:
        return ids, row, filled
    _, page = ids.unique(return_inverse=True)
    number = torch.arange(ids.numel(), device=ids.device)
    first = torch.full_like(number, ids.numel()).scatter_reduce_(0, page, number, "amin")[page] == number
    return ids[first], row[first], filled[first]


def frozen(rows: PackedRows, tier: int, slots: int) -> Tensor | None:
    """Which of a tier's slots lie in pages that several rows own: bool [rows, slots]; None: no page has several.

    Their tokens keep their tier and their scores.
    """
    if rows.pool.owners is None:
        return None
    tokens = rows.layouts[tier].tokens
    ids, held = _page_grid(rows, tier, slots // tokens)
    return (rows.pool.owners.shared(ids) & held).repeat_interleave(tokens, 1)


class Copies:
    """Shared pages that a compaction is to change: of each, all its owners but one that is left with it need a copy.

    Attributes:
        pages: per tier, bool [rows, pages], those of which a row needs a copy; None: no page is shared.
        numbers: int64 [1] each, none where no page is shared: copies of every tier, owners of all pages beyond their
            first, shared pages that rows no longer need (there are none: see `owners`).
    """

    def __init__(self, rows: PackedRows) -> None:
        self.pool = rows.pool
        self.pages: list[Tensor] | None = None
        self.numbers: list[Tensor] = []

    @classmethod
    def of(cls, rows: PackedRows, stay: list[Tensor], lengths: Tensor, needed: Tensor) -> Copies:
        """What a compaction copies.

        Args:
            stay: per tier, bool [rows, slots] of tokens that stay.
            lengths, needed: int64 [rows, tiers], tokens and pages afterwards.
        """
        copies, owners = cls(rows), rows.pool.owners
        if owners is None:
            return copies
        copies.pages, useless = [], torch.zeros(1, dtype=torch.long, device=lengths.device)
        for tier, layout in enumerate(rows.layouts):
            before, after = rows.table.lengths[:, tier].long(), lengths[:, tier]
            changed = touched_pages(stay[tier], before, after, layout.tokens)
            ids, held = _page_grid(rows, tier, changed.shape[1])
            stays = torch.arange(changed.shape[1], device=ids.device) < needed[:, tier, None]
            copies.pages.append(owners.need_copy(ids, changed & held & stays))
            useless += (owners.shared(ids) & held & ~stays).sum()
        copies.numbers = [*(pages.sum()[None] for pages in copies.pages), owners.extra.sum()[None], useless]
        return copies

    def counted(self, numbers: list[int]) -> tuple[list[Tensor] | None, list[int]]:
        """What `numbers` are on the host -> `pages`, None where none is copied, and how many are copied per tier."""
        if self.pages is None:
            return None, []
        *copies, shared, useless = numbers
        assert useless == 0, "a compaction gives a shared page back"
        if shared == 0:
            self.pool.owners = None
        return (self.pages if any(copies) else None), copies


def _page_grid(rows: PackedRows, tier: int, pages: int) -> tuple[Tensor, Tensor]:
    """The first pages of every row: (ids int32 [rows, pages], bool [rows, pages], which of them there are)."""
    width = rows.table.ids.shape[1]
    index = torch.arange(pages, device=rows.pool.device)
    held = index < rows.page_counts(tier)[:, None]
    if not width:
        return held.int(), held
    return rows.table.lookup(tier, torch.arange(rows.rows, device=index.device)[:, None], index % width), held
