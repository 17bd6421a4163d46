"""Time of a decode step on the CPU, side by side in one run: SmolLM2 in float32, batch 1.

All caches are filled with the same text; then every round takes one step with each of them in turn, so that a busy
machine slows all alike. Steps are given as medians and as means (a mean has the flushes in it), ratios to DynamicCache
under "sdpa". The peak memory of the prompt (resident bytes above the loaded model) is measured in a process of its own.

    python benchmarks/decode_cpu.py --lengths 2000 7000
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from rows import RESULTS, merge_csv
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    QuantizedCache,
)

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.backends.select import VARIABLE
from hfkv.bench.timing import peak_above
from hfkv.demo import smollm2
from hfkv.demo.measures import fill
from hfkv.demo.texts import continuations


@dataclass(frozen=True)
class Kind:
    """A cache to time: how to make it, the model's attention, the package it needs, and the backend it is to run on."""

    attention: str
    new_cache: Callable[[PretrainedConfig], Cache]
    package: str = "torch"
    backend: str = "auto"

    @property
    def available(self) -> bool:
        top = self.package.split(".")[0]
        return importlib.util.find_spec(top) is not None and importlib.util.find_spec(self.package) is not None

    def filled(self, model: PreTrainedModel, ids: list[int]) -> Cache:
        """A new cache with a prompt in it."""
        with patch.dict(os.environ, {VARIABLE: self.backend}):
            return fill(model, ids, self.new_cache(model.config))


def _lean(preset: str, backend: str = "auto") -> Kind:
    return Kind("leankv", lambda _: LeanKVCache(LeanKVConfig.preset(preset)), backend=backend)


PRESETS = ("k8v4", "balanced", "aggressive")
TABLE = RESULTS / "decode_cpu.csv"
REFERENCE = "DynamicCache, sdpa"
KINDS = {
    REFERENCE: Kind("sdpa", lambda _: DynamicCache()),
    "DynamicCache, leankv": Kind("leankv", lambda _: DynamicCache()),
    **{preset: _lean(preset) for preset in PRESETS},
    **{f"{preset}, plain torch": _lean(preset, "torch") for preset in PRESETS},
    "QuantizedCache, quanto 4 bit": Kind("sdpa", lambda c: QuantizedCache("quanto", c, nbits=4), "optimum.quanto"),
    "QuantizedCache, hqq 4 bit": Kind("sdpa", lambda c: QuantizedCache("hqq", c, nbits=4), "hqq"),
}


def load(attention: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return smollm2.load(dtype=torch.float32, attn_implementation=attention)


@dataclass
class Times:
    """Seconds of prompts and of decode steps with one cache."""

    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def time_prompts(
    models: dict[str, PreTrainedModel], names: list[str], ids: list[int], repeats: int
) -> tuple[dict[str, Times], dict[str, Cache]]:
    """Fill every cache `repeats` times in turn; the last fillings are kept."""
    times, caches = {name: Times() for name in names}, {}
    for name in tqdm(names * repeats, desc=f"{len(ids)} tokens, prompts"):
        start = time.perf_counter()
        caches[name] = KINDS[name].filled(models[KINDS[name].attention], ids)
        times[name].prompts.append(time.perf_counter() - start)
    return times, caches


@torch.no_grad()
def time_steps(
    models: dict[str, PreTrainedModel], caches: dict[str, Cache], ids: list[int], times: dict[str, Times]
) -> None:
    """One decode step with each cache per token of `ids`; the first two rounds warm up and do not count."""
    for number, token in enumerate(tqdm(ids, desc="decode steps")):
        step = torch.tensor([[token]])
        for name, cache in caches.items():
            start = time.perf_counter()
            models[KINDS[name].attention](step, past_key_values=cache)
            if number >= 2:
                times[name].steps.append(time.perf_counter() - start)


def prompt_peak(name: str, tokens: int, threads: int) -> int:
    """Highest resident bytes during the prompt above those before it, in a fresh process (Linux with glibc)."""
    command = [sys.executable, __file__, "--peak-of", name, "--lengths", str(tokens), "--threads", str(threads)]
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}  # freed blocks go back at once: figures repeat
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=returned)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(name: str, tokens: int) -> int:
    """What the fresh process does."""
    kind = KINDS[name]
    model, tokenizer = load(kind.attention)
    ids = next(continuations(tokenizer, tokens, 1, seed=0)).context
    fill(model, ids[:64], DynamicCache())  # what any first forward allocates for good
    held: list[Cache] = []  # alive until the mark is read
    peak = peak_above(torch.device("cpu"), lambda: held.append(kind.filled(model, ids)))
    if peak is None:
        raise OSError("the peak of resident memory can only be read on Linux with glibc")
    return peak


