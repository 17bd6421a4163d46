"""The GPU path of layers with a packed tier: kernels for prompts, decode steps, coding, compaction and packing.

Which pages a flush opens, and where packs find room, is decided by the host; what is observed of packed tokens, and
prompts that go on behind them, are plain torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfkv.attend import Call, Past, attend_chunk
from hfkv.backends.current import on_device_of
from hfkv.backends.fused import FusedKernels
from hfkv.backends.plain import PlainKernels
from hfkv.kernels.triton import decode_attention, packing
from hfkv.kernels.triton.pack_attention import PackPlan
from hfkv.kernels.triton.work import StepPlan
from hfkv.observe import observe_stored
from hfkv.paging.compaction import Compaction
from hfkv.paging.opened import apply_opened
from hfkv.paging.packed import PackedLayer
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.paging.sealed import SealingPool
from hfkv.paging.table import PageTable
from hfkv.quant import PageLayout


@on_device_of(lambda layout, pages: pages)
def seal(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
    """See `hfkv.kernels.triton.packing.seal`."""
    return packing.seal(layout, pages)


class PackKernels(FusedKernels):
    """`Kernels` of packed tiers: decode steps read packs where they lie, flushes open the pages that they change."""

    defers = False

    def __init__(self, device: Any, spaces: dict[Any, Any]) -> None:
        super().__init__(device, spaces)
        self._packs: tuple[PageTable | None, PackPlan | None] = (None, None)
        self._steps: dict[int, tuple[PackPlan, StepPlan]] = {}

    @property
    def nbytes(self) -> int:
        own = 0 if self._packs[1] is None else self._packs[1].nbytes
        return own + sum(plan.nbytes for _, plan in self._steps.values())

    attend_chunk = staticmethod(attend_chunk)
    observe_stored = staticmethod(observe_stored)
    stored = staticmethod(PlainKernels.stored)

    @staticmethod
    def view(packed: PackedLayer) -> Any:
        return packed.work()

    @on_device_of(lambda self, past, *_: past.window.k)
    def attend_step(self, past: Past, q: Tensor, call: Call) -> Tensor:
        packs, plan = self._step_plans(past, q.shape[1] // past.window.heads * q.shape[2])
        return decode_attention.attend_step(past, q, call, plan, packs=packs)

    def _step_plans(self, past: Past, columns: int) -> tuple[PackPlan, StepPlan]:
        """Plain and sealed pages, sorted anew where they have changed, and the work items of the former."""
        table, packs = self._packs
        if packs is None or table is not past.packed.table:
            packs = PackPlan.of(past.packed)
            self._packs = (past.packed.table, packs)
        known, plan = self._steps.get(columns, (None, None))
        if plan is None or plan.rows != past.packed.rows:
            plan = decode_attention.plan_step(packs.plain, past.window, columns, self.space)
        elif known is not packs:
            plan.refresh(packs.plain.table.lengths)
        packs.reserve(plan)
        self._steps[columns] = (packs, plan)
        return packs, plan

    @staticmethod
    @on_device_of(lambda packed, *_: packed.table.lengths)
    def apply(packed: PackedRows, plan: Compaction, coded: Incoming) -> None:
        """Do what was planned: tokens are coded and moved in opened pages, and full pages packed."""
        assert isinstance(packed.pool, SealingPool)
        packed.pool.sealer = seal
        apply_opened(packed, plan, coded)
