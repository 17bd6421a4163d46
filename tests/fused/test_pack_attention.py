"""Decode attention over packs, plain pages and the window, against float64 and the twin."""

import pytest
import torch
from oracle import make_layer, relative_rms
from test_decode_attention import BOUNDS, make_past, make_queries, reference

from hfkv import Packed, attend
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
