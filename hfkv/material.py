"""What one layer lets scores and policies read: keys, values and attention of its candidates, made when asked for."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfkv.attend import Call, head_rows, sink_rows
from hfkv.backends.plain import Kernels
from hfkv.fill import newest_last
from hfkv.kernels.at_once import logits_at_once
from hfkv.kernels.decode_attention import cap
from hfkv.kernels.replay import AHEAD, SINKS, Asking
from hfkv.observe import kept_queries, newest_queries
from hfkv.paging.rows import PackedRows
from hfkv.window import Sequences

if TYPE_CHECKING:
    from hfkv.tokens import LayerTokens

LAST = torch.iinfo(torch.int64).max
"""In the place of a position: of a slot that holds no token."""

FUTURE = 512
"""Positions behind the prompt over which expected attention averages, as kvpress does."""


@dataclass(frozen=True)
class Queries:
    """Queries of every sequence and what they may look at.

    Attributes:
        q: [batch, q_heads, n, D].
        last: int64 [batch, n], slot in the exact tokens up to which each looks; -1 for a query that is not there.
    """

    q: Tensor
    last: Tensor


class LayerMaterial:
    """`hfkv.policy.Material` of one layer.

    Args:
        tokens: the layer.
        packed: its packed rows; at a first prompt those of the sequences that differ.
        sequences: its exact tokens, those of the window and new ones.
        widths: stored slots per tier among the candidates.
        new: exact tokens of the longest sequence that are candidates, the first ones.
        call: of the attention function; None: nothing has been asked yet.
        q, valid: queries [batch, q_heads, queries, D] of the chunk that is being stored, and which of its tokens are
            real, bool [batch, tokens] or None for all; q is None at a flush, where the kept queries observe.
        observed: float32 [rows, n], what they have seen of the exact tokens already.
    """

    def __init__(
        self,
        tokens: LayerTokens,
        packed: PackedRows,
        sequences: Sequences,
        widths: list[int],
        new: int,
        call: Call | None,
        q: Tensor | None = None,
        valid: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> None:
        self._observed = observed
        self._tokens, self._packed, self._sequences, self._widths = tokens, packed, sequences, widths
        self._new, self._call, self._q, self._valid = new, call, q, valid

    @functools.cached_property
    def _prompt(self) -> Queries | None:
        """All queries of the chunk that is being stored; None at a flush."""
        return None if self._q is None else prompt_queries(self._sequences, self._q, self._valid)

    @functools.cached_property
    def _observers(self) -> Queries | None:
        """The chunk's last queries, or those kept of the last steps; None where there are none."""
        if self._q is not None:
            count = self._tokens.config.observe
            return Queries(*newest_queries(self._sequences, self._q, self._valid, None, count)[:2])
        kept = kept_queries(self._tokens, self._sequences)
        return None if kept is None else Queries(*kept)

    @property
    def kernels(self) -> Kernels:
        return self._tokens.kernels

    # ---- vectors -----------------------------------------------------------------------------------------------------

    def keys(self) -> Tensor:
        return self._joined("key", self._sequences.k)

    def values(self) -> Tensor:
        return self._joined("value", self._sequences.v)

    def _joined(self, side: str, exact: Tensor) -> Tensor:
        fresh = exact[:, :, : self._new].float() * self._leaving[:, None, :, None]
        if not sum(self._widths):
            return fresh
        stored = self._stored_keys if side == "key" else self._stored(side)
        return torch.cat([stored.unflatten(0, (-1, exact.shape[1])), fresh], 2)

    @property
    def _leaving(self) -> Tensor:
        """bool [batch, new]: which of the first exact tokens are candidates."""
        fill = self._sequences.fill
        leaving = (fill.counts - self._tokens.config.window).clamp_min(0)
        return torch.arange(self._new, device=leaving.device) < leaving[:, None]

    @functools.cached_property
    def _stored_keys(self) -> Tensor:
        return self._stored("key")

    def _stored(self, side: str) -> Tensor:
        """Dequantised keys (`side="key"`) or values of the stored slots, [rows, slots, dim]."""
        parts = [self.kernels.vectors(self._packed, side, tier, width) for tier, width in enumerate(self._widths)]
        return torch.cat(parts, 1)

    # ---- attention ---------------------------------------------------------------------------------------------------

    def attention(self) -> Tensor:
        if self._observers is None:
            return self._average()
        received, seen_by = self._received(self._observers)
        mean = received / seen_by.clamp_min(1)
        return torch.where(seen_by > 0, mean * self._lengths, 1.0)  # unseen: as if average

    def observed(self) -> Tensor | None:
        if self._observed is None:
            return None
        fresh = self._observed[:, : self._new].unflatten(0, (-1, self._sequences.k.shape[1]))
        return pad(fresh, (sum(self._widths), 0))

    def accumulated(self) -> Tensor:
        """At a flush the kept queries stand for all since the last one, and new tokens for all since their birth."""
        queries = self._prompt or self._observers
        if queries is None:
            return self._average() * 0
        received, seen_by = self._received(queries)
        if self._prompt is not None:
            return received
        kept, fill = self._tokens.queries, self._sequences.fill
        per_query = kept.stands_for / max(1, queries.last.shape[1])
        age = (fill.seen - fill.token_positions[:, None, : self._new]).clamp_min(1)  # [batch, 1, new]
        fresh = received[..., sum(self._widths) :] / seen_by[..., sum(self._widths) :].clamp_min(1) * age
        return torch.cat([received[..., : sum(self._widths)] * per_query, fresh], -1)

    def _average(self) -> Tensor:
        heads = self._sequences.k.shape[1]
        return torch.ones(self._sequences.k.shape[0], heads, sum(self._widths) + self._new, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self._sequences.k.device

    @property
    def _lengths(self) -> Tensor:
        return self._sequences.fill.lengths[:, None, None]

    def _received(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """Probability summed over queries float32 [batch, q_heads, T], and by how many each token is seen."""
        k, heads, call = self._sequences.k, self._sequences.k.shape[1], self._call
        assert call is not None
        slots, exact = sum(self._widths), k.shape[2]
        batch, q_heads, count, _ = queries.q.shape
        rows = batch * heads
        held = torch.cat([self._stored_keys, k.flatten(0, 1).float()], 1) if slots else k.flatten(0, 1).float()
        filled = self._filled().view(batch, heads, slots)
        total = torch.zeros(rows, q_heads // heads, slots + exact, device=self._device)
        seen_by = torch.zeros(batch, heads, slots + exact, device=self._device)
        at_once = logits_at_once(self._device, slots + exact) // (q_heads // heads)
        each, some = max(1, min(count, at_once)), max(1, at_once // max(1, count))  # queries, and rows
        for first in range(0, count, each):
            q, last = queries.q[:, :, first : first + each], queries.last[:, first : first + each]
            causal = torch.arange(exact, device=self._device) <= last[..., None]  # [batch, each, exact]
            there = (last >= 0)[:, None, :, None] & filled[:, :, None]  # [batch, heads, each, slots]
            sees = torch.cat([there, causal[:, None].expand(-1, heads, -1, -1)], -1).flatten(0, 1)
            seen_by += sees.sum(1).view(batch, heads, -1)
            asking, sinks = head_rows(q, heads, call), sink_rows(q, heads, call)
            for part in (slice(row, row + some) for row in range(0, rows, some)):
                logits = cap(torch.bmm(asking[part], held[part].transpose(1, 2)), call.softcap)
                logits = logits.unflatten(1, (-1, q.shape[2])).masked_fill_(~sees[part, None], float("-inf"))
                lse = logits.logsumexp(-1, keepdim=True)
                if sinks is not None:
                    lse = torch.logaddexp(lse, sinks[part].unflatten(1, (-1, q.shape[2]))[..., None])
                total[part] += logits.sub_(lse.masked_fill(lse == float("-inf"), 0.0)).exp_().sum(2)
        take = slots + self._new
        seen_by = seen_by.repeat_interleave(q_heads // heads, 1)
        return total.view(batch, q_heads, -1)[..., :take], seen_by[..., :take]

    def _filled(self) -> Tensor:
        """bool [rows, stored slots]."""
        lengths = self._packed.table.lengths
        parts = [torch.arange(w, device=self._device) < lengths[:, t, None] for t, w in enumerate(self._widths)]
        return torch.cat(parts, 1) if parts else lengths.new_zeros(lengths.shape[0], 0).bool()

    # ---- queries to come ---------------------------------------------------------------------------------------------

    def replayed(self) -> Tensor:
        """Stored tokens of an earlier chunk, which stay as they are, get 0."""
        assert self._prompt is not None and self._call is not None, "a replay needs a prompt's queries"
        fill, heads, rotary = self._sequences.fill, self._sequences.k.shape[1], self._call.rotary
        k, prompt = self._sequences.k, self._prompt
        alike = self._valid is None and fill.uniform == k.shape[2]
        asking = None if alike else Asking(fill.counts, prompt.last[:, 0])
        received = self.kernels.most_received(
            prompt.q,
            k,
            asking,
            self._first_keys(),
            self._call.scaling,
            self._call.softcap,
            None if rotary is None else rotary.matrix(-AHEAD, k, fill.seen),
        )
        received = received[..., : self._new] * self._lengths
        return pad(received, (sum(self._widths), 0)).view(fill.batch, heads, -1)

    def _first_keys(self) -> Tensor | None:
        """Stored keys of the prompt's first tokens, float32 [batch, kv_heads, 4, D]; None where none is stored."""
        if not sum(self._widths):
            return None
        stored = self.kernels.stored(self._packed, True)
        births = [torch.where(filled, parts["birth"].long(), LAST) for filled, parts in stored]
        birth = torch.cat(births, 1)
        first = birth.topk(min(SINKS, birth.shape[1]), 1, largest=False).indices
        keys = self._stored_keys.gather(1, first[..., None].expand(-1, -1, self._sequences.k.shape[3]))
        return keys.unflatten(0, (-1, self._sequences.k.shape[1]))

    def reconstructed(self) -> Tensor | None:
        """N times the largest probability in the second pass, [batch, kv_heads, T]; None where there was none."""
        seen, fill = self._tokens.reconstruction, self._sequences.fill
        if seen is None:
            return None
        slots = packed_slots(self._tokens)
        parts = seen.split([*slots, seen.shape[1] - sum(slots)], 1)
        wide = [pad(part, (0, width - part.shape[1])) for part, width in zip(parts, self._widths, strict=False)]
        wide.append(parts[-1][:, : self._new])
        return torch.cat(wide, 1).view(fill.batch, -1, sum(self._widths) + self._new) * self._lengths

    def expected(self) -> Tensor:
        """exp(mu k + k' Sigma k / 2) over its sum, with the mean and covariance of queries under averaged RoPE."""
        assert self._prompt is not None and self._call is not None, "expected attention needs a prompt's queries"
        q, last, fill = self._prompt.q.float(), self._prompt.last, self._sequences.fill
        heads, rotary, dim = self._sequences.k.shape[1], self._call.rotary, q.shape[-1]
        there = (last >= 0)[:, None, :, None]
        spread = torch.eye(dim, device=self._device)
        if rotary is not None:
            start = fill.lengths - fill.counts  # tokens before the exact ones
            position = torch.where(last >= 0, start[:, None] + last, 0)
            q = torch.cat([rotary.turn(q[b : b + 1], -position[b], fill.seen) for b in range(fill.batch)])
            ahead = torch.arange(fill.seen, fill.seen + FUTURE, device=self._device)
            basis = spread[None, :, None].expand(1, dim, FUTURE, dim)
            spread = rotary.turn(basis, ahead, fill.seen)[0].mean(1)  # [dim, dim], e_i turned
        count = there.sum(2, keepdim=True).clamp_min(1)
        mean = (q * there).sum(2, keepdim=True) / count  # [batch, q_heads, 1, D]
        centred = (q - mean) * there
        cov = spread.T @ (centred.transpose(2, 3) @ centred / count) @ spread
        mean = mean @ spread
        k = self.keys().repeat_interleave(q.shape[1] // heads, 1)
        scaling = self._call.scaling
        logits = (k @ mean.transpose(2, 3)).squeeze(3) * scaling + ((k @ cov) * k).sum(-1) * (scaling**2 / 2)
        stored = self._filled().view(fill.batch, heads, sum(self._widths))
        fresh = self._leaving[:, None].expand(-1, heads, -1)
        exists = torch.cat([stored, fresh], -1).repeat_interleave(q.shape[1] // heads, 1)
        return logits.masked_fill(~exists, float("-inf")).softmax(-1).nan_to_num(0.0) * self._lengths


def packed_slots(tokens: LayerTokens) -> list[int]:
    """Slots of a layer's longest row at least, per tier, by what the host knows."""
    packed = tokens.packed
    return [pages * layout.tokens for pages, layout in zip(packed.widest, packed.layouts, strict=False)]


def most_given(tokens: LayerTokens, q: Tensor, valid: Tensor | None, call: Call, lse: Tensor) -> Tensor:
    """The largest probability that queries give to what a layer holds: float32 [rows, stored slots and window].

    Args:
        q: [batch, q_heads, queries, D], behind all that is held; valid: bool [batch, queries] or None for all.
        lse: their log-sum-exp over all keys [rows, groups, queries].
    """
    window, fill, heads = tokens.window, tokens.fill, tokens.window.heads
    rows, total = head_rows(q, heads, call), lse.flatten(1)[..., None]
    if valid is not None:
        silent = ~valid[:, -q.shape[2] :].repeat_interleave(heads, 0).repeat(1, lse.shape[1])
        total = total.masked_fill(silent[..., None], float("inf"))
    best = []
    packed = tokens.packed
    sides = [tokens.kernels.vectors(packed, "key", tier, width) for tier, width in enumerate(packed_slots(tokens))]
    for keys in [*sides, window.k[:, :, : fill.most].flatten(0, 1)]:
        most = torch.zeros(keys.shape[:2], device=keys.device)
        keys = keys.float().transpose(1, 2)
        step = max(1, min(rows.shape[1], logits_at_once(keys.device, keys.shape[2])))
        for row, first in itertools.product(range(rows.shape[0]), range(0, rows.shape[1], step)):
            own, part = slice(row, row + 1), slice(first, first + step)
            logits = cap(torch.bmm(rows[own, part], keys[own]), call.softcap)
            most[own] = torch.maximum(most[own], logits.sub_(total[own, part]).exp_().amax(1))
        best.append(most)
    return torch.cat(best, 1)


def prompt_queries(sequences: Sequences, q: Tensor, valid: Tensor | None) -> Queries:
    """A chunk's real queries, left-aligned: q [batch, q_heads, queries, D], valid bool [batch, tokens] or None."""
    fill, queries = sequences.fill, q.shape[2]
    slot = torch.arange(queries, device=q.device)
    if valid is None:
        return Queries(q, (fill.counts[:, None] - queries + slot).clamp_min(-1))
    real = valid[:, -queries:]
    own = real.sum(1)[:, None]
    last = torch.where(slot < own, fill.counts[:, None] - own + slot, -1)
    return Queries(q.take_along_dim(newest_last(real)[:, None, :, None], 2), last)
