"""Pages with several owners: how many rows share each page, who needs one of its own, which page nobody owns any more.

Rows share pages once sequences are reordered, repeated or selected. A shared page is immutable: its tokens keep their
tier and their score. A row that appends to one takes a copy first; of those that share a page, the last may keep it.

Only the last page of a tier is ever appended to, so rows that share a page share all pages before it too: the shared
pages of a row are the first of each tier, its holes and what it gives back lie behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLOT_BITS = 10
"""A page id is `chunk << SLOT_BITS | slot`."""


class Owners:
    """Owners of every page of a pool beyond its first one.

    Attributes:
        extra: int32 [chunks, slots], 0 for a page that is free or has one owner.
    """

    def __init__(self, chunks: int, slots: int, device: torch.device) -> None:
        self.extra = torch.zeros(chunks, slots, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.extra.nbytes

    def fit(self, chunks: int, slots: int) -> None:
        """Make room for more chunks, and for more pages in each."""
        more = (0, slots - self.extra.shape[1], 0, chunks - self.extra.shape[0])
        if any(more):
            self.extra = torch.nn.functional.pad(self.extra, more)

    def shared(self, ids: Tensor) -> Tensor:
        """Which pages have more than one owner: ids int32 [...] -> bool [...]."""
        return self.extra.view(-1)[self._place(ids)] > 0

    def join(self, ids: Tensor) -> None:
        """Every mention of a page in ids int32 [n] is one owner more."""
        self.extra.view(-1).index_add_(0, self._place(ids), torch.ones_like(ids))

    def leave(self, ids: Tensor) -> Tensor:
        """Every mention of a page in ids int32 [n] is one owner less -> ids of the pages that have none left."""
        extra, place = self.extra.view(-1), self._place(ids)
        extra.index_add_(0, place, -torch.ones_like(ids))
        ownerless = ids[extra[place] < 0].unique()
        extra.index_fill_(0, self._place(ownerless), 0)
        return ownerless

    def move(self, old: Tensor, new: Tensor) -> None:
        """Pages `old` lie at `new` from now on, which nobody owned; ids int32 [n] each."""
        extra = self.extra.view(-1)
        extra[self._place(new)] = extra[self._place(old)]
        extra.index_fill_(0, self._place(old), 0)

    def need_copy(self, ids: Tensor, changed: Tensor) -> Tensor:
        """Which owners that are to change a page need a copy of it.

        All do while the page is shared, save the first of them where nobody else is left with it.

        Args:
            ids: int32 [rows, pages], the rows' pages; changed: bool [rows, pages], those that are to be changed.

        Returns:
            bool [rows, pages].
        """
        extra, place, changing = self.extra.view(-1), self._place(ids).flatten(), changed.flatten()
        owners = torch.zeros_like(extra).index_add_(0, place, changing.int())
        number = torch.arange(place.numel(), dtype=torch.int32, device=ids.device)
        ranked = torch.where(changing, number, place.numel())
        first = torch.full_like(extra, place.numel()).scatter_reduce_(0, place, ranked, "amin")
        kept = (owners > extra)[place] & (first[place] == number)
        return (changing & (extra[place] > 0) & ~kept).view(changed.shape)

    def _place(self, ids: Tensor) -> Tensor:
        ids = ids.long()
        return (ids >> SLOT_BITS) * self.extra.shape[1] + (ids & ((1 << SLOT_BITS) - 1))
