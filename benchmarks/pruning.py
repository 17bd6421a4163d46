"""What may be dropped: notes that SmolLM2 still finds, and KL, by score, share dropped and representatives.

Every prompt goes through the model once, exactly; its keys, values and queries are then given to the real cache of each
setting, which scores, packs and prunes them before any question is known. Bytes are those of bf16 keys and values,
answers and KL come from the weights in float32, against DynamicCache. Measurements are kept as they are made (in
`results/pruning_smollm2.jsonl`), so an interrupted run goes on where it stopped; `--fresh` starts anew.

    python benchmarks/pruning.py --tokens 1000 --questions 40
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from rows import RESULTS, Rows, merge_csv
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo import smollm2
from hfkv.demo.measures import agreement, question_ids
from hfkv.demo.texts import continuations, noted_texts
from hfkv.eval.eviction import ALL_QUERIES
from hfkv.eval.record import Recording, filled, record
from hfkv.policy import KVCrush, Representatives

TABLE = RESULTS / "pruning_smollm2.csv"
KEPT = RESULTS / "pruning_smollm2.jsonl"
NOTES = 8  # hidden in one prompt
FOLLOWING = 96  # tokens of a continuation
BATCH_TOKENS = 8192  # cached tokens of the questions that are asked in one forward
TAIL = "\n\nSo much for the documents. Now some questions about them, each answered in one sentence.\n"
EXACT = dict(tiers=("exact",), rotate_keys=False, rotate_values=False)


SHARES = (0.3, 0.5, 0.7, 0.1)  # of the tokens dropped
CONTROLS = ("random", "strided", "keydiff", "leverage")  # choose representatives among what attention would drop
CHEAP = (
    "attention",
    "replay",
    "keydiff",
    "snapkv",
    "value_attention",
    "expected_attention",
    "knorm",
    "leverage",
    "coverage",
)
DEAR = ("h2o", "kvzip")  # quadratic in the prompt; a second pass


def settings() -> dict[str, dict[str, Any]]:
    """Name -> fields of LeanKVConfig, those that matter most first and those that take longest last."""
    made: dict[str, dict[str, Any]] = {
        "K4V2": dict(tiers=((4, 2),)),
        "aggressive": dict(high_share=0.03, keep_share=0.65),
        "budget 0.18 replay": dict(budget=0.18, score="replay"),
        "budget 0.18 attention": dict(budget=0.18, score="attention"),
        "budget 0.125 replay": dict(budget=0.125, score="replay"),
    }

    def drop(name: str, dropped: float, score: Any, representatives: Representatives | None = None) -> None:
        fields = {**EXACT, "keep_share": round(1 - dropped, 2), "score": score, "representatives": representatives}
        made[f"drop {dropped:.0%} {name}"] = fields

    def alone_and_together(score: str, dropped: float) -> None:
        drop(score, dropped, score)
        drop(f"{score} + 0.75 KVCrush", dropped, score, KVCrush(0.75))

    for dropped in SHARES:
        for score in CHEAP:
            alone_and_together(score, dropped)
        drop("attention + 0.25 KVCrush", dropped, "attention", KVCrush(0.25))
        drop("attention + 0.25 KVCrush shared", dropped, "attention", KVCrush(0.25, per_head=False))
        drop("random", dropped, "random")
        for by in CONTROLS:
            drop(f"attention + 0.75 {by}", dropped, "attention", Representatives(0.75, by))
    drop("replay + keydiff", 0.7, ("replay", "keydiff"))
    drop("replay + 0.25 KVCrush", 0.7, "replay", KVCrush(0.25))
    for score, dropped in itertools.product(DEAR, SHARES):
        alone_and_together(score, dropped)
    return made


class Study:
    """Measures settings on prompts of one length; what is measured already is not measured again."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, tokens: int, args: Any
    ) -> None:
        self._model, self._tokenizer, self._rows, self._tokens, self._args = model, tokenizer, rows, tokens, args
        self._recording: tuple[str, Recording] | None = None  # of the last prompt that was needed

    def run(self) -> None:
        """Measure all settings, those that come first on all prompts before the next."""
        configs = {name: LeanKVConfig(**fields) for name, fields in self._chosen().items()}
        items, step = list(configs.items()), self._args.at_once
        batches = [items[first : first + step] for first in range(0, len(items), step)]
        for number, batch in enumerate(batches):
            some, title = dict(batch), f"{self._tokens} tokens, settings {number + 1}/{len(batches)}"
            for index, ids, asked in tqdm(self._notes(), desc=f"{title}, prompts with notes"):
                self._note_answers(index, ids, asked, some)
                self.write(configs)
            for index, (ids, following) in enumerate(tqdm(self._texts(), desc=f"{title}, texts")):
                self._note_agreement(index, ids, following, some)
                if index == 0:
                    self._note_bytes(index, ids, some)
                self.write(configs)

    def write(self, configs: dict[str, LeanKVConfig]) -> None:
        """What is measured so far, into the table."""
        merge_csv(TABLE, [row for name in configs if (row := self._row(name))], by=("setting", "tokens"))

    def _chosen(self) -> dict[str, dict[str, Any]]:
        made = settings()
        return {name: made[name] for name in self._args.settings} if self._args.settings else made

    def _texts(self) -> list[tuple[list[int], list[int]]]:
        made = continuations(self._tokenizer, self._tokens, FOLLOWING, self._args.seed)
        return [(t.context, t.following) for t in itertools.islice(made, self._args.texts)]

    def _notes(self) -> Iterator[tuple[int, list[int], list[tuple[list[int], list[int]]]]]:
        """Prompts until the exact cache has answered enough questions: (index, tokens, questions)."""
        answered = 0
        for index, text in enumerate(noted_texts(self._tokenizer, self._tokens, NOTES, self._args.seed)):
            if answered >= self._args.questions:
                return
            ids = self._tokenizer(text.text + TAIL)["input_ids"]
            asked = [question_ids(self._tokenizer, note) for note in text.notes]
            self._note_answers(index, ids, asked, {"exact": None})
            answered += sum(self._rows.get(self._key("notes", "exact", index))["found"])
            yield index, ids, asked

    def _key(self, what: str, setting: str, index: int) -> dict[str, Any]:
        key = {"what": what, "setting": setting, "tokens": self._tokens, "seed": self._args.seed, "index": index}
        return key

    def _missing(self, what: str, index: int, some: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
        for name, config in some.items():
            key = self._key(what, name, index)
            if self._rows.get(key) is None:
                yield key, config

    def _filled(self, what: str, ids: list[int], config: LeanKVConfig | None, dtype: torch.dtype | None = None) -> Any:
        """A cache of this config behind a prompt; None: the exact one."""
        if self._recording is None or self._recording[0] != what:
            self._recording = None  # frees the one before
            self._recording = (what, record(self._model, ids, ALL_QUERIES))
        cache = DynamicCache() if config is None else LeanKVCache(config)
        return filled(self._model, self._recording[1], cache, dtype)

    def _note_answers(self, index: int, ids: list[int], asked: Any, some: dict[str, Any]) -> None:
        for key, config in self._missing("notes", index, some):
            cache = self._filled(f"notes {index}", ids, config)
            step = max(1, BATCH_TOKENS // len(ids))
            parts = [self._found(cache, asked[first : first + step]) for first in range(0, len(asked), step)]
            self._rows.add(key, {"found": [found for part in parts for found in part]})

    @torch.no_grad()
    def _found(self, cache: Cache, asked: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether each value is what greedy decoding gives behind its question; all questions in one forward."""
        held, fork = cache.get_seq_length(), copy.deepcopy(cache)
        fork.batch_repeat_interleave(len(asked))
        rows = [question + value[:-1] for question, value in asked]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        mask = torch.cat([torch.ones(len(rows), held, dtype=torch.long), real], 1)
        positions = (held + real.cumsum(1) - 1).clamp_min(0)
        most = max(len(value) for _, value in asked)
        logits = self._model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=fork, logits_to_keep=most
        ).logits
        said = logits.argmax(-1).tolist()
        return [row[most - len(value) :] == value for row, (_, value) in zip(said, asked, strict=True)]

    @torch.no_grad()
    def _logits(self, cache: Cache, ids: list[int]) -> Tensor:
        return self._model(torch.tensor([ids]), past_key_values=copy.deepcopy(cache)).logits[0].float()

    def _note_agreement(self, index: int, ids: list[int], following: list[int], some: dict[str, Any]) -> None:
        exact = None
        for key, config in self._missing("text", index, some):
            what = f"text {index}"
            exact = self._logits(self._filled(what, ids, None), following) if exact is None else exact
            close = agreement(exact, self._logits(self._filled(what, ids, config), following))
            self._rows.add(key, {"kl": close.kl, "top1": close.top1})

    def _note_bytes(self, index: int, ids: list[int], some: dict[str, Any]) -> None:
        for key, config in self._missing("bytes", index, some):
            report = self._filled(f"text {index}", ids, config, torch.bfloat16).report()
            self._rows.add(key, {"ratio": report.physical_bytes / report.exact_bytes})

    def _row(self, name: str) -> dict[str, Any] | None:
        answered = found = prompts = 0
        for index in itertools.count():
            exact, own = (self._rows.get(self._key("notes", setting, index)) for setting in ("exact", name))
            if exact is None or own is None:
                break
            answered, prompts = answered + sum(exact["found"]), prompts + 1
            found += sum(a and b for a, b in zip(exact["found"], own["found"], strict=True))
        close = [self._rows.get(self._key("text", name, index)) for index in range(self._args.texts)]
        close = [row for row in close if row is not None]
        ratio = self._rows.get(self._key("bytes", name, 0))
        if not answered:
            return None
        return {
            "setting": name,
            "tokens": self._tokens,
            "bytes": f"{ratio['ratio']:.4f}" if ratio else "",
            "notes": f"{found / answered:.3f}",
            "found": found,
            "answered": answered,
            "asked": prompts * NOTES,
            "kl": f"{sum(row['kl'] for row in close) / len(close):.5f}" if close else "",
            "top1": f"{sum(row['top1'] for row in close) / len(close):.4f}" if close else "",
            "texts": len(close),
            "seed": self._args.seed,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000], help="prompt lengths")
    parser.add_argument("--texts", type=int, default=3, help="continuations per length")
    parser.add_argument("--questions", type=int, default=40, help="per length, that the exact cache answers")
    parser.add_argument("--settings", nargs="+", choices=list(settings()), metavar="NAME", help="only these, in order")
    parser.add_argument("--at-once", type=int, default=8, help="settings measured on all prompts before the next")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    args = parser.parse_args()
    if args.texts < 1 or args.questions < 1:
        parser.error("--texts and --questions must be at least 1")
    torch.set_num_threads(args.threads)
    if args.fresh:
        KEPT.unlink(missing_ok=True)
    model, tokenizer = smollm2.load(dtype=torch.float32)
    for tokens in args.tokens:
        Study(model, tokenizer, Rows(KEPT), tokens, args).run()
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
