"""The packed tokens of one layer: its page table, its bases, and the steps of a compaction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels import compaction
from hfkv.kernels.decode_attention import BLOCK_TOKENS, PageBlock, WorkList
from hfkv.kernels.quantize_pack import Basis, Tokens, code_tokens, pack_tokens, unpack_tokens
from hfkv.paging.pool import PagePool
from hfkv.paging.table import PageTable, ragged_index
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PageLayout

PADDING = 0.25
"""Pages that rows may repeat to be as long as the longest among them, as a share of all pages of a layer."""


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

    def chosen(self, entering: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """k [m, D], v [m, Dv], row, score and birth [m] of the tokens `entering`, bool [rows, n], row by row."""
        rows, n = entering.shape
        if bool(entering.all()):  # all of them, as they lie
            row = torch.arange(rows, device=entering.device).repeat_interleave(n)
            return self.k.flatten(0, 1), self.v.flatten(0, 1), row, self.score.flatten(), self.birth.flatten()
        row, column = entering.nonzero(as_tuple=True)
        return self.k[row, column], self.v[row, column], row, self.score[row, column], self.birth[row, column]


@dataclass
class Compaction:
    """What one flush will do to a layer, decided and counted before anything changes.

    Attributes:
        stay: per tier, bool [rows, slots] of stored tokens that keep their tier.
        demoted: bool [rows, slots] of high tokens that become low.
        entering: per tier, bool [rows, n] of incoming tokens.
        lengths: int64 [rows, tiers] afterwards.
        scores: per tier, float [rows, slots], new scores of the stored tokens.
        growth: int64 [tiers, 2] on the host: pages that rows need anew, and give back.
    """

    stay: list[Tensor]
    demoted: Tensor | None
    entering: list[Tensor]
    lengths: Tensor
    scores: list[Tensor]
    growth: list[list[int]]


class PackedLayer:
    """All packed tokens of one layer, in pages of a shared pool.

    Args:
        pool: the device's pool.
        layouts: one page layout per tier, best first.
        rows: sequences x KV heads.
        basis: rotations of keys and values; its mean is set when the first tokens are packed.
        shift: subtract the mean of the first packed keys from every key.
    """

    def __init__(self, pool: PagePool, layouts: list[PageLayout], rows: int, basis: Basis, shift: bool) -> None:
        self.pool = pool
        self.layouts = layouts
        self.classes = [pool.class_of(layout) for layout in layouts]
        self.table = PageTable(rows, pool.device)
        self.basis = basis
        self.shift = shift
        self._has_mean = torch.zeros(rows, dtype=torch.bool, device=pool.device)
        self._work: WorkList | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_work": None}

    @property
    def rows(self) -> int:
        return self.table.lengths.shape[0]

    @property
    def tiers(self) -> int:
        return len(self.layouts)

    @property
    def metadata_bytes(self) -> int:
        """Bytes of this layer beside its pages: page table, work list and mean keys."""
        mean = 0 if self.basis.mean is None else self.basis.mean.nbytes
        work = 0 if self._work is None else self._work.nbytes
        return self.table.nbytes + mean + work + self._has_mean.nbytes

    def page_counts(self, tier: int) -> Tensor:
        return self.table.page_counts(tier, self.layouts[tier].tokens)

    # ---- reading -------------------------------------------------------------------------------------------------

    def work(self) -> WorkList:
        """The work list of the pages as they are; kept until the next change."""
        if self._work is None:
            blocks: list[PageBlock] = []
            slots: list[int] = []
            for tier, layout in enumerate(self.layouts):
                blocks += self._blocks(tier, sum(slots))
                slots.append(int(self.page_counts(tier).max()) * layout.tokens)
            self._work = WorkList(tuple(blocks), self.rows, tuple(slots))
        return self._work

    def _blocks(self, tier: int, first_column: int) -> list[PageBlock]:
        """A tier's pages: rows of about as many pages together, cut into blocks of columns."""
        layout, counts = self.layouts[tier], self.page_counts(tier)
        spare = PADDING * sum(int(self.page_counts(t).sum()) for t in range(self.tiers)) / self.tiers
        blocks = []
        for row in _alike(counts, spare):
            rows = torch.arange(self.rows, device=counts.device) if row is None else row
            pages, step = int(counts[rows].max()), max(1, BLOCK_TOKENS // (rows.numel() * layout.tokens))
            for first in range(0, pages, step):
                last = min(first + step, pages)
                columns = (first_column + first * layout.tokens, first_column + last * layout.tokens)
                blocks.append(self._block(tier, row, rows, (first, last), columns))
        return blocks

    def _block(
        self, tier: int, row: Tensor | None, rows: Tensor, pages: tuple[int, int], columns: tuple[int, int]
    ) -> PageBlock:
        layout, counts = self.layouts[tier], self.page_counts(tier)[rows]
        index = torch.arange(*pages, device=rows.device).expand(rows.numel(), -1)
        ids = self.table.lookup(tier, rows[:, None], torch.minimum(index, (counts[:, None] - 1).clamp_min(0)))
        ids = torch.where(counts[:, None] > 0, ids, ids[counts.argmax(), 0])  # a row without pages borrows one
        filled = self.table.lengths[rows, tier] - pages[0] * layout.tokens
        full = bool((filled >= columns[1] - columns[0]).all())
        sources = self.pool.sources(self.classes[tier], ids.flatten())
        return PageBlock(tier, layout, row, sources, None if full else filled.int(), columns)

    def slots(self, tier: int, names: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-token parts by slot: (filled bool [rows, slots], name -> [rows, slots] with 0 in free slots)."""
        layout, counts = self.layouts[tier], self.page_counts(tier)
        ids, row, index = self.table.pages(tier, counts)
        pages = self.pool.gather(self.classes[tier], ids)
        width = int(counts.max()) if self.rows else 0
        parts = {}
        for name in names:
            part = layout.view(pages, name)
            grid = part.new_zeros(self.rows, width, layout.tokens)
            grid[row, index] = part
            parts[name] = grid.flatten(1)
        slot = torch.arange(width * layout.tokens, device=self.pool.device)
        return slot < self.table.lengths[:, tier, None], parts

    # ---- compaction: decide, count, do -------------------------------------------------------------------------------

    def plan(self, target: Tensor, current: Tensor, scores: list[Tensor]) -> Compaction:
        """Turn a policy's answer into a compaction.

        Args:
            target: int8 [rows, stored slots of tier 0, of tier 1, incoming], the tier every token shall have.
            current: same shape; EMPTY marks slots without a token.
            scores: new scores of the stored tokens, per tier [rows, slots].
        """
        widths = [s.shape[1] for s in scores]
        parts, now = (
            target.split([*widths, target.shape[1] - sum(widths)], 1),
            current.split([*widths, target.shape[1] - sum(widths)], 1),
        )
        stay = [(now[t] != EMPTY) & (parts[t] == (HIGH, LOW)[t]) for t in range(self.tiers)]
        demoted = (now[0] != EMPTY) & (parts[0] == LOW) if self.tiers == 2 else None
        entering = [(now[-1] == NEW) & (parts[-1] == (HIGH, LOW)[t]) for t in range(self.tiers)]
        lengths = torch.stack([s.sum(1) + e.sum(1) for s, e in zip(stay, entering, strict=True)], 1)
        if demoted is not None:
            lengths[:, 1] += demoted.sum(1)
        growth = []
        for tier, layout in enumerate(self.layouts):
            change = (lengths[:, tier] + layout.tokens - 1) // layout.tokens - self.page_counts(tier)
            growth.append([int(change.clamp_min(0).sum()), int((-change).clamp_min(0).sum())])
        return Compaction(stay, demoted, entering, lengths, scores, growth)

    def code_incoming(self, plan: Compaction, incoming: Incoming) -> list[Tokens]:
        """The incoming tokens coded, per tier; nothing is stored yet, so that bad input leaves the cache as it was."""
        self._note_mean(incoming)
        return [
            pack_tokens(layout, self.basis, *incoming.chosen(entering))
            for layout, entering in zip(self.layouts, plan.entering, strict=True)
        ]

    def apply(self, plan: Compaction, coded: list[Tokens]) -> None:
        """Do what was planned; the pool must have room for it."""
        entering = [e.sum(1) for e in plan.entering]
        old_counts = [self.page_counts(t) for t in range(self.tiers)]
        needed = (plan.lengths + self.layouts[0].tokens - 1) // self.layouts[0].tokens  # [rows, tiers]
        self.table.widen(
            int(needed.sum(1).max()), old_counts[1] if self.tiers == 2 else torch.zeros_like(old_counts[0])
        )
        demoted: tuple[Tokens, Tensor] | None = None
        for tier in range(self.tiers):
            arriving = [(coded[tier], entering[tier])]
            if tier == 1 and demoted is not None:
                arriving.insert(0, demoted)
            pages, slot_of = self._load(tier, old_counts[tier], plan.scores[tier])
            if tier == 0 and plan.demoted is not None:
                demoted = self._demote(pages, slot_of, plan.demoted)
            self._rebuild(tier, pages, old_counts[tier], plan.stay[tier], arriving)
        self._work = None

    def _load(self, tier: int, counts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The tier's pages with new scores, and the flat slot of each row's first token [rows, 1]."""
        layout = self.layouts[tier]
        ids, row, index = self.table.pages(tier, counts)
        pages = self.pool.gather(self.classes[tier], ids)
        if layout.scored and ids.numel():
            filled = torch.arange(scores.shape[1], device=scores.device) < self.table.lengths[:, tier, None]
            grid = torch.where(filled, scores.clamp_max(65504.0), 0.0).half().unflatten(1, (-1, layout.tokens))
            layout.view(pages, "score")[:] = grid[row, index]
        return pages, ((counts.cumsum(0) - counts) * layout.tokens)[:, None]

    def _demote(self, pages: Tensor, first: Tensor, demoted: Tensor) -> tuple[Tokens, Tensor]:
        row, slot = demoted.nonzero(as_tuple=True)
        tokens = compaction.take(self.layouts[0], pages, first[row, 0] + slot)
        keys, values = unpack_tokens(self.layouts[0], tokens)
        return code_tokens(self.layouts[1], keys, values, tokens["score"].float(), tokens["birth"]), demoted.sum(1)

    def _rebuild(
        self, tier: int, pages: Tensor, counts: Tensor, stay: Tensor, arriving: list[tuple[Tokens, Tensor]]
    ) -> None:
        """Close the holes, append what arrives, and exchange the pages that a row no longer or newly needs."""
        layout, cls = self.layouts[tier], self.classes[tier]
        first = (counts.cumsum(0) - counts) * layout.tokens
        row, source, target = compaction.hole_moves(stay)
        if row.numel():
            compaction.put(layout, pages, first[row] + target, compaction.take(layout, pages, first[row] + source))
        kept = stay.sum(1)
        lengths = kept + sum(count for _, count in arriving)
        needed = (lengths + layout.tokens - 1) // layout.tokens
        old_ids, old_row, old_index = self.table.pages(tier, counts)
        retained = old_index < needed[old_row]
        fresh_ids = self._exchange(cls, old_ids[~retained], (needed - counts).clamp_min(0))

        new_row, new_index = ragged_index(needed)
        new_first = (needed.cumsum(0) - needed) * layout.tokens
        rebuilt = pages.new_zeros(new_row.numel(), layout.page_bytes)
        ids = old_ids.new_zeros(new_row.numel())
        is_old = new_index < counts[new_row]
        rebuilt[is_old], ids[is_old], ids[~is_old] = pages[retained], old_ids[retained], fresh_ids
        slot = torch.arange(layout.tokens, device=ids.device)
        compaction.clear(layout, rebuilt, new_index[:, None] * layout.tokens + slot >= kept[new_row][:, None])
        end = kept
        for tokens, count in arriving:
            in_row, rank = ragged_index(count)
            compaction.put(layout, rebuilt, new_first[in_row] + end[in_row] + rank, tokens)
            end = end + count
        self.pool.scatter(cls, ids, rebuilt)
        self.table.write(tier, new_row, new_index, ids)
        self.table.lengths[:, tier] = lengths

    def _exchange(self, cls: int, ids: Tensor, demand: Tensor) -> Tensor:
        self.pool.release(cls, ids)
        return self.pool.allocate(cls, demand)

    def _note_mean(self, incoming: Incoming) -> None:
        """Fix the mean key of every row at the first tokens that it packs."""
        if not self.shift:
            return
        if self.basis.mean is None:
            self.basis.mean = torch.zeros(self.rows, incoming.k.shape[-1], device=self.pool.device)
        count = incoming.valid.sum(1)  # [rows]
        fresh = ~self._has_mean & (count > 0)
        if bool(fresh.any()):
            keys = self.basis.rotate_keys(incoming.k[fresh]) * incoming.valid[fresh][..., None]
            self.basis.mean[fresh] = keys.sum(1) / count[fresh][:, None]
            self._has_mean |= fresh

    # ---- whole rows ------------------------------------------------------------------------------------------------

    def restore(self, table: PageTable) -> None:
        """Return to an earlier table after tokens were only appended: give new pages back, empty the new slots."""
        for tier, (cls, layout) in enumerate(zip(self.classes, self.layouts, strict=True)):
            ids, row, index = self.table.pages(tier, self.page_counts(tier))
            counts = table.page_counts(tier, layout.tokens)
            self.pool.release(cls, ids[index >= counts[row]])
            ids, row, index = table.pages(tier, counts)
            pages = self.pool.gather(cls, ids)
            slot = index[:, None] * layout.tokens + torch.arange(layout.tokens, device=ids.device)
            compaction.clear(layout, pages, slot >= table.lengths[row, tier][:, None])
            self.pool.scatter(cls, ids, pages)
        self.table, self._work = table, None

    def select(self, index: Tensor) -> None:
        """Make row i a copy of today's row `index[i]`, int64 [rows]; the pool must have room for `select_demand`."""
        fresh = PageTable(index.numel(), self.pool.device)
        fresh.lengths = self.table.lengths[index]
        fresh.ids = self.table.ids[index]
        copies = []
        for tier, cls in enumerate(self.classes):
            counts = fresh.page_counts(tier, self.layouts[tier].tokens)
            copies.append((counts, self.pool.gather(cls, fresh.pages(tier, counts)[0])))
        for tier, cls in enumerate(self.classes):
            self.pool.release(cls, self.table.pages(tier, self.page_counts(tier))[0])
        for tier, (cls, (counts, pages)) in enumerate(zip(self.classes, copies, strict=True)):
            ids = self.pool.allocate(cls, counts)
            self.pool.scatter(cls, ids, pages)
            fresh.write(tier, *ragged_index(counts), ids)
        self.table, self._work = fresh, None
        self._has_mean = self._has_mean[index]
        if self.basis.mean is not None:
            self.basis.mean = self.basis.mean[index]

    def select_demand(self, index: Tensor) -> list[list[int]]:
        """Pages per tier that `select` needs anew and gives back, as `Compaction.growth`."""
        growth = []
        for tier in range(self.tiers):
            counts = self.page_counts(tier)
            growth.append([int(counts[index].sum()), int(counts.sum())])
        return growth

    def release(self) -> None:
        """Give all pages back."""
        for tier, cls in enumerate(self.classes):
            self.pool.release(cls, self.table.pages(tier, self.page_counts(tier))[0])
        self.table = PageTable(self.rows, self.pool.device)
        self._work = None


def _alike(counts: Tensor, spare: float) -> list[Tensor | None]:
    """Groups of rows with about as many pages, int64 [n] each; [None]: all rows, as `spare` repeated pages allow it."""
    longest, total = int(counts.max()), int(counts.sum())
    if total == 0:
        return []
    if counts.numel() * longest <= total + spare:
        return [None]
    groups: list[Tensor | None] = []
    while longest > 0:
        floor = longest / (1 + PADDING)
        groups.append(((counts <= longest) & (counts >= floor)).nonzero().squeeze(1))
        longest = int(counts[counts < floor].max()) if bool((counts < floor).any()) else 0
    return groups
