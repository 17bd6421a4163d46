"""`LayerTokens`: everything one layer holds of its tokens, and how new ones come in."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hfkv.attend import Call, Past
from hfkv.backends import kernels_for
from hfkv.config import LeanKVConfig
from hfkv.fill import Fill
from hfkv.handle import Chunk
from hfkv.kernels.quantize_pack import Basis
from hfkv.material import LayerMaterial, most_given
from hfkv.paging.packed import PackedLayer
from hfkv.paging.rows import PackedRows
from hfkv.paging.sharing import select_rows
from hfkv.paging.table import PageTable
from hfkv.policy import Costs, Policy, policy_of, score_of
from hfkv.quant import PageLayout, rotation
from hfkv.repeats import chosen, repeated
from hfkv.tiering import code_planned, incoming_tokens, plan_tiers
from hfkv.window import KeptQueries, Sequences, Window

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """What is made inside may be changed later by any caller: no autograd, and no inference tensors."""
    if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class Snapshot(NamedTuple):
    """What storing a chunk changes; pages are only appended to and are undone through `table` (None: untouched)."""

    fill: Fill
    window: Window
    queries: tuple[Tensor | None, list[int], int]
    call: Call | None
    mean: tuple[Tensor, Tensor | None]
    table: PageTable | None


class LayerTokens:
    """The tokens of one compressed layer: packed pages, the recent window, the kept queries.

    Args:
        cache: the cache, for what its layers share (pool, fills, page size).
        config: the layer's config.
        chunk: the first chunk, which fixes shapes, dtype and device.
    """

    def __init__(self, cache: LeanKVCache, config: LeanKVConfig, chunk: Chunk) -> None:
        batch, heads, tokens, key_dim = chunk.k.shape
        value_dim, dtype = chunk.v.shape[3], chunk.k.dtype
        self.bind(cache)
        self.config = config
        self.policy: Policy = policy_of(config)
        self.score = score_of(config.score or "attention")
        self.dtype, self.device = dtype, chunk.k.device
        pool = cache.pool(self.device)
        page_tokens = cache.page_tokens(tokens, len(config.tiers))
        layouts = [
            PageLayout.of(tier, (key_dim, value_dim), dtype, config.codec, page_tokens, config.selects)
            for tier in config.tiers
        ]
        basis, self.rotations = _basis(config, key_dim, value_dim, pool.device)
        self.sharers = cache.layers_on(self.device)  # stays: counting more idle pages later would only prune more
        self.packed = PackedLayer(pool, layouts, batch * heads, basis, bool(config.shift_keys))
        self.choose_kernels()
        self.window = Window.like(chunk.k, chunk.v, config.window + config.flush)
        self.queries = KeptQueries(config.flush)
        self.fill = cache.fills.empty(batch, self.device)
        self.call: Call | None = None
        self.whole = False  # a prompt was stored whole, until its reconstruction says what to prune
        self.reconstruction: Tensor | None = None  # [rows, stored slots and window], largest probability so far

    def bind(self, cache: LeanKVCache) -> None:
        """Belong to this cache, by a weak reference."""
        self._cache = weakref.ref(cache)

    def choose_kernels(self) -> None:
        """Run what the cache's device and `hfkv.compile_decode` ask for."""
        cache = self.cache
        self.kernels = kernels_for(self.device, self.packed.layouts, self.dtype, cache.workspaces, cache.compiled)

    @property
    def cache(self) -> LeanKVCache:
        cache = self._cache()
        assert cache is not None, "the cache is gone"
        return cache

    @property
    def unpaged_bytes(self) -> int:
        """Bytes outside the page pool: window, kept queries, tables."""
        return self.window.nbytes + self.queries.nbytes + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the page table, mean keys, and the lists of work made from them."""
        return self.packed.metadata_bytes + self.kernels.nbytes

    @property
    def costs(self) -> Costs:
        """What a policy with a budget has to add up, per sequence."""
        layouts = self.packed.layouts
        exact = (layouts[0].key.dim + layouts[0].value.dim) * self.dtype.itemsize
        pool = self.packed.pool
        chunk = pool.chunk_for(int((self.config.budget or 1.0) * exact * self.packed.rows * self.fill.seen))
        idle = max(chunk * len(layouts), pool.physical_bytes - pool.used_bytes)  # free pages of all layers
        ahead = self.packed.bytes_ahead(self.fill.seen)
        fixed = math.ceil((self.unpaged_bytes + ahead + idle / self.sharers) / self.fill.batch)
        return Costs(tuple(layout.token_bytes for layout in layouts), layouts[0].tokens, exact, fixed)

    @property
    def capacity_left(self) -> int:
        """Tokens that still fit into the fullest sequence's window."""
        return self.window.capacity - self.fill.most

    # ---- new tokens --------------------------------------------------------------------------------------------------

    def append(self, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call) -> None:
        """Put a chunk into the window, which has room for it, and keep some of its queries."""
        before, after = self.fill, self.cache.fills.advanced(self.fill, chunk.k.shape[2], valid)
        self.fill, self.call = after, call
        if valid is None and chunk.k.shape[2] == q.shape[2] == 1:
            slot = self.queries.slot_for(q, after.seen) if self.config.selects else None
            kept = None if slot is None else self.queries.q
            self.kernels.append_one(chunk.k, chunk.v, q, self.window, before, after, kept, slot)
            return
        self.window.append(chunk.k, chunk.v, before, valid)
        if self.config.selects:
            self.queries.add(q, after.seen)

    def store(self, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None) -> None:
        """Take a chunk over: into the window if it fits, else pack what each sequence has beyond it.

        Packed tokens of the past stay as they are: what is packed is appended to their pages. Sequences of a first
        chunk that repeat one another share them.

        Args:
            q: the chunk's queries [batch, q_heads, queries, D], which decide its tokens' significance.
            lse: their log-sum-exp over all keys [rows, groups, queries]; None where the chunk is all there is.

        Raises:
            OutOfPages: `max_bytes` does not hold it.
            ValueError: NaN, infinity, or a scale beyond its format.
        """
        after = self.cache.fills.advanced(self.fill, chunk.k.shape[2], valid)
        if after.most <= self.window.capacity:
            self.append(chunk, q, valid, call)
            return
        self.call = call
        sequences = self.window.followed_by(chunk.k, chunk.v, self.fill, after, valid)
        leaving = (after.counts - self.config.window).clamp_min(0)
        once = repeated(sequences) if lse is None else None
        if once is None:
            self._pack(self.packed, sequences, leaving, q, valid, lse)
        else:
            distinct, which = once
            rows = self.packed.empty(distinct.numel() * self.window.heads)
            real = None if valid is None else valid[distinct]
            self._pack(rows, chosen(sequences, distinct), leaving[distinct], q[distinct], real, None)
            select_rows(rows, self.rows_of(which))
            rows.hand_back([self.packed])
        self.fill = self.cache.fills.left(after, leaving, self.config.window)
        self.window = self.window.keep_last(sequences, leaving, self.fill)
        self.queries.clear()
        self.whole = self.config.reconstructs
        if lse is not None and self.config.selects:
            self.queries.add_tail(q, after.seen)
            self.cache.request_flush()

    def _pack(
        self,
        packed: PackedRows,
        sequences: Sequences,
        leaving: Tensor,
        q: Tensor,
        valid: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        """Append the first `leaving` int64 [batch] tokens of the sequences to the pages of their rows."""
        score, call = None, self.call
        assert call is not None
        if self.config.selects and self.score is None:
            score = self.kernels.observe_chunk(sequences, q, valid, call, lse, self.config.observe)
        incoming = incoming_tokens([sequences], leaving, self.config.window, score)
        stored = self.kernels.stored(packed, self.config.selects)
        widths = [filled.shape[1] for filled, _ in stored]
        material = LayerMaterial(self, packed, sequences, widths, incoming.valid.shape[1], call, q, valid)
        plan = plan_tiers([self], packed, incoming, stored, sequences.fill, [material], rescored=False)
        packed.count(plan, plan.numbers.tolist())
        coded = code_planned(self, packed, plan, incoming)
        self.cache.reserve(packed.pool, [(packed, plan)])
        self.kernels.apply(packed, plan, coded)

    def observe_reconstruction(self, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None) -> None:
        """Note the most that queries of a repeated prompt give to what is held; they are not stored.

        Args: as of `store`.
        """
        if not self.config.reconstructs:
            return
        assert lse is not None
        seen = most_given(self, q, valid, call, lse)
        self.reconstruction = seen if self.reconstruction is None else torch.maximum(self.reconstruction, seen)

    def past(self) -> Past:
        """What is held now, readable also after a chunk has been stored."""
        return Past(self.packed, self.kernels.view(self.packed), self.window, self.fill)

    def follow(self, mask: Tensor, new: int, valid: Tensor | None) -> bool:
        """Whether a padding mask [batch, 1, 1, tokens] shows just what is held and the valid of `new` tokens.

        Tokens of the window that it hides by now are dropped for that: what generate appends to a sequence that has
        ended becomes padding in the next turn.
        """
        fills = self.cache.fills
        if fills.agrees(mask, self.fill, new, valid):
            return True
        fill, slots = fills.shown(self.fill, mask)
        if not fills.agrees(mask, fill, new, valid):
            return False
        self.window, self.fill = self.window.keep(slots), fill
        return True

    # ---- fewer tokens ------------------------------------------------------------------------------------------------

    def crop(self, remove: int) -> None:
        """Drop the newest `remove` logical tokens, all of them in the window."""
        self.fill = self.cache.fills.cropped(self.fill, remove)
        self.queries.crop(self.fill.seen, remove)

    def select(self, index: Tensor) -> None:
        """Make what is exact of sequence i a copy of today's sequence `index[i]`; the cache shares the pages."""
        self.window = self.window.select(index)
        self.queries.select(index)
        self.fill = self.cache.fills.selected(self.fill, index)

    def rows_of(self, index: Tensor) -> Tensor:
        """Sequence indices [n] -> rows [n * kv_heads]."""
        heads = self.window.heads
        return (index[:, None] * heads + torch.arange(heads, device=index.device)).flatten()

    def release(self) -> None:
        """Give all pages back."""
        self.packed.release()

    def snapshot(self, packs: bool) -> Snapshot:
        """As things are; without `packs` the coming chunk goes to the window alone."""
        table = self.packed.table.clone() if packs else None
        mean = self.packed.has_mean, self.packed.basis.mean
        return Snapshot(self.fill, self.window, self.queries.state, self.call, mean, table)

    def restore(self, state: Snapshot) -> None:
        """Undo the chunk that was stored since `snapshot`."""
        if state.table is not None:
            self.packed.restore(state.table)
            self.packed.has_mean, self.packed.basis.mean = state.mean
        self.fill, self.window, self.queries.state, self.call = state.fill, state.window, state.queries, state.call


def _basis(config: LeanKVConfig, key_dim: int, value_dim: int, device: torch.device) -> tuple[Basis, str]:
    names, key, value = [], None, None
    if config.rotate_keys:
        key, name = rotation(key_dim, config.rotation_seed, device)
        names.append(f"keys {name}")
    if config.rotate_values:
        value, name = rotation(value_dim, config.rotation_seed, device)
        names.append(f"values {name}")
    if config.shift_keys:
        names.append("keys shifted by their mean")
    return Basis(key, value, None), ", ".join(names) or "none"
