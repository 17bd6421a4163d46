"""A tiny Llama whose layers lie on several simulated devices, what is to be seen of its cache, and how to call it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from families import llama_like, prompt
from simulated_devices import device, simulated_devices
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hfkv import LeanKVCache, LeanKVConfig

LAYERS = 4
SPLITS = {"two": (0, 0, 1, 1), "three": (0, 1, 2, 2), "in-turn": (0, 1, 0, 1)}
"""Device of every layer."""


@contextlib.contextmanager
def devices() -> Iterator[None]:
    """Simulated devices, and one arithmetic: SDPA on the CPU has a kernel of its own, which rounds in another way."""
    with simulated_devices(), sdpa_kernel(SDPBackend.MATH):
        yield


@cache
def model_on(split: str | None = None) -> PreTrainedModel:
    """The same model at every call, its layers where SPLITS says, or on the CPU; not to be changed."""
    return load() if split is None else load(device_map=device_map(SPLITS[split]))


def load(made: PreTrainedModel | None = None, **options: Any) -> PreTrainedModel:
    """A model by `from_pretrained`, inside `devices()`; None: a tiny Llama, the same at every call."""
    if made is None:
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**llama_like(num_hidden_layers=LAYERS, initializer_range=0.2)))
    options = {"attn_implementation": "leankv", "dtype": torch.float32} | options
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
        made.save_pretrained(folder)  # threads that load would not see the simulated devices
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def device_map(split: tuple[int, ...]) -> dict[str, str]:
    """As accelerate would place them: embeddings with the first layer, the head with the last."""
    first, last = str(device(split[0])), str(device(split[-1]))
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last, "lm_head": last}
    return ends | {f"model.layers.{index}": str(device(number)) for index, number in enumerate(split)}


def small(preset: str = "aggressive", **changes: Any) -> LeanKVConfig:
    """A preset with a small window and a flush every 8 tokens."""
    return LeanKVConfig.preset(preset, **{"window": 16, "flush": 8, **changes})


def greedy(model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """What `generate` says, on the CPU."""
    there = {name: x.to(model.device) for name, x in inputs.items()}
    return model.generate(**there, past_key_values=cache, **{"max_new_tokens": 14, "do_sample": False, **options}).cpu()


def turn_after(said: Tensor, mask: Tensor, more: int = 9) -> dict[str, Tensor]:
    """The inputs of a next turn: what was said under a mask, and `more` tokens."""
    ids = torch.cat([said, prompt(more, batch=said.shape[0])], 1)
    ones = torch.ones(ids.shape[0], ids.shape[1] - mask.shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, ones], 1)}


def tensors_of(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that can be reached from an object by attributes, items and slots."""
    if id(x) in seen or isinstance(x, type | torch.device | torch.dtype | str | int | float | None):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple | set | dict):
        for item in x.values() if isinstance(x, dict) else x:
            yield from tensors_of(item, seen)
    elif hasattr(x, "__dict__"):
        yield from tensors_of(vars(x), seen)


def check_places(cache: LeanKVCache, split: tuple[int, ...]) -> None:
    """Each layer with all that it leads to on its device, one pool each, and the report names them."""
    assert [tokens.device for tokens in cache.compressed] == [device(number) for number in split]
    for tokens in cache.compressed:
        reached = list(tensors_of(tokens, set()))
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
            "vectors": [
                tokens.packed.vectors(side, tier, int(tokens.packed.page_counts(tier).max()) * layout.tokens).cpu()
                for tier, layout in enumerate(tokens.packed.layouts)
                for side in ("key", "value")
            ],
        }
        for tokens in cache.compressed
    ]
