"""Every kernel by itself on the least that shows it, against its plain-torch twin on the CPU: one line each."""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_support import (
    DEVICE,
    ON_GPU,
    backend,
    backend_of,
    check_close,
    check_equal,
    on_cuda,
    on_device,
    run_layer,
    split,
)
from torch import Tensor

from hfkv import LeanKVCache, LeanKVConfig, Packed
from hfkv.attend import Call
from hfkv.backends.plain import PlainKernels
from hfkv.bench.sizes import Shape
from hfkv.bench.timing import captured
from hfkv.fill import Fill, advance
from hfkv.handle import Chunk
from hfkv.kernels import append as append_twin
from hfkv.kernels import kvcrush as kvcrush_twin
from hfkv.kernels import prompt_attention as prompt_twin
from hfkv.kernels import replay as replay_twin
from hfkv.kernels import sealing
from hfkv.kernels.quantize_pack import code_tokens
from hfkv.packing import REPACKS
from hfkv.quant import PageLayout
from hfkv.report import tier_map
from hfkv.tokens import LayerTokens
from hfkv.window import Sequences

SHAPE, TOKENS, BATCH = (Shape(8, 2, 64), 300, 2) if ON_GPU else (Shape(2, 1, 64), 90, 2)
SMALL = {} if ON_GPU else {"window": 8, "flush": 4, "observe": 8, "page_tokens": 32}
"""The interpreter takes its time."""

DTYPE = torch.bfloat16 if ON_GPU else torch.float16
"""The interpreter's products of bfloat16 are wrong."""

HALF = 8e-3
"""Relative RMS error where products are in half precision: mostly the rounding of outputs and probabilities."""

CODES = 2e-3
"""Share of bytes of pages that rounding may change."""

SETTINGS = {name: LeanKVConfig.preset(name, **SMALL) for name in ("k8v4", "balanced", "exact")}
SETTINGS["k4v2"] = LeanKVConfig(tiers=((4, 2),), **SMALL)
SETTINGS["minmax"] = LeanKVConfig(codec="minmax", **SMALL)
SETTINGS["packed"] = LeanKVConfig(tiers=((8, 4), Packed(key_bits=4, value_bits=2)), **SMALL | {"page_tokens": 64})


def numbers(heads: int, tokens: int, seed: int, scale: float = 1.0) -> Tensor:
    """[batch, heads, tokens, head_dim] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, heads, tokens, SHAPE.head_dim, generator=generator) * scale).to(DTYPE)


def prompted(name: str, device: torch.device) -> LeanKVCache:
    """A cache of one layer behind the same prompt everywhere."""
    cache = LeanKVCache(SETTINGS[name])
    k, v, q = numbers(SHAPE.kv_heads, TOKENS, 0), numbers(SHAPE.kv_heads, TOKENS, 1), numbers(SHAPE.q_heads, 64, 2, 2.0)
    run_layer(cache, 0, k.to(device), v.to(device), q.to(device))
    return cache


def twins(name: str) -> tuple[LeanKVCache, LeanKVCache]:
    """A cache on the CPU, run by plain torch, and the same pages and window on the device."""
    with backend_of("torch"):
        twin = prompted(name, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        twin.save(Path(folder) / "cache.safetensors")
        return twin, LeanKVCache.load(Path(folder) / "cache.safetensors", DEVICE)


def step(cache: LeanKVCache, seed: int, tokens: int = 1) -> Tensor:
    """What `tokens` more tokens of every sequence attend to -> [batch, tokens, q_heads, head_dim] on the CPU."""
    device = cache.compressed[0].device
    k, v = (numbers(SHAPE.kv_heads, tokens, seed + i).to(device) for i in (0, 1))
    return run_layer(cache, 0, k, v, numbers(SHAPE.q_heads, tokens, seed + 2, 2.0).to(device)).cpu()


def held(cache: LeanKVCache) -> LayerTokens:
    return cache.compressed[0]


def pages(cache: LeanKVCache) -> list[Tensor]:
    """The bytes of all pages, per tier, in the order of the tables, on the CPU; free slots' codes are anything."""
    packed, found = held(cache).packed, []
    for tier, layout in enumerate(packed.layouts):
        ids, row, index = packed.table.pages(tier, packed.page_counts(tier))
        own = packed.pool.gather(packed.classes[tier], ids).cpu()
        slot = index[:, None] * layout.tokens + torch.arange(layout.tokens, device=index.device)
        filled = (slot < packed.table.lengths[row, tier][:, None]).cpu()
        parts = []
        for name in ("key", "value", *layout.meta_names):
            part = layout.view(own, name)
            part = part.transpose(1, 2) if name == "value" else part
            parts.append(part[filled].reshape(-1, 1).view(torch.uint8).flatten())
        found.append(torch.cat(parts))
    return found


