"""`DecodeStep`: a decode step in two parts, one that the device can repeat by itself and one for the host's books.

The device part reads and writes tensors at fixed addresses alone: token ids and positions, which are copied in;
windows, kept queries and their counters, which it advances itself; copies of page tables and mean keys, which are
renewed when a flush has made new ones. What the host knows (logical lengths, fills, which queries are kept) is advanced
apart from it, without asking the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from hfkv.fill import Fill, State
from hfkv.graphs.fills import LaterFill
from hfkv.graphs.stand_in import Part, StepCache
from hfkv.graphs.trace import NotCapturable, StepTrace
from hfkv.masks import state
from hfkv.tokens import plain_tensors

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
        self.mask: State | None = None
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
        self.mask = None if request.mask is None else state(request.mask)
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
            sinks = None if part.call is None else part.call.sinks
            found += [x for x in (part.queries, sinks) if x is not None]
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
