"""Where every token is: for every head in exactly one of high, low, window and pruned, with the score stored for it."""

from functools import cache

import pytest
import torch
from families import VOCAB, prompt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.report import HIGH, LOW, PRUNED, WINDOW, token_map

CONFIGS = (
    LeanKVConfig(window=16, flush=8, high_share=0.2),
    LeanKVConfig(window=16, flush=8, high_share=0.1, keep_share=0.5),
    LeanKVConfig(window=8, flush=16, alpha_high=1.0, alpha_low=0.3),
    LeanKVConfig(tiers=[(8, 4)], window=8, flush=8, keep_share=0.4),
    LeanKVConfig(tiers=[(8, 4)], window=16, flush=8),
    LeanKVConfig.preset("exact", window=8, flush=8),
    LeanKVConfig(budget=0.4, window=8, flush=8),
)


@cache
def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="leankv").eval()


@torch.no_grad()
def filled(config, tokens, pads, steps):
    """A cache of two sequences, the second with `pads` on its left, after a prompt and `steps` decode steps."""
    cache, ids = LeanKVCache(config), prompt(tokens, batch=2)
    mask = torch.ones(2, tokens + steps, dtype=torch.long)
    mask[1, :pads] = 0
    tiny_model()(ids, attention_mask=mask[:, :tokens], past_key_values=cache)
    for step in range(steps):
        tiny_model()(ids[:, :1], attention_mask=mask[:, : tokens + step + 1], past_key_values=cache)
    return cache


@settings(max_examples=40, deadline=None)
@given(config=st.sampled_from(CONFIGS), tokens=st.integers(1, 150), pads=st.integers(0, 149), steps=st.integers(0, 40))
@example(config=CONFIGS[0], tokens=2, pads=1, steps=23)  # a pad's query, which sees nothing, among those observed
def test_every_token_is_in_one_place_and_only_packed_ones_of_a_selecting_config_have_a_score(
    config, tokens, pads, steps
):
    pads = min(pads, tokens - 1)
    cache = filled(config, tokens, pads, steps)
    for layer in cache.report().layers:
        found = cache.token_map(layer.index)
        assert found.tier.shape == found.score.shape == (2, 2, tokens + steps)
        held = [layer.tokens[name] for name in (*layer.tiers, "window")]
        for place, count in zip((*(HIGH, LOW)[: len(layer.tiers)], WINDOW), held, strict=True):
            assert torch.equal((found.tier == place).sum(-1), count)
        absent = torch.tensor([[0], [pads]])  # were never stored, and read as pruned
        assert torch.equal((found.tier == PRUNED).sum(-1), layer.tokens["pruned"] + absent)
        assert (found.tier[1, :, :pads] == PRUNED).all()
        packed = (found.tier == HIGH) | (found.tier == LOW)
        assert torch.equal(found.score.isfinite(), packed & config.selects)


def test_scores_are_those_stored_with_the_tokens():
    cache = filled(CONFIGS[1], tokens=120, pads=10, steps=20)
    packed, found = cache.layers[0].tokens.packed, token_map(cache, 0)
    for tier, place in enumerate((HIGH, LOW)):
        stored, parts = packed.slots(tier, ("score", "birth"))
        for row in range(4):
            births = parts["birth"][row][stored[row]].long()
            assert births.unique().numel() == births.numel() > 0
            assert torch.equal(found.tier.flatten(0, 1)[row, births], torch.full(births.shape, place).byte())
            assert torch.equal(found.score.flatten(0, 1)[row, births], parts["score"][row][stored[row]].float())


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=["selects", "does-not"])
def test_a_cache_cropped_to_nothing_has_empty_maps(config):
    cache = filled(config, tokens=12, pads=2, steps=0)
    cache.crop(-12)
    assert cache.token_map(0).tier.shape == (2, 2, 0)


def test_reading_changes_nothing():
    cache = filled(CONFIGS[1], tokens=100, pads=0, steps=5)
    with torch.no_grad():
        want = tiny_model()(prompt(1, batch=2), past_key_values=filled(CONFIGS[1], 100, 0, 5)).logits
        cache.token_map(1).tier.fill_(7)
        assert torch.equal(tiny_model()(prompt(1, batch=2), past_key_values=cache).logits, want)


def test_a_layer_without_a_map_says_why():
    cache = LeanKVCache()
    with pytest.raises(ValueError, match="layer 0 is not there: this cache has 0 layers"):
        cache.token_map(0)
    with torch.no_grad():
        tiny_model()(prompt(5), past_key_values=cache)
    with pytest.raises(ValueError, match="layer -1 is not there"):
        cache.token_map(-1)
    cache.layers[1] = DynamicCache(config=tiny_model().config).layers[1]
    cache.plain_reasons[1] = "it is an example"
    with pytest.raises(ValueError, match="layer 1 is not compressed: it is an example"):
        cache.token_map(1)
