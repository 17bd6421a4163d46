"""Which tokens each sequence has in its recent window: counts, positions, and what they become step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hfkv.kernels.decode_attention import hidden_bias

T = TypeVar("T")
State = tuple[object, int]
"""A mask by name and version, see `hfkv.masks.state`."""


@dataclass(frozen=True, eq=False)
class Fill:
    """How many tokens each sequence has in the window; one object serves all layers of a step.

    Attributes:
        uniform: tokens of every sequence, or None where sequences differ.
        counts: int64 [batch], tokens per sequence.
        most: upper bound of `counts` that the host knows.
        positions: int64 [batch, most], logical positions; None where they are the newest `uniform` ones.
        seen: logical tokens of the cache, pads included.
        pads: int64 [batch], pads that were dropped so far; None for none.
    """

    uniform: int | None
    counts: Tensor
    most: int
    positions: Tensor | None
    seen: int
    pads: Tensor | None
    _biases: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _rows: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Fill:
        return cls(0, torch.zeros(batch, dtype=torch.long, device=device), 0, None, 0, None)

    @property
    def batch(self) -> int:
        return self.counts.numel()

    @functools.cached_property
    def token_positions(self) -> Tensor:
        """Logical positions [batch, most] of the window's tokens; -1 behind a sequence's last."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.seen - self.most, self.seen, device=self.counts.device).expand(self.batch, -1)

    @functools.cached_property
    def valid(self) -> Tensor:
        """bool [batch, most]: slots that hold a token."""
        return torch.arange(self.most, device=self.counts.device) < self.counts[:, None]

    @functools.cached_property
    def lengths(self) -> Tensor:
        """Real tokens of every sequence, pruned ones included, int64 [batch]."""
        total = torch.full_like(self.counts, self.seen)
        return total if self.pads is None else total - self.pads

    def of_rows(self, heads: int) -> Tensor:
        """Tokens in the window of every row, a KV head of a sequence: int64 [batch * heads]."""
        if heads not in self._rows:
            self._rows[heads] = self.counts.repeat_interleave(heads)
        return self._rows[heads]

    def equals(self, other: Fill) -> bool:
        """Whether both say the same, on one device."""
        numbers = [(x.uniform, x.most, x.seen, x.counts.device) for x in (self, other)]
        if numbers[0] != numbers[1]:
            return False
        return (
            torch.equal(self.counts, other.counts)
            and _equal(self.positions, other.positions)
            and _equal(self.pads, other.pads)
        )

    def bias(self, queries: int) -> Tensor | None:
        """float32 [batch or 1, queries, most]: -inf where one of the newest `queries` may not look; None: no limit."""
        if self.uniform is not None and queries == 1:
            return None
        if queries not in self._biases:
            self._biases[queries] = self._make_bias(queries)
        return self._biases[queries]

    def _make_bias(self, queries: int) -> Tensor:
        slot = torch.arange(self.most, device=self.counts.device)
        newest = torch.arange(-queries, 0, device=slot.device)
        last = newest[None] + (self.most if self.uniform is not None else self.counts[:, None])  # [batch or 1, queries]
        return hidden_bias(slot > last[..., None])


def advance(fill: Fill, new: int, valid: Tensor | None) -> Fill:
    """The fill after `new` logical tokens, of which `valid` bool [batch, new] are real (None: all)."""
    seen = fill.seen + new
    if valid is None and fill.positions is None and fill.uniform is not None:
        return Fill(fill.uniform + new, fill.counts + new, fill.most + new, None, seen, fill.pads)
    device = fill.counts.device
    real = torch.ones(fill.batch, new, dtype=torch.bool, device=device) if valid is None else valid
    counts = fill.counts + real.sum(1)
    most = fill.most + new if valid is None else int(counts.max())
    fresh = torch.arange(fill.seen, seen, device=device).expand(fill.batch, -1)
    order = newest_last(torch.cat([fill.valid, real], 1))[:, :most]
    positions = torch.cat([fill.token_positions, fresh], 1).gather(1, order)
    pads = fill.pads
    if valid is not None:
        pads = (~real).sum(1) + (0 if pads is None else pads)
    uniform = fill.uniform is not None if valid is None else bool((counts == most).all())
    return _ragged(most if uniform else None, counts, most, positions, seen, pads)


