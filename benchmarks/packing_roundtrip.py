"""Packs random and real blocks of 64 tokens and unpacks them again: every byte of every token must come back.

python benchmarks/packing_roundtrip.py --blocks 100000
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from itertools import islice
from typing import Any

import torch
from packing import FOLLOWING, Recorder
from rows import RESULTS, merge_csv
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface

from hfkv.demo import smollm2
from hfkv.demo.texts import continuations
from hfkv.kernels.quantize_pack import code_tokens
from hfkv.kernels.sealing import pack_words, seal, unseal
from hfkv.packing import BLOCK, REPACKS, WORD, Packed
from hfkv.quant import Codec, PageLayout, pack_codes, rotation

TABLE = RESULTS / "packing_roundtrip.csv"
AT_ONCE = 250
KINDS = ("uniform", "constant", "narrow", "half constant", "alternating", "offset")
CODES = [(4, 2), (4, 3), (8, 4), (3, 3), (2, 8), (0.1, 0.2), (0.01, 0.5)]
DIMS = {(16, 16): 0.9, (64, 64): 0.05, (72, 20): 0.05}
"""Features of keys and values, and the share of the blocks that have them."""


def tier_of(codes: tuple[float, float], repack: str, sides: str) -> Packed:
    """A packed tier of bounds (below 1) or bits."""
    key, value = ({"bits": int(c)} if c >= 1 else {"rel": c} for c in codes)
    fields = {"rel_key": key.get("rel"), "key_bits": key.get("bits")}
    fields |= {"rel_value": value.get("rel"), "value_bits": value.get("bits")}
    return Packed(**fields, sides=sides, repack=repack)  # type: ignore[arg-type]


def random_codes(kind: str, count: int, codec: Codec) -> Tensor:
    """Codes uint8 [count, 64, dim], none above the codec's largest."""
    codes = torch.randint(0, codec.top + 1, (count, BLOCK, codec.dim))
    first = codes[:, :1].expand_as(codes)
    if kind == "constant":
        codes = first
    elif kind == "narrow":
        codes = (first // 2 + codes % 2).clamp(max=codec.top)
    elif kind == "half constant":
        codes = torch.where(torch.rand(count, 1, codec.dim) < 0.5, codes, first)
    elif kind == "alternating":
        codes = (torch.arange(BLOCK)[:, None] % 2 * codec.top).expand_as(codes)
    elif kind == "offset":
        x = torch.randn(count, BLOCK, codec.dim) + 2 * torch.randn(count, 1, codec.dim)
        codes = ((x + 4) / 8 * codec.top).round().clamp(0, codec.top)
    return codes.to(torch.uint8)


def random_pages(layout: PageLayout, kind: str, count: int) -> Tensor:
    """Full pages of such codes; all else is random, but births, which number a page's tokens."""
    pages = torch.randint(0, 256, (count, layout.page_bytes), dtype=torch.uint8)
    for name, codec in (("key", layout.key), ("value", layout.value)):
        codes = random_codes(kind, count, codec).flatten(0, 1)
        data = pack_codes(codes, codec) if codec.bits < 8 else codes ^ codec.stored_zero
        data = data.unflatten(0, (count, BLOCK))
        layout.view(pages, name).copy_(data if name == "key" else data.transpose(1, 2))
    layout.view(pages, "birth").copy_(torch.arange(BLOCK))
    return pages


def in_order(layout: PageLayout, pages: Tensor) -> Tensor:
    """All bytes of pages token by token, by birth: uint8 [n, 64, token_bytes]."""
    parts = []
    for name in ("key", "value", *layout.meta_names):
        part = layout.view(pages, name)
        part = part.transpose(1, 2) if name == "value" else part
        parts.append(part.reshape(*part.shape[:2], -1).contiguous().view(torch.uint8))
    whole = torch.cat(parts, 2)
    order = layout.view(pages, "birth").argsort(dim=1, stable=True)
    return whole.gather(1, order[..., None].expand_as(whole))


def check(layout: PageLayout, pages: Tensor) -> tuple[int, int]:
    """(blocks that do not come back, bytes of the packs)."""
    packs, words = seal(layout, pages)
    inside = torch.arange(pack_words(layout)) < words[..., None]
    again = unseal(layout, torch.where(inside, packs, -1))  # what is behind a pack must not matter
    wrong = (in_order(layout, again) != in_order(layout, pages)).flatten(1).any(1)
    return int(wrong.sum()), int(words.sum()) * WORD


def real_pages(layout: PageLayout, keys: Tensor, values: Tensor) -> Tensor:
    """Pages of real vectors [n, 64, dim]."""
    count = keys.shape[0]
    pages = torch.zeros(count, layout.page_bytes, dtype=torch.uint8)
    births = torch.arange(BLOCK).repeat(count)
    parts = code_tokens(layout, keys.flatten(0, 1), values.flatten(0, 1), torch.rand(count * BLOCK), births)
    for name, part in parts.items():
        part = part.unflatten(0, (count, BLOCK))
        layout.view(pages, name).copy_(part.transpose(1, 2) if name == "value" else part)
    return pages


def real_vectors(tokens: int) -> tuple[Tensor, Tensor]:
    """SmolLM2's keys and values of one text, in blocks [n, 64, dim]."""
    recorder = Recorder()
    AttentionInterface.register("recorder", recorder)
    AttentionMaskInterface.register("recorder", lambda *_, **__: None)
    model, tokenizer = smollm2.load(dtype=torch.float32, attn_implementation="recorder")
    text = next(islice(continuations(tokenizer, tokens, FOLLOWING, 11), 1))
    with torch.no_grad():
        model(torch.tensor([text.context]), use_cache=False)
    whole = tokens // BLOCK * BLOCK
    sides = (torch.cat([x[:, :whole] for x in side.values()]) for side in (recorder.k, recorder.v))
    k, v = (side.unflatten(1, (-1, BLOCK)).flatten(0, 1) for side in sides)
    return k, v


def layout_of(tier: Packed, dims: tuple[int, int]) -> PageLayout:
    return PageLayout.of(tier, dims, torch.float32, "fitted", BLOCK, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=100_000, help="random blocks; 0: none")
    parser.add_argument("--tokens", type=int, default=1000, help="of the real text; 0: none")
    parser.add_argument("--every", type=int, default=9, help="one of so many of its blocks is taken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = random.Random(0)
    cases = [(kind, codes, dims, how) for kind in KINDS for codes in CODES for dims in DIMS for how in REPACKS]
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def note(kind: str, how: str, layout: PageLayout, pages: Tensor) -> None:
        wrong, size = check(layout, pages)
        empty = {"codes": kind, "order": how, "blocks": 0, "wrong": 0, "bytes": 0, "plain_bytes": 0}
        row = rows.setdefault((kind, how), empty)
        row["blocks"] += len(pages)
        row["wrong"] += wrong
        row["bytes"] += size
        row["plain_bytes"] += pages.numel()

    for kind, codes, dims, how in tqdm(cases if args.blocks else [], desc="random"):
        layout = layout_of(tier_of(codes, how, chosen.choice(("both", "both", "keys", "values"))), dims)
        each = math.ceil(args.blocks * DIMS[dims] * len(DIMS) / len(cases))
        for first in range(0, each, AT_ONCE):
            note(kind, how, layout, random_pages(layout, kind, min(AT_ONCE, each - first)))
    if args.tokens:
        k, v = (side[:: args.every] for side in real_vectors(args.tokens))
        turn = rotation(k.shape[-1], 0)[0]
        for name, turned in (("real", False), ("real, rotated", True)):
            for codes, how in tqdm(list(itertools.product(CODES, REPACKS)), desc=name):
                layout = layout_of(tier_of(codes, how, "both"), (k.shape[-1], v.shape[-1]))
                keys, values = (x @ turn if turned else x for x in (k, v))
                note(name, how, layout, real_pages(layout, keys, values))
    table = [row | {"share": f"{row['bytes'] / row['plain_bytes']:.4f}"} for row in rows.values()]
    merge_csv(TABLE, table, by=("codes", "order"))
    print(TABLE.read_text())
    count, wrong = (sum(row[name] for row in rows.values()) for name in ("blocks", "wrong"))
    print(f"{count:,} blocks, {wrong} of them not as they were")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
