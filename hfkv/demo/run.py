"""`python -m hfkv demo`: the exact cache and LeanKV at several settings, side by side, on a real model."""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo import picture, show, smollm2
from hfkv.demo.contest import EXACT, Contender, Contest, Lengths, Outcome, Talk
from hfkv.demo.dialogue import Dialogue, Question, next_turn
from hfkv.demo.texts import Note, noted_texts

_SHOWN = ["k8v4", "balanced", "aggressive", "paper"]
_NOTES = 6
_SEED = 9
_CHAT = ("Name one Python function from the documents and say what it does.", "Why would a programmer use it?")
_OWN_CHAT = ("What is this text about?", "What is its most important point?")


@dataclass(frozen=True)
class Demo:
    """Everything the demo needs, checked before the first prompt runs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    talk: Talk
    questions: list[Question]
    notes: tuple[Note, ...]
    turns: list[str]
    contenders: list[Contender]
    out: Path


def prepare(args: argparse.Namespace) -> Demo:
    """Load the model and make the prompt; ValueError, OSError or ImportError say what the user can change."""
    if args.question and not args.prompt_file:
        raise ValueError("--question is about a text of your own: give it with --prompt-file")
    contenders = _contenders(args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = smollm2.load(args.model, dtype="auto")
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    document, notes = _document(args, tokenizer)
    questions = [Question(note.question, note.answer) for note in notes] or [Question(text) for text in args.question]
    turns = list(_OWN_CHAT if args.prompt_file else _CHAT)
    lengths = Lengths(chat=24 if args.quick else 60)
    dialogue = Dialogue(tokenizer, document, [*questions, Question(turns[0])])
    talk = Talk(dialogue, next_turn(tokenizer, turns[1]), lengths)
    _check_positions(model, talk)
    return Demo(model, tokenizer, args.model, talk, questions, notes, turns, contenders, Path(args.out))


def run(demo: Demo) -> None:
    """Let the caches run one after another, then print answers, figures and pictures."""
    start = time.perf_counter()
    _introduce(demo)
    contest = Contest(demo.model, demo.tokenizer, demo.talk)
    outcomes = [contest.run(contender) for contender in demo.contenders]
    if demo.questions:
        marks = " (+ has the hidden value, - has not)" if demo.notes else ""
        show.heading(f"Questions, asked after the prompt was compressed, each on a fork of the same cache{marks}")
        for number, question in enumerate(demo.questions):
            show.answers(question, demo.notes[number] if demo.notes else None, number, outcomes)
    show.heading(f"A chat that goes on with the same cache, at most {demo.talk.lengths.chat} tokens an answer")
    show.chat(demo.turns, outcomes)
    show.heading("Result")
    show.results(outcomes, demo.notes)
    _show_cache(_main_outcome(outcomes))
    _draw(outcomes, demo)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all. Token by token, as a page: python -m hfkv inspect")


def _contenders(args: argparse.Namespace) -> list[Contender]:
    """The exact cache first, then the presets and the user's own config."""
    presets = args.preset or (["balanced"] if args.quick else _SHOWN)
    configs = {} if args.config and not args.preset else {name: LeanKVConfig.preset(name) for name in presets}
    if args.config:
        configs["own config"] = LeanKVConfig.from_json(args.config)
    lean = [Contender(name, partial(LeanKVCache, config)) for name, config in configs.items()]
    return [Contender(EXACT, DynamicCache), *lean]


def _document(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[Note, ...]]:
    if args.prompt_file:
        return Path(args.prompt_file).read_text(encoding="utf-8"), ()
    tokens, notes = (min(args.tokens, 600), 2) if args.quick else (args.tokens, _NOTES)
    made = next(noted_texts(tokenizer, tokens, notes, _SEED))
    return made.text, made.notes


def _check_positions(model: PreTrainedModel, talk: Talk) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = len(talk.dialogue.prompt) + talk.budget
    if limit and needed > limit:
        raise ValueError(
            f"prompt and answers need {needed} positions, the model has {limit}: use a shorter text or --tokens"
        )


def _introduce(demo: Demo) -> None:
    threads = f", {torch.get_num_threads()} threads" if demo.model.device.type == "cpu" else ""
    print(f"{demo.name}, {demo.model.dtype}, {demo.model.device}{threads}")
    notes = f", with {len(demo.notes)} made-up facts (notes) hidden in it" if demo.notes else ""
    print(f"Prompt: {len(demo.talk.dialogue.prompt)} tokens{notes}.")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is missing, so no PNG will be drawn. Install it with: {picture.PLOT_EXTRA}")


def _main_outcome(outcomes: list[Outcome]) -> Outcome:
    """The one whose cache is shown in detail: balanced, or else the last."""
    return next((outcome for outcome in outcomes if outcome.name == "balanced"), outcomes[-1])


def _show_cache(outcome: Outcome) -> None:
    show.heading(f"The cache of {outcome.name} after the prompt")
    print(outcome.report)
    if outcome.tiers:
        show.heading("Its tiers by layer (rows), head (side by side) and position")
        print(picture.terminal_picture(outcome.tiers))


def _draw(outcomes: list[Outcome], demo: Demo) -> None:
    drawn = [outcome for outcome in outcomes if picture.is_tiered(outcome.tiers)]
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return
    demo.out.mkdir(parents=True, exist_ok=True)
    show.heading("Pictures")
    for outcome in drawn:
        share = outcome.physical_bytes / outcome.exact_bytes
        title = f"{outcome.name}: {demo.name}, {outcome.prompt_tokens:,} tokens, {share:.1%} of the exact bytes"
        file = demo.out / f"tiers_{outcome.name.replace(' ', '_')}.png"
        print(f"  {picture.draw_png(outcome.tiers, file, title)}")
