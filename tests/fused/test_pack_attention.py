"""Decode attention over packs, plain pages and the window, against float64 and the twin; generate by kernels."""

import pytest
import torch
from families import build, prompt
from oracle import make_layer, relative_rms
from test_decode_attention import BOUNDS, make_past, make_queries, reference

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, Packed, attend
from hfkv.attend import Call
from hfkv.backends.packs import PackKernels

LOW = Packed(key_bits=4, value_bits=2)
WIDE = Packed(rel_key=0.05, rel_value=0.01, sides="keys", repack="bucket")

CASES = [
    # tokens per row and tier, tiers, D, Dv, KV heads, groups, queries, window counts
    pytest.param([(70, 200), (33, 150)], ((8, 4), LOW), 64, 64, 2, 4, 1, [20], id="G4-D64"),
    pytest.param([(300, 0)], (Packed(),), 128, 128, 1, 8, 1, [33], id="one-tier-D128"),
    pytest.param([(0, 64), (0, 0), (17, 0), (0, 65)], ((8, 4), LOW), 32, 48, 2, 1, 1, [5, 9], id="empty-and-just-full"),
    pytest.param([(5, 140)], ("exact", WIDE), 80, 80, 1, 3, 2, [17], id="G3-Q2-D80"),
    pytest.param([(130, 140)], (WIDE, LOW), 72, 20, 1, 12, 1, [18], id="both-packed-G12-D72-Dv20"),
]


def attended(layer, heads, fill, groups, queries, dtype, call):
    past = make_past(layer, heads, fill, 40, layer.layouts[0].value.dim, dtype)
    q = make_queries(past, groups, queries, dtype)
    out = PackKernels(torch.device("cpu"), {}).attend_step(past, q, call)
    assert relative_rms(out, reference(past, q, call)) < BOUNDS[dtype]
    assert relative_rms(out, attend.attend_step(past, q, call)) < BOUNDS[dtype]


@pytest.mark.parametrize("counts, tiers, dim, value_dim, heads, groups, queries, fill", CASES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "fp16"])
def test_attention(counts, tiers, dim, value_dim, heads, groups, queries, fill, dtype):
    layer, _, _ = make_layer(counts, tiers, dim, value_dim, 64, dtype=dtype)
    assert any(int((sealed.address[:, 1] >= 0).sum()) for sealed in layer.pool._sealed) or counts == [(5, 40)]
    attended(layer, heads, fill, groups, queries, dtype, Call(dim**-0.5, None, None))


def test_softcap_and_sinks():
    layer, _, _ = make_layer([(20, 140), (10, 0)], ((8, 4), LOW), 64, 64, 64, dtype=torch.float16)
    attended(layer, 2, [9], 2, 1, torch.float16, Call(0.125, 5.0, torch.tensor([0.5, -1.0, 2.0, 0.0])))


SHAPE = dict(window=16, flush=4)
SELECTING = dict(keep_share=0.9, high_share=0.1)


def generated(model, backend, config, monkeypatch):
    """Logits of a prompt of 110 tokens and of five steps, with a flush."""
    monkeypatch.setenv("HFKV_BACKEND", backend)
    cache, ids = LeanKVCache(config), torch.cat([prompt(110), prompt(5, seed=1)], 1)
    with torch.no_grad():
        out = [model(part, past_key_values=cache).logits[:, -1] for part in ids.split([110, *[1] * 5], 1)]
    assert cache.report().backend == backend
    return torch.stack(out), cache


@pytest.mark.parametrize(
    "tiers, choice",
    [([(8, 4), Packed(rel_key=0.05, rel_value=0.1)], SELECTING), ([Packed(repack="bucket")], {})],
    ids=["pruned", "one tier"],
)
def test_generate_by_kernels(tiers, choice, monkeypatch):
    """As in plain torch: vectors are coded, moved, packed and read by kernels."""
    model, config = hfkv.enable(build("llama")), LeanKVConfig(tiers=tiers, **choice, **SHAPE)
    (want, plain), (got, fused) = (generated(model, backend, config, monkeypatch) for backend in ("torch", "triton"))
    assert relative_rms(got, want) < 2e-4
    assert fused.report().bytes["codes"] == pytest.approx(plain.report().bytes["codes"], rel=1e-3)
    assert fused.report().bytes["pack_headers"] > 0


def test_generate_by_kernels_as_with_plain_tiers(monkeypatch):
    """The same codes, packed or not."""
    model = hfkv.enable(build("llama"))
    plain, packed = (
        generated(model, "triton", LeanKVConfig(tiers=[low], page_tokens=64, **SHAPE), monkeypatch)
        for low in ((4, 2), LOW)
    )
    assert relative_rms(packed[0], plain[0]) < 2e-5
    assert packed[1].report().bytes["pack_headers"] > 0
