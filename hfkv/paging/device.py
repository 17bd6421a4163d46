"""A compaction by kernels: the steps of `PackedRows.apply`, each one launch over all rows, without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.kernels.compaction import pages_for
from hfkv.kernels.triton import compaction
from hfkv.kernels.triton.compaction import ranked
from hfkv.kernels.triton.quantize_pack import TierPages, pack_rows
from hfkv.paging.compaction import Compaction
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.paging.table import PageTable


def entering_slots(plan: Compaction, tier: int) -> Tensor:
    """Slots int32 [rows, n] of a tier's incoming tokens, behind what stays and what is demoted; -1: none."""
    first = plan.stay[tier].sum(1)
    if tier == 1 and plan.demoted is not None:
        first = first + plan.demoted.sum(1)
    return ranked(plan.entering[tier], first)


def check_incoming(rows: PackedRows, entering: list[Tensor], incoming: Incoming) -> Tensor:
    """Flags int32 [1] of incoming tokens that cannot be coded, found before anything is stored.

    Those that enter the high tier must fit the low one too: they may be demoted.
    """
    rows.note_mean(incoming, look=False)
    flags = torch.zeros(1, dtype=torch.int32, device=rows.pool.device)
    for tier, chosen in enumerate(entering):
        slots = torch.where(chosen if tier == 0 else entering[0] | chosen, 0, -1).int()
        pages = TierPages(rows.table.ids, rows.pool.chunk_addresses, rows.layouts[tier], tier)
        tokens = (incoming.k, incoming.v, incoming.score, incoming.birth)
        pack_rows(pages, rows.basis, *tokens, slots, flags, store=False)
    return flags


def take_copies(rows: PackedRows, plan: Compaction) -> PageTable:
    """The table with copies in the place of shared pages that are to change."""
    if plan.copied is None or rows.pool.owners is None:
        return rows.table
    table, extra = rows.table.clone(), rows.pool.owners.extra
    for tier, (cls, copied) in enumerate(zip(rows.classes, plan.copied, strict=True)):
        if plan.copies[tier]:
            old = TierPages(rows.table.ids, rows.pool.chunk_addresses, rows.layouts[tier], tier)
            compaction.copy_pages(old, table.ids, copied, extra, *rows.pool.free_list(cls))
            rows.pool.note_exchange(cls, 0, plan.copies[tier])
    return table


def apply_on_device(rows: PackedRows, plan: Compaction, incoming: Incoming) -> None:
    """Do what was planned; the pool must have room for it.

    Where the host does not know the plan's numbers, `hfkv.paging.bounds.noting` must note them later.
    """
    pool, tokens, tiers = rows.pool, rows.layouts[0].tokens, range(rows.tiers)
    before = take_copies(rows, plan)
    counts = [rows.page_counts(tier) for tier in tiers]
    needed = [pages_for(plan.lengths[:, tier], tokens) for tier in tiers]
    kept = [stay.sum(1) for stay in plan.stay]
    table = before.widened(rows.width_for(plan), counts[0])
    old = [TierPages(before.ids, pool.chunk_addresses, rows.layouts[tier], tier) for tier in tiers]
    new = [pages._replace(ids=table.ids) for pages in old]
    flags = torch.zeros(1, dtype=torch.int32, device=pool.device)  # nobody asks: see `check_incoming`

    def settle(tier: int) -> None:
        compaction.move_tokens(old[tier], compaction.hole_sources(plan.stay[tier]))
        most = plan.stay[tier].shape[1] // tokens
        compaction.clear_slots(old[tier], kept[tier], counts[tier], needed[tier], most)

    if plan.scores is not None:
        for tier in tiers:
            compaction.write_scores(old[tier], rows.table.lengths, plan.scores[tier])
    if rows.tiers == 2:
        settle(1)
    for tier in reversed(tiers):
        free_list = pool.free_list(rows.classes[tier])
        compaction.exchange_pages(tier, before.ids, table.ids, counts[tier], needed[tier], *free_list)
        if plan.counted:
            pool.note_exchange(rows.classes[tier], plan.growth[tier][1], plan.growth[tier][0])
    if plan.demoted is not None:
        compaction.recode_tokens(old[0], new[1], ranked(plan.demoted, kept[1]), flags)
    settle(0)
    for tier in tiers:
        arriving = (incoming.k, incoming.v, incoming.score, incoming.birth)
        pack_rows(new[tier], rows.basis, *arriving, entering_slots(plan, tier), flags)
    table.lengths[:, : rows.tiers] = plan.lengths
    rows.exchanged(plan, PageTable.of(table.ids, table.lengths))
