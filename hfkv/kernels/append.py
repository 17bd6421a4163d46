"""A decode step's bookkeeping where it lies: which slot of the window a token takes, and whether its query is kept.

A step that is replayed cannot ask the host, so the counters are on the device. The counterpart of `Window.append`,
`advance` and `KeptQueries.add` for one token of every sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def begin_step(counts: Tensor, kept: Tensor | None, every: int, most: int) -> None:
    """Count one token more in every window, and decide whether this step's queries are kept.

    Args:
        counts: int64 [batch], tokens per sequence.
        kept: int64 [3] or None: queries held, tokens since the last flush, and (written) the slot that this step's
            queries take, -1 for none.
        every, most: one query in so many is kept, and so many in all.
    """
    counts += 1
    if kept is not None:
        wanted = (kept[1] % every == 0) & (kept[0] < most)
        slot = torch.where(wanted, kept[0], -1)
        kept.copy_(torch.stack([kept[0] + wanted, kept[1] + 1, slot]))


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
    """Write a layer's new token into the last slot of every sequence's window, and its queries where they are kept.

    Args:
        k, v: [batch, kv_heads, 1, D or Dv]; q: [batch, q_heads, 1, D].
        window_k, window_v: [batch, kv_heads, capacity, D or Dv].
        counts: int64 [batch], this token included.
        queries: [batch, q_heads, most, D], or None where none are kept.
        kept: int64 [3] of `begin_step`.
    """
    slot = (counts - 1)[:, None, None, None]
    window_k.scatter_(2, slot.expand(k.shape), k)
    window_v.scatter_(2, slot.expand(v.shape), v)
    if queries is not None and kept is not None:
        here = torch.arange(queries.shape[2], device=q.device)[:, None] == kept[2]
        queries.copy_(torch.where(here, q, queries))
