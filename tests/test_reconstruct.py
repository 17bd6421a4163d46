"""KVzip's second pass: what it sees is what the exact model attends to while it repeats the prompt."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from families import build, left_padded, prompt
from test_scores import SMALL, kept_positions
from transformers import DynamicCache

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, Packed
from hfkv.reconstruct import reconstruct

CONFIG = LeanKVConfig(**SMALL, keep_share=0.5, score="kvzip")


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    model.set_attn_implementation("leankv")
    return model


def exact_scores(ids: torch.Tensor) -> list[torch.Tensor]:
    """By layer: largest probability [kv_heads, tokens] while the exact model repeats `ids`, from eager attention."""
    eager = build("llama")
    eager.set_attn_implementation("eager")
    cache = DynamicCache()
    with torch.no_grad():
        eager(ids, past_key_values=cache)
        out = eager(ids, past_key_values=cache, output_attentions=True)
    tokens = ids.shape[1]
    return [p[0, :, :, :tokens].amax(1).unflatten(0, (2, -1)).amax(1) for p in out.attentions]


def test_the_best_of_the_second_pass_are_kept(model):
    ids = prompt(60)
    cache = reconstruct(model, ids, LeanKVCache(CONFIG))
    for layer, score in enumerate(exact_scores(ids)):
        best = score[:, :52].flatten().topk(52).indices
        want = [sorted((best[best // 52 == head] % 52).tolist()) for head in range(2)]
        assert kept_positions(cache, layer) == want


def test_blocks_see_the_same_as_one_pass(model, monkeypatch):
    """With as much lead as there is, a block's queries are those of the whole."""
    whole = reconstruct(model, prompt(60), LeanKVCache(CONFIG))
    module = importlib.import_module("hfkv.reconstruct")  # `hfkv.reconstruct` itself is the function
    monkeypatch.setattr(module, "BLOCK", 20)
    monkeypatch.setattr(module, "LEAD", 60)
    parts = reconstruct(model, prompt(60), LeanKVCache(CONFIG))
    assert kept_positions(parts) == kept_positions(whole)


def test_a_padded_batch_keeps_what_single_prompts_keep(model):
    inputs = left_padded([40, 60])
    both = reconstruct(model, inputs["input_ids"], LeanKVCache(CONFIG), inputs["attention_mask"])
    for b, length in enumerate((40, 60)):
        single = reconstruct(model, inputs["input_ids"][b : b + 1, 60 - length :], LeanKVCache(CONFIG))
        shifted = [[p + 60 - length for p in row] for row in kept_positions(single)]
        assert kept_positions(both)[2 * b : 2 * b + 2] == shifted


@pytest.mark.parametrize("tiers", [("exact",), ((8, 4), (4, 2)), (Packed(),), ((8, 4), Packed())], ids=str)
def test_what_was_pruned_is_given_back(model, tiers, monkeypatch):
    """Pages move for it, and nothing else changes."""
    config, ids = LeanKVConfig(tiers=tiers, keep_share=0.3, score="kvzip", window=8, flush=4), prompt(700, batch=4)
    cache = reconstruct(model, ids, LeanKVCache(config))
    with monkeypatch.context() as as_it_was:
        as_it_was.setattr(LeanKVCache, "close_up", lambda self: None)
        left = reconstruct(model, ids, LeanKVCache(config))
    now, before = cache.report(), left.report()
    assert now.physical_bytes < 0.8 * before.physical_bytes
    for _ in range(3):
        step = prompt(1, batch=4)
        with torch.no_grad():
            assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=left).logits)


@pytest.mark.parametrize("tiers", [("exact",), ((8, 4), (4, 2))], ids=str)
def test_generate_goes_on_from_it(model, tiers):
    config = LeanKVConfig(tiers=tiers, keep_share=0.5, score="kvzip", window=8, flush=4)
    cache, ids = LeanKVCache(config), prompt(60)
    with torch.no_grad():
        model(ids, past_key_values=cache)  # the first pass may be the user's own
    assert sum(map(len, kept_positions(cache))) == 2 * 52
    reconstruct(model, ids, cache)
    assert cache.get_seq_length() == 60 and sum(map(len, kept_positions(cache))) == 52
    out = model.generate(prompt(61), past_key_values=cache, max_new_tokens=20, do_sample=False)
    cache.flush()
    assert sum(map(len, kept_positions(cache))) == round(2 * (out.shape[1] - 1 - 8) * 0.5)


def test_a_mix_with_it_keeps_its_quota(model):
    config = LeanKVConfig(**SMALL, keep_share=0.3, score=("kvzip", "keydiff"))
    cache = reconstruct(model, prompt(60), LeanKVCache(config))
    assert sum(map(len, kept_positions(cache))) == round(2 * 52 * 0.3)


def test_it_says_so_when_used_without_its_second_pass(model, tmp_path):
    cache = LeanKVCache(CONFIG)
    with torch.no_grad():
        model(prompt(60), past_key_values=cache)
        waiting = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"hfkv\.reconstruct"):
            model(prompt(1), past_key_values=cache)
    with pytest.raises(ValueError, match="reconstruct"):
        cache.save(tmp_path / "cache.safetensors")
    reconstruct(model, prompt(60), cache)  # nothing was lost
    assert kept_positions(cache) == kept_positions(reconstruct(model, prompt(60), waiting))


def test_bad_calls_are_named(model):
    with pytest.raises(ValueError, match="kvzip"):
        hfkv.reconstruct(model, prompt(60), LeanKVCache())
    cache = reconstruct(model, prompt(60), LeanKVCache(CONFIG))
    with pytest.raises(ValueError, match="pruned already"):
        reconstruct(model, prompt(60), cache)
    waiting = LeanKVCache(CONFIG)
    with torch.no_grad():
        model(prompt(60), past_key_values=waiting)
    with pytest.raises(ValueError, match="50 tokens and a cache of 60"):
        reconstruct(model, prompt(50), waiting)


def test_a_prompt_that_fits_the_window_needs_none(model):
    cache = reconstruct(model, prompt(6), LeanKVCache(CONFIG))
    assert model.generate(prompt(7), past_key_values=cache, max_new_tokens=3).shape[1] == 10
