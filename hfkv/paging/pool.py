"""The page pool: one store of physical memory for all layers, sequences, heads and tiers of a cache on one device.

Memory is taken in arenas, an arena is a row of chunks of one fixed size, a chunk is carved into pages of one class (a
`PageLayout`). Free pages of a class wait in a circular list whose head and tail live on the device; all heads allocate
and release at once, each a slice of the list that a prefix sum of the demands gives it (LeanKV, section 5.2). A chunk
without a used page may be carved anew for another class. A page id is `chunk << SLOT_BITS | slot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfkv.paging.mail import Mail, sent
from hfkv.paging.owners import SLOT_BITS, Owners
from hfkv.quant import PageLayout

WORD = 8
CHUNK_RANGE = (32 << 10, 1 << 20)
MIN_PAGES = 8
CHUNK_GRANULE = 1 << 10
STRETCH = 1.25
"""Pages between the first and the last that are read from an arena together, per page that lies there."""
MOST_CHUNKS = 1 << (31 - SLOT_BITS)
"""Page ids are int32."""
ALIGNMENT = 16
"""Chunks and pages begin at multiples of 16 bytes, which one load of a kernel takes."""


Source = tuple[Tensor, Tensor, slice | Tensor]
"""Page-sized rows of an arena, the row of each page, and the places of these pages among all that are asked for."""


class OutOfPages(RuntimeError):
    """The cache's `max_bytes` does not hold what a step needs. Nothing was changed: the cache stays usable."""


@dataclass
class _PageClass:
    """Free list of one layout: `ring[head % size .. tail % size)` holds the ids of its free pages."""

    layout: PageLayout
    per_chunk: int
    ring: Tensor  # int32 [size]
    pointers: Tensor  # int64 [2]: head, tail
    free: int = 0
    pages: int = 0


@dataclass
class _Arena:
    memory: Tensor  # int64 words [chunks * chunk_words]
    chunks: list[int] = field(default_factory=list)


