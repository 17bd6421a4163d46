"""Representatives: part of what is kept goes to tokens that stand for those a score would drop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hfkv.policy.candidates import Candidates
from hfkv.policy.scores import SCORES, in_phase

ANCHORS = ("random", "zeros", "ones", "mean", "alternating")


class Representation(Protocol):
    """Who is kept when part of the places goes to representatives."""

    def kept(self, c: Candidates, keep: Tensor) -> Tensor:
        """Exactly `keep` int64 [batch] tokens of all heads, or all there are: bool [batch, kv_heads, T]."""
        ...


@dataclass(frozen=True)
class KVCrush:
    """Representatives by similarity of heads' behaviour (KVCrush, ACML 2025; OpenVINO's `KVCrushConfig`).

    Every token has one bit per query head, whether it receives at least that head's median attention. Tokens that the
    score would drop are sorted by the Hamming distance of their bits to an anchor, and those at evenly spaced ranks are
    kept, in the low tier. A representative stays through the flushes of generation; new tokens compete for the places
    that become free, and where there are fewer places than representatives, all are elected anew.

    Args:
        share: of the kept tokens so many are representatives, in (0, 1]; published: 0.25.
        anchor: one of `ANCHORS`, in either case: what distances are taken to.
        rng_seed: of the anchor RANDOM.
        per_head: elect for each KV head among what it drops; False, as published: among what no head keeps, and then
            for all heads.

    Raises:
        ValueError: a field is not valid.
    """

    share: float = 0.25
    anchor: str = "mean"
    rng_seed: int = 0
    per_head: bool = True

    def __post_init__(self) -> None:
        _check_share("KVCrush", self.share)
        if not isinstance(self.anchor, str) or self.anchor.lower() not in ANCHORS:
            raise ValueError(f"KVCrush.anchor = {self.anchor!r} is not valid: one of {', '.join(ANCHORS)}")
        object.__setattr__(self, "anchor", self.anchor.lower())
        if isinstance(self.rng_seed, bool) or not isinstance(self.rng_seed, int):
            raise ValueError(f"KVCrush.rng_seed = {self.rng_seed!r} is not valid: an integer")
        if not isinstance(self.per_head, bool):
            raise ValueError(f"KVCrush.per_head = {self.per_head!r} is not valid: True or False")

    def kept(self, c: Candidates, keep: Tensor) -> Tensor:
        return _kept(c, keep, self.share, self._elect, self.per_head)

    def _elect(self, c: Candidates, among: Tensor, seats: Tensor) -> Tensor:
        dense, kernels = _ByPosition(c), c.kernels
        received, held = dense.spread(c.attention), dense.spread(c.exists)
        groups = received.shape[1] // held.shape[1]
        heads = received.shape[1]
        distance = kernels.crush_distances(received, held.repeat_interleave(groups, 1), self._anchor(received))
        if self.per_head:
            rows = dense.spread(among).flatten(0, 1)
            distance = distance.repeat_interleave(among.shape[1], 0)
            chosen = kernels.elect(rows, distance, seats.flatten(), heads).view(held.shape)
        else:
            shared = (dense.spread(among) | ~held).all(1) & held.any(1)  # dropped wherever it still is
            chosen = kernels.elect(shared, distance, seats, heads)[:, None].expand(held.shape)
        return dense.gather(chosen) & among

    def _anchor(self, received: Tensor) -> Tensor | None:
        """bool [batch, heads]; None for MEAN, which the bits themselves decide."""
        batch, heads = received.shape[:2]
        head = torch.arange(heads, device=received.device).expand(batch, -1)
        if self.anchor == "random":
            drawn = torch.rand(heads, generator=torch.Generator().manual_seed(self.rng_seed)) < 0.5
            return drawn.to(received.device, non_blocking=True)[head]
        known = {"zeros": head < 0, "ones": head >= 0, "alternating": head % 2 == 0}
        return known.get(self.anchor)


@dataclass(frozen=True)
class Representatives:
    """Representatives by a second score: of what the first one drops, the best by this one.

    Args:
        share: of the kept tokens so many are representatives, in (0, 1].
        score: a name in `hfkv.policy.SCORES`: `"leverage"`, `"coverage"`, `"keydiff"`; `"random"`, `"strided"`.

    Raises:
        ValueError: a field is not valid.
    """

    share: float
    score: str

    def __post_init__(self) -> None:
        _check_share("Representatives", self.share)
        if self.score not in SCORES:
            raise ValueError(f"Representatives.score = {self.score!r} is not valid: one of {', '.join(SCORES)}")

    def kept(self, c: Candidates, keep: Tensor) -> Tensor:
        return _kept(c, keep, self.share, self._elect, per_head=True)

    def _elect(self, c: Candidates, among: Tensor, seats: Tensor) -> Tensor:
        score = in_phase(self.score, c).masked_fill(~among, float("-inf"))
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (rank < seats[..., None]) & among


class _ByPosition:
    """Numbers per slot, brought into the order of positions, the same for all heads, and back."""

    def __init__(self, c: Candidates) -> None:
        self._width = int(torch.where(c.exists, c.birth, 0).max()) + 1 if c.span is None else c.span
        self._at = torch.where(c.exists, c.birth, self._width)  # [batch, kv_heads, T]; the last column takes the rest

    def spread(self, x: Tensor) -> Tensor:
        """[batch, heads, T] -> [batch, heads, positions], 0 or False at positions that a head does not hold."""
        at = self._at.repeat_interleave(x.shape[1] // self._at.shape[1], 1)
        return x.new_zeros(*x.shape[:2], self._width + 1).scatter_(2, at, x)[..., :-1]

    def gather(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, positions] -> [batch, kv_heads, T]; False in empty slots."""
        return torch.nn.functional.pad(x, (0, 1)).gather(2, self._at)


