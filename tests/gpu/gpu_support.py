"""What the GPU tests share. They need neither pytest nor a GPU to be imported: `python -m tests.gpu` runs them.

HFKV_TEST_DEVICE=cpu runs those that do not depend on CUDA at small sizes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import re
import unittest
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache
from hfkv.backends import choose
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
PACKAGES = "torch", "transformers", "triton"

measured: list[str] = []
"""What the running test has measured and found good: the runner prints it."""

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
    """What runs the kernels here."""
    return choose(DEVICE, [], torch.float16)


def described() -> str:
    """Device, backend and versions."""
    exists = not ON_GPU or torch.cuda.is_available()
    where = torch.cuda.get_device_name() if ON_GPU and exists else str(DEVICE)
    runs = f", backend {backend()}" if exists else ", which does not exist here"
    versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name))
    return f"{where}{runs}, {', '.join(versions)}"


@contextlib.contextmanager
def backend_of(name: str) -> Iterator[None]:
    """Caches that get their first tokens inside run on this backend, wherever they are."""
    with mock.patch.dict(os.environ, HFKV_BACKEND=name):
        yield


def split(
    name: str, test: Callable[..., None], cases: Iterable[tuple], where: Callable[..., Callable[[], None]] = on_device
) -> dict[str, Callable[[], None]]:
    """A test for every case, for a module's globals(): each is run, limited and reported on its own."""

    def made(case: tuple) -> Callable[[], None]:
        def run() -> None:
            test(*case)

        words = re.sub(r"[^0-9a-z]+", "_", " ".join(str(part).removeprefix("torch.") for part in case).lower())
        run.__name__ = f"test_{name}_{words.strip('_')}"
        return where(run)

    return {run.__name__: run for run in map(made, cases)}


def each(cases: Iterable, where: Callable[..., Callable[[], None]] = on_device) -> Callable:
    """Make a test of its module for every case of a function `check_...`, see `split`."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        own = [case if isinstance(case, tuple) else (case,) for case in cases]
        check.__globals__.update(split(check.__name__.removeprefix("check_"), check, own, where))
        return check

    return decorate


def relative_rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def check_close(got: Tensor, want: Tensor, bound: float, what: str = "") -> None:
    """Hold tensors to a relative RMS error; a failure says by how much they differ, and where first."""
    got, want = got.detach().cpu(), want.detach().cpu()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    error = relative_rms(got, want)
    if error < bound:
        measured.append(f"{what} {error:.1e} of {bound:.0e}".strip())
        return
    typical = want.double().square().mean().sqrt().item()
    beyond = ~((got.double() - want.double()).abs() <= 4 * bound * typical)  # NaN is beyond
    raise AssertionError(f"{what}: relative RMS error {error:.2e}, bound {bound:.0e}; {told(got, want, beyond)}")


def check_equal(got: Tensor, want: Tensor, what: str = "", share: float = 0.0) -> None:
    """Hold tensors to be equal, but for a share of their entries."""
    got, want = got.detach().cpu(), want.detach().cpu()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    differs = got != want
    found = differs.double().mean().item() if differs.numel() else 0.0
    if share:
        measured.append(f"{what} {found:.1e} of {share:.0e}".strip())
    assert found <= share, f"{what}: {told(got, want, differs)}"


def told(got: Tensor, want: Tensor, differs: Tensor) -> str:
    """How many entries differ, the first of them, the farthest, and whether some are no numbers."""
    away = (got.double() - want.double()).abs().nan_to_num(float("inf"))
    places = differs.nonzero()
    first = tuple(places[0].tolist()) if len(places) else ()
    farthest = tuple(int(i) for i in torch.unravel_index(away.argmax(), away.shape))
    said = f"{len(places)} of {got.numel()} entries of {tuple(got.shape)} {got.dtype} differ"
    for name, at in (("first", first), ("farthest", farthest)):
        said += f"; {name} at {list(at)}: {got[at].item():.6g} for {want[at].item():.6g}" if len(places) else ""
    lost = int((~got.double().isfinite()).sum())
    return said + (f"; {lost} are not finite" if lost else "")


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
