"""The GPU path: Triton kernels that read codes where they lie, with no synchronisation between flushes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfkv.attend import Call, Past, attend_own, head_rows, says_more_than_padding
from hfkv.fill import Fill
from hfkv.handle import Chunk
from hfkv.kernels.quantize_pack import Basis, check_flags
from hfkv.kernels.triton import (
    append,
    chunk_attention,
    compaction,
    decode_attention,
    kvcrush,
    observe,
    prompt_attention,
    replay,
)
from hfkv.kernels.triton.constants import power_of_two
from hfkv.kernels.triton.quantize_pack import TierPages
from hfkv.kernels.triton.tiles import Pages
from hfkv.kernels.triton.unpack import unpack_rows
from hfkv.kernels.triton.work import StepPlan, Workspace
from hfkv.observe import SCORE_HORIZON, kept_queries, newest_queries
from hfkv.paging.compaction import Compaction
from hfkv.paging.device import apply_on_device, check_incoming
from hfkv.paging.packed import PackedLayer
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.paging.table import PageTable
from hfkv.window import Sequences, Window

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens


class FusedKernels:
    """`Kernels` by Triton.

    Args:
        device: where the layer lies.
        spaces: workspaces of the cache's layers, one per device; made here if this is the first of its device.
    """

    name = "triton"
    defers = True

    def __init__(self, device: torch.device, spaces: dict[torch.device, Any]) -> None:
        self.space: Workspace = spaces.setdefault(device, Workspace.on(device))
        self._plans: dict[int, tuple[PageTable, StepPlan]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the plans of steps; the workspace is the cache's."""
        return sum(plan.nbytes for _, plan in self._plans.values())

    @staticmethod
    def view(packed: PackedLayer) -> Any:
        return Pages.of(packed)

    def attend_own(self, chunk: Chunk, q: Tensor, mask: Tensor | None, valid: Tensor | None, call: Call) -> Tensor:
        """By SDPA, whose kernels are the fastest there are, unless the call has a softcap or sinks."""
        plain = call.softcap is None and call.sinks is None
        if plain or says_more_than_padding(mask):
            return attend_own(chunk, q, mask, valid, call)
        terms = (call.scaling, call.softcap, call.sinks)
        return prompt_attention.prompt_attention(q, chunk.k, chunk.v, True, *terms, valid)[0]

    def attend_step(self, past: Past, q: Tensor, call: Call) -> Tensor:
        plan = self._plan(past, q.shape[1] // past.window.heads * q.shape[2])
        return decode_attention.attend_step(past, q, call, plan, pages=past.view)

    @staticmethod
    def append_one(
        k: Tensor,
        v: Tensor,
        q: Tensor,
        window: Window,
        before: Fill,
        after: Fill,
        queries: Tensor | None,
        slot: int | None,
    ) -> None:
        kept = None if slot is None else append.kept_slot(slot, k.device)
        append.append_step(k, v, q, window.k, window.v, after.counts, queries, kept)

    begin_step = staticmethod(append.begin_step)
    append_step = staticmethod(append.append_step)

    def still(self, past: Past, before: Any) -> StillPages:
        if before is not None and before.takes(past):
            plan = None if before.plan is None else self._plan(past, before.plan.columns)
            if plan is before.plan and before.uses(self.space):
                return before
        return StillPages.of(past)

    def attend_still(self, still: StillPages, past: Past, q: Tensor, call: Call) -> Tensor:
        if still.plan is None:
            still.plan = self._plan(past, q.shape[1] // past.window.heads * q.shape[2])
        own = StillPast(past.packed, still.pages, past.window, past.fill, still.basis)
        out = decode_attention.attend_step(own, q, call, still.plan, pages=still.pages)
        still.buffers = _buffers(self.space)
        return out

    def _plan(self, past: Past, columns: int) -> StepPlan:
        """The step's work items, laid out anew where the pages have changed."""
        packed = past.packed
        table, plan = self._plans.get(columns, (None, None))
        if plan is None or plan.rows != packed.rows:
            plan = decode_attention.plan_step(packed, past.window, columns, self.space)
        elif table is not packed.table:
            plan.refresh(packed.table.lengths)
        if table is not packed.table:
            self._plans[columns] = (packed.table, plan)
        return plan

    @staticmethod
    def attend_chunk(
        past: Past, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, observed: int
    ) -> tuple[Tensor, Tensor | None]:
        most = past.fill.most
        window = (past.window.k[:, :, :most], past.window.v[:, :, :most], past.fill.counts)
        terms = (call.scaling, call.softcap, call.sinks)
        held = (past.view, past.basis, window, chunk.k, chunk.v)
        return chunk_attention.attend_chunk(*held, q, valid, *terms, with_lse=observed > 0)

    @staticmethod
    def observe_chunk(
        sequences: Sequences, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None, count: int
    ) -> Tensor:
        picked, last, total = newest_queries(sequences, q, valid, lse, count)
        terms = (call.scaling, call.softcap, call.sinks)
        return observe.observe_exact(picked, sequences.k, last, sequences.fill.lengths, *terms, total)

    @classmethod
    def observe_stored(
        cls, layers: list[LayerTokens], sequences: list[Sequences], stored: list[dict[str, Tensor]]
    ) -> Tensor:
        """Layer by layer: a launch has enough to do."""
        rows, scores = layers[0].packed.rows, []
        for index, (tokens, own) in enumerate(zip(layers, sequences, strict=True)):
            part = slice(index * rows, (index + 1) * rows)
            scores.append(cls._observe_layer(tokens, own, [{n: x[part] for n, x in p.items()} for p in stored]))
        return torch.cat(scores)

    @staticmethod
    def _observe_layer(tokens: LayerTokens, sequences: Sequences, stored: list[dict[str, Tensor]]) -> Tensor:
        """The kernel ages scores where they lie; pages get the old ones back, since a flush may still fail."""
        packed, kept, call, fill = tokens.packed, kept_queries(tokens, sequences), tokens.call, sequences.fill
        if kept is None or call is None:
            return torch.ones(packed.rows, sequences.k.shape[2], device=sequences.k.device)
        q, last = kept
        scaled = packed.basis.rotate_keys(head_rows(q, tokens.window.heads, call))
        constant = packed.basis.constant(scaled)
        age = (fill.seen, tokens.queries.stands_for, SCORE_HORIZON)
        terms = (call.scaling, call.softcap, call.sinks)
        held = (Pages.of(packed), sequences.k, last, fill.lengths)
        window = observe.observe_pages(q, scaled / call.scaling, constant, *held, *age, *terms)
        for tier, parts in enumerate(stored):
            pages, lengths = _pages(packed, tier), packed.table.lengths
            new, _ = compaction.read_scores(pages, lengths, parts["score"].shape[1])
            compaction.write_scores(pages, lengths, parts["score"])
            parts["score"].copy_(new)
        return window

    @staticmethod
    def stored(packed: PackedRows, selects: bool) -> list[tuple[Tensor, dict[str, Tensor]]]:
        held = []
        for tier, layout in enumerate(packed.layouts):
            slots = packed.widest[tier] * layout.tokens
            filled = torch.arange(slots, device=packed.pool.device) < packed.table.lengths[:, tier, None]
            parts = {}
            if selects:
                score, birth = compaction.read_scores(_pages(packed, tier), packed.table.lengths, slots)
                parts = {"score": score, "birth": birth}
            held.append((filled, parts))
        return held

    @staticmethod
    def vectors(packed: PackedRows, side: str, tier: int, width: int) -> Tensor:
        return unpack_rows(_pages(packed, tier), packed.table.lengths, packed.basis, side, width)

    @staticmethod
    def checker(packed: PackedRows, incoming: Incoming) -> Callable[[list[Tensor]], Tensor] | None:
        return lambda entering: check_incoming(packed, entering, incoming)

    @staticmethod
    def code(packed: PackedRows, plan: Compaction, incoming: Incoming) -> Any:
        """They are coded on their way into the pages; here only what the check has found is raised."""
        check_flags(plan.flags)
        return incoming

    apply = staticmethod(apply_on_device)
    most_received = staticmethod(replay.most_received)
    crush_distances = staticmethod(kvcrush.crush_distances)
    elect = staticmethod(kvcrush.elect)


@dataclass(frozen=True)
class StillPast(Past):
    """A past whose pages are read through copies of what a flush makes anew."""

    copied: Basis

    @property
    def basis(self) -> Basis:
        return self.copied


@dataclass(eq=False)
class StillPages:
    """What a replayed step reads of a layer's packed tokens, at addresses that outlast a flush.

    Attributes:
        pages: copies of the page table, its lengths and the chunk addresses; these have room for more chunks.
        basis: the layer's, with a copy of the mean keys.
        plan: the step's work items, which are always refreshed in place; None before the first step.
        buffers: tensors of the workspace that the last step used.
    """

    pages: Pages
    basis: Basis
    plan: StepPlan | None = None
    buffers: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, past: Past) -> StillPages:
        """Copies of what a layer has now."""
        pages, mean = past.view, past.basis.mean
        addresses = pages.addresses.new_zeros(power_of_two(2 * pages.addresses.numel()))
        addresses[: pages.addresses.numel()] = pages.addresses
        own = replace(pages, ids=pages.ids.clone(), lengths=pages.lengths.clone(), addresses=addresses)
        return cls(own, Basis(past.basis.key, past.basis.value, None if mean is None else mean.clone()))

    def takes(self, past: Past) -> bool:
        """Copy what a layer has now; False if there is no room for it."""
        new, own, mean = past.view, self.pages, past.basis.mean
        chunks = new.addresses.numel()
        fits = (new.ids.shape, new.layouts, new.align) == (own.ids.shape, own.layouts, own.align)
        if not fits or chunks > own.addresses.numel() or (mean is None) != (self.basis.mean is None):
            return False
        if past.basis.key is not self.basis.key or past.basis.value is not self.basis.value:
            return False
        pairs = [(own.ids, new.ids), (own.lengths, new.lengths), (own.addresses[:chunks], new.addresses)]
        if mean is not None and self.basis.mean is not None:
            pairs.append((self.basis.mean, mean))
        for target, source in pairs:
            target.copy_(source)
        return True

    def uses(self, space: Workspace) -> bool:
        """Whether the workspace is still the one that the last step used, if there was one."""
        return self.buffers is None or all(a is b for a, b in zip(self.buffers, _buffers(space), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        mean = 0 if self.basis.mean is None else self.basis.mean.nbytes
        return self.pages.ids.nbytes + self.pages.lengths.nbytes + self.pages.addresses.nbytes + mean

    @property
    def read(self) -> list[Tensor]:
        """Every tensor that a step reads or writes."""
        own = [self.pages.ids, self.pages.lengths, self.pages.addresses, *(self.buffers or ())]
        own += [] if self.plan is None else [self.plan.items, self.plan.offsets]
        return own + [x for x in (self.basis.key, self.basis.value, self.basis.mean) if x is not None]


def _buffers(space: Workspace) -> tuple[Tensor, ...]:
    return space.acc, space.stats, space.whole, space.split, space.terms


def _pages(packed: PackedRows, tier: int) -> TierPages:
    return TierPages(packed.table.ids, packed.pool.chunk_addresses, packed.layouts[tier], tier)
