"""Pages that are kept packed once they are full: their ids, their packs, and where these lie.

A class of pages whose layout has a `pack` is sealed: its ids are handles, which page tables hold like any page id.
A handle names a plain page while tokens are missing from it, and four packs afterwards (`rooms`: where they lie). Pages
are read and written as bytes of their layout, so that whatever works on pages works on sealed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hfkv.kernels import sealing
from hfkv.kernels.sealing import PACKS, meta_words, pack_words
from hfkv.packing import HEAD, WORD
from hfkv.paging.pool import SLOT_BITS, OutOfPages
from hfkv.paging.rooms import DEAD, HANDLES, NO_MEMORY, NOTHING, PackPage, RoomPool, Sealed, room_bytes
from hfkv.quant import PageLayout


class SealedRows:
    """Pages by handle, read like the rows of an arena; they are looked up when they are read."""

    def __init__(self, pool: SealingPool, cls: int) -> None:
        self.pool, self.cls = pool, cls

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Pages of the handles `index`, int64 [n, page_bytes / 8]."""
        return self.pool.gather(self.cls, index).view(torch.int64)


class SealingPool(RoomPool):
    """A pool whose classes with a `pack` are sealed; such a class has a negative index.

    Attributes:
        sealer: what packs pages, `hfkv.kernels.sealing.seal` or the kernel of the same meaning.
    """

    def __init__(self, device: torch.device | str, max_bytes: int | None = None) -> None:
        super().__init__(device, max_bytes)
        self.sealer = sealing.seal
        self._first_number = torch.zeros(0, dtype=torch.int64, device=self.device)  # [chunks], of those of handles

    # ---- sizes -----------------------------------------------------------------------------------------------------

    @property
    def table_bytes(self) -> int:
        own = sum(sealed.address.nbytes for sealed in self._sealed) + self._first_number.nbytes
        return super().table_bytes + own

    @property
    def used_bytes(self) -> int:
        """Bytes of plain pages in use and of live packs."""
        rooms = sum(len(sealed.end) * room_bytes(sealed.layout) for sealed in self._sealed)
        return super().used_bytes - rooms + WORD * sum(sum(sealed.live.values()) for sealed in self._sealed)

    @property
    def slack_bytes(self) -> int:
        """Bytes of pages of packs that hold no live pack."""
        rooms = sum(len(sealed.end) * room_bytes(sealed.layout) for sealed in self._sealed)
        return rooms - WORD * sum(sum(sealed.live.values()) for sealed in self._sealed)

    def addresses(self, cls: int) -> Tensor:
        """Where pages lie, int64 [handles, 4]: see `NOTHING`."""
        return self._sealed[~cls].address

    def sealed_bytes(self, cls: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes int64 [n] that pages take as they are held, and of these those of pack heads, minima and widths."""
        sealed = self._sealed[~cls]
        address, layout = sealed.address[self.numbers(ids)], sealed.layout
        packed = address[:, 1] != NOTHING
        total = torch.where(packed, 0, layout.page_bytes)
        header = torch.zeros_like(total)
        packs = self._read_words(sealed, address[packed].flatten(), 1)
        _, key_raw, _, value_raw = sealing.heads(packs)
        form = sealing.pack_format(layout)
        own = HEAD + (~key_raw) * form.key.header + (~value_raw) * form.value.header
        total[packed] = sealing.words_of(layout, packs).view(-1, PACKS).sum(1) * WORD
        header[packed] = own.view(-1, PACKS).sum(1)
        return total, header

    # ---- classes ---------------------------------------------------------------------------------------------------

    def layout(self, cls: int) -> PageLayout:
        return self._sealed[~cls].layout if cls < 0 else super().layout(cls)

    def class_of(self, layout: PageLayout) -> int:
        if getattr(layout, "pack", None) is None:
            return super().class_of(layout)
        for index, known in enumerate(self._sealed):
            if known.layout == layout:
                return ~index
        plain = super().class_of(replace(layout, pack=None))
        room = super().class_of(PackPage(room_bytes(layout)))  # type: ignore[arg-type]
        address = torch.full((0, PACKS), NOTHING, dtype=torch.int64, device=self.device)
        self._sealed.append(Sealed(layout, plain, room, address))
        return ~(len(self._sealed) - 1)

    # ---- allocate and release --------------------------------------------------------------------------------------

    def reserve(self, demand: dict[int, int], slack: float = 0.0) -> None:
        """As `PagePool.reserve`; of sealed pages only that `max_bytes` leaves room for them, were they plain."""
        if self.max_bytes is not None:
            self._check_room({cls: n for cls, n in demand.items() if cls < 0 and n > 0})
        self._promised = {cls: n for cls, n in demand.items() if cls >= 0}
        super().reserve(self._promised, slack)

    def _check_room(self, demand: dict[int, int]) -> None:
        if not demand:
            return
        assert self.max_bytes is not None
        needed = 0
        for cls, pages in demand.items():
            sealed = self._sealed[~cls]
            rewritten = int(DEAD / (1 - DEAD) * WORD * sum(sealed.live.values()))
            needed += pages * sealed.layout.page_bytes + rewritten + 2 * room_bytes(sealed.layout)
        available = self.max_bytes - self.used_bytes - self.table_bytes
        if needed > available:
            raise OutOfPages(
                f"{needed:,} bytes may be needed beside the {self.used_bytes:,} used, but max_bytes leaves the page "
                f"pool {self.max_bytes:,}: nothing was changed; raise LeanKVConfig.max_bytes, prune more, or reset() "
                "the cache"
            )

    def allocate(self, cls: int, demand: Tensor) -> Tensor:
        if cls >= 0:
            return super().allocate(cls, demand)
        sealed, total = self._sealed[~cls], int(demand.sum())
        if len(sealed.free) < total:
            self._more_handles(sealed, max(total - len(sealed.free), sealed.address.shape[0] // 4))
        ids = [sealed.free.pop() for _ in range(total)]
        return torch.tensor(ids, dtype=torch.int32, device=self.device)

    def _more_handles(self, sealed: Sealed, count: int) -> None:
        """Handles are numbered like the pages of chunks without memory, so that no page has the same id."""
        chunks, first, held = -(-count // HANDLES), len(self._owner), sealed.address.shape[0]
        self._owner += [NO_MEMORY] * chunks
        for name in ("_used", "_arena_of", "_offset_of", "chunk_addresses"):
            setattr(self, name, torch.nn.functional.pad(getattr(self, name), (0, chunks)))
        more = torch.full((chunks * HANDLES, PACKS), NOTHING, dtype=torch.int64, device=self.device)
        sealed.address = torch.cat([sealed.address, more])
        self._first_number = torch.nn.functional.pad(
            self._first_number, (0, len(self._owner) - len(self._first_number))
        )
        self._first_number[first:] = held + HANDLES * torch.arange(chunks, device=self.device)
        self._fit_owners()
        ids = [(first + i) << SLOT_BITS | slot for i in range(chunks) for slot in range(HANDLES)]
        sealed.free = [*reversed(ids), *sealed.free]

    def _fit_owners(self) -> None:
        if self.owners is not None:
            self.owners.fit(len(self._owner), max(HANDLES, *(c.per_chunk for c in self._classes)))

    def numbers(self, ids: Tensor) -> Tensor:
        """Rows int64 [n] of handles in the addresses of their class."""
        return self._first_number[(ids >> SLOT_BITS).long()] + (ids & ((1 << SLOT_BITS) - 1))

    def release(self, cls: int, ids: Tensor) -> None:
        if cls >= 0:
            super().release(cls, ids)
            return
        if self.owners is not None:
            ids = self.owners.leave(ids)
        if ids.numel():
            sealed = self._sealed[~cls]
            self._forget(sealed, ids)
            sealed.free += ids.tolist()
            self._rewrite(sealed)

    def _forget(self, sealed: Sealed, ids: Tensor) -> None:
        """Give up what handles name: plain pages go back, packs are dead."""
        address = sealed.address[self.numbers(ids)]
        packed = address[:, 1] != NOTHING
        plain = ~packed & (address[:, 0] != NOTHING)
        super().release(sealed.plain, address[plain, 0].int())
        self._bury(sealed, address[packed].flatten())
        sealed.address[self.numbers(ids)] = NOTHING

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def sources(self, cls: int, ids: Tensor) -> tuple:
        return super().sources(cls, ids) if cls >= 0 else ((SealedRows(self, cls), ids, slice(0, ids.numel())),)

    def gather(self, cls: int, ids: Tensor) -> Tensor:
        if cls >= 0:
            return super().gather(cls, ids)
        sealed = self._sealed[~cls]
        address = sealed.address[self.numbers(ids)]
        packed = address[:, 1] != NOTHING
        plain = ~packed & (address[:, 0] != NOTHING)
        out = torch.zeros(ids.numel(), sealed.layout.page_bytes, dtype=torch.uint8, device=self.device)
        if bool(plain.any()):
            out[plain] = super().gather(sealed.plain, address[plain, 0].int())
        if bool(packed.any()):
            packs = self._read_words(sealed, address[packed].flatten(), pack_words(sealed.layout))
            out[packed] = sealing.unseal(sealed.layout, packs.unflatten(0, (-1, PACKS)))
        return out

    def scatter(self, cls: int, ids: Tensor, pages: Tensor) -> None:
        """Write whole pages back. Full ones are sealed, but for those that were plain until now: see `settle`."""
        if cls >= 0:
            super().scatter(cls, ids, pages)
            return
        sealed = self._sealed[~cls]
        address = sealed.address[self.numbers(ids)]
        was_plain = (address[:, 0] != NOTHING) & (address[:, 1] == NOTHING)
        packed = sealing.is_full(sealed.layout, pages) & ~was_plain
        self._seal(sealed, ids[packed], pages[packed])
        loose, loose_pages, known = ids[~packed], pages[~packed], was_plain[~packed]
        self._forget(sealed, loose[~known])
        self._ensure(sealed.plain, int((~known).sum()))
        sealed.address[self.numbers(loose[~known]), 0] = super().allocate(sealed.plain, (~known).long()).long()
        super().scatter(sealed.plain, sealed.address[self.numbers(loose), 0].int(), loose_pages)
        self._rewrite(sealed)

    def settle(self, cls: int, ids: Tensor) -> None:
        """Seal those of the pages that are full and still plain: no one goes back behind a flush."""
        if cls >= 0:
            return
        sealed = self._sealed[~cls]
        address = sealed.address[self.numbers(ids)]
        ids = ids[(address[:, 0] != NOTHING) & (address[:, 1] == NOTHING)].unique()
        pages = self.gather(cls, ids)
        full = sealing.is_full(sealed.layout, pages)
        self._seal(sealed, ids[full], pages[full])

    def read(self, cls: int, ids: Tensor, start: int, stop: int) -> Tensor:
        if cls >= 0:
            return super().read(cls, ids, start, stop)
        sealed = self._sealed[~cls]
        layout, address = sealed.layout, sealed.address[self.numbers(ids)]
        assert start >= layout.meta_start, "only the metadata of sealed pages can be read alone"
        packed = address[:, 1] != NOTHING
        plain = ~packed & (address[:, 0] != NOTHING)
        out = torch.zeros(ids.numel(), stop - start, dtype=torch.uint8, device=self.device)
        if bool(plain.any()):
            out[plain] = super().read(sealed.plain, address[plain, 0].int(), start, stop)
        if bool(packed.any()):
            packs = self._read_words(sealed, address[packed].flatten(), meta_words(layout))
            meta = sealing.unsealed_meta(layout, packs.unflatten(0, (-1, PACKS)))
            out[packed] = meta[:, start - layout.meta_start : stop - layout.meta_start]
        return out

    def write(self, cls: int, ids: Tensor, start: int, data: Tensor) -> None:
        if cls >= 0:
            super().write(cls, ids, start, data)
            return
        sealed = self._sealed[~cls]
        layout, address = sealed.layout, sealed.address[self.numbers(ids)]
        assert start >= layout.meta_start, "only the metadata of sealed pages can be written alone"
        packed = address[:, 1] != NOTHING
        plain = ~packed & (address[:, 0] != NOTHING)
        if bool(plain.any()):
            super().write(sealed.plain, address[plain, 0].int(), start, data[plain])
        if bool(packed.any()):
            where = address[packed].flatten()
            packs = self._read_words(sealed, where, meta_words(layout))
            meta = sealing.unsealed_meta(layout, packs.unflatten(0, (-1, PACKS)))
            meta[:, start - layout.meta_start :][:, : data.shape[1]] = data[packed]
            raw = packs.view(torch.uint8)
            fresh = sealing.sealed_meta(layout, meta).flatten(0, 1)
            raw[:, HEAD : HEAD + fresh.shape[1]] = fresh
            self._write_words(sealed, where, packs, torch.full_like(where, packs.shape[1]))

    # ---- packs -----------------------------------------------------------------------------------------------------

    def dump(self, cls: int, ids: Tensor) -> dict[str, Tensor]:
        """Plain pages as they are, and the packs of the others one behind the other."""
        if cls >= 0:
            return super().dump(cls, ids)
        sealed = self._sealed[~cls]
        address = sealed.address[self.numbers(ids)]
        packed = address[:, 1] != NOTHING
        packs = self._read_words(sealed, address[packed].flatten(), pack_words(sealed.layout))
        inside = torch.arange(packs.shape[1], device=self.device) < sealing.words_of(sealed.layout, packs)[:, None]
        return {"packed": packed, "packs": packs[inside], "pages": self.gather(cls, ids[~packed])}

    def undump(self, cls: int, ids: Tensor, part: Callable[[str], Tensor]) -> None:
        if cls >= 0:
            super().undump(cls, ids, part)
            return
        sealed, packed, packs = self._sealed[~cls], part("packed").bool(), part("packs")
        firsts, most = packs.tolist(), pack_words(sealed.layout)
        starts, at = [], 0
        for _ in range(int(packed.sum()) * PACKS):
            starts.append(at)
            at += sealing.words_from(sealed.layout, firsts[at])
        index = torch.tensor(starts, dtype=torch.long, device=self.device)[:, None]
        index = index + torch.arange(most, device=self.device)
        held = packs[index.clamp_(max=max(packs.numel() - 1, 0))]
        where = self._store(sealed, held, sealing.words_of(sealed.layout, held))
        sealed.address[self.numbers(ids[packed])] = where.view(-1, PACKS)
        self.scatter(cls, ids[~packed], part("pages"))

    def _seal(self, sealed: Sealed, ids: Tensor, pages: Tensor) -> None:
        """Pack full pages and let their handles name the packs."""
        if ids.numel():
            packs, words = self.sealer(sealed.layout, pages)
            where = self._store(sealed, packs.flatten(0, 1), words.flatten())
            self._forget(sealed, ids)
            sealed.address[self.numbers(ids)] = where.view(-1, PACKS)
