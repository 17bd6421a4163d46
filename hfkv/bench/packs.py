"""A decode step over packed tiers beside plain ones and a dense product in fp16, on keys with channel offsets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfkv.bench import caches
from hfkv.bench.results import Cell
from hfkv.bench.session import Session
from hfkv.bench.sizes import Shape, Sizes
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig
from hfkv.packing import Packed

PART = "packs"
DENSE = "fp16 matrix-vector product"
CONFIGS = {
    "k8v4": LeanKVConfig(tiers=((8, 4),), page_tokens=64),
    "k4v2": LeanKVConfig(tiers=((4, 2),), page_tokens=64),
    "packed k4v2": LeanKVConfig(tiers=(Packed(key_bits=4, value_bits=2, sides="keys", repack="none"),)),
    "packed 0.1/0.2": LeanKVConfig(tiers=(Packed(),), rotate_keys=False),
}
KINDS = (*CONFIGS, DENSE)
LONGEST = 32 << 10
OFFSET = 3.0
"""Size of a channel's own offset, in units of what varies from token to token."""


def cells(sizes: Sizes, device: torch.device) -> list[Cell]:
    """Every cache at the shortest and the longest length (at most 32k) and batch, in the first shape."""
    lengths = [tokens for tokens in sizes.decode_tokens if tokens <= LONGEST]
    points = dict.fromkeys([(lengths[0], sizes.decode_batches[0]), (lengths[-1], min(8, sizes.decode_batches[-1]))])
    return [Cell(PART, name, sizes.decode_shapes[0], 1, *at) for at in points for name in KINDS]


def measure(session: Session, cell: Cell) -> list[dict[str, Any]]:
    """One row: time, bytes, bandwidth."""
    assert isinstance(cell.batch, int)
    exact = caches.exact_bytes(cell.shape, 1, cell.batch, cell.tokens, session.like)
    held: dict[str, Any] = {"exact_bytes": exact}
    if cell.cache == DENSE:
        matrix = dense_matrix(cell, session.like)
        held |= {"physical_bytes": matrix.nbytes, "read_bytes": matrix.nbytes}
        step: Callable[[], Tensor] = partial(torch.mv, matrix, matrix.new_ones(matrix.shape[1]))
    else:
        cache = filled(cell, session.like)
        report = cache.report()
        read = sum(report.bytes.get(name, 0) for name in ("codes", "pack_headers", "metadata", "window"))
        held |= {"physical_bytes": report.physical_bytes, "exact_bytes": report.exact_bytes, "read_bytes": read}
        held["backend"] = report.backend
        step = lean_step(cache, cell, session.like)
    if not bool(step().isfinite().all()):
        raise RuntimeError(f"attention of {cell} is not finite")
    timing = session.clock.time(step)
    gbps = held["read_bytes"] / timing.ms / 1e6
    timed = {"ms": timing.ms, "launch": timing.launch, "eager_ms": timing.eager_ms, "note": timing.note}
    shares = {"gbps": gbps, "copy_share": gbps / session.copy_gbps}
    return [{"status": "ok", "sequences": cell.batch, **held, **timed, **shares}]


def filled(cell: Cell, like: Tensor) -> LeanKVCache:
    """A cache of one layer after a prompt whose keys have an offset in every channel, as a model's have."""
    cache, shape = LeanKVCache(CONFIGS[cell.cache]), cell.shape
    offset = OFFSET * like.new_empty(1, shape.kv_heads, 1, shape.head_dim).normal_()
    assert isinstance(cell.batch, int)
    k, v = (caches.random_keys(shape, cell.batch, cell.tokens, like) for _ in range(2))
    caches.attend(cache.update(k + offset, v, 0), caches.random_query(shape, cell.batch, like))
    return cache


def lean_step(cache: LeanKVCache, cell: Cell, like: Tensor) -> Callable[[], Tensor]:
    """One more token and its attention, to be repeated."""
    shape = cell.shape
    assert isinstance(cell.batch, int)
    k, v = (caches.random_keys(shape, cell.batch, 1, like) for _ in range(2))
    handles, q = cache.update(k, v, 0), caches.random_query(shape, cell.batch, like)
    with torch.no_grad():
        caches.attend(handles, q)

    @torch.no_grad()
    def step() -> Tensor:
        return caches.attend(handles, q)

    return step


def dense_matrix(cell: Cell, like: Tensor) -> Tensor:
    """A matrix in fp16 of as many numbers as the exact cache holds; its rows are 2 head_dim long."""
    shape: Shape = cell.shape
    assert isinstance(cell.batch, int)
    size = (cell.batch * shape.kv_heads * cell.tokens, 2 * shape.head_dim)
    return like.new_empty(size).uniform_(-0.1, 0.1).half()
