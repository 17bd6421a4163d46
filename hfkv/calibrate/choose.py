"""From a planner's choices to a calibration: hold the real cache to them, refine, take the best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hfkv.calibrate.coding import SIDES, Coding
from hfkv.calibrate.options import SHARES, Basis, Option, config_of
from hfkv.calibrate.plan import Choice, Planner
from hfkv.calibrate.recording import Recording, behind, divergence, filled
from hfkv.calibrate.result import Attempt, Calibration, LayerResult, Packing, Target, out_of_reach
from hfkv.config import EXACT, LeanKVConfig
from hfkv.report import Report

REFINEMENTS = 2
"""Times that a missed target is aimed at anew with what the real cache did."""

LIKELY = Option((4, 2), SHARES[0])
"""What the bytes beside the pages (windows, tables) are first measured with."""

Tried = tuple[Choice, Attempt]
Solve = Callable[[Tried | None], Choice | None]
"""The choice to try after the last one, None at first; None where there is none."""

Progress = Callable[[str, int], Callable[[], object]]
"""`progress(what, steps)` begins a part of the work and returns what is called after every step."""


@dataclass(frozen=True)
class Cache:
    """The real cache, as a calibration fills it.

    Attributes:
        model: attends through `leankv`.
        recordings: the prompts.
        base: window, flush, codec and the like.
        bases: by layer.
        dtype: whose bytes are counted.
        made_for: a note for the configs.
        progress: see `Progress`.
    """

    model: PreTrainedModel
    recordings: list[Recording]
    base: LeanKVConfig
    bases: dict[int, Basis]
    dtype: torch.dtype
    made_for: str | None
    progress: Progress

    def attempt(self, choice: Choice, prompts: int | None = None) -> Attempt:
        """KL behind every prompt, or the first so many, and bytes."""
        config = config_of(self.base, choice.options, self.bases, self.made_for)
        recordings = self.recordings[:prompts]
        step = self.progress("through the real cache", len(recordings))
        rows = []
        for recording in recordings:
            held = filled(self.model, recording.prompt, config)
            sizes = physical_bytes(held.report(), self.dtype, self.model.dtype)
            kl = divergence(recording.reference, behind(self.model, recording.prompt, held))
            rows.append((kl, *sizes, len(recording.prompt[0])))
            step()
        return Attempt(config, choice.kl, *(math.fsum(column) / len(rows) for column in zip(*rows, strict=True)))


def choose(
    cache: Cache, target: Target, plain: Planner, packed: Planner | None, errors: dict[int, dict[Coding, float]]
) -> Calibration:
    """Try the best plain choice and, where there is one, the best with packed tiers; take the better of both.

    Args:
        plain, packed: without packed tiers, and with them; None: they are not wanted.
        errors: mean KL of every coding, by layer.

    Raises:
        ValueError: the target is out of reach.
    """
    solving = _within_error if target.kl is not None else _WithinBytes(cache, target, plain)
    of_plain = _tried(cache, solving(plain, target), target)
    of_packed = [] if packed is None else _tried(cache, solving(packed, target), target, _packs)
    tried = of_plain + of_packed
    if not tried:
        assert isinstance(solving, _WithinBytes), "exact layers have no error"
        raise ValueError(solving.out_of_reach(plain, packed or plain))
    choice, taken = _best(tried, target)
    planner = packed if packed is not None and _packs(choice) else plain
    layers = []
    for layer, option in choice.options.items():
        key, value = (errors[layer].get(option.coding(side, cache.bases[layer]), 0.0) for side in SIDES)
        found = LayerResult(layer, option, cache.bases[layer], key, value, planner.page_bytes(layer, option))
        layers.append(found if packed is None else dataclasses.replace(found, packing=compared(plain, packed, found)))
    return Calibration(target, [attempt for _, attempt in tried], taken, layers, errors)


def _tried(
    cache: Cache, solve: Solve, target: Target, worth_trying: Callable[[Choice], bool] = lambda choice: True
) -> list[Tried]:
    """Solve, hold the real cache to it, and solve again with what it did where the target is missed."""
    tried: list[Tried] = []
    while len(tried) <= REFINEMENTS:
        choice = solve(tried[-1] if tried else None)
        if choice is None or not worth_trying(choice) or any(choice.options == x.options for x, _ in tried):
            break
        tried.append((choice, cache.attempt(choice)))
        if tried[-1][1].is_close(target):
            break
    return tried


def _within_error(planner: Planner, target: Target) -> Solve:
    """The fewest bytes for a KL; the real cache's KL says what the sum of errors has to be aimed at."""
    assert target.kl is not None
    aim, limit = target.kl, target.kl

    def solve(last: Tried | None) -> Choice | None:
        nonlocal aim
        if last is not None:
            aim *= 0.95 * limit / last[1].kl
        return planner.within_error(aim)

    return solve


class _WithinBytes:
    """The least error within bytes; the real cache says what lies beside the pages that a planner counts."""

    def __init__(self, cache: Cache, target: Target, plain: Planner) -> None:
        likely = plain.uniform(LIKELY)
        self._first, self._cache, self._target = cache.attempt(likely, prompts=1), cache, target
        self._beside = self._first.physical_bytes - likely.bytes

    def __call__(self, planner: Planner, target: Target) -> Solve:
        limit, beside = target.limit * self._first.unit(target), self._beside

        def solve(last: Tried | None) -> Choice | None:
            nonlocal beside
            if last is not None:
                beside = max(beside, last[1].physical_bytes - last[0].bytes)
            return planner.within_bytes(limit - beside)

        return solve

    def out_of_reach(self, plain: Planner, packed: Planner) -> str:
        """What to say where no choice takes as few bytes."""
        highest, base = plain.within_error(0.0), self._cache.base
        assert highest is not None, "exact layers have no error"
        ends = (min(plain.cheapest().bytes, packed.cheapest().bytes), highest.bytes)
        shares = [(x + self._beside) / self._first.unit(self._target) for x in ends]
        return out_of_reach(self._target, shares, int(self._first.tokens), base.window + base.flush)


def _best(tried: list[Tried], target: Target) -> Tried:
    """What the real cache did best with; of equals the first."""
    return min(tried, key=lambda pair: pair[1].rank(target))


def _packs(choice: Choice) -> bool:
    return any(option.packed for option in choice.options.values())


def compared(plain: Planner, packed: Planner, layer: LayerResult) -> Packing:
    """The smallest plain and the smallest packed option of a layer that err no more than the one it got."""
    error, own = max(layer.key_kl + layer.value_kl, 0.0), layer.option  # what is measured as exact may be just below 0
    with_packs = own if own.packed else packed.smallest(layer.index, error, packed=True)
    without = plain.smallest(layer.index, error, packed=False) if own.packed else own
    assert without is not None, "exact layers have no error"
    size = None if with_packs is None else packed.page_bytes(layer.index, with_packs)
    return Packing(without, plain.page_bytes(layer.index, without), with_packs, size, own.packed)


def physical_bytes(report: Report, dtype: torch.dtype, measured_in: torch.dtype) -> tuple[float, float]:
    """Physical and exact bytes of a cache if exact vectors had `dtype` instead of the one that it was filled in."""
    share = dtype.itemsize / measured_in.itemsize
    exact_numbers = 0
    for layer in report.layers:
        exact_numbers += layer.bytes.get("window", 0) + layer.bytes.get("queries", 0)
        if EXACT in layer.tiers:
            exact_numbers += layer.bytes["codes"] + layer.bytes["free_slots"]
    return report.physical_bytes - exact_numbers * (1 - share), report.exact_bytes * share
