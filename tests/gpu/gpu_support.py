"""What the GPU tests share. They need neither pytest nor a GPU to be imported: `python -m tests.gpu` runs them.

HFKV_TEST_DEVICE=cpu runs those that do not depend on CUDA at small sizes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import unittest
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.bench import caches
from hfkv.bench.sizes import Shape
from hfkv.kernels import compaction
from hfkv.kernels.quantize_pack import unpack_tokens

DEVICE = torch.device(os.environ.get("HFKV_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
LONG = 32 * 1024 if ON_GPU else 1024
MIDDLE = 4 * 1024 if ON_GPU else 512
GROUP_4, GROUP_8 = Shape(32, 8, 128), Shape(64, 8, 128)
VOCAB = 997

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def on_device(test: Callable[[], None]) -> Callable[[], None]:
    """Skip a test where its device does not exist."""

    @functools.wraps(test)
    def run() -> None:
        if ON_GPU and not torch.cuda.is_available():
            raise unittest.SkipTest(f"torch {torch.__version__} finds no CUDA device")
        torch.manual_seed(0)
        test()

    return run


def on_cuda(test: Callable[[], None]) -> Callable[[], None]:
    """Skip a test that asks CUDA itself (its allocator, its graphs) on any other device."""

    @functools.wraps(test)
    def run() -> None:
        if not ON_GPU:
            raise unittest.SkipTest(f"asks CUDA itself, and the device is {DEVICE}")
        on_device(test)()

    return run


def like(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=DEVICE)


def backend() -> str:
    """What runs the kernels here, by the report of a cache with something in it."""
    cache = LeanKVCache(LeanKVConfig.preset("k8v4"))
    caches.fill(cache, Shape(8, 2, 64), 1, 1, 200, like(torch.float16 if ON_GPU else torch.float32))
    return cache.report().backend


def relative_rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def step_once(cache: LeanKVCache, shape: Shape, layers: int, batch: int, dtype: torch.dtype) -> None:
    """One decode step of random tokens through every layer."""
    inputs = step_inputs(shape, batch, dtype)
    for layer in range(layers):
        run_layer(cache, layer, *inputs)


def step_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random k and v [batch, kv_heads, 1, D] and q [batch, q_heads, 1, D]."""
    k, v = (caches.random_keys(shape, batch, 1, like(dtype)) for _ in range(2))
    return k, v, caches.random_query(shape, batch, like(dtype))


@torch.no_grad()
def run_layer(cache: LeanKVCache, layer: int, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """What a model's attention layer does with the cache -> [batch, queries, q_heads, D]."""
    return caches.attend(cache.update(k, v, layer), q)


def steps_to_flush(cache: LeanKVCache) -> int:
    """Steps that can be taken before one flushes."""
    return cache.compressed[0].capacity_left


def dequantised(cache: LeanKVCache, row: int) -> tuple[Tensor, Tensor]:
    """What one row of a one-layer cache stands for, packed tokens and then the window: k, v float64 [tokens, D]."""
    held = cache.compressed[0]
    packed, basis = held.packed, held.packed.basis
    keys, values = [], []
    for tier, layout in enumerate(packed.layouts):
        ids, rows, _ = packed.table.pages(tier, packed.page_counts(tier))
        pages = packed.pool.gather(packed.classes[tier], ids[rows == row])
        slots = torch.arange(int(packed.table.lengths[row, tier]), device=DEVICE)
        k, v = (x.double() for x in unpack_tokens(layout, compaction.take(layout, pages, slots)))
        k = k if basis.mean is None else k + basis.mean[row]
        keys.append(k if basis.key is None else k @ basis.key.double().T)
        values.append(v if basis.value is None else v @ basis.value.double().T)
    sequence, head = divmod(row, held.window.heads)
    count = int(held.fill.counts[sequence])
    keys.append(held.window.k[sequence, head, :count].double())
    values.append(held.window.v[sequence, head, :count].double())
    return torch.cat(keys), torch.cat(values)


def random_llama(dtype: torch.dtype, attention: str, spread: float = 0.1) -> LlamaForCausalLM:
    """A small Llama with weights of this standard deviation: at 0.1 its greedy tokens vary."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 15,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention).to(DEVICE).eval()


def random_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Token ids int64 [batch, tokens], never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, tokens), generator=generator).to(DEVICE)


def held_bytes() -> int:
    """Bytes of live tensors on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
