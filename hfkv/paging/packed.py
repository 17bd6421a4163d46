"""The packed tokens of one layer: its work list, and what becomes of whole rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfkv.kernels import compaction
from hfkv.kernels.decode_attention import BLOCK_TOKENS, PageBlock, WorkList
from hfkv.kernels.folding import fold
from hfkv.kernels.quantize_pack import Basis
from hfkv.paging.pool import PagePool
from hfkv.paging.rows import PackedRows
from hfkv.paging.table import PageTable
from hfkv.quant import PageLayout

PADDING = 0.25
"""Pages that rows may repeat to be as long as the longest among them, as a share of all pages of a layer."""


class PackedLayer(PackedRows):
    """All packed tokens of one layer, in pages of a shared pool.

    Args:
        pool: the device's pool.
        layouts: one page layout per tier, best first.
        rows: sequences x KV heads.
        basis: rotations of keys and values; its mean is set when the first tokens are packed.
        shift: subtract the mean of the first packed keys from every key.

    Attributes:
        derived: what kernels have made of the work list for themselves, by name; each has `nbytes`.
    """

    def __init__(self, pool: PagePool, layouts: list[PageLayout], rows: int, basis: Basis, shift: bool) -> None:
        super().__init__(pool, layouts, PageTable(rows, pool.device), basis, shift)
        self._work: WorkList | None = None
        self.derived: dict[str, Any] = {}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_work": None, "derived": {}}

    @property
    def metadata_bytes(self) -> int:
        """Bytes of this layer beside its pages: page table, work list and mean keys."""
        mean = 0 if self.basis.mean is None else self.basis.mean.nbytes
        work = 0 if self._work is None else self._work.nbytes
        work += sum(part.nbytes for part in self.derived.values())
        return self.table.nbytes + mean + work + self.has_mean.nbytes

    def bytes_ahead(self, tokens: int) -> int:
        """Bytes beside pages that the first of `tokens` per row to be packed will add: mean keys, table, work list."""
        if int(self.table.ids.numel()):
            return 0
        mean = 4 * self.rows * self.layouts[0].key.dim if self.shift and self.basis.mean is None else 0
        return mean + 2 * 4 * self.rows * -(-tokens // self.layouts[0].tokens)

    def changed(self) -> None:
        super().changed()
        self._work, self.derived = None, {}

    # ---- reading -------------------------------------------------------------------------------------------------

    def work(self) -> WorkList:
        """The work list of the pages as they are; kept until the next change."""
        if self._work is None:
            self._work = work_list(self)
        return self._work

    # ---- whole rows ------------------------------------------------------------------------------------------------

    def restore(self, table: PageTable) -> None:
        """Return to an earlier table after tokens were only appended: give new pages back, empty the new slots."""
        for tier, (cls, layout) in enumerate(zip(self.classes, self.layouts, strict=True)):
            counts = table.page_counts(tier, layout.tokens)
            now, row, index = self.table.pages(tier, self.page_counts(tier))
            fresh = now[index >= counts[row]]
            ids, row, index = table.pages(tier, counts)
            now = self.table.lookup(tier, row, index)
            left = ids != now  # pages that other rows share, of which a copy was made
            self.pool.share(ids[left])
            self.pool.release(cls, torch.cat([fresh, now[left]]))
            pages = self.pool.gather(cls, ids)
            slot = index[:, None] * layout.tokens + torch.arange(layout.tokens, device=ids.device)
            compaction.clear(layout, pages, slot >= table.lengths[row, tier][:, None])
            self.pool.scatter(cls, ids, pages)
        self.table = table
        self.changed()

    def release(self) -> None:
        """Give all pages back."""
        for tier, cls in enumerate(self.classes):
            self.pool.release(cls, self.table.pages(tier, self.page_counts(tier))[0])
        self.table = PageTable(self.rows, self.pool.device)
        self.changed()


def work_list(packed: PackedRows) -> WorkList:
    """The pages of rows as they are; where they lie is looked up when it is first asked for."""
    held = [packed.page_counts(tier) for tier in range(packed.tiers)]
    slots = tuple(int(counts.max()) * layout.tokens for counts, layout in zip(held, packed.layouts, strict=True))
    folding = fold(packed.layouts, packed.basis.key, packed.basis.value, packed.pool.device)
    lister = _Lister(packed.pool, packed.layouts, packed.classes, packed.table, held, slots)
    return WorkList(lister.blocks, packed.rows, slots, folding, packed.basis.mean)


@dataclass(frozen=True)
class _Lister:
    """Pages of rows by blocks.

    Attributes:
        held: int64 [rows], pages per row, of each tier.
        slots: of each tier, as `WorkList.slots`.
    """

    pool: PagePool
    layouts: list[PageLayout]
    classes: list[int]
    table: PageTable
    held: list[Tensor]
    slots: tuple[int, ...]

    def blocks(self) -> tuple[PageBlock, ...]:
        """Of each tier rows of about as many pages together, cut into blocks of columns."""
        spare = PADDING * sum(int(counts.sum()) for counts in self.held) / len(self.held)
        blocks, first_column = [], 0
        for tier, (layout, counts) in enumerate(zip(self.layouts, self.held, strict=True)):
            for row in _alike(counts, spare):
                rows = torch.arange(counts.numel(), device=counts.device) if row is None else row
                own = counts.index_select(0, rows)
                pages, step = int(own.max()), max(1, BLOCK_TOKENS // (rows.numel() * layout.tokens))
                for first in range(0, pages, step):
                    part = (first, min(first + step, pages))
                    blocks.append(self._block(tier, row, rows, own, part, first_column))
            first_column += self.slots[tier]
        return tuple(blocks)

    def _block(
        self, tier: int, row: Tensor | None, rows: Tensor, counts: Tensor, pages: tuple[int, int], first_column: int
    ) -> PageBlock:
        layout = self.layouts[tier]
        index = torch.arange(*pages, device=rows.device).expand(rows.numel(), -1)
        ids = self.table.lookup(tier, rows[:, None], torch.minimum(index, (counts[:, None] - 1).clamp_min(0)))
        ids = torch.where(counts[:, None] > 0, ids, ids[counts.argmax(), 0])  # a row without pages borrows one
        filled = self.table.lengths[rows, tier] - pages[0] * layout.tokens
        width = (pages[1] - pages[0]) * layout.tokens
        last = torch.arange(min(max(int(filled.min()), 0), width), width, device=rows.device)
        free = last >= filled[:, None, None] if last.numel() else None
        sources = self.pool.sources(self.classes[tier], ids.flatten())
        start = first_column + pages[0] * layout.tokens
        return PageBlock(tier, layout, ids.numel(), row, sources, free, (start, start + width))


def _alike(counts: Tensor, spare: float) -> list[Tensor | None]:
    """Groups of rows with about as many pages, int64 [n] each; [None]: all rows, as `spare` repeated pages allow it."""
    longest, total = int(counts.max()), int(counts.sum())
    if total == 0:
        return []
    if counts.numel() * longest <= total + spare:
        return [None]
    groups: list[Tensor | None] = []
    while longest > 0:
        floor = longest / (1 + PADDING)
        groups.append(((counts <= longest) & (counts >= floor)).nonzero().squeeze(1))
        longest = int(counts[counts < floor].max()) if bool((counts < floor).any()) else 0
    return groups
