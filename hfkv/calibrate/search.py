"""Calibration: measure every layer's keys and values alone, solve the knapsack, hold the real cache to it, refine."""

from __future__ import annotations

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
from hfkv.calibrate.plan import Choice, Planner
from hfkv.calibrate.recording import Prompt, Recording, behind, divergence, filled
from hfkv.calibrate.result import Attempt, Calibration, LayerResult, Target, out_of_reach
from hfkv.config import EXACT, LeanKVConfig
from hfkv.fingerprint import describe_config, describe_weights
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
        base: window, flush, observed queries, codec and page size to calibrate for; None is the default config.
        dtype: whose bytes are counted, if the model is measured in another one than it is used in.
        keep: a JSON-lines file of measurements, which a run that was stopped goes on from.
        made_for: a note for the config.
        progress: called as work begins and goes on, see `Progress`.

    Raises:
        ValueError: not exactly one target, one out of reach (the message names the range), no prompt, or a model of
            which nothing is compressed.
    """
    target = Target(ratio, bytes_per_token, kl)
    if not prompts:
        raise ValueError("a calibration needs at least one prompt")
    options = all_options(key_bits)
    search = _Search(model, base or LeanKVConfig(), options, dtype or model.dtype, Measured(keep), progress or _silent)
    return search.run(list(prompts), target, made_for)


def _silent(what: str, steps: int) -> Callable[[], object]:
    return lambda: None


class _Search:
    def __init__(
        self,
        model: PreTrainedModel,
        base: LeanKVConfig,
        options: list[Option],
        dtype: torch.dtype,
        measured: Measured,
        progress: Progress,
    ) -> None:
        self._model, self._base, self._dtype = model, base, dtype
        self._measured, self._progress = measured, progress
        fields = (base.window, base.flush, base.observe, base.codec, base.rotation_seed)
        self._identity = (_identity(model), str(model.dtype), *fields)
        self._options = options

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
        self._measure("widths and shares", {x: codings(self._options, self._bases[x]) for x in self._layers})
        sizes = {x: Sizes.of(self._recordings, x, SHARES, self._dtype) for x in self._layers}
        sums = {x: torch.tensor([self._error(x, option) for option in self._options]) for x in self._layers}
        return self._choose(Planner(sizes, self._options, sums), target)

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

    def _choose(self, planner: Planner, target: Target) -> Calibration:
        """Solve, hold the real cache to it, and solve again with what it did where the target is missed."""
        solve = self._by_error(planner, target) if target.kl is not None else self._by_bytes(planner, target)
        tried: list[Tried] = []
        while len(tried) <= REFINEMENTS:
            choice = solve(tried[-1] if tried else None)
            if any(choice.options == known.options for known, _ in tried):
                break
            tried.append((choice, self._verified(choice, self._recordings)))
            if tried[-1][1].is_close(target):
                break
        choice, taken = min(tried, key=lambda pair: pair[1].rank(target))
        attempts = [attempt for _, attempt in tried]
        layers = [self._result(planner, layer, option) for layer, option in choice.options.items()]
        return Calibration(target, attempts, taken, layers, self._errors)

    def _by_error(self, planner: Planner, target: Target) -> Callable[[Tried | None], Choice]:
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

    def _by_bytes(self, planner: Planner, target: Target) -> Callable[[Tried | None], Choice]:
        """The least error within bytes; the real cache says what lies beside the pages that the planner counts."""
        likely = planner.uniform(LIKELY)
        first = self._verified(likely, self._recordings[:1])
        limit, beside = target.limit * first.unit(target), first.physical_bytes - likely.bytes

        def solve(last: Tried | None) -> Choice:
            nonlocal beside
            if last is not None:
                beside = max(beside, last[1].physical_bytes - last[0].bytes)
            choice = planner.within_bytes(limit - beside)
            if choice is None:
                highest = planner.within_error(0.0)
                assert highest is not None, "exact layers have no error"
                ends = [(x + beside) / first.unit(target) for x in (planner.cheapest().bytes, highest.bytes)]
                raise ValueError(out_of_reach(target, ends, int(first.tokens), self._base.window + self._base.flush))
            return choice

        return solve

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
