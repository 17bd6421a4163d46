"""Calibration: measure every layer's keys and values alone, solve the knapsack, hold the real cache to it, refine."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from hfkv.calibrate.coding import SIDES, Coding
from hfkv.calibrate.measured import Measured
from hfkv.calibrate.options import (
    KEY_BITS,
    SHARES,
    Option,
    Sizes,
    all_options,
    basis_codings,
    best_basis,
    codings,
    config_of,
)
from hfkv.calibrate.packs import PackSizes, check_base, packed_options, undominated
from hfkv.calibrate.plan import Choice, Planner
from hfkv.calibrate.recording import Prompt, Recording, behind, divergence, filled
from hfkv.calibrate.result import Attempt, Calibration, LayerResult, Packing, Target, out_of_reach
from hfkv.config import EXACT, LeanKVConfig
from hfkv.fingerprint import describe_config, describe_weights
from hfkv.packing import BLOCK
from hfkv.report import Report

REFINEMENTS = 2
"""Times that a missed target is aimed at anew with what the real cache did."""

LIKELY = Option((4, 2), SHARES[0])
"""What the bytes beside the pages (windows, tables) are first measured with."""

Tried = tuple[Choice, Attempt]

Progress = Callable[[str, int], Callable[[], object]]
"""`progress(what, steps)` begins a part of the work and returns what is called after every step."""


def calibrate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    ratio: float | None = None,
    bytes_per_token: float | None = None,
    kl: float | None = None,
    key_bits: Sequence[int] = KEY_BITS,
    packed: bool = False,
    base: LeanKVConfig | None = None,
    dtype: torch.dtype | None = None,
    keep: Path | None = None,
    made_for: str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find bits of keys and values, share of the high tier, rotation and mean shift of every layer, for a target.

        prompts = generated(tokenizer, tokens=1000, count=4)
        result = calibrate(model, prompts, ratio=0.3)
        model.generate(**inputs, past_key_values=LeanKVCache(result.config))

    Args:
        model: attends through `leankv`; measure it in float32 where small errors matter.
        prompts: (ids of the context, ids of what follows); bytes are those at the contexts' length.
        ratio, bytes_per_token, kl: the target, see `Target`; exactly one.
        key_bits: bits that keys may have. 3 and 2 reach lower bytes, at little KL, but cost recall.
        packed: also measure packed tiers (`Packed`), and take them where the real cache is smaller with them (for a
            KL) or errs less within the bytes. They are read more slowly than plain ones.
        base: window, flush, observed queries, codec and page size to calibrate for; None is the default config.
        dtype: whose bytes are counted, if the model is measured in another one than it is used in.
        keep: a JSON-lines file of measurements, which a run that was stopped goes on from.
        made_for: a note for the config.
        progress: called as work begins and goes on, see `Progress`.

    Raises:
        ValueError: not exactly one target, one out of reach (the message names the range), no prompt, a model of
            which nothing is compressed, or a base that packed tiers cannot have.
    """
    target = Target(ratio, bytes_per_token, kl)
    if not prompts:
        raise ValueError("a calibration needs at least one prompt")
    base = base or LeanKVConfig()
    if packed:
        check_base(base)
    kinds = (all_options(key_bits), packed_options(key_bits) if packed else [])
    search = _Search(model, base, *kinds, dtype or model.dtype, Measured(keep), progress or _silent)
    return search.run(list(prompts), target, made_for)


def _silent(what: str, steps: int) -> Callable[[], object]:
    return lambda: None


