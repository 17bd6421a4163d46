"""Which kernels a layer runs: Triton's on a CUDA device, else their plain-torch twins, on the CPU with compiled loops.

`HFKV_BACKEND=torch`, `triton` or `inductor` forces one; `auto` or nothing leaves the choice to `choose`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
from typing import Any

import torch
from packaging.version import Version

from hfkv.backends.built import require_compiler
from hfkv.backends.compiled import LEAST, CompiledKernels
from hfkv.backends.plain import Kernels, PlainKernels
from hfkv.kernels.shared_memory import page_room, shared_room
from hfkv.quant import PageLayout

logger = logging.getLogger("hfkv")

VARIABLE = "HFKV_BACKEND"
LARGEST_DIM = 256
OLDEST_TRITON = "3.4"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose(device: torch.device, layouts: list[PageLayout], dtype: torch.dtype) -> str:
    """`triton`, `torch` or `inductor`, for layers of these layouts in the model's dtype.

    Raises:
        ValueError: `HFKV_BACKEND` names something else, or forces what cannot run here.
    """
    wanted = _asked()
    if wanted not in ("auto", "torch", "triton", "inductor"):
        raise ValueError(f"{VARIABLE}={wanted!r}: use 'triton', 'torch', 'inductor' or 'auto'")
    if wanted == "inductor" and device.type != "cpu":
        raise ValueError(f"{VARIABLE}=inductor is for the CPU, and the cache is on {device}: unset it")
    if wanted == "auto" and device.type == "cpu":
        return "inductor"
    if wanted in ("torch", "inductor") or (wanted == "auto" and device.type != "cuda"):
        return "torch" if wanted == "auto" else wanted
    reason = _obstacle(device, layouts, dtype)
    if reason is None:
        return "triton"
    if wanted == "triton":
        raise ValueError(f"{VARIABLE}=triton cannot run here: {reason}; unset it, or use {VARIABLE}=torch")
    _say_once(reason)
    return "torch"


def _asked() -> str:
    return os.environ.get(VARIABLE, "auto").lower()


def _obstacle(device: torch.device, layouts: list[PageLayout], dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if Version(importlib.metadata.version("triton")) < Version(OLDEST_TRITON):
        return f"triton {importlib.metadata.version('triton')} is older than {OLDEST_TRITON}"
    if device.type == "cpu" and not _interpreted():
        return "the cache is on the CPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests)"
    if device.type not in ("cuda", "cpu"):
        return f"the cache is on a device of type {device.type!r}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    if dtype not in DTYPES:
        return f"the model computes in {dtype}"
    for layout in layouts:
        if max(layout.key.dim, layout.value.dim) > LARGEST_DIM:
            return f"a head_dim of {max(layout.key.dim, layout.value.dim)} is beyond {LARGEST_DIM}"
        if layout.tokens < 16 or layout.tokens & (layout.tokens - 1):
            return f"pages of {layout.tokens} tokens: the kernels need a power of two from 16 on"
    return None if device.type == "cpu" else _too_large(device, layouts, dtype)


def _too_large(device: torch.device, layouts: list[PageLayout], dtype: torch.dtype) -> str | None:
    """Why pages do not fit into shared memory, or None."""
    needed, room = page_room(layouts, dtype), shared_room(device)
    if needed <= room:
        return None
    dim, tokens = max(layouts[0].key.dim, layouts[0].value.dim), layouts[0].tokens
    return (
        f"a page of {tokens} tokens with a head_dim of {dim} in {dtype} takes {needed:,} bytes of shared memory, and "
        f"the GPU has {room:,}"
    )


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("Triton's kernels are not used, plain torch is, which is slower: %s", reason)


def kernels_for(
    device: torch.device,
    layouts: list[PageLayout],
    dtype: torch.dtype,
    spaces: dict[torch.device, Any],
    compiled: bool = False,
) -> Kernels:
    """The kernels of a layer.

    Args:
        spaces: the workspaces that the layers of a cache share, one per device.
        compiled: whether loops are asked for on the CPU (`hfkv.compile_decode`), however little there is to read.

    Raises:
        ValueError: loops are asked for, by this or by `HFKV_BACKEND`, where there is no compiler; or see `choose`.
    """
    chosen = choose(device, layouts, dtype)
    if chosen == "torch":
        return PlainKernels()
    if chosen == "inductor":
        if not (compiled or _asked() == "inductor"):
            return CompiledKernels(LEAST)
        require_compiler()
        return CompiledKernels()
    from hfkv.backends.fused import FusedKernels  # here and not above: these import triton
    from hfkv.backends.packs import PackKernels

    packed = any(layout.pack is not None for layout in layouts)
    return PackKernels(device, spaces) if packed else FusedKernels(device, spaces)
