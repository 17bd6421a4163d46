"""Attention over packed pages, straight from their codes, joined with attention over exact keys in one softmax.

With k_t = ks_t * (code - kz_t) and v_t likewise,

    q . k_t = ks_t * (q . code_t - kz_t * sum(q))        sum_t p_t v_t = sum_t (p_t vs_t) code_t - sum_t p_t vs_t vz_t

so that codes meet only the two matrix products; scales and zeros stay outside. The twin works by blocks of pages: it
gathers a block's bytes, widens the codes, and forms the block's logits; after one softmax over all blocks, the exact
keys and the sinks it widens the values of each block again. A row is one KV head of one sequence. Queries and values
of packed tokens are in the rotated basis of the pages.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.quant import PLANES, Codec, PageLayout

BLOCK_TOKENS = 32768


@dataclass(frozen=True)
class PageBlock:
    """Some pages of some rows in one tier, as many of each row.

    Attributes:
        tier, layout: index of the tier, and its layout.
        row: int64 [r], the rows; None for all. Rows that end earlier repeat a page, which `filled` hides.
        sources: (page-sized rows of an arena, row of each page int32, pages that lie there int64); the first source
            names a row for all pages and has None as its pages, the others correct those that lie elsewhere.
        filled: int32 [r], tokens of each row in this block, which come first; None where all slots are full.
        columns: first and last slot of the block among all packed slots of a row.
    """

    tier: int
    layout: PageLayout
    row: Tensor | None
    sources: tuple[tuple[Tensor, Tensor, Tensor | None], ...]
    filled: Tensor | None
    columns: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the block's own tensors; the pages that it names are not among them."""
        own = [self.row, self.filled, *(x for source in self.sources for x in source[1:])]
        return sum(x.nbytes for x in own if x is not None)

    def gather(self) -> Tensor:
        """The block's bytes, uint8 [r * pages, page_bytes]."""
        (rows, words, _), *others = self.sources
        pages = rows.index_select(0, words)
        for rows, words, where in others:
            assert where is not None
            pages.index_copy_(0, where, rows.index_select(0, words))
        return pages.view(torch.uint8)

    def of_rows(self, x: Tensor) -> Tensor:
        """The block's rows of x [rows, ...]."""
        return x if self.row is None else x.index_select(0, self.row)


@dataclass(frozen=True)
class WorkList:
    """All packed pages of a layer, made once per flush; it stays valid while tokens are only appended.

    Attributes:
        slots: per tier, packed slots per row, free ones included; a row's columns are those of tier 0, then of tier 1.
    """

    blocks: tuple[PageBlock, ...]
    rows: int
    slots: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def width(self) -> int:
        return sum(self.slots)


@dataclass(slots=True)
class BlockValues:
    """A block's packed values [r * pages, rows, tokens] with scales and zeros [r, 1, pages * tokens]."""

    block: PageBlock
    packed: Tensor
    scale: Tensor | float
    zero: Tensor | float

    def weighed(self, p: Tensor) -> Tensor:
        """sum_t p_t v_t: p [r, queries, pages * tokens] -> [r, queries, value_dim]."""
        codec = self.block.layout.value
        packed = self.packed.unflatten(0, (p.shape[0], -1)).transpose(1, 2).contiguous()  # [r, rows, pages, tokens]
        codes = widen(packed, codec, 1).flatten(2).transpose(1, 2)  # [r, pages * tokens, padded]
        if not codec.bits:
            return torch.bmm(p, codes)
        p = p * self.scale
        total = (p * self.zero).sum(-1, keepdim=True) if isinstance(self.zero, Tensor) else p.sum(-1, True) * self.zero
        return torch.bmm(p, codes)[..., : codec.dim].sub_(total)


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

    def attend(self) -> tuple[Tensor | None, Tensor]:
        """Attention output over packed tokens (rotated basis; None: there are none) and over exact ones."""
        p = self.logits.softmax(-1)
        packed, plain, start = None, None, self.work.width
        for held in self.values:
            block = held.block
            part = held.weighed(block.of_rows(p[..., slice(*block.columns)]))
            if block.row is not None:
                part = part.new_zeros(p.shape[0], *part.shape[1:]).index_add_(0, block.row, part)
            packed = part if packed is None else packed.add_(part)
        for keys in self.exact:
            end = start + keys.logits.shape[-1]
            part, start = torch.bmm(p[..., start:end], keys.v), end
            plain = part if plain is None else plain.add_(part)
        assert plain is not None
        return packed, plain


