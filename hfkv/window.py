"""The recent window of a layer: its newest tokens, exact, and which of them each sequence has."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fill:
    """How many tokens each sequence has in the window; one object serves all layers of a step.

    Attributes:
        uniform: tokens of every sequence, or None where sequences differ.
        counts: int64 [batch], tokens per sequence.
        most: upper bound of `counts` that the host knows.
        positions: int64 [batch, most], logical positions; None where they are the last `uniform` of `seen`.
        seen: logical tokens of the cache, pads included.
        pads: int64 [batch], pads that were dropped so far, None for none.
    """

    uniform: int | None
    counts: Tensor
    most: int
    positions: Tensor | None
    seen: int
    pads: Tensor | None
    _biases: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def none(cls, batch: int, device: torch.device) -> Fill:
        return cls(0, torch.zeros(batch, dtype=torch.long, device=device), 0, None, 0, None)

    @functools.cached_property
    def token_positions(self) -> Tensor:
        """Logical positions [batch, most] of the window's tokens; -1 behind a sequence's last."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.seen - self.most, self.seen, device=self.counts.device).expand(self.counts.numel(), -1)

    @functools.cached_property
    def valid(self) -> Tensor:
        """bool [batch, most]."""
        return torch.arange(self.most, device=self.counts.device) < self.counts[:, None]

    @functools.cached_property
    def lengths(self) -> Tensor:
        """Real tokens of every sequence, int64 [batch]."""
        total = torch.full_like(self.counts, self.seen)
        return total if self.pads is None else total - self.pads

    def bias(self, queries: int) -> Tensor | None:
        """float32 [batch or 1, queries, most]: -inf where one of the last `queries` tokens may not look; None for no limit."""
        if self.uniform is not None and queries == 1:
            return None
        if queries not in self._biases:
            self._biases[queries] = self._make_bias(queries)
        return self._biases[queries]

    def _make_bias(self, queries: int) -> Tensor:
        slot = torch.arange(self.most, device=self.counts.device)
        if self.uniform is not None:
            last = torch.arange(self.most - queries, self.most, device=slot.device)[None]
        else:
            last = self.counts[:, None] - queries + torch.arange(queries, device=slot.device)
        hidden = slot > last[..., None]
        return torch.zeros(hidden.shape, device=slot.device).masked_fill_(hidden, float("-inf"))


@dataclass(frozen=True)
class Sequence:
    """Window and new tokens of every sequence, left-aligned: k, v [batch, kv_heads, n, dim], counts per sequence."""

    k: Tensor
    v: Tensor
    fill: Fill


class Window:
    """Exact keys and values [batch, kv_heads, capacity, dim] of the newest tokens."""

    def __init__(self, k: Tensor, v: Tensor, capacity: int) -> None:
        self.k = k.new_zeros(k.shape[0], k.shape[1], capacity, k.shape[3])
        self.v = v.new_zeros(v.shape[0], v.shape[1], capacity, v.shape[3])

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor, before: Fill, after: Fill, valid: Tensor | None) -> None:
        """Write new tokens k, v [batch, kv_heads, q, dim] behind each sequence's last."""
        if before.uniform is not None and valid is None:
            part = slice(before.most, before.most + k.shape[2])
            self.k[:, :, part], self.v[:, :, part] = k, v
            return
        keep = valid if valid is not None else torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        slot = before.counts[:, None] + keep.long().cumsum(1) - 1  # [batch, q]
        row, column = keep.nonzero(as_tuple=True)
        self.k[row, :, slot[row, column]] = k[row, :, column]
        self.v[row, :, slot[row, column]] = v[row, :, column]

    def followed_by(self, k: Tensor, v: Tensor, before: Fill, after: Fill, valid: Tensor | None) -> Sequence:
        """The window's tokens and then the new ones, as one left-aligned sequence; `after` is `advance` of both."""
        if before.most:
            k = torch.cat([self.k[:, :, : before.most], k], 2)
            v = torch.cat([self.v[:, :, : before.most], v], 2)
        if after.uniform is not None and k.shape[2] == after.uniform:
            return Sequence(k, v, after)
        fresh = valid if valid is not None else torch.ones(k.shape[0], k.shape[2] - before.most, dtype=torch.bool, device=k.device)
        order = torch.cat([before.valid, fresh], 1).long().argsort(dim=1, descending=True, stable=True)[:, : after.most]
        index = order[:, None, :, None]
        return Sequence(k.take_along_dim(index, 2), v.take_along_dim(index, 2), after)

    def keep_last(self, sequence: Sequence, leaving: Tensor, after: Fill) -> Window:
        """A new window that holds what each sequence has behind its first `leaving` int64 [batch] tokens."""
        kept = Window.__new__(Window)
        kept.k, kept.v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        most = after.most
        if sequence.fill.uniform is not None:
            first = sequence.fill.uniform - most
            kept.k[:, :, :most], kept.v[:, :, :most] = sequence.k[:, :, first:], sequence.v[:, :, first:]
            return kept
        index = (leaving[:, None] + torch.arange(most, device=leaving.device)).clamp(max=sequence.k.shape[2] - 1)[:, None, :, None]
        kept.k[:, :, :most], kept.v[:, :, :most] = sequence.k.take_along_dim(index, 2), sequence.v.take_along_dim(index, 2)
        return kept


