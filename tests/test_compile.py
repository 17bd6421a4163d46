"""`torch.compile(model)`: right tokens with graph breaks, no compilation once warm; what needs one graph is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import build, native, prompt
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def switched(name: str) -> PreTrainedModel:
    model = build(name)
    model.set_attn_implementation("leankv")
    return model


def compiled_frames() -> int:
    return counters["frames"]["total"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_compilation_once_warm(name: str) -> None:
    """100 steps, three flushes, two caches: everything is compiled in the first steps."""
    model = torch.compile(switched(name), backend="eager")
    other = DynamicCache(config=native(name).config)
    ids, steps = prompt(150), prompt(100, seed=3).split(1, dim=1)
    got, want = [], []
    cache = LeanKVCache(LeanKVConfig.preset("exact"))
    feed(model, cache, ids)
    feed(native(name), other, ids)
    for number, step in enumerate(steps):
        got.append(feed(model, cache, step))
        want.append(feed(native(name), other, step))
        if number == 5:
            warm = compiled_frames()
            assert warm > 0
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-4, atol=1e-4)
    assert compiled_frames() == warm
    again = LeanKVCache(LeanKVConfig.preset("exact"))
    feed(model, again, ids)
    for step in steps[:40]:
        feed(model, again, step)
    assert compiled_frames() == warm


def test_generate_with_a_compiled_model() -> None:
    model = switched("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    options = {"max_new_tokens": 70, "do_sample": False}
    got = model.generate(prompt(150), past_key_values=LeanKVCache(LeanKVConfig.preset("exact")), **options)
    assert torch.equal(got, native("llama").generate(prompt(150), **options))


def test_one_graph_is_refused() -> None:
    model = torch.compile(switched("llama"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"compiler\.disable|fullgraph"):
        feed(model, LeanKVCache(), prompt(150))


def test_a_static_cache_beside_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        switched("llama").generate(
            prompt(5), past_key_values=LeanKVCache(), cache_implementation="static", max_new_tokens=5
        )
    with pytest.raises(ValueError, match=r"hfkv\.disable"):
        hfkv.enable(build("llama")).generate(prompt(5), cache_implementation="static", max_new_tokens=5)
