"""KVCrush: the facts of its description, and what an election owes to everyone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv import LeanKVConfig
from hfkv.kernels.kvcrush import crush_distances, elect, hamming, head_bits, majority, medians
from hfkv.policy import Candidates, Costs, KVCrush, Representatives, Shares
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PRUNED

COSTS = Costs(token=(106, 57), page_tokens=32, exact_token=256, fixed=20_000)


class Attention:
    """Material that has the attention of every query head, and keys."""

    def __init__(self, attention: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        from hfkv.kernels import kvcrush

        self.kernels, self._attention, self._keys = kvcrush, attention, keys

    def attention(self) -> torch.Tensor:
        return self._attention

    def keys(self) -> torch.Tensor:
        assert self._keys is not None
        return self._keys


def words(*texts: str) -> torch.Tensor:
    """Bits of tokens written as words: bool [1, heads, tokens]."""
    return torch.tensor([[bit == "1" for bit in text] for text in texts]).T[None]


def candidates(batch=1, heads=2, groups=2, tokens=24, stored=0, gone=0, seed=0, prompt=True) -> Candidates:
    """`stored` low tokens per head, `gone` empty slots, the rest new."""
    generator = torch.Generator().manual_seed(seed)
    tier = torch.full((batch, heads, tokens), NEW, dtype=torch.int8)
    tier[..., :stored] = LOW
    tier[..., stored : stored + gone] = EMPTY
    score = torch.rand(batch, heads, tokens, generator=generator)
    attention = torch.rand(batch, heads * groups, tokens, generator=generator)
    birth = torch.arange(tokens).expand(batch, heads, -1)
    seen = torch.full((batch,), tokens)
    keys = torch.randn(batch, heads, tokens, 8, generator=generator)
    material = Attention(attention, keys)
    return Candidates(score, birth, tier, seen, seen + 64, 2, COSTS, material, prompt)


# ---- the facts


@pytest.mark.parametrize("tokens", [2, 10, 64])
def test_exactly_half_of_a_heads_bits_are_ones(tokens):
    received = torch.rand(3, 5, tokens, generator=torch.Generator().manual_seed(tokens))
    there = torch.ones_like(received, dtype=torch.bool)
    bits = head_bits(received, there, medians(received, there))
    assert (bits.sum(-1) == tokens // 2).all()


def test_the_mean_anchor_is_a_strict_majority():
    bits = words("1010", "1100", "1110", "0010", "0000")
    anchor = majority(bits.sum(-1), torch.tensor([[5, 5, 5, 5]]))
    assert anchor.int().tolist() == [[1, 0, 1, 0]]
    even = words("10", "10", "00", "00")
    assert not majority(even.sum(-1), torch.tensor([[4, 4]])).any()  # half is not more than half


def test_hamming_distances_to_an_anchor():
    assert hamming(words("1010", "0101", "1100"), words("1010")[..., 0]).tolist() == [[0, 4, 2]]


def test_what_does_not_exist_has_no_part_in_a_median():
    received = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 9.0, 9.0]]])
    there = torch.tensor([[[True, True, True, True, False, False]]])
    assert head_bits(received, there, medians(received, there)).int().tolist() == [[[1, 1, 0, 0, 0, 0]]]
    assert not head_bits(received, there & False, medians(received, there & False)).any()


def test_seats_are_at_evenly_spaced_ranks_of_distance_then_position():
    among = torch.tensor([[True, True, False, True, True, True, True]])
    distance = torch.tensor([[3, 1, 0, 1, 2, 1, 3]])  # order of ranks: 1, 3, 5, 4, 0, 6
    assert elect(among, distance, torch.tensor([3]), 4)[0].nonzero().flatten().tolist() == [3, 4, 6]
    assert elect(among, distance, torch.tensor([6]), 4).equal(among)
    assert not elect(among, distance, torch.tensor([0]), 4).any()


def test_a_budget_larger_than_the_candidates_keeps_them_all():
    among = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    assert elect(among, torch.zeros(4, 50), torch.tensor([1000] * 4), 9).equal(among)
    c = candidates()
    assert KVCrush(0.5).kept(c, torch.tensor([10_000])).all()


# ---- anchors


@pytest.mark.parametrize("anchor", ["RANDOM", "zeros", "ONES", "mean", "Alternating"])
def test_every_anchor_elects_as_many(anchor):
    kept = KVCrush(0.5, anchor).kept(candidates(), torch.tensor([20]))
    assert kept.sum() == 20


def test_zeros_and_ones_are_at_opposite_ends():
    received = torch.rand(1, 6, 40, generator=torch.Generator().manual_seed(3))
    there = torch.ones_like(received, dtype=torch.bool)
    near, far = (crush_distances(received, there, torch.full((1, 6), bit)) for bit in (False, True))
    assert (near + far == 6).all()


def test_the_random_anchor_follows_its_seed():
    anchors = [KVCrush(0.5, "random", seed)._anchor(torch.zeros(2, 32, 1)) for seed in (1, 1, 2)]
    assert anchors[0].equal(anchors[1]) and not anchors[0].equal(anchors[2])
    assert anchors[0][0].equal(anchors[0][1])  # the same for every sequence


# ---- who is kept


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([0.1, 0.25, 0.75, 1.0]),
    keep=st.integers(0, 110),
    stored=st.integers(0, 12),
    gone=st.integers(0, 4),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["kvcrush", "keydiff", "random", "strided"]),
)
def test_quotas_are_exact_and_the_best_by_score_are_kept(share, keep, stored, gone, seed, kind):
    prompt = not stored
    c = candidates(batch=2, stored=stored, gone=gone, seed=seed, prompt=prompt)
    chosen = KVCrush(share) if kind == "kvcrush" else Representatives(share, kind)
    kept = chosen.kept(c, torch.tensor([keep, keep // 2]))
    exists = c.exists.sum((1, 2))
    assert (kept.sum((1, 2)) == torch.minimum(torch.tensor([keep, keep // 2]), exists)).all()
    assert not (kept & ~c.exists).any()
    for b, most in enumerate(torch.minimum(torch.tensor([keep, keep // 2]), exists).tolist()):
        best = (c.rank[b] < most - round(most * share)) & c.exists[b]
        assert (kept[b] | ~best).all()


def test_representatives_live_in_the_low_tier():
    c = candidates(tokens=40)
    tiers = Shares(0.1, 0.5, KVCrush(0.5))(c)
    important = c.rank < 20
    assert set(tiers[~important].tolist()) == {LOW, PRUNED}
    assert (tiers == HIGH).sum() == 8 and (tiers != PRUNED).sum() == 40


def test_representatives_survive_until_there_are_fewer_places():
    """At a flush stored tokens beyond the best by score stay; only new ones compete for free places."""
    c = candidates(tokens=40, stored=30, prompt=False)
    kept = KVCrush(0.6).kept(c, torch.tensor([70]))
    assert kept[c.tier == LOW].all()
    assert kept[c.tier == NEW].sum() == 10
    fewer = KVCrush(0.6).kept(c, torch.tensor([40]))  # fewer than are stored: all are elected anew
    assert fewer.sum() == 40 and not fewer[c.tier == LOW].all()


def test_shared_by_all_heads_as_published():
    c = candidates(tokens=40, heads=3)
    kept = KVCrush(0.5, per_head=False).kept(c, torch.tensor([60]))
    important = c.rank < 30
    representatives = kept & ~important
    dropped_by_all = ~important.any(1)
    assert representatives.sum() == 30
    assert (representatives.any(1) == representatives.all(1)).all()
    assert (~representatives.any(1) | dropped_by_all).all()


def test_heads_that_hold_different_tokens_are_compared_by_position():
    """A token's bits are its own whatever slots it has in other heads."""
    c = candidates(tokens=20, stored=0)
    kept = KVCrush(0.5).kept(c, torch.tensor([20]))
    order = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(h)) for h in range(2)])[None]
    at = order.repeat_interleave(2, 1)
    shuffled = Candidates(
        c.score.gather(2, order), c.birth.gather(2, order), c.tier, c.seen, c.length, 2, COSTS,
        Attention(c.attention.gather(2, at)), True,
    )  # fmt: skip
    assert KVCrush(0.5).kept(shuffled, torch.tensor([20])).equal(kept.gather(2, order))


