"""`ForwardBook`: which layers the running forward has reached, how to undo it, and whether one has stopped halfway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hfkv.layer import LeanKVLayer

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache


class ForwardBook:
    """In a forward every layer is updated once, in order; the book notices where one is not, and can undo the last."""

    def __init__(self) -> None:
        self._updates: dict[int, int] = {}
        self._lead = 0
        self._undo: list[tuple[int, Any, Any]] = []
        self._flush_due = False  # as it was before the first of `_undo`
        self._changing: str | None = None

    def begins(self, cache: LeanKVCache, index: int) -> bool:
        """Whether a layer's update is the first of a forward.

        Raises:
            RuntimeError, ValueError: an earlier forward, flush or reorder stopped halfway.
        """
        lead = self._lead if self._updates else index
        if index > lead:
            if self._updates.get(index, 0) + 1 != self._updates[lead]:
                raise self._aborted(cache, index)
            return False
        self.begin(cache)
        self._lead = index
        return True

    def begin(self, cache: LeanKVCache) -> None:
        """A forward begins: the last one must have ended well, and is no longer to be undone.

        Raises:
            RuntimeError, ValueError: an earlier forward, flush or reorder stopped halfway.
        """
        self.check(cache)
        self._undo = []

    def note(self, cache: LeanKVCache, index: int, layer: Any, state: Any) -> None:
        """Remember what a layer was before its update."""
        if not self._undo:
            self._flush_due = cache.flush_due
        self._undo.append((index, layer, state))
        self._updates[index] = self._updates.get(index, 0) + 1

    def check(self, cache: LeanKVCache) -> None:
        """Raise where the last forward did not reach every layer, or a change of all layers did not end."""
        if self._changing is not None:
            raise RuntimeError(
                f"a {self._changing} of this LeanKVCache stopped halfway: call cache.reset() and start again from the "
                "prompt"
            )
        most = max(self._updates.values(), default=0)
        for index, count in self._updates.items():
            layer = cache.layers[index]
            if count != most or (isinstance(layer, LeanKVLayer) and layer.pending is not None):
                raise self._aborted(cache, index)
        lean = cache.lean_layers
        for layer in lean:
            if layer.seen != lean[0].seen:
                raise self._aborted(cache, layer.index)

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Layers are being changed one after the other: unless it ends well, the cache says that it must be reset."""
        self._changing = what
        yield
        self._changing = None

    def undo(self, cache: LeanKVCache) -> None:
        """Put every layer back to where it was before the forward that is failing."""
        with self.changing("failing forward"):
            if self._undo:
                cache.flush_due = self._flush_due
            for index, layer, state in reversed(self._undo):
                self._updates[index] -= 1
                if isinstance(layer, LeanKVLayer):
                    layer.restore(state)
                    cache.layers[index] = layer
                    cache.plain_reasons.pop(index, None)
                else:
                    cache.layers[index] = state
            self._undo = []
            self._updates = {index: count for index, count in self._updates.items() if count}
            for pool in cache.pools:
                pool.trim()

    def renew(self) -> None:
        """What layers hold was changed for good before they stored anything: undoing the forward returns to that."""
        for number, (index, layer, state) in enumerate(self._undo):
            if isinstance(layer, LeanKVLayer) and layer.tokens is not None and state[1] is not None:
                held = layer.tokens.snapshot(packs=state[1].table is not None)
                self._undo[number] = (index, layer, (state[0], held))

    @staticmethod
    def _aborted(cache: LeanKVCache, index: int) -> Exception:
        if cache.encoder_decoder:
            return ValueError(
                f"layer {index} and others were not updated equally often, as when cross-attention shares the cache: "
                "pass past_key_values=EncoderDecoderCache(LeanKVCache(...), DynamicCache()); or a forward stopped "
                "halfway: call cache.reset()"
            )
        return RuntimeError(
            f"an earlier forward stopped halfway: layer {index} does not hold what other layers hold; call "
            "cache.reset() and start again from the prompt (encoder-decoder models need "
            "EncoderDecoderCache(LeanKVCache(...), DynamicCache()))"
        )
