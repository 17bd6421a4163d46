"""A compaction as it is planned, and the pages of one tier that it changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.kernels import compaction
from hfkv.kernels.compaction import pages_for
from hfkv.kernels.quantize_pack import Tokens, code_tokens, unpack_tokens
from hfkv.paging.pool import PagePool
from hfkv.paging.table import PageTable, ragged_index
from hfkv.quant import PageLayout

if TYPE_CHECKING:
    from hfkv.paging.sharing import Copies


@dataclass
class Compaction:
    """What one flush will do to its rows, decided and counted before anything changes.

    Attributes:
        stay: per tier, bool [rows, slots] of stored tokens that keep their tier.
        demoted: bool [rows, slots] of high tokens that become low.
        entering: per tier, bool [rows, n] of incoming tokens.
        lengths: int64 [rows, tiers] afterwards.
        scores: per tier, float [rows, slots], new scores of the stored tokens; None: they stay as they are.
        numbers: int64 [n], what the host may want to know, see `PackedRows.count`: the attributes below.
        sharing: shared pages that would change.
        ahead: per layer of the rows: its part of `most_ahead`, the last of the numbers; empty if it was not asked.
        growth: per tier: pages that rows need anew, and give back.
        widest: pages of the longest row afterwards: per tier, then of all tiers together.
        flags: what the check of the incoming tokens found, 0 for nothing.
        copied: per tier, bool [rows, pages]: shared pages of which a row needs a copy, to change it; None: no page is
            shared.
        copies: per tier: how many pages are copied.
    """

    stay: list[Tensor]
    demoted: Tensor | None
    entering: list[Tensor]
    lengths: Tensor
    scores: list[Tensor] | None
    numbers: Tensor
    sharing: Copies
    ahead: list[list[int]] = field(default_factory=list)
    growth: list[list[int]] = field(default_factory=list)
    widest: list[int] = field(default_factory=list)
    flags: int = 0
    copied: list[Tensor] | None = None
    copies: list[int] = field(default_factory=list)

    @property
    def counted(self) -> bool:
        """Whether the host knows the numbers."""
        return bool(self.widest)


class TierEdit:
    """The pages of one tier that a compaction changes, and what becomes of them.

    Attributes:
        row, index: int64 [pages], which page of which row: first those that are there, then those that come.
        pages: uint8 [pages, page_bytes], copies; the others are not touched.
        position: int64 [rows, pages], where in `pages` each page of a row lies; -1: nowhere.
    """

    def __init__(self, pool: PagePool, cls: int, table: PageTable, tier: int, plan: Compaction, counts: Tensor) -> None:
        self.pool, self.table, self.tier = pool, table, tier
        self.layout, self.cls = pool.layout(cls), cls
        self.stay, self.counts = plan.stay[tier], counts
        self.kept = self.stay.sum(1)
        tokens = self.layout.tokens
        self.needed = pages_for(plan.lengths[:, tier], tokens)
        width = max(self.stay.shape[1] // tokens, plan.widest[tier])
        self.position = torch.full((counts.numel(), width), -1, dtype=torch.int64, device=counts.device)
        self.copied = None
        if not self.stay.shape[1]:  # nothing is there yet
            self.row = self.index = self.kept.new_zeros(0)
            self.ids = self.row.int()
            self.pages = torch.zeros(0, self.layout.page_bytes, dtype=torch.uint8, device=counts.device)
            return
        before = table.lengths[:, tier].long()
        touched = compaction.touched_pages(self.stay, before, plan.lengths[:, tier], tokens)
        self.row, self.index = touched.nonzero(as_tuple=True)
        self.ids = self.table.lookup(tier, self.row, self.index)
        if plan.copied is not None:
            self.copied = plan.copied[tier][self.row, self.index]
        self.pages = self.pool.gather(self.cls, self.ids)
        self.position[self.row, self.index] = torch.arange(self.row.numel(), device=self.ids.device)

    def flat(self, row: Tensor, slot: Tensor) -> Tensor:
        """Slots of rows -> flat slots of `pages`."""
        tokens = self.layout.tokens
        return self.position[row, slot // tokens] * tokens + slot % tokens

    def demoted(self, low: PageLayout, demoted: Tensor) -> tuple[Tokens, Tensor]:
        """The demoted tokens in their new code, and how many each row has.

        The low tier could code them when they came (`check_codable`); what the high tier's rounding adds saturates.
        """
        tokens = compaction.take(self.layout, self.pages, self.flat(*demoted.nonzero(as_tuple=True)))
        keys, values = unpack_tokens(self.layout, tokens)
        return code_tokens(low, keys, values, tokens["score"].float(), tokens["birth"], saturate=True), demoted.sum(1)

    def close_holes(self) -> None:
        """Fill holes from the tail, and leave free slots without metadata."""
        if not self.row.numel():
            return
        row, source, target = compaction.hole_moves(self.stay)
        if row.numel():
            moved = compaction.take(self.layout, self.pages, self.flat(row, source))
            compaction.put(self.layout, self.pages, self.flat(row, target), moved)
        slot = torch.arange(self.layout.tokens, device=self.row.device)
        free = self.index[:, None] * self.layout.tokens + slot >= self.kept[self.row][:, None]
        compaction.clear(self.layout, self.pages, free)

    def exchange(self, table: PageTable) -> None:
        """Give back the pages that rows no longer need and take those that they need anew, into `table`.

        A row that changes a shared page puts what it has made of it into a page of its own.
        """
        stays = self.index < self.needed[self.row]
        self.pool.release(self.cls, self.ids[~stays])
        if self.copied is not None:
            self.pool.release(self.cls, self.ids[self.copied])
            own = self.pool.allocate(self.cls, self.copied.long().sum()[None])
            self.ids[self.copied] = own
            table.write(self.tier, self.row[self.copied], self.index[self.copied], own)
        demand = (self.needed - self.counts).clamp_min(0)
        row, index = ragged_index(demand)
        index = index + self.counts[row]
        ids = self.pool.allocate(self.cls, demand)
        self.position[row, index] = torch.arange(row.numel(), device=row.device) + self.row.numel()
        self.pages = torch.cat([self.pages, self.pages.new_zeros(row.numel(), self.layout.page_bytes)])
        self.ids, self.held = torch.cat([self.ids, ids]), torch.cat([stays, torch.ones_like(row, dtype=torch.bool)])
        table.write(self.tier, row, index, ids)

    def append(self, arriving: list[tuple[Tokens, Tensor]]) -> None:
        """Put tokens, row by row and so many of each row, behind what the rows have kept."""
        end = self.kept
        for tokens, count in arriving:
            row, rank = ragged_index(count)
            compaction.put(self.layout, self.pages, self.flat(row, end[row] + rank), tokens)
            end = end + count

    def write(self) -> None:
        """Put the pages that rows still have back to where they lie."""
        if bool(self.held.all()):
            self.pool.scatter(self.cls, self.ids, self.pages)
        else:
            self.pool.scatter(self.cls, self.ids[self.held], self.pages[self.held])
