"""Padding masks that `generate` makes from the last step's by ones: the device need not be asked about these."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from hfkv.cache import LeanKVCache
from hfkv.fill import State

GROW = "_update_model_kwargs_for_generation"
_MADE_FROM, _NAME = "_hfkv_made_from", "_hfkv_name"
_WATCH = "_hfkv_watch"


def made_from(mask: Tensor) -> State | None:
    """The state of the mask that this one was made from by ones, if nobody has written into this one since."""
    before, own = getattr(mask, _MADE_FROM, (None, None))
    return before if own == _version(mask) else None


def state(mask: Tensor) -> State:
    """Tells a mask, with the numbers that it has now, from all others, and does not keep it."""
    if not hasattr(mask, _NAME):
        setattr(mask, _NAME, object())
    return getattr(mask, _NAME), _version(mask)


def _version(x: Tensor) -> int:
    """Grows whenever somebody writes into a tensor; of inference tensors nobody knows."""
    return 0 if x.is_inference() else x._version


def follow_growth(model: PreTrainedModel) -> None:
    """Have `generate` note which mask each was made from, unless the model grows masks in a way of its own."""
    if getattr(type(model), GROW) is getattr(GenerationMixin, GROW) and GROW not in model.__dict__:
        model.__dict__[GROW] = types.MethodType(_grow, model)


def watch(model: PreTrainedModel) -> None:
    """Let caches see the masks that the model is called with, and know which `generate` has only grown."""
    follow_growth(model)
    if _WATCH not in model.__dict__:
        model.__dict__[_WATCH] = model.register_forward_pre_hook(_show, with_kwargs=True)


def unwatch(model: PreTrainedModel) -> None:
    """Undo `watch`."""
    handle = model.__dict__.pop(_WATCH, None)
    if handle is not None:
        handle.remove()
        model.__dict__.pop(GROW, None)


@torch.compiler.disable
def _show(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if isinstance(cache, LeanKVCache):
        if isinstance(mask, Tensor) and mask.dim() == 2:
            cache.fills.show(state(mask), tuple(mask.shape), made_from(mask))
        else:
            cache.fills.show(None, (), None)


def _grow(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """GenerationMixin's own, and a note on a mask that it has grown by ones."""
    before = model_kwargs.get("attention_mask")
    updated = GenerationMixin._update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs)
    after = updated.get("attention_mask")
    if isinstance(before, Tensor) and isinstance(after, Tensor) and after is not before:
        setattr(after, _MADE_FROM, (state(before), _version(after)))
    return updated
