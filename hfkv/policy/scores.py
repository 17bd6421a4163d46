"""Scores: how long each token is worth keeping, one short function each, in the names of the field.

Every function takes `Candidates` and returns float32 [batch, kv_heads, T], the larger, the longer a token is kept.
A score is given once, when a token leaves the window, and stays with it (`placed`), except for `attention`, which is
averaged over time, and `h2o`, which adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, cosine_similarity, normalize

from hfkv.policy.candidates import Candidates
from hfkv.policy.geometry import farthest_first, ridge_leverage

Score = Callable[[Candidates], Tensor]

SNAPKV_KERNEL = 5
GOLDEN = 0.6180339887498949


def attention(c: Candidates) -> Tensor:
    """Mean attention probability from the last queries, largest over the GQA group (LeanKV; TOVA for one query)."""
    return c.per_kv_head(c.attention)


def h2o(c: Candidates) -> Tensor:
    """Attention probability summed over all queries (H2O, "heavy hitters"; kvpress: ObservedAttentionPress)."""
    received = c.per_kv_head(c.accumulated)
    return received if c.prompt else torch.where(c.new, received, c.score + received)


def snapkv(c: Candidates) -> Tensor:
    """Attention of the last queries, pooled over neighbours, mean over the group (SnapKV; kvpress: SnapKVPress)."""
    pooled = avg_pool1d(c.attention, SNAPKV_KERNEL, 1, SNAPKV_KERNEL // 2, count_include_pad=False)
    return pooled.unflatten(1, (c.tier.shape[1], -1)).mean(2)


def value_attention(c: Candidates) -> Tensor:
    """Attention of the last queries times the length of the value (VATP)."""
    return c.per_kv_head(c.attention) * c.values.norm(dim=-1)


def knorm(c: Candidates) -> Tensor:
    """Short keys first: they attract attention (Devoto et al. 2024; kvpress: KnormPress)."""
    return -c.keys.norm(dim=-1)


def keydiff(c: Candidates) -> Tensor:
    """Keys least like the mean of the normalised keys (KeyDiff; kvpress: KeyDiffPress)."""
    return -cosine_similarity(c.keys, normalize(c.keys, dim=-1).sum(2, keepdim=True), dim=-1)


def leverage(c: Candidates) -> Tensor:
    """Keys that the others explain worst: ridge leverage of the normalised keys (kvpress: LeverageScorePress)."""
    return ridge_leverage(normalize(c.keys, dim=-1), ridge=1.0)


def coverage(c: Candidates) -> Tensor:
    """Keys in farthest-first order, so that every dropped key has a kept one near; quadratic in the prompt."""
    return farthest_first(normalize(c.keys, dim=-1), c.exists, held=None if c.prompt else c.exists & ~c.new)


def expected_attention(c: Candidates) -> Tensor:
    """Attention of queries to come, from the prompt's, times the value's length (kvpress: ExpectedAttentionPress)."""
    return c.expected.unflatten(1, (c.tier.shape[1], -1)).mean(2) * c.values.norm(dim=-1)


def replay(c: Candidates) -> Tensor:
    """The most attention that a token gets when the prompt's own queries are asked once more behind it.

    What KVzip sees while the model repeats the prompt, without running the model again: the queries of the one pass,
    turned on by RoPE, look at everything in their part of the prompt, what came after them included.
    """
    return c.replayed


def kvzip(c: Candidates) -> Tensor:
    """The most attention that a token gets while the model repeats its prompt (KVzip; kvpress: KVzipPress).

    Needs a second pass over the prompt, `hfkv.reconstruct`; until then nothing is pruned.
    """
    return c.replayed if c.reconstructed is None else c.reconstructed


def random(c: Candidates) -> Tensor:
    """A control: the fractional part of a magnified projection of the key, as good as a coin."""
    return c.keys.sum(-1).mul(1e4).frac().abs()


def strided(c: Candidates) -> Tensor:
    """A control: positions in the order that spreads them evenly however many are taken."""
    return (c.birth.double() * GOLDEN).frac().float()


SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (
        attention,
        h2o,
        snapkv,
        value_attention,
        knorm,
        keydiff,
        leverage,
        coverage,
        expected_attention,
        replay,
        kvzip,
        random,
        strided,
    )
}

SELF_UPDATING = ("attention", "h2o")
PROMPT_ONLY = ("replay", "kvzip", "expected_attention")
"""Scores that need a prompt's queries; what is generated later is placed by its attention."""


