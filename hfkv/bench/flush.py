"""What a flush costs: steps of a model over a filled cache, those that flush beside those that do not."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from hfkv.bench import caches
from hfkv.bench.results import Cell
from hfkv.bench.session import Session
from hfkv.bench.sizes import Sizes
from hfkv.cache import LeanKVCache

PART = "flush"
KINDS = ("k8v4", "mixed")
FLUSHES = 3


def cells(sizes: Sizes, device: torch.device) -> list[Cell]:
    """The two presets at every length and batch of the sizes."""
    model = sizes.model
    return [Cell(PART, name, model.heads, model.layers, *at) for at in sizes.flush_at for name in KINDS]


@torch.no_grad()
def measure(session: Session, cell: Cell) -> list[dict[str, Any]]:
    """One row: median step without a flush, what a flushing step takes beyond it, its share of all decode time."""
    assert isinstance(cell.batch, int)
    model = session.model(cell.layers, "leankv")
    cache = caches.new_cache(cell.cache, model.config)
    assert isinstance(cache, LeanKVCache)
    caches.fill(cache, cell.shape, cell.layers, cell.batch, cell.tokens, session.like)
    ids = session.random_ids(cell.batch, 1)
    plain: list[float] = []
    flushing: list[float] = []
    while len(flushing) < FLUSHES + 1:  # the first warms up
        before = cache.lean_layers[0].generation
        milliseconds = session.clock.once(lambda: model(input_ids=ids, past_key_values=cache))
        (plain if cache.lean_layers[0].generation == before else flushing).append(milliseconds)
    step = statistics.median(plain)
    flush = statistics.median(flushing[1:]) - step
    return [
        {
            "status": "ok",
            "sequences": cell.batch,
            "ms": step,
            "launch": "eager",
            "flush_ms": flush,
            "flush_share": flush / (flush + cache.config.flush * step),
            "physical_bytes": cache.report().physical_bytes,
            "exact_bytes": cache.report().exact_bytes,
            "backend": cache.report().backend,
        }
    ]
