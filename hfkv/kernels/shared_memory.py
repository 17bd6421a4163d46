"""How much of a multiprocessor's shared memory the decode kernel of Triton takes, and how much there is."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from hfkv.quant import Codec, PageLayout

CPU_ROOM = 227 << 10
QUERIES, ZERO_ROWS, FEWEST = 8, 16, 32
"""Queries of a program, rows of zeros of values, and entries that a product takes at least."""


def page_room(layouts: Sequence[PageLayout], dtype: torch.dtype) -> int:
    """Bytes that a page takes at most while the kernel reads it, as `make aot` finds them; `dtype`: the model's.

    Exact keys and values wait there together; codes that become float32 do so a slice at a time, beside the queries.
    """
    full, most = dtype == torch.float32, 0
    for layout in layouts:
        blocks = [_block(layout.key), _block(layout.value)]
        if not layout.key.bits:
            held = sum(blocks) * layout.tokens * layout.key.element
        elif full:
            held = max(blocks) * layout.tokens * dtype.itemsize
        else:
            held = layout.page_bytes + ZERO_ROWS * layout.tokens
        most = max(most, held)
    return most + full * QUERIES * _power_of_two(layouts[0].key.dim) * dtype.itemsize


@functools.lru_cache(maxsize=32)
def shared_room(device: torch.device) -> int:
    """Bytes that a program may have, as Triton itself looks at them before a launch."""
    if device.type != "cuda":
        return CPU_ROOM
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _block(codec: Codec) -> int:
    """Features of a code's slice, rounded up to what a product takes."""
    slices = {0: 1, 8: 1, 4: 2, 3: 4, 2: 4}[codec.bits]
    return _power_of_two(codec.padded // slices)


def _power_of_two(n: int) -> int:
    return max(FEWEST, 1 << (n - 1).bit_length())
