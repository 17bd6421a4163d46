"""Attention of a few queries over packed pages, straight from their codes.

out_q = sum_t softmax_t(q . k_t) v_t with k_t = ks_t * code - ko_t and v_t likewise, so that

    q . k_t = ks_t * (q . code_t) - ko_t * sum(q)        sum_t p_t v_t = sum_t (p_t vs_t) code_t - sum_t p_t vo_t

Codes meet only the two matrix products; scales and offsets stay outside. The unit of work is an item: `span` pages of
one row, a row being one KV head of one sequence. The twin gathers a block of items, widens the codes, and folds the
block into running (acc, max, mass) per row. Queries and values are in the rotated basis of the pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.partial import Partial, cap
from hfkv.quant import PLANES, Codec, PageLayout

BLOCK_TOKENS = 8192


@dataclass(frozen=True)
class ItemBlock:
    """Some work items of one tier.

    Attributes:
        tier: index of the tier, whose pages have this layout.
        span: pages per item.
        sources: (page-sized rows of an arena, row of each page int32) per arena; an item's last page may come again
            to fill its span.
        order: int32 [items * span], brings the pages of all sources into the items' order; None: they are in it.
        row: int64 [items], the KV head (of all sequences) that owns each item.
        filled: int32 [items], tokens of each item, which come first; None where all are full.
    """

    tier: int
    layout: PageLayout
    span: int
    sources: tuple[tuple[Tensor, Tensor], ...]
    order: Tensor | None
    row: Tensor
    filled: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the block's own tensors; the pages that it names are not among them."""
        own = [self.row, *(words for _, words in self.sources)]
        return sum(x.nbytes for x in (*own, self.order, self.filled) if x is not None)

    @property
    def free(self) -> Tensor | None:
        """bool [items, 1, span * tokens]: slots without a token; None where all are full."""
        if self.filled is None:
            return None
        slot = torch.arange(self.span * self.layout.tokens, dtype=torch.int32, device=self.row.device)
        return (slot >= self.filled[:, None])[:, None]

    def gather(self) -> Tensor:
        """The block's bytes, uint8 [items * span, page_bytes]."""
        parts = [torch.index_select(rows, 0, words) for rows, words in self.sources]
        pages = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.order is not None:
            pages = pages.index_select(0, self.order)
        return pages.view(torch.uint8)


@dataclass(frozen=True)
class WorkList:
    """All packed pages of a layer as items, made once per flush; it stays valid while tokens are only appended."""

    blocks: tuple[ItemBlock, ...]
    rows: int
    value_dim: int

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)


def attend_pages(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None, values: bool = True
) -> Partial:
    """Attention over packed tokens: q float32 [rows, queries, key_dim], rotated and scaled -> Partial (rotated values).

    `constant` [rows, queries] is added to every logit of a query (its product with the mean key). Without `values` only
    the maximum and the mass are computed.
    """
    total = Partial.empty(work.rows, q.shape[1], work.value_dim if values else 0, q.device)
    before_cap = constant if softcap is not None else None
    for i, (block, held, logits) in enumerate(_block_logits(work, q, before_cap, softcap)):
        row, highest = block.row, logits.amax(-1)  # [items, queries]
        top = total.top.scatter_reduce(0, row[:, None].expand_as(highest), highest, "amax")  # [rows, queries]
        p = logits.sub_(top.index_select(0, row)[..., None]).exp_()  # [items, queries, span * tokens]
        if i:
            fade = torch.exp(total.top - top)
            total.acc *= fade[..., None]
            total.mass *= fade
        total.top = top
        total.mass.index_add_(0, row, p.sum(-1))
        if values:
            total.acc.index_add_(0, row, held.weighed(p))
    if constant is not None and before_cap is None:
        total.top += constant  # equal for all keys of a query
    return total


def attention_received(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None, lse: Tensor, groups: int
) -> list[Tensor]:
    """Mean probability that every packed token receives, largest over the GQA group.

    Args:
        q: float32 [rows, groups * queries, key_dim], rotated and scaled.
        lse: [rows, groups * queries], log-sum-exp over *all* keys of each query, window included.

    Returns:
        Per block float32 [items * span, tokens].
    """
    received = []
    for block, _, logits in _block_logits(work, q, constant, softcap):
        p = logits.sub_(lse.index_select(0, block.row)[..., None]).exp_()
        received.append(p.unflatten(1, (groups, -1)).mean(2).amax(1).view(-1, block.layout.tokens))
    return received


def _block_logits(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None
) -> Iterator[tuple[ItemBlock, Values, Tensor]]:
    """Per block: its values, and its owners' logits [items, queries, span * tokens], -inf in free slots."""
    total = q.sum(-1, keepdim=True)  # [rows, queries, 1]
    for block in work.blocks:
        layout, row, pages = block.layout, block.row, block.gather()
        codec, items = layout.key, row.numel()
        ks, ko, vs, vo = (term.reshape(items, 1, -1) if term.dim() else term for term in layout.terms(pages))
        keys = widen(layout.view(pages, "key"), codec, -1).reshape(items, -1, codec.padded)  # [items, span * tokens, D]
        logits = torch.bmm(_padded(q, codec).index_select(0, row), keys.transpose(1, 2))
        if codec.bits:
            logits.mul_(ks).addcmul_(total.index_select(0, row), ko, value=-1)
        if constant is not None:
            logits += constant.index_select(0, row)[..., None]
        logits = cap(logits, softcap)
        free = block.free
        if free is not None:
            logits.masked_fill_(free, float("-inf"))
        yield block, Values(layout.value, layout.view(pages, "value"), vs, vo), logits


@dataclass(frozen=True)
class Values:
    """A block's packed values [items * span, rows, tokens], their scales and offsets [items, 1, span * tokens]."""

    codec: Codec
    packed: Tensor
    scale: Tensor
    offset: Tensor

    def weighed(self, p: Tensor) -> Tensor:
        """sum_t p_t v_t per item: p [items, queries, span * tokens] -> [items, queries, value_dim]."""
        codec = self.codec
        packed = self.packed.unflatten(0, (p.shape[0], -1)).transpose(1, 2).contiguous()  # [items, rows, span, tokens]
        codes = widen(packed, codec, 1).flatten(2).transpose(1, 2)  # [items, span * tokens, padded]
        if not codec.bits:
            return torch.bmm(p, codes)
        weighed = torch.bmm(p * self.scale, codes)[..., : codec.dim]
        return weighed.sub_((p * self.offset).sum(-1, keepdim=True))


def _padded(q: Tensor, codec: Codec) -> Tensor:
    return q if codec.padded == codec.dim else torch.nn.functional.pad(q, (0, codec.padded - codec.dim))


def widen(packed: Tensor, codec: Codec, dim: int) -> Tensor:
    """Bytes with `codec.rows` along `dim` -> float32 codes, `codec.padded` along it."""
    if codec.bits in (0, 8):
        return packed.float()
    shape = list(packed.shape)
    shape[dim] = codec.padded
    out = torch.empty(shape, dtype=torch.float32, device=packed.device)
    shift = start = 0
    for bits in PLANES[codec.bits]:
        width = codec.padded * bits // 8
        plane = packed.narrow(dim, start, width)
        for i in range(8 // bits):
            part = plane >> (i * bits) if i else plane
            if (i + 1) * bits < 8:
                part = part & (2**bits - 1)
            slot = out.narrow(dim, i * width, width)
            slot.add_(part, alpha=1 << shift) if shift else slot.copy_(part)
        shift, start = shift + bits, start + width
    return out
