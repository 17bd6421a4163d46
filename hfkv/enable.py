"""`hfkv.enable(model)`: plain `model.generate(...)` with a compressed cache."""

from __future__ import annotations

import logging
import types
from typing import Any

from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicCache

from hfkv.attention import NAME, _refuse_config
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig
from hfkv.graphs.decode import remove
from hfkv.masks import unwatch, watch

logger = logging.getLogger("hfkv")

_SETTINGS = "_hfkv"
_HOOK = "_prepare_cache_for_generation"


def enable(model: PreTrainedModel, config: LeanKVConfig | None = None) -> PreTrainedModel:
    """Let `model.generate` use a fresh LeanKVCache wherever no cache is given; returns the model.

        model = hfkv.enable(AutoModelForCausalLM.from_pretrained(name))
        model.generate(**inputs)

    Args:
        model: a model of transformers; its attention implementation is switched to `leankv`.
        config: the cache's config; None is the preset `balanced`.

    Raises:
        TypeError: `config` is not a LeanKVConfig, or the model cannot generate.
        ValueError: the model attends sparsely, which `leankv` would not.
    """
    if config is not None and not isinstance(config, LeanKVConfig):
        raise TypeError(f"hfkv.enable needs a LeanKVConfig, not {type(config).__name__}")
    if not hasattr(model, _HOOK):
        raise TypeError(
            f"{type(model).__name__} has no generate(): give hfkv.enable the model class with the language-model head"
        )
    if model._can_set_attn_implementation():
        _refuse_config(model.config)
    config = config if config is not None else LeanKVConfig()
    before = model.__dict__.get(_SETTINGS)
    previous = before[1] if before is not None else _implementation(model)
    _switch(model, NAME)
    if _implementation(model) != NAME:
        logger.warning(
            "%s keeps attn_implementation=%r: its cache is not compressed", type(model).__name__, _implementation(model)
        )
    model.__dict__[_SETTINGS] = (config, previous)
    model.__dict__[_HOOK] = types.MethodType(_prepare_cache, model)
    watch(model)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable` and `compile_decode`: the model's own caches, forward and attention implementation again.

    Returns:
        The model.
    """
    remove(model)
    unwatch(model)
    settings = model.__dict__.pop(_SETTINGS, None)
    model.__dict__.pop(_HOOK, None)
    if settings is not None:
        _switch(model, settings[1])
    return model


def _implementation(model: PreTrainedModel) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def _switch(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the text part only, where there are others."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        model.set_attn_implementation(name)
        return
    sub = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation({sub[0]: name} if sub else name)


def _prepare_cache(self: Any, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
    """`_prepare_cache_for_generation` of an enabled model: a fresh LeanKVCache where transformers makes its own."""
    config, _ = self.__dict__[_SETTINGS]
    original = getattr(type(self), _HOOK)
    wanted = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
    if not (wanted and self._supports_default_dynamic_cache()):
        return original(self, generation_config, model_kwargs, *args, **kwargs)
    _refuse_other_cache(self, generation_config.cache_implementation)
    own: Any = LeanKVCache(config, model_config=self.config)
    cache: Any = EncoderDecoderCache(own, DynamicCache()) if self.config.is_encoder_decoder else own
    model_kwargs["past_key_values"] = cache
    generation_config.cache_implementation = None
    result = original(self, generation_config, model_kwargs, *args, **kwargs)
    cache._is_user_defined = False
    if getattr(generation_config, "is_assistant", False):
        cache.activate_past_recording()
    return result


def _refuse_other_cache(model: PreTrainedModel, asked: str | None) -> None:
    """Raise where a call asks for another kind of cache; what the model's own defaults ask for is replaced."""
    if asked in (None, "dynamic"):
        return
    if asked != getattr(model.generation_config, "cache_implementation", None):
        raise ValueError(
            f"generate(cache_implementation={asked!r}) on a model under hfkv.enable, which gives every call a "
            "LeanKVCache: leave it out, or call hfkv.disable(model) first"
        )
    logger.warning("LeanKVCache takes the place of generation_config.cache_implementation=%r", asked)