def needs_kernels() -> None:
    """Skip where plain torch runs instead: there is no kernel to look at."""
    if backend() != "triton":
        raise unittest.SkipTest(f"backend {backend()}")


# ---- one after the other, as a generation needs them ----------------------------------------------------------------


def check_decode(name: str) -> None:
    """`prepare_queries`, `decode_items`, `combine_items` (and `attend_packs`) over the same pages."""
    twin, own = twins(name)
    check_close(step(own, 10), step(twin, 10), HALF, name)


def check_quantise(name: str) -> None:
    """`pack_kernel`: a prompt's tokens into pages; every token in the same tier."""
    with backend_of("torch"):
        twin = prompted(name, torch.device("cpu"))
    own = prompted(name, DEVICE)
    check_equal(tier_map(own, 0), tier_map(twin, 0), f"{name} tiers", 0.005)
    if len(SETTINGS[name].tiers) == 1:  # else tokens at the border of two tiers change places
        for got, want in zip(pages(own), pages(twin), strict=True):
            check_equal(got, want, f"{name} bytes", CODES)


def check_flush(name: str) -> None:
    """`observe_*` over pages, all of `compaction`, `pack`, and a step over what they leave."""
    twin, own = twins(name)
    for number in range(held(own).capacity_left + 2):
        got, want = step(own, 20 + 3 * number), step(twin, 20 + 3 * number)
    assert held(own).fill.most < held(own).window.capacity, "there was no flush"
    check_equal(tier_map(own, 0), tier_map(twin, 0), f"{name} tiers", 0.005)
    check_close(got, want, 0.05 if len(SETTINGS[name].tiers) > 1 else HALF, name)


globals().update(split("decode", check_decode, [("k8v4",)]))
globals().update(split("quantise", check_quantise, [("k8v4",)]))
globals().update(split("flush", check_flush, [("balanced",)]))


@on_device
def test_observe_a_prompt() -> None:
    """`observe_lse`, `observe_scores` over exact tokens."""
    k, q = numbers(SHAPE.kv_heads, TOKENS, 0), numbers(SHAPE.q_heads, 64, 1, 2.0)
    scores = []
    for kernels, device in ((PlainKernels(), torch.device("cpu")), (held(prompted("k8v4", DEVICE)).kernels, DEVICE)):
        fill = advance(Fill.empty(BATCH, device), TOKENS, None)
        own = k.to(device)
        scores.append(
            kernels.observe_chunk(Sequences(own, own, fill), q.to(device), None, Call(0.125, None, None), None, 64)
        )
    check_close(scores[1], scores[0], HALF)


