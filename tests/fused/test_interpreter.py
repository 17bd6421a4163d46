"""The interpreter's shortcuts: the same bytes as without, and nothing left patched."""

from contextlib import nullcontext

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from test_compaction import flush, packed_layer
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder


@pytest.fixture(autouse=True)
def _hastened():
    if not triton.__version__.startswith(interpreter.VERSIONS):
        pytest.skip("this Triton is left as it is")
    assert interpreter._changes


@triton.jit
def doubled(x):
    return tl.where(x > 0, 2 * x, tl.sum(x, 0) + tl.max(x, 0))


@triton.jit
def kernel(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(source + at, at < N - 1, other=0.5)
    for _ in range(3):
        x = doubled(x)
    both = x[:, None] * x[None, :] + tl.program_id(0)
    tl.store(target + tl.program_id(0) * N * N + at[:, None] * N + at[None, :], both.to(target.dtype.element_ty))


def run(dtype, programs=2):
    out = torch.zeros(programs, 16, 16, dtype=dtype)
    kernel[(programs,)](torch.randn(16, generator=torch.Generator().manual_seed(0)), out, 16)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_a_kernel_writes_the_same(dtype):
    with interpreter.unhastened():
        want = run(dtype)
    assert torch.equal(run(dtype), want) and want.count_nonzero() > 100


def test_a_flush_writes_the_same():
    """Every byte of the pool and of the tables."""
    made = []
    for context in (nullcontext, interpreter.unhastened):
        layer = packed_layer(1, ((8, 4), (4, 2)), (16, 20), torch.float32, 16)
        with context():
            flush(layer, [20], 0, torch.Generator().manual_seed(0), [0.5, 0.3, 0.2], on_device=True)
        memory = [arena.memory for arena in layer.pool._arenas.values()]
        made.append([layer.table.ids, layer.table.lengths, layer.pool._used, *memory])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_the_language_is_patched_once_a_launch_and_then_as_it_was(monkeypatch):
    """However many device functions it calls, and whatever it ends with."""
    patched, original, load = [], triton_interpreter._patch_builtin, tl.load
    monkeypatch.setattr(
        triton_interpreter, "_patch_builtin", lambda package, *args: patched.append(package) or original(package, *args)
    )

    def patches(programs):
        patched.clear()
        run(torch.float32, programs)
        assert tl.load is load
        return len(patched)

    once = patches(1)
    assert 0 < once == patches(2)

    def broken(*args):
        raise ValueError("broken")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="broken"):
        patch.setattr(InterpreterBuilder, "create_masked_load", broken)
        patches(1)
    assert tl.load is load and patches(1) == once
    with interpreter.unhastened():
        assert patches(1) > 2 * once


def test_shapes_that_do_not_fit_are_still_refused():
    with pytest.raises(Exception, match="incompatible dimensions"):
        refused[(1,)](torch.zeros(16), 16)
    with pytest.raises(Exception, match="power of 2"):
        refused[(1,)](torch.zeros(16), 12)


@triton.jit
def refused(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.zeros((N,), tl.float32) + tl.zeros((2 * N,), tl.float32))
