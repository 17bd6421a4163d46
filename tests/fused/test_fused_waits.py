"""Who waits for the device: nobody in a step, and in a flush the host once for all layers, where something may grow."""

import copy

import pytest
import torch
from host_reads import Watch
from shared_pages import check_owners
from transformers import LlamaConfig, LlamaForCausalLM

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.bench import caches
from hfkv.bench.sizes import Shape
from hfkv.tiering import Flush

TINY = dict(
    hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=64,
 initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=0,
)  # fmt: skip
IDS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :6] = 0
STEPS, FLUSH = 14, 4


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "triton")


def llama(layers=1):
    torch.manual_seed(0)
    return hfkv.enable(LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=layers)).eval())


def fresh(preset, **changes):
    return LeanKVCache(LeanKVConfig.preset(preset, window=8, flush=FLUSH, observe=4, page_tokens=32, **changes))


def generated(monkeypatch, layers, preset, mask=None, **changes):
    """(tokens, cache, of every step of one token whether a flush was due, what was read, and whether memory grew)."""
    model, cache, watch, steps = llama(layers), fresh(preset, **changes), Watch(monkeypatch), []
    original = type(model).forward

    def forward(self, *args, **kwargs):
        if not cache.layers:
            return original(self, *args, **kwargs)
        due, before = cache._must_flush(1), grown(cache)
        with watch:
            out = original(self, *args, **kwargs)
        steps.append((due, list(watch.reads), grown(cache) > before))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        ids = IDS[:1] if mask is None else IDS
        mask = torch.ones_like(ids) if mask is None else mask
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    assert cache.report().backend == "triton" and len(steps) == STEPS - 1
    return out, cache, steps


def grown(cache):
    """Memory and columns of tables: what only a flush that has asked may make more of."""
    return sum(pool.memory_bytes for pool in cache.pools) + sum(t.packed.table.nbytes for t in cache.compressed)


CASES = {
    "k8v4-padded": (1, "k8v4", PADDED, {}),
    "balanced": (2, "balanced", None, {}),
    "aggressive-padded": (1, "aggressive", PADDED, {}),
    "budget": (1, "balanced", None, dict(high_share=None, keep_share=None, budget=0.9)),
}


@pytest.mark.parametrize("layers, preset, mask, changes", CASES.values(), ids=CASES)
def test_nobody_waits_between_flushes_and_a_flush_waits_once(layers, preset, mask, changes, monkeypatch):
    out, cache, steps = generated(monkeypatch, layers, preset, mask, **changes)
    mail = [f"tolist at paging/mail.py:{line}" for line in range(100)]  # of the flush before: long there
    looks = [(due, [read for read in reads if read not in mail], grew) for due, reads, grew in steps]
    assert [reads for due, reads, _ in looks if not due and reads] == []
    flushes = [(len(reads), grew) for due, reads, grew in looks if due]
    assert len(flushes) >= 3 and max(reads for reads, _ in flushes) <= 1, looks
    assert all(reads == 1 for reads, grew in flushes if grew), "nothing grows unasked"
    if "budget" not in changes:  # its policy may make any number of tokens low
        assert sum(reads == 0 for reads, _ in flushes) >= 1, looks
    for pool in cache.pools:
        pool.catch_up()
        check_owners(pool, [tokens.packed for tokens in cache.compressed])
    if preset != "balanced" or changes:
        return
    monkeypatch.setattr(Flush, "most", None)  # the host asks always
    again, asked, _ = generated(monkeypatch, layers, preset, mask)
    assert torch.equal(out, again)
    for a, b in zip(cache.compressed, asked.compressed, strict=True):
        assert torch.equal(a.packed.table.lengths, b.packed.table.lengths)
        assert all(x >= y for x, y in zip(a.packed.widest, b.packed.widest, strict=True))
    assert [pool.used_bytes for pool in cache.pools] == [pool.used_bytes for pool in asked.pools]


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_steps_take_four_launches_and_make_their_output_and_a_counter(preset, monkeypatch):
    """Attention as the model calls it: one output per layer, and how full the windows are, once. Kept queries too."""
    shape, layers = Shape(2, 1, 32), 2
    cache, watch = fresh(preset), Watch(monkeypatch)
    caches.fill(cache, shape, layers, 1, 40, torch.zeros(0))
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(2 * FLUSH + 1):
        k, v, q = (torch.randn(1, n, 1, 32, generator=generator) for n in (1, 1, 2))
        due = cache._must_flush(1)
        with watch:
            for layer in range(layers):
                caches.attend(cache.update(k, v, layer), q)
        if not due:
            made.append((list(watch.made), watch.written, watch.launches))
    assert len(made) > 5 and max(len(new) for new, *_ in made[1:]) <= layers + 1, made
    assert all(not written and len(launches) == 4 * layers for _, written, launches in made[1:]), made


def test_what_nobody_waited_for_is_said_later(monkeypatch, tmp_path):
    """NaN that a flush has packed unasked: the next flush, or a file, says so."""
    model, cache = llama(), fresh("k8v4")
    with torch.no_grad():
        model(input_ids=IDS[:1], past_key_values=cache)
        while not (cache._must_flush(1) and cache.compressed[0].packed.ahead):
            model(input_ids=IDS[:1, :1], past_key_values=cache)
        control = copy.deepcopy(cache)
        cache.compressed[0].window.k[0, 0, 2, 5] = float("nan")
        model(input_ids=IDS[:1, :1], past_key_values=cache)
        other = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"NaN.*the flush before this one has packed them.*reset"):
            for _ in range(FLUSH):
                model(input_ids=IDS[:1, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="reset"):
            other.save(tmp_path / "spoilt")
        cache.reset()
        model(input_ids=IDS[:1], past_key_values=cache)
        control.compressed[0].packed.ahead = []  # an asked flush finds it before anything has changed
        control.compressed[0].window.k[0, 0, 2, 5] = float("nan")
        lengths = control.compressed[0].packed.table.lengths.clone()
        with pytest.raises(ValueError, match="nothing was stored"):
            model(input_ids=IDS[:1, :1], past_key_values=control)
        assert torch.equal(control.compressed[0].packed.table.lengths, lengths)
