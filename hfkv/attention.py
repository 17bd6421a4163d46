"""The `leankv` attention and mask functions, and the decision which layers are compressed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hfkv.attend import Call
from hfkv.handle import Chunk, KVHandle
from hfkv.kernels.prompt_attention import lower_right, prompt_attention
from hfkv.layer import LeanKVLayer

NAME = "leankv"
SPARSE_LAYERS = {
    "indexed_attention",
    "deepseek_sparse_attention",
    "qwen_sparse_attention",
    "minimax_m3_sparse",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
}


def register() -> None:
    """Make `attn_implementation="leankv"` known to transformers."""
    AttentionInterface.register(NAME, leankv_attention)
    AttentionMaskInterface.register(NAME, leankv_mask)


@torch.compiler.disable
def leankv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: over a LeanKVCache's handles, or plain tensors.

    Args:
        query: [batch, q_heads, queries, D]; key, value: [batch, kv_heads, tokens, D or Dv] or handles.
        attention_mask: None, what `leankv_mask` returned, or a 4-D mask of the user's.

    Returns:
        ([batch, queries, q_heads, Dv], None).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    call = Call(scaling, softcap, s_aux)
    if not isinstance(key, KVHandle):
        return _plain_attention(query, key, value, attention_mask, causal, call, position_bias, dropout), None
    chunk, cache = key.source, key.source.layer.cache
    try:
        _refuse_cross_attention(module, causal)
        cache.fingerprint.check(module, chunk.layer.index)
        if chunk.layer.pending is chunk and chunk.layer.tokens is None:
            plain = _decide(module, chunk, position_bias, kwargs)
            if plain is not None:
                k, v = cache.keep_plain(chunk.layer, *plain)
                return _plain_attention(query, k, v, attention_mask, causal, call, position_bias, dropout), None
        return chunk.layer.attend(chunk, query, attention_mask, chunk.layer.completed(call, module, query)), None
    except Exception:
        cache.undo_forward()
        raise


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    call: Call,
    position_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Exact attention over plain tensors: sliding layers, cross-attention, encoders, vision towers, other caches."""
    queries, tokens = q.shape[2], k.shape[2]
    if mask is not None and _is_padding(mask) and causal and queries > 1:
        mask = mask[..., -tokens:] & lower_right(queries, tokens, q.device)
    if mask is not None and mask.shape[-1] > tokens:
        mask = mask[..., :tokens]
    if position_bias is not None:
        mask = _biased(position_bias, mask, causal and queries > 1)
    out = prompt_attention(q, k, v, mask, causal and mask is None, call.scaling, call.softcap, call.sinks, dropout)
    return out.transpose(1, 2).contiguous()


def _biased(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None:
        return bias + mask if mask.dtype != torch.bool else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    hidden = ~lower_right(bias.shape[-2], bias.shape[-1], bias.device) if causal else None
    return bias if hidden is None else bias.masked_fill(hidden, torch.finfo(bias.dtype).min)


def _is_padding(mask: Tensor) -> bool:
    return mask.dtype == torch.bool and mask.shape[-2] == 1


def leankv_mask(**kwargs: Any) -> Tensor | None:
    """transformers' mask function: None or the padding as bool [batch, 1, 1, tokens] where the mask is plain causal.

    Raises:
        ValueError: a model that computes its own attention, sparse attention, or a padding mask that is too short.
    """
    config = kwargs.get("config")
    if config is not None:
        _refuse_config(config)
    padding, tokens = kwargs.get("attention_mask"), kwargs["kv_length"]
    causal = kwargs["mask_function"] is causal_mask_function and "local_size" not in kwargs
    if not causal or not kwargs.get("allow_is_causal_skip", True):
        return sdpa_mask(**kwargs)
    if kwargs["q_offset"] + kwargs["q_length"] != tokens:  # a static cache: there is room behind the newest token
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    if padding is None:
        return None
    if padding.shape[-1] < tokens:
        raise ValueError(
            f"attention_mask covers {padding.shape[-1]} of {tokens} tokens: with a filled cache pass the mask of all "
            "tokens, those in the cache first"
        )
    return padding[:, None, None, :tokens]


# ---- what is compressed, what is refused -------------------------------------------------------------------------


def _refuse_cross_attention(module: nn.Module, causal: bool) -> None:
    if not causal:
        raise ValueError(
            f"{type(module).__name__} is cross-attention and must not share a LeanKVCache with self-attention: pass "
            "past_key_values=EncoderDecoderCache(LeanKVCache(...), DynamicCache()), or use hfkv.enable(model, config)"
        )


def _decide(module: nn.Module, chunk: Chunk, position_bias: Tensor | None, kwargs: dict) -> tuple[Any, str] | None:
    """None where the layer is compressed, else (transformers' layer, reason)."""
    _refuse_sparse(module, kwargs)
    config, cache = getattr(module, "config", None), chunk.layer.cache
    if isinstance(config, PretrainedConfig):
        cache.layer_count = config.get_text_config(decoder=True).num_hidden_layers
        cache.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if getattr(module, "kv_lora_rank", None) is not None:
        return DynamicLayer(), "it caches latents (multi-head latent attention), not keys and values"
    if position_bias is not None:
        return DynamicLayer(), "its attention adds a position bias, and packed tokens have no order"
    native = _native_layer(config, chunk.layer)
    if type(native) is not DynamicLayer:
        return native, f"{type(native).__name__} of transformers fits it better"
    if kwargs.get("sliding_window") is not None:
        return DynamicLayer(), f"a sliding window of {kwargs['sliding_window']} tokens bounds it already"
    return None


def _native_layer(config: Any, layer: LeanKVLayer) -> Any:
    """A fresh layer of the kind that transformers' DynamicCache would use here."""
    if not isinstance(config, PretrainedConfig):
        return DynamicLayer()
    cache = layer.cache
    if cache.native_layers is None or cache.native_layers[0] is not config:
        cache.native_layers = (config, DynamicCache(config=config).layers)
    layers = cache.native_layers[1]
    return copy.deepcopy(layers[layer.index]) if layer.index < len(layers) else DynamicLayer()


def _refuse_config(config: PretrainedConfig) -> None:
    classes = MODEL_MAPPING.get(type(config), None) if type(config) in MODEL_MAPPING else None
    for cls in classes if isinstance(classes, list | tuple) else [classes]:
        if cls is not None and not cls._can_set_attn_implementation():
            raise ValueError(
                f"{cls.__name__} computes its own attention and cannot run under attn_implementation={NAME!r}: build "
                "it with attn_implementation='eager' (LeanKVCache then stores plain keys and values), or use "
                "hfkv.enable(model)"
            )
    _refuse_sparse_config(config)


def _refuse_sparse_config(config: PretrainedConfig) -> None:
    text = config.get_text_config(decoder=True)
    sparse = SPARSE_LAYERS & set(getattr(text, "layer_types", None) or [])
    if sparse or getattr(text, "index_topk", None) is not None:
        kind = ", ".join(sorted(sparse)) or "index_topk"
        raise ValueError(
            f"{type(config).__name__} has sparse attention ({kind}), which attn_implementation={NAME!r} would run "
            "densely: keep the model's own attn_implementation"
        )


def _refuse_sparse(module: nn.Module, kwargs: dict) -> None:
    if kwargs.get("indices") is not None or getattr(module, "indexer", None) is not None:
        raise ValueError(
            f"{type(module).__name__} attends sparsely through an indexer: keep the model's own attn_implementation, "
            f"not {NAME!r}"
        )
