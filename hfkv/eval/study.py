"""The measuring: a prompt is run once, every method's cache is filled from it and asked; results are kept at once."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkv.eval import tasks
from hfkv.eval.methods import EXACT, Method, bytes_dtype, physical_bytes
from hfkv.eval.record import Recording, filled, follow, record
from hfkv.eval.rows import Key, Rows
from hfkv.eval.score import Asked, Reference, answers, fidelity, reference, right_steps
from hfkv.eval.tasks import TASKS, TEXT, Making, Prompt

GENERATED = 64
"""Greedy tokens of the exact cache that the task `text` compares the first divergence on."""

BYTE_QUERIES = 128
"""Queries that score tokens where only bytes are asked for: they hardly depend on who is kept."""

BYTE_SAMPLES = 1
"""Prompts of a task and length on which bytes are measured: where they depend on the text at all, they do little."""


@dataclass(frozen=True)
class Cell:
    """One prompt under one method."""

    task: str
    tokens: int
    sample: int
    method: Method


class OutOfTime(Exception):
    """The budget is used up."""


class Study:
    """Measures cells; what is kept already is not measured again.

    Args:
        name: what the model is called in the results.
        rows: where results are kept.
        prompts: a JSON-lines file that gets every prompt as text, with its questions.
        observed: last queries of a prompt that the methods look at, at most.
        deadline: `time.monotonic()` at which measuring stops, or None.

    Attributes:
        failed: cells that raised, and what.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        seed: int,
        rows: Rows,
        prompts: Path,
        observed: int,
        deadline: float | None = None,
    ) -> None:
        self._model, self._tokenizer, self._name, self._seed = model, tokenizer, name, seed
        self._rows, self._prompts, self._observed, self._deadline = rows, prompts, observed, deadline
        self.failed: dict[Cell, str] = {}
        self._saved = _saved(prompts)
        self._recorded: tuple[Any, Recording] | None = None

    def key(self, cell: Cell) -> Key:
        """What a cell's result is kept under."""
        return {
            "model": self._name,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "seed": self._seed,
            "task": cell.task,
            "tokens": cell.tokens,
            "sample": cell.sample,
            "method": cell.method.name,
            "setting": cell.method.setting,
        }

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A kept result: `right` and `steps` per question, or the fields of `Fidelity`; `physical`, `exact` bytes."""
        return self._rows.get(self.key(cell))

    def measure(self, task: str, tokens: int, sample: int, methods: list[Method], done: Callable[[], Any]) -> None:
        """One prompt under all methods, the exact cache first; `done` is called after each.

        Raises:
            OutOfTime: the budget is used up; what is finished is kept.
        """
        cells = [Cell(task, tokens, sample, method) for method in methods]
        waiting = [cell for cell in cells if self.result(cell) is None]
        for _ in range(len(cells) - len(waiting)):
            done()
        if not waiting:
            return
        prompt = TASKS[task].make(Making(self._tokenizer, tokens, self._seed, sample))
        self._save(task, tokens, sample, prompt)
        measure = self._text(cells[0], prompt) if task == TEXT else self._asked(cells[0], prompt)
        for cell in waiting:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise OutOfTime
            try:
                result = measure(cell.method) | (self._bytes(cell, prompt) if sample < BYTE_SAMPLES else {})
            except Exception as error:  # told at the end, and tried again by the next run; the others go on
                if cell.method.name == EXACT:
                    raise
                self.failed[cell] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                self._rows.add(self.key(cell), result)
            done()

    # ---- one prompt --------------------------------------------------------------------------------------------------

    def _asked(self, cell: Cell, prompt: Prompt) -> Callable[[Method], dict[str, Any]]:
        """A function that asks a method's cache all questions of a prompt."""
        made = [tasks.question_ids(self._tokenizer, question) for question in prompt.questions]
        aware = TASKS[cell.task].aware
        asked = made[: tasks.AWARE_QUESTIONS] if aware else made
        before: list[Recording] = []  # one per question, where it is part of the prompt

        def measure(method: Method) -> dict[str, Any]:
            base = self._recording(cell, prompt)
            if aware and not before:
                before.extend(follow(self._model, base, ids) for ids, _ in asked)
            if aware:
                caches = (self._filled(recording, method) for recording in before)
                shares = [right_steps(self._model, c, answer) for c, (_, answer) in zip(caches, asked, strict=True)]
            else:
                behind = [Asked(ids + answer.lead, answer.steps) for ids, answer in asked]
                shares = answers(self._model, self._filled(base, method), behind)
            right = [round(share * len(answer.steps)) for share, (_, answer) in zip(shares, asked, strict=True)]
            return {"right": right, "steps": [len(answer.steps) for _, answer in asked]}

        return measure

    def _text(self, cell: Cell, prompt: Prompt) -> Callable[[Method], dict[str, Any]]:
        """A function that holds a method's cache to the exact one."""
        following, exact = list(prompt.following), list[Reference]()

        def measure(method: Method) -> dict[str, Any]:
            recording = self._recording(cell, prompt)
            if not exact:
                exact.append(reference(self._model, recording.cache, following, GENERATED))
            close = fidelity(self._model, self._filled(recording, method), following, exact[0])
            return dataclasses.asdict(close)

        return measure

    def _bytes(self, cell: Cell, prompt: Prompt) -> dict[str, int]:
        """Physical and exact bytes of the compressed prompt, in 16 bits."""
        recording, dtype = self._recording(cell, prompt), bytes_dtype(self._model.dtype)
        exact = physical_bytes(recording.cache) * dtype.itemsize // self._model.dtype.itemsize
        if cell.method.name == EXACT:
            return {"physical": exact, "exact": exact}
        if not recording.replays:
            dtype, exact = self._model.dtype, physical_bytes(recording.cache)
        cache = cell.method.new_cache(self._model.config)
        return {"physical": physical_bytes(filled(self._model, recording, cache, dtype, BYTE_QUERIES)), "exact": exact}

    def _filled(self, recording: Recording, method: Method) -> Any:
        return filled(self._model, recording, method.new_cache(self._model.config))

    def _recording(self, cell: Cell, prompt: Prompt) -> Recording:
        """Of the prompt without a question; tasks that share their prompts share it."""
        key = (TASKS[cell.task].make, cell.tokens, cell.sample)
        if self._recorded is None or self._recorded[0] != key:
            self._recorded = None  # frees the one before
            ids = tasks.context_ids(self._tokenizer, prompt)
            self._recorded = (key, record(self._model, ids, self._observed))
        return self._recorded[1]

    def _save(self, task: str, tokens: int, sample: int, prompt: Prompt) -> None:
        key = {"task": task, "tokens": tokens, "sample": sample, "seed": self._seed}
        if json.dumps(key) in self._saved:
            return
        self._saved.add(json.dumps(key))
        text = prompt.text or self._tokenizer.decode(list(prompt.context))
        line = key | {"text": text, "questions": [dataclasses.asdict(question) for question in prompt.questions]}
        if prompt.following:
            line["following"] = self._tokenizer.decode(list(prompt.following))
        with self._prompts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def order(names: list[str], lengths: list[int], samples: int) -> Iterator[tuple[str, int, int]]:
    """Task, length, sample: every task's first prompt before any second one, so that a run that stops has all tasks."""
    for sample in range(samples):
        for tokens in lengths:
            for name in names:
                yield name, tokens, sample


def _saved(path: Path) -> set[str]:
    """The prompts that a file has already."""
    if not path.exists():
        return set()
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {json.dumps({name: line[name] for name in ("task", "tokens", "sample", "seed")}) for line in lines}
