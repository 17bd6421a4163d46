"""Rows of packed tokens and their compaction: decided, counted, then done for all rows at once.

A row is one KV head of one sequence of one layer. Layers that are alike are flushed together: their rows are stacked,
and one set of operations serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.compaction import pages_for, unpack_side
from hfkv.kernels.quantize_pack import LARGEST_SCORE, Basis, Tokens, check_codable, code_marks, code_side
from hfkv.paging.compaction import Compaction, TierEdit
from hfkv.paging.pool import PagePool
from hfkv.paging.sharing import Copies, frozen
from hfkv.paging.table import PageTable
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PageLayout

VECTOR_PAGES = 1024
"""Pages that are dequantised at once."""


@dataclass
class Incoming:
    """Exact tokens that leave the window.

    Attributes:
        k, v: [rows, n, D or Dv].
        score: float [rows, n]; birth: int64 [rows, n].
        valid: bool [rows, n], False in what shorter rows do not have.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    birth: Tensor
    valid: Tensor


class PackedRows:
    """Packed tokens of rows that share tiers, shapes and rotations, in pages of a pool.

    Args:
        pool: the device's pool.
        layouts: one page layout per tier, best first.
        table: pages and lengths of the rows.
        basis: rotations of keys and values; its mean is set when the first tokens are packed.
        shift: subtract the mean of the first packed keys from every key.
    """

    def __init__(self, pool: PagePool, layouts: list[PageLayout], table: PageTable, basis: Basis, shift: bool) -> None:
        self.pool = pool
        self.layouts = layouts
        self.classes = [pool.class_of(layout) for layout in layouts]
        self.table = table
        self.basis = basis
        self.shift = shift
        self.has_mean = torch.zeros(self.rows, dtype=torch.bool, device=pool.device)
        self._widest = [0] * (len(layouts) + 1)
        self._ahead: list[int] = []

    def __getstate__(self) -> dict:
        self.pool.catch_up()
        return self.__dict__

    @property
    def widest(self) -> list[int]:
        """At least the pages of the longest row: per tier, then of all tiers together."""
        self.pool.catch_up()
        return self._widest

    @widest.setter
    def widest(self, pages: list[int]) -> None:
        self._widest = pages

    @property
    def ahead(self) -> list[int]:
        """What the next flush takes at most, as `hfkv.paging.bounds.most_ahead` says; empty where nobody knows."""
        self.pool.catch_up()
        return self._ahead

    @ahead.setter
    def ahead(self, most: list[int]) -> None:
        self._ahead = most

    def empty(self, rows: int) -> PackedRows:
        """So many rows of this kind that hold nothing yet."""
        basis = Basis(self.basis.key, self.basis.value, None)
        return PackedRows(self.pool, self.layouts, PageTable(rows, self.pool.device), basis, self.shift)

    @classmethod
    def stacked(cls, parts: Sequence[PackedRows]) -> PackedRows:
        """The rows of several that are alike, one after the other; `hand_back` tells them what has changed."""
        first = parts[0]
        table = PageTable.joined([part.table for part in parts], first.layouts[0].tokens)
        rows = PackedRows(first.pool, first.layouts, table, first.basis, first.shift)
        rows.widest = [max(widths) for widths in zip(*(part.widest for part in parts), strict=True)]
        rows.has_mean = torch.cat([part.has_mean for part in parts])
        means = [part.basis.mean for part in parts]
        known = next((mean for mean in means if mean is not None), None)
        mean = None
        if known is not None:
            mean = torch.cat([torch.zeros_like(known) if mean is None else mean for mean in means])
        rows.basis = Basis(first.basis.key, first.basis.value, mean)
        return rows

    def hand_back(self, parts: Sequence[PackedRows]) -> None:
        """Give those that were `stacked` their rows as they are now; they share memory from then on."""
        tables, has_mean = self.table.split(len(parts)), self.has_mean.chunk(len(parts))
        means = [None] * len(parts) if self.basis.mean is None else self.basis.mean.chunk(len(parts))
        for part, table, has, mean in zip(parts, tables, has_mean, means, strict=True):
            part.table, part.has_mean, part.basis.mean, part.widest = table, has, mean, self.widest
            part.changed()

    def changed(self) -> None:
        """Called whenever pages or table have changed."""
        self._ahead = []

    @property
    def rows(self) -> int:
        return self.table.lengths.shape[0]

    @property
    def tiers(self) -> int:
        return len(self.layouts)

    def page_counts(self, tier: int) -> Tensor:
        return self.table.page_counts(tier, self.layouts[tier].tokens)

    def slots(self, tier: int, names: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-token parts by slot: (filled bool [rows, slots], name -> [rows, slots] with 0 in free slots)."""
        layout, counts = self.layouts[tier], self.page_counts(tier)
        width = int(counts.max()) if self.rows else 0
        parts: dict[str, Tensor] = {}
        if not width:
            none = torch.zeros(self.rows, 0, dtype=torch.bool, device=self.pool.device)
            return none, {name: none.to(layout.dtype_of(name)) for name in names}
        if names:
            ids, row, index = self.table.pages(tier, counts)
            start, stop = (pick(layout.fields[name][end] for name in names) for end, pick in enumerate((min, max)))
            data = self.pool.read(self.classes[tier], ids, start, stop)
            for name in names:
                grid = self._grid(width, row, index, layout.part(data, start, name))
                parts[name] = grid.flatten(1)
        slot = torch.arange(width * layout.tokens, device=self.pool.device)
        return slot < self.table.lengths[:, tier, None], parts

    def vectors(self, side: str, tier: int, width: int) -> Tensor:
        """What is packed in a tier, dequantised: keys (`side="key"`) or values [rows, width, dim], as they came.

        Free slots, up to the `width` slots asked for, hold zeros. Pages are read in blocks.
        """
        layout, counts = self.layouts[tier], self.page_counts(tier)
        ids, row, index = self.table.pages(tier, counts)
        codec, turned = (layout.key, self.basis.key) if side == "key" else (layout.value, self.basis.value)
        mean = self.basis.mean if side == "key" else None
        out = torch.zeros(self.rows, width // layout.tokens, layout.tokens, codec.dim, device=self.pool.device)
        inside = torch.arange(layout.tokens, device=self.pool.device)
        for first in range(0, ids.numel(), VECTOR_PAGES):
            part = slice(first, first + VECTOR_PAGES)
            x = unpack_side(layout, self.pool.gather(self.classes[tier], ids[part]), side)
            if mean is not None:
                x = x + mean[row[part], None]
            x = x if turned is None else x @ turned.T
            filled = index[part, None] * layout.tokens + inside < self.table.lengths[row[part], tier, None]
            out[row[part], index[part]] = x * filled[..., None]
        return out.flatten(1, 2)

    # ---- decide and count --------------------------------------------------------------------------------------------

    def plan(
        self,
        target: Tensor,
        current: Tensor,
        scores: list[Tensor],
        rescored: bool = True,
        check: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> Compaction:
        """A compaction, drafted and counted; see `draft`."""
        plan = self.draft(target, current, scores, rescored, check)
        return self.count(plan, plan.numbers.tolist())

    def draft(
        self,
        target: Tensor,
        current: Tensor,
        scores: list[Tensor],
        rescored: bool = True,
        check: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> Compaction:
        """Turn a policy's answer into a compaction, without a look at the device; tokens of shared pages stay put.

        Args:
            target: int8 [rows, stored slots of tier 0, of tier 1, incoming], the tier every token shall have.
            current: same shape; EMPTY marks slots without a token.
            scores: scores of the stored tokens, per tier [rows, slots]; those of shared pages as they are stored.
            rescored: whether the scores differ from those stored.
            check: looks at the tokens that enter each tier, bool [rows, n], and returns flags int32 [1] of what cannot
                be coded; they come to the host together with the page counts.

        Returns:
            A compaction whose numbers the host does not know yet: `count` takes them in.
        """
        widths = [s.shape[1] for s in scores]
        widths.append(target.shape[1] - sum(widths))
        wanted, now = list(target.split(widths, 1)), current.split(widths, 1)
        for tier in range(self.tiers):
            shared = frozen(self, tier, widths[tier])
            if shared is not None:
                wanted[tier] = torch.where(shared, now[tier], wanted[tier])
        stay = [(now[t] != EMPTY) & (wanted[t] == (HIGH, LOW)[t]) for t in range(self.tiers)]
        demoted = (now[0] != EMPTY) & (wanted[0] == LOW) if self.tiers == 2 else None
        entering = [(now[-1] == NEW) & (wanted[-1] == (HIGH, LOW)[t]) for t in range(self.tiers)]
        lengths = torch.stack([s.sum(1) + e.sum(1) for s, e in zip(stay, entering, strict=True)], 1)
        if demoted is not None:
            lengths[:, 1] += demoted.sum(1)
        needed = pages_for(lengths, self.layouts[0].tokens)  # [rows, tiers]
        change = needed - torch.stack([self.page_counts(tier) for tier in range(self.tiers)], 1)
        copies = Copies.of(self, stay, lengths, needed)
        flags = lengths.new_zeros(1) if check is None else check(entering).long()
        numbers = (
            change.clamp_min(0).sum(0),
            (-change).clamp_min(0).sum(0),
            needed.amax(0),
            needed.sum(1).amax()[None],
            flags,
            *copies.numbers,
        )
        new_scores = scores if rescored else None
        return Compaction(stay, demoted, entering, lengths, new_scores, torch.cat(numbers), copies)

    def count(self, plan: Compaction, numbers: list[int]) -> Compaction:
        """Take in what `plan.numbers` are on the host; returns the plan."""
        tiers = self.tiers
        growth = [numbers[tier : 2 * tiers : tiers] for tier in range(tiers)]
        if len(set(self.classes)) < tiers:  # one free list: there is room in whatever order tiers use it
            growth = [[sum(grown for grown, _ in growth), 0], [0, sum(freed for _, freed in growth)]]
        plan.growth, plan.widest[:] = growth, numbers[2 * tiers : 3 * tiers + 1]
        plan.flags, rest = numbers[3 * tiers + 1], numbers[3 * tiers + 2 :]
        plan.copied, plan.copies = plan.sharing.counted(rest[: len(rest) - len(plan.ahead) * (tiers + 1)])
        for number, most in enumerate(reversed(plan.ahead), 1):
            most[:] = rest[len(rest) - number * (tiers + 1) :][: tiers + 1]
        return plan

    def code_incoming(self, plan: Compaction, incoming: Incoming) -> list[Tokens]:
        """The incoming tokens coded, per tier; nothing is stored yet, so that bad input leaves the cache as it was."""
        self.note_mean(incoming)
        chosen = [_places(entering) for entering in plan.entering]
        coded: list[Tokens] = []
        for layout, places in zip(self.layouts, chosen, strict=True):
            coded.append(code_marks(layout, _picked(incoming.score, places), _picked(incoming.birth, places)))
        for side in ("key", "value"):
            x = self.basis.of_keys(incoming.k) if side == "key" else self.basis.rotate_values(incoming.v)
            for tier, (tokens, places) in enumerate(zip(coded, chosen, strict=True)):
                own = _picked(x, places)
                if tier == 0 and self.tiers == 2:
                    check_codable(self.layouts[1], side, own)
                tokens.update(code_side(self.layouts[tier], side, own))
        return coded

    def note_mean(self, incoming: Incoming, look: bool = True) -> None:
        """Fix the mean key of every row at the first tokens that it packs; `look` whether there are such rows."""
        if not self.shift:
            return
        if self.basis.mean is None:
            self.basis.mean = torch.zeros(self.rows, incoming.k.shape[-1], device=self.pool.device)
        count = incoming.valid.sum(1)  # [rows]
        fresh = ~self.has_mean & (count > 0)
        if look and not bool(fresh.any()):
            return
        total = torch.bmm(incoming.valid.float()[:, None], incoming.k.float()).squeeze(1)  # [rows, D]
        mean = self.basis.rotate_keys(total / count.clamp_min(1)[:, None])
        self.basis.mean = torch.where(fresh[:, None], mean, self.basis.mean)
        self.has_mean = self.has_mean | fresh

    # ---- do ----------------------------------------------------------------------------------------------------------

    def apply(self, plan: Compaction, coded: list[Tokens]) -> None:
        """Do what was planned; the pool must have room for it."""
        counts = [self.page_counts(tier) for tier in range(self.tiers)]
        table = self.table.widened(self.width_for(plan), counts[0])
        arriving = [[(tokens, entering.sum(1))] for tokens, entering in zip(coded, plan.entering, strict=True)]
        for tier in range(self.tiers):
            if plan.scores is not None:
                self.rescore(tier, counts[tier], plan.scores[tier])
            edit = TierEdit(self.pool, self.classes[tier], self.table, tier, plan, counts[tier])
            if tier == 0 and plan.demoted is not None and plan.demoted.shape[1]:
                arriving[1].insert(0, edit.demoted(self.layouts[1], plan.demoted))
            edit.close_holes()
            edit.exchange(table)
            edit.append(arriving[tier])
            edit.write()
        table.lengths[:, : self.tiers] = plan.lengths
        self.exchanged(plan, table)

    def exchanged(self, plan: Compaction, table: PageTable) -> None:
        """Go on with the table that a compaction has made."""
        for layout, copies in zip(self.layouts, plan.copies, strict=False):
            self.pool.copied_bytes += copies * layout.page_bytes
        self.table, self.widest = table, plan.widest
        self.changed()

    def settle(self) -> None:
        """Let the pool keep the pages of packed tiers as they shall be until the next flush."""
        for tier, (cls, layout) in enumerate(zip(self.classes, self.layouts, strict=True)):
            if layout.pack is not None:
                self.pool.settle(cls, self.table.pages(tier, self.page_counts(tier))[0])

    def width_for(self, plan: Compaction) -> int:
        """Columns of the page table afterwards; it grows by doubling."""
        width = self.table.ids.shape[1]
        needed = plan.widest[-1] if plan.counted else 0  # not counted: `table_has_room`
        return width if needed <= width else max(needed, 2 * width)

    def rescore(self, tier: int, counts: Tensor, scores: Tensor) -> None:
        """Write the new scores of stored tokens into their pages."""
        layout = self.layouts[tier]
        ids, row, index = self.table.pages(tier, counts)
        if layout.scored and ids.numel():
            filled = torch.arange(scores.shape[1], device=scores.device) < self.table.lengths[:, tier, None]
            half = torch.where(filled, scores.clamp_max(LARGEST_SCORE), 0.0).half()
            pages = half.unflatten(1, (-1, layout.tokens))[row, index]
            self.pool.write(self.classes[tier], ids, layout.fields["score"][0], pages.view(torch.uint8))

    def _grid(self, width: int, row: Tensor, index: Tensor, part: Tensor) -> Tensor:
        grid = part.new_zeros(self.rows, width, *part.shape[1:])
        grid[row, index] = part
        return grid


def _places(entering: Tensor) -> Tensor | None:
    """Which of all tokens, row by row, are `entering`, bool [rows, n]: int64 [m]; None: all."""
    return None if bool(entering.all()) else entering.flatten().nonzero().squeeze(1)


def _picked(x: Tensor, places: Tensor | None) -> Tensor:
    """Tokens x [rows, n, ...] at `places` [m] -> [m, ...]."""
    x = x.flatten(0, 1)
    return x if places is None else x.index_select(0, places)
