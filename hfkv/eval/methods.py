"""The methods that are compared: ours, the exact cache and the peers; making their caches and counting their bytes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, PretrainedConfig, QuantizedCache

from hfkv.bench import caches
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig
from hfkv.eval.eviction import H2O, SnapKV, config_of
from hfkv.eval.kivi import KIVICache
from hfkv.eval.record import observed

EXACT = "exact"
KEPT, PRUNED, PAPER, OWN = "hfkv, nothing pruned", "hfkv, pruned", "LeanKV as published", "hfkv, own config"
OURS = (KEPT, PRUNED, OWN)


@dataclass(frozen=True)
class Method:
    """One point of a curve.

    Attributes:
        name: as `--methods` and the CSV call it.
        family: the curve that it is on.
        new_cache: an empty cache for a model of this config.
        missing: the package that it needs and that is not installed, or None.
        setting: what else tells it apart, for measurements that are kept.
        observe: last queries of a prompt that it looks at.
    """

    name: str
    family: str
    new_cache: Callable[[PretrainedConfig], Cache]
    missing: str | None = None
    setting: str = ""
    observe: int = 1


def physical_bytes(cache: Cache) -> int:
    """Every byte that a cache holds for its tokens: codes, scales, zeros, windows and residuals, metadata, tables."""
    return cache.physical_bytes if isinstance(cache, KIVICache) else caches.physical_bytes(cache)


def _lean(name: str, family: str, config: LeanKVConfig, setting: str = "") -> Method:
    new_cache, setting = (lambda _: LeanKVCache(config)), setting or repr(config)
    return Method(name, family, new_cache, setting=setting, observe=observed(config))


def _evicting(policy: SnapKV | H2O) -> Method:
    family = "SnapKV" if isinstance(policy, SnapKV) else "H2O"
    return _lean(f"{family.lower()}-{policy.share:g}", family, config_of(policy), repr(policy))


def _quantized(backend: str, package: str, **options: Any) -> Method:
    parts = (package.split(".")[0], package)
    missing = package if any(importlib.util.find_spec(part) is None for part in parts) else None
    if backend == "fp8" and not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        missing = "transformers with QuantizedCache('fp8')"
    name = f"{backend}-{options['nbits']}" if options else backend

    def new_cache(config: PretrainedConfig) -> Cache:
        return QuantizedCache(backend, config, **options)

    return Method(name, f"QuantizedCache, {backend}", new_cache, missing)


def _kivi(bits: int) -> Method:
    return Method(f"kivi-{bits}", "KIVI", partial(KIVICache, bits))


def _tiers(*tiers: tuple[int, int], **changes: Any) -> LeanKVConfig:
    return LeanKVConfig(tiers=tiers, **changes)


METHODS = {
    method.name: method
    for method in (
        Method(EXACT, "DynamicCache", lambda config: DynamicCache(config=config)),
        _lean("k8v4", KEPT, LeanKVConfig.preset("k8v4")),
        _lean("k8v4-k4v4", KEPT, _tiers((8, 4), (4, 4), high_share=0.10)),
        _lean("k4v4", KEPT, _tiers((4, 4))),
        _lean("balanced", KEPT, LeanKVConfig.preset("balanced")),
        _lean("k8v4-k4v2-3%", KEPT, _tiers((8, 4), (4, 2), high_share=0.03)),
        _lean("k4v2", KEPT, _tiers((4, 2))),
        _lean("k8v4-k3v2-5%", KEPT, _tiers((8, 4), (3, 2), high_share=0.05)),
        _lean("k3v2-w16", KEPT, _tiers((3, 2), window=16, flush=16)),
        _lean("k8v4-k2v2-5%", KEPT, _tiers((8, 4), (2, 2), high_share=0.05)),
        _lean("balanced-w16", KEPT, LeanKVConfig.preset("balanced", window=16, flush=16)),
        _lean("k4v4-w16", KEPT, _tiers((4, 4), window=16, flush=16)),
        _lean("k4v2-w16", KEPT, _tiers((4, 2), window=16, flush=16)),
        _lean("aggressive", PRUNED, LeanKVConfig.preset("aggressive")),
        *(_lean(f"budget-{share:g}", PRUNED, LeanKVConfig(budget=share)) for share in (0.2, 0.15, 0.125)),
        _lean("paper", PAPER, LeanKVConfig.preset("paper")),
        *(_kivi(bits) for bits in (4, 2)),
        _quantized("fp8", "torch"),
        *(_quantized("quanto", "optimum.quanto", nbits=bits) for bits in (4, 2)),
        *(_quantized("hqq", "hqq", nbits=bits) for bits in (4, 2)),
        *(_evicting(SnapKV(share)) for share in (0.5, 0.35, 0.25, 0.18, 0.125)),
        *(_evicting(H2O(share)) for share in (0.5, 0.35, 0.25, 0.18, 0.125)),
    )
}


def own_methods(sources: list[str]) -> list[Method]:
    """A method for each config that the user gives, as JSON text or the path of a file.

    Raises:
        ValueError, OSError: a config cannot be read or is not valid.
    """
    made = []
    for number, source in enumerate(sources, 1):
        config = LeanKVConfig.from_json(source)
        name = f"config {number}" if source.lstrip().startswith("{") else source
        made.append(config_method(name, config))
    return made


def config_method(name: str, config: LeanKVConfig) -> Method:
    """A config as a method of that name."""
    return _lean(name, OWN, config, json.dumps(json.loads(config.to_json())))


def bytes_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The dtype that bytes are counted in: 16 bits, also where the weights are float32 for accuracy's sake."""
    return torch.bfloat16 if model_dtype == torch.float32 else model_dtype
