"""Lossless packs of codes (PackKV, arXiv 2512.24449): 16 tokens of a feature as their minimum and bit planes.

A pack holds 16 tokens of one head, a mini-pack one feature of them: the smallest code, the width w that the others need
above it, and w words of 16 bits, word j being bit j of the 16 tokens. Width 0 stores no word. A mini-pack as wide as
the codes drops its minimum, and a side that would not get smaller is stored raw, without a header.

The bytes of a side (keys or values) of a pack: minima and widths as bit planes over the features (`bits` planes, then
`bits.bit_length()` planes, each `ceil(dim / 8)` bytes, padded to an even number), then the words, feature by feature.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hfkv.packing import BLOCK, PACK, PackedSide

BUCKETS = 4


# ---- the order of a block ----------------------------------------------------------------------------------------


def repack(keys: Tensor, values: Tensor, how: str) -> Tensor:
    """The order in which the tokens of blocks are packed, int64 [n, 64]: place -> token.

    Args:
        keys, values: codes uint8 [n, 64, dim] of what is packed; a side without features counts for nothing.
        how: `none`, `greedy` (a pack grows by the token that widens its mini-packs least), `median` (by the median
            value code) or `bucket` (4 equal buckets of the sum of all codes).
    """
    n, device = keys.shape[0], keys.device
    if how == "greedy":
        return _greedy(torch.cat([keys, values], 2))
    if how == "median":
        side = values if values.shape[2] else keys
        return side.median(2).values.argsort(dim=1, stable=True)
    if how == "bucket":
        total = keys.sum(2, dtype=torch.int32) + values.sum(2, dtype=torch.int32)  # [n, 64]
        low, high = total.amin(1, keepdim=True), total.amax(1, keepdim=True)
        bucket = (total - low) * BUCKETS // (high - low + 1)
        return bucket.argsort(dim=1, stable=True)
    return torch.arange(BLOCK, device=device).expand(n, -1)


def _greedy(codes: Tensor) -> Tensor:
    """Packs grow from the first token left by the one that adds the fewest bits; ties go to the earlier token."""
    n, tokens, _ = codes.shape
    left = torch.ones(n, tokens, dtype=torch.bool, device=codes.device)
    each, chosen = torch.arange(n, device=codes.device), []
    low = high = codes[:, 0]
    for place in range(tokens):
        if place % PACK == 0:
            pick = left.int().argmax(1)
            low = high = codes[each, pick]
        else:
            span = torch.maximum(high[:, None], codes) - torch.minimum(low[:, None], codes)  # [n, tokens, features]
            cost = bit_length(span).sum(2, dtype=torch.int32)
            pick = cost.masked_fill_(~left, 1 << 30).argmin(1)
            picked = codes[each, pick]
            low, high = torch.minimum(low, picked), torch.maximum(high, picked)
        left[each, pick] = False
        chosen.append(pick)
    return torch.stack(chosen, 1)


def bit_length(x: Tensor) -> Tensor:
    """Bits that numbers uint8 need: 0 for 0, 8 from 128 on; uint8."""
    return _lengths(x.device)[x.long()] if x.numel() < 1 << 14 else _long_bit_length(x)


def _long_bit_length(x: Tensor) -> Tensor:
    """The same without an index of eight bytes per number."""
    bits = (x > 0).to(torch.uint8)
    for threshold in (1, 3, 7, 15, 31, 63, 127):
        bits += x > threshold
    return bits


@functools.lru_cache(maxsize=8)
def _lengths(device: torch.device) -> Tensor:
    return torch.tensor([x.bit_length() for x in range(256)], dtype=torch.uint8, device=device)


# ---- packs -------------------------------------------------------------------------------------------------------


def measure(side: PackedSide, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What packs need: codes uint8 [n, 16, dim] -> minima and widths uint8 [n, dim], bytes int64 [n], raw bool [n]."""
    low = codes.amin(1)
    width = bit_length(codes.amax(1) - low)
    low = torch.where(width == side.bits, 0, low)
    size = side.header + 2 * width.sum(1, dtype=torch.int64)
    raw = size >= side.raw_bytes if side.packed else torch.ones_like(size, dtype=torch.bool)
    low, width = torch.where(raw[:, None], 0, low), torch.where(raw[:, None], side.bits, width)
    return low, width, torch.where(raw, side.raw_bytes, size), raw


