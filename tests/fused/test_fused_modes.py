"""What generate does with a cache, by Triton's kernels: the same tokens as by plain torch."""

import copy

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig

TINY = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64, initializer_range=0.3, pad_token_id=0,
    eos_token_id=None, bos_token_id=None,
)  # fmt: skip
PROMPT = torch.randint(1, 64, (1, 30), generator=torch.Generator().manual_seed(2))
ROWS = torch.randint(1, 64, (2, 30), generator=torch.Generator().manual_seed(3))
SHORT = torch.ones_like(ROWS)
SHORT[0, :25] = 0  # a row of five tokens beside one of thirty
STEPS = dict(max_new_tokens=10, do_sample=False)


def llama(q_heads=4, kv_heads=2, head_dim=64):
    heads = dict(num_attention_heads=q_heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    return LlamaForCausalLM(LlamaConfig(**TINY, **heads))


def gpt_oss():
    """Attention with sinks."""
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=64, num_local_experts=2, num_experts_per_tok=1)
    rope = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return GptOssForCausalLM(GptOssConfig(**TINY, **heads, **rope, layer_types=["full_attention"]))


def fork(model, cache):
    """One prompt, two continuations."""
    model(PROMPT, past_key_values=cache)
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    return model.generate(torch.cat([PROMPT, ROWS[:1, :1]], 1).repeat(2, 1), past_key_values=other, **STEPS)


def saved(model, cache, path):
    model(PROMPT, past_key_values=cache)
    cache.save(path)
    other = LeanKVCache.load(path)
    return model.generate(torch.cat([PROMPT, ROWS[:1, :1]], 1), past_key_values=other, **STEPS)


def turns(model, cache):
    """What the second row said is padding in the next turn; pads stand before the first one's question."""
    said = model.generate(ROWS, attention_mask=SHORT, past_key_values=cache, **STEPS | dict(max_new_tokens=12))
    ids = torch.cat([said, torch.tensor([[0, 5], [7, 9]])], 1)
    mask = torch.cat([SHORT, torch.ones(2, 12), torch.tensor([[0, 1], [1, 1]])], 1).long()
    mask[1, -13:-2] = 0  # ten of them are stored, two of these packed
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **STEPS | dict(max_new_tokens=5))


def answers(model, cache):
    """One prompt, several answers, in prompts of a padded batch."""
    torch.manual_seed(1)
    options = dict(attention_mask=SHORT, num_return_sequences=2, **STEPS | dict(do_sample=True, max_new_tokens=6))
    return model.generate(ROWS, past_key_values=cache, **options)


CASES = {
    "padded": (llama, "balanced", lambda m, c, _: m.generate(ROWS, attention_mask=SHORT, past_key_values=c, **STEPS)),
    "beams": (llama, "balanced", lambda m, c, _: m.generate(PROMPT, past_key_values=c, num_beams=3, **STEPS)),
    "lookup": (
        llama,
        "balanced",
        lambda m, c, _: m.generate(PROMPT.repeat(1, 2), past_key_values=c, prompt_lookup_num_tokens=3, **STEPS),
    ),
    "chunked": (llama, "k8v4", lambda m, c, _: m.generate(PROMPT, past_key_values=c, prefill_chunk_size=11, **STEPS)),
    "fork": (llama, "balanced", lambda m, c, _: fork(m, c)),
    "saved": (llama, "balanced", saved),
    "turns": (llama, "balanced", lambda m, c, _: turns(m, c)),
    "answers": (llama, "balanced", lambda m, c, _: answers(m, c)),
    "sinks": (gpt_oss, "k8v4", lambda m, c, _: m.generate(ROWS, attention_mask=SHORT, past_key_values=c, **STEPS)),
    "G8-D80": (lambda: llama(8, 1, 80), "aggressive", lambda m, c, _: m.generate(PROMPT, past_key_values=c, **STEPS)),
    "minmax-D72": (lambda: llama(2, 2, 72), "paper", lambda m, c, _: m.generate(PROMPT, past_key_values=c, **STEPS)),
}


@pytest.mark.parametrize("make, preset, run", CASES.values(), ids=CASES)
def test_tokens_are_those_of_plain_torch(make, preset, run, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model, tokens = make().eval(), []
    model.set_attn_implementation("leankv")
    for backend in ("torch", "triton"):
        monkeypatch.setenv("HFKV_BACKEND", backend)
        cache = LeanKVCache(LeanKVConfig.preset(preset, window=8, flush=4, observe=8, page_tokens=32))
        with torch.no_grad():
            tokens.append(run(model, cache, tmp_path / backend))
        assert cache.report().backend == backend
        assert int(cache.compressed[0].packed.table.lengths.sum()) > 0
    assert torch.equal(*tokens)