def advance(fill: Fill, new: int, valid: Tensor | None) -> Fill:
    """The fill after `new` logical tokens, of which `valid` [batch, new] are real (None: all)."""
    seen = fill.seen + new
    if valid is None and fill.positions is None and fill.uniform is not None:
        return Fill(fill.uniform + new, fill.counts + new, fill.most + new, None, seen, fill.pads)
    batch, device = fill.counts.numel(), fill.counts.device
    real = torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid
    counts = fill.counts + real.sum(1)
    most = fill.most + new if valid is None else int(counts.max())
    mask = torch.cat([fill.valid, real], 1)
    positions = torch.cat([fill.token_positions, torch.arange(fill.seen, seen, device=device).expand(batch, -1)], 1)
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    positions = positions.gather(1, order).masked_fill(torch.arange(most, device=device) >= counts[:, None], -1)
    dropped = (~real).sum(1)
    pads = dropped if fill.pads is None else fill.pads + dropped
    uniform = most if valid is not None and bool((counts == most).all()) else (most if fill.uniform is not None and valid is None else None)
    return Fill(uniform, counts, most, positions, seen, pads)


def leave(fill: Fill, leaving: Tensor, window: int) -> Fill:
    """The fill after every sequence has given up its first `leaving` tokens (all it has beyond `window`)."""
    if fill.positions is None and fill.uniform is not None:
        most = min(fill.uniform, window)
        return Fill(most, fill.counts - leaving, most, None, fill.seen, fill.pads)
    counts = fill.counts - leaving
    most = min(fill.most, window)
    index = (leaving[:, None] + torch.arange(most, device=counts.device)).clamp(max=max(fill.most - 1, 0))
    positions = fill.token_positions.gather(1, index).masked_fill(torch.arange(most, device=counts.device) >= counts[:, None], -1)
    uniform = most if fill.uniform is not None else None
    return Fill(uniform, counts, most, positions, fill.seen, fill.pads)


def crop_fill(fill: Fill, remove: int) -> Fill:
    """The fill without the newest `remove` logical tokens."""
    seen = max(0, fill.seen - remove)
    if fill.positions is None and fill.uniform is not None:
        most = max(0, fill.most - remove)
        return Fill(most, (fill.counts - remove).clamp_min(0), most, None, seen, fill.pads)
    kept = fill.valid & (fill.token_positions < seen)
    counts = kept.sum(1)
    removed_pads = (fill.seen - seen) - (fill.counts - counts)
    most = int(counts.max())
    uniform = most if bool((counts == most).all()) else None
    return Fill(uniform, counts, most, fill.token_positions[:, :most], seen, None if fill.pads is None else fill.pads - removed_pads)


def select_fill(fill: Fill, index: Tensor) -> Fill:
    """The fill of the sequences `index`."""
    positions = None if fill.positions is None else fill.positions[index]
    pads = None if fill.pads is None else fill.pads[index]
    return Fill(fill.uniform, fill.counts[index], fill.most, positions, fill.seen, pads)
