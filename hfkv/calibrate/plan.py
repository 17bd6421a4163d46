"""From errors and bytes of options to the best choice: the knapsack, and the pages that a choice really takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.calibrate.knapsack import Frontier
from hfkv.calibrate.options import Option, Sizes
from hfkv.paging.pool import PagePool
from hfkv.quant import PageLayout

ATTEMPTS = 6
"""Limits that the knapsack is given until the pages of its choice fit."""


@dataclass(frozen=True)
class Choice:
    """An option per layer, the sum of their errors (nats), and the bytes of the pages that hold a prompt (the mean)."""

    options: dict[int, Option]
    kl: float
    bytes: float


class Planner:
    """Chooses an option per layer.

    Every layout that a choice uses holds part of a chunk that is not full, so few layouts are better than many: beside
    the sums that the knapsack knows, whole choices are compared by the pages that a pool would really take for them,
    and layouts are left out as long as that helps.

    Args:
        sizes: by layer.
        options: what every layer may be.
        errors: mean KL of every option, by layer, float64 [options].
    """

    def __init__(self, sizes: dict[int, Sizes], options: list[Option], errors: dict[int, Tensor]) -> None:
        self._sizes, self._options, self._errors = sizes, options, errors
        self._costs = {
            layer: torch.tensor([round(option.page_bytes(size)) for option in options]) for layer, size in sizes.items()
        }
        self._pages = {layer: [o.pages(size) for o in options] for layer, size in sizes.items()}
        self._layouts = {layer: [tuple(o.layouts(size)) for o in options] for layer, size in sizes.items()}

    def cheapest(self) -> Choice:
        return self._choice({layer: int(cost.argmin()) for layer, cost in self._costs.items()})

    def page_bytes(self, layer: int, option: Option) -> int:
        """Bytes of a layer's pages, the mean over prompts."""
        return int(self._costs[layer][self._options.index(option)])

    def within_bytes(self, limit: float) -> Choice | None:
        """The choice with the least error whose pages take at most `limit` bytes; None where there is none."""
        return self._fewer_layouts(lambda allowed: self._fitting(allowed, limit), lambda choice: choice.kl)

    def within_error(self, limit: float) -> Choice | None:
        """The choice with the fewest bytes whose errors add up to at most `limit`; None where there is none."""

        def cheapest(allowed: set[PageLayout]) -> Choice | None:
            solver = self._solver(allowed)
            return None if solver is None else solver.take(solver.frontier.within_error(limit))

        return self._fewer_layouts(cheapest, lambda choice: choice.bytes)

    def _fewer_layouts(
        self, solve: Callable[[set[PageLayout]], Choice | None], cost: Callable[[Choice], float]
    ) -> Choice | None:
        """Leave out one layout after another while the choice gets better."""
        best = solve({layout for layouts in self._layouts.values() for option in layouts for layout in option})
        while best is not None:
            used = self._used(best)
            fewer = [solve(used - {layout}) for layout in used] if len(used) > 1 else []
            better = min((choice for choice in fewer if choice is not None), key=cost, default=None)
            if better is None or cost(better) >= cost(best):
                break
            best = better
        return best

    def _fitting(self, allowed: set[PageLayout], limit: float) -> Choice | None:
        """The least error whose pages fit: the knapsack's limit is moved by what a pool takes beyond the sum."""
        solver, best, own = self._solver(allowed), None, limit
        if solver is None:
            return None
        for _ in range(ATTEMPTS):
            choice = solver.take(solver.frontier.within_bytes(max(int(own), solver.frontier.least_bytes)))
            if choice is not None and choice.bytes <= limit and (best is None or choice.kl < best.kl):
                best = choice
            own += limit - choice.bytes if choice is not None else 0.0
        return best

    def _solver(self, allowed: set[PageLayout]) -> _Solver | None:
        """The knapsack over the options whose layouts are allowed; None where a layer has none."""
        kept = {
            layer: [i for i, option in enumerate(layouts) if allowed.issuperset(option)]
            for layer, layouts in self._layouts.items()
        }
        if not all(kept.values()):
            return None
        costs, errors = ([side[x][i] for x, i in kept.items()] for side in (self._costs, self._errors))

        def choice(picked: list[int]) -> Choice:
            return self._choice({x: i[n] for (x, i), n in zip(kept.items(), picked, strict=True)})

        return _Solver(Frontier(costs, errors), choice)

    def _choice(self, picked: dict[int, int]) -> Choice:
        return Choice(
            {layer: self._options[i] for layer, i in picked.items()},
            sum(self._errors[layer][i].item() for layer, i in picked.items()),
            self._pool_bytes(picked),
        )

    def _used(self, choice: Choice) -> set[PageLayout]:
        picked = ((layer, self._options.index(option)) for layer, option in choice.options.items())
        return {layout for layer, i in picked for layout in self._layouts[layer][i]}

    def _pool_bytes(self, picked: dict[int, int]) -> float:
        """Bytes of the chunks that a pool takes for every layer's pages, the mean over prompts."""
        pages: dict[PageLayout, Tensor] = {}
        for layer, i in picked.items():
            for layout, count in zip(self._layouts[layer][i], self._pages[layer][i], strict=True):
                pages[layout] = pages.get(layout, torch.zeros_like(count)) + count
        first, i = next(iter(picked.items()))
        chunk = _chunk_bytes(self._layouts[first][i], tuple(int(n.max()) for n in self._pages[first][i]))
        chunks = [-(-count // (chunk // layout.page_bytes)) for layout, count in pages.items()]
        return chunk * torch.stack(chunks).sum(0).double().mean().item()


@dataclass(frozen=True)
class _Solver:
    frontier: Frontier
    choice: Callable[[list[int]], Choice]

    def take(self, picked: list[int] | None) -> Choice | None:
        return None if picked is None else self.choice(picked)


@functools.cache
def _chunk_bytes(layouts: tuple[PageLayout, ...], pages: tuple[int, ...]) -> int:
    """The chunks that a pool decides for when these are the first pages asked of it."""
    pool = PagePool("cpu")
    demand: dict[int, int] = {}
    for layout, count in zip(layouts, pages, strict=True):
        cls = pool.class_of(layout)
        demand[cls] = demand.get(cls, 0) + count
    pool.reserve(demand)
    return pool.chunk_bytes