def leave(fill: Fill, leaving: Tensor, window: int) -> Fill:
    """The fill after every sequence has given up its first `leaving` int64 [batch] tokens, all beyond `window`."""
    counts, most = fill.counts - leaving, min(fill.most, window)
    uniform = most if fill.uniform is not None else None
    if fill.positions is None and uniform is not None:
        return Fill(uniform, counts, most, None, fill.seen, fill.pads)
    index = (leaving[:, None] + torch.arange(most, device=counts.device)).clamp(max=max(fill.most - 1, 0))
    return _ragged(uniform, counts, most, fill.token_positions.gather(1, index), fill.seen, fill.pads)


def crop(fill: Fill, remove: int) -> Fill:
    """The fill without the newest `remove` logical tokens."""
    seen = max(0, fill.seen - remove)
    if fill.positions is None and fill.uniform is not None:
        most = max(0, fill.most - remove)
        return Fill(most, (fill.counts - remove).clamp_min(0), most, None, seen, fill.pads)
    counts = (fill.valid & (fill.token_positions < seen)).sum(1)
    most = int(counts.max())
    uniform = most if bool((counts == most).all()) else None
    pads = None if fill.pads is None else fill.pads - ((fill.seen - seen) - (fill.counts - counts))
    return _ragged(uniform, counts, most, fill.token_positions[:, :most], seen, pads)


def select(fill: Fill, index: Tensor) -> Fill:
    """The fill of the sequences `index`, int64 [n]."""
    positions = None if fill.positions is None else fill.positions[index]
    pads = None if fill.pads is None else fill.pads[index]
    return Fill(fill.uniform, fill.counts[index], fill.most, positions, fill.seen, pads)


def drop(fill: Fill, hidden: Tensor) -> tuple[Fill, Tensor]:
    """The fill without the tokens `hidden`, bool [batch, most], which count as pads then; and the slots that stay."""
    kept = fill.valid & ~hidden
    counts = kept.sum(1)
    most = int(counts.max())
    slots = newest_last(kept)[:, :most]
    uniform = most if bool((counts == most).all()) else None
    pads = fill.counts - counts + (0 if fill.pads is None else fill.pads)
    return _ragged(uniform, counts, most, fill.token_positions.gather(1, slots), fill.seen, pads), slots


def newest_last(valid: Tensor) -> Tensor:
    """Indices [batch, n] that bring the valid slots to the front, in order."""
    return valid.long().argsort(dim=1, descending=True, stable=True)


def _ragged(uniform: int | None, counts: Tensor, most: int, positions: Tensor, seen: int, pads: Tensor | None) -> Fill:
    behind = torch.arange(most, device=counts.device) >= counts[:, None]
    return Fill(uniform, counts, most, positions.masked_fill(behind, -1), seen, pads)


