"""Attention over packed pages, straight from their codes, joined with attention over exact keys in one softmax.

With k_t = ks_t * (code - kz_t) and v_t likewise,

    q . k_t = ks_t * (q . code_t - kz_t * sum(q))        sum_t p_t v_t = sum_t (p_t vs_t) code_t - sum_t p_t vs_t vz_t

so that codes meet only the two matrix products; scales and zeros stay outside. The twin works by blocks of pages: it
gathers a block's bytes, widens them and forms the block's logits; after one softmax over all blocks, the exact keys and
the sinks it widens the values of each block. What is linear besides (rotations, the fields of a byte, the zeros of
values) is folded into one matrix before and one after (`hfkv.kernels.folding`). A row is one KV head of one sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfkv.kernels.folding import Folding
from hfkv.kernels.page_codes import Scratch, Terms, code_products, widen_values
from hfkv.quant import PageLayout

if TYPE_CHECKING:
    from hfkv.paging.pool import Source

BLOCK_TOKENS = 32768
"""Tokens, of all rows together, whose keys or values are widened at once."""


@dataclass(frozen=True)
class PageBlock:
    """Some pages of some rows in one tier, as many of each row.

    Attributes:
        tier, layout: index of the tier, and its layout.
        pages: how many there are, of all rows.
        row: int64 [r], the rows; None for all. Rows that end earlier repeat a page, which `free` hides.
        sources: where the pages lie, the later ones overriding the earlier.
        free: bool [r, 1, n], free slots among the last n of the block; None where all slots are filled.
        columns: first and last slot of the block among all packed slots of a row.
    """

    tier: int
    layout: PageLayout
    pages: int
    row: Tensor | None
    sources: tuple[Source, ...]
    free: Tensor | None
    columns: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the block's own tensors; the pages that it names are not among them."""
        return sum(x.nbytes for x in self._own)

    @property
    def _own(self) -> list[Tensor]:
        own = [self.row, self.free, *(x for source in self.sources for x in source[1:])]
        return [x for x in own if isinstance(x, Tensor)]

    @property
    def read(self) -> list[Tensor]:
        """Every tensor that reading the block reads."""
        return [*self._own, *(rows for rows, *_ in self.sources)]

    def gather(self) -> Tensor:
        """The block's bytes, uint8 [r * pages, page_bytes]."""
        if len(self.sources) == 1:
            rows, words, _ = self.sources[0]
            return rows.index_select(0, words).view(torch.uint8)
        width = self.layout.page_bytes // self.sources[0][0].element_size()
        pages = self.sources[0][0].new_empty(self.pages, width)
        for rows, words, places in self.sources:
            if isinstance(places, slice):
                torch.index_select(rows, 0, words, out=pages[places])
            else:
                pages.index_copy_(0, places, rows.index_select(0, words))
        return pages.view(torch.uint8)

    def of_rows(self, x: Tensor) -> Tensor:
        """The block's rows of x [rows, ...]."""
        return x if self.row is None else x.index_select(0, self.row)


@dataclass(frozen=True)
class WorkList:
    """All packed pages of a layer, made once per flush; it stays valid while tokens are only appended.

    Attributes:
        listed: finds the pages, by blocks; asked once.
        slots: per tier, packed slots per row, free ones included; a row's columns are those of tier 0, then of tier 1.
        folding: the layer's maps between plain vectors and bytes.
        mean: float32 [rows, key_dim] in the rotated basis, what every key is short of; or None.
    """

    listed: Callable[[], tuple[PageBlock, ...]] = field(repr=False)
    rows: int
    slots: tuple[int, ...]
    folding: Folding
    mean: Tensor | None

    @functools.cached_property
    def blocks(self) -> tuple[PageBlock, ...]:
        """All pages, those of tier 0 first."""
        return self.listed()

    @property
    def nbytes(self) -> int:
        """Bytes of what has been made so far."""
        return sum(block.nbytes for block in self.__dict__.get("blocks", ()))

    @property
    def width(self) -> int:
        return sum(self.slots)

    @property
    def read(self) -> list[Tensor]:
        """Every tensor that a step reads."""
        own = [*self.folding.tensors, *(x for block in self.blocks for x in block.read)]
        return own if self.mean is None else [*own, self.mean]


@dataclass(slots=True)
class BlockValues:
    """A block's pages, uint8 [r * pages, page_bytes], with what its values are weighed by beside p.

    Attributes:
        scale: float32 [r, 1, pages * tokens]; None for exact values.
        zero: float32 [r, 1, pages * tokens] where zeros are not stored as bytes; else None.
        scratch: where codes are widened, the same for all blocks.
    """

    block: PageBlock
    pages: Tensor
    scale: Tensor | None
    zero: Tensor | None
    scratch: Scratch

    def weighed(self, p: Tensor) -> Tensor:
        """Sums by p [r, queries, pages * tokens] of codes and of their zeros -> [r, queries, columns]."""
        if self.scale is not None:
            p = p * self.scale
        wide = widen_values(self.block.layout, self.pages, p.shape[0], self.scratch)
        sums = torch.bmm(p, wide.transpose(1, 2))
        if self.zero is not None:
            sums[..., -1:] = torch.bmm(p, self.zero.transpose(1, 2))
        return sums


@dataclass(slots=True)
class ExactKeys:
    """Keys and values that are not packed: logits float32 [rows, queries, n] with masks applied, v [rows, n, Dv]."""

    logits: Tensor
    v: Tensor


