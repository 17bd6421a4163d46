"""Pages as Triton kernels see them: where they lie, how their codes become operands of matrix products.

Codes are the A or B operand of a product as they are: key codes as int8, value codes as fp16 whose low mantissa bits
are the code, which is code * 2^-24 exactly. Inline assembly works on four codes of a register at once; the interpreter,
and devices that are not NVIDIA's, take the same operations in plain Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from hfkv.kernels.triton.constants import KINDS, SLOT_BITS, SLOT_MASK, power_of_two
from hfkv.kernels.triton.constants import SCALE_STEP as STEP
from hfkv.quant import SCALE_BIAS, SCALE_STEPS, Codec, PageLayout

PLAIN = tl.constexpr(bool(knobs.runtime.interpret) or torch.version.hip is not None)
"""No inline assembly."""

SCALE_UNIT = tl.constexpr(2.0 ** -(SCALE_BIAS // SCALE_STEPS))
"""A scale byte c is 2^(c STEP) SCALE_UNIT; the unit is left to whoever multiplies next."""

MAGIC = tl.constexpr(float(1 << 23))
DENORMAL = tl.constexpr(float(1 << 24))
assert SCALE_BIAS % SCALE_STEPS == 0


class Side(NamedTuple):
    """The keys or the values of a page, all of it known when a kernel is compiled.

    Attributes:
        kind: a value of KINDS.
        bits, dim: of the codec; 0 bits for the model's dtype.
        rows: elements per token.
        slices: features that lie in one byte; slice i holds the features [i * width, (i + 1) * width).
        width: features of a slice.
        block: `width` rounded up to what a matrix product takes.
        signed: 8-bit codes are stored as code - 128.
        center: zero of FITTED codes.
        start, scale, zero: first byte of codes, scales and zeros in the page.
    """

    kind: int
    bits: int
    dim: int
    rows: int
    slices: int
    width: int
    block: int
    signed: bool
    center: float
    start: int
    scale: int
    zero: int


class PageShape(NamedTuple):
    """A page layout.

    Attributes:
        tokens, bytes: of a page.
        byte_fields: fields of byte metadata, which lie together; 0 where metadata are none or fp16.
    """

    tokens: int
    bytes: int
    byte_fields: int
    keys: Side
    values: Side


def pages_of(layout: PageLayout) -> PageShape:
    """A layout's constants.

    Raises:
        ValueError: pages of other than a power of two of at least 16 tokens.
    """
    tokens = layout.tokens
    if tokens < 16 or tokens & (tokens - 1):
        raise ValueError(f"pages of {tokens} tokens: the kernels need a power of two of at least 16, such as 32 or 64")
    sides = (layout.key, layout.value)
    fields = sum(side.scale_bytes + side.zero_bytes for side in sides) if layout.byte_metadata else 0
    return PageShape(tokens, layout.page_bytes, fields, _side(layout, "key"), _side(layout, "value"))


def _side(layout: PageLayout, name: str) -> Side:
    codec: Codec = getattr(layout, name)
    slices = {0: 1, 8: 1, 4: 2, 3: 4, 2: 4}[codec.bits]
    width = codec.padded // slices
    least = 32 if name == "key" and codec.bits else 16
    fields = layout.fields
    return Side(
        kind=KINDS[codec.kind],
        bits=codec.bits,
        dim=codec.dim,
        rows=codec.rows,
        slices=slices,
        width=width,
        block=power_of_two(width, least),
        signed=codec.signed,
        center=codec.center,
        start=fields[name][0],
        scale=fields[f"{name}_scale"][0],
        zero=fields[f"{name}_zero"][0],
    )


# ---- addresses ------------------------------------------------------------------------------------------------------


@triton.jit
def page_addresses(id_ptr, chunks_ptr, PAGE: tl.constexpr):
    """Byte addresses int64 of the pages whose ids lie at `id_ptr`, through the table of chunk addresses.

    By assembly, since a loop's pipeline would take both loads through shared memory and three barriers.
    """
    BYTES: tl.constexpr = PAGE.bytes
    if PLAIN:
        page = tl.load(id_ptr)
        return tl.load(chunks_ptr + (page >> SLOT_BITS)) + (page & SLOT_MASK).to(tl.int64) * BYTES
    else:
        return tl.inline_asm_elementwise(
            f"""{{ .reg .b32 p, c; .reg .b64 a; ld.global.nc.b32 p, [$1];
            shr.u32 c, p, {SLOT_BITS}; mad.wide.u32 a, c, 8, $2; ld.global.nc.b64 a, [a];
            and.b32 p, p, {SLOT_MASK}; mad.wide.u32 $0, p, {BYTES}, a; }}""",
            "=l,l,l",
            [id_ptr.to(tl.int64), chunks_ptr.to(tl.int64)],
            dtype=tl.int64,
            is_pure=True,
            pack=1,
        )


@triton.jit
def byte_pointers(addresses):
    """Addresses of pages as pointers; pages begin at multiples of 16."""
    return tl.multiple_of(addresses.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def product_order(P: tl.constexpr):
    """The token that each column of a product stands for, where its probabilities meet 8-bit codes in the next product.

    Of every 16 tokens a lane then holds four neighbours: those whose value codes lie in one register, so that
    probabilities need not cross lanes, and metadata come as four bytes at once. The four come as `denormal` gives them.
    """
    n = tl.arange(0, P)
    return (n // 16) * 16 + ((n // 2) % 4) * 4 + (n // 8) % 2 + (n % 2) * 2


@triton.jit
def to_product_order(x, W: tl.constexpr, P: tl.constexpr):
    """[W, P] by token -> by column."""
    return tl.reshape(tl.permute(tl.reshape(x, (W, P // 16, 4, 2, 2)), (0, 1, 4, 2, 3)), (W, P))


@triton.jit
def to_code_order(x, W: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """[W, N, P] by column -> in the order in which `denormal` gives value codes."""
    return tl.reshape(tl.permute(tl.reshape(x, (W, N, P // 16, 2, 4, 2)), (0, 1, 2, 4, 3, 5)), (W, N, P))


# ---- parts of pages: [W] pages at once ------------------------------------------------------------------------------


@triton.jit
def load_keys(page, tokens, PAGE: tl.constexpr, dtype: tl.constexpr):
    """Packed keys [W, tokens, block] of pages [W] in the given order of tokens; numbers of `dtype` if exact."""
    KEY: tl.constexpr = PAGE.keys
    o = tl.arange(0, KEY.block)[None, None, :]
    if KEY.kind == 0:
        ptr = (page + KEY.start).to(tl.pointer_type(dtype))[:, None, None] + tokens[None, :, None] * KEY.rows + o
    else:
        ptr = page[:, None, None] + KEY.start + tokens[None, :, None] * KEY.rows + o
    if KEY.block == KEY.width:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=o < KEY.width, other=0)


@triton.jit
def load_key_tops(page, tokens, PAGE: tl.constexpr):
    """The third bits of 3-bit keys as [W, tokens, block]: bit 2 i belongs to slice i."""
    KEY: tl.constexpr = PAGE.keys
    HALF: tl.constexpr = KEY.width // 2
    o = tl.arange(0, KEY.block)[None, None, :]
    ptr = page[:, None, None] + KEY.start + tokens[None, :, None] * KEY.rows + KEY.width + o % HALF
    top = tl.load(ptr, mask=o < KEY.width, other=0)
    return tl.where(o < HALF, top, top >> 1)


@triton.jit
def load_values(page, PAGE: tl.constexpr, dtype: tl.constexpr):
    """Packed values [W, block, tokens] of pages [W]; numbers of `dtype` if exact."""
    VALUE: tl.constexpr = PAGE.values
    row = tl.arange(0, VALUE.block)[None, :, None]
    token = tl.arange(0, PAGE.tokens)[None, None, :]
    if VALUE.kind == 0:
        ptr = (page + VALUE.start).to(tl.pointer_type(dtype))[:, None, None] + row * PAGE.tokens + token
    else:
        ptr = page[:, None, None] + VALUE.start + row * PAGE.tokens + token
    if VALUE.block == VALUE.width:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=row < VALUE.width, other=0)


@triton.jit
def load_value_tops(page, PAGE: tl.constexpr):
    """The third bits of 3-bit values as [W, block, tokens]: bit 2 i belongs to slice i."""
    VALUE: tl.constexpr = PAGE.values
    HALF: tl.constexpr = VALUE.width // 2
    row = tl.arange(0, VALUE.block)[None, :, None]
    token = tl.arange(0, PAGE.tokens)[None, None, :]
    ptr = page[:, None, None] + VALUE.start + (VALUE.width + row % HALF) * PAGE.tokens + token
    top = tl.load(ptr, mask=row < VALUE.width, other=0)
    return tl.where(row < HALF, top, top >> 1)


@triton.jit
def load_value_zeros(page, PAGE: tl.constexpr, ROWS: tl.constexpr):
    """Zero bytes of AFFINE values as equal rows [W, ROWS, tokens], like value codes."""
    row = tl.arange(0, ROWS)[None, :, None] * 0
    return tl.load(page[:, None, None] + PAGE.values.zero + row + tl.arange(0, PAGE.tokens)[None, None, :])


@triton.jit
def load_meta(page, PAGE: tl.constexpr, W: tl.constexpr):
    """Key scale, key zero, value scale and value zero, one number per token each; 0 for what the layout has not.

    fp16 [W, tokens] for MINMAX, else words of four bytes, int32 [W, tokens / 4]: these are loaded in one piece.
    """
    KEY: tl.constexpr = PAGE.keys
    VALUE: tl.constexpr = PAGE.values
    P: tl.constexpr = PAGE.tokens
    FIELDS: tl.constexpr = PAGE.byte_fields
    o = tl.arange(0, P)[None, :]
    ks, kz, vs, vz = 0, 0, 0, 0
    if FIELDS > 0:
        # Eight rows, the last one repeated, are sixteen bytes a lane: of pages of 64 tokens a lane then copies the same
        # page as of rows of codes, and one chain of addresses serves all.
        row = tl.minimum(tl.arange(0, 8), FIELDS - 1)
        o = row[None, :, None] * (P // 4) + tl.arange(0, P // 4)[None, None, :]
        words = tl.load((page + KEY.scale).to(tl.pointer_type(tl.int32))[:, None, None] + o)
        words, _ = tl.split(tl.permute(tl.reshape(words, (W, 2, P)), (0, 2, 1)))
        scales, zeros = tl.split(tl.permute(tl.reshape(words, (W, 2, 2, P // 4)), (0, 3, 2, 1)))  # [W, P / 4, 2]
        ks, vs = tl.split(scales)
        if FIELDS > 2:
            kz, vz = tl.split(zeros)
            if KEY.kind != 1:
                kz, vz = vz, kz
    else:
        if KEY.kind == 3:
            ks = tl.load((page + KEY.scale).to(tl.pointer_type(tl.float16))[:, None] + o)
            kz = tl.load((page + KEY.zero).to(tl.pointer_type(tl.float16))[:, None] + o)
        if VALUE.kind == 3:
            vs = tl.load((page + VALUE.scale).to(tl.pointer_type(tl.float16))[:, None] + o)
            vz = tl.load((page + VALUE.zero).to(tl.pointer_type(tl.float16))[:, None] + o)
    return ks, kz, vs, vz


# ---- bytes to numbers -----------------------------------------------------------------------------------------------


@triton.jit
def byte_floats(words, LESS: tl.constexpr, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Bytes of words int32 [W, P / 4], LESS subtracted -> float32 [W, P], by column where PRODUCT, else by token."""
    if PLAIN:
        return _plain_bytes(words, PRODUCT, W, P) - LESS
    else:
        a, b, c, d = _magic_bytes(words)
        return _spread(a, b, c, d, PRODUCT, W, P) - (MAGIC + LESS)


