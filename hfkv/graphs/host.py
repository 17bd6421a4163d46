"""`hfkv.compile_decode(model)` on the CPU, where nothing is captured: caches read their codes by compiled loops."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from hfkv.cache import LeanKVCache

NOT_CAPTURED = "on the CPU no step is captured: attention reads packed codes by compiled loops"


def original(before: dict[str, Any], model: Any, name: str) -> Callable[..., Any]:
    """The model's method without `compile_decode`; `before`: those that it had as its own, by name."""
    return before[name] if name in before else types.MethodType(getattr(type(model), name), model)


class HostDecode:
    """What a model's forward does under `compile_decode` on the CPU.

    Args:
        before: what the model had as its own `forward` and `_update_model_kwargs_for_generation`, by name.

    Attributes:
        forwards: calls with a LeanKVCache so far.
    """

    def __init__(self, before: dict[str, Any]) -> None:
        self.before, self.forwards = before, 0

    def forward(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's forward; a LeanKVCache that comes by reads its codes by loops from then on."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, LeanKVCache) and not torch.compiler.is_compiling():
            self.forwards += 1
            if not cache.compiled:
                cache.compile_loops()
        return original(self.before, model, "forward")(*args, **kwargs)

    @property
    def eager(self) -> dict[str, int]:
        """Forwards that were not captured, by reason."""
        return {NOT_CAPTURED: self.forwards} if self.forwards else {}
