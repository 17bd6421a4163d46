"""Codecs and page layouts: how one vector becomes bytes, and where the bytes of a token lie in its page.

A code block of b bits splits a vector of `dim` features into 8 / b equal slices; byte j holds feature j of every slice,
slice i in its bits [i b, (i + 1) b). Three bits are a plane of two bits followed by a plane of one.
Keys lie token-major in a page (`[tokens, key_bytes]`), values feature-major (`[value_rows, tokens]`), so that a kernel
reads both straight into its matrix products. Metadata follows, one array per field, then scores and births.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfkv.config import EXACT, Tier
from hfkv.packing import Packed, PackedSide, PackFormat

HIGH, LOW, PRUNED, NEW, EMPTY = 0, 1, 2, 3, 4
"""Tiers of a token; NEW is exact and about to be packed, EMPTY is a slot without a token."""

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bit planes of a code, lowest bits first."""

GAUSS_STEP = {2: 0.9957, 3: 0.5860}
"""Step, in units of the rms, of the uniform quantiser of a normal variable with the least squared error."""

SCALE_STEPS = 12
SCALE_BIAS = 180
"""A scale byte c in [1, 255] stands for 2 ** ((c - 180) / 12): 2^-14.9 to 2^6.25. 0 marks a free slot."""


@dataclass(frozen=True)
class Codec:
    """How one side (keys or values) of a tier is coded: x = scale * (code - zero), per token and KV head.

    Attributes:
        bits: 8, 4, 3, 2, or 0 for the model's dtype.
        dim: features of a vector.
        kind: `exact`, `affine` (scale byte, integer zero byte), `bounded` (the same with a step of at most `bound` of
            the vector's range, PackKV), `fitted` (scale byte, codes around zero, scale refitted after coding) or
            `minmax` (fp16 scale and zero, as LeanKV publishes it).
        unbiased: fitted codes keep <x, code> = <x, x> (values) instead of the least squared error (keys).
        signed: 8-bit codes are stored as code - 128, int8, as integer tensor cores take them (keys).
        dtype: element type of `exact`.
        bound: largest step of `bounded`, per range of the vector (0 counts as part of it).
    """

    bits: int
    dim: int
    kind: str
    unbiased: bool = False
    signed: bool = False
    dtype: torch.dtype = torch.float32
    bound: float = 0.0

    @property
    def padded(self) -> int:
        """Features coded: `dim`, rounded up to a multiple of 8 where bytes hold several features."""
        return self.dim if self.bits in (0, 8) else -(-self.dim // 8) * 8

    @property
    def rows(self) -> int:
        """Elements per token: bytes of codes, or numbers of the model's dtype."""
        return self.dim if self.bits == 0 else self.padded * self.bits // 8

    @functools.cached_property
    def planes(self) -> tuple[tuple[int, int, int], ...]:
        """(first row, rows, bits) of every plane of codes, lowest bits first; exact vectors are one plane of 0 bits."""
        planes, first = [], 0
        for bits in PLANES[self.bits] if self.bits else (0,):
            rows = self.padded * bits // 8 if bits else self.dim
            planes.append((first, rows, bits))
            first += rows
        return tuple(planes)

    @property
    def columns(self) -> int:
        """Features of all planes, one after the other."""
        return self.padded * len(self.planes)

    @property
    def element(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize if self.bits == 0 else 1

    @property
    def scale_bytes(self) -> int:
        return {"exact": 0, "affine": 1, "bounded": 1, "fitted": 1, "minmax": 2}[self.kind]

    @property
    def zero_bytes(self) -> int:
        return {"exact": 0, "affine": 1, "bounded": 1, "fitted": 0, "minmax": 2}[self.kind]

    @property
    def top(self) -> int:
        """The largest code."""
        return top_code(self.bound) if self.kind == "bounded" else 2**self.bits - 1

    @property
    def code_bits(self) -> int:
        """Bits of a code; bytes hold codes of 2, 3, 4 or 8."""
        return self.top.bit_length()

    @property
    def safe_norm(self) -> float:
        """Norm r up to which every vector can be coded, whatever it is.

        A scale is at most 2 r / (levels - 1/2) where codes are affine, 2 r bound where they are bounded, and 2 r where
        they are fitted (no code is nearer to zero than 1/2), and a byte holds up to 76; fp16 holds the zero of minmax
        codes, at most r.
        """
        if self.kind == "bounded":
            return 35.0 / self.bound
        return {"exact": 1e18, "affine": 35.0 * (self.top - 0.5), "fitted": 35.0, "minmax": 32000.0}[self.kind]

    @property
    def center(self) -> float:
        """What stands for zero in the codes of `fitted`: code c is the number c - center."""
        return (2**self.bits - 1) / 2

    @property
    def stored_zero(self) -> int:
        """The code that the stored number 0 stands for."""
        return 128 if self.signed else 0

    @classmethod
    def of(cls, tier: Tier, side: str, dim: int, dtype: torch.dtype, scheme: str) -> Codec:
        """The codec of a tier's keys (`side="key"`) or values under `LeanKVConfig.codec`."""
        if isinstance(tier, str):
            return cls(0, dim, "exact", dtype=dtype)
        if isinstance(tier, Packed):
            bound = tier.rel_key if side == "key" else tier.rel_value
            if bound is not None:
                bits = next(b for b in (2, 3, 4, 8) if b >= top_code(bound).bit_length())
                return cls(bits, dim, "bounded", signed=side == "key" and bits == 8, bound=bound)
            tier = (tier.key_bits or 0, tier.value_bits or 0)
        bits = tier[0] if side == "key" else tier[1]
        signed = side == "key" and bits == 8
        if scheme == "minmax":
            return cls(bits, dim, "minmax", signed=signed)
        return cls(bits, dim, "fitted" if bits < 4 else "affine", unbiased=side == "value", signed=signed)


def top_code(bound: float) -> int:
    """The largest code of `bounded`: a step is up to one part of an octave's 12 smaller than the bound allows."""
    return math.floor(2 ** (1 / SCALE_STEPS) / bound + 1)


# ---- one vector --------------------------------------------------------------------------------------------------


def encode(codec: Codec, x: Tensor, saturate: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Code vectors `x` [n, dim] -> codes uint8 [n, rows] (or the model's dtype), scale [n], zero [n] as stored.

    Args:
        saturate: a scale beyond its format becomes the largest there is.

    Raises:
        ValueError: NaN or infinity in x, or, unless it saturates, a scale beyond its format.
    """
    if codec.kind == "exact":
        _check_finite(x.amin(-1) + x.amax(-1) if x.numel() else x, x)
        return x.to(codec.dtype), None, None
    x = x.float()
    if codec.kind == "fitted":
        levels, scale = _fit(codec, x, saturate)
        zero = None
    elif codec.kind in ("affine", "bounded"):
        levels, scale, zero = _affine(codec, x, saturate)
    else:
        levels, scale, zero = _minmax(codec, x, saturate)
    codes = levels.sub_(128).to(torch.int8).view(torch.uint8) if codec.signed else levels.to(torch.uint8)
    return pack_codes(codes, codec), scale, zero


def decode(codec: Codec, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """The vectors [n, dim] float32 that `encode`'s output stands for."""
    if codec.kind == "exact":
        return codes.float()
    assert scale is not None
    codes = codes.view(torch.int8) if codec.signed else unpack_codes(codes, codec)
    levels = codes.float()
    s, z = affine_terms(codec, scale, zero)
    return s[:, None] * (levels - (z[:, None] if isinstance(z, Tensor) else z))


def affine_terms(codec: Codec, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Stored metadata -> float32 (s, z) with x = s * (stored code - z), shaped like `scale`; z may be one number."""
    if codec.kind == "minmax":
        assert zero is not None
        s = scale.float()
        s = torch.where(s > 0, s, 1.0)  # a constant vector: all codes are 0
        return s, -zero.float() / s - codec.stored_zero
    return scale_from_byte(scale), codec.center if zero is None else zero.float() - codec.stored_zero


def scale_from_byte(code: Tensor) -> Tensor:
    """Scale bytes -> float32 scales."""
    return scale_from_code(code.float())


def scale_from_code(code: Tensor) -> Tensor:
    """Scale bytes as float32, which become the scales in place."""
    return code.sub_(SCALE_BIAS).mul_(1 / SCALE_STEPS).exp2_()


def _scale_to_byte(scale: Tensor, source: Tensor, rounding: Callable[[Tensor], Tensor], saturate: bool) -> Tensor:
    _check_finite(scale, source)
    code = rounding(scale.clamp_min(2.0**-30).log2().mul_(SCALE_STEPS)).add_(SCALE_BIAS)
    if not saturate and code.numel() and code.max() > 255:
        largest = source.abs().max().item()
        raise ValueError(
            f"a vector with an entry of {largest:.4g} needs a scale beyond one byte: use plain tiers with "
            "LeanKVConfig(codec='minmax')"
        )
    return code.clamp_(1, 255).to(torch.uint8)


def _affine(codec: Codec, x: Tensor, saturate: bool) -> tuple[Tensor, Tensor, Tensor]:
    top = codec.top
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)  # [n]; zero is always representable
    if codec.kind == "bounded":
        scale = _scale_to_byte((high - low) * codec.bound, x, torch.floor, saturate)
    else:
        scale = _scale_to_byte((high - low) / (top - 0.5), x, torch.ceil, saturate)
    step = scale_from_byte(scale)
    zero = (low / step).round().neg().clamp_(0, top)
    levels = (x / step[:, None]).add_(zero[:, None]).round_().clamp_(0, top)
    return levels, scale, zero.to(torch.uint8)


def _fit(codec: Codec, x: Tensor, saturate: bool) -> tuple[Tensor, Tensor]:
    top = 2**codec.bits - 1
    energy = (x * x).sum(-1)  # [n]
    step = (energy / codec.dim).sqrt().mul(GAUSS_STEP[codec.bits]).clamp_min(1e-30)
    levels = (x / step[:, None]).add_(codec.center).round_().clamp_(0, top)
    centred = levels - codec.center
    overlap = (x * centred).sum(-1)
    fitted = energy / overlap.clamp_min(1e-30) if codec.unbiased else overlap / centred.square().sum(-1)
    return levels, _scale_to_byte(fitted, x, torch.round, saturate)


def _minmax(codec: Codec, x: Tensor, saturate: bool) -> tuple[Tensor, Tensor, Tensor]:
    top = 2**codec.bits - 1
    low, high = x.amin(-1), x.amax(-1)  # [n]
    _check_finite(low + high, x)
    scale, zero = (high - low) / top, low
    if saturate:
        most = torch.finfo(torch.float16).max
        scale, zero = scale.clamp_max(most), zero.clamp(-most, most)
    scale, zero = scale.half(), zero.half()
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        raise ValueError(
            f"a vector with an entry of {x.abs().max().item():.4g} is beyond fp16 metadata: use a tier of {EXACT!r}"
        )
    levels = ((x - zero.float()[:, None]) / scale.float().clamp_min(1e-12)[:, None]).round_().clamp_(0, top)
    return levels, scale, zero


def _check_finite(summary: Tensor, source: Tensor) -> None:
    if not bool(torch.isfinite(summary).all()):
        bad = int((~torch.isfinite(source)).sum())
        raise ValueError(
            f"keys or values hold {bad} NaN or infinite entries: nothing was stored; check the model's output and dtype"
        )


# ---- bits to bytes -----------------------------------------------------------------------------------------------


def pack_codes(levels: Tensor, codec: Codec) -> Tensor:
    """Codes uint8 [n, dim] -> bytes uint8 [n, rows]."""
    if codec.padded != codec.dim:
        levels = torch.nn.functional.pad(levels, (0, codec.padded - codec.dim))
    planes, shift = [], 0
    for _, _, bits in codec.planes:
        plane = levels if len(codec.planes) == 1 else (levels >> shift) & (2**bits - 1)
        packed, *others = plane.chunk(8 // bits, -1)
        for i, part in enumerate(others, 1):
            packed = torch.add(packed, part, alpha=1 << (i * bits))
        planes.append(packed)
        shift += bits
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def unpack_codes(packed: Tensor, codec: Codec) -> Tensor:
    """Bytes uint8 [n, rows] -> codes uint8 [n, dim]."""
    levels, shift = None, 0
    for first, width, bits in codec.planes:
        part = spread_plane(packed[:, first : first + width], bits).movedim(0, 1).flatten(1)
        levels = part if levels is None else levels | (part << shift)
        shift += bits
    assert levels is not None
    return levels[:, : codec.dim]


def spread_plane(stored: Tensor, bits: int) -> Tensor:
    """Bytes of a plane, uint8 [...] -> the codes in each of their fields, [8 / bits, ...]; 0 bits: `stored` itself."""
    if bits in (0, 8):
        return stored[None]
    fields = torch.empty(8 // bits, *stored.shape, dtype=torch.uint8, device=stored.device)
    torch.bitwise_and(stored, 2**bits - 1, out=fields[0])
    for i in range(1, fields.shape[0]):
        torch.bitwise_right_shift(stored, i * bits, out=fields[i])
    if bits < 4:
        fields[1:-1].bitwise_and_(2**bits - 1)  # nothing is left above the last
    return fields


# ---- pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageLayout:
    """Where the parts of a page lie; the one table of bytes per token.

    A page is `tokens` slots: keys | values | key scale | value scale | key zero | value zero | score | birth.
    Score (fp16, 1 = uniform attention) and birth (int32, logical position) exist where `scored`. With `pack` full pages
    are kept packed (`hfkv.paging.sealed`), and these are the bytes that they are read as.
    """

    key: Codec
    value: Codec
    tokens: int
    scored: bool
    pack: PackFormat | None = None

    @classmethod
    def of(
        cls, tier: Tier, dims: tuple[int, int], dtype: torch.dtype, scheme: str, tokens: int, scored: bool
    ) -> PageLayout:
        """The pages of a tier, for keys and values of `dims` features; `scheme`: `LeanKVConfig.codec`."""
        key, value = (
            Codec.of(tier, side, dim, dtype, scheme) for side, dim in zip(("key", "value"), dims, strict=True)
        )
        pack = None
        if isinstance(tier, Packed):
            sides = [PackedSide(c.dim, c.code_bits, tier.packs(s)) for c, s in ((key, "key"), (value, "value"))]
            pack = PackFormat(sides[0], sides[1], tier.repack)
        return cls(key, value, tokens, scored, pack)

    @functools.cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Byte range [start, stop) of every part in a page."""
        sizes = {
            "key": self.key.rows * self.key.element,
            "value": self.value.rows * self.value.element,
            "key_scale": self.key.scale_bytes,
            "value_scale": self.value.scale_bytes,
            "key_zero": self.key.zero_bytes,
            "value_zero": self.value.zero_bytes,
            "score": 2 if self.scored else 0,
            "birth": 4 if self.scored else 0,
        }
        ranges, start = {}, 0
        for name, size in sizes.items():
            ranges[name] = (start, start + size * self.tokens)
            start += size * self.tokens
        return ranges

    @functools.cached_property
    def token_bytes(self) -> int:
        """Bytes of one token: codes, metadata, score and birth."""
        return self.fields["birth"][1] // self.tokens

    @functools.cached_property
    def page_bytes(self) -> int:
        return self.fields["birth"][1]

    @functools.cached_property
    def meta_start(self) -> int:
        """First byte behind the codes: from here on a free slot is zero."""
        return self.fields["value"][1]

    @functools.cached_property
    def zero_start(self) -> int:
        """First byte that must be zero in an unused page: exact values count, which could be NaN."""
        return self.fields["value"][1 if self.value.bits else 0]

    def view(self, pages: Tensor, name: str) -> Tensor:
        """One part of pages uint8 [n, page_bytes], contiguous, as a view in its own dtype.

        Shapes: `key` [n, tokens, rows], `value` [n, rows, tokens], all else [n, tokens].
        """
        dtype, shape, strides, start = self._views[name]
        typed = pages if dtype == torch.uint8 else pages.view(dtype)
        stride = typed.stride(0)
        return typed.as_strided((pages.shape[0], *shape), (stride, *strides), typed.storage_offset() + start)

    def part(self, data: Tensor, start: int, name: str) -> Tensor:
        """A per-token part [n, tokens] of the bytes from `start` on of pages, uint8 [n, bytes], as a view."""
        first, stop = self.fields[name]
        return data[:, first - start : stop - start].view(self.dtype_of(name))

    @functools.cached_property
    def _views(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]:
        """Per part: dtype, shape and strides inside a page, first element."""
        views: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]] = {}
        for name, (start, _) in self.fields.items():
            dtype, shape = self.dtype_of(name), (self.tokens,)  # type: torch.dtype, tuple[int, ...]
            if name == "key":
                shape = (self.tokens, self.key.rows)
            elif name == "value":
                shape = (self.value.rows, self.tokens)
            strides = (*shape[1:], 1)
            views[name] = (dtype, shape, strides, start // dtype.itemsize)
        return views

    @functools.cached_property
    def byte_metadata(self) -> bool:
        """Whether scales and zeros are single bytes, in one stretch: key scale, value scale, then zeros."""
        return {self.key.kind, self.value.kind} <= {"affine", "bounded", "fitted"}

    def dtype_of(self, name: str) -> torch.dtype:
        if name in ("key", "value"):
            side = self.key if name == "key" else self.value
            return torch.uint8 if side.bits else side.dtype
        if name == "score":
            return torch.float16
        if name == "birth":
            return torch.int32
        codec = self.key if name.startswith("key") else self.value
        return torch.float16 if codec.kind == "minmax" else torch.uint8

    @property
    def meta_names(self) -> tuple[str, ...]:
        """The per-token parts that this layout has besides codes."""
        return tuple(n for n, (a, b) in self.fields.items() if b > a and n not in ("key", "value"))


# ---- rotation ----------------------------------------------------------------------------------------------------


def rotation(dim: int, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, str]:
    """An orthogonal matrix [dim, dim] float32 that spreads every feature over all, and its name for the report.

    Hadamard (normalised) for dim = 2^k x {1, 12, 20, 28}; otherwise a fixed orthogonal matrix drawn with `seed`.
    """
    return _rotation_on(dim, seed, torch.device(device))


@functools.lru_cache(maxsize=64)
def _rotation_on(dim: int, seed: int, device: torch.device) -> tuple[Tensor, str]:
    """One matrix for all layers and caches of a device."""
    matrix, name = _rotation(dim, seed)
    return matrix.to(device), name


def _rotation(dim: int, seed: int) -> tuple[Tensor, str]:
    for base in (1, 12, 20, 28):
        power, rest = divmod(dim, base)
        if rest == 0 and power & (power - 1) == 0:
            matrix = _hadamard_base(base)
            while matrix.shape[0] < dim:
                matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
            return (matrix / dim**0.5).float(), f"hadamard {dim}"
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().contiguous(), f"orthogonal {dim} (seed {seed})"


def _hadamard_base(order: int) -> Tensor:
    """Paley's constructions: order q + 1 for q = 11, 19; order 2 (q + 1) for q = 13."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    first = order != 28
    q = order - 1 if first else order // 2 - 1
    squares = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    index = (torch.arange(q)[:, None] - torch.arange(q)[None]) % q
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = chi[index]
    core[0, 1:] = 1
    core[1:, 0] = -1 if first else 1
    if first:
        return core + torch.eye(q + 1, dtype=torch.float64)
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, on) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
