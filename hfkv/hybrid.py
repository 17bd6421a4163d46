"""Linear-attention layers in a cache that was not told the model's config: their states announce them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hfkv.layer import LeanKVLayer

LINEAR_REASON = "it is a linear-attention layer, whose state does not grow"
HYBRID_REASON = "it has linear attention and attention in one layer"


class LazyLinearLayers(DynamicCache):
    """Makes transformers' own LinearAttentionLayer where a model first asks for a layer's states."""

    plain_reasons: dict[int, str]
    _recording: bool

    def layer_at(self, index: int) -> Any:
        raise NotImplementedError

    def join_linear_layer(self, index: int) -> None:
        """Where keys and values come for a layer that has linear-attention states, let one layer hold both."""
        old = self.layers[index] if index < len(self.layers) else None
        if isinstance(old, LinearAttentionCacheLayerMixin) and not isinstance(old, CacheLayerMixin):
            both = LinearAttentionAndFullAttentionLayer(number_of_states=getattr(old, "number_of_states", 1))
            both.__dict__.update(old.__dict__)
            self.layers[index] = both
            self.plain_reasons[index] = HYBRID_REASON

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self._unmade(layer_idx) else super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self._unmade(layer_idx) else super().get_recurrent_state(layer_idx, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        unmade = layer_idx is not None and self._unmade(layer_idx)
        return False if unmade or not self.layers else super().has_previous_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        self._make_linear(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        self._make_linear(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _unmade(self, index: int) -> bool:
        if index >= len(self.layers):
            return True
        layer = self.layers[index]
        return isinstance(layer, LeanKVLayer) and not layer.is_initialized

    def _make_linear(self, index: int) -> None:
        if not self._unmade(index):
            return
        self.layer_at(index)
        layer: Any = LinearAttentionLayer()
        if self._recording:
            layer.activate_past_recording()
        self.layers[index] = layer
        self.plain_reasons[index] = LINEAR_REASON
