"""One exact prefill per prompt: its keys, values and last queries, from which every cache is then filled.

A prompt is attended exactly under every method (LeanKVCache, QuantizedCache and the rest compress behind it), so all
of them get the same keys and values. Recording them once spares every method its own prefill.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hfkv.attention import NAME, leankv_attention, leankv_mask
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig
from hfkv.demo.measures import fill
from hfkv.eval.eviction import ALL_QUERIES
from hfkv.eval.forks import fork
from hfkv.reconstruct import reconstruct

RECORDED = "leankv_recorded"
"""The attention implementation that a model runs under while its prompt is recorded."""


@dataclass
class Call:
    """What a layer's attention was called with: its module, its last queries [batch, q_heads, queries, D], options."""

    module: nn.Module
    queries: Tensor
    options: dict[str, Any]


@dataclass
class Recording:
    """A prompt that has been run once.

    Attributes:
        ids: its tokens.
        cache: the exact cache after it.
        calls: one per attention layer, in their order.
        most: last queries of the prompt that are kept.
        replays: whether other caches can be filled from this; else each of them needs a forward of its own.
    """

    ids: list[int]
    cache: Cache
    most: int
    calls: list[Call] = field(default_factory=list)

    @property
    def replays(self) -> bool:
        layers = self.cache.layers
        return len(self.calls) == len(layers) and all(
            type(layer) is DynamicLayer and layer.keys is not None and layer.keys.shape[2] == len(self.ids)
            for layer in layers
        )


_recording: Recording | None = None
"""The recording that is being made; there is one at a time."""


def _recorded_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    if _recording is not None:
        _recording.calls.append(Call(module, query[:, :, -_recording.most :].clone(), options))
    return leankv_attention(module, query, key, value, mask, **options)


def record(model: PreTrainedModel, ids: list[int], most: int) -> Recording:
    """Run a prompt with the exact cache, keeping what other caches need of it.

    Args:
        model: under attn_implementation "leankv", as it is left.
        most: last queries to keep: as many as the most curious method observes.
    """
    return _run(model, ids, Recording([], DynamicCache(config=model.config), most))


def follow(model: PreTrainedModel, before: Recording, ids: list[int]) -> Recording:
    """The recording of a prompt and `ids` behind it; the prompt itself is not run again."""
    after = _run(model, ids, Recording(before.ids, fork(before.cache), before.most))
    for old, new in zip(before.calls, after.calls, strict=True):
        new.queries = torch.cat([old.queries, new.queries], 2)[:, :, -before.most :]
    return after


def _run(model: PreTrainedModel, ids: list[int], into: Recording) -> Recording:
    global _recording
    AttentionInterface.register(RECORDED, _recorded_attention)
    AttentionMaskInterface.register(RECORDED, leankv_mask)
    model.set_attn_implementation(RECORDED)
    _recording = into
    try:
        fill(model, ids, into.cache)
    finally:
        _recording = None
        model.set_attn_implementation(NAME)
    into.ids = into.ids + ids
    return into


def observed(config: LeanKVConfig) -> int:
    """Last queries of a prompt that a cache of this config looks at."""
    if not config.selects:
        return 1
    return ALL_QUERIES if config.reads_prompt else config.observe


@torch.no_grad()
def filled(
    model: PreTrainedModel,
    recording: Recording,
    cache: Cache,
    dtype: torch.dtype | None = None,
    queries: int = ALL_QUERIES,
) -> Cache:
    """`cache` as the prompt leaves it, after its second pass where it takes one (`hfkv.reconstruct`).

    Args:
        cache: an empty one.
        dtype: of the keys and values that it gets, where bytes are asked for in another one than the model's.
        queries: the last ones that score tokens, at most.

    Raises:
        ValueError: a dtype is asked for and the model's layers cannot be replayed.
    """
    if not recording.replays:
        if dtype is not None and dtype != model.dtype:
            raise ValueError(f"prompts of {type(model).__name__} cannot be replayed in {dtype}: load it in {dtype}")
        return _reconstructed(model, recording, fill(model, recording.ids, cache))
    if dtype is not None and dtype != model.dtype and isinstance(cache, LeanKVCache) and cache.config.reconstructs:
        twin: Any = copy.deepcopy(model)  # both passes are the model's own
        return _reconstructed(twin.to(dtype), recording, cache)
    layers: list[Any] = recording.cache.layers
    for index, (layer, call) in enumerate(zip(layers, recording.calls, strict=True)):
        k, v = (x.to(dtype or x.dtype).clone() for x in (layer.keys, layer.values))
        handles = cache.update(k, v, index)
        if isinstance(cache, LeanKVCache):
            most = min(observed(cache.config.for_layer(index)), queries)
            q = call.queries[:, :, -most:].to(k.dtype)
            leankv_attention(call.module, q, *handles, None, **call.options)
    return _reconstructed(model, recording, cache)


def _reconstructed(model: PreTrainedModel, recording: Recording, cache: Cache) -> Cache:
    """A cache after the second pass over the prompt, where its score needs one."""
    if isinstance(cache, LeanKVCache) and cache.config.reconstructs:
        reconstruct(model, torch.tensor([recording.ids], device=model.device), cache)
    return cache
