"""Two-ended page tables: the pages of every head, high tier from the left, low tier from the right."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.kernels.compaction import pages_for


class PageTable:
    """Page ids and token counts of all heads of a layer; a row is one KV head of one sequence.

    Attributes:
        ids: int32 [rows, width]; tier 0 fills a row from the left, tier 1 from the right.
        lengths: int32 [rows, 2], tokens per tier.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, 0, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, 2, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.lengths.nbytes

    def clone(self) -> PageTable:
        """The table as it is now, of its own memory."""
        return PageTable.of(self.ids.clone(), self.lengths.clone())

    @classmethod
    def of(cls, ids: Tensor, lengths: Tensor) -> PageTable:
        """A table of these very tensors."""
        table = cls.__new__(cls)
        table.ids, table.lengths = ids, lengths
        return table

    @classmethod
    def joined(cls, tables: list[PageTable], page_tokens: int) -> PageTable:
        """The rows of several tables, one after the other, as wide as the widest."""
        width = max(table.ids.shape[1] for table in tables)
        parts = [t if t.ids.shape[1] == width else t.widened(width, t.page_counts(0, page_tokens)) for t in tables]
        return cls.of(torch.cat([t.ids for t in parts]), torch.cat([t.lengths for t in parts]))

    def split(self, parts: int) -> list[PageTable]:
        """The rows cut into so many tables, which share this one's memory."""
        return [PageTable.of(*pair) for pair in zip(self.ids.chunk(parts), self.lengths.chunk(parts), strict=True)]

    def page_counts(self, tier: int, page_tokens: int) -> Tensor:
        """Pages per row, int64 [rows]."""
        return pages_for(self.lengths[:, tier].long(), page_tokens)

    def pages(self, tier: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first `counts[row]` pages of a tier, row by row: (ids int32, row int64, index inside the row int64)."""
        row, index = ragged_index(counts)
        return self.lookup(tier, row, index), row, index

    def lookup(self, tier: int, row: Tensor, index: Tensor) -> Tensor:
        """Page ids at (row, index), broadcast together."""
        return self.ids[row, self._column(tier, index)]

    def write(self, tier: int, row: Tensor, index: Tensor, ids: Tensor) -> None:
        """Enter page ids at (row, index)."""
        self.ids[row, self._column(tier, index)] = ids

    def widened(self, width: int, counts: Tensor) -> PageTable:
        """A copy with at least `width` columns; `counts` int64 [rows]: pages of tier 0; the others move right."""
        old = self.ids.shape[1]
        if width <= old:
            return self.clone()
        if not old:
            return PageTable.of(self.ids.new_zeros(self.ids.shape[0], width), self.lengths.clone())
        column = torch.arange(width, device=self.ids.device)
        source = torch.where(column < counts[:, None], column, column - (width - old)).clamp(0, old - 1)
        return PageTable.of(self.ids.gather(1, source), self.lengths.clone())

    def _column(self, tier: int, index: Tensor) -> Tensor:
        return index if tier == 0 else self.ids.shape[1] - 1 - index


def ragged_index(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Enumerate `counts[row]` items of every row: (row int64 [sum], index inside the row int64 [sum])."""
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    start = counts.cumsum(0) - counts
    return row, torch.arange(row.numel(), device=counts.device) - start.index_select(0, row)
