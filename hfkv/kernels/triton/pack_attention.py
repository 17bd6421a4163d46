"""Decode attention on packs: partial results of sealed pages, which `combine_items` merges with those of the others.

A program takes every so many sealed pages of one row. It decodes a pack's codes, features by tokens, from its bit
planes; scales and zeros stay outside the products, as in `decode_kernels`. Sealed pages are full: nothing is masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.quantize_pack import Basis
from hfkv.kernels.sealing import PACKS, pack_format
from hfkv.kernels.triton.constants import FITTED, KINDS, SCALE_BIAS, SCALE_STEP, SLOT_BITS, SLOT_MASK
from hfkv.kernels.triton.decode_kernels import NOWHERE, _cap
from hfkv.kernels.triton.packing import (
    FRONT,
    P_BITS,
    P_DIM,
    P_HEADER,
    P_PLANE,
    P_WIDTH_BITS,
    RAW,
    RUN,
    halfwords,
    pack_constants,
)
from hfkv.kernels.triton.work import COLUMNS, StepPlan, row_entries
from hfkv.packing import BLOCK, PACK
from hfkv.paging.packed import PackedLayer
from hfkv.paging.rooms import NOTHING, OFFSET_BITS, room_bytes
from hfkv.paging.sealed import SealingPool
from hfkv.paging.table import PageTable
from hfkv.quant import PageLayout

OFFSET = tl.constexpr(OFFSET_BITS)
OFFSET_MASK = tl.constexpr((1 << OFFSET_BITS) - 1)
LARGEST_SPLIT = 64

# How the metadata of a side are read, a tuple of numbers: these are its positions.
M_KIND = tl.constexpr(0)
M_CENTER = tl.constexpr(1)
M_SCALE = tl.constexpr(2)
M_ZERO = tl.constexpr(3)


@triton.jit
def _plane_numbers(at, feature, COUNT: tl.constexpr, P: tl.constexpr):
    """Numbers of `COUNT` bit planes [features]."""
    x = tl.zeros(feature.shape, tl.int32)
    for j in tl.static_range(COUNT):
        byte = tl.load(at + j * P[P_PLANE] + feature // 8, mask=feature < P[P_DIM], other=0).to(tl.int32)
        x += ((byte >> (feature % 8)) & 1) << j
    return x


@triton.jit
def _codes(at, raw, P: tl.constexpr, B: tl.constexpr):
    """Codes int32 [features, 16] of one side of a pack."""
    feature = tl.arange(0, B)
    inside = feature < P[P_DIM]
    low = tl.where(raw, 0, _plane_numbers(at, feature, P[P_BITS], P))
    width = _plane_numbers(at + P[P_BITS] * P[P_PLANE], feature, P[P_WIDTH_BITS], P)
    width = tl.where(inside, tl.where(raw, P[P_BITS], width), 0)
    first = tl.cumsum(width, 0) - width + tl.where(raw, 0, P[P_HEADER] // 2)
    token = tl.arange(0, RUN)
    codes = tl.zeros([B, RUN], tl.int32) + low[:, None]
    bits: tl.constexpr = P[P_BITS]
    for j in tl.static_range(bits):
        word = tl.load(halfwords(at) + first + j, mask=j < width, other=0).to(tl.int32)
        codes += ((word[:, None] >> token[None, :]) & 1) << j
    return codes


@triton.jit
def _terms(meta, M: tl.constexpr):
    """(s, z) float32 [16] of a pack's tokens: x = s (code - z)."""
    token = tl.arange(0, RUN)
    s = tl.exp2((tl.load(meta + M[M_SCALE] + token).to(tl.float32) - SCALE_BIAS) * SCALE_STEP)
    if M[M_KIND] == FITTED:
        z = tl.full([RUN], M[M_CENTER], tl.float32)
    else:
        z = tl.load(meta + M[M_ZERO] + token).to(tl.float32)
    return s, z


