"""`DecodeStep`: a decode step in two parts, one that the device can repeat by itself and one for the host's books.

The device part reads and writes tensors at fixed addresses alone: token ids and positions, which are copied in;
windows, kept queries and their counters, which it advances itself; copies of page tables and mean keys, which are
renewed when a flush has made new ones. What the host knows (logical lengths, fills, which queries are kept) is advanced
apart from it, without asking the device.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hfkv.attend import Call, Past
from hfkv.fill import Fill
from hfkv.graphs.fills import LaterFill
from hfkv.graphs.trace import NotCapturable, StepTrace
from hfkv.handle import Chunk, KVHandle
from hfkv.layer import check_same
from hfkv.tokens import LayerTokens, plain_tensors
from hfkv.window import Window

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache

T = TypeVar("T")


class Recording(Protocol):
    """A recorded step: `hfkv.graphs.device.CudaGraph`, or a stand-in for tests without a GPU."""

    out: Any

    def replay(self) -> None:
        """Run it."""
        ...


class Recorder(Protocol):
    """What records steps."""

    def __call__(self, device: torch.device, step: Callable[[], Any], before: Any) -> Recording:
        """Record a step without running it."""
        ...

    def warm_up(self, device: torch.device, step: Callable[[], T]) -> T:
        """Run a step as it will be recorded."""
        ...


@dataclass(frozen=True)
class Request:
    """One call of a model's forward for one new token of every sequence.

    Attributes:
        ids: int64 [batch, 1].
        positions: position ids as they were passed, or None.
        mask: the padding [batch, tokens], or None.
        extras: what else is passed on, numbers and flags.
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    extras: dict[str, Any]

    @property
    def shape(self) -> tuple:
        """What a recording holds fixed."""
        where = None if self.positions is None else (self.positions.shape, self.positions.dtype)
        return self.ids.shape, self.ids.dtype, where, tuple(sorted(self.extras.items()))


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


