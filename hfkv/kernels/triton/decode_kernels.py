"""Decode attention on packed pages and the exact window: the kernels. `decode_attention` launches them.

Every program takes one work item (see `hfkv.kernels.triton.work`): some pages of one row in one tier, or some of its
window. A program's warps take a page each, all at once, as one batched product: no warp waits for
another before the item's end. Logits are in units of log2. Per page, with byte codes,

    s = A (ks (q . code - kz S) + c)        acc += code (p vs)        z += p vs vz

where A is the scale of the int8 query, S its sum and c its product with the mean key; the item's result is acc - z.
Scores stay in units of A until their exponent is taken. The query is two int8 (or model dtype) numbers per entry, high
and low, as rows of one 16-row operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.pages import (
    DENORMAL,
    SCALE_UNIT,
    byte_floats,
    byte_ints,
    byte_pointers,
    byte_twelfths,
    codes_float,
    codes_int8,
    denormal,
    denormal_halves,
    denormal_quarters,
    load_key_tops,
    load_keys,
    load_meta,
    load_value_tops,
    load_value_zeros,
    load_values,
    page_addresses,
    product_order,
    to_code_order,
    to_product_order,
)

NOWHERE = tl.constexpr(-1e30)
"""Maximum of no logits; finite, so that differences stay numbers."""

WINDOW_STEP = tl.constexpr(16)
"""Tokens of the window that a warp takes at once; 32 would spill."""

LOG2E = tl.constexpr(1.4426950408889634)
ITEM_FIELDS = tl.constexpr(4)
"""Of a work item: row, tier (the window is the last), first page or window step, how many."""

ZERO_ROWS = tl.constexpr(16)
"""Rows of a product's operand; the zeros of values fill them all."""

INT8_TOP = tl.constexpr(127.0 * 256)
"""Top of a query's codes: 256 features, the most there are, times 255, the most of a code less its zero, fit int32."""

LANE_SUMS = tl.constexpr(8)
"""Sums of weights that a query has until its item's end: columns of one number modulo 8 lie in one lane."""


# ---- before: the query as the pages' operands -----------------------------------------------------------------------


