"""`model.generate` behind a long context: tokens per second at batch 1, and at the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from hfkv.bench import caches
from hfkv.bench.caches import DYNAMIC, GRAPHS, QUANTIZED, STATIC, STATIC_COMPILED
from hfkv.bench.results import LARGEST, Cell
from hfkv.bench.session import Session
from hfkv.bench.sizes import Sizes
from hfkv.bench.timing import free_memory, held_bytes, peak_above
from hfkv.graphs.decode import compile_decode, decode_report, remove

PART = "generate"
LEAN_KINDS = ("k8v4", "mixed")
WARM_UP = 4
"""Tokens before the measured ones: a compiled step records its graph at its second call, or third."""

PROBE = 2
"""Sequences from which the bytes of one more are estimated."""

FIRST_GUESS, NEXT_GUESS, GUESSES = 0.97, 0.95, 10


def cells(sizes: Sizes, device: torch.device) -> list[Cell]:
    """The goals' comparison first, then batch 1, then the other caches; compilation last."""
    model = sizes.model
    largest: tuple[int, int | str] = (sizes.largest_tokens, LARGEST)
    single: list[tuple[int, int | str]] = [(tokens, 1) for tokens in sizes.single_tokens]
    points: list[tuple[str, tuple[int, int | str]]] = [(name, largest) for name in (DYNAMIC, *LEAN_KINDS)]
    points += [(name, at) for at in single for name in (DYNAMIC, *LEAN_KINDS)]
    for others in ((STATIC,), tuple(QUANTIZED)):
        points += [(name, at) for at in (largest, *single) for name in others]
    if device.type == "cuda":
        points += [(name, at) for at in single for name in (*GRAPHS, STATIC_COMPILED)]
    return [Cell(PART, name, model.heads, model.layers, *at) for name, at in points]


def measure(session: Session, cell: Cell) -> list[dict[str, Any]]:
    """One row: tokens per second of `generate`, all sequences together, and bytes."""
    if cell.batch == LARGEST:
        return [_largest(session, cell)]
    return [_generate(session, cell, int(cell.batch))]


def _generate(session: Session, cell: Cell, batch: int) -> dict[str, Any]:
    """Fill a cache with random keys and values, then let `generate` go on from it."""
    model = session.model(cell.layers, caches.attention_of(cell.cache))
    if cell.cache not in GRAPHS:
        return _timed(session, cell, batch, "compiled" if cell.cache == STATIC_COMPILED else "eager")
    compile_decode(model)
    try:
        row = _timed(session, cell, batch, "graph")
        report = decode_report(model)
        return row if report.replayed else row | {"launch": "eager", "note": "; ".join(report.eager)}
    finally:
        remove(model)


def _timed(session: Session, cell: Cell, batch: int, launch: str) -> dict[str, Any]:
    sizes, model = session.sizes, session.model(cell.layers, caches.attention_of(cell.cache))
    cache = caches.new_cache(cell.cache, model.config, cell.tokens + WARM_UP + sizes.new_tokens + 8)
    caches.fill(cache, cell.shape, cell.layers, batch, cell.tokens, session.like)
    compiled = launch == "compiled"
    _run(session, cell, cache, batch, cell.tokens, WARM_UP, compiled)
    times: list[float] = []
    seen = cell.tokens + WARM_UP
    work: Callable[[], object] = lambda: times.append(  # noqa: E731
        session.clock.once(lambda: _run(session, cell, cache, batch, seen, sizes.new_tokens, compiled))
    )
    peak = peak_above(session.device, work)
    return {
        "status": "ok",
        "sequences": batch,
        "ms": times[0] / sizes.new_tokens,
        "launch": launch,
        "tokens_per_second": 1000 * batch * sizes.new_tokens / times[0],
        "physical_bytes": caches.physical_bytes(cache),
        "exact_bytes": caches.exact_bytes(cell.shape, cell.layers, batch, seen + sizes.new_tokens, session.like),
        "peak_bytes": peak,
        "held_bytes": held_bytes(session.device),
        "backend": cache.report().backend if hasattr(cache, "report") else "",
    }


def _run(session: Session, cell: Cell, cache: Cache, batch: int, seen: int, new: int, compiled: bool) -> None:
    """`new` tokens behind a cache that holds `seen`; the prompt's last token is the one that is not cached yet."""
    model: Any = session.model(cell.layers, caches.attention_of(cell.cache))
    ids = session.random_ids(batch, seen + 1)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        disable_compile=not compiled,
    )
    if out.shape[1] != seen + 1 + new:
        raise RuntimeError(f"generate made {out.shape[1] - seen - 1} of {new} tokens")


def _largest(session: Session, cell: Cell) -> dict[str, Any]:
    """Try batches downwards from what a small batch's bytes promise, until one runs.

    Raises:
        TimeoutError: the budget ends before one is found.
    """
    room, per_sequence = _room(session, cell)
    limit = session.sizes.room_bytes
    batch = max(1, int(FIRST_GUESS * room / per_sequence))
    for _ in range(GUESSES):
        if session.seconds_left <= 0:
            raise TimeoutError(f"the budget is used up before a batch was found; {batch} is the next to try")
        try:
            row = _generate(session, cell, batch)
        except torch.OutOfMemoryError:
            row = None
        if row is not None and (limit is None or row["physical_bytes"] <= limit or batch == 1):
            return row | ({} if limit is None else {"note": f"caches may take {limit / 2**20:.0f} MiB"})
        free_memory(session.device)
        taken = 1.0 if row is None or limit is None else limit / row["physical_bytes"]
        batch = max(1, int(batch * min(NEXT_GUESS, taken)))
    raise torch.OutOfMemoryError(f"no batch down to {batch} fits")


def _room(session: Session, cell: Cell) -> tuple[float, float]:
    """Bytes that are free beside the weights, and those that one sequence's cache takes."""
    model = session.model(cell.layers, caches.attention_of(cell.cache))
    free_memory(session.device)
    room = session.sizes.room_bytes
    if room is None:
        room = torch.cuda.mem_get_info(session.device)[0]
    cache = caches.new_cache(cell.cache, model.config, cell.tokens + WARM_UP + session.sizes.new_tokens + 8)
    caches.fill(cache, cell.shape, cell.layers, PROBE, cell.tokens, session.like)
    return room, caches.physical_bytes(cache) / PROBE
