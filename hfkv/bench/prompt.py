"""A prompt through a random Llama: time beside the exact cache's, taken in turn, and peak memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hfkv.bench import caches
from hfkv.bench.caches import DYNAMIC
from hfkv.bench.results import Cell
from hfkv.bench.session import Session
from hfkv.bench.sizes import Sizes
from hfkv.bench.timing import free_memory, peak_above

PART = "prompt"
NO_CACHE = "no cache"
"""The same forward with nothing cached: what a peak is compared with."""

KINDS = (NO_CACHE, DYNAMIC, "k8v4", "mixed")
LONG = 64 * 1024
"""Prompts of this many tokens and more are run once, without a repeat."""

REPEATS = 5


def cells(sizes: Sizes, device: torch.device) -> list[Cell]:
    """Every length and cache at batch 1."""
    model = sizes.model
    return [Cell(PART, name, model.heads, model.layers, tokens, 1) for tokens in sizes.prompt_tokens for name in KINDS]


def measure(session: Session, cell: Cell) -> list[dict[str, Any]]:
    """One row: median time, DynamicCache's in turn with it, peak memory above the weights, bytes held afterwards."""
    ids = session.random_ids(1, cell.tokens)
    row: dict[str, Any] = {"status": "ok", "sequences": 1}
    if cell.tokens < LONG:
        times: dict[str, list[float]] = {cell.cache: [], DYNAMIC: []}
        for repeat in range(REPEATS + 1):
            for name, taken in times.items():
                milliseconds = session.clock.once(lambda name=name: _prompt(session, cell.layers, name, ids))  # type: ignore[misc]
                if repeat:
                    taken.append(milliseconds)
        row |= {"ms": statistics.median(times[cell.cache]), "reference_ms": statistics.median(times[DYNAMIC])}
    caches_made: list[Cache | None] = []
    free_memory(session.device)
    row["peak_bytes"] = peak_above(
        session.device, lambda: caches_made.append(_prompt(session, cell.layers, cell.cache, ids))
    )
    cache = caches_made[0]
    if cache is not None:
        row["physical_bytes"] = caches.physical_bytes(cache)
        row["exact_bytes"] = caches.exact_bytes(cell.shape, cell.layers, 1, cell.tokens, session.like)
        row["backend"] = cache.report().backend if hasattr(cache, "report") else ""
    return [row]


@torch.no_grad()
def _prompt(session: Session, layers: int, name: str, ids: Tensor) -> Cache | None:
    model = session.model(layers, caches.attention_of(name))
    cache = None if name == NO_CACHE else caches.new_cache(name, model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    return cache