def pack(side: PackedSide, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack codes uint8 [n, 16, dim], all below 2 ** bits.

    Returns:
        (bytes uint8 [n, raw_bytes], of which each pack fills the first so many, 0 behind; sizes int64 [n];
        raw bool [n]).
    """
    low, width, size, raw = measure(side, codes)
    out = torch.zeros(codes.shape[0], side.raw_bytes + 2, dtype=torch.uint8, device=codes.device)  # and a place to drop
    header = torch.cat([_bits(low, side.bits), _bits(width, side.width_bits)], 1)  # [n, planes, dim]
    header = _to_bytes(header).flatten(1)
    count = min(header.shape[1], side.raw_bytes)
    out[:, :count] = torch.where(raw[:, None], 0, header[:, :count])
    planes = _bits((codes - low[:, None]), side.bits)  # [n, 16, bits, dim]
    weight = (1 << torch.arange(PACK, device=codes.device, dtype=torch.int32))[:, None, None]
    words = (planes * weight).sum(1, dtype=torch.int32).to(torch.int16)  # [n, bits, dim]
    place, there = _places(side, width, raw)
    place = torch.where(there, place, side.raw_bytes // 2).flatten(1)
    out.view(torch.int16).scatter_(1, place, torch.where(there, words, 0).flatten(1))
    return out[:, : side.raw_bytes], size, raw


def unpack(side: PackedSide, packed: Tensor, raw: Tensor) -> Tensor:
    """The codes uint8 [n, 16, dim] of packs uint8 [n, raw_bytes or more] (what lies behind a pack does not matter)."""
    count = (side.bits + side.width_bits) * side.plane
    if packed.shape[1] < max(count, side.raw_bytes):
        packed = torch.nn.functional.pad(packed, (0, max(count, side.raw_bytes) - packed.shape[1]))
    header = _from_bytes(packed[:, :count].unflatten(1, (-1, side.plane)), side.dim)  # [n, planes, dim]
    low, width = _number(header[:, : side.bits]), _number(header[:, side.bits :])
    low, width = torch.where(raw[:, None], 0, low), torch.where(raw[:, None], side.bits, width)
    place, there = _places(side, width, raw)
    words = packed.contiguous().view(torch.int16).gather(1, place.clamp_(max=packed.shape[1] // 2 - 1).flatten(1))
    words = words.view(place.shape).int() * there  # [n, bits, dim]
    token = torch.arange(PACK, device=packed.device)[:, None, None]
    return _number((words[:, None] >> token) & 1, 2) + low[:, None]


def _places(side: PackedSide, width: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Where the words lie, in words from the side's start int64 [n, bits, dim], and which of them exist."""
    width = width.long()
    first = width.cumsum(1) - width + torch.where(raw, 0, side.header // 2)[:, None]
    bit = torch.arange(side.bits, device=width.device)[:, None]
    return first[:, None] + bit, bit < width[:, None]


def _bits(x: Tensor, count: int) -> Tensor:
    """Numbers uint8 [..., dim] -> their bits, lowest first, int32 [..., count, dim]."""
    return (x[..., None, :].int() >> torch.arange(count, device=x.device)[:, None]) & 1


def _number(bits: Tensor, dim: int = 1) -> Tensor:
    """Bits along `dim`, lowest first -> uint8."""
    shape = [1] * bits.ndim
    shape[dim] = -1
    weight = (1 << torch.arange(bits.shape[dim], device=bits.device, dtype=torch.int32)).view(shape)
    return (bits * weight).sum(dim, dtype=torch.int32).to(torch.uint8)


def _to_bytes(bits: Tensor) -> Tensor:
    """Bits [n, planes, dim] -> uint8 [n, planes, ceil(dim / 8)], feature 8 i + j in bit j of byte i."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return _number(bits, bits.ndim - 1)


def _from_bytes(data: Tensor, dim: int) -> Tensor:
    """uint8 [n, planes, ceil(dim / 8)] -> bits int32 [n, planes, dim]."""
    bits = (data[..., None].int() >> torch.arange(8, device=data.device)) & 1
    return bits.flatten(-2)[..., :dim]
