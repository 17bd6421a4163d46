"""`generate` on this device against DynamicCache."""

from __future__ import annotations

import torch
from gpu_support import VOCAB, on_cuda, on_device, random_ids, random_llama, relative_rms
from transformers import DynamicCache

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

NEW = 100
SPREAD = 0.05
LOGITS_BOUND = {"k8v4": 0.12, "balanced": 0.4}
"""Relative RMS error of the logits of 100 forced tokens in float32: half as much again as the CPU shows."""


def generated(cache, attention: str, ids: torch.Tensor, mask: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    model = random_llama(dtype, attention)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return out[:, ids.shape[1] :]


def forced_logits(cache, attention: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits [100, vocab] of tokens that are given one by one behind a prompt."""
    model, rows = random_llama(dtype, attention, SPREAD), []
    with torch.no_grad():
        model(input_ids=random_ids(1, 900), past_key_values=cache, logits_to_keep=1)
        for token in random_ids(1, NEW, seed=1).split(1, 1):
            rows.append(model(input_ids=token, past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


@on_device
def test_exact_equals_dynamic_cache_in_float32():
    """A left-padded batch through several flushes: every token equal."""
    ids = random_ids(3, 700)
    mask = torch.ones_like(ids)
    ids[1, :200], mask[1, :200] = 0, 0
    want = generated(DynamicCache(), "sdpa", ids, mask)
    got = generated(LeanKVCache(LeanKVConfig.preset("exact")), "leankv", ids, mask)
    assert torch.equal(got, want), f"{(got != want).sum()} of {want.numel()} tokens differ"
    assert want.unique().numel() > 20, "the model says too little to compare"


@on_device
def test_beams_share_pages_and_equal_dynamic_cache():
    """Through several flushes, each of which copies the pages that beams share and are about to append to."""
    ids, options = random_ids(1, 700), dict(num_beams=4, max_new_tokens=NEW, do_sample=False)
    want = random_llama(torch.float32, "sdpa").generate(ids, past_key_values=DynamicCache(), **options)
    cache = LeanKVCache(LeanKVConfig.preset("exact"))
    got = random_llama(torch.float32, "leankv").generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, want), f"{(got != want).sum()} of {want.numel()} tokens differ"
    held = sum(pool.used_bytes for pool in cache.pools)
    assert sum(pool.copied_bytes for pool in cache.pools) > 0
    assert cache.report().shared_bytes > held, "beams have a prompt in common, which takes little of one copy"


@on_device
def test_exact_logits_in_half_precision():
    """As near to DynamicCache's as rounding in another order allows: twice what the CPU shows."""
    for dtype in (torch.float16, torch.bfloat16):
        want = forced_logits(DynamicCache(), "sdpa", dtype)
        got = forced_logits(LeanKVCache(LeanKVConfig.preset("exact")), "leankv", dtype)
        assert relative_rms(got, want) < (0.003 if dtype == torch.float16 else 0.02), relative_rms(got, want)


@on_device
def test_presets_stay_within_their_bound():
    want = forced_logits(DynamicCache(), "sdpa", torch.float32)
    assert want.shape == (NEW, VOCAB)
    for name, bound in LOGITS_BOUND.items():
        got = forced_logits(LeanKVCache(LeanKVConfig.preset(name)), "leankv", torch.float32)
        assert 0 < relative_rms(got, want) < bound, f"{name}: {relative_rms(got, want):.3f}"


@on_cuda
def test_a_compiled_step_generates_the_same():
    ids = random_ids(2, 700)
    want = generated(LeanKVCache(LeanKVConfig.preset("k8v4")), "leankv", ids, torch.ones_like(ids))
    model = random_llama(torch.float32, "leankv")
    hfkv.compile_decode(model)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=LeanKVCache(LeanKVConfig.preset("k8v4")),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(out[:, ids.shape[1] :], want)
