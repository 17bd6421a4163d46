"""Eviction to compare with, at given physical bytes, through the policy extension point; what is kept stays exact.

Every head keeps the same number of tokens, as in the originals; the recent window is LeanKVCache's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkv.config import EXACT, LeanKVConfig
from hfkv.policy import Candidates
from hfkv.quant import HIGH, NEW, PRUNED

POOL = 5
"""Neighbouring positions that SnapKV averages scores over."""

ALL_QUERIES = 1 << 20
"""`observe` for a policy that accumulates the attention of the whole prompt."""


@dataclass(frozen=True)
class SnapKV:
    """Keep what the prompt's last queries attend to, pooled over neighbours; later tokens are all kept.

    `share` are physical bytes per exact byte. Source: arXiv 2404.14469, section 4.
    """

    share: float

    def __call__(self, c: Candidates) -> Tensor:
        if bool((c.exists & (c.tier != NEW)).any()):  # a flush of generation
            return torch.full_like(c.tier, HIGH)
        pooled = F.avg_pool1d(c.score, POOL, stride=1, padding=POOL // 2, count_include_pad=False)
        return _best(c, pooled, kept_per_head(c, self.share))


@dataclass(frozen=True)
class H2O:
    """Keep the heavy hitters of the attention accumulated over all queries, and as many of the newest tokens.

    `share` are physical bytes per exact byte. Source: arXiv 2306.14048, section 4.
    """

    share: float

    def __call__(self, c: Candidates) -> Tensor:
        kept = kept_per_head(c, self.share)  # [batch]
        newest = c.birth >= (c.seen - kept // 2)[:, None, None]
        accumulated = c.score * (c.length[:, None, None] - c.birth)  # a mean over the queries behind the token
        return _best(c, accumulated.masked_fill(newest, float("inf")), kept)


def kept_per_head(c: Candidates, share: float) -> Tensor:
    """How many tokens of each head fit into `share` of the exact bytes, in whole pages: int64 [batch]."""
    heads = c.tier.shape[1]
    allowed = share * c.length * heads * c.costs.exact_token - c.costs.fixed
    pages = allowed // (heads * c.costs.page_tokens * c.costs.token[0])
    return (pages.clamp_min(0) * c.costs.page_tokens).long()


def _best(c: Candidates, score: Tensor, kept: Tensor) -> Tensor:
    """HIGH for the `kept` [batch] tokens of each head with the largest scores [batch, kv_heads, T]."""
    order = score.masked_fill(~c.exists, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).to(order).expand_as(order))
    return torch.where(rank < kept[:, None, None], HIGH, PRUNED).to(c.tier.dtype)


def config_of(policy: SnapKV | H2O) -> LeanKVConfig:
    """A config whose tokens are exact or gone, by this policy."""
    observe = ALL_QUERIES if isinstance(policy, H2O) else LeanKVConfig().observe
    return LeanKVConfig(tiers=(EXACT,), policy=policy, observe=observe, rotate_keys=False, rotate_values=False)