class DecodeStep:
    """The decode step of one cache under one model.

    Args:
        owner: who made it; a step of another owner is of no use.
        recorder: what records it.

    Attributes:
        replayed: whether the last step was a replay.
    """

    def __init__(self, owner: Any, recorder: Recorder) -> None:
        self.owner, self.recorder = owner, recorder
        self.forget()

    def forget(self) -> None:
        """Drop the recording; the next step starts from what the cache holds."""
        self.parts: list[Part] = []
        self.mask: Tensor | None = None
        self.replayed = False
        self._cache: StepCache | None = None
        self._shape: tuple | None = None
        self._ids: Tensor | None = None
        self._positions: Tensor | None = None
        self._fill: Fill | None = None  # what every layer has while nobody else has touched it
        self._base: Fill | None = None
        self._since = 0
        self._recording: Recording | None = None
        self._earlier: Recording | None = None
        self._trace: StepTrace | None = None
        self._warm = False
        self._held: list[Any] = []

    def __reduce__(self) -> tuple:
        """A recording belongs to the tensors it was made of: a copied or pickled cache has none."""
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """Bytes beside the cache's own: counters, inputs, copies of tables."""
        own = [self._ids, self._positions]
        own += [] if self._cache is None else [self._cache.counts, self._cache.kept]
        return sum(x.nbytes for x in own if x is not None) + sum(part.still.nbytes for part in self.parts)

    # ---- what the cache holds --------------------------------------------------------------------------------------

    def is_current(self, cache: LeanKVCache) -> bool:
        """Whether the cache is as the last step has left it."""
        if self._fill is None or len(cache.layers) != len(self.parts):
            return False
        pairs = zip(cache.layers, self.parts, strict=True)
        return all(
            getattr(layer, "tokens", None) is part.tokens and part.tokens.fill is self._fill for layer, part in pairs
        )

    @plain_tensors()
    def bind(self, cache: LeanKVCache, request: Request) -> None:
        """Bring the fixed tensors up to date with cache and request; where one is new, the recording is void."""
        held = cache.compressed
        same = True
        if len(held) != len(self.parts) or any(t is not p.tokens for t, p in zip(held, self.parts, strict=False)):
            self.parts, same = [Part(t, t.window, None, t.queries.q) for t in held], False
        for part in self.parts:
            same = part.take() and same
        fill = held[0].fill
        if self._cache is None or not same or self._cache.counts.shape != fill.counts.shape:
            kept = torch.zeros(3, dtype=torch.int64, device=held[0].device)
            self._cache, same = StepCache(self.parts, fill.counts.clone(), kept, cache.fingerprint), False
        self._cache.counts.copy_(fill.counts)
        queries = next((t.queries for t in held if t.config.selects), None)
        if queries is not None:
            self._cache.kept[0].fill_(len(queries.positions))
            self._cache.kept[1].fill_(queries.stands_for)
        self._fill, self._base, self._since = fill, fill, 0
        self._shape_as(request, same)

    def _shape_as(self, request: Request, same: bool) -> None:
        if request.shape != self._shape:
            self._shape, same = request.shape, False
            self._ids = torch.zeros_like(request.ids)
            positions = request.ids[:1] if request.positions is None else request.positions
            self._positions = torch.zeros_like(positions)
        if not same:
            self._earlier = self._recording or self._earlier
            self._recording, self._trace, self._warm = None, None, False

    # ---- the step ----------------------------------------------------------------------------------------------------

    def run(self, cache: LeanKVCache, request: Request, forward: Callable[..., Any]) -> Any:
        """Take one step -> the model's output, with the cache in its place.

        Args:
            cache: as `bind` has found it.
            forward: the model's.

        Raises:
            NotCapturable: the step depends on more than its inputs; the cache is as it was.
        """
        if request.shape != self._shape:
            with plain_tensors():
                self._shape_as(request, same=True)
        own, fill, self._fill = self._cache, self._fill, None  # unless all ends well, nothing is known of the device
        assert own is not None and fill is not None and self._ids is not None and self._positions is not None
        self._ids.copy_(request.ids)
        if request.positions is None:
            self._positions.fill_(fill.seen)
        else:
            self._positions.copy_(request.positions)
        for layer in own.layers if self._recording is None else ():
            layer.seen = fill.seen
        out = self._on_device(own, request, forward)
        out = _handed_out(out, own, cache, copy=self.replayed)
        self._advance(cache)
        self.mask = request.mask
        return out

    def _on_device(self, own: StepCache, request: Request, forward: Callable[..., Any]) -> Any:
        """Warm up, then once more to see what is asked of torch, then record and replay."""

        def device_part() -> Any:
            own.begin()
            out = forward(
                input_ids=self._ids,
                attention_mask=None,
                position_ids=self._positions,
                past_key_values=own,
                **request.extras,
            )
            own.check_reached()
            check_output(out, own)
            return out

        device, self.replayed = own.counts.device, True
        if self._recording is not None:
            self._recording.replay()
            return self._recording.out
        if self._warm and self._trace is not None:
            trace = StepTrace()
            recording = self.recorder(device, lambda: trace.around(device_part), self._earlier)
            self._trace.check_same(trace)
            self._recording, self._earlier, self._trace = recording, None, None
            self._held = [own.counts, own.kept, *self.read, *trace.outside]
            recording.replay()
            self.owner.note_capture()
            return recording.out
        self.replayed = False
        if not self._warm:
            self._warm, out = True, self.recorder.warm_up(device, device_part)
            return out
        trace = StepTrace()
        out = self.recorder.warm_up(device, lambda: trace.around(device_part))
        self._trace = trace
        return out

    @property
    def read(self) -> list[Tensor]:
        """Every tensor of the cache that the device part reads or writes; kernels take them unseen by torch."""
        found: list[Tensor] = []
        for part in self.parts:
            found += [part.window.k, part.window.v, *part.still.read]
            found += [] if part.queries is None else [part.queries]
        return found

    def _advance(self, cache: LeanKVCache) -> None:
        """What the host knows of a step: one token more in every layer."""
        assert self._base is not None
        self._since += 1
        fill = LaterFill(self._base, self._since)
        for layer, part in zip(cache.layers, self.parts, strict=True):
            tokens = part.tokens
            layer.seen += 1
            tokens.fill, tokens.call = fill, part.call
            if tokens.config.selects:
                tokens.queries.pick(1, fill.seen)
        self._fill = fill


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor's numbers can be copied over the other's."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def check_output(out: Any, own: StepCache) -> None:
    """Raise NotCapturable where a model's output is more than tensors and the cache."""
    if not isinstance(out, dict) or not dataclasses.is_dataclass(out):
        raise NotCapturable(f"its forward returns {type(out).__name__}")
    for name, value in out.items():
        if value is not None and value is not own and not isinstance(value, Tensor):
            raise NotCapturable(f"its output has {name}, a {type(value).__name__}")


def _handed_out(out: Any, own: StepCache, cache: LeanKVCache, copy: bool) -> Any:
    """A model's output with the cache in its place; of a replay, with tensors that the next one leaves alone."""
    fields = {}
    for name, value in out.items():
        fields[name] = cache if value is own else value.clone() if copy and isinstance(value, Tensor) else value
    return type(out)(**fields)
