"""A step between two flushes: no synchronisation, no new memory, and it can be captured."""

from __future__ import annotations

import unittest

import torch
from gpu_support import (
    GROUP_4,
    MIDDLE,
    VOCAB,
    backend,
    each,
    like,
    no_synchronisation,
    on_cuda,
    random_ids,
    random_llama,
    relative_rms,
    run_layer,
    step_inputs,
    step_once,
    steps_to_flush,
)

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.bench import caches
from hfkv.bench.timing import captured
from hfkv.paging.bounds import most_pages

PRESETS = ("exact", "k8v4", "balanced", "aggressive")
LAYERS, BATCH = 2, 2
REPLAY = 1e-3
"""Relative RMS difference of a replay: a library may choose another algorithm in a graph."""


def cache_after_a_flush(name: str) -> LeanKVCache:
    """A filled cache that has just flushed and taken two steps, so that what a flush makes is made."""
    cache = LeanKVCache(LeanKVConfig.preset(name))
    caches.fill(cache, GROUP_4, LAYERS, BATCH, MIDDLE, like(torch.bfloat16))
    for _ in range(steps_to_flush(cache) + 3):
        step_once(cache, GROUP_4, LAYERS, BATCH, torch.bfloat16)
    return cache


@each(PRESETS, on_cuda)
def check_attention_steps_do_not_synchronise(name: str) -> None:
    cache = cache_after_a_flush(name)
    steps = [step_inputs(GROUP_4, BATCH, torch.bfloat16) for _ in range(steps_to_flush(cache))]
    assert len(steps) > 20
    with no_synchronisation():
        for inputs in steps:
            for layer in range(LAYERS):
                run_layer(cache, layer, *inputs)


@each(PRESETS, on_cuda)
def check_model_steps_do_not_synchronise(name: str) -> None:
    cache, model = LeanKVCache(LeanKVConfig.preset(name)), random_llama(torch.bfloat16, "leankv")
    with torch.no_grad():
        model(input_ids=random_ids(BATCH, 900), past_key_values=cache, logits_to_keep=1)
        tokens = random_ids(BATCH, 60, seed=1).split(1, 1)
        before = steps_to_flush(cache) + 3
        for token in tokens[:before]:
            model(input_ids=token, past_key_values=cache)
        with no_synchronisation():
            outs = [model(input_ids=t, past_key_values=cache).logits for t in tokens[before : before + 20]]
    assert torch.stack(outs).shape == (20, BATCH, 1, VOCAB)
    assert all(bool(out.isfinite().all()) for out in outs)


@each(PRESETS, on_cuda)
def check_steps_between_flushes_hold_no_more_memory(name: str) -> None:
    """Neither do live tensors grow, nor does the allocator ask the device for anything."""
    cache = cache_after_a_flush(name)
    steps = [step_inputs(GROUP_4, BATCH, torch.bfloat16) for _ in range(steps_to_flush(cache))]
    for layer in range(LAYERS):
        run_layer(cache, layer, *steps[0])
    before = allocator("allocated_bytes.all.current"), allocator("segment.all.allocated")
    for inputs in steps[1:]:
        for layer in range(LAYERS):
            run_layer(cache, layer, *inputs)
    assert (allocator("allocated_bytes.all.current"), allocator("segment.all.allocated")) == before, name


@each(PRESETS, on_cuda)
def check_steps_between_flushes_allocate_their_outputs_only(name: str) -> None:
    if backend() != "triton":
        raise unittest.SkipTest(f"backend {backend()}: the plain-torch twins make temporary tensors")
    cache = cache_after_a_flush(name)
    counts = []
    for _ in range(5):
        inputs = step_inputs(GROUP_4, BATCH, torch.bfloat16)
        before = allocator("allocation.all.allocated")
        outs = [run_layer(cache, layer, *inputs) for layer in range(LAYERS)]
        counts.append(allocator("allocation.all.allocated") - before)
    assert len(outs) == LAYERS
    most = LAYERS + 1  # how full the windows are is counted once
    assert max(counts) <= most, f"{name}: {counts} allocations in steps of {LAYERS} layers with one output each"


@on_cuda
def test_a_flush_with_room_does_not_synchronise():
    """The second flush behind the prompt, where pages were made ready and the tables are wide enough by chance."""
    if backend() != "triton":
        raise unittest.SkipTest(f"backend {backend()}: the plain-torch twins ask the device")
    tried = 0
    for name in PRESETS:
        cache = cache_after_a_flush(name)
        while not cache._must_flush(1):
            step_once(cache, GROUP_4, LAYERS, BATCH, torch.bfloat16)
        most = most_pages([tokens.packed for tokens in cache.compressed])
        if most is None:
            continue
        tried += 1
        packed = cache.compressed[0].packed
        packed.pool.reserve({cls: pages for cls, (pages, _) in zip(packed.classes, most, strict=True)})
        before = [tokens.packed.table.lengths.clone() for tokens in cache.compressed]
        with no_synchronisation():
            cache.flush()
        after = [tokens.packed.table.lengths for tokens in cache.compressed]
        assert all(bool((new.sum() > old.sum()).item()) for new, old in zip(after, before, strict=True)), name
    assert tried, "no preset had room in its tables"


@each(PRESETS, on_cuda)
def check_a_captured_attention_step_replays_the_same(name: str) -> None:
    cache = cache_after_a_flush(name)
    k, v, q = step_inputs(GROUP_4, BATCH, torch.bfloat16)
    handles = cache.update(k, v, 0)
    with torch.no_grad():
        want = caches.attend(handles, q)
        kept: list[torch.Tensor] = []
        replay = captured(lambda q=q, handles=handles, kept=kept: kept.append(caches.attend(handles, q)))
        kept[-1].fill_(float("nan"))
        replay()
        torch.cuda.synchronize()
        assert relative_rms(kept[-1], want) < REPLAY, name
        q.copy_(torch.randn_like(q))
        replay()
        error = relative_rms(kept[-1], caches.attend(handles, q))
        assert error < REPLAY, f"{name}: other queries give an error of {error:.2e}"
        assert relative_rms(kept[-1], want) > 0.5, "the replay does not look at its queries"


def allocator(name: str) -> int:
    """One of torch's counters of CUDA memory."""
    return torch.cuda.memory_stats()[name]
