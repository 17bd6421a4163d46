"""What a layer may be coded as, what that costs in bytes, and the config that says so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfkv.calibrate.coding import HIGH_BITS, SIDES, Coding
from hfkv.calibrate.recording import Recording
from hfkv.config import BITS, CHOICE_FIELDS, EXACT, LeanKVConfig, Tier
from hfkv.kernels.sealing import ADDRESS, PACKS
from hfkv.packing import WORD, Packed
from hfkv.paging.rooms import GROWTH, PackPage, room_bytes
from hfkv.quant import PageLayout, top_code
from hfkv.report import tier_name

KEY_BITS = (8, 4)
"""3 bits cost little KL, and some recall: see `benchmarks/README.md`."""
VALUE_BITS = (8, 4, 3, 2)
SHARES = (0.03, 0.10)
KEY_BASES = ((True, False), (True, True), (False, True))
"""(rotated, mean subtracted) that are tried for keys; as they are, they were best in no layer of SmolLM2."""

HIGH = (HIGH_BITS["key"], HIGH_BITS["value"])
SMALL_PAGES = 6400
"""Up to this length the cache takes pages of 32 tokens for two tiers (`LeanKVCache.page_tokens`)."""

CLEARLY = 0.8
"""A basis other than the default one must have at most this share of its error."""


@dataclass(frozen=True)
class Basis:
    """Under what a layer's vectors are coded below 8-bit keys.

    Attributes:
        one, two: (rotated, mean subtracted) of its keys with one tier and with two.
        rotate_values: whether its values are rotated.
    """

    one: tuple[bool, bool] = (True, False)
    two: tuple[bool, bool] = (True, True)
    rotate_values: bool = True

    def coding(self, side: str, bits: int, share: float) -> Coding:
        if side == "value":
            return Coding(side, bits, share, self.rotate_values)
        rotate, shift = (True, False) if bits == 8 else self.two if share else self.one
        return Coding(side, bits, share, rotate, shift)


@dataclass(frozen=True)
class Option:
    """One way to code a layer: its only tier, or the low one under a high tier of `HIGH` with a share of the tokens.

    Attributes:
        rotate_keys: of a packed tier, whose keys are never shifted; the keys of plain ones go by the layer's `Basis`.
    """

    tier: Tier
    share: float = 0.0
    rotate_keys: bool = True

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return (HIGH, self.tier) if self.share else (self.tier,)

    @property
    def packed(self) -> bool:
        return isinstance(self.tier, Packed)

    def bits(self, side: str) -> int:
        """Bits of the low or only tier; 0 is the model's dtype."""
        if isinstance(self.tier, Packed):
            bound = self.bound(side)
            return top_code(bound).bit_length() if bound else int(getattr(self.tier, f"{side}_bits"))
        return int(self.tier[SIDES.index(side)]) if isinstance(self.tier, tuple) else 0

    def bound(self, side: str) -> float:
        """Of error-bounded codes, else 0."""
        return getattr(self.tier, f"rel_{side}") or 0.0 if isinstance(self.tier, Packed) else 0.0

    def coding(self, side: str, basis: Basis) -> Coding:
        """How this option codes a side; a low tier as fine as the high one is like one tier."""
        bits = self.bits(side)
        coding = basis.coding(side, bits, self.share if bits < HIGH_BITS[side] else 0.0)
        if self.packed and side == "key":
            coding = dataclasses.replace(coding, rotate=self.rotate_keys, shift=False)
        return dataclasses.replace(coding, bound=self.bound(side))

    def layouts(self, sizes: Sizes) -> list[PageLayout]:
        dims = (sizes.dims["key"], sizes.dims["value"])
        return [
            PageLayout.of(tier, dims, sizes.dtype, sizes.codec, sizes.page_tokens, bool(self.share))
            for tier in self.tiers
        ]

    def parts(self, sizes: Sizes) -> list[tuple[PageLayout | PackPage, Tensor]]:
        """What a pool holds of a layer: layouts, and pages of each, [prompts]; of pages of packs parts are counted."""
        high = sizes.high[self.share]  # [prompts, heads] tokens in the high tier
        counts = [high, sizes.tokens[:, None] - high] if self.share else [sizes.tokens[:, None].expand_as(high)]
        parts: list[tuple[PageLayout | PackPage, Tensor]] = []
        for layout, count in zip(self.layouts(sizes), counts, strict=True):
            if layout.pack is None:
                parts.append((layout, (-(-count // sizes.page_tokens)).sum(1)))
            else:
                room, held = PackPage(room_bytes(layout)), sizes.packs[self]
                parts += [(dataclasses.replace(layout, pack=None), held.loose), (room, held.rooms(room))]
        return parts

    def address_bytes(self, sizes: Sizes) -> float:
        """Bytes of the table that says where packs lie, the mean over the prompts."""
        return sizes.packs[self].pages.double().mean().item() * PACKS * ADDRESS if self.packed else 0.0

    def page_bytes(self, sizes: Sizes) -> float:
        """Bytes of a layer's pages, the mean over the prompts."""
        pages = sum(count.double().mean().item() * layout.page_bytes for layout, count in self.parts(sizes))
        return pages + self.address_bytes(sizes)

    def __str__(self) -> str:
        low = tier_name(self.tier)
        return f"{tier_name(HIGH)} {self.share:.0%}, {low}" if self.share else low


@dataclass(frozen=True)
class Packs:
    """The packed tokens of a layer.

    Attributes:
        words: int64 [prompts], words that packs take.
        pages: int64 [prompts], pages of 64 tokens by the table, those that wait for tokens among them.
        loose: int64 [prompts], those that do.
    """

    words: Tensor
    pages: Tensor
    loose: Tensor

    def rooms(self, room: PackPage) -> Tensor:
        """Pages of packs, float64 [prompts]: each leaves half a pack free, and a pool grows by more than it must."""
        packs = ((self.pages - self.loose) * PACKS).clamp_min(1)
        words = self.words.double()
        return (1 + GROWTH / 2) * words / (room.page_bytes / WORD - words / packs / 2)


@dataclass(frozen=True)
class Sizes:
    """What a layer's bytes depend on.

    Attributes:
        dims: head dimension by side.
        tokens: int64 [prompts], packed tokens per head.
        high: int64 [prompts, heads] tokens of the high tier, by share.
        dtype: the dtype that exact vectors have.
        packs: what packed options take.
    """

    dims: dict[str, int]
    tokens: Tensor
    high: dict[float, Tensor]
    page_tokens: int
    dtype: torch.dtype
    codec: str
    packs: dict[Option, Packs] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        recordings: list[Recording],
        layer: int,
        shares: Iterable[float],
        dtype: torch.dtype,
        page_tokens: int | None = None,
    ) -> Sizes:
        """Of a layer, in pages of so many tokens, or as many as the cache would choose."""
        config, packed = recordings[0].config, [recording.packed(layer, "key") for recording in recordings]
        value = recordings[0].packed(layer, "value")
        longest = max(len(recording.prompt[0]) for recording in recordings)
        high = {0.0: torch.zeros(len(packed), packed[0].shape[0], dtype=torch.long)}
        for share in shares:
            high[share] = torch.stack([recording.high(layer, share).sum(1).cpu() for recording in recordings])
        return cls(
            {"key": packed[0].shape[2], "value": value.shape[2]},
            torch.tensor([x.shape[1] for x in packed]),
            high,
            page_tokens or config.page_tokens or (32 if longest < SMALL_PAGES else 64),
            dtype,
            config.codec,
        )


def all_options(key_bits: Sequence[int] = KEY_BITS, shares: Iterable[float] = SHARES) -> list[Option]:
    """Every way to code a layer, one tier and two.

    Raises:
        ValueError: `key_bits` are not of those that keys can have.
    """
    if not key_bits or not set(key_bits) <= set(BITS):
        raise ValueError(f"key_bits={tuple(key_bits)!r}: give some of {BITS}")
    one = [Option(EXACT), *(Option(tier) for tier in itertools.product(key_bits, VALUE_BITS))]
    low = [(k, v) for k, v in itertools.product(key_bits, VALUE_BITS) if v <= HIGH[1] and (k, v) != HIGH]
    return one + [Option(tier, share) for share in shares for tier in low]


def codings(options: Iterable[Option], basis: Basis) -> list[Coding]:
    """What has to be measured to know the error of every option, each coding once."""
    needed = dict.fromkeys(option.coding(side, basis) for side in SIDES for option in options)
    return [coding for coding in needed if coding.bits]


def basis_codings(share: float) -> list[Coding]:
    """What has to be measured to choose a `Basis`."""
    keys = [Coding("key", 4, high, rotate, shift) for high in (0.0, share) for rotate, shift in KEY_BASES]
    return keys + [Coding("value", 2, share, rotate) for rotate in (True, False)]


def best_basis(errors: Mapping[Coding, float], share: float) -> Basis:
    """The basis with the least error; the default one unless another is clearly better."""

    def best(default: Coding) -> Coding:
        alike = [c for c in errors if (c.side, c.bits, c.share) == (default.side, default.bits, default.share)]
        winner = min(alike, key=errors.__getitem__)
        return winner if errors[winner] < CLEARLY * errors[default] else default

    sides = (("key", 4, 0.0), ("key", 4, share), ("value", 2, share))
    one, two, value = (best(Basis().coding(*side)) for side in sides)
    return Basis((one.rotate, one.shift), (two.rotate, two.shift), value.rotate)


def config_of(
    base: LeanKVConfig, chosen: dict[int, Option], bases: dict[int, Basis], made_for: str | None
) -> LeanKVConfig:
    """The config that codes every layer of `chosen` as said; what most of them share is said once."""
    common = max(chosen.values(), key=list(chosen.values()).count)
    layers = {index: _override(option, bases[index]) for index, option in chosen.items()}
    fields: dict[str, Any] = {**dict.fromkeys(CHOICE_FIELDS), "high_share": common.share or None}
    return dataclasses.replace(base, tiers=common.tiers, **fields, shift_keys=None, layers=layers, made_for=made_for)


def _override(option: Option, basis: Basis) -> dict[str, Any]:
    over: dict[str, Any] = {"tiers": option.tiers}
    if option.share:
        over["high_share"] = option.share
    if option.tier == EXACT:
        return over | {"rotate_keys": False, "rotate_values": False, "shift_keys": False}
    key, value = (option.coding(side, basis) for side in SIDES)
    return over | {"rotate_keys": key.rotate, "rotate_values": value.rotate, "shift_keys": key.shift}
