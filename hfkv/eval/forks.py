"""A filled cache serves any number of questions, each on a copy."""

from __future__ import annotations

import copy

from transformers import Cache, QuantizedCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from hfkv.cache import LeanKVCache
from hfkv.eval.kivi import KIVILayer


def fork(cache: Cache) -> Cache:
    """An independent copy; layers that replace their tensors and never write into them share these."""
    shares = (type(layer) in (DynamicLayer, KIVILayer) or isinstance(layer, QuantizedLayer) for layer in cache.layers)
    if isinstance(cache, LeanKVCache) or not all(shares):
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        if isinstance(layer, KIVILayer):
            layer.coded = dict(layer.coded)
    return other


def repeated(cache: Cache, times: int) -> Cache | None:
    """A copy that holds the one sequence `times` times; None where transformers cannot repeat a layer."""
    if isinstance(cache, QuantizedCache):
        return None
    other = fork(cache)
    other.batch_repeat_interleave(times)
    return other