# ---- what is refused


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: KVCrush(0.0), "KVCrush.share"),
        (lambda: KVCrush(float("nan")), "KVCrush.share"),
        (lambda: KVCrush(0.2, "median"), "KVCrush.anchor"),
        (lambda: KVCrush(0.2, rng_seed=0.5), "KVCrush.rng_seed"),
        (lambda: KVCrush(0.2, per_head=1), "KVCrush.per_head"),
        (lambda: Representatives(0.2, "novelty"), "Representatives.score"),
        (lambda: LeanKVConfig(keep_share=0.5, representatives={"kind": "crush"}), "representatives"),
        (lambda: LeanKVConfig(keep_share=0.5, representatives={"kind": "kvcrush", "many": 1}), "'many'"),
        (lambda: LeanKVConfig(keep_share=0.5, representatives={"kind": "score", "share": 0.5}), "score"),
        (lambda: LeanKVConfig.preset("paper", representatives=KVCrush()), "representatives"),
    ],
)
def test_bad_fields_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_config_with_representatives_is_json():
    for chosen in (KVCrush(0.25, "random", 7), Representatives(0.5, "leverage")):
        config = LeanKVConfig(keep_share=0.5, representatives=chosen)
        assert LeanKVConfig.from_json(config.to_json()) == config
        assert config.representatives == chosen