@on_device
def test_append_one_token() -> None:
    """`count_step`, `append_tokens`: what they write is equal to the last bit."""
    needs_kernels()
    from hfkv.kernels.triton import append

    made = []
    for begin, add, device in (
        (append_twin.begin_step, append_twin.append_step, torch.device("cpu")),
        (append.begin_step, append.append_step, DEVICE),
    ):
        counts, kept = torch.tensor([3, 5], device=device), torch.tensor([1, 4, 0], device=device)
        shape = (BATCH, SHAPE.kv_heads, 16, SHAPE.head_dim)
        windows = [torch.zeros(shape, dtype=DTYPE, device=device) for _ in range(2)]
        queries = torch.zeros(BATCH, SHAPE.q_heads, 8, SHAPE.head_dim, dtype=DTYPE, device=device)
        for seed in range(3):
            k, v, q = (numbers(n, 1, 10 * seed + n).to(device) for n in (SHAPE.kv_heads, SHAPE.kv_heads, SHAPE.q_heads))
            begin(counts, kept, 4, 8)
            add(k, v, q, *windows, counts, queries, kept)
        made.append([counts, kept, *windows, queries])
    for name, want, got in zip(("counts", "kept", "k", "v", "queries"), *made, strict=True):
        check_equal(got, want, name)


@on_device
def test_chunk_behind_a_past() -> None:
    """`attend_pages_forward`, `prompt_forward`, `join_forward`: a prompt that goes on."""
    twin, own = twins("balanced")
    check_close(step(own, 30, 70), step(twin, 30, 70), HALF)


def check_prompt(softcap: float | None, sinks: bool, padded: bool) -> None:
    """`prompt_forward` with what SDPA lacks."""
    needs_kernels()
    from hfkv.kernels.triton.prompt_attention import prompt_attention

    k, v, q = numbers(SHAPE.kv_heads, 150, 0), numbers(SHAPE.kv_heads, 150, 1), numbers(SHAPE.q_heads, 150, 2)
    column = torch.randn(SHAPE.q_heads, generator=torch.Generator().manual_seed(3)) if sinks else None
    valid = torch.ones(BATCH, 150, dtype=torch.bool)
    if padded:
        valid[1, :40] = False
    mask = valid[:, None, None] & prompt_twin.lower_right(150, 150, q.device)
    want = prompt_twin.prompt_attention(q.float(), k.float(), v.float(), mask, False, 0.2, softcap, column)
    there = [x.to(DEVICE) for x in (q, k, v)]
    column = None if column is None else column.to(DEVICE)
    got, _ = prompt_attention(*there, True, 0.2, softcap, column, valid.to(DEVICE) if padded else None)
    sees = valid[:, None, :, None]
    check_close(got.cpu().masked_fill(~sees, 0), want.masked_fill(~sees, 0), HALF)


globals().update(split("prompt", check_prompt, [(30.0, False, False), (None, True, True)]))


def check_seal(repack: str) -> None:
    """`seal_kernel`: full pages into packs, equal to the last bit."""
    needs_kernels()
    from hfkv.kernels.triton import packing

    layout = PageLayout.of(Packed(repack=repack), (128, 128), torch.float32, "fitted", 64, True)
    x = torch.randn(64 * 8, 128) + 3 * torch.randn(1, 128)
    full = torch.zeros(8, layout.page_bytes, dtype=torch.uint8)
    for name, part in code_tokens(layout, x, x, torch.rand(512), torch.arange(512)).items():
        part = part.unflatten(0, (8, 64))
        layout.view(full, name).copy_(part.transpose(1, 2) if name == "value" else part)
    packs, words = packing.seal(layout, full.to(DEVICE))
    want, want_words = sealing.seal(layout, full)
    check_equal(words, want_words, "words")
    check_equal(packs, want, "packs")


globals().update(split("seal", check_seal, [(repack,) for repack in REPACKS]))


@on_device
def test_kvcrush() -> None:
    """`ones_kernel`, `distance_kernel`, `elect_kernel`, equal to the last bit."""
    needs_kernels()
    from hfkv.kernels.triton import kvcrush

    generator = torch.Generator().manual_seed(0)
    received = (torch.rand(2, 9, 300, generator=generator) * 20).round() / 20
    there = torch.rand(2, 9, 300, generator=generator) < 0.8
    distance = kvcrush_twin.crush_distances(received, there, None)
    check_equal(kvcrush.crush_distances(received.to(DEVICE), there.to(DEVICE), None).long(), distance, "distances")
    seats, among = torch.tensor([17, 5]), there[:, 0]
    own = kvcrush.elect(among.to(DEVICE), distance.to(DEVICE), seats.to(DEVICE), 9)
    check_equal(own, kvcrush_twin.elect(among, distance, seats, 9), "seats")


