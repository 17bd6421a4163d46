"""The recent window of a layer: its newest tokens, exact, and the few queries kept for observing them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.fill import Fill, newest_last

KEPT_QUERIES = 8


@dataclass(frozen=True)
class Sequences:
    """Window and new tokens of every sequence, left-aligned: k, v [batch, kv_heads, n, dim], described by `fill`."""

    k: Tensor
    v: Tensor
    fill: Fill


class Window:
    """Exact keys and values [batch, kv_heads, capacity, dim] of the newest tokens."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    @classmethod
    def like(cls, k: Tensor, v: Tensor, capacity: int) -> Window:
        """An empty window for keys and values of these shapes."""
        return cls(
            k.new_zeros(k.shape[0], k.shape[1], capacity, k.shape[3]),
            v.new_zeros(v.shape[0], v.shape[1], capacity, v.shape[3]),
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor, before: Fill, valid: Tensor | None) -> None:
        """Write new tokens k, v [batch, kv_heads, q, dim] behind each sequence's last."""
        if before.uniform is not None and valid is None:
            part = slice(before.most, before.most + k.shape[2])
            self.k[:, :, part], self.v[:, :, part] = k, v
            return
        if valid is None:  # nothing that the host would have to count
            slot = before.counts[:, None] + torch.arange(k.shape[2], device=k.device)  # [batch, q]
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            self.k[row, :, slot], self.v[row, :, slot] = k.transpose(1, 2), v.transpose(1, 2)
            return
        slot = before.counts[:, None] + valid.long().cumsum(1) - 1  # [batch, q]
        row, column = valid.nonzero(as_tuple=True)
        self.k[row, :, slot[row, column]] = k[row, :, column]
        self.v[row, :, slot[row, column]] = v[row, :, column]

    def followed_by(self, k: Tensor, v: Tensor, before: Fill, after: Fill, valid: Tensor | None) -> Sequences:
        """The window's tokens and then the new ones; `after` is the fill of both."""
        fresh = _all_real(k) if valid is None else valid
        if before.most:
            k = torch.cat([self.k[:, :, : before.most], k], 2)
            v = torch.cat([self.v[:, :, : before.most], v], 2)
        if after.uniform is not None and k.shape[2] == after.uniform:
            return Sequences(k, v, after)
        index = newest_last(torch.cat([before.valid, fresh], 1))[:, None, : after.most, None]
        return Sequences(k.take_along_dim(index, 2), v.take_along_dim(index, 2), after)

    def keep_last(self, sequences: Sequences, leaving: Tensor, after: Fill) -> Window:
        """A new window of what each sequence has behind its first `leaving` int64 [batch] tokens."""
        kept = Window.like(self.k, self.v, self.capacity)
        most = after.most
        if sequences.fill.uniform is not None:
            first = sequences.fill.uniform - most
            kept.k[:, :, :most], kept.v[:, :, :most] = sequences.k[:, :, first:], sequences.v[:, :, first:]
            return kept
        slot = leaving[:, None] + torch.arange(most, device=leaving.device)
        index = slot.clamp(max=sequences.k.shape[2] - 1)[:, None, :, None]
        kept.k[:, :, :most] = sequences.k.take_along_dim(index, 2)
        kept.v[:, :, :most] = sequences.v.take_along_dim(index, 2)
        return kept

    def keep(self, slots: Tensor) -> Window:
        """A new window of these slots of every sequence, int64 [batch, n]."""
        kept, index = Window.like(self.k, self.v, self.capacity), slots[:, None, :, None]
        kept.k[:, :, : slots.shape[1]] = self.k.take_along_dim(index, 2)
        kept.v[:, :, : slots.shape[1]] = self.v.take_along_dim(index, 2)
        return kept

    def select(self, index: Tensor) -> Window:
        return Window(self.k[index], self.v[index])


class KeptQueries:
    """At most 8 of the queries since the last flush, evenly spaced; they observe the stored tokens at the next one.

    `state` can be put back later: kept queries are only appended to their buffer, or get a new one.

    Attributes:
        q: [batch, q_heads, 8, D] in the model's dtype, None before the first.
        positions: logical position of each kept query.
        stands_for: tokens since the last flush, which the kept queries stand for.
    """

    def __init__(self, flush: int) -> None:
        self.every = max(1, flush // KEPT_QUERIES)
        self.most = min(KEPT_QUERIES, flush)
        self.flush = flush
        self.q: Tensor | None = None
        self.positions: list[int] = []
        self.stands_for = 0

    @property
    def state(self) -> tuple[Tensor | None, list[int], int]:
        return self.q, self.positions, self.stands_for

    @state.setter
    def state(self, state: tuple[Tensor | None, list[int], int]) -> None:
        self.q, self.positions, self.stands_for = state

    @property
    def nbytes(self) -> int:
        return 0 if self.q is None else self.q.nbytes

    def kept(self) -> Tensor | None:
        """The kept queries [batch, q_heads, n, D], or None."""
        return None if self.q is None or not self.positions else self.q[:, :, : len(self.positions)]

    def pick(self, new: int, seen: int) -> range:
        """Count `new` queries, the newest of `seen` logical tokens -> which of them are kept, behind those held."""
        picked = range(-self.stands_for % self.every, new, self.every)[: self.most - len(self.positions)]
        self.stands_for += new
        if picked:
            self.positions = [*self.positions, *(seen - new + i for i in picked)]
        return picked

    def slot_for(self, q: Tensor, seen: int) -> int | None:
        """Count one query, the newest of `seen` logical tokens -> its slot in `q`, None where it is not kept."""
        held = len(self.positions)
        if not self.pick(1, seen):
            return None
        if self.q is None:
            self.q = q.new_zeros(q.shape[0], q.shape[1], self.most, q.shape[3])
        return held

    def add(self, q: Tensor, seen: int) -> None:
        """Take every few of q [batch, q_heads, new, D], the newest of `seen` logical tokens."""
        held = len(self.positions)
        picked = self.pick(q.shape[2], seen)
        if picked:
            if self.q is None:
                self.q = q.new_zeros(q.shape[0], q.shape[1], self.most, q.shape[3])
            self.q[:, :, held : held + len(picked)] = q[:, :, picked.start : picked[-1] + 1 : self.every]

    def add_tail(self, q: Tensor, seen: int) -> None:
        """Take the last queries of a long chunk instead of all that were kept."""
        picked = range(q.shape[2] - 1, -1, -self.every)[: self.most][::-1]
        self.q = q.new_zeros(q.shape[0], q.shape[1], self.most, q.shape[3])
        self.q[:, :, : len(picked)] = q[:, :, picked.start :: self.every]
        self.positions = [seen - q.shape[2] + i for i in picked]
        self.stands_for = min(q.shape[2], self.flush)

    def clear(self) -> None:
        self.positions, self.stands_for = [], 0

    def crop(self, seen: int, remove: int) -> None:
        self.positions = [p for p in self.positions if p < seen]
        self.stands_for = max(0, self.stands_for - remove)

    def select(self, index: Tensor) -> None:
        self.q = None if self.q is None else self.q[index]


def _all_real(k: Tensor) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
