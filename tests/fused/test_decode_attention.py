"""The decode kernels against float64 attention over the same dequantised keys and values, and against the twin.

Error bounds are relative RMS: 1e-5 where all is computed in float32, 1.5e-3 with int8 queries and fp16 probabilities.
"""

import pytest
import torch
from oracle import dequantised, make_layer, poison, relative_rms

from hfkv import attend
from hfkv.attend import Call, Past
from hfkv.fill import Fill
from hfkv.kernels.shared_memory import page_room
from hfkv.kernels.triton import decode_attention
from hfkv.kernels.triton.decode_attention import attend_step, plan_step
from hfkv.kernels.triton.work import StepPlan, Workspace, pages_at_once
from hfkv.quant import Codec, PageLayout
from hfkv.window import Window

BOUNDS = {torch.float32: 1e-5, torch.float16: 1.5e-3}
K8V4, K4V2, EXACT = (8, 4), (4, 2), "exact"


def make_past(layer, heads, counts, capacity, value_dim, dtype):
    """A past over `layer` with `counts` tokens in the sequences' windows, and NaN behind them."""
    generator = torch.Generator().manual_seed(3)
    batch, key_dim = layer.rows // heads, layer.layouts[0].key.dim
    k = torch.randn(batch, heads, capacity, key_dim, generator=generator).to(dtype)
    v = torch.randn(batch, heads, capacity, value_dim, generator=generator).to(dtype)
    counts = torch.tensor(counts)
    most = int(counts.max())
    uniform = most if bool((counts == most).all()) else None
    for sequence, count in enumerate(counts.tolist()):
        k[sequence, :, most if uniform is None else count :] = float("nan")  # the twin reads up to `most`
        v[sequence, :, most if uniform is None else count :] = float("nan")
    positions = None if uniform is not None else torch.zeros(batch, most, dtype=torch.long)
    return Past(layer, layer.work(), Window(k, v), Fill(uniform, counts, most, positions, most, None))


