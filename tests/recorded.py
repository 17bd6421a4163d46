"""What the tests of recorded steps share: a tiny model, caches, and when two of them are the same."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig

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


def begun(model, preset="balanced", rows=IDS, mask=None, steps=5, **changes):
    """A cache behind a prompt and some steps; with `compiled` models the last of them is a replay."""
    cache = fresh(preset, **changes)
    with torch.no_grad():
        model(input_ids=rows, attention_mask=mask, past_key_values=cache)
    for token in range(1, steps + 1):
        step(model, cache, token)
    return cache