@triton.jit
def prepare_queries(
    q_ptr,
    rotation_ptr,
    mean_ptr,
    whole_ptr,
    split_ptr,
    terms_ptr,
    scale,
    heads,
    queries,
    columns,
    tiles,
    stride_batch,
    stride_head,
    stride_query,
    NH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    CODED: tl.constexpr,
    SPLIT: tl.constexpr,
    FULL: tl.constexpr,
):
    """Scale, rotate and split the queries of a tile.

    Writes per tile: `whole` int8 [2 NH, WIDE] where CODED, `split` in the model's dtype [2 NH, WIDE] (float32
    [NH, WIDE] where FULL) where SPLIT, `terms` float32 [3, NH]: A, S in units of A, c.
    """
    unit = tl.program_id(0).to(tl.int64)
    row, tile = unit // tiles, unit % tiles
    n = tile * NH + tl.arange(0, NH)
    o = tl.arange(0, WIDE)
    start = (row // heads) * stride_batch + (row % heads) * (columns // queries) * stride_head
    start += (n // queries) * stride_head + (n % queries) * stride_query
    real = (n < columns)[:, None]
    if rotation_ptr is not None:
        x = tl.zeros([NH, WIDE], tl.float32)
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            part = tl.load(q_ptr + start[:, None] + d[None, :], mask=real & (d < D)[None, :], other=0.0)
            turn = tl.load(
                rotation_ptr + d[:, None] * D + o[None, :], mask=(d < D)[:, None] & (o < D)[None, :], other=0.0
            )
            x = tl.dot(part.to(tl.float32), turn, x, input_precision="ieee")
    else:
        x = tl.load(q_ptr + start[:, None] + o[None, :], mask=real & (o < D)[None, :], other=0.0).to(tl.float32)
    x *= scale
    added = tl.zeros([NH], tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row * D + o, mask=o < D, other=0.0)
        added = tl.sum(x * mean[None, :], 1)
    i = tl.arange(0, NH)
    unsplit = tl.full([NH], 1.0, tl.float32)
    total = tl.sum(x, 1)
    if SPLIT:
        if FULL:
            tl.store(split_ptr + unit * NH * WIDE + i[:, None] * WIDE + o[None, :], x)
        else:
            high = x.to(split_ptr.dtype.element_ty)
            low = (x - high.to(tl.float32)).to(split_ptr.dtype.element_ty)
            at = split_ptr + unit * 2 * NH * WIDE + i[:, None] * WIDE + o[None, :]
            tl.store(at, high)
            tl.store(at + NH * WIDE, low)
    if CODED and not FULL:
        top = tl.maximum(tl.max(tl.abs(x), 1), 1e-20)
        code = tl.floor(x * (1.0 / top * INT8_TOP)[:, None] + 0.5).to(tl.int32)
        high8 = (code + 128) >> 8
        at8 = whole_ptr + unit * 2 * NH * WIDE + i[:, None] * WIDE + o[None, :]
        tl.store(at8, high8.to(tl.int8))
        tl.store(at8 + NH * WIDE, (code - (high8 << 8)).to(tl.int8))
        unsplit = top / INT8_TOP
        total = tl.sum(code, 1).to(tl.float32)  # of what is multiplied, so that large zeros cancel
    tl.store(terms_ptr + unit * 3 * NH + i, unsplit)
    tl.store(terms_ptr + unit * 3 * NH + NH + i, total)
    tl.store(terms_ptr + unit * 3 * NH + 2 * NH + i, added)


# ---- the work items -------------------------------------------------------------------------------------------------


@triton.jit
def decode_items(
    q_ptr,
    whole_ptr,
    split_ptr,
    terms_ptr,
    ids_ptr,
    lengths_ptr,
    chunks_ptr,
    items_ptr,
    window_k_ptr,
    window_v_ptr,
    counts_ptr,
    acc_ptr,
    stats_ptr,
    scale,
    softcap,
    table_width,
    heads,
    queries,
    columns,
    tiles,
    capacity,
    stride_batch,
    stride_head,
    stride_query,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    NH: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    CAPPED: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
    STAGES_LOW: tl.constexpr,
    W: tl.constexpr,
):
    """Partial attention of one item and one tile of queries.

    A loop over several items would let the compiler hoist every branch's addresses out of it, at 255 registers.

    Writes per item and tile: acc float32 [NH, DV], stats float32 [2, NH]: the reference that exponents were taken to,
    and the sum of exponentials.
    """
    item, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    entry = items_ptr + item * ITEM_FIELDS
    row, tier = tl.load(entry), tl.load(entry + 1)
    first, count = tl.load(entry + 2), tl.load(entry + 3)
    query = row.to(tl.int64) * tiles + tile
    whole, split = whole_ptr + query * 2 * NH * WIDE, split_ptr + query * (1 if FULL else 2) * NH * WIDE
    terms = terms_ptr + query * 3 * NH
    if count == 0:
        _, stats = _partial(acc_ptr, stats_ptr, NH, DV)
        tl.store(stats + tl.arange(0, NH), tl.full([NH], NOWHERE, tl.float32))
        tl.store(stats + NH + tl.arange(0, NH), tl.zeros([NH], tl.float32))
    elif tier == 0:
        _attend_pages(
            whole, split, terms, ids_ptr + row.to(tl.int64) * table_width + first,
            tl.load(lengths_ptr + row * 2) - first * HIGH.tokens, count, chunks_ptr, acc_ptr, stats_ptr, softcap,
            HIGH, 1, NH, DV, WIDE, CAPPED, FULL, STAGES, W,
        )  # fmt: skip
    else:
        if LOW is not None and tier == 1:
            _attend_pages(
                whole, split, terms, ids_ptr + (row.to(tl.int64) + 1) * table_width - 1 - first,
                tl.load(lengths_ptr + row * 2 + 1) - first * LOW.tokens, count, chunks_ptr, acc_ptr, stats_ptr, softcap,
                LOW, -1, NH, DV, WIDE, CAPPED, FULL, STAGES_LOW, W,
            )  # fmt: skip
        else:
            batch = row // heads
            plain = q_ptr + batch * stride_batch + (row % heads) * (columns // queries) * stride_head
            line = row.to(tl.int64) * capacity
            _attend_window(
                plain, window_k_ptr + line * D, window_v_ptr + line * DV, tl.load(counts_ptr + batch).to(tl.int32),
                first * WINDOW_STEP, count, tile * NH, queries, columns, stride_head, stride_query,
                acc_ptr, stats_ptr, scale, softcap, NH, D, DV, WIDE, WIDE_V, CAPPED, FULL, W,
            )  # fmt: skip


@triton.jit
def _partial(acc_ptr, stats_ptr, NH: tl.constexpr, DV: tl.constexpr):
    """Where this program's results go; asked for at the end, to keep two addresses out of the loops' registers."""
    unit = tl.program_id(0).to(tl.int64)
    return acc_ptr + unit * NH * DV, stats_ptr + unit * 2 * NH


@triton.jit
def _attend_pages(
    whole_ptr,
    split_ptr,
    terms_ptr,
    ids_ptr,
    tokens_left,
    pages,
    chunks_ptr,
    acc_ptr,
    stats_ptr,
    softcap,
    PAGE: tl.constexpr,
    SIGN: tl.constexpr,
    NH: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
    W: tl.constexpr,
):
    """Pages of one row: only the last item of a row has free slots, or fewer pages than warps, and pays for a mask."""
    if (tokens_left >= pages * PAGE.tokens) & (pages % W == 0):
        _attend_run(
            whole_ptr, split_ptr, terms_ptr, ids_ptr, tokens_left, pages, chunks_ptr, acc_ptr, stats_ptr, softcap,
            PAGE, SIGN, NH, DV, WIDE, CAPPED, FULL, STAGES, W, False,
        )  # fmt: skip
    else:
        _attend_run(
            whole_ptr, split_ptr, terms_ptr, ids_ptr, tokens_left, pages, chunks_ptr, acc_ptr, stats_ptr, softcap,
            PAGE, SIGN, NH, DV, WIDE, CAPPED, FULL, STAGES, W, True,
        )  # fmt: skip


@triton.jit
def _attend_run(
    whole_ptr,
    split_ptr,
    terms_ptr,
    ids_ptr,
    tokens_left,
    pages,
    chunks_ptr,
    acc_ptr,
    stats_ptr,
    softcap,
    PAGE: tl.constexpr,
    SIGN: tl.constexpr,
    NH: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
    W: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Pages `ids_ptr[SIGN * i]` of one row; `tokens_left` is what the row holds from the first of them on."""
    KEY: tl.constexpr = PAGE.keys
    VALUE: tl.constexpr = PAGE.values
    P: tl.constexpr = PAGE.tokens
    PRODUCT: tl.constexpr = (VALUE.kind != 0) and not FULL  # 8-bit values: columns in product order
    dtype: tl.constexpr = split_ptr.dtype.element_ty
    warp = tl.arange(0, W)
    if PRODUCT:
        order = product_order(P)
    else:
        order = tl.arange(0, P)
    if KEY.kind == 0 or FULL:
        query_ptr = split_ptr
    else:
        query_ptr = whole_ptr
    q0 = _query_slice(query_ptr, 0, KEY, NH, WIDE, FULL, W)
    q1, q2, q3 = q0, q0, q0
    if KEY.slices >= 2:
        q1 = _query_slice(query_ptr, 1, KEY, NH, WIDE, FULL, W)
    if KEY.slices == 4:
        q2 = _query_slice(query_ptr, 2, KEY, NH, WIDE, FULL, W)
        q3 = _query_slice(query_ptr, 3, KEY, NH, WIDE, FULL, W)
    i_n = tl.arange(0, NH)
    total = tl.load(terms_ptr + NH + i_n)[None, :, None]
    gain = tl.full([NH], 1.0, tl.float32)
    if KEY.kind != 0:
        gain = tl.load(terms_ptr + i_n)
    if KEY.kind == 1 or KEY.kind == 2:
        gain *= SCALE_UNIT
    added = (tl.load(terms_ptr + 2 * NH + i_n) / gain)[None, :, None]
    m = tl.full([W, NH], NOWHERE, tl.float32)
    l = tl.zeros([W, NH, LANE_SUMS], tl.float32)  # noqa: E741
    z = tl.zeros([W, ZERO_ROWS, NH], tl.float32)  # rows all alike: zeros are one more row of value codes
    BLOCK_V: tl.constexpr = VALUE.block
    a0 = tl.zeros([W, BLOCK_V, NH], tl.float32)
    a1, a2, a3 = a0, a0, a0
    steps = (pages + W - 1) // W
    addresses = _addresses(ids_ptr, 0, pages, chunks_ptr, PAGE, SIGN, W, MASKED)
    for step in tl.range(0, steps, num_stages=STAGES):
        page = byte_pointers(addresses)
        k = load_keys(page, order, PAGE, dtype)
        v = load_values(page, PAGE, dtype)
        k_top, v_top = k, v
        if KEY.bits == 3:
            k_top = load_key_tops(page, order, PAGE)
        if VALUE.bits == 3:
            v_top = load_value_tops(page, PAGE)
        ks, kz, vs, vz = load_meta(page, PAGE, W)
        z_row = v
        if VALUE.kind == 1:
            z_row = load_value_zeros(page, PAGE, ZERO_ROWS)
        addresses = _addresses(ids_ptr, step + 1, pages, chunks_ptr, PAGE, SIGN, W, MASKED)

        x = _key_product(q0, q1, q2, q3, k, k_top, KEY, NH, FULL, W, P)
        s = _scores(x, ks, kz, total, KEY, FULL, PRODUCT, W, P) + added
        unit = gain
        if CAPPED:
            s = _cap(s * gain[None, :, None], softcap)
            unit = tl.full([NH], 1.0, tl.float32)
        if MASKED:
            left = tl.where(step * W + warp < pages, tokens_left - (step * W + warp) * P, 0)
            s = tl.where(order[None, None, :] < left[:, None, None], s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 2) * unit[None, :] + _reference(VALUE))
        alpha = tl.exp2(m - m_new)
        t = s * unit[None, :, None] - m_new[:, :, None]
        p = tl.exp2(t)
        l = l * alpha[:, :, None] + tl.sum(tl.reshape(p, (W, NH, P // LANE_SUMS, LANE_SUMS)), 2)  # noqa: E741
        if VALUE.kind == 1 or VALUE.kind == 2:
            pv = tl.exp2(t + byte_twelfths(vs, PRODUCT, W, P)[:, None, :])
        elif VALUE.kind == 3:
            pv = p * _wide_meta(vs, PRODUCT, W, P)[:, None, :]
        else:
            pv = p
        m = m_new
        if VALUE.kind == 3:
            zeros = tl.sum(p * _wide_meta(vz, PRODUCT, W, P)[:, None, :], 2)
            z = z * alpha[:, None, :] - zeros[:, None, :]
        if not FULL:
            pv = pv.to(dtype if VALUE.kind == 0 else tl.float16)
        if PRODUCT:
            pv = to_code_order(pv, W, NH, P)
        pv, scaling = tl.permute(pv, (0, 2, 1)), alpha[:, None, :]
        a0, a1, a2, a3 = _weigh(pv, scaling, v, v_top, a0, a1, a2, a3, VALUE, FULL)
        if VALUE.kind == 1 or VALUE.kind == 2:
            z = _weigh_zeros(pv, scaling, z_row, z, VALUE, FULL, W, P)

    if VALUE.bits == 4 and not FULL:  # the last slice holds whole bytes so far
        a1 -= a0
    if VALUE.bits == 2 and not FULL:
        a3 -= a0 + a1 + a2
    if VALUE.kind == 1 and not FULL:
        z *= DENORMAL
    if VALUE.kind == 2:
        z *= VALUE.center
    if VALUE.kind == 1 or VALUE.kind == 2:
        shift: tl.constexpr = SCALE_UNIT
    else:
        shift: tl.constexpr = 1.0
    top = tl.max(m, 0)
    f = tl.exp2(m - top[None, :])
    zero = (tl.sum(tl.max(z, 1) * f, 0) * shift)[None, :]
    acc_ptr, stats_ptr = _partial(acc_ptr, stats_ptr, NH, DV)
    _store_slice(acc_ptr, a0, f, zero, shift, 0, VALUE, NH, DV, FULL)
    if VALUE.slices >= 2:
        _store_slice(acc_ptr, a1, f, zero, shift, 1, VALUE, NH, DV, FULL)
    if VALUE.slices == 4:
        _store_slice(acc_ptr, a2, f, zero, shift, 2, VALUE, NH, DV, FULL)
        _store_slice(acc_ptr, a3, f, zero, shift, 3, VALUE, NH, DV, FULL)
    tl.store(stats_ptr + i_n, top)
    tl.store(stats_ptr + NH + i_n, tl.sum(tl.sum(l, 2) * f, 0))


@triton.jit
def _query_slice(
    ptr,
    SLICE: tl.constexpr,
    KEY: tl.constexpr,
    NH: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    W: tl.constexpr,
):
    """The rows of a tile's query for one slice of the key codes, [W, rows, block], the same for every warp."""
    ROWS: tl.constexpr = NH if FULL else 2 * NH
    BLOCK: tl.constexpr = KEY.block
    o = tl.arange(0, BLOCK)[None, :]
    at = ptr + tl.arange(0, ROWS)[:, None] * WIDE + SLICE * KEY.width + o
    if KEY.block == KEY.width:
        q = tl.load(at)
    else:
        q = tl.load(at, mask=o < KEY.width, other=0)
    return tl.broadcast_to(q[None], (W, ROWS, BLOCK))


@triton.jit
def _addresses(
    ids_ptr, step, pages, chunks_ptr, PAGE: tl.constexpr, SIGN: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr
):
    """Addresses [W] of the pages of one step.

    Behind the end it is the last step's, or the last page where a step may have fewer pages than warps.
    """
    warp = tl.arange(0, W)
    if MASKED:
        i = tl.minimum(step * W + warp, pages - 1)
    else:
        i = tl.minimum(step * W, pages - W) + warp
    return page_addresses(ids_ptr + SIGN * i, chunks_ptr, PAGE)


@triton.jit
def _wide_meta(x, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """fp16 metadata [W, P] -> float32 by column."""
    x = x.to(tl.float32)
    if PRODUCT:
        x = to_product_order(x, W, P)
    return x


@triton.jit
def _key_product(
    q0, q1, q2, q3, k, top, KEY: tl.constexpr, NH: tl.constexpr, FULL: tl.constexpr, W: tl.constexpr, P: tl.constexpr
):
    """q . stored codes [W, NH, P] in units of A: int32 from codes, else float32."""
    if FULL:
        x = tl.dot(q0, tl.permute(codes_float(k, top, KEY, 0), (0, 2, 1)), input_precision="ieee")
        if KEY.slices >= 2:
            x = tl.dot(q1, tl.permute(codes_float(k, top, KEY, 1), (0, 2, 1)), x, input_precision="ieee")
        if KEY.slices == 4:
            x = tl.dot(q2, tl.permute(codes_float(k, top, KEY, 2), (0, 2, 1)), x, input_precision="ieee")
            x = tl.dot(q3, tl.permute(codes_float(k, top, KEY, 3), (0, 2, 1)), x, input_precision="ieee")
        return x
    elif KEY.kind == 0:
        high, low = _halves(tl.dot(q0, tl.permute(k, (0, 2, 1))), NH, W, P)
        return high + low
    else:
        x = tl.dot(q0, tl.permute(codes_int8(k, top, KEY, 0), (0, 2, 1)), out_dtype=tl.int32)
        if KEY.slices >= 2:
            x = tl.dot(q1, tl.permute(codes_int8(k, top, KEY, 1), (0, 2, 1)), x, out_dtype=tl.int32)
        if KEY.slices == 4:
            x = tl.dot(q2, tl.permute(codes_int8(k, top, KEY, 2), (0, 2, 1)), x, out_dtype=tl.int32)
            x = tl.dot(q3, tl.permute(codes_int8(k, top, KEY, 3), (0, 2, 1)), x, out_dtype=tl.int32)
        high, low = _halves(x, NH, W, P)
        return high * 256 + low


@triton.jit
def _halves(x, NH: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """[W, 2 NH, P] -> its first and its second NH rows, which a lane holds both."""
    high, low = tl.split(tl.permute(tl.reshape(x, (W, 2, NH, P)), (0, 2, 3, 1)))
    return high, low


@triton.jit
def _scores(
    x, ks, kz, total, KEY: tl.constexpr, FULL: tl.constexpr, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr
):
    """Products with stored codes -> scores in units of A, but for the constant of a query."""
    if KEY.kind == 0:
        return x
    elif KEY.kind == 3:
        scale, zero = _wide_meta(ks, PRODUCT, W, P), _wide_meta(kz, PRODUCT, W, P)
        if KEY.signed:
            zero += 128.0 * scale
        return x.to(tl.float32) * scale[:, None, :] + total * zero[:, None, :]
    else:
        if KEY.kind == 2:
            x = x.to(tl.float32) - KEY.center * total
        elif FULL:
            x = x.to(tl.float32) - byte_floats(kz, 128 if KEY.signed else 0, PRODUCT, W, P)[:, None, :] * total
        else:  # the sum's sign is turned while it is a float: the compiler would turn that of every zero instead
            x += byte_ints(kz, KEY.signed, PRODUCT, W, P)[:, None, :] * (-total).to(tl.int32)
            x = x.to(tl.float32)
        return x * tl.exp2(byte_twelfths(ks, PRODUCT, W, P))[:, None, :]


@triton.jit
def _cap(s, softcap):
    """softcap * tanh(s / softcap)."""
    return softcap - (2.0 * softcap) / (tl.exp2(s * (2.0 / softcap * LOG2E)) + 1.0)


@triton.jit
def _reference(VALUE: tl.constexpr):
    """What exponents are taken to, above the maximum: probabilities times scales fill the range of fp16."""
    if VALUE.kind == 0:
        return -8.0
    elif VALUE.kind == 3:
        return 0.0
    else:
        return 5.5  # 2^(255 / 12 - 5.5) = 56k


@triton.jit
def _weigh(p, alpha, v, top, a0, a1, a2, a3, VALUE: tl.constexpr, FULL: tl.constexpr):
    """Accumulators [W, block, NH], one per slice of the value codes, plus codes times p [W, P, NH].

    Of 4- and 2-bit codes the last slice takes whole bytes.
    """
    if FULL:
        a0 = tl.dot(codes_float(v, top, VALUE, 0), p, a0 * alpha, input_precision="ieee")
        if VALUE.slices >= 2:
            a1 = tl.dot(codes_float(v, top, VALUE, 1), p, a1 * alpha, input_precision="ieee")
        if VALUE.slices == 4:
            a2 = tl.dot(codes_float(v, top, VALUE, 2), p, a2 * alpha, input_precision="ieee")
            a3 = tl.dot(codes_float(v, top, VALUE, 3), p, a3 * alpha, input_precision="ieee")
    elif VALUE.kind == 0:
        a0 = tl.dot(v, p, a0 * alpha)
    elif VALUE.bits == 8:
        a0 = tl.dot(denormal(v), p, a0 * alpha)
    elif VALUE.bits == 4:
        v0, v1 = denormal_halves(v)
        a0 = tl.dot(v0, p, a0 * alpha)
        a1 = tl.dot(v1, p, a1 * alpha)
    else:
        if VALUE.bits == 2:
            v0, v1, v2, v3 = denormal_quarters(v)
        else:
            v0 = denormal(codes_int8(v, top, VALUE, 0).to(tl.uint8, bitcast=True))
            v1 = denormal(codes_int8(v, top, VALUE, 1).to(tl.uint8, bitcast=True))
            v2 = denormal(codes_int8(v, top, VALUE, 2).to(tl.uint8, bitcast=True))
            v3 = denormal(codes_int8(v, top, VALUE, 3).to(tl.uint8, bitcast=True))
        a0 = tl.dot(v0, p, a0 * alpha)
        a1 = tl.dot(v1, p, a1 * alpha)
        a2 = tl.dot(v2, p, a2 * alpha)
        a3 = tl.dot(v3, p, a3 * alpha)
    return a0, a1, a2, a3


@triton.jit
def _weigh_zeros(p, alpha, row, z, VALUE: tl.constexpr, FULL: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """z [W, ZERO_ROWS, NH] plus the values' zeros times p, or plus p where all zeros are the same number."""
    if VALUE.kind == 2:
        ones = tl.full([W, ZERO_ROWS, P], 1.0, p.dtype)
        if FULL:
            return tl.dot(ones, p, z * alpha, input_precision="ieee")
        else:
            return tl.dot(ones, p, z * alpha)
    elif FULL:
        return tl.dot(row.to(tl.float32), p, z * alpha, input_precision="ieee")
    else:
        return tl.dot(denormal(row), p, z * alpha)


@triton.jit
def _store_slice(
    acc_ptr,
    a,
    f,
    zero,
    unit: tl.constexpr,
    SLICE: tl.constexpr,
    VALUE: tl.constexpr,
    NH: tl.constexpr,
    DV: tl.constexpr,
    FULL: tl.constexpr,
):
    """Merge one slice over the warps and write it: acc [NH, DV]."""
    if VALUE.kind == 0 or FULL:
        factor: tl.constexpr = unit
    elif VALUE.bits == 3:
        factor: tl.constexpr = unit * DENORMAL
    else:
        factor: tl.constexpr = unit * DENORMAL / (1 << (SLICE * VALUE.bits))
    o = tl.arange(0, VALUE.block)[:, None]
    i_n = tl.arange(0, NH)[None, :]
    out = tl.sum(a * (f * factor)[:, None, :], 0) - zero
    at = acc_ptr + i_n * DV + SLICE * VALUE.width + o
    tl.store(at, out, mask=(o < VALUE.width) & (SLICE * VALUE.width + o < DV) & (i_n >= 0))


@triton.jit
def _attend_window(
    q_ptr,
    k_ptr,
    v_ptr,
    count,
    first,
    steps,
    first_column,
    queries,
    columns,
    stride_head,
    stride_query,
    acc_ptr,
    stats_ptr,
    scale,
    softcap,
    NH: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    CAPPED: tl.constexpr,
    FULL: tl.constexpr,
    W: tl.constexpr,
):
    """Window tokens [first, first + steps WINDOW_STEP) of one row, which holds `count`; the newest `queries` ask."""
    P: tl.constexpr = WINDOW_STEP
    warp = tl.arange(0, W)[:, None]
    o, o_v, i_n = tl.arange(0, WIDE), tl.arange(0, WIDE_V), tl.arange(0, NH)
    ROWS: tl.constexpr = NH if FULL else 2 * NH
    i_m = tl.arange(0, ROWS)
    n = first_column + i_m
    at = q_ptr + (n // queries)[:, None] * stride_head + (n % queries)[:, None] * stride_query + o[None, :]
    q = tl.load(at, mask=(i_m < NH)[:, None] & (n < columns)[:, None] & (o < D)[None, :], other=0.0)
    q = tl.broadcast_to(q[None], (W, ROWS, WIDE))
    seen = count - queries + (first_column + i_n) % queries + 1  # [NH] tokens that a query may look at
    stop = tl.minimum(first + steps * P, count)
    m = tl.full([W, NH], NOWHERE, tl.float32)
    l = tl.zeros([W, NH], tl.float32)  # noqa: E741
    a = tl.zeros([W, WIDE_V, NH], tl.float32)
    for start in tl.range(first, stop, W * P, num_stages=2):
        token = start + warp * P + tl.arange(0, P)[None, :]
        held = (token < stop)[:, :, None]
        k = tl.load(k_ptr + token[:, :, None] * D + o[None, None, :], mask=held & (o < D)[None, None, :], other=0.0)
        v = tl.load(
            v_ptr + token[:, :, None] * DV + o_v[None, None, :], mask=held & (o_v < DV)[None, None, :], other=0.0
        )
        if FULL:
            s = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee")
        else:
            s, _ = _halves(tl.dot(q, tl.permute(k, (0, 2, 1))), NH, W, P)
        s *= scale
        if CAPPED:
            s = _cap(s, softcap)
        visible = (token < stop)[:, None, :] & (token[:, None, :] < seen[None, :, None])
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 2))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - (m_new - 8.0)[:, :, None])
        l = l * alpha + tl.sum(p, 2)  # noqa: E741
        m = m_new
        weights = tl.permute(p.to(v.dtype), (0, 2, 1))
        values = tl.permute(v, (0, 2, 1))
        if FULL:
            a = tl.dot(values, weights, a * alpha[:, None, :], input_precision="ieee")
        else:
            a = tl.dot(values, weights, a * alpha[:, None, :])
    top = tl.max(m, 0)
    f = tl.exp2(m - top[None, :])
    out = tl.sum(a * f[:, None, :], 0)
    acc_ptr, stats_ptr = _partial(acc_ptr, stats_ptr, NH, DV)
    tl.store(acc_ptr + i_n[None, :] * DV + o_v[:, None], out, mask=(o_v < DV)[:, None] & (i_n >= 0)[None, :])
    tl.store(stats_ptr + i_n, top - 8.0)
    tl.store(stats_ptr + NH + i_n, tl.sum(l * f, 0))


# ---- after: the items of a row, un-rotated --------------------------------------------------------------------------


@triton.jit
def _merge(
    acc_ptr, stats_ptr, unit, column, held, exact, top, mass_so_far, packed, plain,
    NH: tl.constexpr, DV: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """Take partial results into the sums over packed and over exact tokens, both relative to 2 ** top."""
    o = tl.arange(0, WIDE_V)
    reference = tl.load(stats_ptr + unit * 2 * NH + column, mask=held, other=NOWHERE)
    mass = tl.load(stats_ptr + unit * 2 * NH + NH + column, mask=held, other=0.0)
    used = mass > 0
    acc = tl.load(
        acc_ptr + (unit * NH + column)[:, None] * DV + o[None, :], mask=used[:, None] & (o < DV)[None, :], other=0.0
    )
    higher = tl.maximum(top, tl.max(tl.where(used, reference, NOWHERE), 0))
    alpha = tl.exp2(top - higher)
    f = tl.where(used, tl.exp2(reference - higher), 0.0)
    mass_so_far = mass_so_far * alpha + tl.sum(f * mass, 0)
    packed = packed * alpha + tl.sum(acc * tl.where(exact, 0.0, f)[:, None], 0)
    plain = plain * alpha + tl.sum(acc * tl.where(exact, f, 0.0)[:, None], 0)
    return higher, mass_so_far, packed, plain


@triton.jit
def combine_items(
    acc_ptr,
    stats_ptr,
    more_acc_ptr,
    more_stats_ptr,
    items_ptr,
    offsets_ptr,
    rotation_ptr,
    sinks_ptr,
    out_ptr,
    window,
    heads,
    queries,
    columns,
    tiles,
    PARTS: tl.constexpr,
    NH: tl.constexpr,
    DV: tl.constexpr,
    WIDE_V: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One query of one row: merge its items by log-sum-exp, un-rotate what came from pages, once.

    `more` holds PARTS further results of packed tokens for every row and tile.
    """
    row, n = tl.program_id(0), tl.program_id(1)
    tile, column = n // NH, n % NH
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    o, i_s = tl.arange(0, WIDE_V), tl.arange(0, STEP)
    top = tl.full([], NOWHERE, tl.float32)
    l = tl.full([], 0.0, tl.float32)  # noqa: E741
    if sinks_ptr is not None:
        groups = columns // queries
        top = tl.load(sinks_ptr + (row % heads) * groups + n // queries).to(tl.float32) * LOG2E
        l += 1.0  # noqa: E741
    packed = tl.zeros([WIDE_V], tl.float32)
    plain = tl.zeros([WIDE_V], tl.float32)
    for start in range(begin, end, STEP):
        item = start + i_s
        unit = item.to(tl.int64) * tiles + tile
        held = item < end
        tier = tl.load(items_ptr + item * ITEM_FIELDS + 1, mask=held, other=0)
        top, l, packed, plain = _merge(  # noqa: E741
            acc_ptr, stats_ptr, unit, column, held, tier == window, top, l, packed, plain, NH, DV, WIDE_V
        )
    for start in range(0, PARTS, STEP):
        unit = (row.to(tl.int64) * PARTS + start + i_s) * tiles + tile
        held = start + i_s < PARTS
        top, l, packed, plain = _merge(  # noqa: E741
            more_acc_ptr, more_stats_ptr, unit, column, held, i_s < 0, top, l, packed, plain, NH, DV, WIDE_V
        )
    norm = 1.0 / l
    at = out_ptr + (row.to(tl.int64) * columns + n) * DV
    if rotation_ptr is None:
        tl.store(at + o, ((packed + plain) * norm).to(out_ptr.dtype.element_ty), mask=o < DV)
    else:
        first = tl.arange(0, BLOCK)
        shared = tl.reshape(plain, (WIDE_V // BLOCK, BLOCK))
        i_b = tl.arange(0, WIDE_V // BLOCK)[:, None]
        for b in tl.static_range(WIDE_V // BLOCK):
            d = b * BLOCK + first
            turn = tl.load(
                rotation_ptr + d[:, None] * DV + o[None, :], mask=(d < DV)[:, None] & (o < DV)[None, :], other=0.0
            )
            own = tl.sum(tl.where(i_b == b, shared, 0.0), 0)
            y = (tl.sum(turn * packed[None, :], 1) + own) * norm
            tl.store(at + d, y.to(out_ptr.dtype.element_ty), mask=d < DV)
