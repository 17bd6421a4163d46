"""Recorded decode steps by Triton's kernels: one recording for all steps between two growths of the tables."""

import copy

import pytest
import torch
from emulated_graph import EmulatedGraph, NoHostReads, record_launches, storage_of
from transformers import LlamaConfig, LlamaForCausalLM

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.graphs.decode import install
from hfkv.kernels import append as twin
from hfkv.kernels.triton import append

TINY = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=64, vocab_size=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
IDS = torch.randint(1, 64, (2, 15), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :6] = 0


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "triton")
    record_launches(monkeypatch)


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.set_attn_implementation("leankv")
    return model


def fresh(preset):
    return LeanKVCache(LeanKVConfig.preset(preset, window=4, flush=4, observe=4, page_tokens=32))


def generated(model, preset, new, rows=2, **more):
    cache = fresh(preset)
    out = model.generate(
        IDS[-rows:], attention_mask=PADDED[-rows:], past_key_values=cache, max_new_tokens=new, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip
    assert cache.report().backend == "triton"
    return out.sequences, torch.stack(out.logits), cache


@pytest.mark.parametrize(
    "preset, dtype, recordings", [("aggressive", torch.float32, 2), ("k8v4", torch.float16, 1)], ids=["two", "one"]
)
def test_a_recording_serves_several_flushes(preset, dtype, recordings):
    """Every number is the eager step's: the same kernels ran, in the same order, on the same pages.

    The first page of the low tier makes the tables wider, so two tiers take two recordings.
    """
    model = llama().to(dtype)
    tokens, logits, plain = generated(model, preset, 13)
    install(model, EmulatedGraph)
    own_tokens, own_logits, recorded = generated(model, preset, 13)
    assert torch.equal(own_tokens, tokens) and torch.equal(own_logits, logits)
    report = hfkv.decode_report(model)
    assert (report.captured, report.warmed, report.replayed) == (recordings, 2 * recordings, 12 - 2 * recordings)
    for a, b in zip(recorded.compressed, plain.compressed, strict=True):
        assert (a.queries.positions, a.queries.stands_for) == (b.queries.positions, b.queries.stands_for)
        assert torch.equal(a.fill.counts, b.fill.counts) and torch.equal(a.packed.table.lengths, b.packed.table.lengths)
        assert int(a.packed.table.lengths.sum()) > 15
        if a.config.selects:
            kept, wanted = a.queries.kept(), b.queries.kept()
            assert (kept is None and wanted is None) or torch.equal(kept, wanted)
            for tier in range(a.packed.tiers):
                scores = [x.packed.slots(tier, ("score",))[1]["score"] for x in (a, b)]
                assert torch.equal(*scores)
    own = recorded.decode_step
    known = {storage_of(x) for x in [*model.parameters(), *model.buffers(), *own._held]}
    assert known.issuperset(own._recording.tape.outside)
    assert own.nbytes > 0


def test_beams_and_forks_share_a_recording():
    """A reorder and a fork copy into what the recording reads, or it is made anew."""
    model = llama()
    tokens, _, cache = generated(model, "balanced", 5, 1, num_beams=2)
    install(model, EmulatedGraph)
    own_tokens, _, own = generated(model, "balanced", 5, 1, num_beams=2)
    assert torch.equal(own_tokens, tokens)
    assert hfkv.decode_report(model).replayed == 2 and hfkv.decode_report(model).captured == 1
    other = copy.deepcopy(own)
    outs = []
    with torch.no_grad():
        for held in (own, other):
            held.crop(-1)
            outs.append(
                model(input_ids=torch.full((2, 1), 5), past_key_values=held, position_ids=torch.full((2, 1), 9))
            )
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert other.get_seq_length() == own.get_seq_length() == cache.get_seq_length()


def test_grown_tables_are_recorded_anew():
    """Pages beyond a table's width, and chunks beyond the copy of their addresses."""
    model = llama()
    install(model, EmulatedGraph)
    cache = fresh("k8v4")
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        for token in range(1, 5):
            model(input_ids=torch.full((2, 1), token), past_key_values=cache)
        assert hfkv.decode_report(model).captured == 1
        held = cache.compressed[0]
        width = held.packed.table.ids.shape[1]
        held.packed.table = held.packed.table.widened(2 * width, held.packed.page_counts(0))
        control = copy.deepcopy(cache)
        cache.crop(-1)  # what changes tables makes new fills too
        control.crop(-1)
        plain_forward = type(model).forward
        for token in range(5, 9):
            ids = torch.full((2, 1), token)
            with NoHostReads() if token > 7 else torch.no_grad():
                got = model(input_ids=ids, past_key_values=cache).logits
            assert torch.equal(got, plain_forward(model, input_ids=ids, past_key_values=control).logits)
    assert hfkv.decode_report(model).captured == 2


@pytest.mark.parametrize("batch, heads, groups, dim, value_dim", [(3, 2, 3, 80, 64), (1, 1, 1, 16, 16)])
def test_counting_and_appending_equal_the_twin(batch, heads, groups, dim, value_dim):
    """Over a block of steps: counts, which queries are kept, where everything goes; strides as a model gives them."""
    capacity, most, generator = 24, 3, torch.Generator().manual_seed(0)
    start = torch.randint(0, 8, (batch,), generator=generator)
    made = []
    for begin, add in ((twin.begin_step, twin.append_step), (append.begin_step, append.append_step)):
        generator.manual_seed(1)
        counts, kept = start.clone(), torch.tensor([1, 3, 0])
        windows = torch.zeros(batch, heads, capacity, dim), torch.zeros(batch, heads, capacity, value_dim)
        queries = torch.zeros(batch, heads * groups, most, dim)
        for number in range(12):
            k, v, q = (
                torch.randn(batch, 1, n, d, generator=generator).transpose(1, 2)
                for n, d in ((heads, dim), (heads, value_dim), (heads * groups, dim))
            )
            keeps = number < 10  # the last two as in a layer that keeps none
            begin(counts, kept if keeps else None, 4, most)
            add(k, v, q, *windows, counts, queries if keeps else None, kept if keeps else None)
        made.append((counts, kept, *windows, queries))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    counts, kept, window, _, queries = made[0]
    assert torch.equal(counts, start + 12) and kept.tolist()[:2] == [3, 13]
    assert torch.equal((window[:, 0].abs().sum(-1) > 0).sum(1), torch.full((batch,), 12))
    assert bool((queries[:, :, 1:].abs().sum(-1) > 0).all()) and not queries[:, :, 0].any()
