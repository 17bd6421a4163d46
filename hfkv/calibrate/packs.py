"""Packed tiers (PackKV) in a calibration: which are tried, and what their packs would take in the real cache."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hfkv.calibrate.coding import HIGH_BITS, Coding, turned
from hfkv.calibrate.options import SHARES, VALUE_BITS, Basis, Option, Packs, Sizes
from hfkv.calibrate.recording import Recording
from hfkv.config import LeanKVConfig
from hfkv.kernels.packing import measure, repack
from hfkv.kernels.sealing import codes_of, meta_bytes, pack_format
from hfkv.packing import BLOCK, HEAD, PACK, WORD, Packed
from hfkv.quant import encode

KEY_BOUND, VALUE_BOUND = 0.1, 0.2
"""Of the error-bounded codes, as `Packed` has them by itself. Keys err then as those of 3 bits do."""

CLEARLY = 0.99
"""Another order of tokens, or packed values beside the keys, must take at most this share of the words."""


def packed_options(key_bits: Sequence[int]) -> list[Option]:
    """Every packed tier to try, keys packed as they lie; `PackSizes.best` says what else is packed, in which order.

    Error-bounded keys where fewer than 4 bits are allowed, and error-bounded codes as an only tier.
    """
    keys = [Packed(key_bits=bits) for bits in key_bits]
    keys += [Packed(rel_key=KEY_BOUND)] if min(key_bits) < 4 else []
    values = [*(Packed(value_bits=bits) for bits in VALUE_BITS), Packed(rel_value=VALUE_BOUND)]
    tiers = [Packed(k.rel_key, v.rel_value, k.key_bits, v.value_bits) for k, v in itertools.product(keys, values)]
    low = [t for t in tiers if (t.key_bits or 8) < HIGH_BITS["key"] and (t.value_bits or 8) <= HIGH_BITS["value"]]
    shapes = [*((tier, 0.0) for tier in tiers), *((tier, share) for share in SHARES for tier in low)]
    return [Option(next(_variants(tier)), share, rotated) for tier, share in shapes for rotated in (True, False)]


class PackSizes:
    """What packs of one layer take, by coding, sides and order of tokens.

    Args:
        recordings: the prompts.
        layer: its index.
        basis: whether its values are rotated.
        sizes: of the layer, with pages of 64 tokens.
    """

    def __init__(self, recordings: list[Recording], layer: int, basis: Basis, sizes: Sizes) -> None:
        self._recordings, self._layer, self._basis, self._sizes = recordings, layer, basis, sizes
        self._blocks: dict[tuple[int, Coding, float], Tensor] = {}
        self._orders: dict[tuple, Tensor] = {}
        self._bytes: dict[tuple, Tensor] = {}

    def best(self, option: Option) -> tuple[Option, Packs]:
        """Pack what is worth it, in the order that is: judged by the first prompt; bytes of all prompts."""
        least, chosen = float("inf"), option
        for tier in _variants(option.tier):
            tried = dataclasses.replace(option, tier=tier)
            words = int(self.words(0, tried).sum())
            if words < CLEARLY * least:
                least, chosen = words, tried
        tokens, high = self._sizes.tokens[:, None], self._sizes.high[option.share]
        held = (tokens - high) if option.share else tokens.expand_as(high)  # [prompts, heads]
        taken = torch.tensor([int(self.words(i, chosen).sum()) for i in range(len(self._recordings))])
        return chosen, Packs(taken, (-(-held // BLOCK)).sum(1), (held % BLOCK > 0).sum(1))

    def words(self, prompt: int, option: Option) -> Tensor:
        """Words of each pack of a prompt, int64 [packs], heads one after the other; as `sealing.seal` would pack it."""
        layout = option.layouts(self._sizes)[-1]
        form = pack_format(layout)
        key, value = (dataclasses.replace(option.coding(side, self._basis), share=0.0) for side in ("key", "value"))
        sides, order = [(key, form.key), (value, form.value)], self._order_name(option, key, value)
        total: Tensor | int = HEAD + PACK * meta_bytes(layout)
        for coding, side in sides:
            if not side.packed:
                total = total + side.raw_bytes
                continue
            name = (prompt, coding, option.share, order)
            if name not in self._bytes:
                codes = self._codes(prompt, coding, option.share)
                if order:
                    codes = codes.gather(1, self._order(prompt, option.share, order)[..., None].expand_as(codes))
                self._bytes[name] = measure(side, codes.unflatten(1, (-1, PACK)).flatten(0, 1))[2].cpu()
            total = total + self._bytes[name]
        assert isinstance(total, Tensor), "no side of a packed tier is packed"
        return (total + WORD - 1) // WORD

    @staticmethod
    def _order_name(option: Option, key: Coding, value: Coding) -> tuple[Coding, ...]:
        """The sides whose codes decide the order; none where tokens lie as they come."""
        assert isinstance(option.tier, Packed)
        if option.tier.repack == "none":
            return ()
        return tuple(c for c, side in ((key, "key"), (value, "value")) if option.tier.packs(side))

    def _order(self, prompt: int, share: float, sides: tuple[Coding, ...]) -> Tensor:
        """Greedy, int64 [blocks, 64]."""
        name = (prompt, share, sides)
        if name not in self._orders:
            codes = torch.cat([self._codes(prompt, coding, share) for coding in sides], 2)
            self._orders[name] = repack(codes, codes[..., :0], "greedy")
        return self._orders[name]

    def _codes(self, prompt: int, coding: Coding, share: float) -> Tensor:
        """Codes of whole blocks of the tokens that are not in a high tier, uint8 [blocks, 64, dim]."""
        name = (prompt, coding, share)
        if name not in self._blocks:
            recording = self._recordings[prompt]
            x = turned(recording.packed(self._layer, coding.side), coding, recording.config)  # [heads, tokens, dim]
            if share:
                low = ~recording.high(self._layer, share)
                rows = [y[own] for y, own in zip(x, low, strict=True)]
            else:
                rows = list(x)
            x = torch.cat([y[: len(y) // BLOCK * BLOCK] for y in rows])
            codec = coding.codec(x.shape[-1], recording.config)
            data = encode(codec, x)[0]
            self._blocks[name] = codes_of(codec, data.unflatten(0, (len(x) // BLOCK, BLOCK)))
        return self._blocks[name]


def _variants(tier: object) -> Iterator[Packed]:
    """Simple ones first; values are reordered only where their codes leave something to pack."""
    assert isinstance(tier, Packed)
    yield dataclasses.replace(tier, sides="keys", repack="none")
    yield dataclasses.replace(tier, sides="keys", repack="greedy")
    yield dataclasses.replace(tier, sides="both", repack="none")
    if tier.rel_value:
        yield dataclasses.replace(tier, sides="both", repack="greedy")


def undominated(choices: list[tuple[Option, float, float]]) -> list[Option]:
    """All plain options, and the packed ones that no option beats in bytes and error; `choices`: option, both."""

    def beaten(size: float, error: float) -> bool:
        return any((s, e) != (size, error) and s <= size and e <= error for _, s, e in choices)

    return [option for option, *own in choices if not option.packed or not beaten(*own)]


def check_base(base: LeanKVConfig) -> None:
    """Whether a calibrated config with this base can have packed tiers.

    Raises:
        ValueError: codec or page size cannot hold them.
    """
    if base.codec != "fitted":
        raise ValueError(f"packed tiers need the codec 'fitted', and the given config has {base.codec!r}")
    if base.page_tokens == 32:
        raise ValueError("packed tiers need pages of 64 tokens, and the given config has page_tokens = 32")
