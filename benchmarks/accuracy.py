"""What compression costs SmolLM2: KL, top-1 agreement and notes found against physical bytes, through the real cache.

Every prompt is compressed before its continuation or question is known. Bytes are measured on the bf16 model, agreement
and notes on the same weights in float32, both against DynamicCache. Each measurement is kept as soon as it is made (in
`results/accuracy_smollm2.jsonl`), so an interrupted run goes on where it stopped; `--fresh` starts anew.

    python benchmarks/accuracy.py --lengths 1000 4000 --texts 6 --questions 100
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from rows import RESULTS, Rows, merge_csv
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo import smollm2
from hfkv.demo.measures import Agreement, agreement, fill, finds_note, forced_logits, mean_agreement, question_ids
from hfkv.demo.texts import Continuation, NotedText, continuations, noted_texts

TABLE = RESULTS / "accuracy_smollm2.csv"
KEPT = RESULTS / "accuracy_smollm2.jsonl"
FOLLOWING = 96  # tokens of a continuation
NOTES = 8  # hidden in one prompt
BYTE_PROMPTS = 2  # on which bytes are measured, per length
TAIL = "\n\nSo much for the documents. Now some questions about them, each answered in one sentence.\n"
SETTINGS: dict[str, Callable[[], Cache]] = {
    "exact": DynamicCache,
    "k8v4": lambda: LeanKVCache(LeanKVConfig.preset("k8v4")),
    "balanced": lambda: LeanKVCache(LeanKVConfig.preset("balanced")),
    "aggressive": lambda: LeanKVCache(LeanKVConfig.preset("aggressive")),
    "paper": lambda: LeanKVCache(LeanKVConfig.preset("paper")),
    "K4V2": lambda: LeanKVCache(LeanKVConfig(tiers=((4, 2),))),
}


@dataclass
class Notes:
    """Notes found by setting, of the `answered` questions that the exact cache answers out of `asked`."""

    found: dict[str, int]
    answered: int = 0
    asked: int = 0


class Study:
    """Measures settings on prompts of one length; what is measured already is not measured again."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, seed: int, tokens: int):
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._seed, self._tokens = seed, tokens

    def bytes(self, setting: str, index: int, text: Continuation) -> dict:
        """Physical and exact bytes after the prompt, in the dtype of the model."""
        return self._kept("bytes", setting, index, lambda: self._measure_bytes(setting, text))

    def agreements(self, settings: list[str], index: int, text: Continuation) -> Iterator[dict]:
        """KL and top-1 agreement of each setting on the tokens that follow the prompt."""
        exact: list[torch.Tensor] = []  # made for the first setting that is not measured yet

        def measure(setting: str) -> dict:
            if not exact:
                exact.append(self._following_logits("exact", text))
            close = agreement(exact[0], self._following_logits(setting, text))
            return {"kl": close.kl, "top1": close.top1, "tokens": close.tokens}

        for setting in settings:
            yield self._kept("text", setting, index, lambda setting=setting: measure(setting))

    def notes(self, setting: str, index: int, text: NotedText) -> dict:
        """Which of the prompt's notes are found: {"found": [True, False, ...]}."""
        return self._kept("notes", setting, index, lambda: self._measure_notes(setting, text))

    def texts(self) -> Iterator[Continuation]:
        return continuations(self._tokenizer, self._tokens, FOLLOWING, self._seed)

    def noted_texts(self) -> Iterator[NotedText]:
        return noted_texts(self._tokenizer, self._tokens, NOTES, self._seed)

    def _kept(self, what: str, setting: str, index: int, measure: Callable[[], dict]) -> dict:
        key = {"what": what, "setting": setting, "tokens": self._tokens, "seed": self._seed, "index": index}
        if (measured := self._rows.get(key)) is None:
            measured = measure()
            self._rows.add(key, measured)
        return measured

    def _measure_bytes(self, setting: str, text: Continuation) -> dict:
        report = fill(self._model, text.context, SETTINGS[setting]()).report()
        return {"physical": report.physical_bytes, "exact": report.exact_bytes}

    def _following_logits(self, setting: str, text: Continuation) -> torch.Tensor:
        return forced_logits(self._model, fill(self._model, text.context, SETTINGS[setting]()), text.following)

    def _measure_notes(self, setting: str, text: NotedText) -> dict:
        cache = fill(self._model, self._tokenizer(text.text + TAIL)["input_ids"], SETTINGS[setting]())
        asked = (question_ids(self._tokenizer, note) for note in text.notes)
        return {"found": [finds_note(self._model, cache, *ids) for ids in asked]}


