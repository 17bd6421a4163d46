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


def pack_tokens(
    layout: PageLayout, basis: Basis, k: Tensor, v: Tensor, row: Tensor, score: Tensor, birth: Tensor
) -> Tokens:
    """Code tokens k [n, D], v [n, Dv] of the heads `row` [n]; score float [n], birth int [n].

    Raises:
        ValueError: NaN, infinity or a scale beyond its format.
    """
    keys = basis.rotate_keys(k)
    if basis.mean is not None:
        keys = keys - basis.mean[row]
    return code_tokens(layout, keys, basis.rotate_values(v), score, birth)


def check_codable(layout: PageLayout, basis: Basis, k: Tensor, v: Tensor, row: Tensor) -> None:
    """Raise the ValueError of `pack_tokens` where that would, without coding vectors whose norm shows that they fit.

    A tier is asked so for tokens that it does not get yet, but may when they are demoted.
    """
    centre = 0.0 if basis.mean is None else basis.mean[row].norm(dim=-1)
    small = (k.float().norm(dim=-1) + centre <= layout.key.safe_norm) & (
        v.float().norm(dim=-1) <= layout.value.safe_norm
    )
    doubtful = (~small).nonzero().squeeze(1)  # NaN is among them
    if doubtful.numel():
        nothing = torch.zeros(doubtful.numel(), dtype=torch.int64, device=k.device)
        pack_tokens(layout, basis, k[doubtful], v[doubtful], row[doubtful], nothing.float(), nothing)


def code_tokens(
    layout: PageLayout, keys: Tensor, values: Tensor, score: Tensor, birth: Tensor, saturate: bool = False
) -> Tokens:
    """Code vectors that are in the rotated basis already; `saturate`: as of `encode`."""
    tokens: Tokens = {}
    for side, codec, x in (("key", layout.key, keys), ("value", layout.value, values)):
        codes, scale, zero = encode(codec, x, saturate)
        tokens[side] = codes
        if scale is not None:
            tokens[f"{side}_scale"] = scale
        if zero is not None:
            tokens[f"{side}_zero"] = zero
    if layout.scored:
        tokens["score"] = score.clamp_max(LARGEST_SCORE).half()
        tokens["birth"] = birth.to(torch.int32)
    return tokens


def unpack_tokens(layout: PageLayout, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Packed tokens -> keys [n, D] and values [n, Dv], float32 in the rotated basis, mean still subtracted."""
    keys = decode(layout.key, tokens["key"], tokens.get("key_scale"), tokens.get("key_zero"))
    return keys, decode(layout.value, tokens["value"], tokens.get("value_scale"), tokens.get("value_zero"))


def check_flags(flags: int, late: bool = False) -> None:
    """Raise the ValueError of `pack_tokens` for what a kernel has flagged.

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
