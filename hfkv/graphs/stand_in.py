"""What a model meets in place of its cache in the device part of a step: layers that know fixed addresses alone."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from hfkv.attend import Call, Past
from hfkv.fill import Fill
from hfkv.graphs.trace import NotCapturable
from hfkv.handle import Chunk, KVHandle
from hfkv.layer import check_same
from hfkv.tokens import LayerTokens, plain_tensors
from hfkv.window import Window


@dataclass(eq=False)
class Part:
    """One layer's share of a step: its tokens, and the tensors at fixed addresses."""

    tokens: LayerTokens
    window: Window
    still: Any
    queries: Tensor | None = None
    call: Call | None = None

    def take(self) -> bool:
        """Bring the fixed tensors up to date; False where one had to be made anew, and recordings are void."""
        tokens, same = self.tokens, True
        if tokens.window is not self.window:
            if alike(tokens.window.k, self.window.k) and alike(tokens.window.v, self.window.v):
                self.window.k.copy_(tokens.window.k)
                self.window.v.copy_(tokens.window.v)
                tokens.window = self.window
            else:
                self.window, same = tokens.window, False
        own = tokens.queries.q
        if own is not self.queries:
            if own is not None and self.queries is not None and alike(own, self.queries):
                self.queries.copy_(own)
                tokens.queries.q = self.queries
            else:
                self.queries, same = own, False
        still = tokens.kernels.still(tokens.past(), self.still)
        same = same and still is self.still
        self.still = still
        return same


class StepLayer(DynamicLayer):
    """Stands for a LeanKVLayer in the device part of a step."""

    is_compileable = False

    def __init__(self, cache: StepCache, index: int, part: Part) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.index, self.part, self.tokens = index, part, part.tokens
        self.generation, self.seen, self.reached = 0, 0, False
        self.pending: Chunk | None = None
        self.is_initialized = True

    @property
    def cache(self) -> StepCache:
        cache = self._cache()
        assert cache is not None, "the step is gone"
        return cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce keys and values [batch, kv_heads, 1, dim]."""
        check_same(self.index, "keys", key_states, self.part.window.k)
        check_same(self.index, "values", value_states, self.part.window.v)
        if key_states.shape[2] != 1 or self.reached:
            raise NotCapturable(f"layer {self.index} takes more than one token in a step")
        chunk = self.pending = Chunk(self, key_states, value_states)  # type: ignore[arg-type]
        self.reached = True
        return KVHandle(chunk, "k", self.seen + 1), KVHandle(chunk, "v", self.seen + 1)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def materialise(self, chunk: Chunk) -> NoReturn:
        raise NotCapturable(f"layer {self.index} does not attend through attn_implementation='leankv'")

    def completed(self, call: Call, module: nn.Module, q: Tensor) -> Call:
        """See `LeanKVLayer.completed`: an earlier step has found it."""
        known = self.tokens.call
        return call if known is None else replace(call, rotary=known.rotary)

    def attend(self, chunk: Chunk, q: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """See `LeanKVLayer.attend`."""
        if mask is not None:
            raise NotCapturable("the model makes an attention mask of its own for a single token")
        part, step = self.part, self.cache
        kernels = part.tokens.kernels
        if not chunk.stored:
            if part.queries is None and part.tokens.config.selects:
                with plain_tensors():
                    most = part.tokens.queries.most
                    part.queries = part.tokens.queries.q = q.new_zeros(*q.shape[:2], most, q.shape[3])
            own = (part.window.k, part.window.v, step.counts, part.queries)
            kernels.append_step(chunk.k, chunk.v, q, *own, None if part.queries is None else step.kept)
            part.call = call
            chunk.stored, self.pending = True, None
        past = Past(part.tokens.packed, None, part.window, step.fill)
        return kernels.attend_still(part.still, past, q, call).transpose(1, 2).contiguous()


class StepCache(DynamicCache):
    """Stands for a LeanKVCache in the device part of a step: the model gets it as `past_key_values`.

    Attributes:
        counts: int64 [batch], tokens in the windows.
        kept: int64 [3], see `hfkv.kernels.append.begin_step`.
        fill: of this step's windows; it knows `counts` alone.
    """

    def __init__(self, parts: list[Part], counts: Tensor, kept: Tensor, fingerprint: Any) -> None:
        super().__init__()
        self.layers: list[Any] = [StepLayer(self, index, part) for index, part in enumerate(parts)]
        self.counts, self.kept, self.fingerprint = counts, kept, fingerprint
        self.fill: Any = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)

    def undo_forward(self) -> None:
        """Nothing that the host knows has changed."""

    def begin(self) -> None:
        """Count this step's tokens."""
        for layer in self.layers:
            layer.reached, layer.pending = False, None
        tokens = self.layers[0].part.tokens
        kept = self.kept if any(layer.part.tokens.config.selects for layer in self.layers) else None
        tokens.kernels.begin_step(self.counts, kept, tokens.queries.every, tokens.queries.most)
        self.fill = Fill(None, self.counts, tokens.window.capacity, None, 0, None)

    def check_reached(self) -> None:
        """Raise NotCapturable where the model has left a layer out."""
        for layer in self.layers:
            if not layer.reached or layer.pending is not None:
                raise NotCapturable(f"layer {layer.index} takes no part in a step")


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor's numbers can be copied over the other's."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
