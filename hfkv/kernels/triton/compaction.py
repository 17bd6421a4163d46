"""Compaction of many rows at once: the kernels of `hfkv.kernels.compaction` and of `PackedRows.apply`.

The steps, each one launch over all rows of all layers of a flush; prefix sums between them are torch's:

    copy      shared pages that are to change, to pages of the row's own
    rescore   new scores into the pages
    move      tier 1: fill holes from the tail              (its sources lie behind what the rows keep: no conflicts)
    clear     tier 1: no metadata behind what the rows keep
    exchange  pages that rows give back to the ring, pages that they need anew from it, tier 1 before tier 0, so that
              no page that tier 0 gives back is written before it has been read
    recode    demoted tokens: out of tier 0 into tier 1
    move      tier 0
    clear     tier 0
    pack      incoming tokens (`quantize_pack`)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfkv.kernels.triton.constants import AFFINE, DTYPES, EXACT, LARGEST_HALF, MINMAX, SLOT_BITS, SLOT_MASK
from hfkv.kernels.triton.launch import launches
from hfkv.kernels.triton.quantize_pack import (
    TierPages,
    byte_offset,
    features_of,
    page_address,
    page_constants,
    quantise,
    scale_of,
    side_constants,
    store_vectors,
)

BYTES = tl.constexpr(64)  # bytes of a token that a program moves at once
RECODED = 16


# ---- where tokens go: prefix sums, no synchronisation ------------------------------------------------------------


def hole_sources(stay: Tensor) -> Tensor:
    """Which slot fills which hole: stay bool [rows, slots] -> int32 [rows, slots], -1 where nothing moves to.

    The moves of the twin's `hole_moves`, by destination.
    """
    rows, width = stay.shape
    slot = torch.arange(width, dtype=torch.int32, device=stay.device).expand(rows, -1)
    inside = slot < stay.sum(1, keepdim=True)
    mover, hole = stay & ~inside, ~stay & inside
    rank = torch.where(mover, mover.cumsum(1) - 1, width)
    sources = slot.new_zeros(rows, width + 1).scatter_(1, rank, slot)
    return torch.where(hole, sources.gather(1, (hole.cumsum(1) - 1).clamp_min(0)), -1)


def ranked(chosen: Tensor, first: Tensor) -> Tensor:
    """Slots for the chosen tokens, one after the other from `first` [rows] on: int32 [rows, n], -1 for the others."""
    return torch.where(chosen, chosen.cumsum(1) - 1 + first[:, None], -1).int()


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["width", "slots"])
def rescore_kernel(
    scores, table, width, addresses, lengths, slots,
    TIER: tl.constexpr, TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, SCORE: tl.constexpr, BIRTH: tl.constexpr,
):  # fmt: skip
    """Grid (rows, pages): scores float32 [rows, slots] into the filled slots."""
    row, page = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, TOKENS)
    slot = page * TOKENS + inside
    ok = slot < tl.load(lengths + row * 2 + TIER)
    base = page_address(table, width, addresses, row, slot // TOKENS, ok, TIER, PAGE_BYTES)
    score = tl.minimum(tl.load(scores + row.to(tl.int64) * slots + slot, mask=ok, other=0.0), LARGEST_HALF)
    tl.store((base + SCORE + inside * 2).to(tl.pointer_type(tl.float16)), score.to(tl.float16), mask=ok)


@triton.jit(do_not_specialize=["width", "slots"])
def read_kernel(
    scores, births, table, width, addresses, lengths, slots,
    TIER: tl.constexpr, TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, SCORE: tl.constexpr, BIRTH: tl.constexpr,
):  # fmt: skip
    """Grid (rows, pages): scores float32 and births int64 [rows, slots] out of the pages, 0 in free slots."""
    row, page = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, TOKENS)
    slot = page * TOKENS + inside
    ok = slot < tl.load(lengths + row * 2 + TIER)
    base = page_address(table, width, addresses, row, slot // TOKENS, ok, TIER, PAGE_BYTES)
    score = tl.load((base + SCORE + inside * 2).to(tl.pointer_type(tl.float16)), mask=ok, other=0.0)
    birth = tl.load((base + BIRTH + inside * 4).to(tl.pointer_type(tl.int32)), mask=ok, other=0)
    place = row.to(tl.int64) * slots + slot
    tl.store(scores + place, score.to(tl.float32))
    tl.store(births + place, birth.to(tl.int64))


@triton.jit
def copy_words(source, target, ok, BYTES_EACH: tl.constexpr):
    """One number of 1, 2 or 4 bytes per token."""
    if BYTES_EACH == 1:
        data = tl.load(source.to(tl.pointer_type(tl.uint8)), mask=ok, other=0)
        tl.store(target.to(tl.pointer_type(tl.uint8)), data, mask=ok)
    if BYTES_EACH == 2:
        data2 = tl.load(source.to(tl.pointer_type(tl.int16)), mask=ok, other=0)
        tl.store(target.to(tl.pointer_type(tl.int16)), data2, mask=ok)
    if BYTES_EACH == 4:
        data4 = tl.load(source.to(tl.pointer_type(tl.int32)), mask=ok, other=0)
        tl.store(target.to(tl.pointer_type(tl.int32)), data4, mask=ok)


@triton.jit
def copy_vectors(source, target, ok, PIECES: tl.constexpr, PIECE: tl.constexpr, STRIDE: tl.constexpr):
    """The vector of every token: PIECES runs of PIECE bytes, STRIDE bytes apart."""
    for first in range(0, PIECES * PIECE, BYTES):
        byte = first + tl.arange(0, BYTES)
        mask = ok[:, None] & (byte < PIECES * PIECE)[None, :]
        offset = (byte // PIECE * STRIDE + byte % PIECE)[None, :]
        data = tl.load((source[:, None] + offset).to(tl.pointer_type(tl.uint8)), mask=mask, other=0)
        tl.store((target[:, None] + offset).to(tl.pointer_type(tl.uint8)), data, mask=mask)


@triton.jit
def clear_words(at, free, BYTES_EACH: tl.constexpr):
    """The same numbers to 0."""
    if BYTES_EACH == 1:
        tl.store(at.to(tl.pointer_type(tl.uint8)), tl.zeros(at.shape, tl.uint8), mask=free)
    if BYTES_EACH == 2:
        tl.store(at.to(tl.pointer_type(tl.int16)), tl.zeros(at.shape, tl.int16), mask=free)
    if BYTES_EACH == 4:
        tl.store(at.to(tl.pointer_type(tl.int32)), tl.zeros(at.shape, tl.int32), mask=free)


@triton.jit(do_not_specialize=["width", "slots"])
def move_kernel(
    sources, table, width, addresses, slots,
    TIER: tl.constexpr, TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, SCORE: tl.constexpr, BIRTH: tl.constexpr,
    KEY_ROW: tl.constexpr, VALUE: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_ELEMENT: tl.constexpr,
    KEY_SCALE: tl.constexpr, KEY_SCALE_BYTES: tl.constexpr, VALUE_SCALE: tl.constexpr, VALUE_SCALE_BYTES: tl.constexpr,
    KEY_ZERO: tl.constexpr, KEY_ZERO_BYTES: tl.constexpr, VALUE_ZERO: tl.constexpr, VALUE_ZERO_BYTES: tl.constexpr,
    SCORE_BYTES: tl.constexpr, BIRTH_BYTES: tl.constexpr,
):  # fmt: skip
    """Grid (rows, pages): sources int32 [rows, slots], the slot whose token comes to each slot of the page."""
    row, page = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, TOKENS)
    source = tl.load(sources + row.to(tl.int64) * slots + page * TOKENS + inside)
    if tl.max(source, 0) >= 0:
        ok = source >= 0
        target_base = page_address(table, width, addresses, row, page + inside * 0, ok, TIER, PAGE_BYTES)
        source_base = page_address(table, width, addresses, row, source // TOKENS, ok, TIER, PAGE_BYTES)
        from_slot = source % TOKENS
        copy_vectors(source_base + from_slot * KEY_ROW, target_base + inside * KEY_ROW, ok, 1, KEY_ROW, KEY_ROW)
        copy_vectors(
            source_base + VALUE + from_slot * VALUE_ELEMENT, target_base + VALUE + inside * VALUE_ELEMENT, ok,
            VALUE_ROWS, VALUE_ELEMENT, TOKENS * VALUE_ELEMENT,
        )  # fmt: skip
        copy_words(
            source_base + KEY_SCALE + from_slot * KEY_SCALE_BYTES,
            target_base + KEY_SCALE + inside * KEY_SCALE_BYTES, ok, KEY_SCALE_BYTES,
        )  # fmt: skip
        copy_words(
            source_base + VALUE_SCALE + from_slot * VALUE_SCALE_BYTES,
            target_base + VALUE_SCALE + inside * VALUE_SCALE_BYTES, ok, VALUE_SCALE_BYTES,
        )  # fmt: skip
        copy_words(
            source_base + KEY_ZERO + from_slot * KEY_ZERO_BYTES,
            target_base + KEY_ZERO + inside * KEY_ZERO_BYTES, ok, KEY_ZERO_BYTES,
        )  # fmt: skip
        copy_words(
            source_base + VALUE_ZERO + from_slot * VALUE_ZERO_BYTES,
            target_base + VALUE_ZERO + inside * VALUE_ZERO_BYTES, ok, VALUE_ZERO_BYTES,
        )  # fmt: skip
        copy_words(
            source_base + SCORE + from_slot * SCORE_BYTES, target_base + SCORE + inside * SCORE_BYTES, ok, SCORE_BYTES
        )
        copy_words(
            source_base + BIRTH + from_slot * BIRTH_BYTES, target_base + BIRTH + inside * BIRTH_BYTES, ok, BIRTH_BYTES
        )


@triton.jit(do_not_specialize=["width"])
def clear_kernel(
    kept, counts, needed, table, width, addresses,
    TIER: tl.constexpr, TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, SCORE: tl.constexpr, BIRTH: tl.constexpr,
    META: tl.constexpr, ZERO_START: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr, KZ: tl.constexpr,
    VZ: tl.constexpr, SB: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Grid (rows, pages): metadata of slots from `kept` on becomes 0; of pages given back, all that must be zero."""
    row, page = tl.program_id(0), tl.program_id(1)
    stays = tl.load(kept + row)
    if (page < tl.load(counts + row)) & (stays < (page + 1) * TOKENS):
        one = tl.zeros((TOKENS,), tl.int32) + page
        inside = tl.arange(0, TOKENS)
        base = page_address(table, width, addresses, row, one, inside >= 0, TIER, PAGE_BYTES)
        if page >= tl.load(needed + row):
            for first in range(ZERO_START, PAGE_BYTES, TOKENS):  # both are multiples of TOKENS bytes
                tl.store((base + first + inside).to(tl.pointer_type(tl.uint8)), (one * 0).to(tl.uint8))
        else:
            free = page * TOKENS + inside >= stays
            at = base + META
            clear_words(at + inside * KS, free, KS)
            clear_words(at + TOKENS * KS + inside * VS, free, VS)
            clear_words(at + TOKENS * (KS + VS) + inside * KZ, free, KZ)
            clear_words(at + TOKENS * (KS + VS + KZ) + inside * VZ, free, VZ)
            clear_words(base + SCORE + inside * SB, free, SB)
            clear_words(base + BIRTH + inside * BB, free, BB)


