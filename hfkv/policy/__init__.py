"""Who gets which tier, and the two points where others can have their say.

A *score* says how long each token is worth keeping; it is any callable that takes `Candidates` and returns
float32 [batch, kv_heads, T], the larger the better, for `LeanKVConfig(score=...)`:

    def key_norm(c: Candidates) -> Tensor:
        return -c.keys.norm(dim=-1)

A *policy* is any callable that takes `Candidates` and returns the tier of every token, for `LeanKVConfig(policy=...)`:

    def keep_recent_half(c: Candidates) -> Tensor:
        return torch.where(c.birth >= c.seen[:, None, None] // 2, LOW, PRUNED)

It may only move tokens down: a promoted low token would stay as coarse as it is, so LOW -> HIGH is read as LOW.
"""

from hfkv.policy.candidates import Candidates, Costs, Material
from hfkv.policy.representatives import KVCrush, Representation, Representatives
from hfkv.policy.scores import SCORES, Mixed, Score, observes_new, score_of
from hfkv.policy.tiers import Budget, Policy, Shares, Thresholds, by_quota, keep_all, keeps_quota, only_down, policy_of

__all__ = [
    "SCORES",
    "Budget",
    "Candidates",
    "Costs",
    "KVCrush",
    "Material",
    "Mixed",
    "Policy",
    "Representation",
    "Representatives",
    "Score",
    "Shares",
    "Thresholds",
    "by_quota",
    "keep_all",
    "keeps_quota",
    "observes_new",
    "only_down",
    "policy_of",
    "score_of",
]
