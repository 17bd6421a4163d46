"""Decode steps as CUDA graphs: what eager steps say, no synchronisation, no memory left behind."""

from __future__ import annotations

import logging

import torch
from gpu_support import (
    check_close,
    each,
    held_bytes,
    no_synchronisation,
    on_cuda,
    random_ids,
    random_llama,
    relative_rms,
    steps_to_flush,
)

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

PRESETS = ("exact", "k8v4", "balanced", "aggressive")
CLOSE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
"""Relative RMS difference of logits: a library may choose another algorithm in a graph, and codes then round anew."""
SLACK = 2 << 20


def prompted(model, preset: str, batch: int, tokens: int = 700) -> LeanKVCache:
    cache = LeanKVCache(LeanKVConfig.preset(preset))
    with torch.no_grad():
        model(input_ids=random_ids(batch, tokens), past_key_values=cache, logits_to_keep=1)
    return cache


def logits_of(model, cache: LeanKVCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [steps, batch, vocab] of given tokens, one by one."""
    with torch.no_grad():
        return torch.stack([model(input_ids=t, past_key_values=cache).logits[:, -1] for t in tokens.split(1, 1)])


@each([(dtype, preset) for dtype in CLOSE for preset in PRESETS], on_cuda)
def check_replayed_steps_say_what_eager_ones_do(dtype: torch.dtype, preset: str) -> None:
    """Over three flushes, at batch 1 and 3."""
    model = random_llama(dtype, "leankv", 0.05)
    for batch in (1, 3):
        tokens = random_ids(batch, 110, seed=1)
        hfkv.disable(model)
        want = logits_of(model, prompted(model, preset, batch), tokens)
        hfkv.compile_decode(model)
        got = logits_of(model, prompted(model, preset, batch), tokens)
        report = hfkv.decode_report(model)
        assert report.replayed >= 100 - 3 * report.captured and report.captured in (1, 2, 3), report
        check_close(got, want, CLOSE[dtype], f"batch {batch}")


@on_cuda
def test_a_padded_batch_generates_the_same():
    ids = random_ids(3, 500)
    mask = torch.ones_like(ids)
    ids[1, :200], mask[1, :200] = 0, 0
    model, outs = random_llama(torch.float32, "leankv"), []
    for compiled in (False, True):
        if compiled:
            hfkv.compile_decode(model)
        cache = LeanKVCache(LeanKVConfig.preset("balanced"))
        outs.append(model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=90, do_sample=False))
    assert torch.equal(*outs)
    assert hfkv.decode_report(model).replayed > 70, hfkv.decode_report(model)


@each(PRESETS, on_cuda)
def check_replays_do_not_synchronise(preset: str) -> None:
    model = hfkv.compile_decode(random_llama(torch.bfloat16, "leankv"))
    cache = prompted(model, preset, 2)
    tokens = random_ids(2, 200, seed=1).split(1, 1)
    logits_of(model, cache, torch.cat(tokens[: steps_to_flush(cache) + 5], 1))
    left = steps_to_flush(cache)
    assert left > 15 and cache.decode_step.replayed
    with torch.no_grad(), no_synchronisation():
        outs = [model(input_ids=token, past_key_values=cache).logits for token in tokens[:left]]
    assert hfkv.decode_report(model).replayed >= left
    assert bool(torch.stack(outs).isfinite().all())


@on_cuda
def test_crops_forks_and_two_caches_in_turn():
    model = random_llama(torch.float32, "leankv", 0.05)
    tokens, made = random_ids(2, 60, seed=2), []
    for compiled in (False, True):
        if compiled:
            hfkv.compile_decode(model)
        first, second = prompted(model, "balanced", 2), prompted(model, "k8v4", 2, 300)
        outs = []
        for part in tokens.split(10, 1):
            outs += [logits_of(model, cache, part) for cache in (first, second)]
            first.crop(-3)
            second.reorder_cache(torch.tensor([1, 0], device=tokens.device))
        made.append(torch.cat(outs))
    assert relative_rms(made[1], made[0]) < CLOSE[torch.float32]
    assert hfkv.decode_report(model).replayed > 60


@on_cuda
def test_memory_returns_with_the_cache():
    model = hfkv.compile_decode(random_llama(torch.bfloat16, "leankv"))
    for _ in range(2):
        before = held_bytes()
        cache = prompted(model, "balanced", 4)
        logits_of(model, cache, random_ids(4, 40))
        assert hfkv.decode_report(model).replayed > 0
        del cache
        left = held_bytes() - before
    assert left <= SLACK, f"{left:,} bytes are left"


@on_cuda
def test_a_model_that_synchronises_is_left_as_it_was():
    model, said = random_llama(torch.float32, "leankv", 0.05), []
    model.model.norm.register_forward_hook(lambda module, args, out: out * float(out.isfinite().all().item()))
    tokens = random_ids(1, 40, seed=1)
    want = logits_of(model, prompted(model, "k8v4", 1), tokens)
    hfkv.compile_decode(model)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hfkv").addHandler(handler)
    try:
        got = logits_of(model, prompted(model, "k8v4", 1), tokens)
    finally:
        logging.getLogger("hfkv").removeHandler(handler)
    assert relative_rms(got, want) < CLOSE[torch.float32]
    assert sum("without CUDA graphs" in text for text in said) == 1, said
