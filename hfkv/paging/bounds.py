"""What a flush takes at most, known without asking the device; and what it took, once the host is told.

The host knows how many tokens enter a row at most, and from the last flush's numbers how long the longest row is. As
long as pool and page tables have room for that, nobody waits for a flush.
"""

from __future__ import annotations

from collections.abc import Callable

from hfkv.paging.compaction import Compaction
from hfkv.paging.rows import PackedRows


def most_pages(rows: PackedRows, entering: int, heads: int) -> list[list[int]]:
    """Pages per tier that rows need anew at most, in the form of `Compaction.growth`.

    Args:
        entering: tokens that enter a row at most.
        heads: rows of a sequence, of which no more tokens become low, all together, than enter it.
    """
    if not entering:
        return [[0, 0] for _ in rows.layouts]
    tokens = rows.layouts[0].tokens
    high = rows.rows * -(-entering // tokens)
    low = rows.rows // heads * (heads + (entering * heads - heads) // tokens)  # a page begun in every row, and the rest
    return [[high, 0], [low, 0]][: rows.tiers]


def table_has_room(rows: PackedRows, entering: int) -> bool:
    """Whether the longest row stays inside the page table whatever enters."""
    tokens = rows.layouts[0].tokens
    # Of n tokens in two tiers p pages are at least n / tokens and at most (n + 2 (tokens - 1)) / tokens.
    more = -(-entering // tokens) if rows.tiers == 1 else (entering + 2 * (tokens - 1)) // tokens
    return rows.widest[-1] + more <= rows.table.ids.shape[1]


def noting(works: list[tuple[PackedRows, Compaction]]) -> Callable[[list[int]], None]:
    """What notes the numbers of compactions, one plan's behind the other's, that were done without them."""
    pool = works[0][0].pool
    parts = [(rows.classes, plan.widest, plan.numbers.numel()) for rows, plan in works]

    def note(numbers: list[int]) -> None:
        at = 0
        for classes, widest, count in parts:
            tiers, own = len(classes), numbers[at : at + count]
            for tier, cls in enumerate(classes):
                pool.note_exchange(cls, own[tiers + tier], own[tier])
            widest[:] = own[2 * tiers : 3 * tiers + 1]
            pool.uncodable |= own[3 * tiers + 1]
            at += count

    return note
