"""Padding masks that `generate` makes from the last step's by ones: the device need not be asked about these."""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from hfkv.cache import LeanKVCache
from hfkv.fill import version

GROW = "_update_model_kwargs_for_generation"
_EXTENDS = "_hfkv_extends"
"""A mask that was made from another by ones has a reference to that other under this name."""

_WATCH = "_hfkv_watch"


def extends(mask: Tensor) -> Tensor | None:
    """The mask that this one was made from by ones, as long as it lives and nobody has written into this one."""
    made_from, own = getattr(mask, _EXTENDS, (None, None))
    return made_from() if made_from is not None and own == version(mask) else None


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
            cache.fills.show(mask, extends(mask))
        else:
            cache.fills.show(None, None)


def _grow(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """GenerationMixin's own, and a note on a mask that it has grown by ones."""
    before = model_kwargs.get("attention_mask")
    updated = GenerationMixin._update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs)
    after = updated.get("attention_mask")
    if isinstance(before, Tensor) and isinstance(after, Tensor) and after is not before:
        setattr(after, _EXTENDS, (weakref.ref(before), version(after)))
    return updated