def reference(past, q, call):
    """Float64 attention, one query at a time."""
    batch, q_heads, queries, _ = q.shape
    heads = past.window.heads
    out = torch.zeros(*q.shape[:3], past.window.v.shape[3], dtype=torch.float64)
    held = [dequantised(past.packed, row)[:2] for row in range(past.packed.rows)]
    for b in range(batch):
        for head in range(q_heads):
            keys, values = held[b * heads + head // (q_heads // heads)]
            for i in range(queries):
                seen = int(past.fill.counts[b]) - queries + i + 1
                own = head // (q_heads // heads)
                k = torch.cat([keys.double(), past.window.k[b, own, :seen].double()])
                v = torch.cat([values.double(), past.window.v[b, own, :seen].double()])
                logits = k @ q[b, head, i].double() * call.scaling
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                if call.sinks is not None:
                    logits = torch.cat([logits, call.sinks[head : head + 1].double()])
                out[b, head, i] = logits.softmax(0)[: k.shape[0]] @ v
    return out


def make_queries(past, groups, queries, dtype):
    generator = torch.Generator().manual_seed(7)
    batch, heads = past.fill.batch, past.window.heads
    dim = past.window.k.shape[3]
    q = torch.randn(batch, queries, heads * groups, dim, generator=generator).to(dtype)
    return q.transpose(1, 2)  # as a model gives it: not contiguous where there are several queries


CASES = [
    # tokens per row and tier, tiers, D, Dv, page tokens, codec, KV heads, groups, queries, window counts
    pytest.param([(100, 200), (33, 150)], (K8V4, K4V2), 64, 64, 32, "fitted", 2, 4, 1, [20], id="G4-D64-P32"),
    pytest.param([(70, 129)], (K8V4, K4V2), 128, 128, 64, "fitted", 1, 8, 1, [33], id="G8-D128-P64"),
    pytest.param([(0, 63), (0, 0), (17, 0)], (K8V4, K4V2), 64, 64, 32, "fitted", 1, 1, 1, [5, 1, 9], id="empty-ragged"),
    pytest.param([(5, 40), (64, 31)], (K8V4, K4V2), 80, 80, 32, "fitted", 2, 3, 2, [17], id="G3-Q2-D80"),
    pytest.param([(30, 90)], (K8V4, K4V2), 96, 96, 32, "fitted", 1, 7, 5, [18], id="G7-Q5-D96"),
    pytest.param([(40, 33)], (K8V4, (4, 3)), 96, 64, 32, "fitted", 1, 12, 1, [16], id="G12-V3-D96-Dv64"),
    pytest.param([(20, 40)], ((4, 4), (3, 2)), 64, 64, 16, "fitted", 1, 2, 1, [3], id="K3-P16"),
    pytest.param([(31, 33)], ((8, 8), (2, 2)), 64, 64, 32, "fitted", 1, 2, 1, [2], id="V8-K2"),
    pytest.param([(40, 70)], (K8V4, K4V2), 64, 64, 32, "minmax", 1, 4, 2, [9], id="minmax"),
    pytest.param([(40, 70)], (EXACT, K4V2), 64, 64, 32, "fitted", 1, 4, 1, [9], id="exact-K4V2"),
    pytest.param([(75, 0)], (EXACT,), 64, 64, 32, "fitted", 1, 2, 1, [40], id="exact"),
    pytest.param([(65, 0)], (K8V4,), 256, 256, 64, "fitted", 1, 1, 1, [1], id="D256-one-tier"),
    pytest.param([(33, 20)], (K8V4, K4V2), 64, 64, 32, "fitted", 1, 48, 1, [7], id="G48"),
    pytest.param([(33, 20)], (K8V4, K4V2), 64, 64, 32, "fitted", 1, 71, 1, [7], id="G71"),
    pytest.param([(20, 50)], (K8V4, K4V2), 20, 10, 32, "fitted", 1, 2, 1, [7], id="D20-Dv10"),
    pytest.param([(20, 50)], (K8V4, K4V2), 72, 100, 32, "fitted", 1, 2, 1, [7], id="D72-Dv100"),
    pytest.param([(700, 3400), (0, 16)], (K8V4, K4V2), 64, 64, 64, "fitted", 2, 1, 1, [1], id="4100-beside-16"),
]


@pytest.mark.parametrize("counts, tiers, dim, value_dim, tokens, codec, heads, groups, queries, fill", CASES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "fp16"])
def test_attention(counts, tiers, dim, value_dim, tokens, codec, heads, groups, queries, fill, dtype):
    layer, _, _ = make_layer(counts, tiers, dim, value_dim, tokens, codec, dtype=dtype)
    poison(layer)
    past = make_past(layer, heads, fill, 40, value_dim, dtype)
    q = make_queries(past, groups, queries, dtype)
    call = Call(dim**-0.5, None, None)
    plan = plan_step(layer, past.window, groups * queries, Workspace.on("cpu"))
    out = attend_step(past, q, call, plan)
    assert out.shape == (*q.shape[:3], value_dim) and out.dtype == dtype
    assert relative_rms(out, reference(past, q, call)) < BOUNDS[dtype]
    assert relative_rms(out, attend.attend_step(past, q, call)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("softcap, sinks", [(5.0, False), (None, True), (5.0, True)], ids=["softcap", "sinks", "both"])
def test_softcap_and_sinks(softcap, sinks, dtype):
    layer, _, _ = make_layer([(40, 70), (10, 0)], (K8V4, K4V2), 64, 64, dtype=dtype)
    past = make_past(layer, 2, [9], 16, 64, dtype)
    q = make_queries(past, 3, 2, dtype)
    sink = torch.randn(6, generator=torch.Generator().manual_seed(1)) + 3 if sinks else None
    call = Call(0.2, softcap, sink)
    out = attend_step(past, q, call, plan_step(layer, past.window, 6, Workspace.on("cpu")))
    assert relative_rms(out, reference(past, q, call)) < BOUNDS[dtype]


def test_a_plan_is_refreshed_in_place_and_its_workspace_shared():
    """The steps of a second layer leave nothing behind in the first one's; the output may be given."""
    space = Workspace.on("cpu")
    layers = [make_layer(counts, (K8V4, K4V2), 64, 64)[0] for counts in ([(90, 40)], [(3, 200)])]
    pasts = [make_past(layer, 1, [n], 32, 64, torch.float32) for layer, n in zip(layers, (5, 31), strict=True)]
    plans = [plan_step(layer, past.window, 2, space) for layer, past in zip(layers, pasts, strict=True)]
    held = [x.data_ptr() for x in (plans[0].items, plans[0].offsets, space.acc, space.whole)]
    call, out = Call(0.125, None, None), torch.full((1, 2, 1, 64), float("nan"))
    for past, plan in [*zip(pasts, plans, strict=True)] * 2:
        plan.refresh(past.packed.table.lengths)
        q = make_queries(past, 2, 1, torch.float32)
        assert attend_step(past, q, call, plan, out) is out
        assert relative_rms(out, reference(past, q, call)) < 1e-5
    assert held == [x.data_ptr() for x in (plans[0].items, plans[0].offsets, space.acc, space.whole)]


def test_a_step_that_does_not_fit_its_plan_is_refused():
    layer, _, _ = make_layer([(9, 9)], (K8V4, K4V2), 64, 64)
    past = make_past(layer, 1, [5], 32, 64, torch.float32)
    plan = plan_step(layer, past.window, 2, Workspace.on("cpu"))
    with pytest.raises(ValueError, match="plan it anew"):
        attend_step(past, make_queries(past, 4, 1, torch.float32), Call(1.0, None, None), plan)


ROOMS = [
    # tiers, D, dtype, shared memory of two pages at once in KiB as compiled, and of one
    ((EXACT,), 128, torch.bfloat16, 64, 32),
    ((EXACT,), 256, torch.bfloat16, 128, 64),
    ((EXACT,), 128, torch.float32, 136, 68),
    ((EXACT,), 256, torch.float32, 272, 136),
    ((K8V4, K4V2), 256, torch.float32, 144, 72),
]


@pytest.mark.parametrize("tiers, dim, dtype, two, one", ROOMS, ids=str)
def test_pages_are_read_together_where_shared_memory_holds_them(tiers, dim, dtype, two, one):
    layouts = tuple(PageLayout.of(tier, (dim, dim), dtype, "fitted", 64, True) for tier in tiers)
    room = page_room(layouts, dtype)
    assert room == one * 1024
    assert pages_at_once(layouts, dtype, int(two * 1024)) == 2
    assert pages_at_once(layouts, dtype, int(two * 1024) - 1) == 1


@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "fp16"])
def test_one_page_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(decode_attention, "shared_room", lambda device: 1)
    layer, _, _ = make_layer([(100, 200), (33, 0)], (K8V4, K4V2), 32, 32, 32, dtype=dtype)
    past = make_past(layer, 2, [9], 16, 32, dtype)
    q, call = make_queries(past, 3, 1, dtype), Call(0.2, None, None)
    plan = plan_step(layer, past.window, 3, Workspace.on("cpu"))
    assert plan.warps == 1
    assert relative_rms(attend_step(past, q, call, plan), reference(past, q, call)) < BOUNDS[dtype]


