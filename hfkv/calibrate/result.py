"""What a calibration is asked for, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hfkv.calibrate.coding import Coding
from hfkv.calibrate.options import Basis, Option
from hfkv.config import LeanKVConfig

NEAR = 0.8
"""A measured KL of at least this share of what is tolerated is not aimed at anew."""


@dataclass(frozen=True)
class Target:
    """What is asked for: exactly one of these, at most.

    Attributes:
        ratio: physical bytes per exact byte, at the prompts' length, everything counted.
        bytes_per_token: physical bytes per token of the prompts, all compressed layers together.
        kl: mean KL(exact || compressed) in nats on what follows the prompts.

    Raises:
        ValueError: none or several are given, or one is not a positive number.
    """

    ratio: float | None = None
    bytes_per_token: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = {name: x for name, x in vars(self).items() if x is not None}
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise ValueError(f"a calibration needs exactly one of ratio, bytes_per_token and kl, not {names}")
        for name, x in given.items():
            if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) or x <= 0:
                raise ValueError(f"{name} = {x!r} is not valid: a positive number")

    @property
    def name(self) -> str:
        return next(name for name, x in vars(self).items() if x is not None)

    @property
    def limit(self) -> float:
        return next(x for x in vars(self).values() if x is not None)

    def __str__(self) -> str:
        return f"{self.name} {self.limit:g}"


@dataclass(frozen=True)
class Attempt:
    """A config that was tried: what the layers' errors add up to, and what the real cache did.

    Attributes:
        predicted_kl: sum of the layers' errors.
        kl: mean KL(exact || real cache) on what follows the prompts.
        physical_bytes, exact_bytes, tokens: means over the prompts.
    """

    config: LeanKVConfig
    predicted_kl: float
    kl: float
    physical_bytes: float
    exact_bytes: float
    tokens: float

    @property
    def ratio(self) -> float:
        return self.physical_bytes / self.exact_bytes

    @property
    def bytes_per_token(self) -> float:
        return self.physical_bytes / self.tokens

    def unit(self, target: Target) -> float:
        """What a target in bytes counts by: exact bytes, or tokens."""
        return self.exact_bytes if target.ratio is not None else self.tokens

    def keeps(self, target: Target) -> bool:
        return bool(getattr(self, target.name) <= target.limit)

    def is_close(self, target: Target) -> bool:
        """Whether aiming anew would gain little: within a target in bytes; within a KL and not far below it."""
        return self.keeps(target) and (target.kl is None or self.kl >= NEAR * target.kl)

    def rank(self, target: Target) -> tuple[bool, float]:
        """The best attempt has the least: those that keep to the target first, then what was left free; of those that
        do not, the one that misses it least."""
        if not self.keeps(target):
            return True, getattr(self, target.name)
        return False, self.kl if target.kl is None else self.physical_bytes


@dataclass(frozen=True)
class Packing:
    """What packing does for a layer, at no more error than the layer has.

    Attributes:
        plain, plain_bytes: the smallest plain option and the bytes of its pages.
        packed, packed_bytes: the smallest packed option and the bytes of its pages; None where all err more.
        taken: whether the layer is packed.
    """

    plain: Option
    plain_bytes: float
    packed: Option | None
    packed_bytes: float | None
    taken: bool

    @property
    def saved(self) -> float | None:
        """Share of the plain bytes that packing spares; below 0 where it takes more."""
        return None if self.packed_bytes is None else 1 - self.packed_bytes / self.plain_bytes

    def __str__(self) -> str:
        if self.saved is None:
            return "none errs as little"
        said = f"{'saves' if self.saved >= 0 else 'costs'} {abs(self.saved):.1%}"
        return f"{said}, {'taken' if self.taken else 'not taken'}"


@dataclass(frozen=True)
class LayerResult:
    """One layer of a calibrated config: how it is coded, the mean KL in nats of its keys and of its values alone, the
    bytes of its pages, and, where packed tiers were measured, what they would take."""

    index: int
    option: Option
    basis: Basis
    key_kl: float
    value_kl: float
    page_bytes: float
    packing: Packing | None = None


@dataclass(frozen=True)
class Calibration:
    """A calibrated config and how it was found.

    Attributes:
        target: what was asked for.
        attempts: every config that was tried, in order.
        taken: the best of them, whose config this is.
        layers: per layer.
        errors: mean KL of every coding that was measured, by layer.
        choices: where packed tiers were measured, every option of each layer, bytes of its pages (of 64 tokens), KL.
    """

    target: Target
    attempts: list[Attempt]
    taken: Attempt
    layers: list[LayerResult]
    errors: dict[int, dict[Coding, float]] = field(repr=False)
    choices: dict[int, list[tuple[Option, float, float]]] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> LeanKVConfig:
        return self.taken.config

    def best(self, packed: bool) -> Attempt | None:
        """The best attempt with packed tiers, or without; None: nothing was tried."""
        tried = [attempt for attempt in self.attempts if attempt.config.packs == packed]
        return min(tried, key=lambda attempt: attempt.rank(self.target), default=None)

    @property
    def reached(self) -> bool:
        """Whether the real cache keeps to the target."""
        return self.taken.keeps(self.target)


def out_of_reach(target: Target, ends: Sequence[float], tokens: int, window: int) -> str:
    """What to say where no choice takes as few bytes as asked; `ends` are the least and the most that any takes."""
    return (
        f"{target} is out of reach: prompts of {tokens:,} tokens with an exact window of {window} reach "
        f"from {ends[0]:.4g} to {ends[1]:.4g}; ask for more, allow keys fewer bits, or calibrate for longer prompts "
        "or a smaller window"
    )
