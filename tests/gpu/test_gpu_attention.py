"""The kernels on this device against float64, and against the same work on the CPU."""

from __future__ import annotations

import torch
from gpu_support import (
    DEVICE,
    GROUP_4,
    GROUP_8,
    LONG,
    MIDDLE,
    dequantised,
    like,
    on_device,
    relative_rms,
    run_layer,
    step_inputs,
    steps_to_flush,
)

from hfkv import LeanKVCache, LeanKVConfig, Packed
from hfkv.bench import caches
from hfkv.bench.caches import LEAN
from hfkv.bench.sizes import Shape
from hfkv.kernels import sealing
from hfkv.kernels.quantize_pack import code_tokens
from hfkv.packing import REPACKS
from hfkv.quant import PageLayout
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
    outs = []
    with torch.no_grad():
        outs = [caches.attend(handles, q * factor)[0, 0] for factor in SHARPNESS]  # each [q_heads, D]
    for row in range(shape.kv_heads):
        keys, values = dequantised(cache, row)
        heads = slice(row * groups, (row + 1) * groups)
        for factor, out in zip(SHARPNESS, outs, strict=True):
            logits = (q * factor)[0, heads, 0].double() @ keys.T * shape.head_dim**-0.5
            error = relative_rms(out[heads], logits.softmax(-1) @ values)
            assert error < BOUND[dtype], f"{name}, {shape}, {dtype}, x{factor}, head {row}: error {error:.2e}"


@on_device
def test_packed_tiers_against_float64():
    for name in ("packed", "bounded"):
        for shape in (GROUP_4, GROUP_8):
            for dtype in (torch.float16, torch.bfloat16):
                check_step(name, shape, dtype, MIDDLE)


@on_device
def test_pages_are_sealed_as_by_the_twin():
    for repack in REPACKS:
        layout = PageLayout.of(Packed(repack=repack), (128, 128), torch.float32, "fitted", 64, True)
        x = torch.randn(64 * 8, 128) + 3 * torch.randn(1, 128)
        pages = torch.zeros(8, layout.page_bytes, dtype=torch.uint8)
        for name, part in code_tokens(layout, x, x, torch.rand(512), torch.arange(512)).items():
            part = part.unflatten(0, (8, 64))
            layout.view(pages, name).copy_(part.transpose(1, 2) if name == "value" else part)
        from hfkv.kernels.triton import packing  # here: gpu-tests-torch runs without Triton

        packs, words = packing.seal(layout, pages.to(DEVICE))
        want, want_words = sealing.seal(layout, pages)
        assert torch.equal(words.cpu(), want_words) and torch.equal(packs.cpu(), want)


@on_device
def test_single_tier_steps_against_float64():
    for name in ("k8v4", "k4v4", "k4v2"):
        for shape in (GROUP_4, GROUP_8):
            for dtype in (torch.float16, torch.bfloat16):
                check_step(name, shape, dtype, LONG)


@on_device
def test_two_tier_steps_against_float64():
    for name in ("mixed", "aggressive"):
        for shape in (GROUP_4, GROUP_8):
            for dtype in (torch.float16, torch.bfloat16):
                check_step(name, shape, dtype, LONG)


@on_device
def test_exact_steps_against_float64():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_step("exact", GROUP_4, dtype, LONG)


@on_device
def test_odd_lengths_against_float64():
    for tokens in (1, 60, 97, 129, 1025):
        for shape in (Shape(6, 2, 80), Shape(7, 1, 64), Shape(16, 2, 256)):
            check_step("mixed", shape, torch.float16, tokens)


@on_device
def test_the_cpu_packs_and_chooses_the_same():
    """Prompt, steps and two flushes with the same numbers here and on the CPU: outputs, tiers and codes agree."""
    shape, generator = Shape(32, 8, 128), torch.Generator().manual_seed(1)
    made = {}

    def numbers(heads: int, tokens: int, device: torch.device) -> torch.Tensor:
        return torch.randn(1, heads, tokens, shape.head_dim, generator=generator).half().to(device)

    for device in (torch.device("cpu"), DEVICE):
        generator.manual_seed(1)
        cache = LeanKVCache(LeanKVConfig.preset("aggressive"))
        outs = []
        for count in (MIDDLE, *[1] * 70):
            k, v = numbers(shape.kv_heads, count, device), numbers(shape.kv_heads, count, device)
            q = numbers(shape.q_heads, min(count, 64), device) * 2
            outs.append(run_layer(cache, 0, k, v, q)[:, -1].cpu())
        made[device.type] = (torch.stack(outs), tier_map(cache, 0), cache.report().physical_bytes)
    (want, tiers, held), (got, own_tiers, own_held) = made["cpu"], made[DEVICE.type]
    same = (tiers == own_tiers).float().mean().item()
    assert same > 0.995, f"{same:.4f} of the tokens are in the same tier"
    assert relative_rms(got, want) < 0.05, f"outputs differ by {relative_rms(got, want):.2e}"
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
        assert relative_rms(out[:4], logits.softmax(-1) @ values) < BOUND[dtype]
