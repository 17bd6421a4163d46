"""A compaction of packed tiers by kernels: pages that it changes are opened, changed, and sealed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfkv.kernels.triton import compaction
from hfkv.kernels.triton.compaction import ranked
from hfkv.kernels.triton.quantize_pack import TierPages, pack_rows
from hfkv.paging.compaction import Compaction, TierEdit
from hfkv.paging.device import entering_slots
from hfkv.paging.pool import SLOT_BITS
from hfkv.paging.rows import Incoming, PackedRows


class OpenedTier(TierEdit):
    """The copies of a tier's pages as kernels find them.

    Kernels look at every page of a row. Those that do not change have no copy: a spare one stands for them, to which
    nothing but zeros is written.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.spare = self.pages.new_zeros(self.layout.page_bytes)

    def chunks(self) -> tuple[list[int], Tensor]:
        """(Addresses of the copies by chunk, the spare page's behind them; page ids int32 [rows, pages] in these)."""
        count = -(-self.pages.shape[0] >> SLOT_BITS)
        first = self.pages.data_ptr()
        addresses = [first + (i << SLOT_BITS) * self.layout.page_bytes for i in range(count)]
        ids = torch.where(self.position < 0, count << SLOT_BITS, self.position).int()
        return [*addresses, self.spare.data_ptr()], ids


def opened_pages(edits: list[OpenedTier]) -> list[TierPages]:
    """The pages of all tiers in one list of chunks; to be asked for anew once an edit has taken further pages."""
    addresses: list[int] = []
    tables = []
    for edit in edits:
        chunks, ids = edit.chunks()
        ids = ids + (len(addresses) << SLOT_BITS)
        tables.append((ids if edit.tier == 0 else ids.flip(1)).contiguous())  # tier 1 counts from the right
        addresses += chunks
    where = torch.tensor(addresses, dtype=torch.int64, device=edits[0].pages.device)
    return [TierPages(ids, where, edit.layout, edit.tier) for ids, edit in zip(tables, edits, strict=True)]


def apply_opened(rows: PackedRows, plan: Compaction, incoming: Incoming) -> None:
    """Do what was planned; the pool must have room for it, and `check_incoming` must have found nothing."""
    tiers = range(rows.tiers)
    counts = [rows.page_counts(tier) for tier in tiers]
    table = rows.table.widened(rows.width_for(plan), counts[0])
    if plan.scores is not None:
        for tier in tiers:
            rows.rescore(tier, counts[tier], plan.scores[tier])
    edits = [OpenedTier(rows.pool, rows.classes[t], rows.table, t, plan, counts[t]) for t in tiers]
    flags = torch.zeros(1, dtype=torch.int32, device=rows.pool.device)

    def settle(tier: int) -> None:
        edit, pages = edits[tier], opened_pages(edits)[tier]
        compaction.move_tokens(pages, compaction.hole_sources(edit.stay))
        compaction.clear_slots(pages, edit.kept, counts[tier], edit.needed, edit.stay.shape[1] // edit.layout.tokens)

    if rows.tiers == 2:
        settle(1)
    for edit in reversed(edits):
        edit.exchange(table)
    new = opened_pages(edits)
    if plan.demoted is not None and plan.demoted.shape[1]:
        compaction.recode_tokens(new[0], new[1], ranked(plan.demoted, edits[1].kept), flags)
    settle(0)
    new = opened_pages(edits)
    for tier, edit in enumerate(edits):
        tokens = (incoming.k, incoming.v, incoming.score, incoming.birth)
        pack_rows(new[tier], rows.basis, *tokens, entering_slots(plan, tier), flags)
        edit.write()
    table.lengths[:, : rows.tiers] = plan.lengths
    rows.exchanged(plan, table)
