"""Full pages into packs and back: the codes of a page's 64 tokens, reordered, with all that belongs to each token."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.kernels.packing import pack, repack, unpack
from hfkv.kernels.quantize_pack import code_tokens
from hfkv.packing import BLOCK, HEAD, PACK, RAW, WORD, PackFormat
from hfkv.quant import Codec, PageLayout, pack_codes, unpack_codes

PACKS = BLOCK // PACK
"""Packs of a page."""

ADDRESS = 8
"""Bytes of a pack's place in the table of handles."""

SEALED_AT_ONCE = 512
OPENED_AT_ONCE = 2048
"""Pages: bounds temporary memory."""


def pack_format(layout: PageLayout) -> PackFormat:
    """How pages of a layout are packed."""
    assert layout.pack is not None
    return layout.pack


def meta_bytes(layout: PageLayout) -> int:
    """Bytes of a token beside its codes."""
    return (layout.page_bytes - layout.meta_start) // layout.tokens


def pack_words(layout: PageLayout) -> int:
    """The most 8-byte words that a pack takes."""
    return pack_format(layout).words(meta_bytes(layout))


def is_full(layout: PageLayout, pages: Tensor) -> Tensor:
    """Pages uint8 [n, page_bytes] whose slots all hold a token, bool [n]: scale bytes of tokens are not 0."""
    return (layout.view(pages, "key_scale") != 0).all(1)


