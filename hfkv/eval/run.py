"""`python -m hfkv eval`: the run, what it prints and writes."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkv.demo import smollm2
from hfkv.eval import plots, table
from hfkv.eval.methods import EXACT, METHODS, Method, own_methods
from hfkv.eval.options import DTYPES
from hfkv.eval.rows import Rows
from hfkv.eval.study import OutOfTime, Study, order
from hfkv.eval.tasks import TASKS, Making

STEM = "accuracy"
CSV, KEPT, PROMPTS = f"{STEM}.csv", f"{STEM}.jsonl", f"{STEM}_prompts.jsonl"
"""The table; every finished cell; the prompts. Beside them lie the plots."""

QUICK_TASKS = ("needle", "recall", "copy", "text")
QUICK_METHODS = (
    EXACT,
    "k8v4",
    "balanced",
    "balanced-w16",
    "k4v2",
    "k4v2-w16",
    "paper",
    "kivi-4",
    "kivi-2",
    "quanto-4",
    "snapkv-0.35",
)
ROOM = 512
"""Positions beyond `--lengths` that questions and answers may take."""


@dataclass(frozen=True)
class Eval:
    """Everything the run needs, checked before the first prompt."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    tasks: list[str]
    methods: list[Method]
    lengths: list[int]
    samples: int
    seed: int
    out: Path
    budget: float | None
    kept: Rows


def prepare(args: argparse.Namespace) -> Eval:
    """Check what was asked for and load the model; ValueError, OSError or ImportError say what the user can change."""
    tasks = list(args.tasks or (QUICK_TASKS if args.quick else TASKS))
    lengths = args.lengths or ([600] if args.quick else [1000, 4000])
    samples = args.samples if args.samples is not None else 2 if args.quick else 8
    for option, values in (("--lengths", lengths), ("--samples", [samples])):
        if min(values) < 1:
            raise ValueError(f"{option} {min(values)}: must be at least 1")
    methods = _methods(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    dtype = DTYPES[args.dtype] if args.dtype else "auto" if cuda else torch.float32
    model, tokenizer = smollm2.load(args.model, dtype=dtype)
    if cuda:
        model.cuda()  # type: ignore[call-arg]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(lengths) + ROOM > limit:
        raise ValueError(f"--lengths {max(lengths)}: with questions at most {limit - ROOM} fit this model's {limit}")
    for task in tasks:
        for tokens in lengths:  # whether there is room and text enough, before hours of measuring
            TASKS[task].make(Making(tokenizer, tokens, args.seed, samples - 1))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        for name in (KEPT, PROMPTS):
            (out / name).unlink(missing_ok=True)
    return Eval(
        model,
        tokenizer,
        args.model,
        tasks,
        methods,
        sorted(set(lengths)),
        samples,
        args.seed,
        out,
        args.budget_seconds,
        Rows(out / KEPT),
    )


def run(made: Eval) -> int:
    """Measure what is not measured yet, as far as the budget goes; then write and print all that is known.

    Returns:
        1 where a method failed, else 0.
    """
    start = time.monotonic()
    deadline = None if made.budget is None else start + made.budget
    observed = max(method.observe for method in made.methods)
    prompts = made.out / PROMPTS
    study = Study(made.model, made.tokenizer, made.name, made.seed, made.kept, prompts, observed, deadline)
    print(f"{made.name}, {made.model.dtype}, {made.model.device}: {len(made.tasks)} tasks, {len(made.methods)} methods")
    stopped = measure(study, made)
    report(list(table.rows_of(study, made.tasks, made.lengths, made.samples, made.methods)), made)
    for cell, said in study.failed.items():
        print(f"failed: {cell.method.name}, {cell.task}, {cell.tokens} tokens, prompt {cell.sample + 1}: {said}")
    if stopped:
        print(f"{stopped}; the same command goes on from here.")
    print(f"{time.monotonic() - start:.0f} seconds in all.")
    return 1 if study.failed else 0


def measure(study: Study, made: Eval) -> str | None:
    """All cells, with a progress bar -> what ended it early, or None."""
    places = list(order(made.tasks, made.lengths, made.samples))
    with tqdm(total=len(places) * len(made.methods), unit="cell", smoothing=0.05) as bar:
        for task, tokens, sample in places:
            bar.set_description(f"{task}, {tokens} tokens, prompt {sample + 1}")
            try:
                study.measure(task, tokens, sample, made.methods, bar.update)
            except OutOfTime:
                return "The budget is used up"
            except KeyboardInterrupt:
                return "Interrupted"
    return None


def report(rows: list[table.Row], made: Eval) -> None:
    """The CSV, the tables, the plots."""
    if not rows:
        print("Nothing is finished yet.")
        return
    path = made.out / CSV
    table.write_csv(path, rows)
    print(f"\n{table.show(rows)}\n\n{table.show_verdicts(table.verdicts(rows))}\n\nall rows: {path}")
    if not plots.available():
        print("matplotlib is missing, so no plot is drawn: pip install 'hfkv[eval]'")
        return
    for task in made.tasks:
        for file in plots.draw(rows, task, made.out, STEM):
            print(f"plot: {file}")


def _methods(args: argparse.Namespace) -> list[Method]:
    """The exact cache first; a method whose package is missing is left out, and said."""
    own = own_methods(args.config or [])
    names = list(args.methods or (QUICK_METHODS if args.quick else METHODS))
    chosen = [METHODS[name] for name in dict.fromkeys([EXACT, *names])]
    found = []
    for method in [*chosen, *own]:
        if method.missing:
            print(f"{method.name} is left out: {method.missing} is not installed")
        else:
            found.append(method)
    return found
