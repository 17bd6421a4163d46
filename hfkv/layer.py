"""`LeanKVLayer`: one decoder layer's cache, from the first chunk to packed pages and a recent window."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hfkv.config import LeanKVConfig
from hfkv.handle import Chunk, KVHandle
from hfkv.kernels.decode_attention import WorkList, attend_pages, attention_received
from hfkv.kernels.observe import received_exact
from hfkv.kernels.partial import Partial, attend_exact, merge, normalise
from hfkv.kernels.prompt_attention import prompt_attention
from hfkv.kernels.quantize_pack import Basis, Tokens
from hfkv.paging.packed import Compaction, Incoming, PackedLayer
from hfkv.policy import Candidates, Costs, only_down, policy_of
from hfkv.quant import EMPTY, HIGH, LOW, NEW, Codec, PageLayout, rotation
from hfkv.window import Fill, Sequence, Window

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache

KEPT_QUERIES = 8
SCORE_HORIZON = 4096
QUERY_BLOCK = 256


@dataclass(frozen=True)
class Call:
    """What one call of the attention function brings beside tensors."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None  # [q_heads]


@dataclass
class Past:
    """What a layer held before a long chunk was stored; it stays readable, since storing only appends."""

    work: WorkList
    window: Window
    fill: Fill


class LeanKVLayer(DynamicLayer):
    """The compressed cache of one full-attention layer.

    It starts undecided: `update` hands out the exact chunk, and the attention function's first call either lets the
    layer compress (`open`) or has the cache swap in one of transformers' own layers.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: LeanKVCache, index: int, config: LeanKVConfig) -> None:
        super().__init__()
        self.cache, self.index, self.config = cache, index, config
        self.policy = policy_of(config)
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.generation = 0
        self.seen = 0
        self.packed: PackedLayer | None = None
        self.window: Window | None = None
        self.fill: Fill | None = None
        self.queries: Tensor | None = None  # [batch, q_heads, KEPT_QUERIES, D]
        self.query_positions: list[int] = []
        self.unobserved = 0
        self.call: Call | None = None
        self.pending: Chunk | None = None
        self.rotations = "none"

    @property
    def open(self) -> bool:
        """Whether the layer compresses, that is: has stored its first chunk."""
        return self.packed is not None

    # ---- transformers' face ----------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce new keys and values [batch, kv_heads, q, dim]; they are stored when attention comes for the handles."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
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
        if self.packed is not None:
            self.packed.release()
        generation = self.generation
        self._clear()
        self.generation = generation + 1

    @property
    def unpaged_bytes(self) -> int:
        """Bytes of this layer outside the page pool: window, kept queries, page table, mean keys."""
        if self.packed is None or self.window is None:
            return 0
        queries = 0 if self.queries is None else self.queries.nbytes
        return self.window.nbytes + queries + self.packed.metadata_bytes

    def check_crop(self, remove: int) -> None:
        """Raise where removing the newest `remove` logical tokens would reach packed ones."""
        packed = self.seen - (self.fill.most if self.fill is not None else 0)
        if self.fill is not None and remove > self.fill.most and packed > 0:
            raise ValueError(
                f"crop of {remove} tokens reaches packed ones: layer {self.index} holds the newest {self.fill.most} of {self.seen} exact; "
                "nothing was changed; use a larger LeanKVConfig.window, or copy.deepcopy the cache before the tokens"
            )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        remove = -int(tokens_to_remove)
        if remove <= 0 or self.fill is None:
            return
        self.check_crop(remove)
        self.seen = max(0, self.seen - remove)
        self.fill = self.cache.cropped(self.fill, remove)
        self.query_positions = [p for p in self.query_positions if p < self.seen]
        self.unobserved = max(0, self.unobserved - remove)
        self.generation += 1

    def select(self, index: Tensor) -> None:
        """Make sequence i a copy of today's sequence `index[i]`."""
        assert self.packed is not None and self.window is not None and self.fill is not None
        heads = self.window.k.shape[1]
        self.packed.select((index[:, None] * heads + torch.arange(heads, device=index.device)).flatten())
        window = Window.__new__(Window)
        window.k, window.v = self.window.k[index], self.window.v[index]
        self.window = window
        self.queries = None if self.queries is None else self.queries[index]
        self.fill = self.cache.selected(self.fill, index)
        self.generation += 1

    def offload(self) -> None:
        raise ValueError("LeanKVCache cannot be offloaded layer by layer: its pages are shared; use LeanKVConfig(max_bytes=...) or a stronger preset")

    prefetch = offload

    def _check(self, k: Tensor, v: Tensor) -> None:
        if self.window is None:
            return
        for name, new, own in (("keys", k, self.window.k), ("values", v, self.window.v)):
            if new.shape[0] != own.shape[0]:
                raise ValueError(
                    f"LeanKVCache holds {own.shape[0]} sequences, but layer {self.index} got {name} of {new.shape[0]}: "
                    "use a fresh cache, or batch_select_indices / batch_repeat_interleave"
                )
            if new.shape[1] != own.shape[1] or new.shape[3] != own.shape[3]:
                raise ValueError(
                    f"layer {self.index} holds {name} of {own.shape[1]} heads x {own.shape[3]}, got {new.shape[1]} x {new.shape[3]}: "
                    "this cache belongs to another model, use a fresh one"
                )
            if new.dtype != own.dtype or new.device != own.device:
                raise ValueError(
                    f"layer {self.index} holds {name} in {own.dtype} on {own.device}, got {new.dtype} on {new.device}: "
                    "use a fresh cache for a model of another dtype or device"
                )

    def materialise(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Plain tensors for an operation outside the attention function: only the first chunk can be had so."""
        if self.open:
            raise ValueError(
                f"layer {self.index} holds packed tokens, but the model asks for plain keys and values: "
                'set attn_implementation="leankv" again (model.set_attn_implementation), or use a fresh cache'
            )
        if self.pending is chunk:
            self.cache.keep_plain(self, DynamicLayer(), "its attention does not go through attn_implementation='leankv'")
        return chunk.k, chunk.v

    # ---- attention -------------------------------------------------------------------------------------------------

    def attend(self, chunk: Chunk, q: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """Attention of q [batch, q_heads, queries, D] over everything up to the chunk -> [batch, queries, q_heads, Dv].

        `mask` is what the mask function gave: None, the padding as bool [batch, 1, 1, tokens], or a 4-D mask.
        """
        if chunk.generation != self.generation:
            raise RuntimeError(f"layer {self.index}: keys and values of an earlier step were read after a flush, crop, reorder or reset")
        past = self._has_past(chunk)
        if past and torch.is_grad_enabled() and (q.requires_grad or chunk.k.requires_grad):
            raise ValueError("no gradient flows through a packed past: call the model under torch.no_grad() or torch.inference_mode()")
        if not past:
            out = self._attend_first(chunk, q, mask, call)
        else:
            with torch.no_grad():
                out = self._attend_past(chunk, q, mask, call)
        return out.transpose(1, 2).contiguous()

    def _has_past(self, chunk: Chunk) -> bool:
        return chunk.past is not None or (self.open and (not chunk.stored or self.seen > chunk.k.shape[2]))

    def _attend_first(self, chunk: Chunk, q: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        valid = self.cache.valid_tokens(mask, chunk.k.shape[2])
        out = self._attend_own(chunk, q, mask, valid, call)
        if not chunk.stored:
            with torch.no_grad():
                self._open(chunk)
                self._store(chunk, q, valid, call, None)
        return out

    def _attend_own(self, chunk: Chunk, q: Tensor, mask: Tensor | None, valid: Tensor | None, call: Call) -> Tensor:
        """Exact attention of a first chunk: rows with padding one by one, without their pads."""
        if _is_4d(mask):
            return prompt_attention(q, chunk.k, chunk.v, mask, False, *_terms(call))
        if valid is None:
            return prompt_attention(q, chunk.k, chunk.v, None, True, *_terms(call))
        out = q.new_zeros(*q.shape[:3], chunk.v.shape[3])
        for b in range(q.shape[0]):
            tokens = valid[b].nonzero().squeeze(1)
            if tokens.numel() == 0:
                continue
            own = tokens[tokens >= chunk.k.shape[2] - q.shape[2]] - (chunk.k.shape[2] - q.shape[2])
            k, v = chunk.k[b : b + 1, :, tokens], chunk.v[b : b + 1, :, tokens]
            out[b : b + 1, :, own] = prompt_attention(q[b : b + 1, :, own], k, v, None, True, *_terms(call))
        return out

    def _attend_past(self, chunk: Chunk, q: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        if _is_4d(mask):
            raise ValueError(
                f"a custom 4-D attention mask {tuple(mask.shape)} over a compressed past: packed tokens have no order; "
                "pass the 2-D padding mask, or give the mask with the first chunk"
            )
        assert self.window is not None and self.fill is not None and self.packed is not None
        if chunk.past is None and not chunk.stored:
            valid = self.cache.valid_tokens(mask, chunk.k.shape[2])
            if chunk.k.shape[2] <= self.config.flush and self.fill.most + chunk.k.shape[2] <= self.window.capacity:
                self._append(chunk, q, valid, call)
            else:
                past = Past(self.packed.work(), self.window, self.fill)
                out, lse = self._attend_chunk(past, chunk, q, valid, call)
                self._store(chunk, q, valid, call, lse)
                chunk.past = past
                return out
        if chunk.past is not None:
            return self._attend_chunk(chunk.past, chunk, q, self.cache.valid_tokens(mask, chunk.k.shape[2]), call)[0]
        rows = self._rows(q, call)  # [rows, groups * queries, D]
        part = merge(
            [self._over_window(self.window, self.fill, rows, q.shape[2], call), *self._over_pages(self.packed.work(), rows, call)], self._sinks(q, call)
        )
        return normalise(part).view(*q.shape[:3], -1).to(q.dtype)

    def _over_pages(self, work: WorkList, rows: Tensor, call: Call) -> list[Partial]:
        """Attention of rotated queries over packed pages, back in the plain basis; empty where there are none."""
        assert self.packed is not None
        if not work.blocks:
            return []
        basis = self.packed.basis
        rotated = basis.rotate_keys(rows)
        part = attend_pages(work, rotated, basis.constant(rotated), call.softcap)
        return [Partial(basis.unrotate_values(part.acc), part.top, part.mass)]

    def _over_window(self, window: Window, fill: Fill, rows: Tensor, queries: int, call: Call, own: bool = True) -> Partial:
        """Attention over the exact window; with `own` the queries are its last tokens, else all of it lies before them."""
        k = window.k[:, :, : fill.most].flatten(0, 1).float()
        v = window.v[:, :, : fill.most].flatten(0, 1).float()
        bias = fill.bias(queries) if own else fill.bias(1)
        return attend_exact(rows, k, v, self._spread(bias, rows.shape[1] // queries, queries), call.softcap)

    def _spread(self, bias: Tensor | None, groups: int, queries: int) -> Tensor | None:
        """[batch or 1, queries or 1, tokens] -> [rows or 1, groups * queries or 1, tokens]."""
        if bias is None:
            return None
        if bias.shape[1] > 1:
            bias = bias.repeat(1, groups, 1)
        assert self.window is not None
        return bias if bias.shape[0] == 1 else bias.repeat_interleave(self.window.k.shape[1], 0)

    def _attend_chunk(self, past: Past, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """A long chunk over the past and over itself, by blocks of queries -> (output, lse [rows, groups, queries])."""
        k, v = chunk.k.flatten(0, 1).float(), chunk.v.flatten(0, 1).float()
        tokens, skipped = k.shape[1], chunk.k.shape[2] - q.shape[2]
        hidden = None if valid is None else torch.zeros(valid.shape, device=q.device).masked_fill_(~valid, float("-inf"))[:, None]
        outs, lses = [], []
        for first in range(0, q.shape[2], QUERY_BLOCK):
            block = q[:, :, first : first + QUERY_BLOCK]
            count, end = block.shape[2], min(tokens, skipped + first + block.shape[2])
            rows = self._rows(block, call)
            future = torch.arange(end, device=q.device) > torch.arange(end - count, end, device=q.device)[:, None]
            bias = torch.zeros(1, count, end, device=q.device).masked_fill_(future, float("-inf"))
            if hidden is not None:
                bias = bias + hidden[..., :end]
            own = attend_exact(rows, k[:, :end], v[:, :end], self._spread(bias, rows.shape[1] // count, count), call.softcap)
            parts = [own, *self._over_pages(past.work, rows, call)]
            if past.fill.most:
                parts.append(self._over_window(past.window, past.fill, rows, count, call, own=False))
            part = merge(parts, self._sinks(block, call))
            outs.append(normalise(part).view(*block.shape[:3], -1))
            lses.append(part.lse.view(rows.shape[0], -1, count))
        return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)

    def _rows(self, q: Tensor, call: Call) -> Tensor:
        """[batch, q_heads, queries, D] -> float32 [batch * kv_heads, groups * queries, D], scaled."""
        assert self.window is not None
        batch, heads, queries, dim = q.shape
        kv_heads = self.window.k.shape[1]
        return (q.float() * call.scaling).reshape(batch * kv_heads, heads // kv_heads * queries, dim)

    def _sinks(self, q: Tensor, call: Call) -> Tensor | None:
        """[q_heads] -> [rows, groups * queries]."""
        if call.sinks is None:
            return None
        assert self.window is not None
        return call.sinks.float()[None, :, None].expand(*q.shape[:3]).reshape(q.shape[0] * self.window.k.shape[1], -1)

    # ---- storing ---------------------------------------------------------------------------------------------------

    def _open(self, chunk: Chunk) -> None:
        """Make the layer's state for the shapes of its first chunk."""
        batch, heads, _, key_dim = chunk.k.shape
        value_dim, config, dtype = chunk.v.shape[3], self.config, chunk.k.dtype
        pool = self.cache.pool(chunk.k.device)
        page_tokens = self.cache.page_tokens(chunk.k.shape[2], len(config.tiers))
        layouts = [
            PageLayout(
                Codec.of(tier, "key", key_dim, dtype, config.codec),
                Codec.of(tier, "value", value_dim, dtype, config.codec),
                page_tokens,
                config.selects,
            )
            for tier in config.tiers
        ]
        names = []
        key = value = None
        if config.rotate_keys:
            key, name = rotation(key_dim, config.rotation_seed, pool.device)
            names.append(f"keys {name}")
        if config.rotate_values:
            value, name = rotation(value_dim, config.rotation_seed, pool.device)
            names.append(f"values {name}")
        self.rotations = ", ".join(names) or "none"
        self.packed = PackedLayer(pool, layouts, batch * heads, Basis(key, value, None), config.shift_keys)
        self.window = Window(chunk.k, chunk.v, config.window + config.flush)
        self.fill = self.cache.empty_fill(batch, pool.device)

    def _append(self, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call) -> None:
        """Put a short chunk into the window and keep some of its queries."""
        assert self.window is not None and self.fill is not None
        after = self.cache.advanced(self.fill, chunk.k.shape[2], valid)
        self.window.append(chunk.k, chunk.v, self.fill, after, valid)
        self.fill, chunk.stored, self.pending, self.call = after, True, None, call
        if self.config.selects:
            self._keep_queries(q, chunk.k.shape[2])

    def _keep_queries(self, q: Tensor, new: int) -> None:
        """Keep every (flush / 8)-th query since the last flush, at most 8, for observing."""
        every = max(1, self.config.flush // KEPT_QUERIES)
        if self.queries is None:
            self.queries = q.new_zeros(q.shape[0], q.shape[1], min(KEPT_QUERIES, self.config.flush), q.shape[3])
        for i in range(q.shape[2]):
            if (self.unobserved + i) % every == 0 and len(self.query_positions) < self.queries.shape[2]:
                self.queries[:, :, len(self.query_positions)] = q[:, :, i]
                self.query_positions.append(self.seen - q.shape[2] + i)
        self.unobserved += new

    def _store(self, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None) -> None:
        """Take a chunk over: into the window if it fits, else pack what each sequence has beyond it."""
        assert self.window is not None and self.fill is not None and self.packed is not None
        after = self.cache.advanced(self.fill, chunk.k.shape[2], valid)
        if after.most <= self.window.capacity:
            self._append(chunk, q, valid, call)
            return
        sequence = self.window.followed_by(chunk.k, chunk.v, self.fill, after, valid)
        leaving = (after.counts - self.config.window).clamp_min(0)
        score = self._observe_chunk(sequence, q, valid, call, lse) if self.config.selects else None
        incoming = self._incoming(sequence, leaving, score)
        plan = self._plan(incoming, None, after)
        coded = self.packed.code_incoming(plan, incoming)
        self.cache.reserve(self.packed.pool, [(self.packed, plan)])
        self.packed.apply(plan, coded)
        remaining = self.cache.left(after, leaving, self.config.window)
        self.window = self.window.keep_last(sequence, leaving, remaining)
        self.fill, chunk.stored, self.pending, self.call = remaining, True, None, call
        self.query_positions, self.unobserved = [], 0
        if lse is not None and self.config.selects:
            self._keep_tail(q)
            self.cache.request_flush()

    def _keep_tail(self, q: Tensor) -> None:
        """Keep the last queries of a continued prompt: they observe the past at the next flush."""
        every = max(1, self.config.flush // KEPT_QUERIES)
        picked = list(range(q.shape[2] - 1, -1, -every))[: min(KEPT_QUERIES, self.config.flush)][::-1]
        if self.queries is None:
            self.queries = q.new_zeros(q.shape[0], q.shape[1], min(KEPT_QUERIES, self.config.flush), q.shape[3])
        self.queries[:, :, : len(picked)] = q[:, :, picked]
        self.query_positions = [self.seen - q.shape[2] + i for i in picked]
        self.unobserved = min(q.shape[2], self.config.flush)

    def _observe_chunk(self, sequence: Sequence, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor | None) -> Tensor:
        """Scores [rows, n] of a chunk's tokens from its last queries; 1 is uniform attention."""
        fill, heads = sequence.fill, sequence.k.shape[1]
        groups, count = q.shape[1] // heads, min(self.config.observe, q.shape[2])
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if valid is None else valid[:, -q.shape[2] :]
        order = real.long().argsort(dim=1, descending=True, stable=True)  # real queries first
        own = real.sum(1)
        pick = own[:, None] - count + torch.arange(count, device=q.device)  # [batch, count], negative: too few
        index = order.gather(1, pick.clamp_min(0))
        rows = self._rows(q.take_along_dim(index[:, None, :, None], 2), call)
        slot = fill.counts[:, None] - own[:, None] + pick  # the query's own slot in the sequence
        tokens = torch.arange(sequence.k.shape[2], device=q.device)
        visible = (tokens <= slot[..., None]) & (pick >= 0)[..., None] & (tokens < fill.counts[:, None, None])
        visible = visible.repeat_interleave(heads, 0)
        total = None
        if lse is not None:
            wide = index.repeat_interleave(heads, 0)[:, None].expand(-1, groups, -1)
            total = lse.gather(2, wide).flatten(1)
        sinks = self._sinks(q[:, :, :count], call)
        received = received_exact(rows, sequence.k.flatten(0, 1), visible, groups, call.softcap, sinks, total)
        return self._scored(received, visible, fill.lengths)

    def _scored(self, received: Tensor, visible: Tensor, lengths: Tensor) -> Tensor:
        """N times the probability; a token that no query has seen counts as average."""
        assert self.window is not None
        score = received * lengths.repeat_interleave(self.window.k.shape[1], 0)[:, None]
        return torch.where(visible.any(1), score, 1.0)

    def _incoming(self, sequence: Sequence, leaving: Tensor, score: Tensor | None) -> Incoming:
        """The first `leaving` tokens of every sequence, by rows."""
        heads = sequence.k.shape[1]
        most = max(0, sequence.fill.most - self.config.window)
        valid = (torch.arange(most, device=leaving.device) < leaving[:, None]).repeat_interleave(heads, 0)
        k, v = sequence.k[:, :, :most].flatten(0, 1), sequence.v[:, :, :most].flatten(0, 1)
        birth = sequence.fill.token_positions[:, :most].repeat_interleave(heads, 0)
        score = torch.ones(valid.shape, device=valid.device) if score is None else score[:, :most]
        return Incoming(k, v, score, birth, valid)

    def _plan(self, incoming: Incoming, scores: list[Tensor] | None, after: Fill) -> Compaction:
        """Ask the policy; `scores` of stored tokens None means: they stay as they are (only appending)."""
        assert self.packed is not None and self.window is not None
        names = ("score", "birth") if self.config.selects else ()
        stored = [self.packed.slots(tier, names) for tier in range(self.packed.tiers)]
        new = torch.where(incoming.valid, NEW, EMPTY)
        current = torch.cat([torch.where(filled, (HIGH, LOW)[t], EMPTY) for t, (filled, _) in enumerate(stored)] + [new], 1)
        own = scores if scores is not None else [parts["score"].float() if names else filled.float() for filled, parts in stored]
        if not self.config.selects:
            return self.packed.plan(torch.where(current == EMPTY, EMPTY, HIGH), current, own)
        batch, heads = after.counts.numel(), self.window.k.shape[1]
        shape = (batch, heads, current.shape[1])
        candidates = Candidates(
            score=torch.cat([*own, incoming.score], 1).view(shape),
            birth=torch.cat([*(parts["birth"].long() for _, parts in stored), incoming.birth], 1).view(shape),
            tier=current.view(shape),
            seen=(after.lengths - self.config.window).clamp_min(0),
            length=after.lengths,
            tiers=self.packed.tiers,
            costs=self._costs(batch),
        )
        target = only_down(candidates, self.policy(candidates)).view(current.shape)
        if scores is None:
            target = torch.where(current == NEW, target, current)
        return self.packed.plan(target, current, own)

    def _costs(self, batch: int) -> Costs:
        assert self.packed is not None and self.window is not None
        layouts = self.packed.layouts
        exact = (layouts[0].key.dim + layouts[0].value.dim) * self.window.k.element_size()
        return Costs(tuple(lay.token_bytes for lay in layouts), layouts[0].tokens, exact, math.ceil(self.cache.fixed_bytes(self) / batch))

    # ---- flush -----------------------------------------------------------------------------------------------------

    def plan_flush(self) -> tuple[Compaction, list[Tokens], Sequence, Tensor]:
        """Decide what a flush does to this layer, changing nothing."""
        assert self.window is not None and self.fill is not None and self.packed is not None
        fill = self.fill
        leaving = (fill.counts - self.config.window).clamp_min(0)
        sequence = Sequence(self.window.k[:, :, : fill.most], self.window.v[:, :, : fill.most], fill)
        scores, score = self._observe_all(sequence) if self.config.selects else (None, None)
        incoming = self._incoming(sequence, leaving, score)
        plan = self._plan(incoming, scores, fill)
        return plan, self.packed.code_incoming(plan, incoming), sequence, leaving

    def apply_flush(self, plan: Compaction, coded: list[Tokens], sequence: Sequence, leaving: Tensor) -> None:
        """Do what `plan_flush` decided; the pool has room for it."""
        assert self.window is not None and self.packed is not None
        self.packed.apply(plan, coded)
        remaining = self.cache.left(sequence.fill, leaving, self.config.window)
        self.window = self.window.keep_last(sequence, leaving, remaining)
        self.fill = remaining
        self.query_positions, self.unobserved = [], 0
        self.generation += 1

    def _observe_all(self, sequence: Sequence) -> tuple[list[Tensor], Tensor]:
        """New scores of stored tokens, per tier [rows, slots], and of the window's tokens [rows, n]."""
        assert self.packed is not None and self.call is not None
        stored = [self.packed.slots(tier, ("score", "birth")) for tier in range(self.packed.tiers)]
        old = [parts["score"].float() for _, parts in stored]
        fill, heads = sequence.fill, sequence.k.shape[1]
        if self.queries is None or not self.query_positions:
            return old, torch.ones(sequence.k.shape[0] * heads, sequence.k.shape[2], device=sequence.k.device)
        q = self.queries[:, :, : len(self.query_positions)]
        rows, groups, call = self._rows(q, self.call), q.shape[1] // heads, self.call
        at = torch.tensor(self.query_positions, device=q.device)
        position = fill.token_positions  # [batch, n]
        visible = (position[:, None] <= at[:, None]) & (position >= 0)[:, None]  # [batch, queries, n]
        visible = visible.repeat_interleave(heads, 0)
        keys = sequence.k.flatten(0, 1).float()
        bias = torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, float("-inf")).repeat(1, groups, 1)
        work, basis = self.packed.work(), self.packed.basis
        rotated = basis.rotate_keys(rows)
        constant = basis.constant(rotated)
        parts = [attend_exact(rows, keys, keys[..., :0], bias, call.softcap), attend_pages(work, rotated, constant, call.softcap, values=False)]
        lse = merge(parts, self._sinks(q, call)).lse
        lengths = fill.lengths
        score = self._scored(received_exact(rows, keys, visible, groups, call.softcap, None, lse), visible, lengths)
        received = self.packed.per_slot(attention_received(work, rotated, constant, call.softcap, lse, groups))
        return [self._aged(*each, lengths) for each in zip(old, received, (parts["birth"] for _, parts in stored), strict=True)], score

    def _aged(self, old: Tensor, received: Tensor, birth: Tensor, lengths: Tensor) -> Tensor:
        """Average a block of queries into scores, weighted by the tokens it stands for."""
        assert self.window is not None
        observed = received * lengths.repeat_interleave(self.window.k.shape[1], 0)[:, None]
        age = (self.seen - birth).clamp(min=max(self.unobserved, 1), max=max(SCORE_HORIZON, self.unobserved))
        return old + (observed - old) * (self.unobserved / age)

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything that storing a chunk changes; pages are only appended to and are undone by `restore`."""
        state = {name: getattr(self, name) for name in ("fill", "window", "seen", "unobserved", "call")}
        state["query_positions"] = list(self.query_positions)
        state["queries"] = None if self.queries is None else self.queries.clone()
        state["table"] = None if self.packed is None else self.packed.table.clone()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Undo the chunk stored since `snapshot`."""
        if state["table"] is None:
            self.reset()
            return
        assert self.packed is not None
        self.packed.restore(state["table"])
        for name, value in state.items():
            if name != "table":
                setattr(self, name, copy.copy(value) if name == "query_positions" else value)
        self.pending = None


def _is_4d(mask: Tensor | None) -> bool:
    """Whether a mask says more than which tokens are padding."""
    return mask is not None and (mask.shape[-2] > 1 or mask.dtype != torch.bool or mask.shape[1] > 1)


def _terms(call: Call) -> tuple[float, float | None, Tensor | None]:
    return call.scaling, call.softcap, call.sinks
