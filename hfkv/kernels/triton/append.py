"""A decode step's bookkeeping on the device: the kernels of `hfkv.kernels.append`, one launch each."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.triton.constants import power_of_two
from hfkv.kernels.triton.launch import launches
from hfkv.window import KEPT_QUERIES


@triton.jit
def count_step(counts_ptr, kept_ptr, batch, every, most, BLOCK: tl.constexpr):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + b, mask=b < batch, other=0)
    tl.store(counts_ptr + b, counts + 1, mask=b < batch)
    if kept_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            held, since = tl.load(kept_ptr), tl.load(kept_ptr + 1)
            wanted = (since % every == 0) & (held < most)
            tl.store(kept_ptr, held + wanted.to(tl.int64))
            tl.store(kept_ptr + 1, since + 1)
            tl.store(kept_ptr + 2, tl.where(wanted, held, -1))


@triton.jit
def append_tokens(
    k_ptr,
    v_ptr,
    q_ptr,
    window_k_ptr,
    window_v_ptr,
    counts_ptr,
    queries_ptr,
    kept_ptr,
    heads,
    groups,
    capacity,
    most,
    k_batch,
    k_head,
    v_batch,
    v_head,
    q_batch,
    q_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
):
    """One row's token, and its group's queries."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    d, e = tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    line = row * capacity + tl.load(counts_ptr + batch) - 1
    k = tl.load(k_ptr + batch * k_batch + head * k_head + d, mask=d < D)
    tl.store(window_k_ptr + line * D + d, k, mask=d < D)
    v = tl.load(v_ptr + batch * v_batch + head * v_head + e, mask=e < DV)
    tl.store(window_v_ptr + line * DV + e, v, mask=e < DV)
    if queries_ptr is not None:
        slot = tl.load(kept_ptr + 2)
        if slot >= 0:
            for group in range(groups):
                own = head * groups + group
                q = tl.load(q_ptr + batch * q_batch + own * q_head + d, mask=d < D)
                at = (batch * heads * groups + own) * most + slot
                tl.store(queries_ptr + at * D + d, q, mask=d < D)


@launches
def begin_step(counts: Tensor, kept: Tensor | None, every: int, most: int) -> None:
    """See `hfkv.kernels.append.begin_step`."""
    batch = counts.numel()
    block = min(power_of_two(batch, 16), 1024)
    count_step[(-(-batch // block),)](counts, kept, batch, every, most, BLOCK=block, num_warps=1)


def kept_slot(slot: int, device: torch.device) -> Tensor:
    """What `begin_step` leaves in `kept` where a step's queries take this slot, for a step whose host knows it."""
    return _numbers(device)[slot : slot + 3]


@functools.lru_cache(maxsize=32)
def _numbers(device: torch.device) -> Tensor:
    return torch.arange(-2, KEPT_QUERIES, device=device)


@launches
def append_step(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    counts: Tensor,
    queries: Tensor | None,
    kept: Tensor | None,
) -> None:
    """See `hfkv.kernels.append.append_step`; windows and queries must be contiguous."""
    batch, heads, capacity, dim = window_k.shape
    value_dim = window_v.shape[3]
    k, v, q = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v, q))
    append_tokens[(batch * heads,)](
        k, v, q, window_k, window_v, counts, queries, kept,
        heads, q.shape[1] // heads, capacity, 0 if queries is None else queries.shape[2],
        *k.stride()[:2], *v.stride()[:2], *q.stride()[:2],
        D=dim, DV=value_dim, WIDE=power_of_two(dim, 16), WIDE_V=power_of_two(value_dim, 16), num_warps=1,
    )  # fmt: skip