LENGTHS = {
    "one-token": [(0, 1)],
    "1k": [(102, 922)],
    "128k-beside-16": [(13000, 118000), (0, 16)],
    "nothing": [(0, 0), (0, 0)],
    "64-rows": [(64 * r, 1000 - r) for r in range(64)],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("columns", [8, 48], ids=["one-tile", "six-tiles"])
def test_work_items_cover_everything_once(lengths, columns):
    """Every page and window step belongs to one item; items are ordered by row, as equal in bytes as borders allow."""
    codecs = [(Codec.of(t, side, 128, torch.float16, "fitted") for side in ("key", "value")) for t in (K8V4, K4V2)]
    layouts = tuple(PageLayout(*pair, 64, True) for pair in codecs)
    plan = StepPlan(
        layouts, len(lengths), columns, 96, torch.float16, torch.device("cpu"), Workspace.on("cpu"), programs=792
    )
    plan.refresh(torch.tensor(lengths, dtype=torch.int32))
    items, offsets = plan.items.tolist(), plan.offsets.tolist()
    assert len(items) == plan.count and offsets[0] == 0 and offsets[-1] == plan.count
    page = (*(layout.page_bytes for layout in layouts), 16 * 256 * 2)
    for row, length in enumerate(lengths):
        own = items[offsets[row] : offsets[row + 1]]
        assert all(item[0] == row for item in own)
        for tier, pages in enumerate((-(-length[0] // 64), -(-length[1] // 64), 6)):
            covered = [i for _, t, first, n in own if t == tier for i in range(first, first + n)]
            assert covered == list(range(pages))
    sizes = [n * page[tier] for _, tier, _, n in items]
    used = min(plan.shares, max(1, sum(sizes) // (2 * min(page[:2]))))
    assert max(sizes) <= sum(sizes) / used + 2 * 2 * max(page)
    assert sum(size > 0 for size in sizes) >= 0.5 * min(used, sum(sizes) // (2 * max(page)))
