"""Decode steps by compiled loops on the CPU: against the twin, when they are used, how they are built and kept."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from oracle import PAGE_CASES, dequantised, make_layer, poison, relative_rms, scatter_pages, softmax_attention
from tiny import tiny_llama

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.attend import Call, Past
from hfkv.backends import built, compiled, kernels_for, select
from hfkv.backends.compiled import CompiledKernels
from hfkv.backends.plain import PlainKernels
from hfkv.fill import Fill
from hfkv.kernels.loops import fits, step_loops
from hfkv.quant import PageLayout
from hfkv.window import Window

CPU = torch.device("cpu")


def window_of(layer, q, k, v, count):
    """A window of which `count` slots are filled, and that filling."""
    heads = layer.rows // q.shape[0]
    fill = Fill(count, torch.full((q.shape[0],), count), count, None, count, None)
    return Window(k.unflatten(0, (-1, heads)), v.unflatten(0, (-1, heads))), fill


def step_of(layer, q, k, v, count, call):
    """The attention of the newest queries by loops -> (output, the view they were read through)."""
    kernels = CompiledKernels()
    past = Past(layer, kernels.view(layer), *window_of(layer, q, k, v, count))
    return kernels.attend_step(past, q, call), past.view


def wanted(layer, q, k, v, count, call):
    """The same by attention over the dequantised keys and values."""
    heads, out = layer.rows // q.shape[0], []
    for row in range(layer.rows):
        own_k, own_v, _ = dequantised(layer, row)
        queries = q.flatten(0, 1).unflatten(0, (layer.rows, -1))[row].float() * call.scaling  # [groups, queries, D]
        for group in range(queries.shape[0]):
            sink = None if call.sinks is None else call.sinks[row % heads * queries.shape[0] + group][None]
            for number, query in enumerate(queries[group]):
                last = count - queries.shape[1] + number + 1
                keys, values = torch.cat([own_k, k[row, :last]]), torch.cat([own_v, v[row, :last]])
                out.append(softmax_attention(query[None], keys, values, call.softcap, sink)[0])
    return torch.cat(out).view(*q.shape[:3], -1)


def case(rows, key_dim, value_dim, groups, queries, batch=1, slots=12):
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(batch, rows // batch * groups, queries, key_dim, generator=generator)
    k, v = (torch.randn(rows, slots, dim, generator=generator) for dim in (key_dim, value_dim))
    return q, k, v


@pytest.fixture
def uncompiled(monkeypatch):
    """The expression itself, which says what compiled loops compute."""
    monkeypatch.setattr(compiled, "built_step", lambda shape, folding: step_loops(shape))


@pytest.mark.parametrize("counts, tiers, key_dim, value_dim, tokens", PAGE_CASES)
@pytest.mark.parametrize(
    "groups, queries, softcap, sinks", [(1, 1, None, False), (4, 1, 5.0, True), (7, 2, None, True)]
)
@pytest.mark.parametrize("shift", [True, False])
def test_loops_over_pages(
    counts, tiers, key_dim, value_dim, tokens, groups, queries, softcap, sinks, shift, uncompiled
):
    layer, _, _ = make_layer(counts, tiers, key_dim, value_dim, tokens, shift=shift)
    poison(layer)
    q, k, v = case(len(counts), key_dim, value_dim, groups, queries)
    k[:, 9:], v[:, 9:] = 1e4, 1e4  # behind the last
    call = Call(key_dim**-0.5, softcap, torch.linspace(-1, 1, q.shape[1]) if sinks else None)
    out, view = step_of(layer, q, k, v, 9, call)
    assert view.pages and relative_rms(out, wanted(layer, q, k, v, 9, call)) < 2e-5


def test_pages_in_several_memories(uncompiled):
    layer, _, _ = make_layer([(300, 300), (10, 500)], ((8, 4), (4, 2)), 64, 64)
    scatter_pages(layer)
    q, k, v = case(2, 64, 64, 3, 1)
    call = Call(0.125, None, None)
    out, view = step_of(layer, q, k, v, 9, call)
    assert max(len(block.sources) for block in view.work.blocks) > 1
    assert relative_rms(out, wanted(layer, q, k, v, 9, call)) < 2e-5
    assert view.nbytes == sum(x.nbytes for part in view.pages for x in part[1:])
    lists = layer.metadata_bytes - layer.table.nbytes - layer.basis.mean.nbytes - layer.has_mean.nbytes
    assert lists == view.nbytes + sum(block.nbytes for block in view.work.blocks)


def test_a_sequence_without_a_token_gets_zeros(uncompiled):
    layer, _, _ = make_layer([(0, 0), (5, 40)], ((8, 4), (4, 2)), 64, 64)
    q, k, v = case(2, 64, 64, 2, 1, batch=2)
    kernels = CompiledKernels()
    fill = Fill(None, torch.tensor([0, 9]), 9, torch.full((2, 9), -1), 9, torch.tensor([9, 0]))
    past = Past(layer, kernels.view(layer), Window(k[:, None], v[:, None]), fill)
    out = kernels.attend_step(past, q, Call(0.125, None, None))
    assert (out[0] == 0).all() and torch.isfinite(out).all() and (out[1] != 0).any()


@pytest.mark.parametrize(
    "counts, tiers, codec, queries",
    [
        pytest.param([(111, 0)], ("exact",), "fitted", 1, id="exact"),
        pytest.param([(63, 111)], ((8, 4), (4, 2)), "minmax", 1, id="minmax"),
        pytest.param([(63, 111)], ((8, 4), (4, 2)), "fitted", 9, id="many-queries"),
        pytest.param([(0, 8000)] + [(0, 1)] * 7, ((8, 4), (4, 2)), "fitted", 1, id="one-long-head"),
    ],
)
def test_what_is_left_to_the_twin(counts, tiers, codec, queries, monkeypatch):
    monkeypatch.setattr(compiled, "built_step", None)  # not to be called
    layer, _, _ = make_layer(counts, tiers, 64, 64, codec=codec)
    q, k, v = case(len(counts), 64, 64, 2, queries)
    call = Call(0.125, None, None)
    out, _ = step_of(layer, q, k[:, :9], v[:, :9], 9, call)
    assert relative_rms(out, wanted(layer, q, k, v, 9, call)) < 2e-5


def test_few_tokens_are_left_to_the_twin_unless_loops_are_asked_for(uncompiled):
    call = Call(0.125, None, None)
    for count, loops in [(1900, False), (2100, True)]:
        layer, _, _ = make_layer([(count, 0)] * 2, ((4, 2), (4, 2)), 64, 64)
        q, k, v = case(2, 64, 64, 3, 1)
        for kernels, wants in [(CompiledKernels(4096), loops), (CompiledKernels(), True)]:
            layer.changed()
            past = Past(layer, kernels.view(layer), *window_of(layer, q, k, v, 9))
            out = kernels.attend_step(past, q, call)
            assert (past.view.pages is not None) == wants
            assert kernels.name == ("inductor" if wants else "torch")
            assert relative_rms(out, wanted(layer, q, k, v, 9, call)) < 2e-5


# ---- built and kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, dim, words", [(8, 72, True), (4, 72, True), (2, 72, False), (3, 64, True), (3, 80, False)]
)
def test_keys_that_are_no_whole_words_are_not_for_loops(bits, dim, words):
    assert fits(PageLayout.of((bits, 2), (dim, dim), torch.float32, "fitted", 64, True)) == words


@pytest.fixture(scope="module")
def compiler():
    if built._obstacle() is not None:
        pytest.skip(f"loops cannot be built here: {built._obstacle()}")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """An empty folder for loops, and a process that knows none."""
    monkeypatch.setattr(built, "_folder", lambda: tmp_path)
    monkeypatch.setattr(built, "_steps", {})
    return tmp_path


def test_one_building_serves_all_sizes_and_later_processes(compiler, kept, monkeypatch, caplog):
    call = Call(0.125, None, None)

    def attend():
        for rows, count, queries in [(2, 90, 2), (3, 500, 3), (2, 1500, 5)]:
            layer, _, _ = make_layer([(count, 0)] * rows, ((4, 2),), 64, 64)
            q, k, v = case(rows, 64, 64, 3, queries)
            out, view = step_of(layer, q, k, v, 9, call)
            assert all(step is not None for step in view._steps.values())
            assert relative_rms(out, wanted(layer, q, k, v, 9, call)) < 2e-5

    with caplog.at_level(logging.WARNING, "hfkv"):
        attend()
    (file,) = kept.iterdir()
    assert caplog.text.count("once per kind of layer") == 1 and str(kept) in caplog.text
    monkeypatch.setattr(built, "_build", None)  # not to be called
    built._steps.clear()
    attend()
    monkeypatch.undo()
    built._runner(file)


def test_a_file_that_cannot_be_read_is_built_anew(kept, monkeypatch, caplog):
    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    q, k, v = case(1, 64, 64, 3, 1)

    def build(shape, folding, file):
        file.write_text("whole")

    def runner(file):
        if file.read_text() != "whole":
            raise RuntimeError("not an archive\nat all")
        return lambda *arguments: torch.zeros(1, 3, 1, 64)

    monkeypatch.setattr(built, "_build", build)
    monkeypatch.setattr(built, "_runner", runner)
    monkeypatch.setattr(built, "_name", lambda shape: "loops")
    (kept / "loops.pt2").write_text("hal")
    with caplog.at_level(logging.WARNING, "hfkv"):
        step_of(layer, q, k[:, :9], v[:, :9], 9, Call(0.125, None, None))
    assert "loops.pt2 is not readable and is built anew: not an archive" in caplog.text
    assert (kept / "loops.pt2").read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_replaced(monkeypatch, tmp_path, caplog):
    (tmp_path / "loops").write_text("a file in the way")
    monkeypatch.setenv("HFKV_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "hfkv"):
        folder = built._folder.__wrapped__()
    assert folder.is_dir() and tmp_path not in folder.parents and "for this process alone" in caplog.text
    folder.rmdir()


def test_loops_are_named_by_processor_and_code(monkeypatch):
    shape = "a shape"
    names = {built._name(shape)}
    for number in range(4):
        machine = list(built._machine())
        machine[number] = "another"
        with monkeypatch.context() as patch:
            patch.setattr(built, "_machine", lambda machine=tuple(machine): machine)
            names.add(built._name(shape))
    assert len(names) == 5


# ---- as a user has it --------------------------------------------------------------------------------------------


def generated(model, ids, cache, new=70):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


def test_compile_decode_on_the_cpu_gives_the_same_tokens(compiler):
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


def test_without_being_asked_once_there_is_enough_to_read(compiler, monkeypatch):
    model, ids = tiny_llama(), torch.randint(1, 256, (2, 150), generator=torch.Generator().manual_seed(1))
    config = LeanKVConfig.preset("balanced")
    want = generated(model, ids, LeanKVCache(config))
    monkeypatch.setattr(select, "LEAST", 600)  # reached in the midst of generating
    built_step, first = compiled.built_step, []

    def noted(shape, folding):
        first.append(cache.get_seq_length())
        return built_step(shape, folding)

    monkeypatch.setattr(compiled, "built_step", noted)
    cache = LeanKVCache(config)
    assert torch.equal(generated(model, ids, cache), want)
    assert cache.report().backend == "inductor" and first[0] > 170


def test_the_variable_asks_for_loops(monkeypatch, compiler):
    monkeypatch.setenv("HFKV_BACKEND", "inductor")
    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    assert kernels_for(CPU, layer.layouts, torch.float32, {}).least == 0
    with pytest.raises(ValueError, match=r"HFKV_BACKEND=inductor is for the CPU, and the cache is on cuda:1"):
        select.choose(torch.device("cuda:1"), layer.layouts, torch.float32)


def test_loops_are_used_on_the_cpu_unless_another_backend_is_forced(monkeypatch):
    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    monkeypatch.setattr(select, "LEAST", compiled.LEAST)
    by_itself = kernels_for(CPU, layer.layouts, torch.float32, {})
    assert (by_itself.least, by_itself.name) == (4096, "torch")
    monkeypatch.setenv("HFKV_BACKEND", "torch")
    assert type(kernels_for(CPU, layer.layouts, torch.float32, {}, compiled=True)) is PlainKernels


def test_without_a_compiler_that_is_said(monkeypatch):
    monkeypatch.setattr(built, "_obstacle", lambda: "No working C++ compiler found")
    with pytest.raises(ValueError, match=r"No working C\+\+ compiler found; install g\+\+"):
        hfkv.compile_decode(tiny_llama())
    assert "forward" not in tiny_llama().__dict__


def test_loops_that_cannot_be_built_are_left_to_the_twin_with_one_warning(kept, monkeypatch, caplog):
    def broken(shape):
        def step(*_):
            raise RuntimeError("no such loop\nat all")

        return step

    layer, _, _ = make_layer([(64, 64)], ((8, 4), (4, 2)), 64, 64)
    monkeypatch.setattr(built, "step_loops", broken)
    q, k, v = case(1, 64, 64, 3, 1)
    call = Call(0.125, None, None)
    with caplog.at_level(logging.WARNING, "hfkv"):
        for _ in range(2):
            out, _ = step_of(layer, q, k[:, :9], v[:, :9], 9, call)
            assert relative_rms(out, wanted(layer, q, k, v, 9, call)) < 2e-5
    assert caplog.text.count("decode steps are left to plain torch, which is slower: loops could not be built") == 1
    assert not list(kept.iterdir())
