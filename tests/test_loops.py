"""Decode steps by compiled loops on the CPU: the loops against the twin, `hfkv.compile_decode`, what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from oracle import dequantised, make_layer, poison, relative_rms, softmax_attention
from tiny import tiny_llama
from torch._dynamo.utils import counters

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.backends import compiled, kernels_for, select
from hfkv.backends.compiled import Looped, Loops, _compile, _loops
from hfkv.kernels.decode_attention import Widened, exact_keys, join
from hfkv.kernels.loops import fits, key_loop, value_loop
from hfkv.kernels.page_codes import Scratch

CASES = [
    # tokens per row and tier, tiers, key dim, value dim, page tokens
    pytest.param([(1, 0)], ((8, 4), (4, 2)), 64, 64, 32, id="one-token"),
    pytest.param([(0, 63), (111, 1)], ((8, 4), (4, 2)), 64, 64, 32, id="T63-T111-D64"),
    pytest.param([(63, 111), (0, 0), (5, 700)], ((8, 4), (4, 2)), 80, 80, 64, id="empty-row-D80"),
    pytest.param([(33, 257), (64, 32)], ((8, 4), (4, 3)), 96, 96, 32, id="V3-D96"),
    pytest.param([(111, 63)], ((4, 4), (3, 2)), 128, 128, 64, id="K3-D128"),
    pytest.param([(40, 300), (1, 1)], ((8, 8), (2, 2)), 256, 256, 64, id="K2V2-D256"),
    pytest.param([(100, 40)], ((8, 4), (4, 2)), 20, 10, 32, id="odd-dims"),
]


def eagerly(layout, sizes):
    """The expressions themselves, which say what compiled loops compute."""
    return Loops(key_loop(layout), value_loop(layout))


def attended(layer, rows, softcap, sinks, extra_k, extra_v):
    read = Looped(Widened(Scratch(rows.device)))
    return join(layer.work(), rows, [exact_keys(rows, extra_k, extra_v, None, softcap)], softcap, sinks, read).attend()


@pytest.mark.parametrize("counts, tiers, key_dim, value_dim, tokens", CASES)
@pytest.mark.parametrize("queries, softcap, shift", [(1, None, True), (4, 5.0, False), (14, None, True)])
def test_loops_over_pages(counts, tiers, key_dim, value_dim, tokens, queries, softcap, shift, monkeypatch):
    monkeypatch.setattr("hfkv.paging.packed.BLOCK_TOKENS", 256)  # several blocks
    monkeypatch.setattr(compiled, "_loops", eagerly)
    layer, _, _ = make_layer(counts, tiers, key_dim, value_dim, tokens, shift=shift)
    poison(layer)
    assert all(fits(block.layout) for block in layer.work().blocks)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(len(counts), queries, key_dim, generator=generator) * key_dim**-0.5
    sinks = torch.randn(len(counts), queries, generator=generator)
    extra_k, extra_v = (torch.randn(len(counts), 3, dim, generator=generator) for dim in (key_dim, value_dim))
    out = attended(layer, rows, softcap, sinks, extra_k, extra_v)
    for row in range(len(counts)):
        k, v, _ = dequantised(layer, row)
        k, v = torch.cat([k, extra_k[row]]), torch.cat([v, extra_v[row]])
        assert relative_rms(out[row], softmax_attention(rows[row], k, v, softcap, sinks[row])[0]) < 2e-5


def test_pages_in_several_arenas_are_copied_together(monkeypatch):
    monkeypatch.setattr(compiled, "_loops", eagerly)
    layer, _, _ = make_layer([(300, 300), (10, 500)], ((8, 4), (4, 2)), 64, 64)
    block = layer.work().blocks[0]
    (rows, words, _), half = block.sources[0], block.pages // 2
    split = ((rows, words[:half], slice(0, half)), (rows, words[half:], slice(half, block.pages)))
    apart = type(block)(block.tier, block.layout, block.pages, block.row, split, block.free, block.columns)
    for whole in (block, apart):
        pages, which = whole.addressed()
        assert pages.stride() == (8, 1) and which.dtype == torch.int32
        assert torch.equal(pages[which].flatten(0, 1), block.gather())


@pytest.mark.parametrize(
    "tiers, codec", [(("exact",), "fitted"), (((8, 4), (4, 2)), "minmax")], ids=["exact", "minmax"]
)
def test_other_pages_are_read_by_the_twin(tiers, codec, monkeypatch):
    monkeypatch.setattr(compiled, "_loops", None)  # not to be called
    layer, _, _ = make_layer([(111, 0) if len(tiers) == 1 else (63, 111)], tiers, 64, 64, codec=codec)
    assert not any(fits(layout) for layout in layer.layouts)
    rows = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)) / 8
    out = attended(layer, rows, None, None, torch.zeros(1, 0, 64), torch.zeros(1, 0, 64))
    k, v, _ = dequantised(layer, 0)
    assert relative_rms(out[0], softmax_attention(rows[0], k, v)[0]) < 2e-5


def test_one_compilation_serves_all_sizes():
    layers = [
        make_layer([count] * rows, ((4, 2),), 64, 64)[0] for rows, count in ((2, (90,)), (3, (500,)), (2, (3000,)))
    ]
    layout = layers[0].layouts[0]
    _loops(layout, (2, 2, 2))
    before = counters["stats"]["unique_graphs"]
    for layer in layers:
        for queries in (2, 3, 8):
            rows = torch.randn(layer.rows, queries, 64, generator=torch.Generator().manual_seed(0)) / 8
            extra = torch.zeros(layer.rows, 0, 64)
            out = attended(layer, rows, None, None, extra, extra)
            k, v, _ = dequantised(layer, 0)
            assert relative_rms(out[0], softmax_attention(rows[0], k, v)[0]) < 2e-5
    assert counters["stats"]["unique_graphs"] == before


# ---- as a user has it --------------------------------------------------------------------------------------------


def generated(model, ids, cache, new=70):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


def test_compile_decode_on_the_cpu_gives_the_same_tokens():
    model, ids = tiny_llama(), torch.randint(1, 256, (2, 150), generator=torch.Generator().manual_seed(1))
    config = LeanKVConfig.preset("balanced")
    want = generated(model, ids, LeanKVCache(config))
    filled = LeanKVCache(config)
    begun = generated(model, ids, filled, 40)
    further = generated(model, begun, copy.deepcopy(filled), 40)
    try:
        assert hfkv.compile_decode(model) is model
        assert hfkv.decode_report(model).eager == {}
        cache = LeanKVCache(config)
        assert torch.equal(generated(model, ids, cache), want)
        assert cache.report().backend == "inductor"
        report = hfkv.decode_report(model)
        assert (report.captured, report.replayed) == (0, 0) and sum(report.eager.values()) == 70
        assert "on the CPU" in str(report)
        assert filled.report().backend == "torch"
        assert torch.equal(generated(model, begun, filled, 40), further)
        assert filled.report().backend == "inductor"
        cache.reset()
        assert torch.equal(generated(model, ids, cache), want)
    finally:
        hfkv.disable(model)
    assert "forward" not in model.__dict__
    cache = LeanKVCache(config)
    generated(model, ids, cache, 3)
    assert cache.report().backend == "torch"
    with pytest.raises(ValueError, match="compile_decode"):
        hfkv.decode_report(model)


def test_the_variable_asks_for_loops(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "inductor")
    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    assert kernels_for(torch.device("cpu"), layer.layouts, torch.float32, {}).name == "inductor"
    with pytest.raises(ValueError, match=r"HFKV_BACKEND=inductor is for the CPU, and the cache is on cuda:1"):
        select.choose(torch.device("cuda:1"), layer.layouts, torch.float32)


def test_compile_decode_asks_for_loops_only_on_the_cpu_and_unforced(monkeypatch):
    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    assert select.choose(torch.device("cpu"), layer.layouts, torch.float32, compiled=True) == "inductor"
    monkeypatch.setenv("HFKV_BACKEND", "torch")
    assert select.choose(torch.device("cpu"), layer.layouts, torch.float32, compiled=True) == "torch"


def test_without_a_compiler_that_is_said(monkeypatch):
    monkeypatch.setattr(compiled, "_obstacle", lambda: "No working C++ compiler found")
    with pytest.raises(ValueError, match=r"No working C\+\+ compiler found; install g\+\+"):
        hfkv.compile_decode(tiny_llama())
    assert "forward" not in tiny_llama().__dict__


def test_a_loop_that_does_not_compile_is_left_to_the_twin_with_a_warning(monkeypatch, caplog):
    def broken(layout):
        raise RuntimeError("no such loop\nat all")

    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    monkeypatch.setattr(compiled, "_own", lambda loop: broken)
    with caplog.at_level(logging.WARNING, "hfkv"):
        assert _compile(layer.layouts[1], (1, 2, 3)) is None
    assert "K4V2 are read by plain torch, not by compiled loops" in caplog.text
    monkeypatch.setattr(compiled, "_loops", lambda layout, sizes: None)
    rows = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)) / 8
    extra = torch.zeros(1, 0, 64)
    k, v, _ = dequantised(layer, 0)
    assert relative_rms(attended(layer, rows, None, None, extra, extra)[0], softmax_attention(rows[0], k, v)[0]) < 2e-5
