"""Who gets which tier: pure functions from scores to tiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.config import LeanKVConfig
from hfkv.policy.candidates import Candidates
from hfkv.policy.representatives import Representation, representation_of
from hfkv.quant import HIGH, LOW, PRUNED

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
    """Of a layer's and sequence's tokens the share `high` is high, the share `keep` is kept, by score.

    Attributes:
        representatives: who takes part of what is kept; None: the best by score take it all.
    """

    high: float | None
    keep: float
    representatives: Representation | None = None

    def __call__(self, c: Candidates) -> Tensor:
        seen = c.seen * c.tier.shape[1]  # tokens of all heads
        high = None if self.high is None else (seen * self.high).round().long()
        return by_quota(c, high, (seen * self.keep).round().long(), self.representatives)


@dataclass(frozen=True)
class Budget:
    """Spend at most `budget` of the exact bytes, everything counted.

    Nothing is pruned while the low tier alone fits; what remains makes the most significant tokens high, up to
    `high_most`. Below that, `high_least` of the tokens stay high and the least significant are pruned.

    Attributes:
        representatives: who takes part of what is kept; None: the best by score take it all.
    """

    budget: float
    high_most: float = 0.30
    high_least: float = 0.03
    representatives: Representation | None = None

    def __call__(self, c: Candidates) -> Tensor:
        heads = c.tier.shape[1]
        allowed = self.budget * c.length * heads * c.costs.exact_token - c.costs.fixed  # [batch] bytes for pages
        seen = c.seen * heads
        if c.tiers == 1:
            return self._largest(c, allowed, lambda share: (None, seen * share))
        least = self.high_least
        spread = self._largest(c, allowed, lambda share: (seen * (share * self.high_most), seen))
        fits = self._bytes(c, self._tiers(c, (seen * 0, seen))) <= allowed  # [batch]: all low fits
        pruned = self._largest(c, allowed, lambda share: (seen * share.clamp_max(least), seen * share))
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

    def _tiers(self, c: Candidates, quota: tuple[Tensor | None, Tensor]) -> Tensor:
        high, keep = quota
        return by_quota(c, None if high is None else high.long(), keep.long(), self.representatives)

    @staticmethod
    def _bytes(c: Candidates, tiers: Tensor) -> Tensor:
        tiers = only_down(c, tiers)
        total = torch.zeros(tiers.shape[0], device=tiers.device)
        for tier, token in enumerate(c.costs.token):
            count = ((tiers == tier) & c.exists).sum(-1)  # [batch, heads]
            pages = (count + c.costs.page_tokens - 1) // c.costs.page_tokens
            total += pages.sum(-1) * (c.costs.page_tokens * token)
        return total


def by_quota(c: Candidates, high: Tensor | None, keep: Tensor, representatives: Representation | None = None) -> Tensor:
    """Tiers by rank of score over the heads of a layer together.

    Args:
        high: int64 [batch], tokens of all heads that may be high (those that are low already do not count), or None.
        keep: int64 [batch], tokens of all heads that may be kept, representatives included.
    """
    kept = c.rank < keep[:, None, None] if representatives is None else representatives.kept(c, keep)
    if high is None:
        return torch.where(kept, HIGH if c.tiers == 1 else LOW, PRUNED)
    return torch.where(kept, torch.where(c.eligible_rank < high[:, None, None], HIGH, LOW), PRUNED)


def only_down(c: Candidates, tiers: Tensor) -> Tensor:
    """A policy's answer with promotions read as staying: LOW -> HIGH becomes LOW."""
    return torch.where((c.tier == LOW) & (tiers == HIGH), LOW, tiers)


def keeps_quota(policy: Policy) -> bool:
    """Whether a flush makes no more tokens of a layer and sequence low than enter it, if the last flush did it too.

    So it is where a number of tokens may be high that never falls: those beyond it are at most as many as are new.
    """
    return isinstance(policy, Shares)


def keep_all(c: Candidates) -> Tensor:
    """Every token in the first tier: `exact`, `k8v4`."""
    return torch.full_like(c.tier, HIGH)


def policy_of(config: LeanKVConfig) -> Policy:
    """The policy that a layer's config describes."""
    if config.policy is not None:
        return config.policy
    if config.budget is not None:
        return Budget(config.budget, representatives=representation_of(config.representatives))
    if config.alpha_low is not None:
        return Thresholds(config.alpha_high, config.alpha_low)
    if config.keep_share is not None:
        return Shares(config.high_share, config.keep_share, representation_of(config.representatives))
    return keep_all
