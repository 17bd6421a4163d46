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

from hfkv.calibrate.choose import Cache, Progress, choose
from hfkv.calibrate.coding import SIDES, Coding
from hfkv.calibrate.measured import Measured
from hfkv.calibrate.options import KEY_BITS, SHARES, Option, Sizes, all_options, basis_codings, best_basis, codings
from hfkv.calibrate.packs import PackSizes, check_base, packed_options, undominated
from hfkv.calibrate.plan import Planner
from hfkv.calibrate.recording import Prompt, Recording
from hfkv.calibrate.result import Calibration, Target
from hfkv.config import LeanKVConfig
from hfkv.fingerprint import describe_config, describe_weights
from hfkv.packing import BLOCK


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
        packed = self._with_packed() if self._packed else None
        cache = Cache(self._model, self._recordings, self._base, self._bases, self._dtype, made_for, self._progress)
        return dataclasses.replace(choose(cache, target, plain, packed, self._errors), choices=self._choices)

    def _planner(self, sizes: dict[int, Sizes], options: dict[int, list[Option]]) -> Planner:
        sums = {x: torch.tensor([self._error(x, o) for o in own], dtype=torch.float64) for x, own in options.items()}
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
        sides = [option.coding(side, self._bases[layer]) for side in SIDES]
        return sum(self._errors[layer][coding] for coding in sides if coding.bits)


def _identity(model: nn.Module) -> str:
    """A checksum of the model's config and of a sample of its weights."""
    parts = [describe_config(getattr(model, "config", None))]
    parts += [describe_weights(module) for module in model.modules() if hasattr(module, "layer_idx")]
    return f"{zlib.crc32(json.dumps(parts, sort_keys=True, default=str).encode()):08x}"