@dataclass(frozen=True)
class Named:
    """One score as it is."""

    name: str

    def __call__(self, c: Candidates) -> Tensor:
        return in_phase(self.name, c)


@dataclass(frozen=True)
class Mixed:
    """Several scores by rank: the sum of each one's rank over the heads of a layer together.

    Attributes:
        scores: names in `SCORES`.
    """

    scores: tuple[str, ...]

    def __call__(self, c: Candidates) -> Tensor:
        return torch.stack([ranked(c, in_phase(name, c)) for name in self.scores]).sum(0)


@dataclass(frozen=True)
class Once:
    """A score that is given when a token leaves the window and stays with it."""

    score: Score

    def __call__(self, c: Candidates) -> Tensor:
        first = c.prompt or (c.material is not None and c.reconstructed is not None)
        return self.score(c) if first else placed(c, self.score(c))


def in_phase(name: str, c: Candidates) -> Tensor:
    """A score by name; those that need a prompt's queries are taken by attention afterwards."""
    second_pass = name == "kvzip" and c.reconstructed is not None
    if name not in PROMPT_ONLY or c.prompt or second_pass:
        return SCORES[name](c)
    return attention(c) if c.observed is None else c.observed


def score_of(name: str | Sequence[str] | Score) -> Score | None:
    """The function that computes a config's `score`; None for `"attention"`, which the layer's kernels observe."""
    if callable(name):
        return name
    names = (name,) if isinstance(name, str) else tuple(name)
    if names == ("attention",):
        return None
    if names == ("h2o",):
        return h2o
    return Once(Mixed(names) if len(names) > 1 else Named(names[0]))


def observes_new(score: Score | None) -> bool:
    """Whether a layer's score takes tokens by their attention at a flush, but only new ones."""
    given = score.score if isinstance(score, Once) else None
    names = given.scores if isinstance(given, Mixed) else (given.name,) if isinstance(given, Named) else ()
    return any(name in PROMPT_ONLY for name in names)


def ranked(c: Candidates, score: Tensor) -> Tensor:
    """Ranks among the new tokens of a layer's heads together, as a share in (0, 1]; the best has 1."""
    among = c.exists if c.material is not None and c.reconstructed is not None else c.new
    flat = torch.where(among, score, float("-inf")).flatten(1)
    rank = flat.argsort(dim=1, stable=True).argsort(1).view(score.shape) + 1
    return rank / rank.shape[1] / rank.shape[2]


def placed(c: Candidates, score: Tensor) -> Tensor:
    """Stored tokens keep their score; new ones get the one that holds their place among stored and pruned tokens.

    The best tenth of the new tokens, by `score` and over the heads of the layer together, gets the scores of the best
    tenth of all tokens before them. So a block of new tokens loses the share that the others have lost, whatever the
    units of `score`.
    """
    stored = (c.exists & ~c.new).flatten(1)
    flat, new = score.flatten(1), c.new.flatten(1)
    order = torch.where(new, flat, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)  # [batch, all], 0 = best of the new ones
    count, held = new.sum(1, keepdim=True).clamp_min(1), stored.sum(1, keepdim=True)
    before = (c.seen * c.tier.shape[1])[:, None] - new.sum(1, keepdim=True)  # tokens that came earlier
    place = ((rank + 0.5) / count * before).long()
    known = torch.where(stored, c.score.flatten(1), float("-inf")).sort(1, descending=True).values
    lowest = known.gather(1, (held - 1).clamp_min(0))
    given = known.gather(1, torch.minimum(place, (held - 1).clamp_min(0)))
    given = torch.where(place < held, given, lowest - (rank + 1.0) / count)  # behind all that is still there
    given = torch.where(held > 0, given, flat)
    return torch.where(new, given, c.score.flatten(1)).view(score.shape)