def known_peaks(tokens: int) -> dict[str, str]:
    """What the table has of a length."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tokens"] == str(tokens)]
    return {row["cache"]: row["prompt_peak_mib"] for row in rows}


def result_rows(tokens: int, times: dict[str, Times], peaks: dict[str, str]) -> list[dict[str, object]]:
    """One row per cache, ratios to the reference in the same run."""
    median = {name: statistics.median(t.steps) for name, t in times.items()}
    mean = {name: statistics.fmean(t.steps) for name, t in times.items()}
    prompt = {name: statistics.median(t.prompts) for name, t in times.items()}
    slower = {name: statistics.median(_ratios(t.prompts, times[REFERENCE].prompts)) for name, t in times.items()}
    return [
        {
            "cache": name,
            "tokens": tokens,
            "step_ms": f"{1000 * median[name]:.1f}",
            "step_ratio": f"{median[name] / median[REFERENCE]:.3f}",
            "mean_step_ms": f"{1000 * mean[name]:.1f}",
            "mean_step_ratio": f"{mean[name] / mean[REFERENCE]:.3f}",
            "prompt_s": f"{prompt[name]:.2f}",
            "prompt_ratio": f"{slower[name]:.3f}",
            "prompts": len(times[name].prompts),
            "prompt_peak_mib": peaks.get(name, ""),
            "steps": len(times[name].steps),
        }
        for name in times
    ]


def _ratios(own: list[float], reference: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(own, reference, strict=True)]


def main() -> None:
    args = _arguments()
    args.caches = list(dict.fromkeys([REFERENCE, *args.caches]))
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(measure_peak(args.peak_of, args.lengths[0]))
        return
    for name in (name for name in args.caches if not KINDS[name].available):
        print(f"{name} is left out: package {KINDS[name].package} is not installed")
    names = [name for name in args.caches if KINDS[name].available]
    models = {attention: load(attention)[0] for attention in {KINDS[name].attention for name in names}}
    tokenizer = smollm2.load(dtype=torch.float32)[1]
    for tokens in args.lengths:
        text = next(continuations(tokenizer, tokens, args.steps + 2, seed=0))
        peaks = known_peaks(tokens)
        for name in tqdm([] if args.no_peaks else names, desc=f"{tokens} tokens, peaks"):
            peaks[name] = f"{prompt_peak(name, tokens, args.threads) / 2**20:.0f}"
        times, caches = time_prompts(models, names, text.context, args.prompt_repeats)
        time_steps(models, caches, text.following, times)
        merge_csv(TABLE, result_rows(tokens, times, peaks), by=("cache", "tokens"))
    print(TABLE.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 7000], help="cached tokens")
    parser.add_argument("--steps", type=int, default=64, help="decode steps per cache and length")
    parser.add_argument(
        "--caches", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="NAME", help="only these"
    )
    parser.add_argument("--no-peaks", action="store_true", help="keep the prompt's peak memory as the table has it")
    parser.add_argument("--prompt-repeats", type=int, default=5, help="prompts per cache and length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=list(KINDS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
