"""Recorded decode steps: an emulated graph repeats their device part, the host's books go on apart from it."""

import copy
import gc
import inspect
import logging
import pickle
import types
import weakref

import pytest
import torch
from emulated_graph import EmulatedGraph, HostRead, NoHostReads, storage_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.fill import advance, crop
from hfkv.graphs.decode import install
from hfkv.graphs.fills import LaterFill
from hfkv.report import tier_map

SMALL = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=64, initializer_range=0.3, pad_token_id=None, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
IDS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :25] = 0
FEW = dict(max_new_tokens=50, do_sample=False)
CLOSE = 1e-3
"""Relative RMS difference of logits: sums in another order, and codes that they round the other way."""


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "torch")


def llama(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()
    model.set_attn_implementation("leankv")
    return model


def fresh(preset="balanced", **changes):
    return LeanKVCache(LeanKVConfig.preset(preset, **{"window": 8, "flush": 16, "observe": 8, **changes}))


def difference(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def step(model, cache, token, mask=None, **more):
    """One forward -> logits of the last token; `token` is an id for all sequences, or ids."""
    batch = cache.compressed[0].fill.batch
    ids = torch.full((batch, 1), token) if isinstance(token, int) else token
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, **more).logits[:, -1]


def held(cache):
    """What two caches that went the same way have in common."""
    layers = cache.compressed
    kept = [(t.queries.positions, t.queries.stands_for) for t in layers if t.config.selects]
    return (
        kept,
        [t.fill.counts.tolist() for t in layers],
        cache.get_seq_length(),
        [layer.seen for layer in cache.layers],
    )


def assert_same(got, want):
    assert held(got) == held(want)
    for a, b in zip(got.compressed, want.compressed, strict=True):
        assert torch.equal(a.packed.table.lengths, b.packed.table.lengths)
        n = a.fill.most
        assert difference(a.window.k[:, :, :n], b.window.k[:, :, :n]) < CLOSE
        if a.config.selects and a.queries.kept() is not None:
            assert difference(a.queries.kept(), b.queries.kept()) < CLOSE
        if a.config.selects:
            for tier in range(a.packed.tiers):
                scores = [x.packed.slots(tier, ("score",))[1]["score"].float() for x in (a, b)]
                if scores[1].numel():
                    assert difference(*scores) < 1e-2


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


def begun(model, preset="balanced", rows=IDS, mask=None, steps=5, **changes):
    """A cache behind a prompt and some steps; with `compiled` models the last of them is a replay."""
    cache = fresh(preset, **changes)
    with torch.no_grad():
        model(input_ids=rows, attention_mask=mask, past_key_values=cache)
    for token in range(1, steps + 1):
        step(model, cache, token)
    return cache


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
    assert sum("not captured" in x.message and "layer 1" in x.message for x in caplog.records) == 1
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
    refused(model, caplog, "its steps differ")


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
    with pytest.raises(ValueError, match=r"one CUDA device, and this one is on cpu"):
        hfkv.compile_decode(model)
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