def _kept(
    c: Candidates, keep: Tensor, share: float, elect: Callable[[Candidates, Tensor, Tensor], Tensor], per_head: bool
) -> Tensor:
    """See `Representation.kept`: the best by score, the representatives of earlier elections, and newly elected ones.

    Args:
        elect: (candidates, who may be elected [batch, kv_heads, T], seats per head [batch, kv_heads], or [batch] seats
            that count in every head) -> who is.
    """
    keep = torch.minimum(keep, c.exists.sum((1, 2)))
    heads = c.tier.shape[1]
    places = (keep * share).round().long()
    if not per_head:
        places = places // heads * heads
    important = (c.rank < (keep - places)[:, None, None]) & c.exists
    rest = c.exists & ~important
    earlier = rest & ~c.new
    free = places - earlier.sum((1, 2))  # places that no earlier representative holds
    anew = (free < 0)[:, None, None]
    among = torch.where(anew, rest, rest & c.new)
    seats = torch.where(free < 0, places, free)
    base = torch.where(anew, important, important | earlier)
    count = among.sum(-1).cumsum(1)  # [batch, kv_heads]
    upto = seats[:, None] * count // count[:, -1:].clamp_min(1)
    split = upto.diff(dim=1, prepend=upto.new_zeros(upto.shape[0], 1))
    return base | elect(c, among, split if per_head else seats // heads)


def representation_of(given: Any) -> Representation | None:
    """A config's `representatives`, an object or the mapping that `representation_state` made of it, as an object.

    Raises:
        ValueError: neither of these, an unknown kind or field, or an invalid value.
    """
    if given is None or isinstance(given, KVCrush | Representatives):
        return given
    kinds: dict[str, type] = {"kvcrush": KVCrush, "score": Representatives}
    if not isinstance(given, Mapping) or given.get("kind") not in kinds:
        raise ValueError(
            f"LeanKVConfig.representatives = {given!r} is not valid: KVCrush(share=...), Representatives(share=..., "
            "score=...), or a mapping with kind 'kvcrush' or 'score' and their fields"
        )
    kind = kinds[given["kind"]]
    fields = {name: value for name, value in given.items() if name != "kind"}
    allowed = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(
            f"LeanKVConfig.representatives: unknown field {unknown[0]!r} of kind {given['kind']!r}, allowed are "
            f"{', '.join(allowed)}"
        )
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"LeanKVConfig.representatives = {given!r} is not valid: {error}") from error


def representation_state(given: KVCrush | Representatives | None) -> dict[str, Any] | None:
    """What a JSON file holds of a config's `representatives`."""
    if given is None:
        return None
    return {"kind": "kvcrush" if isinstance(given, KVCrush) else "score", **dataclasses.asdict(given)}


def _check_share(name: str, share: Any) -> None:
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not math.isfinite(share) or not 0 < share <= 1:
        raise ValueError(f"{name}.share = {share!r} is not valid: a number in (0, 1]")
