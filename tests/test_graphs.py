"""Recorded decode steps: an emulated graph repeats their device part, the host's books go on apart from it."""

import copy
import gc
import inspect
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulated_graph import EmulatedGraph, HostRead, NoHostReads, storage_of
from families import lean, left_padded
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import CLOSE, FEW, IDS, PADDED, SMALL, assert_same, begun, difference, fresh, held, llama, step
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.graphs.decode import install
from hfkv.report import tier_map


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "torch")


# ---- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["k8v4", "balanced", "exact", "aggressive"])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_generate_says_the_same(preset, batch):
    """Greedy tokens, logits, windows, kept queries and scores over several flushes."""
    model, made = llama(), []
    inputs = (IDS[:1], torch.ones_like(IDS[:1])) if batch == "one" else (IDS, PADDED)
    for compiled in (False, True):
        if compiled:
            install(model, EmulatedGraph)
        cache = fresh(preset)
        out = model.generate(
            inputs[0], attention_mask=inputs[1], past_key_values=cache, output_logits=True,
            return_dict_in_generate=True, **FEW,
        )  # fmt: skip
        made.append((out, cache))
    (want, plain), (got, recorded) = made
    assert torch.equal(got.sequences, want.sequences)
    assert difference(torch.stack(got.logits), torch.stack(want.logits)) < CLOSE
    assert_same(recorded, plain)
    report = hfkv.decode_report(model)
    assert report.replayed + report.warmed == FEW["max_new_tokens"] - 1 and report.replayed > 35
    assert list(report.eager) == ["a prompt, or several new tokens at once"]
    assert f"{report.replayed} replayed" in str(report)
    sizes = recorded.report(), plain.report()
    assert 0 < sizes[0].physical_bytes - sizes[1].physical_bytes == recorded.decode_step.nbytes


@pytest.mark.parametrize("name", ["cohere", "gpt-neox", "gpt2", "mixtral", "olmoe", "phi", "qwen3"])
def test_families_replay(name):
    """Learned positions, parallel blocks, experts, norms of queries: nothing that a recording would freeze."""
    model, tokens = lean(name), []
    for compiled in (False, True):
        if compiled:
            install(model, EmulatedGraph)
        more = dict(past_key_values=LeanKVCache(LeanKVConfig.preset("exact")), max_new_tokens=12, do_sample=False)
        tokens.append(model.generate(**left_padded([20, 50]), **more))
    assert torch.equal(*tokens)
    assert hfkv.decode_report(model).replayed == 9


def beams(model, cache):
    return model.generate(
        IDS, attention_mask=PADDED, past_key_values=cache, num_beams=3, **{**FEW, "max_new_tokens": 20}
    )


def lookup(model, cache):
    return model.generate(IDS[:1].repeat(1, 2), past_key_values=cache, prompt_lookup_num_tokens=3, **FEW)


def assisted(model, cache):
    torch.manual_seed(1)
    helper = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    return model.generate(IDS[:1], past_key_values=cache, assistant_model=helper, **FEW)


def turns(model, cache):
    first = model.generate(IDS[:1], past_key_values=cache, **FEW)
    longer = torch.cat([first, IDS[1:]], 1)
    return model.generate(longer, past_key_values=cache, **FEW)


def forked(model, cache):
    start = model.generate(IDS[:1], past_key_values=cache, **FEW)
    other = copy.deepcopy(cache)
    assert other.decode_step is None
    other.batch_repeat_interleave(2)
    more = model.generate(start.repeat(2, 1), past_key_values=other, **FEW)
    return torch.cat([more, model.generate(start, past_key_values=cache, **FEW)])


def returned(model, cache):
    """Several sequences of one prompt, then the cache anew for another."""
    first = model.generate(IDS[:1], past_key_values=cache, num_return_sequences=2, num_beams=2, **FEW)
    cache.reset()
    assert cache.decode_step is None
    return torch.cat([first, model.generate(IDS, past_key_values=cache, **FEW)])


@pytest.mark.parametrize("mode", [beams, lookup, assisted, turns, forked, returned], ids=lambda mode: mode.__name__)
def test_modes_say_the_same(mode):
    """What crops, reorders, forks, resets or continues a cache between recorded steps."""
    model, tokens = llama(), []
    for compiled in (False, True):
        if compiled:
            install(model, EmulatedGraph)
        cache = fresh()
        tokens.append((mode(model, cache), held(cache)))
    assert torch.equal(tokens[1][0], tokens[0][0])
    assert tokens[1][1] == tokens[0][1]
    if mode is not beams and mode is not assisted:  # another work list at every step; hardly ever a single token
        assert hfkv.decode_report(model).replayed > 3


def test_enabled_models_replay_and_disable_restores():
    model = llama()
    want = model.generate(IDS[:1], past_key_values=fresh(), **FEW)
    model.set_attn_implementation("sdpa")
    before, signature = dict(model.__dict__), inspect.signature(model.forward)
    hfkv.enable(model, LeanKVConfig.preset("balanced", window=8, flush=16, observe=8))
    install(model, EmulatedGraph)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(IDS[:1], **FEW), want)
    assert hfkv.decode_report(model).replayed > 35
    hfkv.disable(model)
    assert model.__dict__.keys() == before.keys() and model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="compile_decode"):
        hfkv.decode_report(model)


# ---- forward after forward -------------------------------------------------------------------------------------------


