"""Layers on several devices, simulated: the arithmetic of one CPU, one page pool per device, and no tensor astray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, left_padded, llama_like, prompt
from simulated_devices import device, simulated_devices
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.layer import LeanKVLayer

LAYERS = 4
SMALL = {"window": 16, "flush": 16}
OPTIONS = {"max_new_tokens": 40, "do_sample": False}
SPLITS = {"two": (0, 0, 1, 1), "three": (0, 1, 2, 2), "in-turn": (0, 1, 0, 1)}


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with simulated_devices(), sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel rounds in another way
        yield


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**llama_like(num_hidden_layers=LAYERS, initializer_range=0.2))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(stored: Path) -> PreTrainedModel:
    return load(stored)


@pytest.fixture(scope="module")
def placed(stored: Path) -> Callable[[str], PreTrainedModel]:
    """The model with its layers on devices as SPLITS says."""
    known: dict[str, PreTrainedModel] = {}

    def model(split: str) -> PreTrainedModel:
        if split not in known:
            known[split] = load(stored, device_map=device_map(SPLITS[split]))
        return known[split]

    return model


def load(folder: Path, **options: Any) -> PreTrainedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # its threads would not see the simulated devices
        options = {"attn_implementation": "leankv", "dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def device_map(split: tuple[int, ...]) -> dict[str, str]:
    """As accelerate would place them: embeddings with the first layer, the head with the last."""
    first, last = str(device(split[0])), str(device(split[-1]))
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last, "lm_head": last}
    return ends | {f"model.layers.{index}": str(device(number)) for index, number in enumerate(split)}


def small(preset: str = "aggressive", **changes: Any) -> LeanKVConfig:
    return LeanKVConfig.preset(preset, **{**SMALL, **changes})


def on(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(model.device) for name, x in inputs.items()}


def tensors_of(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that can be reached from an object by attributes, items and slots."""
    if id(x) in seen or isinstance(x, type | torch.device | torch.dtype | str | int | float | None):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from tensors_of([*x.keys(), *x.values()], seen)
    elif isinstance(x, list | tuple | set):
        for item in x:
            yield from tensors_of(item, seen)
    elif hasattr(x, "__dict__"):
        yield from tensors_of(vars(x), seen)


def check_places(cache: LeanKVCache, split: tuple[int, ...]) -> None:
    """Each layer with all that it leads to on its device, one pool each, and the report names them."""
    assert [tokens.device for tokens in cache.compressed] == [device(number) for number in split]
    for tokens in cache.compressed:
        reached = list(tensors_of([vars(tokens)], set()))
        assert len(reached) > 10
        assert {x.device for x in reached} == {tokens.device}
        assert tokens.packed.pool is cache.pool(tokens.device)
    assert {pool.device for pool in cache.pools} == {device(number) for number in split}
    report = cache.report()
    assert [layer.device for layer in report.layers] == [str(device(number)) for number in split]
    assert report.device_bytes.keys() == {str(pool.device) for pool in cache.pools}
    assert sum(report.device_bytes.values()) == report.physical_bytes
    for number in set(split):
        layers = ", ".join(str(index) for index, own in enumerate(split) if own == number)
        assert f"on {device(number)}: " in str(report)
        assert str(report).count(f", layers {layers}\n") == 1


def held_of(cache: LeanKVCache) -> list[dict[str, Any]]:
    """What the layers hold, on the CPU."""
    return [
        {
            "window": [side[:, :, : tokens.fill.most].cpu() for side in (tokens.window.k, tokens.window.v)],
            "lengths": tokens.packed.table.lengths.cpu(),
            "counts": tokens.fill.counts.cpu(),
            "vectors": [x.cpu() for tier in range(tokens.packed.tiers) for x in tokens.packed.vectors(tier, 64)],
        }
        for tokens in cache.compressed
    ]


Run = Callable[[PreTrainedModel, LeanKVCache], list[Tensor]]
RUNS: dict[str, Run] = {}


def run(function: Run) -> Run:
    RUNS[function.__name__] = function
    return function


def greedy(model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**on(model, inputs), past_key_values=cache, **{**OPTIONS, **options}).cpu()


def turn_after(said: Tensor, mask: Tensor, more: int = 9) -> dict[str, Tensor]:
    """The inputs of a next turn: what was said under a mask, and `more` tokens."""
    ids = torch.cat([said, prompt(more, batch=said.shape[0])], 1)
    ones = torch.ones(ids.shape[0], ids.shape[1] - mask.shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, ones], 1)}


@run
def two_turns(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    first = greedy(model, cache, left_padded([3, 70]))
    return [first, greedy(model, cache, turn_after(first, left_padded([3, 70])["attention_mask"]))]


@run
def ended_early(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    """The second turn's mask hides what generate said after a sequence had ended: tokens of the window and packed."""
    inputs = left_padded([40, 70])
    first = greedy(model, cache, inputs, max_new_tokens=30)
    again = turn_after(first, inputs["attention_mask"])
    again["attention_mask"][0, 75:100] = 0
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
    more = greedy(model, cache, {"input_ids": ids}, max_new_tokens=20)
    cache.batch_select_indices(torch.tensor([2, 0]))
    last = greedy(model, cache, {"input_ids": torch.cat([more[[2, 0]], prompt(3, batch=2)], 1)}, max_new_tokens=20)
    return [more, last, greedy(model, other, {"input_ids": torch.cat([said, prompt(5, seed=6)], 1)})]


@run
def chunked_prefill(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    return [greedy(model, cache, left_padded([60, 100]), prefill_chunk_size=40)]


@run
def reset(model: PreTrainedModel, cache: LeanKVCache) -> list[Tensor]:
    first = greedy(model, cache, {"input_ids": prompt(50)}, max_new_tokens=20)
    for layer in cache.layers:
        layer.reset()
    for pool in cache.pools:
        pool.trim()
        assert pool.used_bytes == pool.memory_bytes == 0
    cache.reset()
    assert not cache.pools
    again = greedy(model, cache, {"input_ids": prompt(50)}, max_new_tokens=20)
    assert torch.equal(first, again)
    return [first]


@pytest.mark.parametrize("name", RUNS)
def test_as_on_one_device(name: str, plain: PreTrainedModel, placed: Callable[[str], PreTrainedModel]) -> None:
    """Tokens, and what is held afterwards, bit for bit."""
    got, want = LeanKVCache(small()), LeanKVCache(small())
    for a, b in zip(RUNS[name](placed("two"), got), RUNS[name](plain, want), strict=True):
        assert a.device.type == b.device.type == "cpu"
        assert torch.equal(a, b)
    check_places(got, SPLITS["two"])
    for a, b in zip(held_of(got), held_of(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["exact", "k8v4", "balanced"])
@pytest.mark.parametrize("split", SPLITS)
def test_presets(preset: str, split: str, plain: PreTrainedModel, placed: Callable[[str], PreTrainedModel]) -> None:
    cache, model = LeanKVCache(small(preset)), placed(split)
    got = greedy(model, cache, left_padded([3, 70]))
    assert torch.equal(got, greedy(plain, LeanKVCache(small(preset)), left_padded([3, 70])))
    if preset == "exact":
        assert torch.equal(got, greedy(plain, DynamicCache(), left_padded([3, 70])))
    check_places(cache, SPLITS[split])
