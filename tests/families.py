"""Tiny random models of many architectures, and what the cache is expected to do with each of their layers.

Weights are drawn per parameter from its name, so they do not depend on the order in which a transformers version makes
them. They are large enough for greedy tokens to be varied and for far tokens to matter; `test_families.py` checks both.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 131
MAX_POSITIONS = 768
WINDOW = 32  # of sliding and chunked layers: small, so that it matters at every prompt length used
TRANSFORMERS = Version(transformers.__version__)


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture: how to build its tiny model, and which layers must end up compressed under `leankv`."""

    name: str
    config: str  # class name in transformers
    options: dict[str, Any]
    compressed: tuple[int, ...] = (0, 1)
    leankv: bool = True  # False: set_attn_implementation leaves the model on its own attention
    auto: str = "AutoModelForCausalLM"
    needs: str = "5.15"  # oldest transformers
    reference: str | None = None  # attention of the reference, where the default one is wrong
    seed: int = 0
    gain: float = 1.5  # of the weight matrices; higher = sharper attention
    notes: str = ""

    @property
    def encoder_decoder(self) -> bool:
        return self.auto == "AutoModelForSeq2SeqLM"

    @property
    def routed(self) -> bool:
        """A mixture of experts: a small error can send a token to another expert."""
        return any("expert" in option for option in self.options)