def test_two_caches_in_turn():
    model = llama()
    want = []
    for rows in (IDS, IDS[:1]):
        cache = begun(model, rows=rows)
        want.append(torch.stack([step(model, cache, token) for token in range(6, 40)], 1))
    install(model, EmulatedGraph)
    caches = [begun(model, rows=rows) for rows in (IDS, IDS[:1])]
    got = [[], []]
    for token in range(6, 40):
        for own, cache in zip(got, caches, strict=True):
            own.append(step(model, cache, token))
    for own, wanted in zip(got, want, strict=True):
        assert difference(torch.stack(own, 1), wanted) < CLOSE
    assert hfkv.decode_report(model).replayed > 40


def test_two_threads_share_a_model():
    model = llama()
    want = [model.generate(rows, past_key_values=fresh(), **FEW) for rows in (IDS, IDS[:1])]
    install(model, EmulatedGraph)
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(model.generate, rows, past_key_values=fresh(), **FEW) for rows in (IDS, IDS[:1])]
        assert all(torch.equal(job.result(), wanted) for job, wanted in zip(work, want, strict=True))
    assert hfkv.decode_report(model).replayed > 70


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.sampled_from(["step", "step", "steps", "chunk", "crop", "reorder", "fork", "hidden", "flush"]), max_size=9
    )
)
def test_whatever_happens_in_between(happenings):
    """Steps, chunks, crops, reorders, forks, flushes and hidden tokens in any order: the same logits and books."""
    made = []
    for compiled in (False, True):
        model = llama()
        if compiled:
            install(model, EmulatedGraph)
        cache, mask = begun(model, mask=PADDED), torch.cat([PADDED, PADDED.new_ones(2, 5)], 1)
        outs = []
        for number, what in enumerate(["steps", *happenings, "steps"]):
            generator = torch.Generator().manual_seed(number)
            if what == "crop":
                cache.crop(-2)
                mask = mask[:, :-2]
            elif what == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
                mask = mask.flip(0)
            elif what == "fork":
                cache = copy.deepcopy(cache)
            elif what == "flush":
                cache.flush()
            else:
                for _ in range(4 if what == "steps" else 1):
                    ids = torch.randint(1, 64, (2, 3 if what == "chunk" else 1), generator=generator)
                    new = torch.ones_like(ids)
                    if what == "hidden":
                        new[1] = 0
                    mask = torch.cat([mask, new], 1)
                    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
                    outs.append(step(model, cache, ids, mask, position_ids=positions))
        made.append((torch.stack(outs), cache))
    (want, plain), (got, recorded) = made
    assert difference(got, want) < CLOSE
    assert_same(recorded, plain)


def test_saved_between_steps(tmp_path):
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    cache.save(tmp_path / "cache")
    other = LeanKVCache.load(tmp_path / "cache")
    assert_same(other, cache)
    for token in range(30):
        assert difference(step(model, other, token), step(model, cache, token)) < CLOSE
    assert_same(other, cache)
    assert torch.equal(tier_map(other, 0), tier_map(cache, 0))


def test_outputs_stay_what_they_were():
    """A replay writes where the last one did; what was handed out is the caller's."""
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    with torch.no_grad():
        out = model(input_ids=torch.full((2, 1), 5), past_key_values=cache)
    before = out.logits.clone()
    assert out.past_key_values is cache and cache.decode_step.replayed
    step(model, cache, 6)
    assert torch.equal(out.logits, before)


def test_a_step_asks_the_device_for_nothing():
    """Neither its device part nor the host's books, while no flush is due: with generate's masks, and without any."""
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model, steps=2)
    mask = torch.ones(2, 43, dtype=torch.long)
    step(model, cache, 3, mask)
    with NoHostReads():
        for token in range(4, 12):
            mask = model._update_model_kwargs_for_generation({}, {"attention_mask": mask})["attention_mask"]
            step(model, cache, token, mask)
            assert cache.decode_step.replayed
        with pytest.raises(HostRead):  # a mask from elsewhere is looked at
            step(model, cache, 12, mask.clone().new_ones(2, mask.shape[1] + 1))


def test_a_mask_that_hides_the_new_token_runs_eagerly():
    model = llama()
    want = begun(model, mask=PADDED)
    install(model, EmulatedGraph)
    got = begun(model, mask=PADDED)
    mask = torch.cat([PADDED, PADDED.new_ones(2, 5)], 1)
    for token, new in enumerate(([1, 1], [0, 1], [1, 1], [1, 0], [1, 1], [1, 1])):
        mask = torch.cat([mask, torch.tensor(new)[:, None]], 1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        got_logits = step(model, got, token, mask, position_ids=positions)
        wanted = step(types.MethodType(type(model).forward, model), want, token, mask, position_ids=positions)
        assert difference(got_logits, wanted) < CLOSE
    assert_same(got, want)
    assert hfkv.decode_report(model).eager["the attention mask hides the new token, or not just the padding"] == 2


def test_everything_a_recording_reads_is_held():
    """Its memory is the model's, or the step itself holds it."""
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    own = cache.decode_step
    known = {storage_of(x) for x in [*model.parameters(), *model.buffers(), *own._held]}
    outside = own._recording.tape.outside
    assert len(outside) > 10
    assert all(key in known for key in outside)


def test_a_dropped_cache_is_gone_at_once():
    model = llama()
    install(model, EmulatedGraph)
    cache = begun(model)
    seen = [weakref.ref(x) for x in (cache, cache.decode_step, cache.compressed[0], cache.decode_step._recording)]
    gc.disable()
    try:
        del cache
        assert [x() for x in seen] == [None] * 4
    finally:
        gc.enable()
