"""Attention of one decode step over a filled cache of one layer, beside exact attention over plain tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfkv.bench import caches
from hfkv.bench.caches import LEAN, Unavailable
from hfkv.bench.results import Cell
from hfkv.bench.session import Session
from hfkv.bench.sizes import Shape, Sizes
from hfkv.bench.timing import Timing
from hfkv.cache import LeanKVCache

PART = "decode"

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa": None,  # whatever torch chooses; the only one on a CPU
}
NO_KERNEL = "No available kernel", "No viable backend"
"""What torch says where a kernel that was asked for does not take the inputs."""

FOLDED = " folded"
"""The query heads of a group are given as queries of their KV head: the same attention, its keys read once."""

FLEX = "flex"
GPU_REFERENCES = ("flash", "flash folded", "cudnn", "cudnn folded", FLEX)
CPU_REFERENCES = ("sdpa", "sdpa folded")
REFERENCES = (*GPU_REFERENCES, *CPU_REFERENCES)


def cells(sizes: Sizes, device: torch.device) -> list[Cell]:
    """Every length, batch, shape and cache, those that the goals ask for first; what has to be compiled anew last."""
    every = [(tokens, batch) for tokens in sizes.decode_tokens for batch in sizes.decode_batches]
    points = list(dict.fromkeys([*sizes.decode_first, *every]))
    references = GPU_REFERENCES if device.type == "cuda" else CPU_REFERENCES
    found = []
    for tokens, batch in points:
        names = [r for r in references if r != FLEX or tokens in sizes.flex_tokens]
        for shape in sizes.decode_shapes:
            found += [Cell(PART, name, shape, 1, tokens, batch) for name in (*LEAN, *names)]
    return sorted(found, key=lambda cell: cell.cache == FLEX)


def measure(session: Session, cell: Cell) -> list[dict[str, Any]]:
    """One row: time, bytes, bandwidth."""
    assert isinstance(cell.batch, int)
    exact = caches.exact_bytes(cell.shape, 1, cell.batch, cell.tokens, session.like)
    if cell.cache in LEAN:
        cache, step = lean_step(session, cell.cache, cell.shape, cell.batch, cell.tokens)
        report = cache.report()
        held = {
            "physical_bytes": report.physical_bytes,
            "exact_bytes": report.exact_bytes,
            "read_bytes": caches.read_bytes(cache),
            "backend": report.backend,
        }
    else:
        step = reference_step(session, cell.cache, cell.shape, cell.batch, cell.tokens)
        held = {"physical_bytes": exact, "exact_bytes": exact, "read_bytes": exact}
    with exact_kernel(cell.cache):
        _check(step(), cell)
        timing = session.clock.time(step)
    return [{"status": "ok", "sequences": cell.batch, **_timed(session, timing, held)}]


def lean_step(
    session: Session, name: str, shape: Shape, batch: int, tokens: int
) -> tuple[LeanKVCache, Callable[[], Tensor]]:
    """A cache of one layer that holds `tokens` tokens, midway between two flushes, and its last step to repeat."""
    cache = caches.new_cache(name)
    assert isinstance(cache, LeanKVCache)
    midway = cache.config.flush // 2
    caches.fill(cache, shape, 1, batch, tokens - midway, session.like)
    handles = None
    for count in (midway - 1, 1):
        k, v = (caches.random_keys(shape, batch, count, session.like) for _ in range(2))
        handles = cache.update(k, v, 0)
        q = caches.random_query(shape, batch, session.like)
        with torch.no_grad():
            caches.attend(handles, q)
    assert handles is not None
    last = handles

    @torch.no_grad()
    def step() -> Tensor:
        return caches.attend(last, q)

    return cache, step


def reference_step(session: Session, name: str, shape: Shape, batch: int, tokens: int) -> Callable[[], Tensor]:
    """Exact attention of one query token over plain keys and values, to be called inside `exact_kernel(name)`."""
    q = caches.random_query(shape, batch, session.like)
    k, v = (caches.random_keys(shape, batch, tokens, session.like) for _ in range(2))
    if name == FLEX:
        return _flex_step(q, k, v)
    grouped = not name.endswith(FOLDED)
    if not grouped:
        q = q.view(batch, shape.kv_heads, -1, shape.head_dim)

    @torch.no_grad()
    def step() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    return step


@contextlib.contextmanager
def exact_kernel(name: str) -> Iterator[None]:
    """Inside, torch's SDPA uses the kernel that a reference is named after; for any other name nothing changes.

    Raises:
        Unavailable: this machine has no such kernel for what it is called with.
    """
    backend = SDPA.get(name.removesuffix(FOLDED))
    if backend is None:
        yield
        return
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch explains at length why a kernel does not fit
        try:
            yield
        except RuntimeError as error:
            if not any(said in str(error) for said in NO_KERNEL):
                raise
            raise Unavailable(f"torch {torch.__version__} has no {name} kernel for this") from error


def _flex_step(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # else many lengths exhaust the limit of recompilations, and it would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)

    @torch.no_grad()
    def step() -> Tensor:
        return compiled(q, k, v, enable_gqa=True)

    return step


def _timed(session: Session, timing: Timing, held: dict[str, Any]) -> dict[str, Any]:
    gbps = held["read_bytes"] / timing.ms / 1e6
    return {
        **held,
        "ms": timing.ms,
        "launch": timing.launch,
        "eager_ms": timing.eager_ms,
        "gbps": gbps,
        "copy_share": gbps / session.copy_gbps,
        "note": timing.note,
    }


def _check(out: Tensor, cell: Cell) -> None:
    """A kernel that is timed must at least have answered."""
    if out.numel() != int(cell.batch) * cell.shape.q_heads * cell.shape.head_dim or not bool(out.isfinite().all()):
        raise RuntimeError(f"attention of {cell} gave {tuple(out.shape)}, finite: {bool(out.isfinite().all())}")
