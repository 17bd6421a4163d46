"""What packed tiers bring to a calibration of SmolLM2: bytes and KL of plain and packed tiers, and what is taken.

`python -m hfkv calibrate --packed` for one length and several targets. Rows of `tier` are sums over all layers of what
was measured of each alone: bytes of its pages per token, KL. Rows of `real cache` are the best config without packed
tiers and the best with them, held to it: all physical bytes per token, KL. Measurements are kept, in
`results/packing_calibrated.jsonl`; the two configs of every target go to `results/packing_calibrated_KL_plain.json` and
`..._packed.json`, which `packing_unseen.py` takes to other texts.

    python benchmarks/packing_calibrated.py --tokens 1000 --count 2 --kl 0.005 0.02
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from rows import RESULTS, merge_csv

from hfkv.calibrate import Calibration, calibrate, generated
from hfkv.calibrate.run import progress_bars, table
from hfkv.demo import smollm2
from hfkv.report import tier_name

TABLE, KEPT = RESULTS / "packing_calibrated.csv", RESULTS / "packing_calibrated.jsonl"

COLUMNS = [
    *("tokens", "prompts", "what", "name", "high_share", "keys", "bytes_token", "kl"),
    "ratio",
    "packed_layers",
    "taken",
]
"""`keys`: how packed ones are coded; of `real cache` rows the bits that keys may have."""


def tiers(result: Calibration) -> list[dict[str, Any]]:
    """Every option for all layers; the packs of each layer in its best order."""
    sums: dict[tuple[str, float, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for choices in result.choices.values():
        for option, size, kl in choices:
            keys = ("rotated" if option.rotate_keys else "plain") if option.packed else "by layer"
            own = sums[tier_name(option.tier), option.share, keys]
            own[0] += size
            own[1] += kl
    tokens = result.taken.tokens
    return [
        {"what": "tier", "name": name, "high_share": share, "keys": keys, "bytes_token": size / tokens, "kl": kl}
        for (name, share, keys), (size, kl) in sums.items()
    ]


def attempts(result: Calibration) -> list[dict[str, Any]]:
    """The best config with packed tiers and the best without."""
    rows = []
    for packed in (False, True):
        best = result.best(packed)
        if best is None:
            continue
        layers = sum(best.config.for_layer(x.index).packs for x in result.layers)
        name = f"{result.target}, {'packed tiers too' if packed else 'plain tiers'}"
        own = {"what": "real cache", "name": name, "bytes_token": best.bytes_per_token, "kl": best.kl}
        rows.append(own | {"ratio": f"{best.ratio:.4f}", "packed_layers": layers, "taken": int(best is result.taken)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--count", type=int, default=2, help="prompts")
    parser.add_argument("--key-bits", type=int, nargs="+", default=[8, 4], help="bits that keys may have")
    parser.add_argument("--kl", type=float, nargs="+", default=[0.005, 0.02], help="targets, each a KL in nats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2.load(dtype=torch.float32)
    prompts = generated(tokenizer, args.tokens, args.count)
    bits = " ".join(map(str, args.key_bits))
    for number, kl in enumerate(args.kl):
        terms = dict(key_bits=args.key_bits, packed=True, dtype=torch.bfloat16, keep=KEPT, progress=progress_bars())
        result = calibrate(model, prompts, kl=kl, **terms)
        print(table(result))
        for packed in (False, True):
            if (best := result.best(packed)) is not None:
                path = RESULTS / f"packing_calibrated_{kl:g}_{'packed' if packed else 'plain'}.json"
                path.write_text(best.config.to_json() + "\n", encoding="utf-8")
        rows = [*(tiers(result) if not number else []), *({**row, "keys": bits} for row in attempts(result))]
        for row in rows:
            row |= {"bytes_token": f"{row['bytes_token']:.1f}", "kl": f"{row['kl']:.5f}"}
            row |= {"tokens": args.tokens, "prompts": args.count}
        rows = [{column: row.get(column, "") for column in COLUMNS} for row in rows]
        merge_csv(TABLE, rows, by=("tokens", "what", "name", "high_share", "keys"))


if __name__ == "__main__":
    main()
