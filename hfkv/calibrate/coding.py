"""What packing leaves of one side, keys or values, of a layer: the cache's own codecs, outside the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.config import EXACT, LeanKVConfig
from hfkv.packing import Packed
from hfkv.policy import Candidates, Costs, Shares
from hfkv.quant import HIGH, NEW, Codec, decode, encode, rotation

HIGH_BITS = {"key": 8, "value": 4}
"""Bits of the high tier, wherever a layer has two."""

SIDES = ("key", "value")


@dataclass(frozen=True)
class Coding:
    """How one side of a layer is coded.

    Attributes:
        side: `key` or `value`.
        bits: of the only tier, or of the low one; 0 is the model's dtype.
        share: of the tokens that a high tier of `HIGH_BITS` holds; 0 means that there is one tier.
        rotate, shift: rotation over the head dimension; subtraction of the mean (keys only).
        bound: of error-bounded codes (`Packed`), else 0; `bits` are then what its codes take.
    """

    side: str
    bits: int
    share: float = 0.0
    rotate: bool = True
    shift: bool = False
    bound: float = 0.0

    def codec(self, dim: int, config: LeanKVConfig) -> Codec:
        """Of the only tier, or of the low one."""
        tier = Packed(self.bound, self.bound) if self.bound else (self.bits, self.bits)
        return Codec.of(tier, self.side, dim, torch.float32, config.codec)

    def __str__(self) -> str:
        text = f"{self.side[0].upper()}{self.bound or self.bits or EXACT}"
        text += f" under {self.share:g} high" if self.share else ""
        return text + ("" if self.rotate else " plain") + (" shifted" if self.shift else "")


def recoded(x: Tensor, coding: Coding, high: Tensor | None, config: LeanKVConfig) -> Tensor:
    """Vectors x [heads, tokens, dim] as they come back from pages, in x's dtype.

    Args:
        high: bool [heads, tokens], the tokens of the high tier; None for one tier.
        config: for codec and rotation seed.

    Raises:
        ValueError: NaN, infinity, or a scale beyond its format.
    """
    if not coding.bits:
        return x
    turn = _turn(x, coding, config)
    y = turned(x, coding, config)
    mean = y.mean(1, keepdim=True) if coding.shift else None
    if mean is not None:
        y = y - mean
    back = _through(y, coding.codec(x.shape[-1], config))
    if high is not None:
        best = Coding(coding.side, HIGH_BITS[coding.side]).codec(x.shape[-1], config)
        back = torch.where(high[..., None], _through(y, best), back)
    if mean is not None:
        back = back + mean
    return (back if turn is None else back @ turn.T).to(x.dtype)


def turned(x: Tensor, coding: Coding, config: LeanKVConfig) -> Tensor:
    """Vectors [..., dim] in the basis that they are coded in, float32."""
    turn = _turn(x, coding, config)
    return x.float() if turn is None else x.float() @ turn


def _turn(x: Tensor, coding: Coding, config: LeanKVConfig) -> Tensor | None:
    return rotation(x.shape[-1], config.rotation_seed, x.device)[0] if coding.rotate else None


def _through(y: Tensor, codec: Codec) -> Tensor:
    return decode(codec, *encode(codec, y.flatten(0, 1))).view(y.shape)


def high_tokens(score: Tensor, share: float) -> Tensor:
    """Which tokens the cache's policy makes high: score [heads, tokens] -> bool of that shape."""
    heads, tokens = score.shape
    candidates = Candidates(
        score=score[None],
        birth=torch.arange(tokens, device=score.device).expand(1, heads, -1),
        tier=torch.full((1, heads, tokens), NEW, dtype=torch.int8, device=score.device),
        seen=torch.tensor([tokens], device=score.device),
        length=torch.tensor([tokens], device=score.device),
        tiers=2,
        costs=Costs((0, 0), 1, 0, 0),
    )
    return Shares(share, 1.0)(candidates)[0] == HIGH
