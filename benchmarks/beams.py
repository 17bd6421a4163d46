"""Physical bytes after a beam search: SmolLM2 in bf16, one real prompt, pages that beams share.

`without_sharing` is what the same cache would take if every beam had pages of its own.

    python benchmarks/beams.py
"""

from __future__ import annotations

import argparse

import torch
from rows import RESULTS, merge_csv
from tqdm import tqdm

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo.smollm2 import load
from hfkv.demo.texts import documentation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--presets", nargs="+", default=["exact", "k8v4", "balanced"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(dtype=torch.bfloat16)
    model.set_attn_implementation("leankv")
    ids = torch.tensor([tokenizer(documentation()[:20000]).input_ids[: args.tokens]])
    options = {"num_beams": args.beams, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    rows = []
    for preset in tqdm(args.presets):
        cache = LeanKVCache(LeanKVConfig.preset(preset))
        model.generate(ids, past_key_values=cache, do_sample=False, pad_token_id=0, **options)
        report = cache.report()
        rows.append(
            {
                "preset": preset,
                "prompt": args.tokens,
                "new": args.new_tokens,
                "beams": args.beams,
                "physical_bytes": report.physical_bytes,
                "without_sharing": report.physical_bytes + report.shared_bytes,
                "copied_bytes": sum(pool.copied_bytes for pool in cache.pools),
                "exact_bytes": report.exact_bytes,
            }
        )
    merge_csv(RESULTS / "beams.csv", rows, by=("preset", "prompt", "new", "beams"))
    print((RESULTS / "beams.csv").read_text())


if __name__ == "__main__":
    main()