@dataclass(slots=True)
class JointLogits:
    """Logits [rows, queries, packed slots | exact keys | sink] of one softmax, and the packed values they weigh."""

    logits: Tensor
    values: list[BlockValues]
    exact: list[ExactKeys]
    work: WorkList

    def attend(self) -> Tensor:
        """The attention output, float32 [rows, queries, value_dim]."""
        p = self.logits.softmax(-1)
        out, start = None, self.work.width
        for keys in self.exact:
            end = start + keys.logits.shape[-1]
            part, start = p[..., start:end], end
            out = torch.bmm(part, keys.v) if out is None else torch.baddbmm(out, part, keys.v)
        assert out is not None
        for tier, sums in self._sums(p).items():
            flat = torch.addmm(out.flatten(0, 1), sums.flatten(0, 1), self.work.folding.values[tier])
            out = flat.view(out.shape)
        return out

    def _sums(self, p: Tensor) -> dict[int, Tensor]:
        """Per tier, what all its blocks add up to, [rows, queries, columns]."""
        sums: dict[int, Tensor] = {}
        for held in self.values:
            block = held.block
            part = held.weighed(block.of_rows(p[..., slice(*block.columns)]))
            if block.row is not None:
                part = part.new_zeros(p.shape[0], *part.shape[1:]).index_add_(0, block.row, part)
            sums[block.tier] = sums[block.tier].add_(part) if block.tier in sums else part
        return sums


def join(work: WorkList, q: Tensor, exact: list[ExactKeys], softcap: float | None, sinks: Tensor | None) -> JointLogits:
    """Logits of all keys of each query.

    Args:
        q: float32 [rows, queries, key_dim], scaled, in the plain basis.
        exact: keys that are not packed; at least one entry, which may have no key.
        sinks: [rows, queries] logits of a column without a value, or None.
    """
    parts: list[Tensor] = []
    values: list[BlockValues] = []
    if work.blocks:
        packed, values = _packed_logits(work, q, softcap)
        parts.append(packed)
    parts += [keys.logits for keys in exact]
    if sinks is not None:
        parts.append(sinks[..., None])
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return JointLogits(logits, values, exact, work)


def attention_received(p: Tensor, work: WorkList, groups: int) -> list[Tensor]:
    """Mean probability that every packed token receives, largest over the GQA group: per tier [rows, slots].

    `p` [rows, groups * queries, width or more] are the softmax of joint logits.
    """
    received = p[..., : work.width].unflatten(1, (groups, -1)).mean(2).amax(1)
    return list(received.split(work.slots, -1))


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def hidden_bias(hidden: Tensor) -> Tensor:
    """bool -> float32: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def exact_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None) -> ExactKeys:
    """Logits of q [rows, queries, D] (scaled) over k [rows, n, D], all float32; `bias` hides keys with -inf."""
    logits = cap(torch.bmm(q, k.transpose(1, 2)), softcap)
    return ExactKeys(logits if bias is None else logits.add_(bias), v)


def _packed_logits(work: WorkList, q: Tensor, softcap: float | None) -> tuple[Tensor, list[BlockValues]]:
    folding, scratch = work.folding, Scratch(q.device)
    folded = torch.mm(q.flatten(0, 1), folding.queries).view(*q.shape[:2], -1)
    total, constant = folded[..., folding.total], None
    if work.mean is not None:  # a query's product with what all keys are short of
        constant = torch.bmm(folded[..., folding.rotated], work.mean[..., None])
    parts: list[Tensor] = []
    values: list[BlockValues] = []
    for block in work.blocks:
        own = folded[..., folding.keys[block.tier]]
        added = None if constant is None else block.of_rows(constant)
        logits, held = _block_logits(block, block.of_rows(own), block.of_rows(total), added, softcap, scratch)
        parts.append(logits)
        values.append(held)
    if all(block.row is None for block in work.blocks):
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    else:
        logits = q.new_full((work.rows, q.shape[1], work.width), float("-inf"))
        for block, part in zip(work.blocks, parts, strict=True):
            rows = slice(None) if block.row is None else block.row
            logits[rows, :, slice(*block.columns)] = part
    return logits, values


def _block_logits(
    block: PageBlock, q: Tensor, total: Tensor, constant: Tensor | None, softcap: float | None, scratch: Scratch
) -> tuple[Tensor, BlockValues]:
    """Logits [r, queries, pages * tokens], -inf in free slots.

    Args:
        q: [r, queries, columns], folded; total: [r, queries, 1], the sum of the rotated query.
        constant: [r, queries, 1], added to every logit, or None.
    """
    layout, pages, rows = block.layout, block.gather(), q.shape[0]
    logits = code_products(layout, pages, q, scratch)
    terms = Terms.of(layout, pages, rows)
    if terms.ks is not None:
        if isinstance(terms.kz, Tensor):
            logits.addcmul_(total, terms.kz, value=-1)
        else:
            logits.sub_(total * terms.kz)
        logits = logits.mul_(terms.ks) if constant is None else torch.addcmul(constant, logits, terms.ks)
    elif constant is not None:
        logits.add_(constant)
    logits = cap(logits, softcap)
    if block.free is not None:
        logits[..., -block.free.shape[-1] :].masked_fill_(block.free, float("-inf"))
    return logits, BlockValues(block, pages, terms.vs, terms.vz, scratch)
