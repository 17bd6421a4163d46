"""The plain-torch path: the twins, on any device that torch has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hfkv.attend import Call, Past, attend_chunk, attend_own, attend_step
from hfkv.fill import Fill
from hfkv.handle import Chunk
from hfkv.kernels import kvcrush
from hfkv.kernels.append import append_step, begin_step
from hfkv.kernels.decode_attention import WorkList
from hfkv.kernels.replay import Asking, most_received
from hfkv.observe import observe_chunk, observe_stored
from hfkv.paging.compaction import Compaction
from hfkv.paging.packed import PackedLayer
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.window import Sequences, Window

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens


class Kernels(Protocol):
    """What a layer asks of its kernels; see the functions of the same names in `hfkv.attend` and `hfkv.observe`.

    Attributes:
        name: `torch` or `triton`, for the report.
        defers: whether `apply` can do without what the host would know of a plan.
    """

    name: str
    defers: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the kernels keep for this layer."""
        ...

    def view(self, packed: PackedLayer) -> Any:
        """The pages as they are now, for `Past`."""
        ...

    def attend_own(self, chunk: Chunk, q: Tensor, mask: Tensor | None, valid: Tensor | None, call: Call) -> Tensor:
        """Exact attention of a chunk over itself."""
        ...

    def attend_step(self, past: Past, q: Tensor, call: Call) -> Tensor:
        """Attention of the newest queries, whose tokens are in the window already."""
        ...

    def append_one(
        self,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        window: Window,
        before: Fill,
        after: Fill,
        queries: Tensor | None,
        slot: int | None,
    ) -> None:
        """Write one real token of every sequence into the window, and its queries into `slot` of those kept."""
        ...

    def begin_step(self, counts: Tensor, kept: Tensor | None, every: int, most: int) -> None:
        """Count a token more in every window, on the device; see `hfkv.kernels.append`."""
        ...

    def append_step(
        self,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        counts: Tensor,
        queries: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        """Write one token of every sequence where the counters say."""
        ...

    def still(self, past: Past, before: Any) -> Any:
        """What a replayed step reads of the pages: `before` with what they are now, if a recording of it stays right.

        It has `nbytes`, what it takes beside the layer, and `read`, every tensor that it leads a step to.
        """
        ...

    def attend_still(self, still: Any, past: Past, q: Tensor, call: Call) -> Tensor:
        """`attend_step` that asks nothing of the host: pages from `still`, and a fill that knows `counts` alone."""
        ...

    def attend_chunk(
        self, past: Past, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, observed: int
    ) -> tuple[Tensor, Tensor | None]:
        """A long chunk over the past and, causally, over itself."""
        ...

    def observe_chunk(
        self, sequences: Sequences, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None, count: int
    ) -> Tensor:
        """Scores of window and chunk tokens from a chunk's last queries."""
        ...

    def observe_stored(
        self, layers: list[LayerTokens], sequences: list[Sequences], stored: list[dict[str, Tensor]]
    ) -> Tensor:
        """Scores of the windows' tokens of layers from the kept queries; packed tokens get theirs in `stored`."""
        ...

    def stored(self, packed: PackedRows, selects: bool) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """What pages hold, per tier by slot: which slots are filled, `score` and `birth` where a policy selects."""
        ...

    def vectors(self, packed: PackedRows, side: str, tier: int, width: int) -> Tensor:
        """What is packed in a tier, dequantised; see `PackedRows.vectors`."""
        ...

    def checker(self, packed: PackedRows, incoming: Incoming) -> Callable[[list[Tensor]], Tensor] | None:
        """What looks at incoming tokens for `PackedRows.plan`; None: `code` does."""
        ...

    def code(self, packed: PackedRows, plan: Compaction, incoming: Incoming) -> Any:
        """The incoming tokens as `apply` wants them; raises where one cannot be coded, with nothing changed."""
        ...

    def apply(self, packed: PackedRows, plan: Compaction, coded: Any) -> None:
        """Do what was planned; the pool must have room for it."""
        ...

    def most_received(
        self,
        q: Tensor,
        k: Tensor,
        asking: Asking | None,
        first: Tensor | None,
        scaling: float,
        softcap: float | None,
        turn: Tensor | None,
    ) -> Tensor:
        """Replay: the most attention that each key of a prompt gets; see `hfkv.kernels.replay`."""
        ...

    def crush_distances(self, received: Tensor, exists: Tensor, anchor: Tensor | None) -> Tensor:
        """KVCrush: distance of every token's bits to the anchor; see `hfkv.kernels.kvcrush`."""
        ...

    def elect(self, among: Tensor, distance: Tensor, seats: Tensor, most: int) -> Tensor:
        """KVCrush: seats at evenly spaced ranks by distance; see `hfkv.kernels.kvcrush`."""
        ...


@dataclass(frozen=True)
class StillWork:
    """A layer's work list between two flushes; what it leads to stays in place as long as this is held."""

    work: WorkList

    nbytes = 0

    @property
    def read(self) -> list[Tensor]:
        """Every tensor that a step reads."""
        return self.work.read


class PlainKernels:
    """`Kernels` by the twins."""

    name = "torch"
    nbytes = 0
    defers = False

    view = staticmethod(PackedLayer.work)
    attend_own = staticmethod(attend_own)
    begin_step = staticmethod(begin_step)
    append_step = staticmethod(append_step)

    @staticmethod
    def append_one(
        k: Tensor,
        v: Tensor,
        q: Tensor,
        window: Window,
        before: Fill,
        after: Fill,
        queries: Tensor | None,
        slot: int | None,
    ) -> None:
        window.append(k, v, before, None)
        if queries is not None and slot is not None:
            queries[:, :, slot : slot + 1] = q

    attend_chunk = staticmethod(attend_chunk)
    observe_chunk = staticmethod(observe_chunk)
    observe_stored = staticmethod(observe_stored)
    code = staticmethod(PackedRows.code_incoming)
    apply = staticmethod(PackedRows.apply)
    most_received = staticmethod(most_received)
    crush_distances = staticmethod(kvcrush.crush_distances)
    elect = staticmethod(kvcrush.elect)

    @staticmethod
    def attend_step(past: Past, q: Tensor, call: Call) -> Tensor:
        return attend_step(past, q, call)

    @staticmethod
    def stored(packed: PackedRows, selects: bool) -> list[tuple[Tensor, dict[str, Tensor]]]:
        return [packed.slots(tier, ("score", "birth") if selects else ()) for tier in range(packed.tiers)]

    @staticmethod
    def vectors(packed: PackedRows, side: str, tier: int, width: int) -> Tensor:
        return packed.vectors(side, tier, width)

    @staticmethod
    def checker(packed: PackedRows, incoming: Incoming) -> None:
        return None

    @staticmethod
    def still(past: Past, before: StillWork | None) -> StillWork:
        """A flush makes another work list, of other shapes: a step must then be recorded anew."""
        return before if before is not None and before.work is past.work else StillWork(past.work)

    @staticmethod
    def attend_still(still: StillWork, past: Past, q: Tensor, call: Call) -> Tensor:
        return attend_step(Past(past.packed, still.work, past.window, past.fill), q, call)
