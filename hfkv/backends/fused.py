"""The GPU path: Triton kernels that read codes where they lie, with no synchronisation between flushes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfkv.attend import Call, Past, attend_own, says_more_than_padding
from hfkv.handle import Chunk
from hfkv.kernels.triton import chunk_attention, decode_attention, prompt_attention
from hfkv.kernels.triton.tiles import Pages
from hfkv.kernels.triton.work import StepPlan, Workspace
from hfkv.observe import observe_chunk_fused, observe_stored_fused
from hfkv.paging.packed import PackedLayer
from hfkv.paging.table import PageTable
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens

if TYPE_CHECKING:
    pass


class FusedKernels:
    """`Kernels` by Triton.

    Args:
        device: where the layer lies.
        spaces: workspaces of the cache's layers, one per device; made here if this is the first of its device.
    """

    name = "triton"

    def __init__(self, device: torch.device, spaces: dict[torch.device, Any]) -> None:
        self.space: Workspace = spaces.setdefault(device, Workspace.on(device))
        self._plans: dict[int, tuple[PageTable, StepPlan]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the plans of steps; the workspace is the cache's."""
        return sum(plan.nbytes for _, plan in self._plans.values())

    @staticmethod
    def view(packed: PackedLayer) -> Pages:
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
        return decode_attention.attend_step(past, q, call, plan)

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

    observe_chunk = staticmethod(observe_chunk_fused)

    @staticmethod
    def observe_stored(
        tokens: LayerTokens, sequences: Sequences, stored: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """New scores; the pages get theirs back until the flush has its pages, since one that fails changes nothing."""
        packed, old = tokens.packed, [parts["score"].float() for parts in stored]
        if not tokens.queries.positions or tokens.call is None:
            return old, torch.ones(packed.rows, sequences.k.shape[2], device=sequences.k.device)
        at = torch.tensor(tokens.queries.positions, device=sequences.k.device)
        window = observe_stored_fused(tokens, sequences, at)
        new = [packed.slots(tier, ("score",))[1]["score"].float() for tier in range(packed.tiers)]
        for tier, scores in enumerate(old):
            packed.rescore(tier, packed.page_counts(tier), scores)
        return new, window
