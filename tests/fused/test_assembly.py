"""Inline assembly against the plain Triton beside it, by a small interpreter of PTX: all bytes, then whole steps."""

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl
from oracle import make_layer, poison
from test_decode_attention import K4V2, K8V4, make_past, make_queries

from hfkv.attend import Call
from hfkv.kernels.triton import pages
from hfkv.kernels.triton.decode_attention import attend_step, plan_step
from hfkv.kernels.triton.work import Workspace


@pytest.fixture
def assembly(monkeypatch):
    """Kernels take their assembly inside; what was run is in the list."""
    monkeypatch.setattr(pages, "PLAIN", tl.constexpr(False))
    return ptx.emulate(monkeypatch)


BYTES = torch.arange(256, dtype=torch.uint8).view(1, 4, 64)
TOPS = torch.arange(256, dtype=torch.uint8).flip(0).view(1, 4, 64)


@triton.jit
def convert(x_ptr, top_ptr, out_ptr, HOW: tl.constexpr, N: tl.constexpr):
    """Bytes [1, 4, 64] by one of the conversions, out [N, 4, 64]."""
    at = tl.arange(0, 4)[None, :, None] * 64 + tl.arange(0, 64)[None, None, :]
    x = tl.load(x_ptr + at)
    top = tl.load(top_ptr + at)
    if HOW == "denormal":
        tl.store(out_ptr + at, pages.denormal(x))
    elif HOW == "halves":
        a, b = pages.denormal_halves(x)
        tl.store(out_ptr + at, a)
        tl.store(out_ptr + 256 + at, b)
    elif HOW == "quarters":
        a, b, c, d = pages.denormal_quarters(x)
        tl.store(out_ptr + at, a)
        tl.store(out_ptr + 256 + at, b)
        tl.store(out_ptr + 512 + at, c)
        tl.store(out_ptr + 768 + at, d)
    elif HOW == "nibbles":
        tl.store(out_ptr + at, pages.field(x, 0, 15))
        tl.store(out_ptr + 256 + at, pages.field(x, 4, 15))
    elif HOW == "pairs":
        for i in tl.static_range(4):
            tl.store(out_ptr + i * 256 + at, pages.field(x, 2 * i, 3))
    else:
        for i in tl.static_range(4):
            tl.store(out_ptr + i * 256 + at, pages.merged(x, top, 2 * i))


CONVERSIONS = {"denormal": (1, torch.float16), "halves": (2, torch.float16), "quarters": (4, torch.float16),
               "nibbles": (2, torch.int8), "pairs": (4, torch.int8), "threes": (4, torch.int8)}  # fmt: skip


@pytest.mark.parametrize("how", CONVERSIONS)
def test_all_bytes(how, monkeypatch):
    n, dtype = CONVERSIONS[how]
    want, got = torch.full((2, n, 4, 64), 77, dtype=dtype)
    convert[(1,)](BYTES, TOPS, want, HOW=how, N=n)
    monkeypatch.setattr(pages, "PLAIN", tl.constexpr(False))
    ran = ptx.emulate(monkeypatch)
    convert[(1,)](BYTES, TOPS, got, HOW=how, N=n)
    assert ran and torch.equal(got, want)
    first = BYTES.view(-1, 4)[:, [0, 2, 1, 3]].reshape(4, 64).float()
    if how == "denormal":
        assert torch.equal(got[0].float() * 2**24, first)


@triton.jit
def spread(words_ptr, out_ptr, PRODUCT: tl.constexpr):
    words = tl.load(words_ptr + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :])
    at = tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, pages.byte_floats(words, 128, PRODUCT, 4, 64))
    tl.store(out_ptr + 256 + at, pages.byte_twelfths(words, PRODUCT, 4, 64))
    tl.store(out_ptr + 512 + at, pages.byte_ints(words, False, PRODUCT, 4, 64).to(tl.float32))
    tl.store(out_ptr + 768 + at, pages.byte_ints(words, True, PRODUCT, 4, 64).to(tl.float32))


@pytest.mark.parametrize("product", [False, True])
def test_metadata_bytes(product, monkeypatch):
    words = BYTES.flatten().view(torch.int32)
    want, got = torch.zeros(2, 4, 256)
    spread[(1,)](words, want, PRODUCT=product)
    monkeypatch.setattr(pages, "PLAIN", tl.constexpr(False))
    ran = ptx.emulate(monkeypatch)
    spread[(1,)](words, got, PRODUCT=product)
    assert ran and torch.equal(got, want)
    assert torch.equal(got[3], got[0]) and torch.equal(got[2] - 128, got[0])


CASES = [((K8V4, K4V2), 64, 64), (((4, 4), (3, 3)), 32, 32), (((8, 8), (2, 2)), 80, 32)]


@pytest.mark.parametrize("tiers, dim, tokens", CASES, ids=str)
def test_a_step(tiers, dim, tokens, assembly, monkeypatch):
    """Page addresses of both ends of the table, and codes on their way into products."""
    layer, _, _ = make_layer([(100, 70), (33, 150)], tiers, dim, dim, tokens, "fitted", dtype=torch.float16)
    poison(layer)
    past = make_past(layer, 2, [9], 16, dim, torch.float16)
    q, call = make_queries(past, 3, 1, torch.float16), Call(dim**-0.5, None, None)
    plan = plan_step(layer, past.window, 3, Workspace.on("cpu"))
    got = attend_step(past, q, call, plan)
    assert any("ld.global" in text for text in assembly) and any("prmt" in text for text in assembly)
    monkeypatch.setattr(pages, "PLAIN", tl.constexpr(True))
    want = attend_step(past, q, call, plan)
    assert np.allclose(got.float(), want.float(), rtol=2e-3, atol=2e-3)
