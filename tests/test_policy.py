"""Policies are pure functions of significance; what they may spend, they do not pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv import LeanKVConfig
from hfkv.observe import SCORE_HORIZON, aged
from hfkv.policy import Budget, Candidates, Costs, Shares, Thresholds, keep_all, only_down, policy_of
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PRUNED

COSTS = Costs(token=(106, 57), page_tokens=32, exact_token=256, fixed=20_000)


def candidates(score, tier=None, seen=None, tiers=2, length=None):
    score = torch.as_tensor(score, dtype=torch.float32)
    tier = torch.full(score.shape, NEW, dtype=torch.int8) if tier is None else torch.as_tensor(tier, dtype=torch.int8)
    count = (tier != EMPTY).sum(-1).amax(-1)
    seen = count if seen is None else torch.as_tensor(seen)
    birth = torch.arange(score.shape[-1]).expand(score.shape)
    return Candidates(score, birth, tier, seen, seen + 64 if length is None else length, tiers, COSTS)


def test_thresholds_are_in_units_of_uniform_attention():
    c = candidates([[[2.0, 1.0, 0.99, 0.02, 0.019]]])
    assert Thresholds(1.0, 0.02)(c).tolist() == [[[HIGH, HIGH, LOW, LOW, PRUNED]]]
    one = candidates([[[2.0, 0.5, 0.01]]], tiers=1)
    assert Thresholds(None, 0.02)(one).tolist() == [[[HIGH, HIGH, PRUNED]]]


def test_shares_are_pooled_over_the_heads_of_a_layer():
    c = candidates([[[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]]])
    assert Shares(0.5, 0.75)(c).tolist() == [[[HIGH] * 4, [PRUNED, PRUNED, LOW, LOW]]]


def test_sequences_of_a_batch_are_independent():
    c = candidates([[[9.0, 8.0]], [[1.0, 2.0]]])
    assert Shares(0.5, 1.0)(c).tolist() == [[[HIGH, LOW]], [[LOW, HIGH]]]


def test_low_tokens_take_no_high_places():
    c = candidates([[[9.0, 8.0, 7.0, 6.0]]], tier=[[[LOW, LOW, HIGH, NEW]]])
    assert Shares(0.25, 1.0)(c).tolist() == [[[LOW, LOW, HIGH, LOW]]]


def test_empty_slots_count_for_nothing():
    c = candidates([[[0.1, 0.2, 0.0, 0.0]]], tier=[[[NEW, NEW, EMPTY, EMPTY]]])
    assert Shares(0.5, 1.0)(c)[0, 0, :2].tolist() == [LOW, HIGH]


def test_promotions_are_read_as_staying():
    c = candidates([[[1.0, 1.0]]], tier=[[[LOW, HIGH]]])
    assert only_down(c, torch.full((1, 1, 2), HIGH)).tolist() == [[[LOW, HIGH]]]


def test_keep_all_keeps_all():
    assert (keep_all(candidates([[[1.0, 0.0]]])) == HIGH).all()


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 600),
    st.floats(0.02, 1.0),
    st.integers(1, 2),
    st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_a_budget_is_kept_and_spent(batch, heads, tokens, budget, tiers, seed):
    """Whole pages are counted; what is left over is less than one page per head and tier, or everything is high."""
    score = torch.rand(batch, heads, tokens, generator=torch.Generator().manual_seed(seed))
    c = candidates(score, tiers=tiers)
    policy = Budget(budget)
    got = only_down(c, policy(c))
    allowed = (budget * c.length * heads * COSTS.exact_token - COSTS.fixed).clamp_min(0)
    spent = policy._bytes(c, got)
    assert (spent <= allowed).all()
    room = allowed - spent
    full = (got == HIGH).float().mean((1, 2)) >= (policy.high_most if tiers == 2 else 1.0) - 0.01
    page = 32 * COSTS.token[0] * heads
    assert (full | (room <= 2 * page + 0.001 * allowed) | ((got == PRUNED).sum((1, 2)) == 0)).all()


def test_a_budget_prunes_only_where_the_low_tier_does_not_fit():
    c = candidates(torch.rand(1, 2, 1000))
    assert (Budget(0.35)(c) != PRUNED).all()
    assert (Budget(0.15)(c) == PRUNED).any()


def test_configs_name_their_policy():
    assert policy_of(LeanKVConfig.preset("paper")) == Thresholds(1.0, 0.02)
    assert policy_of(LeanKVConfig.preset("balanced")) == Shares(0.10, 1.0)
    assert policy_of(LeanKVConfig.preset("k8v4")) is keep_all
    assert policy_of(LeanKVConfig(budget=0.25)) == Budget(0.25)
    own = policy_of(LeanKVConfig(policy=keep_all, keep_share=None))
    assert own is keep_all


@pytest.mark.parametrize("start", [64, 1000, 100_000])
def test_fp16_scores_follow_their_fp32_twins_over_128k_tokens(start):
    """Averaged block by block for 128K tokens, an fp16 score stays within 2 % of the same average in fp32."""
    generator = torch.Generator().manual_seed(0)
    true = torch.logspace(-3, 3, 200)
    half, full = true.half(), true.clone()
    birth = torch.zeros(200, dtype=torch.long)
    for seen in range(start, 131_072, 32):
        block = true * torch.rand(200, generator=generator) * 2
        half = aged(half.float(), block, birth, seen, 32).half()
        full = aged(full, block, birth, seen, 32)
    assert ((half.float() - full).abs() / full).max() < 0.02
    assert SCORE_HORIZON >= 1024


def test_aging_is_the_mean_since_birth():
    """A token born at 100 that received a in one block of 32 and b in the next has their mean."""
    first = aged(torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([100]), 132, 32)
    second = aged(first, torch.tensor([1.0]), torch.tensor([100]), 164, 32)
    assert second.item() == pytest.approx(2.0)
