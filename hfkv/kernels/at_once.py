"""How much of a quadratic intermediate is held at once."""

from __future__ import annotations

import torch

CACHE_BYTES = 4 << 20
"""On the CPU: what stays in the cache between one operation and the next, without many small ones."""

MOST_BYTES = 64 << 20
"""On any other device."""


def logits_at_once(device: torch.device, keys: int) -> int:
    """Queries, over all rows, whose float32 logits over so many keys are held at once; at least one."""
    return max(1, (CACHE_BYTES if device.type == "cpu" else MOST_BYTES) // (4 * max(1, keys)))
