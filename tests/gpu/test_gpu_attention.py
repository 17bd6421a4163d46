"""The kernels on this device against float64, and against the same work on the CPU."""

from __future__ import annotations

import re

import torch
from gpu_support import (
    DEVICE,
    GROUP_4,
    GROUP_8,
    LONG,
    MIDDLE,
    backend_of,
    check_close,
    dequantised,
    like,
    measured,
    on_device,
    run_layer,
    split,
    step_inputs,
    steps_to_flush,
)

from hfkv import LeanKVCache, LeanKVConfig, Packed
from hfkv.bench import caches
from hfkv.bench.caches import LEAN
from hfkv.bench.sizes import Shape
from hfkv.report import tier_map

BOUND = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 1e-4}
"""Relative RMS error of a step's output: mostly the rounding of the output and of the probabilities."""

CONFIGS = {**LEAN, "exact": LeanKVConfig.preset("exact"), "aggressive": LeanKVConfig.preset("aggressive")}
CONFIGS |= {
    "packed": LeanKVConfig(tiers=((8, 4), Packed(key_bits=4, value_bits=2))),
    "bounded": LeanKVConfig(tiers=(Packed(repack="bucket"),)),
}
SHARPNESS = (1.0, 4.0)
"""Factors of random queries: attention that is spread over all tokens, and attention on few."""


def check_step(name: str, shape: Shape, dtype: torch.dtype, tokens: int) -> None:
    """One decode step behind `tokens` against softmax attention in float64 over what the cache holds."""
    cache = LeanKVCache(CONFIGS[name])
    caches.fill(cache, shape, 1, 1, tokens, like(dtype))
    k, v, q = step_inputs(shape, 1, dtype)
    handles = cache.update(k, v, 0)
    groups = shape.q_heads // shape.kv_heads
    with torch.no_grad():
        outs = [caches.attend(handles, q * factor)[0, 0] for factor in SHARPNESS]  # each [q_heads, D]
    for row in range(shape.kv_heads):
        keys, values = dequantised(cache, row)
        heads = slice(row * groups, (row + 1) * groups)
        for factor, out in zip(SHARPNESS, outs, strict=True):
            logits = (q * factor)[0, heads, 0].double() @ keys.T * shape.head_dim**-0.5
            want = logits.softmax(-1) @ values
            check_close(out[heads], want, BOUND[dtype], f"q x {factor}, head {row}")
    worst = max(measured, key=lambda said: float(re.findall(r" (\S+) of ", said)[0]))
    measured[:] = [worst]


HALVES = (torch.bfloat16, torch.float16)
SINGLE = [(name, shape, dtype, LONG) for dtype in HALVES for name in LEAN for shape in (GROUP_4, GROUP_8)]
OTHER = [("aggressive", GROUP_4, torch.bfloat16, LONG), ("aggressive", GROUP_8, torch.float16, LONG)]
OTHER += [("exact", GROUP_4, dtype, LONG) for dtype in (*HALVES, torch.float32)]
OTHER += [(name, GROUP_4, dtype, MIDDLE) for name in ("packed", "bounded") for dtype in HALVES]
globals().update(split("float64", check_step, [*SINGLE, *OTHER]))


def check_odd_lengths(shape: Shape) -> None:
    for tokens in (1, 60, 97, 129, 1025):
        check_step("mixed", shape, torch.float16, tokens)


globals().update(
    split("odd_lengths", check_odd_lengths, [(Shape(6, 2, 80),), (Shape(7, 1, 64),), (Shape(16, 2, 256),)])
)


@on_device
def test_the_cpu_packs_and_chooses_the_same():
    """Prompt, steps and two flushes with the same numbers here and on the CPU: outputs, tiers and codes agree."""
    shape, generator = Shape(32, 8, 128), torch.Generator()

    def numbers(heads: int, tokens: int, device: torch.device) -> torch.Tensor:
        return torch.randn(1, heads, tokens, shape.head_dim, generator=generator).half().to(device)

    def filled(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        generator.manual_seed(1)
        cache = LeanKVCache(LeanKVConfig.preset("aggressive"))
        outs = []
        for count in (MIDDLE, *[1] * 70):
            k, v = numbers(shape.kv_heads, count, device), numbers(shape.kv_heads, count, device)
            q = numbers(shape.q_heads, min(count, 64), device) * 2
            outs.append(run_layer(cache, 0, k, v, q)[:, -1].cpu())
        return torch.stack(outs), tier_map(cache, 0), cache.report().physical_bytes

    with backend_of("torch"):
        want, tiers, held = filled(torch.device("cpu"))
    got, own_tiers, own_held = filled(DEVICE)
    same = (tiers == own_tiers).float().mean().item()
    assert same > 0.995, f"{same:.4f} of the tokens are in the same tier"
    check_close(got, want, 0.05, "outputs")
    assert abs(held - own_held) < 0.02 * held + 4096, f"{own_held} bytes here, {held} on the CPU"


@on_device
def test_the_window_fills_and_flushes_without_a_seam():
    """Errors stay small through a whole period of steps: with a full window, at the flush and after it."""
    cache, shape, dtype = LeanKVCache(LEAN["k8v4"]), GROUP_4, torch.float16
    caches.fill(cache, shape, 1, 1, MIDDLE, like(dtype))
    for _ in range(steps_to_flush(cache) + 3):
        k, v, q = step_inputs(shape, 1, dtype)
        out = run_layer(cache, 0, k, v, q)[0, 0]
        keys, values = dequantised(cache, 0)
        assert keys.shape[0] == cache.get_seq_length()
        logits = q[0, :4, 0].double() @ keys.T * shape.head_dim**-0.5
        check_close(out[:4], logits.softmax(-1) @ values, BOUND[dtype], f"at {keys.shape[0]} tokens")
    del measured[1:]
