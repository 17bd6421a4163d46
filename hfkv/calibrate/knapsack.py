"""One option per layer, so that the sum of errors is least within a sum of bytes, or the bytes least within an error.

A multiple-choice knapsack by dynamic programming over bytes, exact up to a unit of bytes (one, where the range is
small): f_l(b) = min over options o of f_{l-1}(b - bytes_o) + error_o.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 8192
"""Steps that the range of bytes, between the cheapest and the dearest choice, is cut into at most."""


class Frontier:
    """Least error for every number of bytes.

    Args:
        costs: bytes of each layer's options, int64 [options] per layer, none empty.
        errors: their errors, float64 [options] per layer.
        units: resolution; choices never cost more than asked for, and waste at most a unit per layer.
    """

    def __init__(self, costs: list[Tensor], errors: list[Tensor], units: int = UNITS) -> None:
        if not costs or len(costs) != len(errors):
            raise ValueError(
                f"{len(costs)} layers of costs and {len(errors)} of errors: one of each per layer is needed"
            )
        self._costs, self._errors = costs, errors
        self.least_bytes = sum(int(cost.min()) for cost in costs)
        self.most_bytes = sum(int(cost.max()) for cost in costs)
        self._unit = max(1, -(-(self.most_bytes - self.least_bytes) // units))
        steps = (self.most_bytes - self.least_bytes) // self._unit + len(costs) + 1
        self._extra = [(cost - cost.min() + self._unit - 1) // self._unit for cost in costs]
        self._tables = [torch.zeros(steps, dtype=torch.float64)]
        for extra, error in zip(self._extra, errors, strict=True):
            self._tables.append(_extended(self._tables[-1], extra, error))

    def within_bytes(self, limit: int) -> list[int] | None:
        """The options with the least error for at most `limit` bytes; None where the cheapest cost more."""
        if limit < self.least_bytes:
            return None
        return self._options(min((limit - self.least_bytes) // self._unit, len(self._tables[0]) - 1))

    def within_error(self, limit: float) -> list[int] | None:
        """The options with the fewest bytes for an error of at most `limit`; None where the best have more."""
        enough = (self._tables[-1] <= limit * (1 + 1e-12)).nonzero()
        return self._options(int(enough[0])) if enough.numel() else None

    def _options(self, left: int) -> list[int]:
        """Walk back from the last layer with `left` units."""
        chosen = []
        for layer in range(len(self._costs) - 1, -1, -1):
            extra, before = self._extra[layer], self._tables[layer]
            total = torch.where(extra <= left, before[(left - extra).clamp_min(0)] + self._errors[layer], float("inf"))
            chosen.append(int(total.argmin()))
            left -= int(extra[chosen[-1]])
        return chosen[::-1]


def _extended(before: Tensor, extra: Tensor, error: Tensor) -> Tensor:
    """f_l from f_{l-1}: least error by units, with one more layer."""
    best = torch.full_like(before, float("inf"))
    for shift, own in zip(extra.tolist(), error.tolist(), strict=True):
        if shift < len(before):
            best[shift:] = torch.minimum(best[shift:], before[: len(before) - shift] + own)
    return best
