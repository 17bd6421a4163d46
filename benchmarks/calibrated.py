"""A calibrated config beside `balanced`, through the real cache, on texts that the calibration did not see.

Bytes are those of the bf16 model on the same prompts; KL and notes come from the same weights in float32. Prompts that
share text with those of the calibration are left out. Measurements are kept (`results/calibrated_smollm2.jsonl`).

    python -m hfkv calibrate --ratio 0.34 --out benchmarks/results/calibrated.json
    python benchmarks/calibrated.py --config benchmarks/results/calibrated.json
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import accuracy
import torch
from accuracy import Study
from rows import RESULTS, Rows, merge_csv
from tqdm import tqdm

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.calibrate import generated
from hfkv.demo import smollm2
from hfkv.demo.measures import Agreement, mean_agreement
from hfkv.demo.texts import Continuation, NotedText

TABLE = RESULTS / "calibrated_smollm2.csv"
KEPT = RESULTS / "calibrated_smollm2.jsonl"
CALIBRATED_ON = {"tokens": 1000, "count": 4}  # what `python -m hfkv calibrate` takes by itself
SHINGLE = 12  # words
SHARED = 0.05  # of a text's shingles, from which on it counts as seen


class Unseen(Study):
    """Only texts that share nothing with the prompts of the calibration."""

    def __init__(self, *args, seen: set[str]):
        super().__init__(*args)
        self._seen = seen

    def texts(self) -> Iterator[Continuation]:
        return (text for text in super().texts() if self._is_new(self._tokenizer.decode(text.context + text.following)))

    def noted_texts(self) -> Iterator[NotedText]:
        return (text for text in super().noted_texts() if self._is_new(text.text))

    def _is_new(self, text: str) -> bool:
        own = shingles(text)
        return len(own & self._seen) < SHARED * len(own)


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE` words."""
    words = text.split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def measure(in_half: Unseen, in_single: Unseen, settings: dict[str, str], texts: int, questions: int) -> list[dict]:
    """One row per setting; `settings` are labels and the names that they are kept under, `balanced` first."""
    names = list(settings.values())
    parts: dict[str, list[Agreement]] = {name: [] for name in names}
    sizes = dict.fromkeys(names, 0.0)
    bar = tqdm(total=texts, desc="texts")
    for index, text in enumerate(islice(in_single.texts(), texts)):
        for name, measured in zip(names, in_single.agreements(names, index, text), strict=True):
            parts[name].append(Agreement(**measured))
            size = in_half.bytes(name, index, text)
            sizes[name] += size["physical"] / size["exact"] / texts
        bar.update()
    found = dict.fromkeys(names, 0)
    lost = dict.fromkeys(names, 0)
    answered = asked = 0
    bar = tqdm(total=questions, desc="questions")
    for index, text in enumerate(in_single.noted_texts()):
        exact = in_single.notes("exact", index, text)["found"]
        base = in_single.notes(names[0], index, text)["found"]
        for name in names:
            here = in_single.notes(name, index, text)["found"]
            found[name] += sum(a and b for a, b in zip(exact, here, strict=True))
            lost[name] += sum(a and b and not c for a, b, c in zip(exact, base, here, strict=True))
        answered, asked = answered + sum(exact), asked + len(exact)
        bar.update(sum(exact))
        if answered >= questions:
            break
    close = {name: mean_agreement(part) for name, part in parts.items()}
    return [
        {
            "setting": label,
            "bytes": f"{sizes[name]:.4f}",
            "kl": f"{close[name].kl:.5f}",
            "kl_to_balanced": f"{close[name].kl / close[names[0]].kl:.3f}",
            "top1": f"{close[name].top1:.4f}",
            "notes": f"{found[name] / answered:.3f}",
            "lost_to_balanced": lost[name],
            "texts": texts,
            "answered": answered,
            "asked": asked,
        }
        for label, name in settings.items()
    ]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    settings = {"balanced": "balanced"}
    for path in args.config:
        config = LeanKVConfig.from_json(path)
        settings[path.stem] = name = f"calibrated {zlib.crc32(config.to_json().encode()):08x}"
        accuracy.SETTINGS[name] = lambda config=config: LeanKVCache(config)
    models = {dtype: smollm2.load(dtype=dtype)[0] for dtype in (torch.bfloat16, torch.float32)}
    tokenizer = smollm2.load()[1]
    prompts = generated(tokenizer, **CALIBRATED_ON)
    seen = set().union(*(shingles(tokenizer.decode(context + following)) for context, following in prompts))
    rows = Rows(KEPT)
    in_half, in_single = (Unseen(models[dtype], tokenizer, rows, args.seed, args.tokens, seen=seen) for dtype in models)
    table = measure(in_half, in_single, settings, args.texts, args.questions)
    merge_csv(
        TABLE, [{"tokens": args.tokens, "seed": args.seed, **row} for row in table], by=("setting", "tokens", "seed")
    )
    print(TABLE.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="calibrated configs, JSON files")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--questions", type=int, default=60, help="at least, that the exact cache answers")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
