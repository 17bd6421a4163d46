"""A layer's pages by their addresses, as compiled loops read them: one tensor over all memory that they lie in."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hfkv.kernels.loops import BYTES, TierPages, fits
from hfkv.paging.packed import PackedLayer
from hfkv.paging.pool import WORD
from hfkv.quant import PageLayout

MOST_PADDING = 3.0
"""Pages that loops may read per page that there is: every head counts as many as the longest of its layer."""


def loop_pages(packed: PackedLayer) -> list[TierPages] | None:
    """All pages of a layer on the CPU, per tier; None where they are not for loops. The pool keeps their memory."""
    if not all(fits(layout) for layout in packed.layouts):
        return None
    tiers = [_tier_pages(packed, tier) for tier in range(packed.tiers)]
    held = sum(int((used > 0).sum()) for _, _, used in tiers)
    read = sum(which.numel() for _, which, _ in tiers)
    return tiers if read <= MOST_PADDING * held + 16 * packed.rows else None


def _tier_pages(packed: PackedLayer, tier: int) -> TierPages:
    layout = packed.layouts[tier]
    counts = packed.page_counts(tier)
    ids, row, index = packed.table.pages(tier, counts)
    which = torch.zeros(packed.rows, max(2, int(counts.max())), dtype=torch.int64)
    used = torch.zeros_like(which, dtype=torch.int32)
    if not ids.numel():
        return no_pages(layout), which, used
    addresses = packed.pool.page_addresses(packed.classes[tier], ids)
    base = int(addresses.min())
    which[row, index] = (addresses - base) // WORD
    used[row, index] = (packed.table.lengths[row, tier] - index * layout.tokens).clamp(max=layout.tokens).int()
    return _memory(base, int(addresses.max()) - base + layout.page_bytes, layout), which, used


def _memory(base: int, size: int, layout: PageLayout) -> Tensor:
    """`size` bytes from an address on as pages, each WORD bytes behind the one before; those between are never read."""
    return _overlapping(torch.frombuffer((ctypes.c_uint8 * size).from_address(base), dtype=torch.int32), layout)


def no_pages(layout: PageLayout, count: int = 2) -> Tensor:
    """Pages of zeros, int32 [count, page_bytes / 4], each WORD bytes behind the one before."""
    return _overlapping(torch.zeros((WORD * (count - 1) + layout.page_bytes) // BYTES, dtype=torch.int32), layout)


def _overlapping(memory: Tensor, layout: PageLayout) -> Tensor:
    """Every page that could begin WORD bytes behind another in memory int32 [n]: a view [any, page_bytes / 4]."""
    words, step = layout.page_bytes // BYTES, WORD // BYTES
    return memory.as_strided(((memory.numel() - words) // step + 1, words), (step, 1))
