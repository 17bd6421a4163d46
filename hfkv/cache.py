"""`LeanKVCache`: HuggingFace's face of the compressed cache, and what its layers share."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from hfkv.config import LeanKVConfig
from hfkv.fill import FillBook
from hfkv.layer import LeanKVLayer
from hfkv.paging.packed import Compaction, PackedLayer
from hfkv.paging.pool import PagePool
from hfkv.report import Report, make_report
from hfkv.tiering import apply_flush, plan_flush
from hfkv.tokens import LayerTokens

logger = logging.getLogger("hfkv")

FLUSH_SLACK = 1 / 32
"""A pool that grows at a flush grows by at least this share, so that a long generation does not end in many arenas."""

PAGE_WASTE = 0.01


class LeanKVCache(DynamicCache):
    """A KV cache that keeps tokens packed, in pages, in tiers by significance; a drop-in for `past_key_values`.

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="leankv")
        model.generate(**inputs, past_key_values=LeanKVCache())

    Args:
        config: a `LeanKVConfig`; None is the preset `balanced`.
        model_config: the model's config, if at hand: its layers' kinds are then known before the first forward.

    Raises:
        TypeError: `config` is not a LeanKVConfig (a model's config belongs to `model_config`).
    """

    def __init__(self, config: LeanKVConfig | None = None, model_config: PretrainedConfig | None = None) -> None:
        if config is not None and not isinstance(config, LeanKVConfig):
            hint = ": give the model's config as model_config=" if isinstance(config, PretrainedConfig) else ""
            raise TypeError(f"LeanKVCache needs a LeanKVConfig, not {type(config).__name__}{hint}")
        if model_config is not None and not isinstance(model_config, PretrainedConfig):
            raise TypeError(
                f"LeanKVCache(model_config=...) needs the model's PretrainedConfig, not {type(model_config).__name__}"
            )
        super().__init__()
        self.config = config if config is not None else LeanKVConfig()
        self.model_config = model_config
        self.layer_count = (
            None if model_config is None else model_config.get_text_config(decoder=True).num_hidden_layers
        )
        self._pools: dict[torch.device, PagePool] = {}
        self.native_layers: tuple[Any, list[Any]] | None = None
        self._recording = False
        self._start()

    def _start(self) -> None:
        """Begin empty: no layers, no pages, nothing remembered."""
        self.layers: list[Any] = []
        self.plain_reasons: dict[int, str] = {}
        self._pools.clear()
        self._page_tokens: int | None = None
        self._undo: list[tuple[int, Any, Any]] = []
        self._flush_due = False
        self.fills = FillBook()
        if self.model_config is not None:
            for index, native in enumerate(DynamicCache(config=self.model_config).layers):
                if type(native) is DynamicLayer:
                    self.layers.append(self._make_layer(index))
                else:
                    self.layers.append(native)
                    self._note_plain(index, f"{type(native).__name__} of transformers fits it better")

    # ---- update ----------------------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [batch, kv_heads, q, dim] of a layer; returns handles for the attention function.

        Raises:
            OutOfPages: `max_bytes` does not hold the step; nothing has changed.
            ValueError: another batch size, model, dtype or device.
            RuntimeError: an earlier forward stopped halfway.
        """
        layer = self._layer_at(layer_idx)
        if isinstance(layer, LeanKVLayer):
            self._before(layer, key_states.shape[2])
        elif self._undo is not None and key_states.shape[2] > 1:
            self._undo.append((layer_idx, layer, copy.copy(layer)))
        return layer.update(key_states, value_states, *args, **kwargs)

    def _layer_at(self, index: int) -> Any:
        while len(self.layers) <= index:
            self.layers.append(self._make_layer(len(self.layers)))
        return self.layers[index]

    def _make_layer(self, index: int) -> LeanKVLayer:
        return LeanKVLayer(self, index, self.config.for_layer(index))

    @property
    def lean_layers(self) -> list[LeanKVLayer]:
        """The layers that compress, or will as soon as they get their first chunk."""
        return [layer for layer in self.layers if isinstance(layer, LeanKVLayer) and layer.is_initialized]

    @property
    def compressed(self) -> list[LayerTokens]:
        """What the compressing layers hold, in their order."""
        return [layer.tokens for layer in self.lean_layers if layer.tokens is not None]

    def _before(self, layer: LeanKVLayer, new: int) -> None:
        """What precedes a layer's update: at the first layer of a forward, check the last one and flush if need be."""
        others = self.lean_layers
        lead = others[0] if others else layer
        if layer.index <= lead.index:
            self._check_complete(others)
            self._undo = []
            if others and (self._flush_due or self._overflows(others[0], new)):
                self.flush()
        elif layer.seen != lead.seen - new:
            raise self._aborted(layer, lead.seen - new)
        if layer.tokens is None or new > layer.config.flush:
            self._undo.append((layer.index, layer, layer.snapshot()))

    @staticmethod
    def _overflows(layer: LeanKVLayer, new: int) -> bool:
        return layer.tokens is not None and layer.tokens.capacity_left < new <= layer.config.flush

    def _check_complete(self, layers: list[LeanKVLayer]) -> None:
        for layer in layers:
            if layer.pending is not None or layer.seen != layers[0].seen:
                raise self._aborted(layer, layers[0].seen)

    @staticmethod
    def _aborted(layer: LeanKVLayer, expected: int) -> RuntimeError:
        held = layer.seen if layer.pending is None else layer.seen - layer.pending.k.shape[2]
        return RuntimeError(
            f"an earlier forward stopped halfway: layer {layer.index} holds {held} tokens where {expected} are expected; "
            "call cache.reset() and start again from the prompt"
        )

    def undo_forward(self) -> None:
        """Put every layer back to where it was before the forward that is failing."""
        for index, layer, state in reversed(self._undo):
            if isinstance(layer, LeanKVLayer):
                layer.restore(state)
                self.layers[index] = layer
                self.plain_reasons.pop(index, None)
            else:
                self.layers[index] = state
        self._undo = []
        for pool in self._pools.values():
            pool.trim()

    # ---- flush -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def flush(self) -> None:
        """Observe, choose tiers, compact: every layer packs what it has beyond its window, all or none of them.

        Raises:
            OutOfPages: the pages cannot be had; nothing has changed.
        """
        planned = [(tokens, plan_flush(tokens)) for tokens in self.compressed]
        for pool in self.pools:
            work = [(tokens.packed, flush.plan) for tokens, flush in planned if tokens.packed.pool is pool]
            self.reserve(pool, work, FLUSH_SLACK)
        for layer in self.lean_layers:
            layer.generation += 1
        for tokens, flush in planned:
            apply_flush(tokens, flush)
        self._flush_due = False

    def request_flush(self) -> None:
        """Flush at the beginning of the next forward: a continued prompt has been appended without revising the past."""
        self._flush_due = True

    def reserve(self, pool: PagePool, work: list[tuple[PackedLayer, Compaction]], slack: float = 0.0) -> None:
        """Make room for compactions that will be applied in this order, a layer's freed pages serving the next."""
        self._reserve_growth(pool, [(packed, plan.growth) for packed, plan in work], slack)

    def _reserve_growth(self, pool: PagePool, work: list[tuple[PackedLayer, list[list[int]]]], slack: float) -> None:
        running: dict[int, int] = {}
        peak: dict[int, int] = {}
        for packed, growth in work:
            for cls, (needed, freed) in zip(packed.classes, growth, strict=True):
                running[cls] = running.get(cls, 0) + needed - freed
                peak[cls] = max(peak.get(cls, 0), running[cls])
        if self.config.max_bytes is not None:
            pool.max_bytes = max(0, self.config.max_bytes - self._unpaged_bytes(pool.device))
        pool.reserve(peak, slack)

    # ---- shared by the layers of a step ------------------------------------------------------------------------------

    def pool(self, device: torch.device) -> PagePool:
        """The page pool of a device."""
        if device not in self._pools:
            self._pools[device] = PagePool(device)
        return self._pools[device]

    @property
    def pools(self) -> list[PagePool]:
        return list(self._pools.values())

    def page_tokens(self, tokens: int, tiers: int) -> int:
        """Tokens per page: 64, or 32 where half-filled pages of 64 would waste over 1 % of a head's `tokens`."""
        if self._page_tokens is None:
            small = 32 * tiers > PAGE_WASTE * tokens
            self._page_tokens = self.config.page_tokens or (32 if small else 64)
        return self._page_tokens

    def keep_plain(self, layer: LeanKVLayer, native: Any, reason: str) -> tuple[Tensor, Tensor]:
        """Swap one of transformers' own layers in for a layer that cannot be compressed -> its plain keys and values."""
        chunk = layer.pending
        assert chunk is not None and layer.tokens is None
        if self._recording and hasattr(native, "activate_past_recording"):
            native.activate_past_recording()
        self.layers[layer.index] = native
        self._note_plain(layer.index, reason)
        chunk.stored, layer.pending = True, None
        k, v = native.update(chunk.k, chunk.v)
        return k, v

    def _note_plain(self, index: int, reason: str) -> None:
        if reason not in self.plain_reasons.values():
            logger.warning("layer %d (and others alike) is not compressed: %s", index, reason)
        self.plain_reasons[index] = reason

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def _unpaged_bytes(self, device: torch.device) -> int:
        return sum(tokens.unpaged_bytes for tokens in self.compressed if tokens.device == device)

    def report(self) -> Report:
        """Physical bytes, ratio, tiers and bytes per layer and head; printed, it is a table."""
        return make_report(self)

    # ---- transformers' calls ---------------------------------------------------------------------------------------

    def __iter__(self) -> Any:
        raise TypeError(
            "a LeanKVCache cannot be read as (keys, values) pairs: its tokens are packed; use cache.report() or cache.layers"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens seen, whatever is kept of them."""
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], LeanKVLayer):
            return self.layers[layer_idx].get_seq_length()
        return super().get_seq_length(layer_idx)

    def activate_past_recording(self) -> None:
        self._recording = True
        super().activate_past_recording()

    def reset(self) -> None:
        """Forget everything and give the memory back; the cache is then as new."""
        self._start()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drop the newest tokens: `-n` (or 0) removes n, a positive number is the length to keep.

        Raises:
            ValueError: the crop reaches packed tokens; nothing has changed.
        """
        amount = int(tokens_to_remove)
        seen = self.get_seq_length()
        remove = -amount if amount <= 0 else max(0, seen - amount)
        if remove == 0:
            return
        lean = self.lean_layers
        for layer in lean:
            layer.check_crop(remove)
        for layer in self.layers:
            if not isinstance(layer, LeanKVLayer) and isinstance(layer, CacheLayerMixin):
                layer.crop(-remove)
        for layer in lean:
            layer.crop(-remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i a copy of today's sequence `beam_idx[i]`."""
        self._select(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self._select(indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        held = self.compressed
        index = torch.arange(held[0].fill.batch if held else 0).repeat_interleave(repeats)
        self._select(index, lambda layer: layer.batch_repeat_interleave(repeats))

    def _select(self, index: Tensor, plain: Callable[[Any], None]) -> None:
        """Make sequence i a copy of `index[i]` everywhere; `plain` does it for transformers' own layers."""
        held = self.compressed
        if held and torch.equal(index.cpu(), torch.arange(held[0].fill.batch)):
            return
        for pool in self.pools:
            own = [tokens for tokens in held if tokens.packed.pool is pool]
            growth = [(t.packed, t.packed.select_demand(t.rows_of(index.to(pool.device)))) for t in own]
            self._reserve_growth(pool, growth, FLUSH_SLACK)
        for layer in self.layers:
            if isinstance(layer, LeanKVLayer):
                layer.select(index)
            else:
                plain(layer)
