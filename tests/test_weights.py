"""Models whose weights are quantised, or lie elsewhere: bitsandbytes in 4 and 8 bit, `device_map` with disk offload."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, lean, left_padded, llama_like, prompt
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

OPTIONS = {"max_new_tokens": 70, "do_sample": False}
BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama on disk whose matrices are whole blocks of bitsandbytes."""
    folder = tmp_path_factory.mktemp("wider")
    torch.manual_seed(0)
    config = LlamaConfig(**llama_like(hidden_size=128, intermediate_size=192, initializer_range=0.1))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("bits", BITS)
def test_bitsandbytes(bits: str, wider: Path, tmp_path: Path) -> None:
    """Quantised weights with a compressed cache: the tokens of the same weights with a DynamicCache."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `bitsandbytes`)")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    quantised = {"quantization_config": BitsAndBytesConfig(**BITS[bits])}
    inputs = left_padded([3, 150])
    want = load(wider, attn_implementation="sdpa", **quantised).generate(**inputs, **OPTIONS)
    model, cache = load(wider, attn_implementation="leankv", **quantised), LeanKVCache(LeanKVConfig.preset("exact"))
    got = model.generate(**inputs, past_key_values=cache, **OPTIONS)
    assert torch.equal(got, want)

    cache = LeanKVCache(LeanKVConfig.preset("k8v4"))
    said = model.generate(prompt(300), past_key_values=cache, **OPTIONS)
    assert cache.report().ratio < 1
    cache.save(tmp_path / "cache")
    more = torch.cat([said, prompt(20)], 1)
    a, b = (
        model.generate(more, attention_mask=torch.ones_like(more), past_key_values=past, **OPTIONS)
        for past in (LeanKVCache.load(tmp_path / "cache"), cache)
    )
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another model"):  # the same model, but not the same weights
        plain = load(wider, attn_implementation="leankv")
        plain.generate(more, past_key_values=LeanKVCache.load(tmp_path / "cache"), **OPTIONS)


def test_layers_on_disk(stored: Path, tmp_path: Path) -> None:
    """accelerate brings layer 1 in from disk for its forward alone."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    inputs = left_padded([3, 150])
    model = load(stored, attn_implementation="leankv", **options)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    cache = LeanKVCache(LeanKVConfig.preset("exact"))
    got = model.generate(**inputs, past_key_values=cache, **OPTIONS)
    assert torch.equal(got, build("llama").generate(**inputs, past_key_values=DynamicCache(), **OPTIONS))
    assert all(layer.compressed for layer in cache.report().layers)
    cache.save(tmp_path / "cache")  # a model that is all in memory is known by the layers that were
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 71)], 1).long()
    ids = torch.cat([got, prompt(1, batch=2)], 1)
    again = lean("llama").generate(
        ids, attention_mask=mask, past_key_values=LeanKVCache.load(tmp_path / "cache"), **OPTIONS
    )
    assert torch.equal(again, model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS))


def test_device_map_auto(stored: Path) -> None:
    inputs = left_padded([3, 150])
    model = hfkv.enable(load(stored, device_map="auto"), LeanKVConfig.preset("exact"))
    got = model.generate(**{name: x.to(model.device) for name, x in inputs.items()}, **OPTIONS).cpu()
    assert torch.equal(got, build("llama").generate(**inputs, **OPTIONS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: a GPU beside the CPU")
def test_layers_on_two_devices(stored: Path, tmp_path: Path) -> None:
    """One page pool per device; a saved cache comes back to both."""
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": 0, "lm_head": "cpu"}
    model = load(stored, attn_implementation="leankv", device_map=places)
    cache = LeanKVCache(LeanKVConfig.preset("exact"))
    inputs = {name: x.cuda() for name, x in left_padded([3, 150]).items()}
    got = model.generate(**inputs, past_key_values=cache, **OPTIONS)
    assert {pool.device.type for pool in cache.pools} == {"cuda", "cpu"}
    assert torch.equal(got.cpu(), build("llama").generate(**left_padded([3, 150]), **OPTIONS))
    cache.save(tmp_path / "cache")
    assert {pool.device.type for pool in LeanKVCache.load(tmp_path / "cache").pools} == {"cuda", "cpu"}
