"""`LaterFill`: a window's fill some steps later, for steps that the host takes no part in."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hfkv.fill import Fill, advance


class LaterFill(Fill):
    """`advance(base, new, None)`, of which only the host's numbers are there until somebody asks for more."""

    _base: Fill
    _new: int

    def __init__(self, base: Fill, new: int) -> None:
        uniform = None if base.uniform is None else base.uniform + new
        known = {"uniform": uniform, "most": base.most + new, "seen": base.seen + new, "pads": base.pads}
        self.__dict__.update(known, _biases={}, _base=base, _new=new, _size=base.batch, _device=_device_of(base))

    @property
    def batch(self) -> int:
        return self.__dict__["_size"]

    @functools.cached_property
    def _made(self) -> Fill:
        """The fill itself; the one it follows from may then go."""
        return advance(self.__dict__.pop("_base"), self._new, None)

    @functools.cached_property
    def counts(self) -> Tensor:  # type: ignore[override]
        return self._made.counts

    @functools.cached_property
    def positions(self) -> Tensor | None:  # type: ignore[override]
        return self._made.positions

    @functools.cached_property
    def lengths(self) -> Tensor:
        total = torch.full((self.batch,), self.seen, device=self.__dict__["_device"])
        return total if self.pads is None else total - self.pads


def _device_of(fill: Fill) -> torch.device:
    return fill.__dict__["_device"] if isinstance(fill, LaterFill) else fill.counts.device
