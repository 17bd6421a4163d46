"""What must hold of pages that rows share, and rows that copy instead."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.paging.packed import PackedLayer
from hfkv.paging.pool import SLOT_BITS, PagePool
from hfkv.paging.rows import PackedRows
from hfkv.paging.table import PageTable, ragged_index


def check_owners(pool: PagePool, layers: list[PackedLayer]) -> None:
    """Owners are the table entries that name a page; none is lost; shared pages come first in a row."""
    used = torch.zeros_like(pool._used)
    for cls, page_class in enumerate(pool._classes):
        named = [torch.zeros(0, dtype=torch.int32)]
        for layer in layers:
            for tier in range(layer.tiers):
                if layer.classes[tier] == cls:
                    ids, row, _ = layer.table.pages(tier, layer.page_counts(tier))
                    named.append(ids)
                    if pool.owners is not None:
                        shared = pool.owners.shared(ids)
                        for own in range(layer.rows):
                            assert shared[row == own].tolist() == sorted(shared[row == own].tolist(), reverse=True)
        pages, mentions = torch.cat(named).unique(return_counts=True)
        free = pool._free_ids(page_class)
        assert torch.cat([pages, free]).unique().numel() == pages.numel() + free.numel() == page_class.pages
        assert free.numel() == page_class.free == int(page_class.pointers[1] - page_class.pointers[0])
        assert (pool.gather(cls, free)[:, page_class.layout.zero_start :] == 0).all()
        used.index_add_(0, pages >> SLOT_BITS, torch.ones_like(pages))
        if pool.owners is None:
            assert (mentions == 1).all()
        else:
            extra = pool.owners.extra[(pages >> SLOT_BITS).long(), (pages & ((1 << SLOT_BITS) - 1)).long()]
            assert torch.equal(extra.long() + 1, mentions)
    assert torch.equal(used, pool._used)
    if pool.owners is not None:
        entries = sum(int(layer.page_counts(tier).sum()) for layer in layers for tier in range(layer.tiers))
        assert int(pool.owners.extra.sum()) + int(used.sum()) == entries


def copy_rows(rows: PackedRows, index: Tensor) -> None:
    """What `select_rows` means, by copying pages."""
    fresh = PageTable.of(rows.table.ids[index], rows.table.lengths[index])
    copies = []
    for tier, cls in enumerate(rows.classes):
        counts = fresh.page_counts(tier, rows.layouts[tier].tokens)
        copies.append((counts, rows.pool.gather(cls, fresh.pages(tier, counts)[0])))
        rows.pool.release(cls, rows.table.pages(tier, rows.page_counts(tier))[0])
    for tier, (cls, (counts, pages)) in enumerate(zip(rows.classes, copies, strict=True)):
        rows.pool.reserve({cls: int(counts.sum())})
        ids = rows.pool.allocate(cls, counts)
        rows.pool.scatter(cls, ids, pages)
        fresh.write(tier, *ragged_index(counts), ids)
    rows.table = fresh
    rows.has_mean = rows.has_mean[index]
    if rows.basis.mean is not None:
        rows.basis.mean = rows.basis.mean[index]
    rows.changed()


def contents(rows: PackedRows) -> list[bytes]:
    """The bytes of every row's tokens, tier by tier, slot by slot."""
    held: list[bytes] = []
    for row in range(rows.rows):
        parts = []
        for tier, layout in enumerate(rows.layouts):
            count = int(rows.table.lengths[row, tier])
            ids = rows.table.lookup(tier, torch.tensor(row), torch.arange(int(rows.page_counts(tier)[row])))
            pages = rows.pool.gather(rows.classes[tier], ids)
            for name, (first, last) in layout.fields.items():
                if first < last:
                    part = layout.view(pages, name)
                    part = part.transpose(1, 2) if name == "value" else part
                    parts.append(part.flatten(0, 1)[:count].contiguous().numpy().tobytes())
        held.append(b"|".join(parts))
    return held
