"""Physical bytes of every preset at head_dim 128: a random-weight bf16 model with Llama's heads, 8,000 tokens, batch 1.

Weights do not change what a share-based preset keeps; what `paper` keeps depends on the attention, and random attention
is nearly uniform, so its row says little about real text.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse

import torch
from rows import RESULTS, merge_csv
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.config import PRESETS
from hfkv.demo.measures import fill


def model_with_llama_heads() -> LlamaForCausalLM:
    """Two layers of 32 query and 8 key/value heads of 128; small in everything that the cache does not see."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        attn_implementation="leankv",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(model: LlamaForCausalLM, preset: str, tokens: int) -> dict[str, object]:
    """One row: bytes held after a random prompt."""
    ids = torch.randint(model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    report = fill(model, ids, LeanKVCache(LeanKVConfig.preset(preset))).report()
    return {
        "preset": preset,
        "tokens": tokens,
        "head_dim": model.config.head_dim,
        "dtype": str(model.dtype).removeprefix("torch."),
        "physical_mib": f"{report.physical_bytes / 2**20:.2f}",
        "exact_mib": f"{report.exact_bytes / 2**20:.2f}",
        "ratio": f"{report.ratio:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = model_with_llama_heads()
    rows = [measure(model, preset, args.tokens) for preset in tqdm(PRESETS)]
    merge_csv(RESULTS / "memory.csv", rows, by=("preset", "tokens", "head_dim", "dtype"))
    print((RESULTS / "memory.csv").read_text())


if __name__ == "__main__":
    main()
