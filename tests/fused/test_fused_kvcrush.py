"""KVCrush by Triton against its twin."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.kernels import kvcrush as twin
from hfkv.kernels.triton import kvcrush as fused
from hfkv.policy import KVCrush


def received(batch, heads, tokens, seed=0):
    """Attention with ties, and tokens that are not there."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(batch, heads, tokens, generator=generator) * 20).round() / 20
    return x, torch.rand(batch, heads, tokens, generator=generator) < 0.8


@pytest.mark.parametrize("batch, heads, tokens", [(1, 1, 1), (2, 9, 130), (1, 71, 128), (3, 5, 300)])
@pytest.mark.parametrize("anchor", ["mean", "alternating"])
def test_distances(batch, heads, tokens, anchor):
    x, there = received(batch, heads, tokens)
    bits = None if anchor == "mean" else (torch.arange(heads) % 2 == 0).expand(batch, -1)
    assert fused.crush_distances(x, there, bits).long().equal(twin.crush_distances(x, there, bits))


@pytest.mark.parametrize("rows, tokens, most", [(1, 1, 1), (3, 129, 9), (2, 300, 71), (4, 64, 300)])
@pytest.mark.parametrize("seats", [0, 1, 17, 10_000])
def test_elections(rows, tokens, most, seats):
    generator = torch.Generator().manual_seed(tokens)
    among = torch.rand(rows, tokens, generator=generator) < 0.6
    distance = torch.randint(0, most + 1, (rows, tokens), generator=generator)
    places = torch.full((rows,), seats)
    assert fused.elect(among, distance, places, most).equal(twin.elect(among, distance, places, most))


def test_generate_elects_the_same_representatives(monkeypatch):
    """A prompt and a flush through the fused path keep the tokens that plain torch keeps."""
    tiny = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64, initializer_range=0.3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64, eos_token_id=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny, **heads)).eval()
    model.set_attn_implementation("leankv")
    prompt = torch.randint(1, 64, (1, 60), generator=torch.Generator().manual_seed(2))
    config = LeanKVConfig(
        high_share=0.1, keep_share=0.6, score="attention", representatives=KVCrush(0.5), window=8, flush=4
    )
    births = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HFKV_BACKEND", backend)
        cache = LeanKVCache(config)
        model.generate(prompt, past_key_values=cache, max_new_tokens=7, do_sample=False, pad_token_id=0)
        packed = cache.layers[0].tokens.packed
        births.append([packed.slots(tier, ("birth",))[1]["birth"].sort(1).values for tier in range(2)])
    for plain, triton in zip(*births, strict=True):
        assert plain.equal(triton)
