"""`Packed`: a tier whose codes are packed in runs of 16 tokens with as many bits as they need (PackKV)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PACK = 16
"""Tokens of a pack."""

BLOCK = 64
"""Tokens that are reordered together; four packs."""

HEAD = 4
"""Bytes in front of a pack: bytes of its keys and of its values, 16 bits each."""

RAW = 1 << 15
"""Flag in such a number: the codes are stored raw."""

WORD = 8
"""Packs begin and end at multiples of so many bytes."""

REPACKS = ("none", "greedy", "median", "bucket")
SIDES = ("both", "keys", "values")
WIDTHS = (8, 4, 3, 2)
BOUNDS = (1 / 200, 0.5)


@dataclass(frozen=True)
class Packed:
    """A tier of packed codes, for `LeanKVConfig(tiers=[Packed(rel_key=0.1, value_bits=2)])`.

    Codes are packed without loss, 64 tokens of a head at a time; a feature's 16 codes take their minimum and as many
    bits as they need above it. Tokens short of 64 wait in plain pages. Smaller or not, it is slower than plain tiers.

    Args:
        rel_key, rel_value: error-bounded codes: a step is at most this share of the vector's range, in [0.005, 0.5].
            Default 0.1 for keys and 0.2 for values, where no bits are given.
        key_bits, value_bits: instead of a bound, the codes of a plain tier, from {8, 4, 3, 2} bits.
        sides: what is packed, `both`, `keys` or `values`; the codes of the other side stay plain.
        repack: order of the tokens inside a block of 64: `none`, `greedy` (a pack grows by the token that adds the
            fewest bits), `median` (by the median value code), `bucket` (by the sum of codes, in 4 buckets).

    Raises:
        ValueError: a field is not valid; the message names it, the value and what is allowed.

    Source: PackKV, arXiv 2512.24449.
    """

    rel_key: float | None = None
    rel_value: float | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    sides: str = "both"
    repack: str = "greedy"

    def __post_init__(self) -> None:
        for side, default in (("key", 0.1), ("value", 0.2)):
            bound, bits = getattr(self, f"rel_{side}"), getattr(self, f"{side}_bits")
            if bound is None and bits is None:
                object.__setattr__(self, f"rel_{side}", default)
            elif bits is None:
                if isinstance(bound, bool) or not isinstance(bound, int | float) or not _bounded(bound):
                    _fail(f"rel_{side}", bound, f"a number in [{BOUNDS[0]:g}, {BOUNDS[1]:g}]")
            elif bound is not None:
                _fail(f"{side}_bits", bits, f"None where rel_{side} = {bound!r} is given: a bound or bits, not both")
            elif isinstance(bits, bool) or bits not in WIDTHS:
                _fail(f"{side}_bits", bits, f"one of {WIDTHS}, or None for rel_{side}")
        for field, allowed in (("sides", SIDES), ("repack", REPACKS)):
            if getattr(self, field) not in allowed:
                _fail(field, getattr(self, field), f"one of {', '.join(allowed)}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Packed:
        """From a JSON object."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"Packed: unknown field {unknown[0]!r}, allowed are {', '.join(known)}")
        return cls(**fields)

    def packs(self, side: str) -> bool:
        """Whether the codes of `key` or `value` are packed."""
        return self.sides in ("both", f"{side}s")

    def __str__(self) -> str:
        """Packed K0.1V2: bounds below 1, bits from 2 on."""
        key, value = self.rel_key or self.key_bits, self.rel_value or self.value_bits
        return f"Packed K{key:g}V{value:g}"


def _bounded(bound: float) -> bool:
    return BOUNDS[0] <= bound <= BOUNDS[1]


def _fail(field: str, value: object, allowed: str) -> None:
    raise ValueError(f"Packed.{field} = {value!r} is not valid: {allowed}")


@dataclass(frozen=True)
class PackedSide:
    """How the codes of keys or of values are packed.

    Attributes:
        dim: features of a vector.
        bits: width of a raw code, 1 to 8.
        packed: False: always raw.
    """

    dim: int
    bits: int
    packed: bool = True

    @property
    def width_bits(self) -> int:
        """Bits of a mini-pack's width, 0 to `bits`."""
        return self.bits.bit_length()

    @property
    def plane(self) -> int:
        """Bytes of one bit of all features."""
        return -(-self.dim // 8)

    @property
    def header(self) -> int:
        """Bytes of minima and widths, an even number."""
        return ((self.bits + self.width_bits) * self.plane + 1) // 2 * 2

    @property
    def raw_bytes(self) -> int:
        """The most that a side of a pack takes."""
        return 2 * self.bits * self.dim


@dataclass(frozen=True)
class PackFormat:
    """How the tokens of a page are packed.

    A pack: bytes of keys and of values (16 bits each) | per token, field after field, what a page has beside codes |
    keys | values, up to a multiple of 8 bytes.
    """

    key: PackedSide
    value: PackedSide
    repack: str

    def words(self, meta_bytes: int) -> int:
        """The most 8-byte words that a pack takes, with `meta_bytes` per token."""
        return -(-(HEAD + PACK * meta_bytes + self.key.raw_bytes + self.value.raw_bytes) // WORD)
