"""What `compile_decode` leaves alone, refuses, or survives; and the fills that steps without the host leave."""

import contextlib
import copy
import gc
import logging
import pickle

import pytest
import torch
from emulated_graph import EmulatedGraph
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import CLOSE, FEW, IDS, PADDED, SMALL, assert_same, begun, difference, fresh, llama, step
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages, Packed
from hfkv.bench import caches, generate, sizes
from hfkv.bench.results import Cell
from hfkv.bench.session import Session
from hfkv.fill import advance, crop
from hfkv.graphs import device
from hfkv.graphs.decode import install
from hfkv.graphs.fills import LaterFill


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "torch")


# ---- what is not captured --------------------------------------------------------------------------------------------


def test_layers_that_grow_by_themselves(caplog):
    """A sliding layer: said once, and right."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"]
    config = Gemma2Config(**SMALL, query_pre_attn_scalar=16, sliding_window=16, layer_types=kinds)
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("leankv")
    want = model.generate(IDS, attention_mask=PADDED, past_key_values=fresh("exact"), **FEW)
    install(model, EmulatedGraph)
    with caplog.at_level(logging.WARNING, "hfkv"):
        for _ in range(2):
            got = model.generate(IDS, attention_mask=PADDED, past_key_values=fresh("exact"), **FEW)
            assert torch.equal(got, want)
    assert sum("not captured: layer 1" in x.message for x in caplog.records) == 1
    assert hfkv.decode_report(model).replayed == 0


def test_packed_tiers(caplog):
    """Said once, and right."""
    model, config = llama(), LeanKVConfig(tiers=[Packed()], window=16, flush=4)
    want = model.generate(IDS, attention_mask=PADDED, past_key_values=LeanKVCache(config), **FEW)
    install(model, EmulatedGraph)
    with caplog.at_level(logging.WARNING, "hfkv"):
        for _ in range(2):
            got = model.generate(IDS, attention_mask=PADDED, past_key_values=LeanKVCache(config), **FEW)
            assert torch.equal(got, want)
    assert sum("not captured: the host looks where the packs" in x.message for x in caplog.records) == 1
    assert hfkv.decode_report(model).replayed == 0


def refused(model, caplog, reason):
    """The model generates what it did before, with one warning that names the reason."""
    want = model.generate(IDS, attention_mask=PADDED, past_key_values=fresh(), **FEW)
    install(model, EmulatedGraph)
    with caplog.at_level(logging.WARNING, "hfkv"):
        for _ in range(2):
            cache = fresh()
            assert torch.equal(model.generate(IDS, attention_mask=PADDED, past_key_values=cache, **FEW), want)
    found = [x.message for x in caplog.records if "without CUDA graphs" in x.message]
    assert len(found) == 1 and reason in found[0]
    assert hfkv.decode_report(model).replayed == 0
    assert cache.report().tokens == IDS.shape[1] + FEW["max_new_tokens"] - 1


def test_a_model_that_waits_for_the_device(caplog):
    model = llama()
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, out: out * float(out.isfinite().all().item()))
    refused(model, caplog, "waits for the device")


def test_a_model_that_asks_for_the_length(caplog):
    """Its recorded step would go on with the length that it was recorded at."""
    model = llama()
    head = model.lm_head.forward
    lengths = iter(range(10_000))
    model.lm_head.forward = lambda x: head(x) + next(lengths) * 1e-9
    refused(model, caplog, "its steps differ")


def test_a_model_that_makes_masks_of_its_length(caplog):
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32,
        max_position_embeddings=256, init_std=0.3, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    model.set_attn_implementation("leankv")
    refused(model, caplog, "its step cannot be captured")  # why depends on the version of transformers


class Unrecordable(EmulatedGraph):
    def __init__(self, device, step, before=None):
        super().__init__(device, step, before)
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_fails_leaves_the_cache_usable(caplog):
    model = llama()
    want = begun(model, steps=20)
    install(model, Unrecordable)
    with caplog.at_level(logging.WARNING, "hfkv"):
        got = begun(model, steps=20)
    assert_same(got, want)
    assert sum("not permitted when stream is capturing" in x.message for x in caplog.records) == 1


def test_other_calls_run_as_always():
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    replayed = hfkv.decode_report(model).replayed
    step(model, cache, 1, output_hidden_states=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="dtype"):
            model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
        model(inputs_embeds=model.model.embed_tokens(torch.full((2, 1), 5)), past_key_values=cache)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
    with pytest.raises(ValueError, match="batch size"), torch.no_grad():
        model(input_ids=torch.full((3, 1), 5), past_key_values=cache)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=DynamicCache())
        model(IDS)
    assert hfkv.decode_report(model).replayed == replayed
    assert hfkv.decode_report(model).eager["the call passes output_hidden_states"] == 1


def test_an_interrupted_step_is_not_taken():
    model = llama()
    install(model, EmulatedGraph)
    cache, control = begun(model, steps=1), begun(model, steps=1)
    handle = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        step(model, cache, 7)
    handle.remove()
    for token in range(30):
        assert difference(step(model, cache, token), step(model, control, token)) < CLOSE
    assert_same(cache, control)


def test_out_of_pages_is_what_it_was(monkeypatch):
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    control = copy.deepcopy(cache)

    def refuse(demand, slack=0.0):
        raise OutOfPages("none left")

    with monkeypatch.context() as patch:
        patch.setattr(cache.pools[0], "reserve", refuse)
        with pytest.raises(OutOfPages):
            for _ in range(40):
                step(model, cache, 1)
    while control.get_seq_length() < cache.get_seq_length():
        step(model, control, 1)
    for token in range(20):
        assert difference(step(model, cache, token), step(model, control, token)) < CLOSE
    assert_same(cache, control)


def test_copies_and_pickles():
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other
    twin = copy.deepcopy(cache)
    assert difference(step(other, twin, 3), step(model, cache, 3)) < CLOSE
    assert hfkv.decode_report(other).replayed == hfkv.decode_report(model).replayed - 1
    assert pickle.loads(pickle.dumps(cache.decode_step)) is None


# ---- installation ----------------------------------------------------------------------------------------------------


def test_what_it_needs_is_said():
    model = llama()
    model.model.embed_tokens.to("meta")
    with pytest.raises(ValueError, match=r"the CPU or on one CUDA device, and this one is on cpu, meta"):
        hfkv.compile_decode(model)
    model = llama()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"leankv.*'sdpa'.*hfkv\.enable"):
        hfkv.compile_decode(model)
    with pytest.raises(TypeError, match="Linear"):
        hfkv.compile_decode(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LlamaModel"):
        hfkv.compile_decode(model.model)
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=64, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match="encoder-decoder"):
        hfkv.compile_decode(BartForConditionalGeneration(config))
    assert "forward" not in model.__dict__


# ---- fills -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_a_later_fill_is_the_fill_of_as_many_steps(tokens, new, remove):
    from hfkv.fill import Fill

    base = Fill.empty(2, torch.device("cpu"))
    for valid in tokens:
        base = advance(base, 1, None if all(valid) else torch.tensor(valid)[:, None])
    base = crop(base, remove)
    want, late = base, LaterFill(LaterFill(base, 1), new)
    for _ in range(new + 1):
        want = advance(want, 1, None)
    assert (late.most, late.seen, late.batch, late.uniform) == (want.most, want.seen, want.batch, want.uniform)
    assert torch.equal(late.lengths, want.lengths)
    assert torch.equal(late.counts, want.counts) and torch.equal(late.token_positions, want.token_positions)
    assert torch.equal(copy.deepcopy(late).counts, want.counts)
    assert torch.equal(late.valid, want.valid)


# ---- benchmark -------------------------------------------------------------------------------------------------------


def test_the_benchmark_says_what_was_replayed(monkeypatch):
    """On a GPU alone, at batch 1; a model that cannot be captured is a row of eager steps with the reason."""
    cells = {device: generate.cells(sizes.GPU, torch.device(device)) for device in ("cuda", "cpu")}
    assert {c.cache for c in cells["cuda"]} - {c.cache for c in cells["cpu"]} > set(caches.GRAPHS)
    assert all(cell.batch == 1 for cell in cells["cuda"] if cell.cache in caches.GRAPHS)
    own = Session(torch.device("cpu"), torch.float32, sizes.sizes_for(torch.device("cpu"), quick=True))
    cell = Cell("generate", "k8v4 graph", own.sizes.model.heads, 2, 200, 1)
    rows = []
    for recorder in (EmulatedGraph, Unrecordable):
        monkeypatch.setattr(generate, "compile_decode", lambda model, made_by=recorder: install(model, made_by))
        rows += generate.measure(own, cell)
    assert [row["launch"] for row in rows] == ["graph", "eager"]
    assert "not permitted when stream is capturing" in rows[1]["note"]
    assert rows[0]["physical_bytes"] > rows[1]["physical_bytes"] > 0
    assert "forward" not in own.model(2, "leankv").__dict__


# ---- CUDA's side, in its absence -------------------------------------------------------------------------------------


class Calls:
    """Stands in for torch.cuda: notes what is asked of it, in order."""

    def __init__(self, monkeypatch):
        self.made, self.current, outer = [], Stream("user"), self

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                outer.made.append(("begin", outer.current.name, pool, capture_error_mode, gc.isenabled()))

            def capture_end(self):
                outer.made.append(("end", outer.current.name))

            def pool(self):
                return "a pool"

            def replay(self):
                outer.made.append(("replay", outer.current.name))

        @contextlib.contextmanager
        def within(stream):
            before, outer.current = outer.current, stream
            try:
                yield
            finally:
                outer.current = before

        for name, value in {
            "CUDAGraph": Graph,
            "Stream": lambda device: Stream("side", self.made),
            "stream": within,
            "current_stream": lambda device: self.current,
            "synchronize": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for known in (device._side_streams, device._last_streams):
            monkeypatch.setattr(device, next(n for n, v in vars(device).items() if v is known), {})


class Stream:
    def __init__(self, name, made=None):
        self.name, self.made = name, made

    def wait_stream(self, other):
        if self.made is not None:
            self.made.append((self.name, "waits for", other.name))


def test_a_recording_follows_the_rules_of_cuda(monkeypatch):
    """On a stream of its own, in the memory of the one before, without garbage collection, ended when it fails."""
    calls, here = Calls(monkeypatch), torch.device("cuda:0")
    first = device.CudaGraph(here, lambda: calls.made.append("step") or 7)
    begun_with = ("begin", "side", None, "thread_local", False)
    assert calls.made == [("side", "waits for", "user"), begun_with, "step", ("end", "side")]
    assert first.out == 7 and gc.isenabled()
    assert device.CudaGraph.warm_up(here, lambda: calls.current.name) == "side" and calls.current.name == "user"
    calls.made.clear()
    with pytest.raises(RuntimeError, match="capturing"):
        device.CudaGraph(here, lambda: (_ for _ in ()).throw(RuntimeError("capturing")), first)
    assert calls.made[1][2] == "a pool" and calls.made[-1] == ("end", "side")
    assert gc.isenabled()
    calls.made.clear()
    first.replay()
    calls.current = Stream("another", calls.made)
    first.replay()
    first.replay()
    assert calls.made == [
        ("replay", "user"),
        ("another", "waits for", "user"),
        ("replay", "another"),
        ("replay", "another"),
    ]
