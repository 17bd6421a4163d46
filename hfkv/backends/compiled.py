"""The CPU path: decode steps by compiled loops where that pays, all else by plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hfkv.attend import Call, Past, attend_chunk, attend_step, sink_rows
from hfkv.backends.built import Step, built_step
from hfkv.backends.plain import PlainKernels, StillWork
from hfkv.handle import Chunk
from hfkv.kernels.decode_attention import WorkList
from hfkv.kernels.loops import StepShape, TierPages, by_bytes
from hfkv.paging.addressed import loop_pages
from hfkv.paging.packed import PackedLayer

MOST_QUERIES = 16
"""Queries of one KV head, over all heads of its group, up to which loops are used: each query reads all codes anew."""

SERIAL = 8192
"""Slots that all queries of a layer read together, up to which one thread reads them: others would not wake in time.
SmolLM2's layers at 2,000 tokens read 18,000: a step takes 1.10 of the exact cache's on two threads, 1.20 on one."""

LEAST = 4096
"""Slots of a layer, of all its rows, from which loops are worth building unasked."""


class CompiledKernels(PlainKernels):
    """`Kernels` by the twins, with compiled loops for the few queries of a decode step.

    Args:
        least: slots of a layer from which loops are used; 0 where they are asked for.

    Attributes:
        name: `inductor` where loops are asked for or were used, for the report.
    """

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self.name = "torch" if least else "inductor"

    def view(self, packed: PackedLayer) -> LoopView:  # type: ignore[override]
        """The pages as they are now, in both forms."""
        if "loops" not in packed.derived:
            packed.derived["loops"] = LoopView(packed.work())
        return packed.derived["loops"]

    def attend_step(self, past: Past, q: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        view: LoopView = past.view
        step = view.step(past, q, call) if view.slots >= self.least else None
        if step is None:
            return attend_step(replace(past, view=view.work), q, call)
        self.name = "inductor"
        return step(*_arguments(past, view.work, q, call), view.pages).view(*q.shape[:3], -1)

    @staticmethod
    def attend_chunk(
        past: Past, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, observed: int
    ) -> tuple[Tensor, Tensor | None]:
        return attend_chunk(replace(past, view=past.view.work), chunk, q, valid, call, observed)

    @staticmethod
    def still(past: Past, before: StillWork | None) -> StillWork:
        return PlainKernels.still(replace(past, view=past.view.work), before)


@dataclass
class LoopView:
    """A layer's pages between two flushes, for plain torch and for loops.

    Attributes:
        work: for plain torch.
        pages: of each tier, see `hfkv.kernels.loops.step_loops`; None before a step asks, and where they are not for
            loops.
    """

    work: WorkList
    pages: list[TierPages] | None = None
    _steps: dict[tuple, Step | None] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """Slots of all rows, those that short rows are padded by included."""
        return self.work.rows * self.work.width

    @property
    def nbytes(self) -> int:
        return sum(which.nbytes + used.nbytes for _, which, used in self.pages or [])

    def step(self, past: Past, q: Tensor, call: Call) -> Step | None:
        """The loops for such a step; None where plain torch is to take it."""
        key = (q.shape[2], call.scaling, call.softcap, call.sinks is None)
        if key not in self._steps:
            groups = q.shape[1] // past.window.heads
            if groups * q.shape[2] <= MOST_QUERIES and self.pages is None:
                self.pages = loop_pages(past.packed)
            fits = groups * q.shape[2] <= MOST_QUERIES and self.pages is not None
            self._steps[key] = built_step(self._shape(past, q, call, groups), self.work.folding) if fits else None
        return self._steps[key]

    def _shape(self, past: Past, q: Tensor, call: Call, groups: int) -> StepShape:
        folding = self.work.folding
        columns = [(part.start, part.stop) for part in (*folding.keys, folding.total, folding.rotated)]
        alone = self.slots * groups * q.shape[2] <= SERIAL
        return StepShape(
            layouts=tuple(past.packed.layouts),
            keys=tuple(columns[:-2]),
            total=columns[-2],
            rotated=columns[-1],
            groups=groups,
            slots=past.window.capacity,
            scaling=call.scaling,
            softcap=call.softcap,
            dtype=q.dtype,
            absent=(call.sinks is None, self.work.mean is None),
            single=(self.work.rows == 1, q.shape[2] == 1),
            threads=1 if alone else torch.get_num_threads(),
        )


def _arguments(past: Past, work: WorkList, q: Tensor, call: Call) -> tuple:
    """What `step_loops` asks for before the pages."""
    window, folding = past.window, work.folding
    k, v = (x.contiguous().flatten(0, 1) for x in (window.k, window.v))
    rows = q.contiguous().view(work.rows, -1, *q.shape[2:])
    filled, sinks = past.fill.of_rows(window.heads), sink_rows(q, window.heads, call)
    into = by_bytes(folding, tuple(past.packed.layouts))
    return rows, k, v, filled, sinks, into, work.mean, list(folding.values)
