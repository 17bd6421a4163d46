"""Where packs lie: one behind the other in large pages of the pool, which all rows and layers share.

Such a page is written anew once a quarter of it is dead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfkv.kernels import sealing
from hfkv.kernels.sealing import pack_words
from hfkv.packing import WORD
from hfkv.paging.pool import SLOT_BITS, PagePool
from hfkv.quant import PageLayout

ROOM = 4
"""Bytes of a page of packs, in plain pages."""

DEAD = 0.25
"""A page of packs is written anew when this share of it is dead."""

NOTHING, OFFSET_BITS = -1, 32
"""An address is page id << 32 | word inside the page; a plain page has its id first and -1 behind."""

GROWTH = 0.03
"""Of its size a pool grows at least by so much, for the packs of a layer come one by one."""

OPEN = 8
"""Pages of packs that are filled at a time: packs of different sizes find a place."""

LOOSE, TOGETHER = 1 / 16, 64
"""Closing up, pages of packs that are empty by this share are written anew, so many of them together."""

HANDLES, NO_MEMORY = 8, -2
"""Handles of a chunk without memory, and what such a chunk is noted as in the place of a class."""


@dataclass(frozen=True)
class PackPage:
    """The layout of a page of packs: nothing but room."""

    page_bytes: int

    @property
    def zero_start(self) -> int:
        """Nothing in an unused page has to be zero."""
        return self.page_bytes


@dataclass
class Sealed:
    """The handles of one layout.

    Attributes:
        layout: what pages are read as.
        plain, room: classes of plain pages and of pages of packs.
        address: int64 [handles, 4], see `NOTHING`.
        free: ids that no page table holds.
        live: words in use by page of packs.
        end: words written by page of packs.
        open: pages that packs still go to.
    """

    layout: PageLayout
    plain: int
    room: int
    address: Tensor
    free: list[int] = field(default_factory=list)
    live: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    open: list[int] = field(default_factory=list)

    @property
    def words(self) -> int:
        """Words of a page of packs."""
        return room_bytes(self.layout) // WORD


def room_bytes(layout: PageLayout) -> int:
    """Bytes of a page of packs, a multiple of 16."""
    return -(-ROOM * layout.page_bytes // 16) * 16


class RoomPool(PagePool):
    """A pool that also keeps packs."""

    def __init__(self, device: torch.device | str, max_bytes: int | None = None) -> None:
        super().__init__(device, max_bytes)
        self._sealed: list[Sealed] = []
        self._promised: dict[int, int] = {}  # what `reserve` was last asked for, by class of plain tiers

    def _store(self, sealed: Sealed, packs: Tensor, words: Tensor) -> Tensor:
        """Put packs int64 [n, most] of so many words one behind the other -> their addresses int64 [n]."""
        where = []
        for size in words.tolist():
            page = self._page_with_room(sealed, size)
            where.append(page << OFFSET_BITS | sealed.end[page])
            sealed.live[page] += size
            sealed.end[page] += size
        address = torch.tensor(where, dtype=torch.int64, device=self.device)
        self._write_words(sealed, address, packs, words)
        return address

    def _page_with_room(self, sealed: Sealed, size: int) -> int:
        """The fullest open page that has so many words left, or a new one."""
        best = max(
            (p for p in sealed.open if sealed.end[p] + size <= sealed.words), key=sealed.end.__getitem__, default=None
        )
        if best is not None:
            return best
        self._ensure(sealed.room, 1)
        page = int(super().allocate(sealed.room, torch.ones(1, dtype=torch.long, device=self.device)))
        sealed.live[page] = sealed.end[page] = 0
        sealed.open.append(page)
        if len(sealed.open) > OPEN:
            sealed.open.remove(max(sealed.open, key=sealed.end.__getitem__))
        return page

    def _ensure(self, cls: int, pages: int) -> None:
        """Have free pages at hand; `reserve` has made sure that `max_bytes` leaves room."""
        limit, self.max_bytes = self.max_bytes, None
        kept = {other: min(n, self._classes[other].free) for other, n in self._promised.items()}
        try:
            super().reserve({**kept, cls: pages + kept.get(cls, 0)}, GROWTH)
        finally:
            self.max_bytes = limit

    def _read_words(self, sealed: Sealed, address: Tensor, count: int) -> Tensor:
        """The first `count` words behind addresses, int64 [n, count]; what is behind a pack does not matter."""
        out = torch.zeros(address.numel(), count, dtype=torch.int64, device=self.device)
        for memory, start, position in self._spots(sealed, address):
            index = start[:, None] + torch.arange(count, device=self.device)
            out[position] = memory[index.clamp_(max=memory.numel() - 1)]
        return out

    def _write_words(self, sealed: Sealed, address: Tensor, packs: Tensor, words: Tensor) -> None:
        """Write the first `words` int64 [n] of each of packs int64 [n, most]."""
        for memory, start, position in self._spots(sealed, address):
            column = torch.arange(packs.shape[1], device=self.device)
            inside = column < words[position, None]
            memory[(start[:, None] + column)[inside]] = packs[position][inside]

    def _spots(self, sealed: Sealed, address: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per arena: its memory, first words int64 [n] of the addresses in it, and which these are."""
        page = address >> OFFSET_BITS
        chunk, slot = page >> SLOT_BITS, page & ((1 << SLOT_BITS) - 1)
        word = self._offset_of[chunk] + slot * sealed.words + (address & ((1 << OFFSET_BITS) - 1))
        arena_of = self._arena_of[chunk]
        found = []
        for number in torch.unique(arena_of).tolist():
            position = (arena_of == number).nonzero().squeeze(1)
            found.append((self._arenas[number].memory, word[position], position))
        return found

    def _bury(self, sealed: Sealed, address: Tensor) -> None:
        """Count packs as dead; a page without a live one goes back at once."""
        words = sealing.words_of(sealed.layout, self._read_words(sealed, address, 1)).tolist()
        empty = []
        for page, size in zip((address >> OFFSET_BITS).tolist(), words, strict=True):
            sealed.live[page] -= size
            if sealed.live[page] == 0:
                empty.append(page)
        self._drop(sealed, empty)

    def _drop(self, sealed: Sealed, pages: list[int]) -> None:
        for page in pages:
            del sealed.live[page], sealed.end[page]
            if page in sealed.open:
                sealed.open.remove(page)
        if pages:
            super().release(sealed.room, torch.tensor(pages, dtype=torch.int32, device=self.device))

    def _rewrite(self, sealed: Sealed) -> None:
        """Write pages of packs anew of which a quarter is dead."""
        stale = [page for page, end in sealed.end.items() if end - sealed.live[page] >= DEAD * sealed.words]
        if not stale:
            return
        handle, place, packs = self._packs_in(sealed, stale)
        sealed.address[handle, place] = self._store(sealed, packs, sealing.words_of(sealed.layout, packs))
        self._drop(sealed, stale)

    def _packs_in(self, sealed: Sealed, pages: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Handles, places in them and packs int64 [n, most] of pages of packs, to which nothing is written any more."""
        sealed.open = [page for page in sealed.open if page not in pages]
        inside = torch.isin(sealed.address >> OFFSET_BITS, torch.tensor(pages, device=self.device))
        handle, place = (inside & (sealed.address[:, 1:2] != NOTHING)).nonzero(as_tuple=True)
        return handle, place, self._read_words(sealed, sealed.address[handle, place], pack_words(sealed.layout))

    # ---- closing up ------------------------------------------------------------------------------------------------

    def tighten(self) -> None:
        """Write the packs of loose pages anew where that spares a page; no memory is taken for it."""
        for sealed in self._sealed:
            loose = [page for page, live in sealed.live.items() if sealed.words - live >= LOOSE * sealed.words]
            if sum(sealed.words - sealed.live[page] for page in loose) < sealed.words:
                continue
            for first in range(0, len(loose), TOGETHER):
                pages = loose[first : first + TOGETHER]
                handle, place, packs = self._packs_in(sealed, pages)
                self._drop(sealed, pages)
                sealed.address[handle, place] = self._store(sealed, packs, sealing.words_of(sealed.layout, packs))

    def close_up(self, cls: int) -> tuple[Tensor, Tensor]:
        """As `PagePool.close_up`, and what handles name follows."""
        old, new = super().close_up(cls)
        moved = dict(zip(old.tolist(), new.tolist(), strict=True))
        for sealed in self._sealed if moved else ():
            packed, inside = sealed.address[:, 1] != NOTHING, (1 << OFFSET_BITS) - 1
            if cls == sealed.plain:
                sealed.address[~packed, 0] = _followed(sealed.address[~packed, 0], old, new)
            if cls == sealed.room:
                where = sealed.address[packed]
                page = _followed(where >> OFFSET_BITS, old, new)
                sealed.address[packed] = page << OFFSET_BITS | (where & inside)
                sealed.live = {moved.get(page, page): words for page, words in sealed.live.items()}
                sealed.end = {moved.get(page, page): words for page, words in sealed.end.items()}
                sealed.open = [moved.get(page, page) for page in sealed.open]
        return old, new


def _followed(ids: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Page ids int64 with those that were moved from `old`, int32 [n], at their `new` ones."""
    old, order = old.long().sort()
    at = torch.searchsorted(old, ids).clamp(max=old.numel() - 1)
    return torch.where(old[at] == ids, new[order[at]].long(), ids)
