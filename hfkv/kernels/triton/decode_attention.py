"""Decode attention on packed pages: three launches with the meaning of `hfkv.attend.attend_step`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.attend import Call, Past
from hfkv.kernels.shared_memory import shared_room
from hfkv.kernels.triton import decode_kernels as kernels
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.pages import pages_of
from hfkv.kernels.triton.tiles import Pages
from hfkv.kernels.triton.work import (
    COLUMNS,
    StepPlan,
    Workspace,
    pages_at_once,
    programs_on,
    row_entries,
    stages_of,
)
from hfkv.paging.packed import PackedLayer
from hfkv.window import Window

if TYPE_CHECKING:
    from hfkv.kernels.triton.pack_attention import PackPlan, PlainPages

LOG2E = 1.4426950408889634
ROTATED = 32
"""Features of a query, or of an output, that meet the rotation at once."""

MERGED = 16
"""Work items of a row that are merged at once."""


def plan_step(
    packed: PackedLayer | PlainPages, window: Window, columns: int, space: Workspace, programs: int | None = None
) -> StepPlan:
    """The work of a layer's decode steps, until its pages change; then `plan.refresh(packed.table.lengths)`.

    Args:
        columns: query heads per KV head x queries of a step.
        space: the device's workspace.
        programs: programs of the launch; None: what fills the device.
    """
    device = window.k.device
    plan = StepPlan(
        layouts=tuple(packed.layouts),
        rows=packed.rows,
        columns=columns,
        capacity=window.capacity,
        dtype=window.k.dtype,
        device=device,
        space=space,
        programs=programs_on(device) if programs is None else programs,
        warps=pages_at_once(tuple(packed.layouts), window.k.dtype, shared_room(device)),
    )
    plan.refresh(packed.table.lengths)
    return plan


@launches
def attend_step(
    past: Past,
    q: Tensor,
    call: Call,
    plan: StepPlan,
    out: Tensor | None = None,
    pages: Pages | None = None,
    packs: PackPlan | None = None,
) -> Tensor:
    """Attention of the newest queries, whose tokens are in the window already; see `hfkv.attend.attend_step`.

    Nothing is allocated but the output, and nothing waits for the device.

    Args:
        past: with `packed`, the layer that `plan` was made for.
        q: [batch, q_heads, queries, D], contiguous in D.
        out: [batch, q_heads, queries, Dv] contiguous, or None to make it.
        pages: where the packed tokens lie; None: as the packed layer has it now.
        packs: the sealed pages of a layer that has some; `plan` is then that of its plain pages.

    Raises:
        ValueError: q or the window does not fit the plan.
    """
    packed = past.packed if packs is None else packs.plain
    window, space = past.window, plan.space
    if packed is None:
        raise ValueError("this Past knows no packed layer: make it with LayerTokens.past()")
    _check(past, q, plan)
    held = Pages.of(packed) if pages is None else pages
    batch, heads, queries, dim = q.shape
    value_dim = window.v.shape[3]
    if out is None:
        out = q.new_empty(batch, heads, queries, value_dim)
    key, value, mean = past.basis.key, past.basis.value, past.basis.mean
    coded = any(layout.key.bits for layout in plan.layouts)
    full = plan.dtype == torch.float32
    wide, wide_v = row_entries(dim), row_entries(value_dim)
    split = space.split.view(plan.dtype)
    tiers = [pages_of(layout) for layout in plan.layouts]
    where = (*q.stride()[:3],)
    counted = (window.heads, queries, plan.columns, plan.tiles)
    softcap = 0.0 if call.softcap is None else call.softcap * LOG2E
    kernels.prepare_queries[(plan.rows * plan.tiles,)](
        q, key, mean, space.whole, split, space.terms, call.scaling * LOG2E, *counted, *where,
        NH=COLUMNS, D=dim, BLOCK=ROTATED, WIDE=wide, CODED=coded,
        SPLIT=full or packs is not None or not all(x.key.bits for x in plan.layouts), FULL=full, num_warps=4,
    )  # fmt: skip
    high, low = stages_of(full)
    kernels.decode_items[(plan.count * plan.tiles,)](
        q, space.whole, split, space.terms, held.ids, held.lengths, held.addresses,
        plan.items, window.k, window.v, past.fill.counts, space.acc, space.stats,
        call.scaling * LOG2E, softcap, held.ids.shape[1], *counted, plan.capacity, *where,
        HIGH=tiers[0], LOW=tiers[1] if len(tiers) == 2 else None, NH=COLUMNS, D=dim, DV=value_dim, WIDE=wide,
        WIDE_V=wide_v, CAPPED=call.softcap is not None, FULL=full, STAGES=high, STAGES_LOW=low, W=plan.warps,
        num_warps=4 * plan.warps if full else plan.warps, maxnreg=plan.registers,
    )  # fmt: skip
    more, parts = (space.acc, space.stats), 0
    if packs is not None:
        more, parts = packs.attend(plan, split, softcap, call.softcap is not None), packs.parts(plan)
    kernels.combine_items[(plan.rows, plan.columns)](
        space.acc, space.stats, *more, plan.items, plan.offsets, value, call.sinks, out, plan.pieces - 1, *counted,
        PARTS=parts, NH=COLUMNS, DV=value_dim, WIDE_V=wide_v, BLOCK=ROTATED, STEP=MERGED, num_warps=4,
    )  # fmt: skip
    return out


def _check(past: Past, q: Tensor, plan: StepPlan) -> None:
    window, rows, columns = past.window, q.shape[0] * past.window.heads, q.shape[1] // past.window.heads * q.shape[2]
    if (rows, columns, window.capacity, q.dtype) != (plan.rows, plan.columns, plan.capacity, plan.dtype):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} over a window of {window.capacity} tokens is not what the step was planned "
            f"for: {plan.rows} rows of {plan.columns} queries, {plan.capacity} tokens, {plan.dtype}; plan it anew"
        )
    if q.stride(3) != 1 or not window.k.is_contiguous() or not window.v.is_contiguous():
        raise ValueError(f"q {q.stride()} must be contiguous in its last dimension, and the window throughout")
