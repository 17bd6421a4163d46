"""KVCrush on the GPU; twin: `hfkv.kernels.kvcrush`.

Distances take only heads + 1 values, so ranks come from a counting sort: one program per row counts how many candidates
have each distance, then gives every candidate its rank and says whether there is a seat at it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.kvcrush import majority, medians
from hfkv.kernels.triton.launch import launches

BLOCK = 128


@triton.jit
def _bits(received, exists, median, i_b, i_h, t, H, T):
    """Bits of tokens `t` of one head, int32, and whether they exist."""
    at = (i_b * H + i_h) * T + t
    there = tl.load(exists + at, mask=t < T, other=0) != 0
    value = tl.load(received + at, mask=t < T, other=0.0)
    return tl.where(there & (value >= tl.load(median + i_b * H + i_h)), 1, 0), there


@triton.jit(do_not_specialize=["H", "T"])
def ones_kernel(received, exists, median, ones, H, T, BLOCK: tl.constexpr):
    """Tokens of each head that reach its median, int32 [batch, heads]; grid (batch * heads,)."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, T, BLOCK):
        bit, _ = _bits(received, exists, median, row // H, row % H, first + tl.arange(0, BLOCK), H, T)
        total += bit
    tl.store(ones + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["H", "T"])
def distance_kernel(received, exists, median, anchor, distance, H, T, BLOCK: tl.constexpr):
    """Heads in which a token's bit differs from the anchor's; grid (blocks of tokens, batch)."""
    t, i_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for i_h in range(0, H):
        bit, _ = _bits(received, exists, median, i_b, i_h, t, H, T)
        total += bit ^ tl.load(anchor + i_b * H + i_h).to(tl.int32)
    tl.store(distance + i_b * T + t, total, mask=t < T)


@triton.jit(do_not_specialize=["T"])
def elect_kernel(among, distance, seats, chosen, T, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Stable counting sort by distance, and a seat at evenly spaced ranks; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    level = tl.arange(0, LEVELS)
    count = tl.zeros([LEVELS], tl.int32)
    for first in range(0, T, BLOCK):
        t = first + tl.arange(0, BLOCK)
        there = tl.load(among + row * T + t, mask=t < T, other=0) != 0
        far = tl.load(distance + row * T + t, mask=t < T, other=0)
        count += tl.sum(tl.where((far[:, None] == level[None, :]) & there[:, None], 1, 0), 0)
    start = tl.cumsum(count, 0) - count  # rank of the first of each distance
    total = tl.sum(count, 0).to(tl.int64)
    places = tl.minimum(tl.load(seats + row), total)
    divisor = tl.maximum(total, 1)
    for first in range(0, T, BLOCK):
        t = first + tl.arange(0, BLOCK)
        there = tl.load(among + row * T + t, mask=t < T, other=0) != 0
        far = tl.load(distance + row * T + t, mask=t < T, other=0)
        one = tl.where((far[:, None] == level[None, :]) & there[:, None], 1, 0)  # [BLOCK, LEVELS]
        before = tl.cumsum(one, 0) - one + start[None, :]
        rank = tl.sum(tl.where(one == 1, before, 0), 1).to(tl.int64)
        seat = (rank + 1) * places // divisor > rank * places // divisor
        tl.store(chosen + row * T + t, (seat & there).to(tl.int8), mask=t < T)
        start += tl.sum(one, 0)


@launches
def crush_distances(received: Tensor, exists: Tensor, anchor: Tensor | None) -> Tensor:
    """See `hfkv.kernels.kvcrush.crush_distances`; int32."""
    batch, heads, tokens = received.shape
    received, there = received.float().contiguous(), exists.to(torch.int8).contiguous()
    median = medians(received, exists).contiguous()
    if anchor is None:
        ones = torch.empty(batch, heads, dtype=torch.int32, device=received.device)
        ones_kernel[(batch * heads,)](received, there, median, ones, heads, tokens, BLOCK=BLOCK)
        anchor = majority(ones, exists.sum(-1))
    distance = torch.empty(batch, tokens, dtype=torch.int32, device=received.device)
    grid = (triton.cdiv(tokens, BLOCK), batch)
    distance_kernel[grid](
        received, there, median, anchor.to(torch.int8).contiguous(), distance, heads, tokens, BLOCK=BLOCK
    )
    return distance


@launches
def elect(among: Tensor, distance: Tensor, seats: Tensor, most: int) -> Tensor:
    """See `hfkv.kernels.kvcrush.elect`.

    Args:
        most: the largest distance there can be: the number of heads.
    """
    rows, tokens = among.shape
    chosen = torch.empty(rows, tokens, dtype=torch.int8, device=among.device)
    levels = triton.next_power_of_2(most + 1)
    block = max(16, min(BLOCK, 8192 // levels))
    elect_kernel[(rows,)](
        among.to(torch.int8).contiguous(),
        distance.to(torch.int32).contiguous(),
        seats.long().contiguous(),
        chosen,
        tokens,
        BLOCK=block,
        LEVELS=levels,
    )
    return chosen.bool()
