"""The CPU path under `hfkv.compile_decode`: decode steps read codes by compiled loops, all else is plain torch."""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.attend import Call, Past, attend_step
from hfkv.backends.plain import PlainKernels, StillWork
from hfkv.kernels.decode_attention import PageBlock, Values, Widened
from hfkv.kernels.loops import fits, key_loop, value_loop
from hfkv.kernels.page_codes import Scratch
from hfkv.quant import PageLayout

logger = logging.getLogger("hfkv")

MOST_QUERIES = 16
"""Queries of one row, over all heads of its group, up to which loops are used: each query reads all codes anew."""


class CompiledKernels(PlainKernels):
    """`Kernels` by the twins, with compiled loops for the few queries of a decode step."""

    name = "inductor"

    @staticmethod
    def attend_step(past: Past, q: Tensor, call: Call) -> Tensor:
        queries = q.shape[1] // past.window.heads * q.shape[2]
        read = Looped(Widened(Scratch(q.device))) if queries <= MOST_QUERIES else None
        return attend_step(past, q, call, read)

    @staticmethod
    def attend_still(still: StillWork, past: Past, q: Tensor, call: Call) -> Tensor:
        return CompiledKernels.attend_step(Past(past.packed, still.work, past.window, past.fill), q, call)


@dataclass(frozen=True)
class Looped:
    """`Read` by loops where they can, else by `widened`."""

    widened: Widened

    def __call__(self, block: PageBlock, q: Tensor, total: Tensor, constant: Tensor | None) -> tuple[Tensor, Values]:
        pages, which = block.addressed() if fits(block.layout) else (None, None)
        loops = None if which is None else _loops(block.layout, (*which.shape, q.shape[1]))
        if pages is None or which is None or loops is None:
            return self.widened(block, q, total, constant)
        logits = loops.keys(pages, which, q.contiguous(), total.contiguous()).flatten(2)
        if constant is not None:
            logits.add_(constant)
        return logits, LoopedValues(block, pages, which, loops)


@dataclass(slots=True)
class LoopedValues:
    """The values of a block that are read by a loop."""

    block: PageBlock
    pages: Tensor
    which: Tensor
    loops: Loops

    def weighed(self, p: Tensor) -> Tensor:
        p = p.contiguous().view(*p.shape[:2], -1, self.block.layout.tokens)
        return self.loops.values(self.pages, self.which, p)


@dataclass(frozen=True)
class Loops:
    """The compiled loops of a page layout."""

    keys: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    values: Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- compiling ---------------------------------------------------------------------------------------------------


def require_compiler() -> None:
    """Raise ValueError where torch.compile cannot make loops for the CPU."""
    reason = _obstacle()
    if reason is not None:
        raise ValueError(
            f"loops for the CPU need torch.compile with a C++ compiler: {reason}; install g++ or clang++, or decode "
            "without hfkv.compile_decode and HFKV_BACKEND=inductor"
        )


@functools.cache
def _obstacle() -> str | None:
    try:
        with torch.inference_mode(False), torch.no_grad():
            torch.compile(_probe, fullgraph=True, dynamic=False)(torch.ones(64))
    except Exception as error:
        return _first_line(error)
    return None


def _probe(x: Tensor) -> Tensor:
    return (x * 2).sum()


_compiled: dict[tuple[PageLayout, tuple[bool, ...]], Loops | None] = {}
_compiling = threading.Lock()


def _loops(layout: PageLayout, sizes: tuple[int, ...]) -> Loops | None:
    """The loops of a layout for any sizes (rows, pages of each, queries); None where they could not be compiled.

    A size of 1 is one that torch.compile takes for a constant, so there are loops of their own for it.
    """
    key = (layout, tuple(size == 1 for size in sizes))
    if key not in _compiled:
        with _compiling:
            if key not in _compiled:
                _compiled[key] = _compile(layout, sizes)
    return _compiled[key]


def _compile(layout: PageLayout, sizes: tuple[int, ...]) -> Loops | None:
    rows, pages, queries = sizes
    stored = torch.zeros(8 * 7 + layout.page_bytes, dtype=torch.uint8).as_strided((8, layout.page_bytes), (8, 1))
    which = torch.zeros(rows, pages, dtype=torch.int32)
    q, total = torch.zeros(rows, queries, layout.key.columns), torch.zeros(rows, queries, 1)
    p = torch.zeros(rows, queries, pages, layout.tokens)
    open_ended = [(stored, 0), (which, 0), (which, 1), (q, 0), (q, 1), (total, 0), (total, 1), (p, 0), (p, 1), (p, 2)]
    for x, dim in open_ended:
        if x.shape[dim] > 1:
            torch._dynamo.mark_dynamic(x, dim)
    loops = Loops(_own(key_loop(layout)), _own(value_loop(layout)))
    try:
        loops.keys(stored, which, q, total)
        loops.values(stored, which, p)
    except Exception as error:
        logger.warning(
            "codes of K%dV%d are read by plain torch, not by compiled loops: %s",
            layout.key.bits,
            layout.value.bits,
            _first_line(error),
        )
        return None
    return loops


def _own(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loop, compiled, under a code object of its own: torch.compile counts recompilations by code object."""
    code = loop.__code__.replace(co_name=loop.__name__)
    fresh = types.FunctionType(code, loop.__globals__, loop.__name__, loop.__defaults__, loop.__closure__)
    return torch.compile(fresh, fullgraph=True)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
