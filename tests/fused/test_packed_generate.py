"""The whole path of a token through kernels with packed tiers: as in plain torch, and as with plain tiers."""

import pytest
import torch
from families import build, prompt
from oracle import relative_rms

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, Packed

SHAPE = dict(window=16, flush=2)
SELECTING = dict(keep_share=0.9, high_share=0.1)


def generated(model, backend, config, monkeypatch):
    """Logits of a prompt of 110 tokens and of three steps, with a flush."""
    monkeypatch.setenv("HFKV_BACKEND", backend)
    cache, ids = LeanKVCache(config), torch.cat([prompt(110), prompt(3, seed=1)], 1)
    with torch.no_grad():
        out = [model(part, past_key_values=cache).logits[:, -1] for part in ids.split([110, *[1] * 3], 1)]
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
        for low in ((4, 2), Packed(key_bits=4, value_bits=2))
    )
    assert relative_rms(packed[0], plain[0]) < 2e-5
    assert packed[1].report().bytes["pack_headers"] > 0