@triton.jit
def attend_packs(
    split_ptr,
    terms_ptr,
    sealed_ptr,
    counts_ptr,
    address_ptr,
    chunks_ptr,
    acc_ptr,
    stats_ptr,
    softcap,
    width,
    tiles,
    splits,
    parts,
    part,
    KP: tl.constexpr,
    VP: tl.constexpr,
    KM: tl.constexpr,
    VM: tl.constexpr,
    META_BYTES: tl.constexpr,
    ROOM_BYTES: tl.constexpr,
    NH: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    CAPPED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Partial attention of a tile's queries over the pages split, split + splits, ... of one row.

    Writes acc float32 [NH, DV] and stats [2, NH], as work items do, at (row * parts + part + split) * tiles + tile.
    """
    unit = tl.program_id(0).to(tl.int64)
    tile, row, split = unit % tiles, unit // tiles // splits, unit // tiles % splits
    query = row * tiles + tile
    ROWS: tl.constexpr = NH if FULL else 2 * NH
    i_n, o = tl.arange(0, NH), tl.arange(0, WIDE)
    q = tl.load(split_ptr + query * ROWS * WIDE + tl.arange(0, ROWS)[:, None] * WIDE + o[None, :])
    added = tl.load(terms_ptr + query * 3 * NH + 2 * NH + i_n)
    total = tl.sum(q.to(tl.float32), 1)
    if not FULL:
        total = tl.sum(tl.reshape(total, (2, NH)), 0)
    m = tl.full([NH], NOWHERE, tl.float32)
    l = tl.zeros([NH], tl.float32)  # noqa: E741
    zeros = tl.zeros([NH], tl.float32)
    a = tl.zeros([WIDE_V, NH], tl.float32)
    count = tl.load(counts_ptr + row)
    for page in range(split, count, splits):
        handle = tl.load(sealed_ptr + row * width + page).to(tl.int64)
        for i in range(0, 4):
            where = tl.load(address_ptr + handle * 4 + i)
            room = where >> OFFSET
            base = tl.load(chunks_ptr + (room >> SLOT_BITS)) + (room & SLOT_MASK) * ROOM_BYTES
            pack = (base + (where & OFFSET_MASK) * 8).to(tl.pointer_type(tl.uint8))
            key_size = tl.load(halfwords(pack)).to(tl.int32)
            value_size = tl.load(halfwords(pack) + 1).to(tl.int32)
            at = pack + FRONT + RUN * META_BYTES
            keys = _codes(at, key_size >= RAW, KP, WIDE)  # [WIDE, 16]
            ks, kz = _terms(pack + FRONT, KM)
            if FULL:
                s = tl.dot(q, keys.to(tl.float32), input_precision="ieee")
            else:
                s = tl.sum(tl.reshape(tl.dot(q, keys.to(q.dtype)), (2, NH, RUN)), 0)
            s = (s - total[:, None] * kz[None, :]) * ks[None, :] + added[:, None]
            if CAPPED:
                s = _cap(s, softcap)
            higher = tl.maximum(m, tl.max(s, 1))
            alpha = tl.exp2(m - higher)
            p = tl.exp2(s - (higher - 8.0)[:, None])
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            m = higher
            values = _codes(at + (key_size & (RAW - 1)), value_size >= RAW, VP, WIDE_V)  # [WIDE_V, 16]
            vs, vz = _terms(pack + FRONT, VM)
            p *= vs[None, :]
            zeros = zeros * alpha + tl.sum(p * vz[None, :], 1)
            if FULL:
                weights = tl.permute(p, (1, 0))
                a = tl.dot(values.to(tl.float32), weights, a * alpha[None, :], input_precision="ieee")
            else:
                weights = tl.permute(p.to(tl.float16), (1, 0))
                a = tl.dot(values.to(tl.float16), weights, a * alpha[None, :])
    place = (row * parts + part + split) * tiles + tile
    o_v = tl.arange(0, WIDE_V)
    inside = (o_v < DV)[:, None] & (i_n >= 0)[None, :]
    tl.store(acc_ptr + place * NH * DV + i_n[None, :] * DV + o_v[:, None], a - zeros[None, :], mask=inside)
    tl.store(stats_ptr + place * 2 * NH + i_n, m - 8.0)
    tl.store(stats_ptr + place * 2 * NH + NH + i_n, l)


def warps_of(layout: PageLayout) -> int:
    """Warps of a program: as few as have the registers that a pack's codes take."""
    return 1 if max(layout.key.dim, layout.value.dim) <= 128 else 2


def side_meta(layout: PageLayout, side: str) -> tuple[Any, ...]:
    """How a pack's metadata of one side are read."""
    codec = layout.key if side == "key" else layout.value
    starts = [
        (layout.fields[f"{side}_{name}"][0] - layout.meta_start) // layout.tokens * PACK for name in ("scale", "zero")
    ]
    return (KINDS[codec.kind], codec.center, *starts)


def pack_attention_constants(layout: PageLayout) -> dict[str, Any]:
    """Compile-time arguments of `attend_packs` that follow from a layout."""
    form = pack_format(layout)
    return {
        "KP": pack_constants(form.key),
        "VP": pack_constants(form.value),
        "KM": side_meta(layout, "key"),
        "VM": side_meta(layout, "value"),
        "META_BYTES": (layout.page_bytes - layout.meta_start) // layout.tokens,
        "ROOM_BYTES": room_bytes(layout),
    }


@dataclass
class PlainPages:
    """A layer as the decode kernels of plain pages see it: sealed pages are left out.

    Attributes:
        layouts: the tiers' layouts without packs.
        table: the pages of plain tiers, and the plain pages of sealed ones.
    """

    layouts: list[PageLayout]
    table: PageTable
    pool: SealingPool
    basis: Basis

    @property
    def rows(self) -> int:
        return self.table.lengths.shape[0]


@dataclass
class SealedPages:
    """The sealed pages of one tier.

    Attributes:
        handles: int32 [rows, width], numbers of handles, of which each row has the first `counts`, int32 [rows].
    """

    layout: PageLayout
    cls: int
    handles: Tensor
    counts: Tensor


@dataclass
class PackPlan:
    """What a decode step over packs needs beside the plan of the plain pages; made anew when the pages change."""

    plain: PlainPages
    sealed: list[SealedPages]

    @classmethod
    def of(cls, packed: PackedLayer) -> PackPlan:
        """The pages of a layer as they are now."""
        pool, table = packed.pool, packed.table
        assert isinstance(pool, SealingPool)
        own = PageTable.of(torch.zeros_like(table.ids), table.lengths.clone())
        sealed = []
        for tier, (number, layout) in enumerate(zip(packed.classes, packed.layouts, strict=True)):
            ids, row, index = table.pages(tier, packed.page_counts(tier))
            if number >= 0:
                own.write(tier, row, index, ids)
                continue
            numbers = pool.numbers(ids)
            address = pool.addresses(number)[numbers]
            is_sealed = address[:, 1] != NOTHING
            handles, counts = _by_row(numbers, row, is_sealed, packed.rows, table.ids.shape[1])
            sealed.append(SealedPages(layout, number, handles, counts))
            plain, _ = _by_row(address[:, 0].int(), row, ~is_sealed, packed.rows, table.ids.shape[1])
            index = torch.arange(table.ids.shape[1], device=row.device).expand(packed.rows, -1)
            own.lengths[:, tier] -= BLOCK * counts
            held = index < own.page_counts(tier, BLOCK)[:, None]
            row, index = held.nonzero(as_tuple=True)
            own.write(tier, row, index, plain[held])
        layouts = [replace(layout, pack=None) for layout in packed.layouts]
        return cls(PlainPages(layouts, own, pool, packed.basis), sealed)

    @property
    def nbytes(self) -> int:
        tensors = [x for sealed in self.sealed for x in (sealed.handles, sealed.counts)]
        return self.plain.table.nbytes + sum(x.nbytes for x in tensors)

    def splits(self, plan: StepPlan) -> int:
        """Programs of a row and a tile, for each sealed tier."""
        return max(1, min(LARGEST_SPLIT, plan.programs // (plan.rows * plan.tiles)))

    def parts(self, plan: StepPlan) -> int:
        """Partial results of a row and a tile."""
        return self.splits(plan) * len(self.sealed)

    def reserve(self, plan: StepPlan) -> None:
        """Room for the partial results, behind those of the plan's own items."""
        units = plan.count * plan.tiles + plan.rows * plan.tiles * self.parts(plan)
        plan.space.reserve(acc=units * COLUMNS * plan.layouts[0].value.dim, stats=units * COLUMNS * 2)

    def attend(self, plan: StepPlan, split: Tensor, softcap: float, capped: bool) -> tuple[Tensor, Tensor]:
        """Partial results of all sealed pages -> (acc, stats), behind those of the plan's items."""
        pool, first = self.plain.pool, plan.count * plan.tiles * COLUMNS
        value_dim = plan.layouts[0].value.dim
        acc, stats = plan.space.acc[first * value_dim :], plan.space.stats[first * 2 :]
        splits, full = self.splits(plan), plan.dtype == torch.float32
        for i, sealed in enumerate(self.sealed):
            attend_packs[(plan.rows * splits * plan.tiles,)](
                split, plan.space.terms, sealed.handles, sealed.counts, pool.addresses(sealed.cls),
                pool.chunk_addresses, acc, stats, softcap, sealed.handles.shape[1],
                plan.tiles, splits, self.parts(plan), i * splits, **pack_attention_constants(sealed.layout),
                NH=COLUMNS, DV=value_dim, WIDE=row_entries(sealed.layout.key.dim), WIDE_V=row_entries(value_dim),
                CAPPED=capped, FULL=full, num_warps=warps_of(sealed.layout),
            )  # fmt: skip
        return acc, stats


def _by_row(x: Tensor, row: Tensor, chosen: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """The chosen of x [n], row by row, in front: (int32 [rows, width], counts int32 [rows])."""
    x, row = x[chosen], row[chosen]
    counts = torch.zeros(rows, dtype=torch.int64, device=x.device).index_add_(0, row, torch.ones_like(row))
    rank = torch.arange(row.numel(), device=x.device) - (counts.cumsum(0) - counts)[row]
    out = torch.zeros(rows, width, dtype=torch.int32, device=x.device)
    out[row, rank] = x.int()
    return out, counts.int()


assert PACKS == 4
