"""From errors and bytes of options to the best choice: the knapsack, and the pages that a choice really takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.calibrate.knapsack import Frontier
from hfkv.calibrate.options import Option, Sizes
from hfkv.paging.pool import PagePool
from hfkv.paging.rooms import PackPage
from hfkv.quant import PageLayout

BISECTIONS = 8
"""Limits that the knapsack is given until the pages of its choice fit as closely as they can."""

LIMITS = (1.0, 0.7, 0.4)
"""Shares of an error that the knapsack is given: a choice with less error can need fewer chunks."""

POLISHINGS = 3


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
        options: what each layer may be.
        errors: mean KL of every option, by layer, float64 [options].
    """

    def __init__(self, sizes: dict[int, Sizes], options: dict[int, list[Option]], errors: dict[int, Tensor]) -> None:
        self._sizes, self._options, self._errors = sizes, options, errors
        self._costs = {x: torch.tensor([round(o.page_bytes(sizes[x])) for o in own]) for x, own in options.items()}
        self._parts = {x: [o.parts(sizes[x]) for o in own] for x, own in options.items()}
        self._addresses = {x: [o.address_bytes(sizes[x]) for o in own] for x, own in options.items()}
        self._layouts = {x: [tuple(o.layouts(sizes[x])) for o in own] for x, own in options.items()}

    def cheapest(self) -> Choice:
        return self._choice({layer: int(cost.argmin()) for layer, cost in self._costs.items()})

    def uniform(self, option: Option) -> Choice:
        """The same option for every layer."""
        return self._choice({layer: own.index(option) for layer, own in self._options.items()})

    def page_bytes(self, layer: int, option: Option) -> int:
        """Bytes of a layer's pages, the mean over prompts."""
        return int(self._costs[layer][self._options[layer].index(option)])

    def smallest(self, layer: int, error: float, packed: bool) -> Option | None:
        """The packed or plain option of a layer with the fewest bytes whose error is at most this; None: there is none.

        A plain option is one of the model's dtype, too.
        """
        errors = self._errors[layer].tolist()
        fit = [o for o, e in zip(self._options[layer], errors, strict=True) if o.packed == packed and e <= error]
        return min(fit, key=lambda option: self.page_bytes(layer, option), default=None)

    def within_bytes(self, limit: float) -> Choice | None:
        """The choice with the least error whose pages take at most `limit` bytes; None where there is none."""

        def fitting(frontier: Frontier, choice: Callable[[list[int]], Choice]) -> Iterator[Choice]:
            """Bisect the limit of the sum, which a pool's chunks pass."""
            low, high = float(frontier.least_bytes), max(limit, float(frontier.least_bytes))
            own = high
            for _ in range(BISECTIONS):
                picked = frontier.within_bytes(int(own))
                assert picked is not None
                yield (found := choice(picked))
                low, high = (own, high) if found.bytes <= limit else (low, own)
                own = (low + high) / 2

        found = self._fewer_layouts(fitting, lambda choice: (choice.bytes > limit, choice.kl))
        return found if found is not None and found.bytes <= limit else None

    def within_error(self, limit: float) -> Choice | None:
        """The choice with the fewest bytes whose errors add up to at most `limit`; None where there is none."""

        def cheapest(frontier: Frontier, choice: Callable[[list[int]], Choice]) -> Iterator[Choice]:
            for share in LIMITS:
                picked = frontier.within_error(share * limit)
                if picked is not None:
                    yield choice(picked)

        return self._fewer_layouts(cheapest, lambda choice: (choice.kl > limit * (1 + 1e-9), choice.bytes))

    def _fewer_layouts(
        self,
        solve: Callable[[Frontier, Callable[[list[int]], Choice]], Iterator[Choice]],
        cost: Callable[[Choice], tuple[bool, float]],
    ) -> Choice | None:
        """Solve with all layouts, then leave out, one after another, the one that is missed least; the best of all."""

        def best(allowed: set[PageLayout]) -> Choice | None:
            solver = self._solver(allowed)
            return None if solver is None else min(solve(*solver), key=cost, default=None)

        every = {layout for layouts in self._layouts.values() for option in layouts for layout in option}
        plain = {layout for layout in every if layout.pack is None}
        starts = [every] if plain == every else [every, plain]
        found = min(
            (choice for start in starts for choice in _descent(start, best, cost, self._used)), key=cost, default=None
        )
        return None if found is None else self._polished(found, cost)

    def _polished(self, found: Choice, cost: Callable[[Choice], tuple[bool, float]]) -> Choice:
        """Change one layer at a time as long as that helps: the last bytes of chunks that the sum does not see."""
        picked = self._indices(found)
        for _ in range(POLISHINGS):
            before = found
            for layer in picked:
                others = (self._choice({**picked, layer: i}) for i in range(len(self._options[layer])))
                found = min((found, *others), key=cost)
                picked = self._indices(found)
            if found is before:
                break
        return found

    def _solver(self, allowed: set[PageLayout]) -> tuple[Frontier, Callable[[list[int]], Choice]] | None:
        """The knapsack over the options whose layouts are allowed, and the choice that its answer means; None where a
        layer has no option left."""
        kept = {
            layer: [i for i, option in enumerate(layouts) if allowed.issuperset(option)]
            for layer, layouts in self._layouts.items()
        }
        if not all(kept.values()):
            return None
        costs, errors = ([side[x][i] for x, i in kept.items()] for side in (self._costs, self._errors))

        def choice(picked: list[int]) -> Choice:
            return self._choice({x: i[n] for (x, i), n in zip(kept.items(), picked, strict=True)})

        return Frontier(costs, errors), choice

    def _choice(self, picked: dict[int, int]) -> Choice:
        return Choice(
            {layer: self._options[layer][i] for layer, i in picked.items()},
            sum(self._errors[layer][i].item() for layer, i in picked.items()),
            self._pool_bytes(picked),
        )

    def _used(self, choice: Choice) -> set[PageLayout]:
        return {layout for layer, i in self._indices(choice).items() for layout in self._layouts[layer][i]}

    def _indices(self, choice: Choice) -> dict[int, int]:
        return {layer: self._options[layer].index(option) for layer, option in choice.options.items()}

    def _pool_bytes(self, picked: dict[int, int]) -> float:
        """Bytes of the chunks that a pool takes for every layer's pages, the mean over prompts."""
        pages: dict[PageLayout | PackPage, Tensor] = {}
        for layer, i in picked.items():
            for layout, count in self._parts[layer][i]:
                pages[layout] = pages.get(layout, torch.zeros_like(count)) + count
        first, i = next(iter(picked.items()))
        chunk = _chunk_bytes(tuple((layout, float(n.max())) for layout, n in self._parts[first][i]))
        chunks = [-(-count.ceil().long() // (chunk // layout.page_bytes)) for layout, count in pages.items()]
        beside = sum(self._addresses[layer][i] for layer, i in picked.items())
        return chunk * torch.stack(chunks).sum(0).double().mean().item() + beside


def _descent(
    allowed: set[PageLayout],
    best: Callable[[set[PageLayout]], Choice | None],
    cost: Callable[[Choice], tuple[bool, float]],
    used_by: Callable[[Choice], set[PageLayout]],
) -> Iterator[Choice]:
    """The best choice of the allowed layouts, then without the one that is missed least, and so on."""
    now = best(allowed)
    used = used_by(now) if now is not None else set()
    while now is not None:
        yield now
        fewer = {layout: choice for layout in used if (choice := best(used - {layout})) is not None}
        if len(used) < 2 or not fewer:
            break
        without = min(fewer, key=lambda layout: cost(fewer[layout]))
        now, used = fewer[without], used - {without}


@functools.cache
def _chunk_bytes(parts: tuple[tuple[PageLayout | PackPage, float], ...]) -> int:
    """The chunks that a pool decides for when these are the first pages asked of it; packs ask for one of theirs."""
    pool = PagePool("cpu")
    demand: dict[int, int] = {}
    cls = 0
    packed = any(isinstance(layout, PackPage) for layout, _ in parts)
    for place, (layout, count) in enumerate(parts):
        cls = pool.class_of(layout)  # type: ignore[arg-type]
        if not packed or (place == 0 and len(parts) == 3):  # the high tier, above a packed one
            demand[cls] = demand.get(cls, 0) + math.ceil(count)
    pool.reserve(demand if any(demand.values()) else {cls: 1})
    return pool.chunk_bytes
