"""A calibrated config beside `balanced`, through the real cache, on texts that the calibration did not see.

KL and notes come from the weights in float32; bytes are those of the same caches with exact vectors in bf16, and, for
two prompts, those of the bf16 model itself. Prompts that share text with those of the calibration are left out.
Measurements are kept (`results/calibrated_smollm2.jsonl`).

    python -m hfkv calibrate --ratio 0.34 --out benchmarks/results/calibrated.json
    python benchmarks/calibrated.py --config benchmarks/results/calibrated.json
"""

from __future__ import annotations

import argparse
import dataclasses
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

import accuracy
import torch
from accuracy import Study
from rows import RESULTS, Rows, merge_csv
from tqdm import tqdm

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.calibrate import generated
from hfkv.calibrate.choose import physical_bytes
from hfkv.demo import smollm2
from hfkv.demo.measures import agreement, fill, forced_logits
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

    def both(self, settings: list[str], index: int, text: Continuation) -> Iterator[dict]:
        """Agreement with the exact cache on what follows, and bytes of the same cache, per setting."""
        exact: list[torch.Tensor] = []

        def measure(setting: str) -> dict:
            if not exact:
                exact.append(self._following_logits("exact", text))
            held = fill(self._model, text.context, accuracy.SETTINGS[setting]())
            physical, size = physical_bytes(held.report(), torch.bfloat16, torch.float32)
            close = agreement(exact[0], forced_logits(self._model, held, text.following))
            return {"kl": close.kl, "top1": close.top1, "tokens": close.tokens, "ratio": physical / size}

        for setting in settings:
            yield self._kept("text and bytes", setting, index, lambda setting=setting: measure(setting))

    def _is_new(self, text: str) -> bool:
        own = shingles(text)
        return len(own & self._seen) < SHARED * len(own)


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE` words."""
    words = text.split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def measure_texts(study: Unseen, settings: dict[str, str], count: int) -> dict[str, dict]:
    """Bytes, KL and top-1 agreement by label; `settings` are labels and names, `balanced` first."""
    names = list(settings.values())
    found: dict[str, list[dict]] = {name: [] for name in names}
    for index, text in enumerate(tqdm(islice(study.texts(), count), total=count, desc="texts")):
        for name, measured in zip(names, study.both(names, index, text), strict=True):
            found[name].append(measured)
    means = {name: {key: fmean(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}
    base = means[names[0]]
    return {
        label: {
            "bytes": f"{means[name]['ratio']:.4f}",
            "kl": f"{means[name]['kl']:.5f}",
            "kl_to_balanced": f"{means[name]['kl'] / base['kl']:.3f}",
            "texts_better": sum(a["kl"] < b["kl"] for a, b in zip(found[name], found[names[0]], strict=True)),
            "texts": count,
            "top1": f"{means[name]['top1']:.4f}",
        }
        for label, name in settings.items()
    }


def measure_notes(study: Unseen, settings: dict[str, str], questions: int) -> dict[str, dict]:
    """Notes found of those that the exact cache finds, and how many of them only one of two settings finds."""
    names = list(settings.values())
    answers: dict[str, list[bool]] = {name: [] for name in ("exact", *names)}
    bar = tqdm(total=questions, desc="questions")
    for index, text in enumerate(study.noted_texts()):
        for name, known in answers.items():
            known += study.notes(name, index, text)["found"]
        bar.update(sum(answers["exact"]) - bar.n)
        if bar.n >= questions:
            break
    answered = [i for i, known in enumerate(answers["exact"]) if known]
    return {
        label: {
            "notes": f"{fmean(answers[name][i] for i in answered):.3f}",
            "lost_to_balanced": sum(answers[names[0]][i] and not answers[name][i] for i in answered),
            "won_from_balanced": sum(answers[name][i] and not answers[names[0]][i] for i in answered),
            "answered": len(answered),
            "asked": len(answers["exact"]),
        }
        for label, name in settings.items()
    }


def measure_half(study: Unseen, settings: dict[str, str]) -> dict[str, dict]:
    """Bytes of the bf16 model by label."""
    found = {label: [] for label in settings}
    for index, text in enumerate(islice(study.texts(), accuracy.BYTE_PROMPTS)):
        for label, name in settings.items():
            size = study.bytes(name, index, text)
            found[label].append(size["physical"] / size["exact"])
    return {label: {"bytes_in_bf16": f"{fmean(sizes):.4f}"} for label, sizes in found.items()}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    settings = {"balanced": "balanced"}
    for path in args.config:
        config = LeanKVConfig.from_json(path)
        config = dataclasses.replace(config, made_for=None)
        settings[path.stem] = name = f"calibrated {zlib.crc32(config.to_json().encode()):08x}"
        accuracy.SETTINGS[name] = lambda config=config: LeanKVCache(config)
    tokenizer, rows = smollm2.load()[1], Rows(KEPT)
    prompts = generated(tokenizer, **CALIBRATED_ON)
    seen = set().union(*(shingles(tokenizer.decode(context + following)) for context, following in prompts))
    found: list[dict[str, dict]] = []
    single, half = (
        Unseen(smollm2.load(dtype=dtype)[0], tokenizer, rows, args.seed, args.tokens, seen=seen)
        for dtype in (torch.float32, torch.bfloat16)
    )
    if "texts" in args.parts:
        found += [measure_texts(single, settings, args.texts), measure_half(half, settings)]
    if "notes" in args.parts:
        found.append(measure_notes(single, settings, args.questions))
    table = [
        {
            "setting": label,
            "tokens": args.tokens,
            "seed": args.seed,
            **{k: v for part in found for k, v in part[label].items()},
        }
        for label in settings
    ]
    if len(args.parts) == 2:
        merge_csv(TABLE, table, by=("setting", "tokens", "seed"))
    for row in table:
        print(row)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="calibrated configs, JSON files")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--questions", type=int, default=60, help="at least, that the exact cache answers")
    parser.add_argument("--parts", nargs="+", choices=("texts", "notes"), default=["texts", "notes"])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