class _Search:
    def __init__(
        self,
        model: PreTrainedModel,
        base: LeanKVConfig,
        options: list[Option],
        packed: list[Option],
        dtype: torch.dtype,
        measured: Measured,
        progress: Progress,
    ) -> None:
        self._model, self._base, self._dtype = model, base, dtype
        self._measured, self._progress = measured, progress
        fields = (base.window, base.flush, base.observe, base.codec, base.rotation_seed)
        self._identity = (_identity(model), str(model.dtype), *fields)
        self._options, self._packed = options, packed
        self._choices: dict[int, list[tuple[Option, float, float]]] = {}

    def run(self, prompts: list[Prompt], target: Target, made_for: str | None) -> Calibration:
        self._made_for = made_for
        step = self._progress("exact prompts", len(prompts))
        self._recordings: list[Recording] = []
        for prompt in prompts:
            self._recordings.append(Recording(self._model, prompt, self._base))
            step()
        self._layers = self._recordings[0].layers
        self._errors: dict[int, dict[Coding, float]] = {layer: {} for layer in self._layers}
        self._measure("rotation and shift", {layer: basis_codings(SHARES[0]) for layer in self._layers})
        self._bases = {layer: best_basis(self._errors[layer], SHARES[0]) for layer in self._layers}
        kinds = self._options + self._packed
        self._measure("widths and shares", {x: codings(kinds, self._bases[x]) for x in self._layers})
        sizes = {x: Sizes.of(self._recordings, x, SHARES, self._dtype) for x in self._layers}
        plain = self._planner(sizes, dict.fromkeys(self._layers, self._options))
        return self._choose(plain, self._with_packed() if self._packed else None, target)

    def _planner(self, sizes: dict[int, Sizes], options: dict[int, list[Option]]) -> Planner:
        sums = {x: torch.tensor([self._error(x, option) for option in own]) for x, own in options.items()}
        return Planner(sizes, options, sums)

    def _with_packed(self) -> Planner:
        """Of plain options and packed ones, all in pages of 64 tokens, as a cache with a packed tier has them."""
        sizes = {x: Sizes.of(self._recordings, x, SHARES, self._dtype, BLOCK) for x in self._layers}
        options: dict[int, list[Option]] = {}
        step = self._progress("bytes of packs", len(self._layers))
        for layer, size in sizes.items():
            packs = PackSizes(self._recordings, layer, self._bases[layer], size)
            size.packs.update(packs.best(option) for option in self._packed)
            both = [(o, o.page_bytes(size), self._error(layer, o)) for o in (*self._options, *size.packs)]
            self._choices[layer] = both
            options[layer] = undominated(both)
            step()
        return self._planner(sizes, options)

    # ---- measure -------------------------------------------------------------------------------------------------

    def _measure(self, what: str, wanted: dict[int, list[Coding]]) -> None:
        """Errors of codings, one side of one layer at a time, the mean over prompts."""
        step = self._progress(what, sum(map(len, wanted.values())) * len(self._recordings))
        for layer, sides in wanted.items():
            for coding in sides:
                parts = []
                for recording in self._recordings:
                    parts.append(self._measured_error(recording, layer, coding))
                    step()
                self._errors[layer][coding] = math.fsum(parts) / len(parts)

    def _measured_error(self, recording: Recording, layer: int, coding: Coding) -> float:
        key = (*self._identity, recording.digest, layer, coding)
        known = self._measured.get(*key)
        return self._measured.add(recording.divergence({layer: [coding]}), *key) if known is None else known

    def _error(self, layer: int, option: Option) -> float:
        return sum(self._side_error(layer, option, side) for side in SIDES)

    def _side_error(self, layer: int, option: Option, side: str) -> float:
        coding = option.coding(side, self._bases[layer])
        return self._errors[layer][coding] if coding.bits else 0.0

    # ---- choose --------------------------------------------------------------------------------------------------

    def _choose(self, plain: Planner, packed: Planner | None, target: Target) -> Calibration:
        """Try the best plain choice and, where there is one, the best with packed tiers; take the better of both."""
        solve = self._by_error if target.kl is not None else self._by_bytes(plain)
        of_plain = self._tried(solve(plain, target), target)
        of_packed = [] if packed is None else self._tried(solve(packed, target), target, _packs)
        tried = of_plain + of_packed
        if not tried:
            raise ValueError(self._out_of_reach(plain, packed, target))
        choice, taken = best(tried, target)
        planner = packed if packed is not None and _packs(choice) else plain
        layers = [self._result(planner, layer, option) for layer, option in choice.options.items()]
        saved = None
        if packed is not None:
            layers = [dataclasses.replace(x, packing=_compared(plain, packed, x)) for x in layers]
            saved = _saved(packed, best(of_plain, target)[0]) if of_plain else None
        attempts = [attempt for _, attempt in tried]
        return Calibration(target, attempts, taken, layers, self._errors, saved, self._choices)

    def _tried(
        self,
        solve: Callable[[Tried | None], Choice | None],
        target: Target,
        worth_trying: Callable[[Choice], bool] = lambda choice: True,
    ) -> list[Tried]:
        """Solve, hold the real cache to it, and solve again with what it did where the target is missed."""
        tried: list[Tried] = []
        while len(tried) <= REFINEMENTS:
            choice = solve(tried[-1] if tried else None)
            if choice is None or not worth_trying(choice) or any(choice.options == x.options for x, _ in tried):
                break
            tried.append((choice, self._verified(choice, self._recordings)))
            if tried[-1][1].is_close(target):
                break
        return tried

    def _by_error(self, planner: Planner, target: Target) -> Callable[[Tried | None], Choice | None]:
        """The fewest bytes for a KL; the real cache's KL says what the sum of errors has to be aimed at."""
        assert target.kl is not None
        aim, limit = target.kl, target.kl

        def solve(last: Tried | None) -> Choice:
            nonlocal aim
            if last is not None:
                aim *= 0.95 * limit / last[1].kl
            choice = planner.within_error(aim)
            assert choice is not None, "exact layers have no error"
            return choice

        return solve

    def _by_bytes(self, plain: Planner) -> Callable[[Planner, Target], Callable[[Tried | None], Choice | None]]:
        """The least error within bytes; the real cache says what lies beside the pages that a planner counts."""
        likely = plain.uniform(LIKELY)
        self._first = self._verified(likely, self._recordings[:1])
        self._beside = self._first.physical_bytes - likely.bytes

        def solving(planner: Planner, target: Target) -> Callable[[Tried | None], Choice | None]:
            limit, beside = target.limit * self._first.unit(target), self._beside

            def solve(last: Tried | None) -> Choice | None:
                nonlocal beside
                if last is not None:
                    beside = max(beside, last[1].physical_bytes - last[0].bytes)
                return planner.within_bytes(limit - beside)

            return solve

        return solving

    def _out_of_reach(self, plain: Planner, packed: Planner | None, target: Target) -> str:
        highest = plain.within_error(0.0)
        assert highest is not None, "exact layers have no error"
        cheapest = min(planner.cheapest().bytes for planner in (plain, packed) if planner is not None)
        ends = [(x + self._beside) / self._first.unit(target) for x in (cheapest, highest.bytes)]
        return out_of_reach(target, ends, int(self._first.tokens), self._base.window + self._base.flush)

    def _verified(self, choice: Choice, recordings: list[Recording]) -> Attempt:
        """Through the real cache: KL behind every prompt, and bytes."""
        config = self._config(choice)
        step = self._progress("through the real cache", len(recordings))
        rows = []
        for recording in recordings:
            held = filled(self._model, recording.prompt, config)
            sizes = physical_bytes(held.report(), self._dtype, self._model.dtype)
            kl = divergence(recording.reference, behind(self._model, recording.prompt, held))
            rows.append((kl, *sizes, len(recording.prompt[0])))
            step()
        return Attempt(config, choice.kl, *(math.fsum(column) / len(rows) for column in zip(*rows, strict=True)))

    def _config(self, choice: Choice) -> LeanKVConfig:
        return config_of(self._base, choice.options, self._bases, self._made_for)

    def _result(self, planner: Planner, layer: int, option: Option) -> LayerResult:
        key, value = (self._side_error(layer, option, side) for side in SIDES)
        return LayerResult(layer, option, self._bases[layer], key, value, planner.page_bytes(layer, option))


