"""`Candidates`: everything that a score or a policy may look at."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hfkv.kernels import kvcrush
from hfkv.quant import EMPTY, LOW, NEW


class Election(Protocol):
    """The kernels of KVCrush, see `hfkv.kernels.kvcrush`."""

    def crush_distances(self, received: Tensor, exists: Tensor, anchor: Tensor | None) -> Tensor: ...

    def elect(self, among: Tensor, distance: Tensor, seats: Tensor, most: int) -> Tensor: ...


@dataclass(frozen=True)
class Costs:
    """Bytes of one layer and sequence, all heads: what a budget has to add up.

    Attributes:
        token: bytes of a packed token, per tier.
        page_tokens: tokens per page; a head pays whole pages.
        exact_token: bytes of a token and head in the exact cache.
        fixed: bytes that do not depend on tiers (window, queries, tables).
    """

    token: tuple[int, ...]
    page_tokens: int
    exact_token: int
    fixed: int


class Material(Protocol):
    """What a layer lets scores and policies read beyond numbers per token; made when asked for.

    T counts stored slots and new tokens as in `Candidates`; what is stored is read from its codes, what is new is
    exact. Empty slots hold zeros.
    """

    @property
    def kernels(self) -> Election:
        """Those that the layer runs on."""
        ...

    def keys(self) -> Tensor:
        """After RoPE, float32 [batch, kv_heads, T, D]."""
        ...

    def values(self) -> Tensor:
        """float32 [batch, kv_heads, T, Dv]."""
        ...

    def attention(self) -> Tensor:
        """N times the mean probability given by the observing queries, float32 [batch, q_heads, T]."""
        ...

    def observed(self) -> Tensor | None:
        """At a flush `attention` of new tokens, largest over the group, [batch, kv_heads, T]; None: nobody observed."""
        ...

    def accumulated(self) -> Tensor:
        """Probability received since the last time, summed over queries, float32 [batch, q_heads, T]."""
        ...

    def replayed(self) -> Tensor:
        """N times the largest probability given by the prompt's queries asked again, float32 [batch, kv_heads, T]."""
        ...

    def reconstructed(self) -> Tensor | None:
        """N times the largest probability that a second pass over the prompt gave; None where there was none."""
        ...

    def expected(self) -> Tensor:
        """N times the probability that future queries are expected to give, float32 [batch, q_heads, T]."""
        ...


@dataclass(frozen=True)
class Candidates:
    """Everything a policy may look at, for one layer; T counts stored slots and new tokens of the longest head.

    Attributes:
        score: float32 [batch, kv_heads, T], what the config's `score` says of every token; the larger, the longer it is
            kept. For `"attention"` N times the mean attention probability (1 = uniform), averaged over time. While a
            score is being asked: what was stored of it, and 0 for new tokens.
        birth: int64 [batch, kv_heads, T], logical position of the token.
        tier: int8 [batch, kv_heads, T], HIGH, LOW, NEW or EMPTY.
        seen: int64 [batch], real tokens of the sequence that are no longer in the window, pruned ones included.
        length: int64 [batch], real tokens of the sequence.
        tiers: number of tiers, 1 or 2.
        costs: bytes, see `Costs`.
        material: keys, values and attention, read when first asked for; None where there are none.
        prompt: True while a prompt (or a long chunk of one) is stored: stored tokens then stay as they are.
        span: logical tokens so far, pads included: what the host knows of `length` and `birth` without asking the
            device, for all are at most (`birth` less than) that. None: it has to ask.
    """

    score: Tensor
    birth: Tensor
    tier: Tensor
    seen: Tensor
    length: Tensor
    tiers: int
    costs: Costs
    material: Material | None = None
    prompt: bool = False
    span: int | None = None

    @property
    def exists(self) -> Tensor:
        return self.tier != EMPTY

    @property
    def new(self) -> Tensor:
        return self.tier == NEW

    # ---- what is paid by those who ask -------------------------------------------------------------------------------

    @functools.cached_property
    def keys(self) -> Tensor:
        """Keys after RoPE, float32 [batch, kv_heads, T, D]; stored ones are dequantised."""
        return self._material("keys").keys()

    @functools.cached_property
    def values(self) -> Tensor:
        """Values, float32 [batch, kv_heads, T, Dv]; stored ones are dequantised."""
        return self._material("values").values()

    @functools.cached_property
    def attention(self) -> Tensor:
        """N times the mean probability that the observing queries give, per *query* head: float32 [batch, q_heads, T].

        At a prompt its last `observe` queries observe, at a flush those kept of the last steps.
        """
        return self._material("attention").attention()

    @functools.cached_property
    def observed(self) -> Tensor | None:
        """What the layer's kernels have seen of `attention` at a flush, largest over the group, of new tokens alone.

        float32 [batch, kv_heads, T], 0 for stored ones; None where they were not asked.
        """
        return None if self.material is None else self.material.observed()

    @functools.cached_property
    def accumulated(self) -> Tensor:
        """Probability received since the last flush, summed over all queries: float32 [batch, q_heads, T]."""
        return self._material("accumulated").accumulated()

    @functools.cached_property
    def replayed(self) -> Tensor:
        """N times the largest probability that the prompt's own queries give when they are asked once more behind it.

        float32 [batch, kv_heads, T]; at a prompt only.
        """
        return self._material("replayed").replayed()

    @functools.cached_property
    def reconstructed(self) -> Tensor | None:
        """N times the largest probability that a second pass gave (`hfkv.reconstruct`); None where there was none.

        float32 [batch, kv_heads, T].
        """
        return self._material("reconstructed").reconstructed()

    @functools.cached_property
    def expected(self) -> Tensor:
        """N times the probability that queries to come give, from the mean and covariance of the prompt's queries.

        float32 [batch, q_heads, T]; at a prompt only.
        """
        return self._material("expected").expected()

    def _material(self, name: str) -> Material:
        if self.material is None:
            raise ValueError(f"these Candidates were made without material, so they have no {name}: pass material=")
        return self.material

    @property
    def kernels(self) -> Election:
        """KVCrush's kernels: Triton's where the layer runs on them, else their twins."""
        return kvcrush if self.material is None else self.material.kernels

    def per_kv_head(self, x: Tensor) -> Tensor:
        """The largest over the GQA group: [batch, q_heads, T] -> [batch, kv_heads, T]."""
        return x.unflatten(1, (self.tier.shape[1], -1)).amax(2)

    # ---- ranks -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def rank(self) -> Tensor:
        """Rank by score among all heads of the sequence, 0 = largest; ties by position. int64 [batch, kv_heads, T]."""
        position = torch.arange(self._order.shape[1], device=self._order.device).expand_as(self._order)
        return torch.empty_like(self._order).scatter_(1, self._order, position).view(self.tier.shape)

    @functools.cached_property
    def eligible_rank(self) -> Tensor:
        """The same among those that may be high; the largest int64 for the others."""
        eligible = (self.exists & (self.tier != LOW)).flatten(1).gather(1, self._order)
        rank = torch.where(eligible, eligible.cumsum(1) - 1, torch.iinfo(torch.int64).max)
        return torch.empty_like(rank).scatter_(1, self._order, rank).view(self.tier.shape)

    @functools.cached_property
    def _order(self) -> Tensor:
        """Positions of all heads' tokens, best first, those that do not exist last. int64 [batch, kv_heads * T]."""
        score = self.score.masked_fill(~self.exists, float("-inf"))
        return score.flatten(1).argsort(dim=1, descending=True, stable=True)