@triton.jit(do_not_specialize=["width", "size"])
def release_kernel(
    counts, needed, first_freed, table, width, ring, size, pointers, used,
    TIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the pages that a row no longer needs go to the tail of the ring."""
    row = tl.program_id(0)
    need = tl.load(needed + row)
    freed = tl.load(counts + row) - need
    tail = tl.load(pointers + 1) + tl.load(first_freed + row)
    for first in range(0, freed, BLOCK):
        i = first + tl.arange(0, BLOCK)
        ok = i < freed
        column = need + i if TIER == 0 else width - 1 - need - i
        number = tl.load(table + row.to(tl.int64) * width + column, mask=ok, other=0)
        tl.store(ring + (tail + i) % size, number, mask=ok)
        tl.atomic_add(used + (number >> SLOT_BITS), -1, mask=ok)


@triton.jit(do_not_specialize=["width", "size"])
def allocate_kernel(
    counts, needed, first_new, table, width, ring, size, pointers, used,
    TIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the pages that a row needs anew come from the head of the ring, into the new table."""
    row = tl.program_id(0)
    have = tl.load(counts + row)
    new = tl.load(needed + row) - have
    head = tl.load(pointers) + tl.load(first_new + row)
    for first in range(0, new, BLOCK):
        i = first + tl.arange(0, BLOCK)
        ok = i < new
        column = have + i if TIER == 0 else width - 1 - have - i
        number = tl.load(ring + (head + i) % size, mask=ok, other=0)
        tl.store(table + row.to(tl.int64) * width + column, number, mask=ok)
        tl.atomic_add(used + (number >> SLOT_BITS), 1, mask=ok)


@triton.jit(do_not_specialize=["width", "slots", "size", "pages"])
def copy_kernel(
    ranks, old_table, new_table, width, addresses, extra, slots, ring, size, pointers, used, pages,
    TIER: tl.constexpr, PAGE_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, pages): ranks int32 [rows, pages], which page from the head of the ring a page is copied to."""
    row, page = tl.program_id(0), tl.program_id(1)
    rank = tl.load(ranks + row.to(tl.int64) * pages + page)
    if rank >= 0:
        place = row.to(tl.int64) * width + (page if TIER == 0 else width - 1 - page)
        old, new = tl.load(old_table + place), tl.load(ring + (tl.load(pointers) + rank) % size)
        source = tl.load(addresses + (old >> SLOT_BITS)) + (old & SLOT_MASK).to(tl.int64) * PAGE_BYTES
        target = tl.load(addresses + (new >> SLOT_BITS)) + (new & SLOT_MASK).to(tl.int64) * PAGE_BYTES
        for first in range(0, PAGE_BYTES // 8, BLOCK):
            word = first + tl.arange(0, BLOCK)
            data = tl.load((source + word * 8).to(tl.pointer_type(tl.int64)), mask=word < PAGE_BYTES // 8, other=0)
            tl.store((target + word * 8).to(tl.pointer_type(tl.int64)), data, mask=word < PAGE_BYTES // 8)
        tl.store(new_table + place, new)
        tl.atomic_add(used + (new >> SLOT_BITS), 1)
        tl.atomic_add(extra + (old >> SLOT_BITS).to(tl.int64) * slots + (old & SLOT_MASK), -1)


@triton.jit
def load_vectors(
    base, inside, ok, feature, real, element,
    KIND: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    START: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, ELEMENT: tl.constexpr, TOKENS: tl.constexpr,
    VALUE: tl.constexpr,
):  # fmt: skip
    """Packed tokens -> float32 [n, columns], 0 where not `real`."""
    mask = ok[:, None] & real[None, :]
    if KIND == EXACT:
        at = base[:, None] + START + byte_offset(inside, feature, ROWS, TOKENS, VALUE) * ELEMENT
        x = tl.load(at.to(tl.pointer_type(element)), mask=mask, other=0.0).to(tl.float32)
    else:
        if BITS == 3:
            low_width: tl.constexpr = PADDED // 4
            high_width: tl.constexpr = PADDED // 8
            at = base[:, None] + START + byte_offset(inside, feature % low_width, ROWS, TOKENS, VALUE)
            low = tl.load(at.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int32)
            at = base[:, None] + START + byte_offset(inside, low_width + feature % high_width, ROWS, TOKENS, VALUE)
            high = tl.load(at.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int32)
            low = (low >> (feature // low_width * 2)[None, :]) & 3
            levels = low | (((high >> (feature // high_width)[None, :]) & 1) << 2)
        else:
            plane: tl.constexpr = PADDED * BITS // 8
            at = base[:, None] + START + byte_offset(inside, feature % plane, ROWS, TOKENS, VALUE)
            code = tl.load(at.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int32)
            levels = (code >> (feature // plane * BITS)[None, :]) & (2**BITS - 1)
        if SIGNED:
            levels = (levels ^ 128) - 128  # as int8
        shift: tl.constexpr = 128 if SIGNED else 0
        if KIND == MINMAX:
            scale = tl.load((base + SCALE + inside * 2).to(tl.pointer_type(tl.float16)), mask=ok, other=0.0)
            low_end = tl.load((base + ZERO + inside * 2).to(tl.pointer_type(tl.float16)), mask=ok, other=0.0)
            s = scale.to(tl.float32)
            s = tl.where(s > 0, s, 1.0)
            z = -tl.div_rn(low_end.to(tl.float32), s) - shift
        else:
            s = scale_of(
                tl.load((base + SCALE + inside).to(tl.pointer_type(tl.uint8)), mask=ok, other=0).to(tl.float32)
            )
            if KIND == AFFINE:
                zero = tl.load((base + ZERO + inside).to(tl.pointer_type(tl.uint8)), mask=ok, other=0)
                z = zero.to(tl.float32) - shift
            else:
                z = tl.zeros_like(s) + (2**BITS - 1) / 2 - shift
        x = tl.where(mask, s[:, None] * (levels.to(tl.float32) - z[:, None]), 0.0)
    return x


@triton.jit(do_not_specialize=["old_width", "new_width", "slots"])
def recode_kernel(
    slots_of, old_table, new_table, old_width, new_width, addresses, slots, flags,
    element: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr, VALUE: tl.constexpr, DIM: tl.constexpr,
    F_TOKENS: tl.constexpr, F_PAGE_BYTES: tl.constexpr, F_SCORE: tl.constexpr, F_BIRTH: tl.constexpr,
    F_KIND: tl.constexpr, F_BITS: tl.constexpr, F_SIGNED: tl.constexpr, F_PADDED: tl.constexpr, F_ROWS: tl.constexpr,
    F_START: tl.constexpr, F_SCALE: tl.constexpr, F_ZERO: tl.constexpr, F_ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, SCORE: tl.constexpr, BIRTH: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, TOP: tl.constexpr, BOUND: tl.constexpr, UNBIASED: tl.constexpr, SIGNED: tl.constexpr,
    GAUSS: tl.constexpr, PADDED: tl.constexpr, SLICES: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    ROWS: tl.constexpr, ELEMENT: tl.constexpr, START: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of slots of tier 0): slots_of int32 [rows, slots], the slot in tier 1 that a token goes to."""
    row = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(slots_of + row.to(tl.int64) * slots + slot)
    if tl.max(target, 0) >= 0:
        ok = target >= 0
        inside = slot % F_TOKENS
        base = page_address(old_table, old_width, addresses, row, slot // F_TOKENS, ok, 0, F_PAGE_BYTES)
        new_inside = target % TOKENS
        new_base = page_address(new_table, new_width, addresses, row, target // TOKENS, ok, 1, PAGE_BYTES)
        feature, real = features_of(SLICES, W, WP, DIM)
        x = load_vectors(
            base, inside, ok, feature, real, element, F_KIND, F_BITS, F_SIGNED, F_PADDED, F_ROWS, F_START, F_SCALE,
            F_ZERO, F_ELEMENT, F_TOKENS, VALUE,
        )  # fmt: skip
        codes, scale, zero, flag = quantise(x, real[None, :], KIND, TOP, BOUND, UNBIASED, GAUSS, DIM)
        found = tl.max(tl.where(ok, flag, 0), 0)
        if found > 0:
            tl.atomic_or(flags, found)
        store_vectors(
            new_base, new_inside, ok, codes, scale, zero, feature, real, element, KIND, BITS, SIGNED, SLICES, W, WP,
            ROWS, START, SCALE, ZERO, ELEMENT, TOKENS, VALUE,
        )  # fmt: skip
        if SCORED:
            copy_words(base + F_SCORE + inside * 2, new_base + SCORE + new_inside * 2, ok, 2)
            copy_words(base + F_BIRTH + inside * 4, new_base + BIRTH + new_inside * 4, ok, 4)


# ---- launches ----------------------------------------------------------------------------------------------------


@launches
def write_scores(pages: TierPages, lengths: Tensor, scores: Tensor) -> None:
    """New scores float32 [rows, slots] into the filled slots; lengths int32 [rows, 2]."""
    rows, slots = scores.shape
    if slots and pages.layout.scored:
        rescore_kernel[(rows, slots // pages.layout.tokens)](
            scores.contiguous(), pages.ids, pages.ids.shape[1], pages.addresses, lengths, slots, TIER=pages.tier,
            **page_constants(pages.layout), num_warps=2,
        )  # fmt: skip


@launches
def read_scores(pages: TierPages, lengths: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Scores float32 and births int64 [rows, slots], 0 in free slots; `slots` is a multiple of the page's tokens."""
    rows = lengths.shape[0]
    scores = torch.empty(rows, slots, device=lengths.device)
    births = torch.empty(rows, slots, dtype=torch.int64, device=lengths.device)
    if slots:
        read_kernel[(rows, slots // pages.layout.tokens)](
            scores, births, pages.ids, pages.ids.shape[1], pages.addresses, lengths, slots, TIER=pages.tier,
            **page_constants(pages.layout), num_warps=2,
        )  # fmt: skip
    return scores, births


@launches
def move_tokens(pages: TierPages, sources: Tensor) -> None:
    """Copy tokens inside their rows: sources int32 [rows, slots], from `hole_sources`."""
    layout, (rows, slots) = pages.layout, sources.shape
    if not slots:
        return
    fields = {name: start for name, (start, _) in layout.fields.items()}
    sizes = {name: (stop - start) // layout.tokens for name, (start, stop) in layout.fields.items()}
    constants = {name.upper(): fields[name] for name in ("key_scale", "value_scale", "key_zero", "value_zero")}
    constants |= {f"{name.upper()}_BYTES": sizes[name] for name in sizes if name not in ("key", "value")}
    move_kernel[(rows, slots // layout.tokens)](
        sources, pages.ids, pages.ids.shape[1], pages.addresses, slots, TIER=pages.tier, **page_constants(layout),
        KEY_ROW=sizes["key"], VALUE=fields["value"], VALUE_ROWS=layout.value.rows, VALUE_ELEMENT=layout.value.element,
        **constants, num_warps=4,
    )  # fmt: skip


@launches
def clear_slots(pages: TierPages, kept: Tensor, counts: Tensor, needed: Tensor, most: int) -> None:
    """Zero what free slots must not hold: behind `kept` in pages that stay, everything in pages that go.

    Args:
        kept, counts, needed: int64 [rows]: tokens that stay, pages so far, pages from now on.
        most: at least the largest of `counts`.
    """
    layout, rows = pages.layout, kept.shape[0]
    if not most:
        return
    sizes = [
        (layout.fields[name][1] - layout.fields[name][0]) // layout.tokens
        for name in ("key_scale", "value_scale", "key_zero", "value_zero", "score", "birth")
    ]
    clear_kernel[(rows, most)](
        kept, counts, needed, pages.ids, pages.ids.shape[1], pages.addresses, TIER=pages.tier,
        **page_constants(layout), META=layout.meta_start, ZERO_START=layout.zero_start,
        **dict(zip(("KS", "VS", "KZ", "VZ", "SB", "BB"), sizes, strict=True)), num_warps=2,
    )  # fmt: skip


@launches
def copy_pages(
    old: TierPages, new: Tensor, copied: Tensor, extra: Tensor, ring: Tensor, pointers: Tensor, used: Tensor
) -> None:
    """Copy pages to such from the ring, which take their places in the table `new`, int32 [rows, width].

    Args:
        old: the pages so far.
        copied: bool [rows, pages], those that are copied.
        extra: int32 [chunks, slots], owners of every page beyond its first; a page that is copied loses one.
        ring, pointers, used: as in `exchange_pages`.
    """
    total = copied.flatten().cumsum(0)
    ranks = torch.where(copied, total.view(copied.shape) - 1, -1).int()
    copy_kernel[copied.shape](
        ranks, old.ids, new, new.shape[1], old.addresses, extra, extra.shape[1], ring, ring.shape[0], pointers, used,
        copied.shape[1], TIER=old.tier, PAGE_BYTES=old.layout.page_bytes, BLOCK=512, num_warps=4,
    )  # fmt: skip
    pointers[0] += total[-1]


@launches
def exchange_pages(
    tier: int, old: Tensor, new: Tensor, counts: Tensor, needed: Tensor, ring: Tensor, pointers: Tensor, used: Tensor
) -> None:
    """Pages that rows give back go to the ring, then what rows need anew comes from it.

    Args:
        old, new: int32 [rows, width], page tables before and after.
        counts, needed: int64 [rows], pages before and after.
        ring: int32 [size]; pointers: int64 [2], head and tail, which are moved on; used: int32 [chunks].
    """
    for kernel, table, change, end in (
        (release_kernel, old, counts - needed, 1),
        (allocate_kernel, new, needed - counts, 0),
    ):
        change = change.clamp_min(0)
        total = change.cumsum(0)
        kernel[(counts.shape[0],)](
            counts, needed, total - change, table, table.shape[1], ring, ring.shape[0], pointers, used, TIER=tier,
            BLOCK=32, num_warps=1,
        )  # fmt: skip
        pointers[end] += total[-1]


@launches
def recode_tokens(old: TierPages, new: TierPages, slots_of: Tensor, flags: Tensor) -> None:
    """Take tokens of tier 0 over into tier 1: unpack, quantise, pack.

    Args:
        old, new: pages of tier 0 before, of tier 1 after the exchange.
        slots_of: int32 [rows, slots of tier 0], the slot in tier 1 that a token goes to, -1 for none.
        flags: int32 [1], as in `pack_rows`.
    """
    rows, slots = slots_of.shape
    if not slots:
        return
    for side in ("key", "value"):
        source, target = getattr(old.layout, side), getattr(new.layout, side)
        dtype = target.dtype if target.kind == "exact" else source.dtype
        names = ("KIND", "BITS", "SIGNED", "PADDED", "ROWS", "START", "SCALE", "ZERO", "ELEMENT")
        given = {**page_constants(old.layout), **side_constants(old.layout, side)}
        given = {f"F_{name}": given[name] for name in (*page_constants(old.layout), *names)}
        recode_kernel[(rows, slots // RECODED)](
            slots_of, old.ids, new.ids, old.ids.shape[1], new.ids.shape[1], old.addresses, slots, flags,
            element=DTYPES[dtype], SCORED=new.layout.scored and side == "key", BLOCK=RECODED, VALUE=side == "value",
            DIM=source.dim, **given, **page_constants(new.layout), **side_constants(new.layout, side), num_warps=4,
        )  # fmt: skip