@on_device
def test_replay_of_a_prompt() -> None:
    """`replay_kernel`: of a whole prompt, and behind stored tokens with sequences that differ."""
    needs_kernels()
    from hfkv.kernels.triton import replay

    tokens = 1100 if ON_GPU else 70
    q, k = (numbers(heads, tokens, seed, 2.0) for seed, heads in enumerate((SHAPE.q_heads, SHAPE.kv_heads)))
    counts, first = torch.tensor([tokens, tokens - 13]), k[:, :, :4]
    for asking, stored in ((None, None), (replay_twin.Asking(counts, torch.tensor([0, 0])), first)):
        want = replay_twin.most_received(q.float(), k.float(), asking, stored, 0.2, None, None)
        own = None if asking is None else replay_twin.Asking(asking.counts.to(DEVICE), asking.first.to(DEVICE))
        there = None if stored is None else stored.to(DEVICE)
        got = replay.most_received(q.to(DEVICE), k.to(DEVICE), own, there, 0.2, None, None)
        real = torch.ones_like(want[:, :1], dtype=torch.bool) if asking is None else asking.real(tokens)[:, None]
        check_close(got.cpu() * real, want * real, HALF)


def check_vectors(name: str) -> None:
    """`unpack_kernel`: stored keys and values as they came."""
    needs_kernels()
    ours, theirs = twins(name)
    for side in ("key", "value"):
        for tier, layout in enumerate(held(ours).packed.layouts):
            width = held(ours).packed.widest[tier] * layout.tokens
            got, want = (held(c).kernels.vectors(held(c).packed, side, tier, width) for c in (ours, theirs))
            check_close(got, want, HALF)


@on_device
def test_shared_pages_are_copied() -> None:
    """`copy_kernel`: forks of one prompt that go on apart, through a flush."""
    made = []
    for cache in twins("k8v4"):
        cache.reorder_cache(torch.tensor([0, 0]))
        for number in range(held(cache).capacity_left + 2):
            out = step(cache, 40 + 3 * number)
        assert sum(pool.copied_bytes for pool in cache.pools) > 0
        made.append(out)
    check_close(made[1], made[0], HALF)


@on_cuda
def test_capture_of_a_step() -> None:
    """A CUDA graph of one attention call says what the call does."""
    needs_kernels()
    _, own = twins("balanced")
    tokens = held(own)
    k, v = (numbers(SHAPE.kv_heads, 1, seed).to(DEVICE) for seed in (50, 51))
    q = numbers(SHAPE.q_heads, 1, 52).to(DEVICE)
    handles: tuple[Tensor, Tensor] = own.update(k, v, 0)
    chunk: Chunk = handles[0].source  # type: ignore[attr-defined]
    run: Callable[[], Tensor] = lambda: own.layers[0].attend(chunk, q, None, Call(0.125, None, None))  # noqa: E731
    with torch.no_grad():
        want = run().clone()
        kept: list[Tensor] = []
        replay = captured(lambda: kept.append(run()))
        kept[-1].fill_(float("nan"))
        replay()
        torch.cuda.synchronize()
    assert tokens.fill.most > 0
    check_close(kept[-1], want, 1e-3)


# ---- other page layouts ---------------------------------------------------------------------------------------------

globals().update(split("decode", check_decode, [("balanced",), ("exact",), ("k4v2",), ("minmax",), ("packed",)]))
globals().update(split("quantise", check_quantise, [("k4v2",), ("exact",), ("balanced",), ("packed",)]))
globals().update(split("flush", check_flush, [("k8v4",), ("exact",), ("packed",)]))
globals().update(split("vectors", check_vectors, [("balanced",), ("exact",), ("minmax",)]))