def join(
    work: WorkList,
    q: Tensor | None,
    constant: Tensor | None,
    exact: list[ExactKeys],
    softcap: float | None,
    sinks: Tensor | None,
) -> JointLogits:
    """Logits of all keys of each query.

    Args:
        q: float32 [rows, queries, key_dim], rotated and scaled; None where nothing is packed.
        constant: [rows, queries], added to every packed logit (a query's product with the mean key), or None.
        exact: keys that are not packed; at least one entry, which may have no key.
        sinks: [rows, queries] logits of a column without a value, or None.
    """
    parts: list[Tensor] = []
    values: list[BlockValues] = []
    if q is not None and work.blocks:
        packed, values = _packed_logits(work, q, constant, softcap)
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


def _packed_logits(
    work: WorkList, q: Tensor, constant: Tensor | None, softcap: float | None
) -> tuple[Tensor, list[BlockValues]]:
    total, whole = q.sum(-1, keepdim=True), all(block.row is None for block in work.blocks)
    parts: list[Tensor] = []
    values: list[BlockValues] = []
    for block in work.blocks:
        added = None if constant is None else block.of_rows(constant)
        logits, held = _block_logits(block, block.of_rows(q), block.of_rows(total), added, softcap)
        parts.append(logits)
        values.append(held)
    if whole:
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    else:
        logits = q.new_full((work.rows, q.shape[1], work.width), float("-inf"))
        for block, part in zip(work.blocks, parts, strict=True):
            rows = slice(None) if block.row is None else block.row
            logits[rows, :, slice(*block.columns)] = part
    return logits, values


def _block_logits(
    block: PageBlock, q: Tensor, total: Tensor, constant: Tensor | None, softcap: float | None
) -> tuple[Tensor, BlockValues]:
    """Logits [r, queries, pages * tokens], -inf in free slots, of q [r, queries, key_dim] with sums `total`."""
    layout, codec, pages = block.layout, block.layout.key, block.gather()
    keys_terms, values_terms = layout.terms(pages)
    rows = q.shape[0]
    keys = widen(layout.view(pages, "key"), codec, -1).reshape(rows, -1, codec.padded)  # [r, pages * tokens, D]
    logits = torch.bmm(_padded(q, codec), keys.transpose(1, 2))
    if codec.bits:
        ks, kz = (_by_row(term, rows) for term in keys_terms)
        logits = logits.addcmul_(total, kz, value=-1) if isinstance(kz, Tensor) else logits.sub_(total * kz)
        logits *= ks
    if constant is not None:
        logits += constant[..., None]
    logits = cap(logits, softcap)
    if block.filled is not None:
        logits.masked_fill_((_slots(logits.shape[-1], q.device) >= block.filled[:, None])[:, None], float("-inf"))
    return logits, BlockValues(block, layout.view(pages, "value"), *(_by_row(term, rows) for term in values_terms))


def _by_row(term: Tensor | float, rows: int) -> Tensor | float:
    """[rows * pages, tokens] -> [rows, 1, pages * tokens]."""
    return term.reshape(rows, 1, -1) if isinstance(term, Tensor) else term


@functools.lru_cache(maxsize=8)
def _slots(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _padded(q: Tensor, codec: Codec) -> Tensor:
    return q if codec.padded == codec.dim else torch.nn.functional.pad(q, (0, codec.padded - codec.dim))


def widen(packed: Tensor, codec: Codec, dim: int) -> Tensor:
    """Bytes with `codec.rows` along `dim` -> float32 stored codes, `codec.padded` along it."""
    if codec.bits in (0, 8):
        return (packed.view(torch.int8) if codec.signed else packed).float()
    codes, shift, start = None, 0, 0
    for bits in PLANES[codec.bits]:
        width = codec.padded * bits // 8
        plane = packed if width == codec.rows else packed.narrow(dim, start, width)
        slices = [plane, *(plane >> i for i in range(bits, 8, bits))]
        part = torch.cat(slices, dim).bitwise_and_(2**bits - 1).float()
        codes = part if codes is None else codes.add_(part, alpha=1 << shift)
        shift, start = shift + bits, start + width
    assert codes is not None
    return codes