class FillBook:
    """Works out each step's fill and padding once for all layers of a device, by what they follow from (identity)."""

    def __init__(self) -> None:
        self._fills: dict[tuple, tuple[tuple, Any]] = {}
        self._masks: dict[torch.device, Tensor] = {}
        self._shown: tuple[State | None, tuple[int, ...]] = (None, ())  # the running forward's 2-D mask, its shape
        self._grown = False
        # One that agreed, its length, and what has been held since.
        self._known: tuple[State | None, int, Fill | None] = (None, 0, None)

    def known_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of an earlier layer that says the same: layers on another device than the mask get a copy each."""
        if mask is None:
            return None
        known = self._masks.get(mask.device)
        alike = known is not None and known.shape == mask.shape and known.dtype == mask.dtype
        if known is not mask and not (alike and _equal(known, mask)):
            known = self._masks[mask.device] = mask
        return known

    def show(self, mask: State | None, shape: tuple[int, ...], made_from: State | None) -> None:
        """A forward begins with a padding mask of `shape` [batch, tokens], made from another by ones, or from None."""
        self._grown = made_from is not None and made_from == self._known[0]
        self._shown = (mask, shape)

    def valid_tokens(self, mask: Tensor | None, new: int, fill: Fill | None = None) -> Tensor | None:
        """Which of the newest `new` tokens are real, bool [batch, new]; None for all.

        `mask` is [batch, 1 or heads, queries, tokens], bool or additive; its last query sees every real token. The
        device is asked together whether it agrees with what is held, `fill`; not at all where `generate` has only grown
        a mask that agreed.
        """
        if mask is None:
            return None
        return self._once(("valid", mask.device), (mask, new), lambda: self._look_at(mask, new, fill))

    def _look_at(self, mask: Tensor, new: int, fill: Fill | None) -> Tensor | None:
        if self._only_grown(mask, new, fill):
            self._fills["agrees", mask.device] = ((mask, fill, new, None), True)
            return None
        last = mask[:, :, -1, -new:]
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        valid = seen.any(1)
        found = [valid.all()]
        if fill is not None and mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
            found.append((mask[:, 0, 0].sum(-1) == fill.lengths + new).all())
        all_real, *agrees = torch.stack(found).tolist()
        if all_real and agrees:
            self._fills["agrees", mask.device] = ((mask, fill, new, None), agrees[0])
        return None if all_real else valid

    def _only_grown(self, mask: Tensor, new: int, fill: Fill | None) -> bool:
        """Whether a mask is that of the last forward, which agreed with `fill`, and ones."""
        shape, (_, length, held) = self._shown[1], self._known
        if not self._grown or fill is None or fill is not held or mask.dtype != torch.bool:
            return False
        return mask.shape == (shape[0], 1, 1, shape[1]) and shape[1] == length + new

    def broken(self, valid: Tensor | None) -> bool:
        """Whether some sequence has a pad behind a real token among `valid` bool [batch, new]; None: all are real."""
        if valid is None:
            return False
        return self._once(("broken", valid.device), (valid,), lambda: bool((valid[:, :-1] & ~valid[:, 1:]).any()))

    def agrees(self, mask: Tensor, fill: Fill, new: int, valid: Tensor | None) -> bool:
        """Whether a padding mask [batch, 1, 1, tokens] shows just the tokens held and the valid new ones."""
        return self._once(
            ("agrees", mask.device),
            (mask, fill, new, valid),
            lambda: bool((mask[:, 0, 0].sum(-1) == fill.lengths + fresh_tokens(new, valid)).all()),
        )

    def shown(self, fill: Fill, mask: Tensor) -> tuple[Fill, Tensor]:
        """The fill without the window's tokens that a padding mask hides by now, and the slots of the others."""

        def hidden() -> Tensor:
            return ~mask[:, 0, 0].bool().gather(1, fill.token_positions.clamp_min(0))

        return self._once(("drop", fill.counts.device), (fill, mask), lambda: drop(fill, hidden()))

    def empty(self, batch: int, device: torch.device) -> Fill:
        return self._once(("empty", device), (batch,), lambda: Fill.empty(batch, device))

    def advanced(self, fill: Fill, new: int, valid: Tensor | None) -> Fill:
        after = self._once(("advance", fill.counts.device), (fill, new, valid), lambda: advance(fill, new, valid))
        shown, shape = self._shown
        first = fill.seen == 0 and shape == (fill.batch, new)
        (_, agreed, *_), agrees = self._fills.get(("agrees", fill.counts.device), ((None, None), False))
        if shown is not None and (first or (valid is None and agreed is fill and agrees)):
            self._known = (shown, shape[1], after)
        return after

    def left(self, fill: Fill, leaving: Tensor, window: int) -> Fill:
        after = self._once(("leave", fill.counts.device), (fill, window), lambda: leave(fill, leaving, window))
        if self._known[2] is fill:  # a flush takes nothing away
            self._known = (*self._known[:2], after)
        return after

    def cropped(self, fill: Fill, remove: int) -> Fill:
        return self._once(("crop", fill.counts.device), (fill, remove), lambda: crop(fill, remove))

    def selected(self, fill: Fill, index: Tensor) -> Fill:
        return self._once(("select", fill.counts.device), (fill, index), lambda: select(fill, index))

    def _once(self, name: tuple, key: tuple, make: Callable[[], T]) -> T:
        known = self._fills.get(name)
        if known is None or not all(map(_same, known[0], key)):
            known = self._fills[name] = (key, make())
        return known[1]


def fresh_tokens(new: int, valid: Tensor | None) -> Tensor | int:
    """How many of `new` tokens are real, int64 [batch] or one number for all; `valid` bool [batch, new] or None."""
    return new if valid is None else valid.sum(1)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
