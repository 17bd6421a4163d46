"""Who gets which tier: pure functions from significance to tiers, and the extension point for others.

A policy is any callable that takes `Candidates` and returns the tier of every token:

    def keep_recent_half(c: Candidates) -> Tensor:
        return torch.where(c.birth >= c.seen[:, None, None] // 2, LOW, PRUNED)

It may only move tokens down: a promoted low token would stay as coarse as it is, so LOW -> HIGH is read as LOW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.config import LeanKVConfig
from hfkv.quant import EMPTY, HIGH, LOW, PRUNED


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


@dataclass(frozen=True)
class Candidates:
    """Everything a policy may look at, for one layer; T counts stored slots and new tokens of the longest head.

    Attributes:
        score: float32 [batch, kv_heads, T], N times the mean attention probability (1 = uniform), averaged over time.
        birth: int64 [batch, kv_heads, T], logical position of the token.
        tier: int8 [batch, kv_heads, T], HIGH, LOW, NEW or EMPTY.
        seen: int64 [batch], real tokens of the sequence that are no longer in the window, pruned ones included.
        length: int64 [batch], real tokens of the sequence.
        tiers: number of tiers, 1 or 2.
        costs: bytes, see `Costs`.
    """

    score: Tensor
    birth: Tensor
    tier: Tensor
    seen: Tensor
    length: Tensor
    tiers: int
    costs: Costs

    @property
    def exists(self) -> Tensor:
        return self.tier != EMPTY

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
        score = self.score.masked_fill(~self.exists, -1.0)
        return score.flatten(1).argsort(dim=1, descending=True, stable=True)


Policy = Callable[[Candidates], Tensor]


@dataclass(frozen=True)
class Thresholds:
    """LeanKV as published: significance >= alpha_high / N is high, >= alpha_low / N is low, the rest is pruned."""

    alpha_high: float | None
    alpha_low: float

    def __call__(self, c: Candidates) -> Tensor:
        lowest = torch.where(c.score >= self.alpha_low, LOW if c.tiers == 2 else HIGH, PRUNED)
        return lowest if self.alpha_high is None else torch.where(c.score >= self.alpha_high, HIGH, lowest)


@dataclass(frozen=True)
class Shares:
    """Of a layer's and sequence's tokens the share `high` is high, the share `keep` is kept, by significance."""

    high: float | None
    keep: float

    def __call__(self, c: Candidates) -> Tensor:
        seen = c.seen * c.tier.shape[1]  # tokens of all heads
        high = None if self.high is None else (seen * self.high).round().long()
        return by_quota(c, high, (seen * self.keep).round().long())


@dataclass(frozen=True)
class Budget:
    """Spend at most `budget` of the exact bytes, everything counted.

    Nothing is pruned while the low tier alone fits; what remains makes the most significant tokens high, up to
    `high_most`. Below that, `high_least` of the tokens stay high and the least significant are pruned.
    """

    budget: float
    high_most: float = 0.30
    high_least: float = 0.03

    def __call__(self, c: Candidates) -> Tensor:
        heads = c.tier.shape[1]
        allowed = self.budget * c.length * heads * c.costs.exact_token - c.costs.fixed  # [batch] bytes for pages
        seen = c.seen * heads
        if c.tiers == 1:
            return self._largest(c, allowed, lambda share: (None, seen * share))
        least = self.high_least
        spread = self._largest(c, allowed, lambda share: (seen * (share * self.high_most), seen))
        fits = self._bytes(c, by_quota(c, (seen * 0).long(), seen.long())) <= allowed  # [batch]: all low fits
        pruned = self._largest(
            c, allowed, lambda share: (seen * torch.minimum(share, share.new_tensor(least)), seen * share)
        )
        return torch.where(fits[:, None, None], spread, pruned)

    def _largest(
        self, c: Candidates, allowed: Tensor, quota: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    ) -> Tensor:
        """Bisect each sequence's share in [0, 1] for the largest one whose pages fit."""
        low, high = torch.zeros_like(allowed), torch.ones_like(allowed)
        for step in range(13):
            share = high if step == 0 else (low + high) / 2
            tiers = self._tiers(c, quota(share))
            fits = self._bytes(c, tiers) <= allowed
            low, high = torch.where(fits, share, low), torch.where(fits, high, share)
        return self._tiers(c, quota(low))

    @staticmethod
    def _tiers(c: Candidates, quota: tuple[Tensor | None, Tensor]) -> Tensor:
        high, keep = quota
        return by_quota(c, None if high is None else high.long(), keep.long())

    @staticmethod
    def _bytes(c: Candidates, tiers: Tensor) -> Tensor:
        tiers = only_down(c, tiers)
        total = torch.zeros(tiers.shape[0], device=tiers.device)
        for tier, token in enumerate(c.costs.token):
            count = ((tiers == tier) & c.exists).sum(-1)  # [batch, heads]
            pages = (count + c.costs.page_tokens - 1) // c.costs.page_tokens
            total += pages.sum(-1) * (c.costs.page_tokens * token)
        return total


def by_quota(c: Candidates, high: Tensor | None, keep: Tensor) -> Tensor:
    """Tiers by rank of significance over the heads of a layer together.

    Args:
        high: int64 [batch], tokens of all heads that may be high (those that are low already do not count), or None.
        keep: int64 [batch], tokens of all heads that may be kept.
    """
    kept = c.rank < keep[:, None, None]
    if high is None:
        return torch.where(kept, HIGH if c.tiers == 1 else LOW, PRUNED)
    return torch.where(kept, torch.where(c.eligible_rank < high[:, None, None], HIGH, LOW), PRUNED)


def only_down(c: Candidates, tiers: Tensor) -> Tensor:
    """A policy's answer with promotions read as staying: LOW -> HIGH becomes LOW."""
    return torch.where((c.tier == LOW) & (tiers == HIGH), LOW, tiers)


def keep_all(c: Candidates) -> Tensor:
    """Every token in the first tier: `exact`, `k8v4`."""
    return torch.full_like(c.tier, HIGH)


def policy_of(config: LeanKVConfig) -> Policy:
    """The policy that a layer's config describes."""
    if config.policy is not None:
        return config.policy
    if config.budget is not None:
        return Budget(config.budget)
    if config.alpha_low is not None:
        return Thresholds(config.alpha_high, config.alpha_low)
    if config.keep_share is not None:
        return Shares(config.high_share, config.keep_share)
    return keep_all
