"""Attention of a few queries over packed pages, straight from their codes.

out_q = sum_t softmax_t(q . k_t) v_t with k_t = ks_t * code + ko_t and v_t likewise, so that

    q . k_t = ks_t * (q . code_t) + ko_t * sum(q)        sum_t p_t v_t = sum_t (p_t vs_t) code_t + sum_t p_t vo_t

Codes meet only the two matrix products; scales and offsets stay outside. The twin works by blocks of pages: it gathers
a block's bytes, widens the codes, and folds the block into running (acc, max, mass) per row, a row being one KV head of
one sequence. Queries and values are in the rotated basis of the pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.kernels.partial import Partial, cap
from hfkv.quant import PLANES, Codec, PageLayout, affine_terms

BLOCK_TOKENS = 8192


@dataclass(frozen=True)
class PageBlock:
    """Some pages of one layout, in the order in which they are read.

    Attributes:
        sources: (page-sized rows of an arena, row of each page, first, last) per arena.
        row: int64 [pages], the KV head (of all sequences) that owns each page.
        index: int64 [pages], number of the page inside its row.
        bias: float32 [pages, 1, tokens], -inf for free slots; None where every slot is filled.
    """

    layout: PageLayout
    sources: tuple[tuple[Tensor, Tensor, int, int], ...]
    row: Tensor
    index: Tensor
    bias: Tensor | None

    def gather(self) -> Tensor:
        """The block's bytes, uint8 [pages, page_bytes]."""
        if len(self.sources) == 1:
            rows, words, _, _ = self.sources[0]
            return torch.index_select(rows, 0, words).view(torch.uint8)
        out = torch.empty(self.row.numel(), self.layout.page_bytes // 8, dtype=torch.int64, device=self.row.device)
        for rows, words, first, last in self.sources:
            torch.index_select(rows, 0, words, out=out[first:last])
        return out.view(torch.uint8)


@dataclass(frozen=True)
class WorkList:
    """All packed pages of a layer, made once per flush; reading it stays valid while tokens are only appended."""

    blocks: tuple[PageBlock, ...]
    rows: int
    key_dim: int
    value_dim: int


def attend_pages(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None, values: bool = True
) -> Partial:
    """Attention over packed tokens: q float32 [rows, queries, key_dim], rotated and scaled -> Partial (rotated values).

    `constant` [rows, queries] is added to every logit of a query (its product with the mean key). Without `values` only
    the maximum and the mass are computed.
    """
    total = Partial.empty(work.rows, q.shape[1], work.value_dim if values else 0, q.device)
    for block, pages, logits in _block_logits(work, q, constant, softcap):
        row, one = block.row, len(work.blocks) == 1
        highest = logits.amax(-1)  # [pages, queries]
        top = total.top.scatter_reduce(0, row[:, None].expand_as(highest), highest, "amax")  # [rows, queries]
        p = logits.sub_(top[row][..., None]).exp_()  # [pages, queries, tokens]
        if not one:
            fade = torch.exp(total.top - top)
            total.acc *= fade[..., None]
            total.mass *= fade
        total.top = top
        total.mass.index_add_(0, row, p.sum(-1))
        if values:
            total.acc.index_add_(0, row, _weigh_values(block.layout, pages, p))
    return total


def attention_received(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None, lse: Tensor, groups: int
) -> list[Tensor]:
    """Mean probability that every packed token receives, largest over the GQA group; float32 [pages, tokens] per block.

    Args:
        q: float32 [rows, groups * queries, key_dim], rotated and scaled.
        lse: [rows, groups * queries], log-sum-exp over *all* keys of each query, window included.
    """
    received = []
    for block, _, logits in _block_logits(work, q, constant, softcap):
        p = logits.sub_(lse[block.row][..., None]).exp_()
        received.append(p.unflatten(1, (groups, -1)).mean(2).amax(1))
    return received


def _block_logits(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None
) -> Iterator[tuple[PageBlock, Tensor, Tensor]]:
    """Per block: its bytes and the logits [pages, queries, tokens] of its owners' queries, -inf in free slots."""
    total = q.sum(-1, keepdim=True)  # [rows, queries, 1]
    for block in work.blocks:
        layout, row = block.layout, block.row
        pages = block.gather()
        keys = widen(layout.key, layout.view(pages, "key"), -1)  # [pages, tokens, padded]
        logits = torch.bmm(_pad(q, layout.key)[row], keys.transpose(1, 2))
        if layout.key.bits:
            scale, offset = _terms(layout, pages, "key")  # [pages, tokens]
            logits.mul_(scale[:, None]).addcmul_(total[row], offset[:, None])
        if constant is not None:
            logits += constant[row][..., None]
        logits = cap(logits, softcap)
        if block.bias is not None:
            logits += block.bias
        yield block, pages, logits


def _weigh_values(layout: PageLayout, pages: Tensor, p: Tensor) -> Tensor:
    """sum_t p_t v_t per page: p [pages, queries, tokens] -> [pages, queries, value_dim]."""
    codec = layout.value
    values = widen(codec, layout.view(pages, "value"), 1)  # [pages, padded, tokens]
    if not codec.bits:
        return torch.bmm(p, values.transpose(1, 2))
    scale, offset = _terms(layout, pages, "value")
    weighed = torch.bmm(p * scale[:, None], values.transpose(1, 2))[..., : codec.dim]
    return weighed.add_(torch.bmm(p, offset[..., None]))


def _terms(layout: PageLayout, pages: Tensor, side: str) -> tuple[Tensor, Tensor]:
    codec = layout.key if side == "key" else layout.value
    zero = layout.view(pages, f"{side}_zero") if codec.zero_bytes else None
    return affine_terms(codec, layout.view(pages, f"{side}_scale"), zero)


def _pad(q: Tensor, codec: Codec) -> Tensor:
    return q if codec.padded == codec.dim else torch.nn.functional.pad(q, (0, codec.padded - codec.dim))


def widen(codec: Codec, packed: Tensor, dim: int) -> Tensor:
    """Packed codes with their bytes along `dim` -> float32 codes, `codec.padded` along that dimension."""
    if not codec.bits:
        return packed.float()
    if codec.bits == 8:
        return packed.to(torch.float32)
    shape = list(packed.shape)
    shape[dim] = codec.padded
    out = torch.empty(shape, dtype=torch.float32, device=packed.device)
    shift = start = 0
    for bits in PLANES[codec.bits]:
        width = codec.padded * bits // 8
        plane = packed.narrow(dim, start, width)
        for i in range(8 // bits):
            part = plane if i == 0 else plane >> (i * bits)
            if (i + 1) * bits < 8:
                part = part & (2**bits - 1)
            slot = out.narrow(dim, i * width, width)
            slot.copy_(part) if shift == 0 else slot.add_(part, alpha=1 << shift)
        shift, start = shift + bits, start + width
    return out
