"""The whole path of a token through Triton's kernels, equal to the plain-torch path."""

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.backends import choose

SMALL = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, vocab_size=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None, bos_token_id=None,
)  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def gemma():
    """Softcapped attention in its full layers."""
    torch.manual_seed(0)
    layers = ["full_attention", "full_attention"]
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=64, layer_types=layers)).eval()


def small(preset, **changes):
    return LeanKVConfig.preset(preset, window=8, flush=4, observe=8, page_tokens=32, **changes)


def logits_of(model, backend, config, monkeypatch, turns=((37, 9), (9, 1))):
    """Logits of greedy steps after every prompt of `turns`; the first prompt has a row with pads on its left."""
    monkeypatch.setenv("HFKV_BACKEND", backend)
    model.set_attn_implementation("leankv")
    cache, generator, out = LeanKVCache(config), torch.Generator().manual_seed(1), []
    mask = torch.ones(2, 0, dtype=torch.long)
    with torch.no_grad():
        for turn, (prompt, steps) in enumerate(turns):
            ids = torch.randint(1, 64, (2, prompt), generator=generator)
            shown = torch.ones_like(ids)
            if turn == 0:
                ids[0, :20], shown[0, :20] = 0, 0
            mask = torch.cat([mask, shown], 1)
            for _ in range(steps):
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
                made = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
                out.append(made.logits[:, -1])
                ids = torch.randint(1, 64, (2, 1), generator=generator)
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
    assert cache.report().backend == backend
    return torch.stack(out), cache


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("preset", ["exact", "aggressive"])
def test_prompts_steps_and_flushes_equal_the_torch_path(make, preset, monkeypatch):
    """Left padding, several flushes, a prompt that continues the cache; every token ends in the same tier."""
    model = make()
    want, plain = logits_of(model, "torch", small(preset), monkeypatch)
    got, fused = logits_of(model, "triton", small(preset), monkeypatch)
    assert ((got - want).norm() / want.norm()).item() < 1e-4
    for a, b in zip(plain.compressed, fused.compressed, strict=True):
        assert torch.equal(a.packed.table.lengths, b.packed.table.lengths)
    report = fused.report()
    assert report.workspace_bytes == sum(space.nbytes for space in fused.workspaces.values()) > 0
    assert sum(report.bytes.values()) == report.physical_bytes


def test_a_flush_without_pages_changes_nothing(monkeypatch):
    """Scores are observed in the pages themselves, and must be what they were if the flush then fails."""
    model = llama()
    _, cache = logits_of(model, "triton", small("balanced"), monkeypatch, turns=((37, 5),))
    with torch.no_grad():
        while not cache._must_flush(1):
            mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
            mask[0, :20] = 0
            model(input_ids=torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache)
        control, before = copy.deepcopy(cache), held(cache)

        def refuse(demand, slack=0.0):
            raise OutOfPages("none left")

        with monkeypatch.context() as patch, pytest.raises(OutOfPages):
            patch.setattr(cache.pools[0], "reserve", refuse)
            cache.flush()
        assert all(torch.equal(x, y) for x, y in zip(before, held(cache), strict=True))
        cache.flush()
        control.flush()
    assert all(torch.equal(x, y) for x, y in zip(held(control), held(cache), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(before, held(cache), strict=True))


def held(cache):
    """Tokens per tier, and their scores, of every layer."""
    layers = [tokens.packed for tokens in cache.compressed]
    scores = [packed.slots(tier, ("score",))[1]["score"] for packed in layers for tier in range(packed.tiers)]
    return [packed.table.lengths.clone() for packed in layers] + scores


def test_the_backend_is_what_was_asked_for(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("HFKV_BACKEND", raising=False)
    assert choose(cpu, [], torch.float32) == "inductor"
    monkeypatch.setenv("HFKV_BACKEND", "triton")
    assert choose(cpu, [], torch.float32) == "triton"  # the interpreter
    with pytest.raises(ValueError, match=r"torch\.float64"):
        choose(cpu, [], torch.float64)
    monkeypatch.setenv("HFKV_BACKEND", "cuda")
    with pytest.raises(ValueError, match="HFKV_BACKEND='cuda'"):
        choose(cpu, [], torch.float32)
