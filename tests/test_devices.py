"""Layers on several devices, simulated: what one CPU says, bit for bit, one page pool per device, no tensor astray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from families import left_padded, prompt
from placed import SPLITS, check_places, devices, greedy, held_of, model_on, small, turn_after
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hfkv import LeanKVCache


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    with devices():
        yield


Run = Callable[[PreTrainedModel, LeanKVCache], list[Tensor]]
RUNS: dict[str, Run] = {}


def run(function: Run) -> Run:
    RUNS[function.__name__] = function
    return function


@run
def two_turns(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    first = greedy(model, cache, left_padded([3, 70]))
    return [first, greedy(model, cache, turn_after(first, left_padded([3, 70])["attention_mask"]))]


@run
def ended_early(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    """The second turn's mask hides what generate said after a sequence had ended: tokens of the window and packed."""
    inputs = left_padded([40, 70])
    first = greedy(model, cache, inputs)
    again = turn_after(first, inputs["attention_mask"])
    again["attention_mask"][0, 60:84] = 0
    assert cache.compressed[0].fill.most < 25
    return [first, greedy(model, cache, again)]


@run
def beams(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    return [greedy(model, cache, left_padded([20, 50]), num_beams=3)]


@run
def sampling(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    torch.manual_seed(5)
    return [greedy(model, cache, left_padded([20, 50]), do_sample=True, num_return_sequences=2)]


@run
def prompt_lookup(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    return [greedy(model, cache, {"input_ids": prompt(30).repeat(1, 2)}, prompt_lookup_num_tokens=4)]


@run
def crop(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    said = greedy(model, cache, {"input_ids": prompt(60)})
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match="reaches packed ones"):
        cache.crop(-50)
    assert cache.get_seq_length() == before
    cache.crop(-6)
    return [said, greedy(model, cache, {"input_ids": said[:, :-4]})]


@run
def forks(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    """One prompt, three continuations of which two are kept; a deep copy goes its own way."""
    said = greedy(model, cache, {"input_ids": prompt(60)}, max_new_tokens=4)
    other = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    ids = torch.cat([said.repeat(3, 1), prompt(5, seed=4, batch=3)], 1)
    more = greedy(model, cache, {"input_ids": ids}, max_new_tokens=10)
    cache.batch_select_indices(torch.tensor([2, 0]))
    last = greedy(model, cache, {"input_ids": torch.cat([more[[2, 0]], prompt(3, batch=2)], 1)}, max_new_tokens=10)
    return [more, last, greedy(model, other, {"input_ids": torch.cat([said, prompt(5, seed=6)], 1)})]


@run
def chunked_prefill(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    return [greedy(model, cache, left_padded([60, 100]), prefill_chunk_size=40)]


@run
def reset(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    first = greedy(model, cache, {"input_ids": prompt(50)}, max_new_tokens=10)
    for layer in cache.layers:
        layer.reset()
    for pool in cache.pools:
        pool.trim()
        assert pool.used_bytes == pool.memory_bytes == 0
    cache.reset()
    assert not cache.pools
    again = greedy(model, cache, {"input_ids": prompt(50)}, max_new_tokens=10)
    assert torch.equal(first, again)
    return [first]


@pytest.mark.parametrize("name", RUNS)
def test_as_on_one_device(name: str) -> None:
    """Tokens, and what is held afterwards, bit for bit."""
    got, want = LeanKVCache(small()), LeanKVCache(small())
    for a, b in zip(RUNS[name](model_on("two"), got), RUNS[name](model_on(), want), strict=True):
        assert a.device.type == b.device.type == "cpu"
        assert torch.equal(a, b)
    check_places(got, SPLITS["two"])
    for a, b in zip(held_of(got), held_of(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("preset", "split"),
    [("exact", "two"), ("k8v4", "two"), ("balanced", "two"), ("aggressive", "three"), ("aggressive", "in-turn")],
)
def test_presets(preset: str, split: str) -> None:
    cache, model = LeanKVCache(small(preset)), model_on(split)
    got = greedy(model, cache, left_padded([3, 70]))
    assert torch.equal(got, greedy(model_on(), LeanKVCache(small(preset)), left_padded([3, 70])))
    if preset == "exact":
        assert torch.equal(got, greedy(model_on(), DynamicCache(), left_padded([3, 70])))
    check_places(cache, SPLITS[split])