def llama_like(**options: Any) -> dict[str, Any]:
    """Options that most decoder configs share: 2 layers, 4 query heads over 2 key/value heads of 16."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return common | options


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


FULL, SLIDING, CHUNKED, LINEAR, CONV = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "conv",
)
MHA = without(llama_like(), "num_key_value_heads")
GPT2_LIKE = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 32}

FAMILIES = [
    Family("llama", "LlamaConfig", llama_like(), seed=1),
    Family(
        "llama3-rope",
        "LlamaConfig",
        llama_like(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            num_key_value_heads=1,
        ),
        notes="multi-query, scaled RoPE",
        seed=4,
    ),
    Family("mistral", "MistralConfig", llama_like(sliding_window=None), seed=1),
    Family("mistral-sliding", "MistralConfig", llama_like(sliding_window=WINDOW), compressed=(), seed=3),
    Family(
        "ministral",
        "MinistralConfig",
        llama_like(head_dim=16, sliding_window=WINDOW, layer_types=[SLIDING, FULL]),
        (1,),
        seed=1,
    ),
    Family("qwen2", "Qwen2Config", llama_like(), seed=2),
    Family("qwen3", "Qwen3Config", llama_like(head_dim=32), seed=2),
    Family("qwen3-moe", "Qwen3MoeConfig", llama_like(head_dim=16, **MOE)),
    Family("gemma", "GemmaConfig", llama_like(head_dim=32)),
    Family(
        "gemma2",
        "Gemma2Config",
        llama_like(head_dim=16, query_pre_attn_scalar=8, sliding_window=WINDOW, attn_logit_softcapping=2.0),
        compressed=(1,),
        reference="eager",
        notes="softcap, which sdpa leaves out before 5.23; layer 0 slides",
    ),
    Family(
        "gemma3-text",
        "Gemma3TextConfig",
        llama_like(head_dim=16, num_hidden_layers=3, sliding_window=WINDOW, layer_types=[SLIDING, FULL, FULL]),
        compressed=(1, 2),
        seed=8,
    ),
    Family(
        "gemma3n-text",
        "Gemma3nTextConfig",
        llama_like(
            head_dim=16,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            sliding_window=WINDOW,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
            final_logit_softcapping=30.0,
        ),
        compressed=(1,),
        notes="layers 2 and 3 read the keys and values of 0 and 1",
        seed=2,
    ),
    Family(
        "gemma4-text",
        "Gemma4TextConfig",
        llama_like(
            head_dim=16,
            global_head_dim=32,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            sliding_window=WINDOW,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=16,
        ),
        compressed=(1,),
        needs="5.23",
        notes="KV sharing; prompt queries of the sharing layers are cut to the last token",
        seed=1,
    ),
    Family(
        "phi",
        "PhiConfig",
        MHA | {"hidden_size": 160, "num_attention_heads": 2},
        notes="head_dim 80, half rotary",
        gain=3.0,
    ),
    Family(
        "phi3",
        "Phi3Config",
        llama_like(hidden_size=192, num_attention_heads=2, num_key_value_heads=1, sliding_window=None),
        notes="head_dim 96",
        seed=1,
    ),
    Family(
        "gpt-neox", "GPTNeoXConfig", MHA | {"hidden_size": 96}, notes="head_dim 24, quarter rotary", gain=3.0, seed=4
    ),
    Family("gpt2", "GPT2Config", GPT2_LIKE, gain=3.0, seed=2),
    Family(
        "opt",
        "OPTConfig",
        without(MHA, "intermediate_size") | {"ffn_dim": 96, "word_embed_proj_dim": 64},
        gain=3.0,
        seed=2,
    ),
    Family(
        "falcon",
        "FalconConfig",
        without(MHA, "intermediate_size") | {"new_decoder_architecture": True, "num_kv_heads": 2},
        compressed=(),
        leankv=False,
        gain=3.0,
        seed=1,
    ),
    Family(
        "falcon-alibi",
        "FalconConfig",
        without(MHA, "intermediate_size") | {"alibi": True},
        compressed=(),
        leankv=False,
        seed=12,
    ),
    Family("gptj", "GPTJConfig", GPT2_LIKE | {"rotary_dim": 8}, compressed=(), leankv=False, gain=3.0, seed=2),
    Family(
        "gpt-neo",
        "GPTNeoConfig",
        without(MHA, "num_hidden_layers", "num_attention_heads", "intermediate_size")
        | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        compressed=(),
        leankv=False,
        seed=8,
    ),
    Family("cohere", "CohereConfig", llama_like(logit_scale=1.0, use_qk_norm=True), gain=3.0, seed=2),
    Family(
        "cohere2",
        "Cohere2Config",
        llama_like(logit_scale=1.0, sliding_window=WINDOW, layer_types=[SLIDING, FULL]),
        compressed=(1,),
        notes="the full layer has no positions at all",
    ),
    Family(
        "gpt-oss",
        "GptOssConfig",
        llama_like(
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=[SLIDING, FULL],
        ),
        compressed=(1,),
        notes="attention sinks",
        seed=6,
    ),
    Family("olmo2", "Olmo2Config", llama_like(), seed=10),
    Family("olmo3", "Olmo3Config", llama_like(sliding_window=WINDOW, layer_types=[FULL, SLIDING]), (0,), seed=3),
    Family("olmoe", "OlmoeConfig", llama_like(num_experts=4, num_experts_per_tok=2), seed=3),
    Family("starcoder2", "Starcoder2Config", llama_like(sliding_window=None), gain=3.0),
    Family("glm4", "Glm4Config", llama_like(head_dim=16), seed=1),
    Family(
        "granite",
        "GraniteConfig",
        llama_like(attention_multiplier=0.4, residual_multiplier=0.8, embedding_multiplier=2.0, logits_scaling=0.5),
    ),
    Family("mixtral", "MixtralConfig", llama_like(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    Family("stablelm", "StableLmConfig", llama_like(partial_rotary_factor=0.5), seed=2),
    Family("gpt-bigcode", "GPTBigCodeConfig", GPT2_LIKE | {"multi_query": True, "n_inner": 96}, gain=3.0, seed=1),
    Family(
        "bloom",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "eos_token_id": None}
        | {"tie_word_embeddings": False},
        compressed=(),
        leankv=False,
        notes="ALiBi",
    ),
    Family("codegen", "CodeGenConfig", GPT2_LIKE | {"rotary_dim": 8}, compressed=(), leankv=False, gain=3.0),
    Family(
        "deepseek-v3",
        "DeepseekV3Config",
        llama_like(
            num_key_value_heads=4,
            kv_lora_rank=24,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            first_k_dense_replace=1,
        ),
        compressed=(),
        notes="MLA latents",
    ),
    Family(
        "qwen3-next",
        "Qwen3NextConfig",
        llama_like(
            head_dim=16,
            num_hidden_layers=3,
            layer_types=[LINEAR, FULL, FULL],
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            shared_expert_intermediate_size=48,
            **MOE,
        ),
        compressed=(1, 2),
    ),
    Family(
        "jamba",
        "JambaConfig",
        llama_like(
            num_hidden_layers=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
        compressed=(1,),
        seed=1,
    ),
    Family("bamba", "BambaConfig", llama_like(attn_layer_indices=[1], **MAMBA2), compressed=(1,), seed=4),
    Family(
        "falcon-h1",
        "FalconH1Config",
        llama_like(mamba_d_ssm=64, mamba_d_head=16, mamba_expand=1, **MAMBA2),
        compressed=(),
        notes="every layer is linear and full attention at once",
        seed=1,
    ),
    Family("lfm2", "Lfm2Config", llama_like(layer_types=[CONV, FULL], block_multiple_of=32), compressed=(1,), seed=1),
    Family(
        "llama4-text",
        "Llama4TextConfig",
        llama_like(
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            attention_chunk_size=WINDOW,
            layer_types=[CHUNKED, FULL],
            no_rope_layers=[1, 0],
            floor_scale=64,
        ),
        compressed=(1,),
        notes="chunked; the full layer has no RoPE and scales its queries by position",
    ),
    Family("smollm3", "SmolLM3Config", llama_like(no_rope_layers=[1, 0]), seed=1),
    Family("exaone4", "Exaone4Config", llama_like(sliding_window=WINDOW, layer_types=[SLIDING, FULL]), (1,), seed=5),
    Family("nemotron", "NemotronConfig", llama_like(partial_rotary_factor=0.5), seed=4),
    Family("helium", "HeliumConfig", llama_like(head_dim=16), seed=1),
    Family(
        "llava",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama"} | llama_like(),
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": VOCAB - 1,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        auto="AutoModelForImageTextToText",
        notes="vision tower through leankv as well",
        seed=1,
    ),
    Family(
        "bart",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "tie_word_embeddings": False,
            "scale_embedding": True,
            "max_position_embeddings": MAX_POSITIONS,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            "eos_token_id": None,
        },
        auto="AutoModelForSeq2SeqLM",
        notes="self part LeanKVCache, cross part DynamicCache",
        gain=0.5,
        seed=3,
    ),
    Family(
        "t5",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        compressed=(),
        auto="AutoModelForSeq2SeqLM",
        notes="position bias",
        gain=4.0,
        seed=11,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}
SUPPORTED = [family for family in FAMILIES if Version(family.needs) <= TRANSFORMERS]


def config_of(name: str) -> PreTrainedConfig:
    """A fresh config of the family."""
    family = BY_NAME[name]
    return getattr(transformers, family.config)(**family.options)


def build(name: str, gain: float | None = None) -> PreTrainedModel:
    """The family's model, fresh, float32, in eval mode, under its native attention; `gain` replaces the family's."""
    family = BY_NAME[name]
    torch.manual_seed(family.seed)  # state-space parameters keep the values that transformers draws
    model = getattr(transformers, family.auto).from_config(config_of(name)).float().eval()
    _draw_weights(model, family.seed, family.gain if gain is None else gain)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, 1
    generation.forced_eos_token_id = None
    return model


@cache
def native(name: str, gain: float | None = None) -> PreTrainedModel:
    """The model for references: shared between tests, not to be changed."""
    model = build(name, gain)
    if BY_NAME[name].reference is not None:
        model.set_attn_implementation(BY_NAME[name].reference)
    return model


@cache
def lean(name: str) -> PreTrainedModel:
    """The same weights, switched to `leankv` as a user would; shared between tests, not to be changed."""
    model = build(name)
    before = attention_of(model)
    model.set_attn_implementation("leankv")
    assert attention_of(model) == ("leankv" if BY_NAME[name].leankv else before)
    return model


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation of the text part."""
    return model.config.get_text_config()._attn_implementation


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int, gain: float) -> None:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 7919 + zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(0.4 * noise)  # small beside what the layers add: tokens depend on their context
        elif parameter.dim() > 1:
            parameter.copy_(noise * gain / math.sqrt(parameter.shape[-1]))
        elif re.search(r"sinks$", name):
            parameter.copy_(noise)
        elif name.endswith("bias") and "dt_" not in name:
            parameter.copy_(0.1 * noise)
        else:
            parameter.add_(0.1 * noise)


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Random ids [batch, length] that avoid the special tokens and the image token."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(5, VOCAB - 1, (batch, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids and mask [len(lengths), max(lengths)], pads on the left."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length, seed=seed + row)[0]
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference over that of `want`."""
    return ((got.float() - want.float()).square().mean() / want.float().square().mean()).sqrt().item()
