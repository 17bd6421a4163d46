"""Triton launches on the current device, whatever its tensors are on: the layers' own device is made that first."""

import contextlib
import copy

import pytest
import torch
from emulated_graph import EmulatedGraph
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, Packed
from hfkv.attend import Call
from hfkv.backends.fused import FusedKernels
from hfkv.graphs.decode import install
from hfkv.handle import Chunk
from hfkv.kernels.triton import launch
from hfkv.policy import KVCrush

TINY = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, vocab_size=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=0,
)  # fmt: skip
SMALL = dict(window=8, flush=4, observe=4)
IDS = torch.randint(1, 64, (1, 30), generator=torch.Generator().manual_seed(1))


class Guards:
    """Devices that are current by now, and kernels that were launched."""

    def __init__(self):
        self.inside, self.launched = [], set()

    @contextlib.contextmanager
    def on(self, device):
        self.inside.append(device)
        try:
            yield
        finally:
            self.inside.pop()


@pytest.fixture
def guards(monkeypatch):
    """Every launch must happen where the device of its tensors was made current."""
    guards, original = Guards(), InterpretedFunction.run

    def run(kernel, *args, **kwargs):
        assert guards.inside, f"{kernel.fn.__name__} is launched on whatever device is current"
        assert all(x.device == guards.inside[-1] for x in args if isinstance(x, torch.Tensor))
        guards.launched.add(kernel.fn.__name__)
        return original(kernel, *args, **kwargs)

    monkeypatch.setenv("HFKV_BACKEND", "triton")
    monkeypatch.setattr(launch, "on", guards.on)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    return guards


def llama():
    torch.manual_seed(0)
    return hfkv.enable(LlamaForCausalLM(LlamaConfig(**TINY)).eval())


def test_a_generation_with_flushes_and_beams(guards):
    cache = LeanKVCache(LeanKVConfig.preset("balanced", page_tokens=32, **SMALL))
    llama().generate(IDS, past_key_values=cache, max_new_tokens=6, num_beams=2, do_sample=False)
    wanted = {"decode_items", "append_tokens", "pack_kernel", "observe_scores", "recode_kernel", "copy_kernel"}
    assert wanted <= guards.launched, guards.launched


def test_representatives_and_a_chunk(guards):
    shares = dict(high_share=0.1, keep_share=0.6, score="attention", representatives=KVCrush(0.5))
    cache, model = LeanKVCache(LeanKVConfig(**shares, **SMALL)), llama()
    with torch.no_grad():
        for ids in (IDS, IDS[:, :14], IDS[:, :1]):
            model(input_ids=ids, past_key_values=cache)
    wanted = {"elect_kernel", "distance_kernel", "attend_pages_forward", "prompt_forward", "join_forward"}
    assert wanted <= guards.launched, guards.launched


def test_packed_tiers(guards):
    """Pages are packed behind a flush, and where a failing forward is undone."""
    cache, model = LeanKVCache(LeanKVConfig(tiers=((8, 4), Packed(key_bits=4, value_bits=2)), **SMALL)), llama()
    ids = torch.randint(1, 64, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        for token in ids[:, :5].split(1, 1):
            model(input_ids=token, past_key_values=cache)
        copy.deepcopy(cache).close_up()
    assert {"seal_kernel", "attend_packs"} <= guards.launched, guards.launched


def test_recorded_steps(guards):
    model = llama()
    install(model, EmulatedGraph)
    cache = LeanKVCache(LeanKVConfig.preset("k8v4", **SMALL))
    model.generate(IDS, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert hfkv.decode_report(model).warmed == 2 and "count_step" in guards.launched


def test_a_prompt_with_sinks(guards):
    k, q = torch.randn(1, 1, 20, 32), torch.randn(1, 2, 20, 32)
    kernels = FusedKernels(k.device, {})
    kernels.attend_own(Chunk(LayerStub(), k, k), q, None, None, Call(0.2, None, torch.zeros(2)))
    assert guards.launched == {"prompt_forward"}


class LayerStub:
    generation = 0