def best(tried: list[Tried], target: Target) -> Tried:
    """What the real cache did best with; of equals the first."""
    return min(tried, key=lambda pair: pair[1].rank(target))


def _packs(choice: Choice) -> bool:
    return any(option.packed for option in choice.options.values())


def _compared(plain: Planner, packed: Planner, layer: LayerResult) -> Packing:
    """The smallest plain and the smallest packed option of a layer that err no more than the one it got."""
    error, own = layer.key_kl + layer.value_kl, layer.option
    with_packs = own if own.packed else packed.smallest(layer.index, error, packed=True)
    without = plain.smallest(layer.index, error, packed=False) if own.packed else own
    assert without is not None, "exact layers have no error"
    size = None if with_packs is None else packed.page_bytes(layer.index, with_packs)
    return Packing(without, plain.page_bytes(layer.index, without), with_packs, size, own.packed)


def _saved(packed: Planner, plain: Choice) -> float:
    """Share of the bytes of pages that packed tiers spare at the error of the plain choice, as far as predicted."""
    choice = packed.within_error(plain.kl)
    assert choice is not None, "exact layers have no error"
    return 1 - choice.bytes / plain.bytes


def physical_bytes(report: Report, dtype: torch.dtype, measured_in: torch.dtype) -> tuple[float, float]:
    """Physical and exact bytes of a cache if exact vectors had `dtype` instead of the one that it was filled in."""
    share = dtype.itemsize / measured_in.itemsize
    exact_numbers = 0
    for layer in report.layers:
        exact_numbers += layer.bytes.get("window", 0) + layer.bytes.get("queries", 0)
        if EXACT in layer.tiers:
            exact_numbers += layer.bytes["codes"] + layer.bytes["free_slots"]
    return report.physical_bytes - exact_numbers * (1 - share), report.exact_bytes * share


def _identity(model: nn.Module) -> str:
    """A checksum of the model's config and of a sample of its weights."""
    parts = [describe_config(getattr(model, "config", None))]
    parts += [describe_weights(module) for module in model.modules() if hasattr(module, "layer_idx")]
    return f"{zlib.crc32(json.dumps(parts, sort_keys=True, default=str).encode()):08x}"
