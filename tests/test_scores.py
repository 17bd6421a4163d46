"""Scores by their formulas, where new tokens are placed, and every score in a real cache."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.policy import SCORES, Candidates, Costs, KVCrush, Representatives, score_of
from hfkv.policy.geometry import farthest_first, ridge_leverage
from hfkv.policy.scores import placed, ranked
from hfkv.quant import EMPTY, LOW, NEW

COSTS = Costs(token=(106, 57), page_tokens=32, exact_token=256, fixed=20_000)
SMALL = dict(tiers=("exact",), rotate_keys=False, rotate_values=False, window=8, flush=4, page_tokens=32)


def candidates(score, tier, seen, prompt=False) -> Candidates:
    score = torch.tensor(score)
    tier = torch.tensor(tier, dtype=torch.int8)
    birth = torch.arange(score.shape[-1]).expand(score.shape)
    return Candidates(score, birth, tier, torch.tensor([seen]), torch.tensor([seen + 8]), 2, COSTS, None, prompt)


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    model.set_attn_implementation("leankv")
    return model


# ---- formulas


def test_leverage_is_the_diagonal_of_the_ridge_projection():
    x = torch.randn(2, 3, 20, 6, generator=torch.Generator().manual_seed(0))
    want = torch.diagonal(x @ torch.linalg.inv(x.mT @ x + 0.5 * torch.eye(6)) @ x.mT, dim1=-2, dim2=-1)
    torch.testing.assert_close(ridge_leverage(x, 0.5), want, rtol=1e-4, atol=1e-5)


def greedy_radius(x, count):
    """How far the farthest vector is from the nearest of `count` that greedy farthest-first takes."""
    centre = normalize(x.sum(0), dim=0)
    taken = [int((x @ centre).argmin())]
    for _ in range(count - 1):
        taken.append(int((1 - x @ x[taken].T).amin(1).argmax()))
    return float((1 - x @ x[taken].T).amin(1).max())


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 60), seed=st.integers(0, 100), count=st.integers(1, 20))
def test_coverage_takes_every_token_once_and_covers_about_as_well_as_greedy(tokens, seed, count):
    x = normalize(torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    exists = torch.ones(1, 2, tokens, dtype=torch.bool)
    score = farthest_first(x, exists, None)
    assert score.sort(-1).values[0, 0].tolist() == list(range(1, tokens + 1))
    count = min(count, tokens)
    picked = score[0, 0].topk(count).indices
    radius = float((1 - x[0, 0] @ x[0, 0, picked].T).amin(1).max())
    assert radius <= 2 * greedy_radius(x[0, 0], count) + 1e-5


def test_coverage_of_rows_of_different_length():
    x = normalize(torch.randn(2, 1, 30, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    exists = torch.ones(2, 1, 30, dtype=torch.bool)
    exists[1, :, 11:] = False
    score = farthest_first(x, exists, None)
    assert (score[1, 0, 11:] == 0).all() and (score[1, 0, :11] > 0).all()
    held = exists.clone()
    held[..., 5:] = False
    fresh = farthest_first(x, exists, held)
    want = (1 - x @ x[:, :, :5].mT).amin(-1)
    torch.testing.assert_close(fresh, want)


def test_ranks_are_shares_of_all_heads_tokens():
    c = candidates([[[3.0, 1.0], [2.0, 9.0]]], [[[NEW, NEW], [NEW, EMPTY]]], 2, prompt=True)
    assert ranked(c, c.score)[c.new].tolist() == [1.0, 0.5, 0.75]


# ---- where new tokens are placed


def test_new_tokens_take_the_places_of_equal_rank_among_all_before_them():
    """Eight tokens came before, six are left: the worse half of two new ones is placed among what was pruned."""
    tier = [[[LOW] * 6 + [NEW] * 2]]
    c = candidates([[[6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]]], tier, 10)
    given = placed(c, torch.tensor([[[0.0] * 6 + [0.1, 0.9]]]))
    assert given[0, 0, :6].equal(c.score[0, 0, :6])
    assert given[0, 0, 7] == 4.0  # rank 0.5 of 2 -> place 2 of 8
    assert given[0, 0, 6] < 1.0  # place 6 of 8: behind all six
    assert placed(candidates([[[0.0, 0.0]]], [[[NEW, NEW]]], 2), torch.tensor([[[3.0, 4.0]]])).tolist() == [
        [[3.0, 4.0]]
    ]


@settings(max_examples=40, deadline=None)
@given(stored=st.integers(0, 30), new=st.integers(1, 12), pruned=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_placed_block_is_in_order_and_finite(stored, new, pruned, seed):
    generator = torch.Generator().manual_seed(seed)
    tier = torch.tensor([[[LOW] * stored + [NEW] * new] * 2], dtype=torch.int8)
    own, asked = (
        torch.randn(1, 2, stored + new, generator=generator),
        torch.randn(1, 2, stored + new, generator=generator),
    )
    seen = torch.tensor([stored + new + pruned])
    birth = torch.arange(stored + new).expand(1, 2, -1)
    c = Candidates(own, birth, tier, seen, seen + 8, 2, COSTS)
    given = placed(c, asked)
    assert given.isfinite().all() and given[~c.new].equal(own[~c.new])
    order = asked[c.new].argsort(descending=True)
    assert (given[c.new][order].diff() <= 0).all()


# ---- in a real cache

ALL = [*(name for name in SCORES if name != "kvzip"), ("replay", "keydiff"), ("attention", "leverage", "knorm")]


def kept_positions(cache: LeanKVCache, layer: int = 0) -> list[list[int]]:
    """Logical positions that each row has packed."""
    packed = cache.layers[layer].tokens.packed
    rows = []
    for tier in range(packed.tiers):
        filled, parts = packed.slots(tier, ("birth",))
        rows.append([birth[there].tolist() for birth, there in zip(parts["birth"], filled, strict=True)])
    return [sorted(position for part in parts for position in part) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("score", ALL, ids=str)
def test_every_score_keeps_its_quota_through_a_prompt_and_flushes(model, score):
    cache = LeanKVCache(LeanKVConfig(**SMALL, keep_share=0.5, score=score))
    model(prompt(60), past_key_values=cache)
    held = kept_positions(cache)
    assert sum(map(len, held)) == round(2 * 52 * 0.5)
    assert all(len(set(row)) == len(row) and max(row) < 52 for row in held if row)
    out = model.generate(prompt(61), past_key_values=cache, max_new_tokens=14, do_sample=False)
    cache.flush()
    seen = out.shape[1] - 1 - 8
    assert sum(map(len, kept_positions(cache))) == round(2 * seen * 0.5)


@pytest.mark.parametrize("score", ["replay", "h2o", "keydiff", "expected_attention", "coverage"])
def test_a_padded_batch_keeps_what_single_prompts_keep(model, score):
    config = LeanKVConfig(**SMALL, keep_share=0.5, score=score)
    batch, inputs = LeanKVCache(config), left_padded([25, 60])
    model(**inputs, past_key_values=batch)
    both = kept_positions(batch)
    for b, length in enumerate((25, 60)):
        single = LeanKVCache(config)
        model(inputs["input_ids"][b : b + 1, 60 - length :], past_key_values=single)
        shifted = [[p + 60 - length for p in row] for row in kept_positions(single)]
        assert both[2 * b : 2 * b + 2] == shifted


@pytest.mark.parametrize(
    "chosen", [KVCrush(0.5), KVCrush(0.5, per_head=False), Representatives(0.75, "leverage")], ids=str
)
def test_representatives_in_every_way_of_generating(model, chosen, tmp_path):
    tiers = dict(tiers=((8, 4), (4, 2)), window=8, flush=4)
    config = LeanKVConfig(**tiers, high_share=0.1, keep_share=0.5, score="attention", representatives=chosen)
    for options in (dict(num_beams=3), dict(prefill_chunk_size=20), dict(num_return_sequences=2, do_sample=True)):
        torch.manual_seed(0)
        cache = LeanKVCache(config)
        model.generate(prompt(50), past_key_values=cache, max_new_tokens=12, **options)
        cache.flush()
        packed = sum(map(len, kept_positions(cache)))
        rows = len(cache.layers[0].tokens.packed.table.lengths)
        assert 0 < packed <= rows * round((50 + 11 - 8) * 0.5) + rows
    cache.save(tmp_path / "cache.safetensors")
    loaded = LeanKVCache.load(tmp_path / "cache.safetensors")
    assert loaded.config == config and kept_positions(loaded) == kept_positions(cache)


@pytest.mark.parametrize("score", ["replay", "h2o", ("replay", "keydiff")], ids=str)
def test_a_chunked_prompt_keeps_its_quota(model, score):
    config = LeanKVConfig(**SMALL, keep_share=0.5, score=score)
    cache = LeanKVCache(config)
    out = model.generate(prompt(90), past_key_values=cache, max_new_tokens=2, prefill_chunk_size=30, do_sample=False)
    cache.flush()
    assert sum(map(len, kept_positions(cache))) == round(2 * (out.shape[1] - 1 - 8) * 0.5)


def test_the_tokens_that_an_exact_score_keeps_are_the_best(model):
    """The same prompt, scored by hand: what is packed is the top half of the function's values."""
    seen = {}

    def mine(c: Candidates) -> torch.Tensor:
        score = -(c.birth % 7).float() - c.keys.norm(dim=-1) * 1e-3
        seen.setdefault("score", score)
        return score

    cache = LeanKVCache(LeanKVConfig(**SMALL, keep_share=0.5, score=mine))
    model(prompt(60), past_key_values=cache)
    last = seen["score"].flatten()  # of the first layer
    want = [sorted(i % 52 for i in last.topk(52).indices.tolist() if i // 52 == head) for head in range(2)]
    assert kept_positions(cache) == want


def test_dequantised_keys_are_the_stored_ones(model):
    """At a flush `keys` and `values` are what attention reads: exact in the exact tier, in order of slots."""
    held = {}

    def look(c: Candidates) -> torch.Tensor:
        if not c.prompt and "keys" not in held:
            held.update(keys=c.keys, values=c.values, birth=c.birth, there=c.exists)
        return -c.birth.float()

    cache = LeanKVCache(LeanKVConfig(**SMALL, keep_share=0.8, score=look))
    ids = prompt(40)
    exact = copy.deepcopy(model).eval()
    model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    full = LeanKVCache(LeanKVConfig(tiers=("exact",), window=64))
    with torch.no_grad():
        exact(ids, past_key_values=full)
    want_k, want_v = full.layers[0].tokens.window.k[:, :, :40], full.layers[0].tokens.window.v[:, :, :40]
    there = held["there"] & (held["birth"] < 40)
    at = held["birth"].clamp(0, 39)
    for got, want in ((held["keys"], want_k), (held["values"], want_v)):
        torch.testing.assert_close(got[there], want.take_along_dim(at[..., None], 2)[there], rtol=1e-4, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(keep_share=0.5, score="novelty"), "score"),
        (dict(keep_share=0.5, score=()), "score"),
        (dict(keep_share=0.5, score=("replay", "novelty")), "score"),
        (dict(alpha_high=1.0, alpha_low=0.1, score="replay"), "thresholds of attention"),
    ],
)
def test_bad_scores_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        LeanKVConfig(**fields)


def test_defaults_of_the_score():
    assert LeanKVConfig().score == "attention"
    assert LeanKVConfig(keep_share=0.7).score == LeanKVConfig(budget=0.2).score == "replay"
    assert LeanKVConfig.preset("aggressive").score == "replay"
    assert LeanKVConfig.preset("paper").score == "attention"
    assert score_of("attention") is None
    own = LeanKVConfig(keep_share=0.5, score=SCORES["knorm"])
    with pytest.raises(ValueError, match="score"):
        own.to_json()


@pytest.mark.parametrize(
    "answer, words", [(lambda c: c.score[..., :1], "returned"), (lambda c: c.score / 0 * 0, "NaN")]
)
def test_a_wrong_answer_of_ones_own_score_is_named(model, answer, words):
    with pytest.raises(ValueError, match=words):
        model(prompt(60), past_key_values=LeanKVCache(LeanKVConfig(**SMALL, keep_share=0.5, score=answer)))


def test_candidates_without_material_say_so():
    with pytest.raises(ValueError, match="keys"):
        _ = candidates([[[1.0]]], [[[NEW]]], 1).keys