def seal(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pack full pages uint8 [n, page_bytes].

    Returns:
        (packs int64 [n, 4, pack_words], 0 behind each pack's end; words int64 [n, 4] of each).
    """
    parts = [_seal(layout, part) for part in pages.split(SEALED_AT_ONCE)]
    return torch.cat([packs for packs, _ in parts]), torch.cat([words for _, words in parts])


def _seal(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
    form, count = pack_format(layout), pages.shape[0]
    keys = codes_of(layout.key, layout.view(pages, "key"))  # [n, 64, dim]
    values = codes_of(layout.value, layout.view(pages, "value").transpose(1, 2))
    packed_keys, packed_values = (x if s.packed else x[..., :0] for x, s in ((keys, form.key), (values, form.value)))
    order = repack(packed_keys, packed_values, form.repack)[..., None]
    meta = _meta(layout, pages).gather(1, order.expand(-1, -1, meta_bytes(layout)))  # [n, 64, bytes]
    sides = []
    for side, codes in ((form.key, keys), (form.value, values)):
        codes = codes.gather(1, order.expand_as(codes))
        sides.append(pack(side, codes.unflatten(1, (-1, PACK)).flatten(0, 1)))
    (key, key_size, key_raw), (value, value_size, value_raw) = sides
    out = torch.zeros(count * PACKS, pack_words(layout) * WORD, dtype=torch.uint8, device=pages.device)
    head = torch.stack([key_size + RAW * key_raw, value_size + RAW * value_raw], 1)
    out[:, :HEAD] = (head[..., None] >> torch.tensor([0, 8], device=pages.device)).flatten(1).to(torch.uint8)
    first = HEAD + PACK * meta_bytes(layout)
    out[:, HEAD:first] = _by_field(layout, meta.unflatten(1, (-1, PACK)).flatten(0, 1))
    out[:, first : first + key.shape[1]] = key
    place = first + key_size[:, None] + torch.arange(value.shape[1], device=pages.device)
    out.scatter_(1, place, value)  # what is behind the values of a pack is 0
    words = (first + key_size + value_size + WORD - 1) // WORD
    return out.view(torch.int64).unflatten(0, (-1, PACKS)), words.view(-1, PACKS)


def unseal(layout: PageLayout, packs: Tensor) -> Tensor:
    """Packs int64 [n, 4, pack_words], whatever lies behind each, -> pages uint8 [n, page_bytes]."""
    return torch.cat([_unseal(layout, part) for part in packs.split(OPENED_AT_ONCE)])


def _unseal(layout: PageLayout, packs: Tensor) -> Tensor:
    form = pack_format(layout)
    data = packs.flatten(0, 1).contiguous().view(torch.uint8)  # [n * 4, bytes]
    first = HEAD + PACK * meta_bytes(layout)
    key_size, key_raw, _, value_raw = heads(packs.flatten(0, 1))
    keys = unpack(form.key, data[:, first : first + form.key.raw_bytes], key_raw)
    place = first + key_size[:, None] + torch.arange(form.value.raw_bytes, device=data.device)
    values = unpack(form.value, data.gather(1, place.clamp_(max=data.shape[1] - 1)), value_raw)
    pages = torch.empty(packs.shape[0], layout.page_bytes, dtype=torch.uint8, device=data.device)
    layout.view(pages, "key").copy_(_bytes(layout.key, keys))
    layout.view(pages, "value").copy_(_bytes(layout.value, values).transpose(1, 2))
    pages[:, layout.meta_start :] = unsealed_meta(layout, packs)
    return pages


def heads(packs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sizes in bytes int64 [n] and raw bool [n] of keys, then of values, of packs int64 [n, words]."""
    key, value = packs[:, 0] & 0xFFFF, (packs[:, 0] >> 16) & 0xFFFF
    return key & (RAW - 1), key >= RAW, value & (RAW - 1), value >= RAW


def words_of(layout: PageLayout, packs: Tensor) -> Tensor:
    """Words int64 [n] of packs int64 [n, 1 or more words]."""
    key, _, value, _ = heads(packs)
    return (HEAD + PACK * meta_bytes(layout) + key + value + WORD - 1) // WORD


def words_from(layout: PageLayout, head: int) -> int:
    """Words of a pack, from its first one."""
    key, value = head & (RAW - 1), (head >> 16) & (RAW - 1)
    return -(-(HEAD + PACK * meta_bytes(layout) + key + value) // WORD)


def bytes_per_token(layout: PageLayout, keys: Tensor, values: Tensor) -> float:
    """What a token of a packed tier takes, for vectors of one head in their rotated basis: what a calibration asks.

    Args:
        keys, values: [tokens, dim]; what is short of whole blocks of 64 is left out, at least one block is needed.

    Raises:
        ValueError: fewer than 64 tokens.
    """
    blocks = keys.shape[0] // BLOCK
    if blocks == 0:
        raise ValueError(f"{keys.shape[0]} tokens: packs are made of {BLOCK} tokens, give at least as many")
    none = torch.zeros(blocks * BLOCK, device=keys.device)
    tokens = code_tokens(layout, keys[: blocks * BLOCK], values[: blocks * BLOCK], none, none)
    pages = torch.zeros(blocks, layout.page_bytes, dtype=torch.uint8, device=keys.device)
    for name, part in tokens.items():
        part = part.unflatten(0, (blocks, BLOCK))
        layout.view(pages, name).copy_(part.transpose(1, 2) if name == "value" else part)
    _, words = seal(layout, pages)
    return float(words.sum()) * WORD / (blocks * BLOCK) + ADDRESS / PACK


# ---- what a token has beside its codes ---------------------------------------------------------------------------


def meta_words(layout: PageLayout) -> int:
    """Words in front of a pack that hold its head and all metadata."""
    return -(-(HEAD + PACK * meta_bytes(layout)) // WORD)


def unsealed_meta(layout: PageLayout, packs: Tensor) -> Tensor:
    """The bytes of pages from `meta_start` on, uint8 [n, bytes], of packs int64 [n, 4, meta_words or more]."""
    data = packs[..., : meta_words(layout)].contiguous().view(torch.uint8)[..., HEAD:]  # [n, 4, ...]
    parts, start = [], 0
    for size in _sizes(layout):
        parts.append(data[..., start : start + size * PACK].flatten(1))
        start += size * PACK
    return torch.cat(parts, 1)


def sealed_meta(layout: PageLayout, meta: Tensor) -> Tensor:
    """The inverse: bytes of pages from `meta_start` on -> bytes of each pack behind its head, uint8 [n, 4, ...]."""
    parts, start = [], 0
    for size in _sizes(layout):
        parts.append(meta[:, start : start + size * BLOCK].unflatten(1, (PACKS, -1)))
        start += size * BLOCK
    return torch.cat(parts, 2)


def _sizes(layout: PageLayout) -> list[int]:
    """Bytes per token of every part of a page beside codes, in their order."""
    fields = list(layout.fields.items())
    return [(b - a) // layout.tokens for name, (a, b) in fields if name not in ("key", "value")]


def _meta(layout: PageLayout, pages: Tensor) -> Tensor:
    """All metadata token by token: uint8 [n, 64, bytes]."""
    parts = [layout.view(pages, name)[..., None] for name in layout.meta_names]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 2)


def _by_field(layout: PageLayout, meta: Tensor) -> Tensor:
    """uint8 [n, 16, bytes] token by token -> [n, 16 * bytes] field by field."""
    return torch.cat([part.flatten(1) for part in meta.split([s for s in _sizes(layout) if s], 2)], 1)


# ---- codes -------------------------------------------------------------------------------------------------------


def codes_of(codec: Codec, data: Tensor) -> Tensor:
    """Bytes uint8 [n, 64, rows] -> codes uint8 [n, 64, dim]."""
    if codec.bits == 8:
        return data ^ codec.stored_zero if codec.signed else data
    return unpack_codes(data.flatten(0, 1), codec).unflatten(0, data.shape[:2])


def _bytes(codec: Codec, codes: Tensor) -> Tensor:
    """Codes uint8 [n * 4, 16, dim] -> bytes uint8 [n, 64, rows]."""
    flat = codes.flatten(0, 1)
    data = pack_codes(flat, codec) if codec.bits < 8 else flat ^ codec.stored_zero
    return data.unflatten(0, (-1, BLOCK))
