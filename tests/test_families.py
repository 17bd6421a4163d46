"""Point for point the same tokens as DynamicCache, on every architecture of `families.py`; quantised logits stay close.

The cache is never told the model's config. `HFKV_ALL=1` runs every prompt on every family.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from families import SUPPORTED, Family, build, lean, left_padded, native, prompt, relative_rms
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

NEW_TOKENS = 130  # several flushes of R = 32 beyond W = 64
LENGTHS = (1, 7, 63, 64, 97, 130, 400)
RAGGED = ((3, 150), (64, 1, 97))
EVERY_PROMPT = {"llama", "qwen3", "gemma2", "gpt-oss", "gpt2", "bart"}

# A margin below this between the best two tokens would make equality of tokens a matter of luck; rounding differs by
# some 1e-6 of logits whose standard deviation is about 1.5.
MIN_MARGIN = 1e-4
MIN_DISTINCT = 3  # of 130 tokens in each row
MIN_INFLUENCE = 1e-4  # of the third of 300 tokens on the last logits, relative; float32 noise is 1e-6

# Logits of quantised caches, with weights at QUANTISED_GAIN. Values of random models are independent between tokens, so
# attention averages values and their errors alike: the relative error of a layer's output stays that of one vector,
# about 7 % with 4-bit and 0.4 % with 8-bit values of 16 dimensions. Measured: K8V8 0.03 to 0.8 %, K8V4 0.4 to 7 %,
# 14 % where a mixture of experts sends a token elsewhere. Real models lose far less: their values are alike.
QUANTISED_GAIN = 1.0
QUANTISED_IDS = prompt(190, batch=2)
QUANTISED = {"k8v8": (0.01, 0.01), "k8v4": (0.08, 0.20)}  # bound, bound with experts
BF16_BOUND = 0.01
BF16_FAMILIES = ("llama", "qwen3", "gemma3-text", "gpt2", "phi", "gpt-neox")
# Large random weights amplify bf16 rounding: transformers' own eager and sdpa attention differ by 1.7 % in Llama's
# logits at gain 1.5, by 0.4 % at 0.5 (Gemma 3: 0.7 %), where 1 % can tell a wrong cache from rounding.
BF16_GAIN = 0.5


@dataclass(frozen=True)
class Case:
    """A prompt: one row of a length, or left-padded rows of several lengths."""

    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return "n" + "+".join(map(str, self.lengths))

    def inputs(self, family: Family) -> dict[str, torch.Tensor]:
        padded = left_padded(list(self.lengths))
        if not family.encoder_decoder:
            return padded
        encoder = left_padded([5 + 7 * row for row in range(len(self.lengths))])
        width = max(self.lengths)
        decoder = prompt(width, seed=len(self.lengths), batch=len(self.lengths))
        return encoder | {"decoder_input_ids": decoder}


@dataclass(frozen=True)
class Reference:
    tokens: torch.Tensor  # [rows, NEW_TOKENS]
    margin: float
    distinct: int


def cases(index: int, family: Family) -> list[Case]:
    """Two lengths and one padded batch per family, shifted so that neighbours differ; everything under HFKV_ALL."""
    every = [Case((length,)) for length in LENGTHS] + [Case(rows) for rows in RAGGED]
    if os.environ.get("HFKV_ALL") or family.name in EVERY_PROMPT:
        return every
    lengths = {LENGTHS[index % 7], LENGTHS[(3 * index + 4) % 7]}
    return [Case((length,)) for length in sorted(lengths)] + [Case(RAGGED[index % 2])]


GRID = [
    pytest.param(family, case, id=f"{family.name}-{case}")
    for index, family in enumerate(SUPPORTED)
    for case in cases(index, family)
]
COMPRESSED = [pytest.param(family, id=family.name) for family in SUPPORTED if family.compressed]


def lean_cache(family: Family, config: LeanKVConfig) -> tuple[Cache, LeanKVCache]:
    """The cache to pass to the model, and the LeanKVCache inside."""
    own = LeanKVCache(config)
    return (EncoderDecoderCache(own, DynamicCache()) if family.encoder_decoder else own), own


@cache
def reference(family: Family, case: Case) -> Reference:
    output = native(family.name).generate(
        **case.inputs(family),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[:, -NEW_TOKENS:]
    best = torch.stack(output.logits, 1).topk(2, dim=-1).values  # [rows, NEW_TOKENS, 2]
    return Reference(
        tokens,
        margin=(best[..., 0] - best[..., 1]).min().item(),
        distinct=min(len(set(row.tolist())) for row in tokens),
    )


def teacher_forced(model: PreTrainedModel, ids: torch.Tensor, steps: int, cache: Cache) -> torch.Tensor:
    """Logits [rows, steps, vocab] after a prompt of all but the last `steps` tokens, then one token at a time."""
    split = ids.shape[1] - steps
    extra = {"input_ids": prompt(9, batch=ids.shape[0])} if model.config.is_encoder_decoder else {}
    name = "decoder_input_ids" if extra else "input_ids"
    logits = []
    with torch.no_grad():
        model(**extra, **{name: ids[:, :split]}, past_key_values=cache, use_cache=True)
        for position in range(split, ids.shape[1]):
            step = {name: ids[:, position : position + 1]}
            logits.append(model(**extra, **step, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits, 1)


def dynamic_cache(model: PreTrainedModel) -> Cache:
    decoder = DynamicCache(config=model.config)
    return EncoderDecoderCache(decoder, DynamicCache()) if model.config.is_encoder_decoder else decoder


def assert_layers(family: Family, cache: LeanKVCache) -> None:
    layers = cache.report().layers
    assert tuple(layer.index for layer in layers if layer.compressed) == family.compressed
    for layer in layers:
        assert layer.compressed == (layer.reason is None), (layer.index, layer.kind, layer.reason)


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in SUPPORTED])
def test_far_tokens_matter(family: Family) -> None:
    """Without this, equality of tokens would say nothing about the far past."""
    if not family.compressed or family.encoder_decoder:
        pytest.skip("no compressed layer to prove anything about, or an encoder beside it")
    ids = prompt(300)
    other = ids.clone()
    other[0, 2] = 5 + (ids[0, 2] - 5 + 60) % 120
    with torch.no_grad():
        a, b = (native(family.name)(input_ids=x).logits[0, -1] for x in (ids, other))
    assert relative_rms(b, a) > MIN_INFLUENCE


@pytest.mark.parametrize(("family", "case"), GRID)
def test_exact_tokens_equal(family: Family, case: Case) -> None:
    expected = reference(family, case)
    assert expected.margin > MIN_MARGIN, "an unfair prompt: give the family another seed"
    assert expected.distinct >= MIN_DISTINCT, "degenerate tokens: give the family another seed or gain"

    past, lean_part = lean_cache(family, LeanKVConfig.preset("exact"))
    sequences = lean(family.name).generate(
        **case.inputs(family), max_new_tokens=NEW_TOKENS, do_sample=False, past_key_values=past
    )
    torch.testing.assert_close(sequences[:, -NEW_TOKENS:], expected.tokens, rtol=0, atol=0)
    assert_layers(family, lean_part)


@pytest.mark.parametrize("index", range(len(SUPPORTED)), ids=[family.name for family in SUPPORTED])
def test_enabled_tokens_equal(index: int) -> None:
    """`hfkv.enable(model)`, where the cache does know the config, decides the same about every layer."""
    family, case = SUPPORTED[index], Case(RAGGED[(index + 1) % 2])
    model = hfkv.enable(build(family.name), LeanKVConfig.preset("exact"))
    output = model.generate(
        **case.inputs(family), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    torch.testing.assert_close(output.sequences[:, -NEW_TOKENS:], reference(family, case).tokens, rtol=0, atol=0)
    past = output.past_key_values
    assert_layers(family, past.self_attention_cache if family.encoder_decoder else past)


@cache
def quantised_reference(name: str) -> torch.Tensor:
    model = native(name, gain=QUANTISED_GAIN)
    return teacher_forced(model, QUANTISED_IDS, 40, dynamic_cache(model))


@pytest.mark.parametrize("tiers", QUANTISED)
@pytest.mark.parametrize("family", COMPRESSED)
def test_quantised_logits(family: Family, tiers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Relative RMS error of 40 teacher-forced steps after a prompt of 150 tokens."""
    model = build(family.name, gain=QUANTISED_GAIN)
    model.set_attn_implementation("leankv")
    config = LeanKVConfig(tiers=((8, 8),)) if tiers == "k8v8" else LeanKVConfig.preset(tiers)
    past, lean_part = lean_cache(family, config)
    got = teacher_forced(model, QUANTISED_IDS, 40, past)
    error = relative_rms(got, quantised_reference(family.name))
    with capsys.disabled():
        print(f"\n{family.name}: {tiers} logits {100 * error:.2f} %, compressed layers {family.compressed}", end=" ")
    assert_layers(family, lean_part)
    assert 0 < error < QUANTISED[tiers][family.routed]


@pytest.mark.parametrize("name", BF16_FAMILIES)
def test_bf16_exact_logits(name: str) -> None:
    ids = prompt(190)
    reference_model, lean_model = (build(name, gain=BF16_GAIN).bfloat16() for _ in range(2))
    lean_model.set_attn_implementation("leankv")
    want = teacher_forced(reference_model, ids, 40, dynamic_cache(reference_model))
    got = teacher_forced(lean_model, ids, 40, LeanKVCache(LeanKVConfig.preset("exact")))
    assert relative_rms(got, want) < BF16_BOUND
