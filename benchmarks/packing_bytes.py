"""Physical bytes of packed tiers beside plain ones, through the real cache: SmolLM2 in bf16, after a prompt.

python benchmarks/packing_bytes.py --tokens 4000
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from rows import RESULTS, merge_csv
from tqdm import tqdm

from hfkv import LeanKVCache, LeanKVConfig, Packed
from hfkv.demo import smollm2
from hfkv.demo.measures import fill
from hfkv.demo.texts import continuations

TABLE = RESULTS / "packing_bytes.csv"
KEYS = Packed(key_bits=4, value_bits=2, sides="keys", repack="none")
SETTINGS = {
    "K4V2": LeanKVConfig(tiers=((4, 2),)),
    "K4V2, keys packed": LeanKVConfig(tiers=(KEYS,)),
    "K4V2, keys packed greedy": LeanKVConfig(tiers=(Packed(key_bits=4, value_bits=2, sides="keys"),)),
    "K3V2": LeanKVConfig(tiers=((3, 2),)),
    "K3V2, keys packed": LeanKVConfig(tiers=(Packed(key_bits=3, value_bits=2, sides="keys", repack="none"),)),
    "balanced": LeanKVConfig.preset("balanced"),
    "balanced, low keys packed": LeanKVConfig.preset("balanced", tiers=((8, 4), KEYS)),
    "balanced, low keys packed, no mean shift": LeanKVConfig.preset("balanced", tiers=((8, 4), KEYS), shift_keys=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2.load()
    text = next(islice(continuations(tokenizer, args.tokens, 96, 11), 1))
    for name in tqdm(args.settings):
        report = fill(model, text.context, LeanKVCache(SETTINGS[name])).report()
        row = {"setting": name, "tokens": args.tokens, "physical": report.physical_bytes, "exact": report.exact_bytes}
        row["ratio"] = f"{report.ratio:.4f}"
        kinds = ("codes", "metadata", "pack_headers", "free_slots", "pack_slack", "window", "tables", "free_pages")
        merge_csv(TABLE, [row | {kind: report.bytes.get(kind, 0) for kind in kinds}], by=("setting", "tokens"))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
