"""Moving tokens inside pages: take, put, and the stream compaction that closes holes from the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.kernels.quantize_pack import Tokens
from hfkv.quant import PageLayout, decode


def take(layout: PageLayout, pages: Tensor, slot: Tensor) -> Tokens:
    """Packed tokens at flat slots `page * tokens + slot`, int64 [n], of pages uint8 [pages, page_bytes]."""
    page, inside = slot // layout.tokens, slot % layout.tokens
    tokens = {"key": layout.view(pages, "key")[page, inside], "value": layout.view(pages, "value")[page, :, inside]}
    for name in layout.meta_names:
        tokens[name] = layout.view(pages, name)[page, inside]
    return tokens


def unpack_side(layout: PageLayout, pages: Tensor, side: str) -> Tensor:
    """The keys (`side="key"`) or values of pages uint8 [pages, page_bytes] in the basis that they are coded in.

    float32 [pages, tokens, dim]; free slots hold any numbers.
    """
    codec, codes = getattr(layout, side), layout.view(pages, side)
    codes = (codes if side == "key" else codes.transpose(1, 2)).flatten(0, 1)
    names = [name if name in layout.meta_names else None for name in (f"{side}_scale", f"{side}_zero")]
    scale, zero = (None if name is None else layout.view(pages, name).flatten() for name in names)
    return decode(codec, codes, scale, zero).view(-1, layout.tokens, codec.dim)


def put(layout: PageLayout, pages: Tensor, slot: Tensor, tokens: Tokens) -> None:
    """Write packed tokens to flat slots of pages, in place."""
    page, inside = slot // layout.tokens, slot % layout.tokens
    layout.view(pages, "key")[page, inside] = tokens["key"]
    layout.view(pages, "value")[page, :, inside] = tokens["value"]
    for name in layout.meta_names:
        layout.view(pages, name)[page, inside] = tokens[name]


def clear(layout: PageLayout, pages: Tensor, free: Tensor) -> None:
    """Zero the metadata of free slots, bool [pages, tokens], in place."""
    for name in layout.meta_names:
        layout.view(pages, name).masked_fill_(free, 0)


def pages_for(count: Tensor, tokens: int) -> Tensor:
    """Pages of `tokens` slots that hold so many tokens."""
    return (count + tokens - 1) // tokens


def touched_pages(stay: Tensor, before: Tensor, after: Tensor, tokens: int) -> Tensor:
    """Which of the rows' pages a compaction changes: bool [rows, pages]; the others stay as they are.

    Args:
        stay: bool [rows, pages * tokens], slots whose token keeps its tier.
        before, after: int64 [rows], tokens of each row.
    """
    slot = torch.arange(stay.shape[1], device=stay.device)
    in_place = stay & (slot < stay.sum(1, keepdim=True))  # neither a hole nor moved into one
    held = pages_for(before, tokens) * tokens  # slots of the pages that are there
    free = slot >= torch.minimum(torch.maximum(before, after), held)[:, None]
    return ~(in_place | free).view(stay.shape[0], stay.shape[1] // tokens, tokens).all(2)


def hole_moves(stay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens move where when only some stay: stay bool [rows, slots] -> (row, from, to), each int64 [moves].

    Every row keeps its first `stay.sum()` slots: a staying token behind them fills a hole among them, in order, so that
    a token moves only if it must.
    """
    inside = torch.arange(stay.shape[1], device=stay.device) < stay.sum(1, keepdim=True)  # [rows, slots]
    row, source = (stay & ~inside).nonzero(as_tuple=True)
    _, target = (~stay & inside).nonzero(as_tuple=True)  # as many per row as movers
    return row, source, target
