"""The decode kernels against float64 attention over the same dequantised keys and values, and against the twin."""

import pytest
import torch
from oracle import dequantised, make_layer, poison, relative_rms

pytest.importorskip("triton")

from hfkv import attend
from hfkv.attend import Call, Past
from hfkv.fill import Fill
from hfkv.kernels.triton.decode_attention import attend_step, plan_step
from hfkv.kernels.triton.work import Workspace
from hfkv.window import Window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_past(layer, heads, counts, capacity, value_dim, dtype, seed=3):
    """A past over `layer` with `counts` tokens in the sequences' windows."""
    generator = torch.Generator().manual_seed(seed)
    batch, key_dim = layer.rows // heads, layer.layouts[0].key.dim
    k = torch.randn(batch, heads, capacity, key_dim, generator=generator).to(dtype)
    v = torch.randn(batch, heads, capacity, value_dim, generator=generator).to(dtype)
    for sequence, count in enumerate(counts):  # what lies behind the last token must not matter
        k[sequence, :, count:], v[sequence, :, count:] = float("nan"), float("nan")
    counts = torch.tensor(counts)
    most = int(counts.max())
    uniform = most if bool((counts == most).all()) else None
    positions = None if uniform is not None else torch.zeros(batch, most, dtype=torch.long)
    fill = Fill(uniform, counts, most, positions, most, None)
    return Past(layer.work(), layer.basis, Window(k, v), fill, layer)


def reference(past, layer, q, call):
    """Float64 attention, one query at a time."""
    batch, q_heads, queries, _ = q.shape
    heads = past.window.heads
    out = torch.zeros(*q.shape[:3], past.window.v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for head in range(q_heads):
            row = b * heads + head // (q_heads // heads)
            keys, values, _ = dequantised(layer, row)
            for i in range(queries):
                seen = int(past.fill.counts[b]) - queries + i + 1
                k = torch.cat([keys.double(), past.window.k[b, row % heads, :seen].double()])
                v = torch.cat([values.double(), past.window.v[b, row % heads, :seen].double()])
                logits = k @ q[b, head, i].double() * call.scaling
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                if call.sinks is not None:
                    logits = torch.cat([logits, call.sinks[head : head + 1].double()])
                out[b, head, i] = logits.softmax(0)[: k.shape[0]] @ v
    return out


K8V4, K4V2 = (8, 4), (4, 2)
CASES = [
    # tokens per row and tier, tiers, D, Dv, page tokens, codec, KV heads, groups, queries, window counts
    pytest.param([(100, 200), (33, 150)], (K8V4, K4V2), 64, 64, 32, "fitted", 2, 4, 1, [20], id="G4-D64-P32"),
]


@pytest.mark.parametrize("counts, tiers, dim, value_dim, tokens, codec, heads, groups, queries, fill", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_attention(counts, tiers, dim, value_dim, tokens, codec, heads, groups, queries, fill, dtype):
    layer, _, _ = make_layer(counts, tiers, dim, value_dim, tokens, codec, dtype=dtype)
    poison(layer)
    past = make_past(layer, heads, fill, 40, value_dim, dtype)
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(len(counts) // heads, heads * groups, queries, dim, generator=generator).to(dtype)
    call = Call(dim**-0.5, None, None)
    plan = plan_step(layer, past.window, groups * queries, Workspace.on("cpu"))
    out = attend_step(past, q, call, plan)
    want = reference(past, layer, q, call)
    err = relative_rms(out, want)
    print(err, relative_rms(attend.attend_step(past, q, call), want))
    assert err < (1e-5 if dtype == torch.float32 else 2e-3)
