"""The CPU path under `hfkv.compile_decode`: decode steps by compiled loops, all else by plain torch."""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hfkv.attend import Call, Past, attend_chunk, attend_step, sink_rows
from hfkv.backends.plain import PlainKernels, StillWork
from hfkv.handle import Chunk
from hfkv.kernels.decode_attention import WorkList
from hfkv.kernels.loops import StepShape, TierPages, step_loops
from hfkv.paging.addressed import loop_pages, no_pages
from hfkv.paging.packed import PackedLayer
from hfkv.quant import PageLayout

logger = logging.getLogger("hfkv")

MOST_QUERIES = 16
"""Queries of one KV head, over all heads of its group, up to which loops are used: each query reads all codes anew."""

SERIAL = 49152
"""Slots that all queries of a layer read together, up to which one thread reads them: others would not wake in time.
On two threads 2,000 tokens of three heads with three queries each take 0.33 ms, on one 0.25 ms."""

Step = Callable[..., Tensor]


class CompiledKernels(PlainKernels):
    """`Kernels` by the twins, with compiled loops for the few queries of a decode step."""

    name = "inductor"

    @staticmethod
    def view(packed: PackedLayer) -> LoopView:  # type: ignore[override]
        """The pages as they are now, in both forms."""
        work = packed.work()
        if "loops" not in work.derived:
            work.derived["loops"] = LoopView(work, tuple(packed.layouts), loop_pages(packed))
        return work.derived["loops"]

    @staticmethod
    def attend_step(past: Past, q: Tensor, call: Call) -> Tensor:
        view: LoopView = past.view
        step = view.step(past, q, call)
        if step is None:
            return attend_step(replace(past, view=view.work), q, call)
        return step(*_arguments(past, view.work, q, call), view.pages).view(*q.shape[:3], -1)

    @staticmethod
    def attend_chunk(
        past: Past, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, observed: int
    ) -> tuple[Tensor, Tensor | None]:
        return attend_chunk(replace(past, view=past.view.work), chunk, q, valid, call, observed)

    @staticmethod
    def still(past: Past, before: StillWork | None) -> StillWork:
        return PlainKernels.still(replace(past, view=past.view.work), before)


@dataclass
class LoopView:
    """A layer's pages between two flushes, for plain torch and for loops.

    Attributes:
        work: for plain torch.
        layouts: of the tiers.
        pages: of each tier, see `hfkv.kernels.loops.step_loops`; None where these pages are not for loops.
    """

    work: WorkList
    layouts: tuple[PageLayout, ...]
    pages: list[TierPages] | None
    _steps: dict[tuple, Step | None] = field(default_factory=dict)

    @functools.cached_property
    def slots(self) -> int:
        """Slots of all rows that loops read."""
        pages = zip(self.pages or [], self.layouts, strict=False)
        return sum(which.numel() * layout.tokens for (_, which, _), layout in pages)

    @property
    def nbytes(self) -> int:
        return sum(which.nbytes + used.nbytes for _, which, used in self.pages or [])

    def step(self, past: Past, q: Tensor, call: Call) -> Step | None:
        """The loops for such a step; None where plain torch is to take it."""
        key = (q.shape[2], call.scaling, call.softcap, call.sinks is None)
        if key not in self._steps:
            groups = q.shape[1] // past.window.heads
            fits = self.pages is not None and groups * q.shape[2] <= MOST_QUERIES
            self._steps[key] = _compiled(self._shape(past, q, call, groups), self.work) if fits else None
        return self._steps[key]

    def _shape(self, past: Past, q: Tensor, call: Call, groups: int) -> StepShape:
        folding = self.work.folding
        columns = [(part.start, part.stop) for part in (*folding.keys, folding.total, folding.rotated)]
        return StepShape(
            layouts=self.layouts,
            keys=tuple(columns[:-2]),
            total=columns[-2],
            rotated=columns[-1],
            groups=groups,
            slots=past.window.capacity,
            scaling=call.scaling,
            softcap=call.softcap,
            dtype=q.dtype,
            absent=(call.sinks is None, self.work.mean is None),
            single=(self.work.rows == 1, q.shape[2] == 1),
            serial=self.slots * groups * q.shape[2] <= SERIAL,
        )


def _arguments(past: Past, work: WorkList, q: Tensor, call: Call) -> tuple:
    """What `step_loops` asks for before the pages."""
    window, folding = past.window, work.folding
    k, v = (x.contiguous().flatten(0, 1) for x in (window.k, window.v))
    rows = q.contiguous().view(work.rows, -1, *q.shape[2:])
    sinks = sink_rows(q, window.heads, call)
    return rows, k, v, past.fill.of_rows(window.heads), sinks, folding.queries, work.mean, list(folding.values)


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


_made: dict[StepShape, Step | None] = {}
_making = threading.Lock()


def _compiled(shape: StepShape, work: WorkList) -> Step | None:
    """The loops for a shape, compiled at its first use; None where they could not be."""
    with _making:
        if shape not in _made:
            _made[shape] = _make(shape, work)
        return _made[shape]


def _make(shape: StepShape, work: WorkList) -> Step | None:
    """Compile on sizes of which no two are the same by chance: equal ones would be taken for one."""
    loops = step_loops(shape)
    code = loops.__code__.replace(co_name=loops.__name__)  # torch.compile counts recompilations by code object
    own = types.FunctionType(code, loops.__globals__, loops.__name__, loops.__defaults__, loops.__closure__)
    unguarded = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # `StepShape` says what guards would ask
    options = {} if unguarded is None else {"guard_filter_fn": unguarded}
    options |= {"cpp.threads": 1} if shape.serial else {}
    step = torch.compile(own, fullgraph=True, options=options)
    try:
        with torch.inference_mode(False), torch.no_grad():
            step(*_example(shape, work))
    except Exception as error:
        logger.warning("decode steps are left to plain torch, compiling their loops failed: %s", _first_line(error))
        return None
    return step


def _example(shape: StepShape, work: WorkList) -> tuple:
    """Arguments of `step_loops`, with the sizes marked that are open."""
    rows, queries = (1 if single else size for single, size in zip(shape.single, (3, 5), strict=True))
    dims = (shape.layouts[0].key.dim, shape.layouts[0].value.dim)
    q = torch.zeros(rows, shape.groups, queries, dims[0], dtype=shape.dtype)
    k, v = (torch.zeros(rows, shape.slots, dim, dtype=shape.dtype) for dim in dims)
    filled = torch.full((rows,), queries)
    sinks = None if shape.absent[0] else torch.zeros(rows, shape.groups * queries)
    mean = None if shape.absent[1] else torch.zeros(rows, dims[0])
    pages = []
    for tier, layout in enumerate(shape.layouts):
        which = torch.zeros(rows, 101 + 2 * tier, dtype=torch.int64)
        pages.append((no_pages(layout, 51 + 2 * tier), which, torch.zeros_like(which, dtype=torch.int32)))
    per_row = [q, k, v, filled, sinks, mean, *(x for part in pages for x in part[1:])]
    opened = [(x, 0) for x in per_row if x is not None and not shape.single[0]]
    opened += [(x, 2 if x is q else 1) for x in (q, sinks) if x is not None and not shape.single[1]]
    opened += [(part[0], 0) for part in pages] + [(x, 1) for part in pages for x in part[1:]]
    for x, dim in opened:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    folding = work.folding
    return q, k, v, filled, sinks, folding.queries, mean, list(folding.values), pages


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
