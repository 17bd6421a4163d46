"""Exact vectors into packed tokens: rotate, quantise, pack; and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.quant import PageLayout, decode, encode

LARGEST_SCORE = 65504.0
"""Scores are stored as fp16."""

Tokens = dict[str, Tensor]
"""Packed tokens by part of the page layout: `key` [n, rows], `value` [n, rows], every other part [n]."""

NOT_FINITE, BEYOND_BYTE, BEYOND_HALF = 1, 2, 4
"""Bits by which kernels flag what cannot be coded: NaN or infinity, a scale beyond a byte, metadata beyond fp16."""


@dataclass
class Basis:
    """The linear map under which a layer's vectors are coded: x -> (x - mean) @ rotation.

    Attributes:
        key, value: rotations [dim, dim] float32, or None for none.
        mean: float32 [rows, key_dim] in the rotated basis, subtracted from keys, or None.
    """

    key: Tensor | None
    value: Tensor | None
    mean: Tensor | None

    def of_keys(self, k: Tensor) -> Tensor:
        """Keys [rows, n, D] as they are coded, float32."""
        keys = self.rotate_keys(k)
        return keys if self.mean is None else keys - self.mean[:, None]

    def rotate_keys(self, k: Tensor) -> Tensor:
        return k.float() if self.key is None else k.float() @ self.key

    def rotate_values(self, v: Tensor) -> Tensor:
        return v.float() if self.value is None else v.float() @ self.value

    def unrotate_keys(self, k: Tensor) -> Tensor:
        return k if self.key is None else k @ self.key.T

    def unrotate_values(self, v: Tensor) -> Tensor:
        return v if self.value is None else v @ self.value.T

    def constant(self, q: Tensor) -> Tensor | None:
        """What subtracting the mean takes from every logit: rotated, scaled q [rows, queries, D] -> [rows, queries]."""
        return None if self.mean is None else torch.bmm(q, self.mean[..., None]).squeeze(-1)


def code_tokens(
    layout: PageLayout, keys: Tensor, values: Tensor, score: Tensor, birth: Tensor, saturate: bool = False
) -> Tokens:
    """Code vectors keys [n, D] and values [n, Dv] that are in the basis already; score float [n], birth int [n].

    Args:
        saturate: as of `encode`.

    Raises:
        ValueError: NaN, infinity or, unless it saturates, a scale beyond its format.
    """
    sides = {**code_side(layout, "key", keys, saturate), **code_side(layout, "value", values, saturate)}
    return {**sides, **code_marks(layout, score, birth)}


def code_side(layout: PageLayout, side: str, x: Tensor, saturate: bool = False) -> Tokens:
    """The parts of keys (`side="key"`) or values [n, dim], as of `code_tokens`."""
    parts = encode(getattr(layout, side), x, saturate)
    names = (side, f"{side}_scale", f"{side}_zero")
    return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


def code_marks(layout: PageLayout, score: Tensor, birth: Tensor) -> Tokens:
    """The parts that say when a token came and what it is worth, where the layout has them."""
    if not layout.scored:
        return {}
    return {"score": score.clamp_max(LARGEST_SCORE).half(), "birth": birth.to(torch.int32)}


def check_codable(layout: PageLayout, side: str, x: Tensor) -> None:
    """Raise the ValueError of `code_side` where that would, without coding vectors whose norm shows that they fit.

    A tier is asked so for tokens that it does not get yet, but may when they are demoted.
    """
    doubtful = (~(x.norm(dim=-1) <= getattr(layout, side).safe_norm)).nonzero().squeeze(1)  # NaN is among them
    if doubtful.numel():
        code_side(layout, side, x[doubtful])


def unpack_tokens(layout: PageLayout, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Packed tokens -> keys [n, D] and values [n, Dv], float32 in the rotated basis, mean still subtracted."""
    keys = decode(layout.key, tokens["key"], tokens.get("key_scale"), tokens.get("key_zero"))
    return keys, decode(layout.value, tokens["value"], tokens.get("value_scale"), tokens.get("value_zero"))


def check_flags(flags: int, late: bool = False) -> None:
    """Raise the ValueError of `code_tokens` for what a kernel has flagged.

    Args:
        late: it was stored already, since nobody has waited for the device.
    """
    if not flags:
        return
    if flags & NOT_FINITE:
        what, remedy = "keys or values hold NaN or infinite entries", "check the model's output and dtype"
    elif flags & BEYOND_BYTE:
        what, remedy = "a vector needs a scale beyond one byte", "use LeanKVConfig(codec='minmax')"
    else:
        what, remedy = "a vector is beyond fp16 metadata", "use a tier of 'exact'"
    done = "the flush before this one has packed them; call cache.reset() and" if late else "nothing was stored;"
    raise ValueError(f"{what}: {done} {remedy}")
