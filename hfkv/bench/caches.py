"""The caches that are measured, and how they are filled with random keys and values without running a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from hfkv.attention import leankv_attention
from hfkv.bench.sizes import ModelShape, Shape
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig

LEAN = {
    "k8v4": LeanKVConfig.preset("k8v4"),
    "k4v4": LeanKVConfig(tiers=((4, 4),)),
    "k4v2": LeanKVConfig(tiers=((4, 2),)),
    "mixed": LeanKVConfig.preset("balanced"),
}
"""Settings of LeanKVCache by name; `mixed` is the preset `balanced`: a tenth K8V4, the rest K4V2."""

GRAPHS = {f"{name} graph": name for name in ("k8v4", "mixed")}
"""The same settings under `hfkv.compile_decode`, by name."""

QUANTIZED: dict[str, tuple[str, dict[str, Any], str]] = {
    "quantized quanto 4 bit": ("quanto", {"nbits": 4}, "optimum.quanto"),
    "quantized hqq 4 bit": ("hqq", {"nbits": 4}, "hqq"),
    "quantized fp8": ("fp8", {}, "torch"),
}
"""Backends of QuantizedCache by name: backend, options, package."""

STATIC, STATIC_COMPILED, DYNAMIC = "static", "static compiled", "dynamic"

BLOCK_BYTES = 512 << 20
"""Keys of one block of a filled cache take at most this in float32."""

_ATTENTION = nn.Module()
"""Stands for a model's attention module: it says nothing of its own, so plain causal attention is assumed."""


class Unavailable(Exception):
    """A cache or kernel that this machine does not have; the message says what is missing."""


def attention_of(name: str) -> str:
    """The attention implementation that a model runs under with a cache of this name."""
    return "leankv" if name in LEAN or name in GRAPHS else "sdpa"


def new_cache(name: str, model_config: LlamaConfig | None = None, room: int = 0) -> Cache:
    """An empty cache.

    Args:
        name: a key of `LEAN`, `GRAPHS` or `QUANTIZED`, or one of transformers' caches.
        model_config: the model's config; the static and quantised ones need it.
        room: tokens that a static cache must hold.

    Raises:
        Unavailable: a package is missing.
    """
    if name in LEAN or name in GRAPHS:
        return LeanKVCache(LEAN[GRAPHS.get(name, name)], model_config=model_config)
    if name == DYNAMIC:
        return DynamicCache()
    assert model_config is not None
    if name in (STATIC, STATIC_COMPILED):
        return StaticCache(model_config, max_cache_len=room)
    backend, options, package = QUANTIZED[name]
    if any(importlib.util.find_spec(part) is None for part in (package.split(".")[0], package)):
        raise Unavailable(f"package {package} is not installed")
    try:
        return QuantizedCache(backend, model_config, **options)
    except ValueError as error:
        raise Unavailable(f"this transformers has no such backend: {error}") from error


@torch.no_grad()
def fill(cache: Cache, shape: Shape, layers: int, batch: int, tokens: int, like: Tensor) -> None:
    """Put random tokens into every layer, as a prompt of that many tokens would, with the dtype and device of `like`.

    A LeanKVCache takes a long prompt in blocks, so that its exact keys and values need not fit beside the rest; each
    block's last query attends, which is what stores the block.
    """
    lean = isinstance(cache, LeanKVCache)
    if isinstance(cache, LeanKVCache):
        cache.page_tokens(tokens, len(cache.config.tiers))  # as for a prompt in one piece
    for count in _blocks(shape, batch, tokens) if lean else [tokens]:
        k, v = random_keys(shape, batch, count, like), random_keys(shape, batch, count, like)
        for layer in range(layers):
            handles = cache.update(k, v, layer)
            if lean:
                attend(handles, random_query(shape, batch, like))


def attend(handles: tuple[Tensor, Tensor], q: Tensor) -> Tensor:
    """The model's attention call for the handles that `LeanKVCache.update` gave; it may be repeated."""
    return leankv_attention(_ATTENTION, q, *handles, None)[0]


def random_keys(shape: Shape, batch: int, tokens: int, like: Tensor) -> Tensor:
    """[batch, kv_heads, tokens, head_dim]."""
    return like.new_empty(batch, shape.kv_heads, tokens, shape.head_dim).normal_()


def random_query(shape: Shape, batch: int, like: Tensor) -> Tensor:
    """[batch, q_heads, 1, head_dim]."""
    return like.new_empty(batch, shape.q_heads, 1, shape.head_dim).normal_()


def read_bytes(cache: LeanKVCache) -> int:
    """Bytes that a decode step has to read: codes, scales and zeros of the packed tokens, and the window's tokens.

    Scores and births (read by a flush alone), free slots and free pages are physical bytes beside it.
    """
    total = 0
    for held, layer in zip(cache.compressed, cache.report().layers, strict=True):
        for name, layout in zip(layer.tiers, held.packed.layouts, strict=True):
            token = (layout.fields["score"][0]) // layout.tokens
            total += token * int(layer.tokens[name].sum())
        exact = held.window.k.element_size() * (held.window.k.shape[3] + held.window.v.shape[3])
        total += exact * int(layer.tokens["window"].sum())
    return total


def physical_bytes(cache: Cache) -> int:
    """Every byte that a cache holds: a LeanKVCache's own report, else the tensors of the layers."""
    if isinstance(cache, LeanKVCache):
        report = cache.report()
        return report.physical_bytes + report.plain_bytes
    return sum({x.data_ptr(): x.nbytes for layer in cache.layers for x in _tensors(layer)}.values())


def exact_bytes(shape: Shape, layers: int, batch: int, tokens: int, like: Tensor) -> int:
    """What the tokens take in the dtype of `like`."""
    return 2 * batch * layers * shape.kv_heads * tokens * shape.head_dim * like.element_size()


def random_llama(shape: ModelShape, layers: int, like: Tensor) -> LlamaForCausalLM:
    """A Llama of random weights with the dtype and device of `like`."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads.q_heads,
        num_key_value_heads=shape.heads.kv_heads,
        head_dim=shape.heads.head_dim,
        max_position_embeddings=1 << 18,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with like.device:
        model = LlamaForCausalLM._from_config(config, dtype=like.dtype, attn_implementation="sdpa")
    return model.eval()


def _blocks(shape: Shape, batch: int, tokens: int) -> Iterator[int]:
    step = max(256, BLOCK_BYTES // (4 * batch * shape.kv_heads * shape.head_dim))
    for first in range(0, tokens, step):
        yield min(step, tokens - first)


def _tensors(layer: Any) -> Iterator[Tensor]:
    """Tensors of a cache layer, those inside quantised ones too."""
    waiting = list(vars(layer).values()) if isinstance(layer, CacheLayerMixin) else []
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            inner = getattr(item, "__tensor_flatten__", None)
            if inner is None:
                yield item
            else:
                waiting += [getattr(item, name) for name in inner()[0]]
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
