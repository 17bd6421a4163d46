"""Thousands of generated tokens: time per step and memory as the cache grows."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from hfkv.bench import caches
from hfkv.bench.caches import DYNAMIC
from hfkv.bench.results import STOPPED, Cell
from hfkv.bench.session import Session
from hfkv.bench.sizes import Sizes
from hfkv.bench.timing import held_bytes

PART = "long"
KINDS = (DYNAMIC, "k8v4", "mixed")


def cells(sizes: Sizes, device: torch.device) -> list[Cell]:
    """One run per cache, of few layers: only their growth matters here."""
    heads = sizes.model.heads
    at = (sizes.long_prompt, sizes.long_batch, sizes.long_tokens)
    return [Cell(PART, name, heads, sizes.long_layers, *at) for name in KINDS]


@torch.no_grad()
def measure(session: Session, cell: Cell) -> list[dict[str, Any]]:
    """One row per `long_every` tokens: median and mean step (the mean has the flushes in it), bytes held."""
    assert isinstance(cell.batch, int)
    assert cell.last_step is not None
    model = session.model(cell.layers, caches.attention_of(cell.cache))
    cache = caches.new_cache(cell.cache, model.config)
    before = held_bytes(session.device)
    model(input_ids=session.random_ids(cell.batch, cell.tokens), past_key_values=cache, logits_to_keep=1)
    ids, every = session.random_ids(cell.batch, 1), session.sizes.long_every
    rows: list[dict[str, Any]] = []
    for first in range(0, cell.last_step, every):
        count = min(every, cell.last_step - first)
        times = [session.clock.once(lambda: model(input_ids=ids, past_key_values=cache)) for _ in range(count)]
        step, held = first + count, held_bytes(session.device)
        rows.append(
            {
                "status": "ok",
                "step": step,
                "sequences": cell.batch,
                "ms": statistics.median(times),
                "mean_ms": statistics.fmean(times),
                "launch": "eager",
                "tokens_per_second": 1000 * cell.batch / statistics.fmean(times),
                "physical_bytes": caches.physical_bytes(cache),
                "exact_bytes": caches.exact_bytes(
                    cell.shape, cell.layers, cell.batch, cell.tokens + step, session.like
                ),
                "held_bytes": None if held is None or before is None else held - before,
                "backend": cache.report().backend if hasattr(cache, "report") else "",
            }
        )
        if session.seconds_left < 5 and step < cell.last_step:
            rows[-1]["note"] = STOPPED
            break
    return rows