class PagePool:
    """Pages of several layouts over one growing memory.

    Args:
        device: where the memory lies.
        max_bytes: limit of the pool's memory in bytes, or None.

    Attributes:
        owners: who shares pages; None while every page in use has one owner.
        copied_bytes: bytes of pages copied so far, since a row was to change one that others share.
        uncodable: what mail has said of tokens that kernels have packed and could not code, 0 for nothing.
    """

    def __init__(self, device: torch.device | str, max_bytes: int | None = None) -> None:
        self.device = torch.device(device)
        self.max_bytes = max_bytes
        self.chunk_bytes = 0
        self._classes: list[_PageClass] = []
        self._arenas: dict[int, _Arena] = {}
        self._spare: list[int] = []  # chunks that no class holds
        self._unborn: list[int] = []  # chunk ids of arenas that were given back
        self._owner: list[int] = []  # class of every chunk, -1: none
        self._home: dict[int, tuple[int, int]] = {}  # of every chunk with memory: arena, first word in it
        self._pending: list[tuple[Mail, Callable[[list[int]], None]]] = []
        self._seen_used: list[int] | None = None  # `_used` as the host has just read it
        self._used = torch.zeros(0, dtype=torch.int32, device=self.device)  # [chunks] pages in use
        self._arena_of = torch.zeros(0, dtype=torch.int32, device=self.device)  # [chunks]
        self._offset_of = torch.zeros(0, dtype=torch.int64, device=self.device)  # [chunks] words into the arena
        self.chunk_addresses = torch.zeros(0, dtype=torch.int64, device=self.device)  # [chunks] bytes, for kernels
        self.owners: Owners | None = None
        self.copied_bytes = 0
        self.uncodable = 0

    def __getstate__(self) -> dict:
        self.catch_up()
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        """A copied or unpickled pool lies elsewhere in memory."""
        self.__dict__.update(state)
        for arena in self._arenas.values():
            self._note_addresses(arena)

    def _note_addresses(self, arena: _Arena) -> None:
        index = sent(arena.chunks, self.device)
        self.chunk_addresses[index] = self._offset_of[index] * WORD + arena.memory.data_ptr()

    # ---- sizes ---------------------------------------------------------------------------------------------------

    @property
    def physical_bytes(self) -> int:
        """Every byte held: pages in use, free pages, unused chunks, free lists and chunk tables."""
        return self.memory_bytes + self.table_bytes

    @property
    def memory_bytes(self) -> int:
        return sum(arena.memory.nbytes for arena in self._arenas.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of free lists, chunk tables and owners."""
        lists = sum(c.ring.nbytes + c.pointers.nbytes for c in self._classes)
        lists += 0 if self.owners is None else self.owners.nbytes
        chunks = (self._used, self._arena_of, self._offset_of, self.chunk_addresses)
        return lists + sum(x.nbytes for x in chunks)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use, free slots inside them included."""
        self.catch_up()
        return sum((c.pages - c.free) * c.layout.page_bytes for c in self._classes)

    def layout(self, cls: int) -> PageLayout:
        return self._classes[cls].layout

    def class_of(self, layout: PageLayout) -> int:
        """The class index of a layout, registered at its first use."""
        for index, known in enumerate(self._classes):
            if known.layout == layout:
                return index
        if self.chunk_bytes:
            self._check_fits(layout)
        ring = torch.zeros(0, dtype=torch.int32, device=self.device)
        pointers = torch.zeros(2, dtype=torch.int64, device=self.device)
        per_chunk = min(self.chunk_bytes // layout.page_bytes, 1 << SLOT_BITS) if self.chunk_bytes else 0
        self._classes.append(_PageClass(layout, per_chunk, ring, pointers))
        self._fit_owners()
        return len(self._classes) - 1

    # ---- allocate and release ------------------------------------------------------------------------------------

    def reserve(self, demand: dict[int, int], slack: float = 0.0) -> None:
        """Make sure that `demand[class]` pages of every class can be allocated.

        Takes empty chunks of other classes first, then grows by what is missing, at least by `slack` of its size.

        Raises:
            OutOfPages: `max_bytes` would be passed; nothing has changed.
        """
        if not any(demand.values()):
            return
        self.catch_up()
        if not self.chunk_bytes:
            self._choose_chunk(sum(self.layout(c).page_bytes * n for c, n in demand.items()))
        missing = self._missing(demand)
        chunks = sum(missing.values())
        if chunks > len(self._spare):
            self._reclaim(demand)
        if chunks > len(self._spare):
            self._grow(chunks - len(self._spare), slack)
        for cls, count in missing.items():
            if count:
                self._carve(count, cls)

    def has_room(self, demand: dict[int, int]) -> bool:
        """Whether `reserve` can do without more memory and without asking the device."""
        self.catch_up()
        return bool(self.chunk_bytes) and sum(self._missing(demand).values()) <= len(self._spare)

    def _missing(self, demand: dict[int, int]) -> dict[int, int]:
        """Chunks that each class lacks."""
        return {c: -(-max(0, n - self._classes[c].free) // self._classes[c].per_chunk) for c, n in demand.items()}

    # ---- what the host hears of the device later ---------------------------------------------------------------------

    def expect(self, mail: Mail, note: Callable[[list[int]], None]) -> None:
        """`note` the numbers of a mail as soon as somebody needs them: what kernels have done to pages is in them."""
        self._pending.append((mail, note))

    def catch_up(self) -> None:
        """Take in the mail that is on its way: `free` of the classes is right from then on."""
        while self._pending:
            mail, note = self._pending.pop(0)
            note(mail.read())

    @property
    def used_pages(self) -> Tensor:
        """int64 [chunks], for the host to read together with other numbers; it hands them to `note_used`."""
        return self._used.long()

    def note_used(self, used: list[int] | None) -> None:
        """Used pages of every chunk as the host has read them; None once they may differ."""
        self._seen_used = used

    def allocate(self, cls: int, demand: Tensor) -> Tensor:
        """Take pages for all heads at once: demand int [rows] -> ids int32 [sum], each row's slice after the other's.

        Pages come with zero metadata. `reserve` must have been called for as many.
        """
        self.catch_up()
        page_class = self._classes[cls]
        total = int(demand.sum())
        assert total <= page_class.free, "allocate without reserve"
        if total == 0:
            return torch.zeros(0, dtype=torch.int32, device=self.device)
        index = (page_class.pointers[0] + torch.arange(total, device=self.device)) % page_class.ring.numel()
        ids = page_class.ring[index]
        page_class.pointers[0] += total
        page_class.free -= total
        self._used.index_add_(0, ids >> SLOT_BITS, torch.ones_like(ids))
        return ids

    def release(self, cls: int, ids: Tensor) -> None:
        """One owner less for every page in ids int32 [n]; those without any go back, their metadata becomes zero."""
        if self.owners is not None:
            ids = self.owners.leave(ids)
        page_class, total = self._classes[cls], ids.numel()
        if total == 0:
            return
        self._zero_metadata(cls, ids)
        index = (page_class.pointers[1] + torch.arange(total, device=self.device)) % page_class.ring.numel()
        page_class.ring[index] = ids
        page_class.pointers[1] += total
        page_class.free += total
        self._used.index_add_(0, ids >> SLOT_BITS, -torch.ones_like(ids))

    def share(self, ids: Tensor) -> None:
        """One owner more for every page in use that ids int32 [n] names, as often as it is named."""
        if ids.numel():
            if self.owners is None:
                self.owners = Owners(0, 0, self.device)
                self._fit_owners()
            self.owners.join(ids)

    @property
    def owners_bytes(self) -> int:
        """What it will take to note owners once pages are shared; 0 where they are noted."""
        slots = max((c.per_chunk for c in self._classes), default=0)
        return 0 if self.owners is not None else 4 * len(self._owner) * slots

    def _fit_owners(self) -> None:
        if self.owners is not None:
            self.owners.fit(len(self._owner), max(c.per_chunk for c in self._classes))

    def free_list(self, cls: int) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels exchange pages by: ring int32 [size], pointers int64 [head, tail], used pages int32 [chunks]."""
        page_class = self._classes[cls]
        return page_class.ring, page_class.pointers, self._used

    def note_exchange(self, cls: int, released: int, allocated: int) -> None:
        """Count what kernels do to a free list; `reserve` must have been called for it."""
        self._classes[cls].free += released - allocated
        assert self._classes[cls].free >= 0, "pages taken without reserve"

    def settle(self, cls: int, ids: Tensor) -> None:
        """Called with all pages of a packed tier's rows after a flush; here they stay as they are."""

    @property
    def classes(self) -> range:
        """The classes whose pages lie in the pool's memory."""
        return range(len(self._classes))

    def tighten(self) -> None:
        """Put what packed tiers hold closer together; there is nothing of them here."""

    def trim(self) -> None:
        """Give arenas without a used page back to the device's allocator."""
        self.catch_up()
        self._seen_used = None
        self._reclaim({})
        spare = set(self._spare)
        for number, arena in list(self._arenas.items()):
            if spare.issuperset(arena.chunks):
                del self._arenas[number]
                self._unborn += arena.chunks
                self._spare = [c for c in self._spare if c not in set(arena.chunks)]
                for chunk in arena.chunks:
                    del self._home[chunk]

    def close_up(self, cls: int) -> tuple[Tensor, Tensor]:
        """Move pages of the class into the free ones of as few chunks as hold them, so that `trim` finds empty ones.

        Returns:
            (old, new) ids int32 [n] of the pages that were moved; page tables must follow them.
        """
        self.catch_up()
        page_class, free = self._classes[cls], self._free_ids(self._classes[cls])
        own = [c for number in sorted(self._arenas) for c in self._arenas[number].chunks if self._owner[c] == cls]
        kept = torch.zeros(len(self._owner), dtype=torch.bool, device=self.device)
        kept[own[: -(-(page_class.pages - page_class.free) // max(page_class.per_chunk, 1))]] = True
        slots = torch.arange(page_class.per_chunk, dtype=torch.int32, device=self.device)
        chunks = torch.tensor(own, dtype=torch.int32, device=self.device)
        every = ((chunks[:, None] << SLOT_BITS) | slots).flatten()
        old = every[~kept[(every >> SLOT_BITS).long()] & ~torch.isin(every, free)]
        inside = kept[(free >> SLOT_BITS).long()]
        new, rest = free[inside][: old.numel()], free[inside][old.numel() :]
        self.scatter(cls, new, self.gather(cls, old))
        self._zero_metadata(cls, old)
        if self.owners is not None:
            self.owners.move(old, new)
        self._used.index_add_(0, new >> SLOT_BITS, torch.ones_like(new))
        self._used.index_add_(0, old >> SLOT_BITS, -torch.ones_like(old))
        self._set_free_ids(page_class, torch.cat([rest, free[~inside], old]), page_class.ring.numel())
        return old, new

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def locate(self, cls: int, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Where pages lie: per arena (rows, words, position).

        `rows` is the arena as an int64 view of overlapping page-sized rows, `words` the row of each page, `position`
        the indices into `ids` that lie in that arena.
        """
        layout = self.layout(cls)
        chunk = (ids >> SLOT_BITS).long()
        slot = (ids & ((1 << SLOT_BITS) - 1)).long()
        words = self._offset_of.index_select(0, chunk) + slot * (layout.page_bytes // WORD)
        arena_of = self._arena_of.index_select(0, chunk)
        found = []
        for number in torch.unique(arena_of).tolist():
            position = (arena_of == number).nonzero().squeeze(1)
            rows = self._rows(self._arenas[number].memory, layout)
            found.append((rows, words.index_select(0, position), position))
        return found

    def page_addresses(self, cls: int, ids: Tensor) -> Tensor:
        """Where in memory pages begin: ids int32 [n] -> int64 [n], bytes."""
        slot = (ids & ((1 << SLOT_BITS) - 1)).long()
        return self.chunk_addresses[(ids >> SLOT_BITS).long()] + slot * self.layout(cls).page_bytes

    def sources(self, cls: int, ids: Tensor) -> tuple[Source, ...]:
        """Where pages lie, for reading them again and again: per arena (rows, words int32, places).

        Places are a stretch of the pages, or int64 [n] where they do not lie next to each other. Of two sources with
        the same place the later one has the page: a stretch may run over a few pages of others.
        """
        found = sorted(self.locate(cls, ids), key=lambda source: -source[2].numel())
        covered = torch.zeros(ids.numel(), dtype=torch.bool)
        stretches: list[Source] = []
        others: list[Source] = []
        for rows, words, position in found:
            first, last = int(position[0]), int(position[-1]) + 1
            if last - first > STRETCH * position.numel() or bool(covered[first:last].any()):
                others.append((rows, words.int(), position))
                continue
            every = torch.zeros(last - first, dtype=torch.int32, device=self.device)
            every[position - first] = words.int()
            stretches.append((rows, every, slice(first, last)))
            covered[first:last] = True
        return (*stretches, *others)

    def gather(self, cls: int, ids: Tensor) -> Tensor:
        """Copies of pages: ids int32 [n] -> uint8 [n, page_bytes]."""
        return self.read(cls, ids, 0, self.layout(cls).page_bytes)

    def scatter(self, cls: int, ids: Tensor, pages: Tensor) -> None:
        """Write whole pages uint8 [n, page_bytes] back."""
        self.write(cls, ids, 0, pages)

    def dump(self, cls: int, ids: Tensor) -> dict[str, Tensor]:
        """What pages hold, for a file."""
        return {"pages": self.gather(cls, ids)}

    def undump(self, cls: int, ids: Tensor, part: Callable[[str], Tensor]) -> None:
        """Put what `dump` gave, asked for by name, into fresh pages."""
        self.scatter(cls, ids, part("pages"))

    def read(self, cls: int, ids: Tensor, start: int, stop: int) -> Tensor:
        """Copies of bytes [start, stop) of pages, multiples of 8: ids int32 [n] -> uint8 [n, stop - start]."""
        first, last = start // WORD, stop // WORD
        found = self.locate(cls, ids)
        if len(found) == 1:
            rows, words, _ = found[0]
            return rows[:, first:last].index_select(0, words).view(torch.uint8)
        out = torch.empty(ids.numel(), last - first, dtype=torch.int64, device=self.device)
        for rows, words, position in found:
            out[position] = rows[:, first:last].index_select(0, words)
        return out.view(torch.uint8)

    def write(self, cls: int, ids: Tensor, start: int, data: Tensor) -> None:
        """Write data uint8 [n, bytes] over the pages' bytes from `start` on, both multiples of 8."""
        data, first, found = data.view(torch.int64), start // WORD, self.locate(cls, ids)
        for rows, words, position in found:
            part = data if len(found) == 1 else data[position]
            rows[:, first : first + data.shape[1]].index_copy_(0, words, part)

    def _zero_metadata(self, cls: int, ids: Tensor) -> None:
        start = self.layout(cls).zero_start // WORD
        for rows, words, _ in self.locate(cls, ids):
            meta = rows[:, start:]
            meta.index_fill_(0, words, 0)

    @staticmethod
    def _rows(memory: Tensor, layout: PageLayout) -> Tensor:
        width = layout.page_bytes // WORD
        return memory.as_strided((memory.numel() - width + 1, width), (1, 1))

    # ---- chunks --------------------------------------------------------------------------------------------------

    def chunk_for(self, first_demand: int) -> int:
        """Bytes of a chunk: as they are, or half of the first demand within limits, trimmed to fit the classes best."""
        if self.chunk_bytes:
            return self.chunk_bytes
        pages = [c.layout.page_bytes for c in self._classes]
        low, high = CHUNK_RANGE
        target = min(max(first_demand // 2, low), high)
        if self.max_bytes is not None:
            target = min(target, self.max_bytes // 16)
        target = max(min(target, min(pages) << SLOT_BITS), MIN_PAGES * max(pages))
        candidates = range(target, target + max(target // 2, max(pages)) + 1, CHUNK_GRANULE)
        best = min(candidates, key=lambda size: (round(sum(size % p / size for p in pages), 3), size))
        return best // ALIGNMENT * ALIGNMENT

    def _choose_chunk(self, first_demand: int) -> None:
        self.chunk_bytes = self.chunk_for(first_demand)
        for page_class in self._classes:
            page_class.per_chunk = min(self.chunk_bytes // page_class.layout.page_bytes, 1 << SLOT_BITS)

    def _check_fits(self, layout: PageLayout) -> None:
        if layout.page_bytes > self.chunk_bytes:
            raise ValueError(
                f"a page of {layout.page_bytes} bytes does not fit the pool's chunks of {self.chunk_bytes} bytes"
            )

    def _grow(self, chunks: int, slack: float) -> None:
        room = None
        if self.max_bytes is not None:
            slots = max(c.per_chunk for c in self._classes)
            tables = 24 + (5 if self.owners is None else 9) * slots  # bytes that a chunk adds to lists and tables
            room = (self.max_bytes - self.physical_bytes) // (self.chunk_bytes + tables)
            if room < chunks:
                raise OutOfPages(
                    f"{chunks * self.chunk_bytes:,} bytes are needed beside the {self.physical_bytes:,} held, but "
                    f"max_bytes leaves the page pool {self.max_bytes:,}: nothing was changed; raise "
                    "LeanKVConfig.max_bytes, prune more, or reset() the cache"
                )
        numbers = MOST_CHUNKS - len(self._owner) + len(self._unborn)
        if numbers < chunks:
            raise OutOfPages(
                f"{chunks:,} chunks of {self.chunk_bytes:,} bytes are needed beside the {self.memory_bytes:,} bytes "
                f"held, but page ids of 32 bits number {MOST_CHUNKS:,} chunks: nothing was changed; chunks are as "
                "large as a cache's first prompt asks for, so begin a new cache with its longest one"
            )
        chunks = max(chunks, int(slack * self.memory_bytes / self.chunk_bytes))
        chunks = min(chunks, numbers if room is None else min(numbers, room))
        number = max(self._arenas, default=-1) + 1
        memory = torch.zeros(chunks * self.chunk_bytes // WORD, dtype=torch.int64, device=self.device)
        arena = self._arenas[number] = _Arena(memory)
        fresh = chunks - len(self._unborn)
        if fresh > 0:
            first = len(self._owner)
            self._owner += [-1] * fresh
            self._unborn += range(first, first + fresh)
            pad = (0, fresh)
            self._used = torch.nn.functional.pad(self._used, pad)
            self._arena_of = torch.nn.functional.pad(self._arena_of, pad)
            self._offset_of = torch.nn.functional.pad(self._offset_of, pad)
            self.chunk_addresses = torch.nn.functional.pad(self.chunk_addresses, pad)
        self._fit_owners()  # also if an interruption has kept it from fitting chunks that are known
        arena.chunks = [self._unborn.pop() for _ in range(chunks)]
        words = self.chunk_bytes // WORD
        self._home.update((chunk, (number, i * words)) for i, chunk in enumerate(arena.chunks))
        index = sent(arena.chunks, self.device)
        self._arena_of.index_fill_(0, index, number)  # indexing would bring the number there, and wait
        self._offset_of[index] = torch.arange(chunks, device=self.device) * words
        self._note_addresses(arena)
        self._spare += reversed(arena.chunks)

    def _carve(self, count: int, cls: int) -> None:
        """Give a class the pages of spare chunks; what counts them changes last and at once, if interrupted too."""
        page_class, chunks = self._classes[cls], self._spare[-count:][::-1]
        fresh = count * page_class.per_chunk
        pages = page_class.pages + fresh
        self._ensure_ring(page_class, pages)
        for chunk in chunks:
            number, first = self._home[chunk]
            width = page_class.layout.page_bytes // WORD
            held = self._arenas[number].memory[first : first + page_class.per_chunk * width].view(-1, width)
            held[:, page_class.layout.zero_start // WORD :].zero_()
        slots = torch.arange(page_class.per_chunk, dtype=torch.int32, device=self.device)
        ids = (sent(chunks, self.device, torch.int32)[:, None] << SLOT_BITS | slots).flatten()
        index = (page_class.pointers[1] + torch.arange(fresh, device=self.device)) % page_class.ring.numel()
        page_class.ring[index] = ids
        page_class.pointers[1] += fresh
        page_class.free += fresh
        page_class.pages = pages
        for chunk in chunks:
            self._owner[chunk] = cls
        del self._spare[-count:]

    def _free_ids(self, page_class: _PageClass) -> Tensor:
        if page_class.free == 0:
            return page_class.ring[:0]
        index = (page_class.pointers[0] + torch.arange(page_class.free, device=self.device)) % page_class.ring.numel()
        return page_class.ring[index]

    def _set_free_ids(self, page_class: _PageClass, ids: Tensor, size: int) -> None:
        page_class.ring = torch.zeros(size, dtype=torch.int32, device=self.device)
        page_class.ring[: ids.numel()] = ids
        page_class.pointers = torch.zeros(2, dtype=torch.int64, device=self.device)
        page_class.pointers[1].fill_(ids.numel())
        page_class.free = ids.numel()

    def _ensure_ring(self, page_class: _PageClass, pages: int) -> None:
        if page_class.ring.numel() < pages:
            self._set_free_ids(page_class, self._free_ids(page_class), -(-pages * 9 // 8))

    def _reclaim(self, demand: dict[int, int]) -> None:
        """Make empty chunks spare, save those that the demanded classes are about to use."""
        used = self._used.tolist() if self._seen_used is None else self._seen_used
        for cls, page_class in enumerate(self._classes):
            empty = [c for c, owner in enumerate(self._owner) if owner == cls and used[c] == 0]
            surplus = (page_class.free - demand.get(cls, 0)) // max(page_class.per_chunk, 1)
            empty = empty[: max(0, surplus)]
            if not empty:
                continue
            gone = torch.zeros(len(self._owner), dtype=torch.bool, device=self.device)
            gone.index_fill_(0, sent(empty, self.device), True)
            ids = self._free_ids(page_class)
            pages = page_class.pages - len(empty) * page_class.per_chunk
            order = gone[(ids >> SLOT_BITS).long()].long().argsort(stable=True)  # those that stay first
            self._set_free_ids(
                page_class, ids[order[: page_class.free - len(empty) * page_class.per_chunk]], max(1, pages)
            )
            page_class.pages = pages
            for chunk in empty:
                self._owner[chunk] = -1
            self._spare += empty