def measure_bytes(study: Study, settings: list[str], bar: tqdm) -> dict[str, float]:
    """Physical / exact bytes by setting."""
    physical, exact = dict.fromkeys(settings, 0), dict.fromkeys(settings, 0)
    for index, text in enumerate(islice(study.texts(), BYTE_PROMPTS)):
        for setting in settings:
            measured = study.bytes(setting, index, text)
            physical[setting] += measured["physical"]
            exact[setting] += measured["exact"]
            bar.update()
    return {setting: physical[setting] / exact[setting] for setting in settings}


def measure_texts(study: Study, settings: list[str], count: int, bar: tqdm) -> dict[str, Agreement]:
    """Agreement with the exact cache by setting, over `count` continuations."""
    parts: dict[str, list[Agreement]] = {setting: [] for setting in settings}
    for index, text in enumerate(islice(study.texts(), count)):
        for setting, measured in zip(settings, study.agreements(settings, index, text), strict=True):
            parts[setting].append(Agreement(**measured))
            bar.update()
    return {setting: mean_agreement(part) for setting, part in parts.items()}


def measure_notes(study: Study, settings: list[str], questions: int, bar: tqdm) -> Notes:
    """Prompts until the exact cache has answered `questions` questions; only those count."""
    notes = Notes(dict.fromkeys(settings, 0))
    for index, text in enumerate(study.noted_texts()):
        if notes.answered >= questions:
            return notes
        exact = study.notes("exact", index, text)["found"]
        for setting in settings:
            here = study.notes(setting, index, text)["found"]
            notes.found[setting] += sum(a and b for a, b in zip(exact, here, strict=True))
        bar.update(min(sum(exact), questions - notes.answered))
        notes.answered, notes.asked = notes.answered + sum(exact), notes.asked + len(exact)
    raise ValueError(
        f"--questions {questions}: all prompts together hold {notes.answered} that the exact cache answers"
    )


def measure_length(
    models: dict[torch.dtype, PreTrainedModel], rows: Rows, args: argparse.Namespace, tokens: int
) -> None:
    """All measurements at one prompt length, into the table."""
    tokenizer = smollm2.load()[1]
    in_half, in_single = (
        Study(models[dtype], tokenizer, rows, args.seed, tokens) for dtype in (torch.bfloat16, torch.float32)
    )
    with tqdm(total=BYTE_PROMPTS * len(args.settings), desc=f"{tokens} tokens, bytes") as bar:
        ratios = measure_bytes(in_half, args.settings, bar)
    with tqdm(total=args.texts * len(args.settings), desc=f"{tokens} tokens, texts") as bar:
        close = measure_texts(in_single, args.settings, args.texts, bar)
    with tqdm(total=args.questions, desc=f"{tokens} tokens, questions") as bar:
        notes = measure_notes(in_single, args.settings, args.questions, bar)
    table = [
        {
            "setting": setting,
            "tokens": tokens,
            "bytes": f"{ratios[setting]:.4f}",
            "kl": f"{close[setting].kl:.5f}",
            "top1": f"{close[setting].top1:.4f}",
            "notes": f"{notes.found[setting] / notes.answered:.3f}",
            "texts": args.texts,
            "answered": notes.answered,
            "asked": notes.asked,
            "seed": args.seed,
        }
        for setting in args.settings
    ]
    merge_csv(TABLE, table, by=("setting", "tokens", "seed"))


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.fresh:
        KEPT.unlink(missing_ok=True)
    models = {dtype: smollm2.load(dtype=dtype)[0] for dtype in (torch.bfloat16, torch.float32)}
    for tokens in args.lengths:
        measure_length(models, Rows(KEPT), args, tokens)
    print(TABLE.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    lean = [name for name in SETTINGS if name != "exact"]
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000], help="prompt lengths in tokens")
    parser.add_argument("--texts", type=int, default=6, help="continuations per length")
    parser.add_argument("--questions", type=int, default=100, help="per length, that the exact cache answers")
    parser.add_argument("--settings", nargs="+", choices=lean, default=lean)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    args = parser.parse_args()
    if args.texts < 1 or args.questions < 1:
        parser.error("--texts and --questions must be at least 1")
    return args


if __name__ == "__main__":
    main()
