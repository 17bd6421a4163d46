"""`LeanKVLayer`: one decoder layer's cache, from the first chunk to packed tokens."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from hfkv.attend import Call, says_more_than_padding
from hfkv.config import LeanKVConfig
from hfkv.handle import Chunk, KVHandle
from hfkv.tokens import LayerTokens, Snapshot, plain_tensors

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache


class LeanKVLayer(DynamicLayer):
    """The compressed cache of one full-attention layer: HuggingFace's face of `LayerTokens`.

    It starts undecided: `update` hands out handles of the exact chunk. The attention function's first call either
    lets the layer compress (it then has `tokens`) or has the cache swap in one of transformers' own layers.

    Attributes:
        index: number of the decoder layer.
        seen: logical tokens, those of the running forward included.
        tokens: what is held, None before the first chunk is stored.
        pending: the chunk that `update` announced and attention has not yet come for.
        generation: counts flushes, crops and reorders; handles of an earlier one are stale.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: LeanKVCache, index: int, config: LeanKVConfig) -> None:
        super().__init__()
        self.index, self.config, self.generation = index, config, 0
        self._clear()
        self.bind(cache)

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self.tokens: LayerTokens | None = None
        self.pending: Chunk | None = None

    def bind(self, cache: LeanKVCache) -> None:
        """Belong to this cache, by a weak reference: a cache that is dropped frees its memory at once."""
        self._cache = weakref.ref(cache)
        if self.tokens is not None:
            self.tokens.bind(cache)

    @property
    def cache(self) -> LeanKVCache:
        cache = self._cache()
        if cache is None:
            raise RuntimeError(f"layer {self.index}: the LeanKVCache that these keys and values belong to is gone")
        return cache

    # ---- transformers' face ------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce keys and values [batch, kv_heads, q, dim]; they are stored when attention comes for the handles."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        chunk = self.pending = Chunk(self, key_states, value_states)
        self.seen += key_states.shape[2]
        return KVHandle(chunk, "k", self.seen), KVHandle(chunk, "v", self.seen)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        if self.tokens is not None:
            self.tokens.release()
        self._clear()
        self.generation += 1

    def check_crop(self, remove: int) -> None:
        """Raise ValueError where dropping the newest `remove` logical tokens would reach packed ones."""
        exact = self.seen if self.tokens is None else self.tokens.fill.most
        if remove > exact and self.seen > exact:
            raise ValueError(
                f"crop of {remove} tokens reaches packed ones: layer {self.index} holds the newest {exact} of "
                f"{self.seen} exact; nothing was changed; use a larger LeanKVConfig.window, or copy.deepcopy the cache "
                "beforehand"
            )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        remove = min(-int(tokens_to_remove), self.seen)
        if remove <= 0 or self.tokens is None:
            return
        self.check_crop(remove)
        self.seen -= remove
        self.tokens.crop(remove)
        self.generation += 1

    def select(self, index: Tensor) -> None:
        """Make what is exact of sequence i a copy of today's sequence `index[i]`, int64 [n] on the layer's device."""
        assert self.tokens is not None
        self.tokens.select(index)
        self.generation += 1

    def offload(self) -> NoReturn:
        raise ValueError(
            "LeanKVCache cannot be offloaded layer by layer, since its layers share pages: use a stronger preset"
        )

    def prefetch(self) -> NoReturn:
        self.offload()

    def check(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise ValueError where keys and values do not fit what is held: another batch, model, dtype or device."""
        if self.tokens is not None:
            check_same(self.index, "keys", key_states, self.tokens.window.k)
            check_same(self.index, "values", value_states, self.tokens.window.v)

    # ---- handles and attention ---------------------------------------------------------------------------------------

    def materialise(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Plain tensors for an operation outside the attention function; only the first chunk can be had so."""
        if self.tokens is not None:
            if self.pending is chunk:
                self.cache.undo_forward()
            raise ValueError(
                f"layer {self.index} holds compressed tokens, but the model asks for plain keys and values: set "
                'model.set_attn_implementation("leankv") again, or use a fresh cache'
            )
        if self.pending is chunk:
            reason = "its attention does not go through attn_implementation='leankv'"
            self.cache.keep_plain(self, DynamicLayer(), reason)
        return chunk.k, chunk.v

    def completed(self, call: Call, module: nn.Module, q: Tensor) -> Call:
        """The call with what the layer's score needs of the attention module beside queries q."""
        return replace(call, rotary=self.cache.rotary(module, q)) if self.config.turns_queries else call

    def attend(self, chunk: Chunk, q: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """Attention over everything up to the chunk; the first call for a chunk also stores it.

        Args:
            q: [batch, q_heads, queries, D], the last queries of the chunk.
            mask: None, the padding as bool [batch, 1, 1, tokens], or (first chunk only) a 4-D mask.

        Returns:
            [batch, queries, q_heads, Dv].
        """
        if chunk.generation != self.generation:
            raise RuntimeError(
                f"layer {self.index}: keys and values of an earlier forward were read after a flush, crop, reorder or "
                "reset"
            )
        mask = self.cache.fills.known_mask(mask)
        fill = None if self.tokens is None or chunk.stored else self.tokens.fill
        valid = self.cache.fills.valid_tokens(mask, chunk.k.shape[2], fill)
        if self._is_first(chunk):
            out = self._made(chunk).kernels.attend_own(chunk, q, mask, valid, call)
            if not chunk.stored:
                self._store(chunk, q, valid, call, None)
        else:
            self._check_past(chunk, q, mask, valid)
            with plain_tensors():
                out = self._attend_past(chunk, q, valid, call)
        return out.transpose(1, 2).contiguous()

    def _is_first(self, chunk: Chunk) -> bool:
        return self.seen == chunk.k.shape[2]

    @plain_tensors()
    def _made(self, chunk: Chunk) -> LayerTokens:
        """What is held, made from the first chunk."""
        if self.tokens is None:
            self.tokens = LayerTokens(self.cache, self.config, chunk)
        return self.tokens

    def _attend_past(self, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call) -> Tensor:
        assert self.tokens is not None
        kernels = self.tokens.kernels
        if chunk.past is not None:  # another layer reads a long chunk again
            return kernels.attend_chunk(chunk.past, chunk, q, valid, call, observed=0)[0]
        if not chunk.stored:
            new = chunk.k.shape[2]
            broken = self.cache.fills.broken(valid)  # a step takes its queries for the newest tokens
            if self.cache.observing or broken or new > self.config.flush or new > self.tokens.capacity_left:
                chunk.past = self.tokens.past()
                observed = self.config.observe if self.config.selects else 0
                out, lse = kernels.attend_chunk(chunk.past, chunk, q, valid, call, observed)
                if self.cache.observing:
                    self.tokens.observe_reconstruction(q, valid, call, lse)
                    chunk.stored, self.pending = True, None
                else:
                    self._store(chunk, q, valid, call, lse)
                return out
            self.tokens.append(chunk, q, valid, call)
            chunk.stored, self.pending = True, None
        return kernels.attend_step(self.tokens.past(), q, call)

    @plain_tensors()
    def _store(self, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None) -> None:
        self._made(chunk).store(chunk, q, valid, call, lse)
        chunk.stored, self.pending = True, None

    def _check_past(self, chunk: Chunk, q: Tensor, mask: Tensor | None, valid: Tensor | None) -> None:
        if mask is not None and not chunk.stored and not self._follows(chunk, mask, valid):
            raise ValueError(
                f"the attention mask {tuple(mask.shape)} hides tokens of a compressed past (a 4-D mask, or a 2-D one "
                "that has changed): packed tokens have no order; pass the 2-D padding mask, the same for all tokens so "
                "far (only the newest of a sequence may be hidden later), or give a 4-D mask with the first chunk"
            )
        if torch.is_grad_enabled() and (q.requires_grad or chunk.k.requires_grad):
            raise ValueError("no gradient flows through a compressed past: call the model under torch.no_grad()")

    def _follows(self, chunk: Chunk, mask: Tensor, valid: Tensor | None) -> bool:
        """Whether a mask hides pads of the past, which are not held, or tokens that can be dropped, which are then."""
        assert self.tokens is not None
        if says_more_than_padding(mask):
            return False
        new = chunk.k.shape[2]
        return self.tokens.follow(mask, new, valid) or self.cache.drop_hidden(mask, new, valid)

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self, new: int) -> tuple[int, Snapshot | None]:
        """Everything that an update of `new` tokens and their storing change."""
        return self.seen, None if self.tokens is None else self.tokens.snapshot(packs=new > self.config.flush)

    def restore(self, state: tuple[int, Snapshot | None]) -> None:
        """Undo the chunk announced since `snapshot`."""
        seen, held = state
        if held is None:
            self.reset()
            return
        assert self.tokens is not None
        self.tokens.restore(held)
        self.seen, self.pending = seen, None


def check_same(index: int, name: str, new: Tensor, own: Tensor) -> None:
    """Raise ValueError where `new` keys or values cannot follow the layer's `own`, [batch, kv_heads, tokens, dim]."""
    where = f"layer {index} of this LeanKVCache holds {name}"
    if new.shape[0] != own.shape[0]:
        raise ValueError(
            f"{where} of {own.shape[0]} sequences and got {new.shape[0]}: the batch size is fixed by the first "
            "prompt; use a fresh cache, batch_select_indices or batch_repeat_interleave"
        )
    if new.shape[1] != own.shape[1] or new.shape[3] != own.shape[3]:
        raise ValueError(
            f"{where} of {own.shape[1]} heads x {own.shape[3]} and got {new.shape[1]} x {new.shape[3]}: it belongs "
            "to another model; use a fresh cache"
        )
    if new.dtype != own.dtype or new.device != own.device:
        raise ValueError(
            f"{where} in {own.dtype} on {own.device} and got {new.dtype} on {new.device}: use a fresh cache for a "
            "model of another dtype or device"
        )
