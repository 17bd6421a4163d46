"""Several caches on one model, in turn and from threads; a cache in the wrong place says so at once."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import build, lean, left_padded, native, prompt
from transformers import Cache, DynamicCache, PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

OPTIONS = {"max_new_tokens": 70, "do_sample": False}


def exact(**changes: object) -> LeanKVCache:
    return LeanKVCache(LeanKVConfig.preset("exact", **changes))


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-next"])
def test_two_caches_in_turn(name: str) -> None:
    """Step by step on one model, at different lengths, so that flushes fall apart."""
    ids = [prompt(150, seed=1), prompt(97, seed=2)]
    logits = {}
    for model, new in ((lean(name), exact), (native(name), lambda: DynamicCache(config=native(name).config))):
        caches = [new(), new()]
        for cache, tokens in zip(caches, ids, strict=True):
            feed(model, cache, tokens)
        steps = [
            feed(model, cache, prompt(1, seed=10 + i))
            for i in range(70)
            for cache in (caches if i % 3 else caches[::-1])
        ]
        logits[model is lean(name)] = torch.cat(steps, 1)
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("enabled", [False, True])
def test_two_threads_on_one_model(enabled: bool) -> None:
    model = hfkv.enable(build("llama"), LeanKVConfig.preset("exact")) if enabled else lean("llama")
    inputs = [left_padded([3, 150], seed=s) if s % 2 else {"input_ids": prompt(90 + s, seed=s)} for s in range(8)]

    def answer(number: int) -> torch.Tensor:
        own = {} if enabled else {"past_key_values": exact()}
        return model.generate(**inputs[number], **own, **OPTIONS)

    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(answer, range(len(inputs))))
    for number, tokens in enumerate(got):
        assert torch.equal(tokens, native("llama").generate(**inputs[number], **OPTIONS))


def test_forks_in_two_threads() -> None:
    cache = LeanKVCache()
    feed(lean("llama"), cache, prompt(300)[:, :299])
    forks = [copy.deepcopy(cache) for _ in range(4)]
    with ThreadPoolExecutor(2) as threads:
        runs = threads.map(lambda fork: lean("llama").generate(prompt(300), past_key_values=fork, **OPTIONS), forks)
        answers = list(runs)
    want = lean("llama").generate(prompt(300), past_key_values=cache, **OPTIONS)
    assert all(torch.equal(answer, want) for answer in answers)


@pytest.mark.parametrize("name", ["llama", "gemma3-text"])
def test_another_attention_implementation(name: str) -> None:
    """Compressed tokens cannot be handed to sdpa: the error says what to set, and setting it helps."""
    model, cache, ids = build(name), exact(), prompt(150)
    model.set_attn_implementation("leankv")
    feed(model, cache, ids)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="set_attn_implementation"):
            feed(model, cache, prompt(1))
    model.set_attn_implementation("leankv")
    step = prompt(1, seed=4)
    other = DynamicCache(config=model.config)
    feed(native(name), other, ids)
    torch.testing.assert_close(feed(model, cache, step), feed(native(name), other, step), rtol=1e-4, atol=1e-4)


def test_another_dtype() -> None:
    cache = exact()
    feed(lean("llama"), cache, prompt(150))
    model = build("llama").bfloat16()
    model.set_attn_implementation("leankv")
    with pytest.raises(ValueError, match=r"float32 on cpu and got torch\.bfloat16"):
        feed(model, cache, prompt(1))
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gptj"])
def test_another_device(name: str) -> None:
    """Keys that lie elsewhere are refused before anything is stored, by layers of either kind."""
    cache = exact()
    feed(lean(name), cache, prompt(150))
    held = cache.layers[0]
    keys = held.tokens.window.k if held.keys is None else held.keys
    new = torch.empty(*keys.shape[:2], 1, keys.shape[3], device="meta")
    with pytest.raises(ValueError, match=r"on cpu and got torch\.float32 on meta"):
        cache.update(new, new, 0)
    feed(lean(name), cache, prompt(1))
    assert cache.get_seq_length() == 151
