"""What all kernels share: how pages are numbered, what codec kinds and scale bytes mean, sizes of tiles."""

from __future__ import annotations

import torch
import triton.language as tl

from hfkv.kernels.quantize_pack import LARGEST_SCORE as LARGEST_HALF_NUMBER
from hfkv.paging.pool import SLOT_BITS as POOL_SLOT_BITS
from hfkv.quant import SCALE_BIAS as CODEC_SCALE_BIAS
from hfkv.quant import SCALE_STEPS as CODEC_SCALE_STEPS

SLOT_BITS = tl.constexpr(POOL_SLOT_BITS)
SLOT_MASK = tl.constexpr((1 << POOL_SLOT_BITS) - 1)

KINDS = {"exact": 0, "affine": 1, "fitted": 2, "minmax": 3, "bounded": 1}
"""What stored numbers stand for; how they were made tells `affine` and `bounded` apart."""

EXACT, AFFINE, FITTED, MINMAX = (tl.constexpr(kind) for kind in range(4))

SCALE_BIAS = tl.constexpr(float(CODEC_SCALE_BIAS))
SCALE_STEPS = tl.constexpr(float(CODEC_SCALE_STEPS))
SCALE_STEP = tl.constexpr(1 / CODEC_SCALE_STEPS)
"""A scale byte c is 2^((c - SCALE_BIAS) SCALE_STEP)."""

LARGEST_HALF = tl.constexpr(LARGEST_HALF_NUMBER)
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def power_of_two(n: int, least: int = 16) -> int:
    """The next power of two, as tiles need it."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())
