"""What packing saves on texts not calibrated on: the config with packed tiers beside the one without.

Both come from `packing_calibrated.py`, for one KL. KL and notes come from the weights in float32, bytes are those of
the same caches with exact vectors in bf16, everything counted. Texts that share words with the calibration's prompts
are left out. Measurements are kept, in `results/packing_unseen.jsonl`.

    python benchmarks/packing_unseen.py --tokens 1000 4000 --texts 12 6
"""

from __future__ import annotations

import argparse
import zlib
from itertools import islice
from pathlib import Path
from statistics import fmean

import accuracy
import torch
from calibrated import Unseen, shingles
from rows import RESULTS, Rows, merge_csv
from tqdm import tqdm

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.calibrate import generated
from hfkv.demo import smollm2

TABLE, KEPT = RESULTS / "packing_unseen.csv", RESULTS / "packing_unseen.jsonl"
CALIBRATED_ON = {"tokens": 1000, "count": 2}  # of `packing_calibrated.py`


def measure_texts(study: Unseen, names: dict[str, str], count: int) -> dict[str, dict]:
    """By label: bytes, KL, top-1, and on how many texts it beats the other in bytes and in KL."""
    found: dict[str, list[dict]] = {label: [] for label in names}
    for index, text in enumerate(tqdm(islice(study.texts(), count), total=count, desc="texts")):
        for label, row in zip(names, study.both(list(names.values()), index, text), strict=True):
            found[label].append(row)
    table = {}
    for label, rows in found.items():
        other = next(own for name, own in found.items() if name != label)
        means = {key: fmean(row[key] for row in rows) for key in ("ratio", "kl", "top1")}
        wins = {key: sum(a[key] < b[key] for a, b in zip(rows, other, strict=True)) for key in ("ratio", "kl")}
        table[label] = {
            "texts": len(rows),
            "bytes": f"{means['ratio']:.4f}",
            "kl": f"{means['kl']:.5f}",
            "top1": f"{means['top1']:.4f}",
            "smaller_on": wins["ratio"],
            "closer_on": wins["kl"],
        }
    return table


def measure_notes(study: Unseen, names: dict[str, str], questions: int) -> dict[str, dict]:
    """By label: notes found of those that the exact cache finds."""
    answers: dict[str, list[bool]] = {label: [] for label in ("exact", *names)}
    bar = tqdm(total=questions, desc="questions")
    for index, text in enumerate(study.noted_texts()):
        if sum(answers["exact"]) >= questions:
            break
        for label, known in answers.items():
            known += study.notes(names.get(label, label), index, text)["found"]
        bar.update(sum(answers["exact"]) - bar.n)
    answered = [i for i, known in enumerate(answers["exact"]) if known]
    return {
        label: {"notes_found": sum(answers[label][i] for i in answered), "notes_answered": len(answered)}
        for label in names
    }


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    names = {}
    for label in ("plain", "packed"):
        config = LeanKVConfig.from_json(args.configs / f"packing_calibrated_{args.kl:g}_{label}.json")
        names[label] = name = f"calibrated {zlib.crc32(config.to_json().encode()):08x}"
        accuracy.SETTINGS[name] = lambda config=config: LeanKVCache(config)
    model, tokenizer = smollm2.load(dtype=torch.float32)
    prompts = generated(tokenizer, **CALIBRATED_ON)
    seen = set().union(*(shingles(tokenizer.decode(context + following)) for context, following in prompts))
    for tokens, texts, questions in zip(args.tokens, args.texts, args.questions, strict=True):
        study = Unseen(model, tokenizer, Rows(KEPT), args.seed, tokens, seen=seen)
        parts = [measure_texts(study, names, texts)] + ([measure_notes(study, names, questions)] if questions else [])
        for label in names:
            row = {
                "kl_target": f"{args.kl:g}",
                "tokens": tokens,
                "config": label,
                "notes_found": "",
                "notes_answered": "",
            }
            for part in parts:
                row |= part[label]
            merge_csv(TABLE, [row], by=("kl_target", "tokens", "config"))
    print(TABLE.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", type=Path, default=RESULTS, help="folder that packing_calibrated.py writes to")
    parser.add_argument("--kl", type=float, default=0.02, help="KL that the configs were calibrated for")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--texts", type=int, nargs="+", default=[12, 6], help="texts of each length")
    parser.add_argument(
        "--questions", type=int, nargs="+", default=[60, 0], help="notes asked at least, of each length"
    )
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not len(args.tokens) == len(args.texts) == len(args.questions):
        parser.error("--tokens, --texts and --questions: give one number of each for every length")
    return args


if __name__ == "__main__":
    main()