@triton.jit
def byte_twelfths(words, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Bytes c as c STEP, exactly rounded: the exponent of a scale, but for SCALE_UNIT. Shapes: `byte_floats`."""
    if PLAIN:
        return _plain_bytes(words, PRODUCT, W, P) * STEP
    else:
        a, b, c, d = _magic_bytes(words)
        return tl.fma(_spread(a, b, c, d, PRODUCT, W, P), STEP, -MAGIC * STEP)


@triton.jit
def byte_ints(words, SIGNED: tl.constexpr, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Bytes of words as int32, less 128 where SIGNED. Shapes: `byte_floats`."""
    if PLAIN:
        return _plain_bytes(words, PRODUCT, W, P).to(tl.int32) - (128 if SIGNED else 0)
    else:
        if SIGNED:  # a byte with its top bit turned is a signed number: extended
            a, b, c, d = tl.inline_asm_elementwise(
                """{ .reg .b32 x; xor.b32 x, $4, 0x80808080; prmt.b32 $0, x, 0, 0x8880; prmt.b32 $1, x, 0, 0x9991;
                prmt.b32 $2, x, 0, 0xAAA2; prmt.b32 $3, x, 0, 0xBBB3; }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                """prmt.b32 $0, $4, 0, 0x4440; prmt.b32 $1, $4, 0, 0x4441;
                prmt.b32 $2, $4, 0, 0x4442; prmt.b32 $3, $4, 0, 0x4443;""",
                "=&r,=&r,=&r,=&r,r",
                [words],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        return _spread(a, b, c, d, PRODUCT, W, P)


@triton.jit
def _magic_bytes(words):
    """The four bytes of words as 2^23 + byte, float32: one permutation each."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 m; mov.b32 m, 0x4B000000; prmt.b32 $0, $4, m, 0x7440; prmt.b32 $1, $4, m, 0x7441;
        prmt.b32 $2, $4, m, 0x7442; prmt.b32 $3, $4, m, 0x7443; }""",
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _plain_bytes(words, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    a, b = (words & 255).to(tl.float32), ((words >> 8) & 255).to(tl.float32)
    c, d = ((words >> 16) & 255).to(tl.float32), ((words >> 24) & 255).to(tl.float32)
    return _spread(a, b, c, d, PRODUCT, W, P)


@triton.jit
def _spread(a, b, c, d, PRODUCT: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """First to fourth bytes [W, P / 4] -> [W, P], by column where PRODUCT, else by token."""
    x = tl.join(tl.join(a, b), tl.join(c, d))  # [W, P / 4, 2, 2]: first or second of a pair, pair
    if PRODUCT:
        x = tl.permute(tl.reshape(x, (W, P // 16, 4, 2, 2)), (0, 1, 3, 2, 4))
    else:
        x = tl.permute(x, (0, 1, 3, 2))
    return tl.reshape(x, (W, P))


@triton.jit
def field(x, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """(x >> SHIFT) & MASK of bytes, as int8."""
    M4: tl.constexpr = MASK * 0x01010101
    if PLAIN:
        return ((x >> SHIFT) & MASK).to(tl.int8)
    elif SHIFT == 0:
        return tl.inline_asm_elementwise(f"and.b32 $0, $1, {M4};", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {M4}; }}",
            "=r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def merged(x, top, SHIFT: tl.constexpr):
    """3-bit codes of one slice as int8: two bits of x, one of `top`, both at SHIFT."""
    if PLAIN:
        return (((x >> SHIFT) & 3) | (((top >> SHIFT) & 1) << 2)).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            f"""{{ .reg .b32 a, b; shr.u32 a, $1, {SHIFT}; and.b32 a, a, 0x03030303;
            shr.u32 b, $2, {SHIFT}; and.b32 b, b, 0x01010101; shl.b32 b, b, 2; or.b32 $0, a, b; }}""",
            "=r,r,r",
            [x, top],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def denormal(x):
    """Bytes [W, rows, tokens] as fp16: code * 2^-24, exactly, of every four tokens in the order 0, 2, 1, 3.

    Two codes of a register then come by a mask, the other two by a shift and a mask. The assembly counts on the four
    bytes of a register being four tokens, as they are where tokens are contiguous.
    """
    if PLAIN:
        fours = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 4, 2, 2))
        x = tl.reshape(tl.permute(fours, (0, 1, 2, 4, 3)), x.shape)
        return x.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x4240; prmt.b32 $1, $2, 0, 0x4341;",
            "=&r,=&r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def denormal_halves(x):
    """The lower 4-bit field of bytes, and the whole bytes, as fp16 numbers of 2^-24 in the order of `denormal`.

    Whoever multiplies both has the upper field by a difference at the end; to cut it out costs one instruction more.
    """
    if PLAIN:
        return denormal(x & 0x0F), denormal(x)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a; and.b32 $2, $4, 0x00ff00ff; prmt.b32 a, $4, 0, 0x4341; mov.b32 $3, a;
            and.b32 $0, $4, 0x000f000f; and.b32 $1, a, 0x000f000f; }""",
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def denormal_quarters(x):
    """The lower three 2-bit fields of bytes, field i as code * 2^(2 i), and the whole bytes: see `denormal_halves`."""
    if PLAIN:
        return denormal(x & 3), denormal(x & 12), denormal(x & 48), denormal(x)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a; and.b32 $6, $8, 0x00ff00ff; prmt.b32 a, $8, 0, 0x4341; mov.b32 $7, a;
            and.b32 $0, $8, 0x00030003; and.b32 $1, a, 0x00030003;
            and.b32 $2, $8, 0x000c000c; and.b32 $3, a, 0x000c000c;
            and.b32 $4, $8, 0x00300030; and.b32 $5, a, 0x00300030; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def codes_int8(x, top, SIDE: tl.constexpr, SLICE: tl.constexpr):
    """Stored codes of one slice as int8."""
    if SIDE.bits == 8:
        return x.to(tl.int8, bitcast=True)
    elif SIDE.bits == 3:
        return merged(x, top, 2 * SLICE)
    else:
        return field(x, SLICE * SIDE.bits, (1 << SIDE.bits) - 1)


@triton.jit
def codes_float(x, top, SIDE: tl.constexpr, SLICE: tl.constexpr):
    """Stored codes of one slice as float32, exact numbers as they are."""
    if SIDE.kind == 0:
        return x.to(tl.float32)
    elif SIDE.bits == 8 and SIDE.signed:
        return x.to(tl.int8, bitcast=True).to(tl.float32)
    elif SIDE.bits == 8:
        return x.to(tl.float32)
    else:
        return codes_int8(x, top, SIDE, SLICE).to(tl.float32)
