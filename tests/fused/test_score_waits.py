"""Whatever a score or a policy reads, a flush by kernels waits once at most, and does what plain torch does."""

import pytest
import torch
from host_reads import Watch
from oracle import relative_rms
from transformers import LlamaConfig, LlamaForCausalLM

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.attend import attend_chunk, attend_step
from hfkv.backends.fused import FusedKernels
from hfkv.paging.packed import PackedLayer
from hfkv.policy import SCORES, KVCrush, Representatives

TINY = dict(
    hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=0,
)  # fmt: skip
IDS = torch.randint(1, 64, (1, 40 + 12), generator=torch.Generator().manual_seed(1))
PROMPT, FLUSH, STEPS = 40, 4, 3

CASES = {
    **{
        name: dict(score=name) for name in ("h2o", "value_attention", "knorm", "keydiff", "expected_attention", "kvzip")
    },
    "snapkv and leverage": dict(score=("snapkv", "leverage")),
    "four": dict(score=("replay", "coverage", "random", "strided")),
    "one's own": dict(score=lambda c: c.values.norm(dim=-1) - c.keys.norm(dim=-1)),
    "kvcrush": dict(representatives=KVCrush(0.75)),
    "kvcrush for all heads": dict(representatives=KVCrush(0.5, anchor="random", per_head=False)),
    "representatives by keydiff": dict(representatives=Representatives(0.75, "keydiff")),
    "representatives by coverage": dict(score="knorm", representatives=Representatives(0.75, "coverage")),
    "budget": dict(score="keydiff", high_share=None, keep_share=None, budget=0.9),
}
ASKS = ("budget", "one's own")
"""Any number of tokens may become low, a score of one's own may be NaN: every flush asks."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return hfkv.enable(LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=1)).eval())


def fresh(backend, monkeypatch, changes):
    monkeypatch.setenv("HFKV_BACKEND", backend)
    config = dict(window=8, flush=FLUSH, observe=4, page_tokens=32, high_share=0.1, keep_share=0.6)
    return LeanKVCache(LeanKVConfig.preset("aggressive", **{**config, **changes}))


def flushed(model, backend, monkeypatch, changes):
    """(logits of steps with two flushes behind a prompt, cache, what every flush has read).

    The numbers of the flush before do not count, which came by mail: they are long there.

    Attention is the twin's on both sides: only flushes are looked at here, and the interpreter is slow.
    """
    cache, watch, flushes = fresh(backend, monkeypatch, changes), Watch(monkeypatch), []
    monkeypatch.setattr(FusedKernels, "view", staticmethod(PackedLayer.work))
    monkeypatch.setattr(FusedKernels, "attend_step", staticmethod(attend_step))
    monkeypatch.setattr(FusedKernels, "attend_chunk", staticmethod(attend_chunk))
    original = LeanKVCache.flush

    def flush(cache):
        with watch:
            original(cache)
        flushes.append([read for read in watch.reads if "paging/mail.py" not in read])

    monkeypatch.setattr(LeanKVCache, "flush", flush)
    prompt, *steps = IDS.split([PROMPT, *[FLUSH] * STEPS], 1)
    with torch.no_grad():
        if cache.config.reconstructs:
            hfkv.reconstruct(model, prompt, cache)
        else:
            model(prompt, past_key_values=cache)
        out = [model(part, past_key_values=cache).logits for part in steps]
    assert cache.report().backend == backend
    return torch.cat(out, 1), cache, flushes


def test_every_score_is_asked():
    given = [case.get("score", "attention") for case in CASES.values()]
    names = [name for score in given if not callable(score) for name in ([score] if isinstance(score, str) else score)]
    assert set(names) == set(SCORES)


@pytest.mark.parametrize("name", CASES)
def test_flushes_wait_once_at_most_and_do_the_same(name, model, monkeypatch):
    with monkeypatch.context() as patch:
        got, fused, flushes = flushed(model, "triton", patch, CASES[name])
    with monkeypatch.context() as patch:
        want, plain, _ = flushed(model, "torch", patch, CASES[name])
    assert len(flushes) >= STEPS - 1 and max(map(len, flushes)) <= 1, flushes
    assert [] in flushes or name in ASKS, flushes
    assert relative_rms(got, want) < 1e-4
    for a, b in zip(fused.compressed, plain.compressed, strict=True):
        assert torch.equal(a.packed.table.lengths, b.packed.table.lengths)
    same = (fused.token_map(0).tier == plain.token_map(0).tier).float().mean()
    assert same == 1, f"{same:.3f} of the tokens have the same tier"


def test_a_nan_score_is_found_by_the_same_look(model, monkeypatch):
    """Before anything has changed."""
    own = {"score": lambda c: c.score if c.prompt else c.score / 0 * 0}
    cache, watch = fresh("triton", monkeypatch, own), Watch(monkeypatch)
    with torch.no_grad():
        for part in (IDS[:, :PROMPT], IDS[:, PROMPT : PROMPT + FLUSH]):
            model(part, past_key_values=cache)
    before = cache.compressed[0].packed.table.lengths.clone()
    with watch, pytest.raises(ValueError, match="returned NaN"):
        cache.flush()
    assert len(watch.reads) == 1 and torch.equal(cache.compressed[0].packed.table.lengths, before)
