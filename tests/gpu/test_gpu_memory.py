"""Bytes: what `report()` says against what the allocator holds, and that all of it goes back."""

from __future__ import annotations

import torch
from gpu_support import (
    GROUP_4,
    MIDDLE,
    each,
    held_bytes,
    like,
    on_cuda,
    random_ids,
    random_llama,
    step_once,
    steps_to_flush,
)

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.bench import caches

PRESETS = ("exact", "k8v4", "balanced", "aggressive")
LAYERS, BATCH = 4, 4
SLACK = 2 << 20
"""Bytes that the allocator rounds up over many tensors."""


def filled(name: str) -> LeanKVCache:
    """A cache after a prompt, two flushes, and what one more step makes."""
    cache = LeanKVCache(LeanKVConfig.preset(name))
    caches.fill(cache, GROUP_4, LAYERS, BATCH, MIDDLE, like(torch.bfloat16))
    for _ in range(steps_to_flush(cache) + cache.config.flush + 2):
        step_once(cache, GROUP_4, LAYERS, BATCH, torch.bfloat16)
    return cache


@each(PRESETS, on_cuda)
def check_the_report_is_what_the_allocator_holds(name: str) -> None:
    filled(name)  # rotations, kernels and libraries' workspaces are made once for all caches
    before = held_bytes()
    cache = filled(name)
    held, said = held_bytes() - before, cache.report().physical_bytes
    assert abs(held - said) <= 0.01 * said + SLACK, f"{name}: {held:,} bytes held, {said:,} reported"
    del cache


@each(PRESETS, on_cuda)
def check_memory_returns_when_a_cache_is_dropped_or_reset(name: str) -> None:
    filled(name)  # rotations, kernels and libraries' workspaces are made once for all caches
    before = held_bytes()
    cache = filled(name)
    assert held_bytes() - before > 10 * SLACK
    cache.reset()
    assert held_bytes() - before <= SLACK, f"{name}: {held_bytes() - before:,} bytes are left after reset()"
    caches.fill(cache, GROUP_4, LAYERS, BATCH, MIDDLE, like(torch.bfloat16))
    del cache
    assert held_bytes() - before <= SLACK, f"{name}: {held_bytes() - before:,} bytes are left after del"


@on_cuda
def test_a_prompt_holds_no_exact_copy():
    """After a model's prompt nothing but the packed cache is left of it; generate's own tensors are gone."""
    model = random_llama(torch.bfloat16, "leankv")
    for _ in range(2):  # the first makes what stays for all caches
        cache = None
        before = held_bytes()
        cache = LeanKVCache(LeanKVConfig.preset("k8v4"))
        with torch.no_grad():
            model(input_ids=random_ids(1, 16_000), past_key_values=cache, logits_to_keep=1)
    held, said = held_bytes() - before, cache.report().physical_bytes
    assert abs(held - said) <= 0.01 * said + SLACK, f"{held:,} bytes held, {said:,} reported"
