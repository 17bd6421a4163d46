"""The tasks: prompts of any length made offline, what is asked of them, and what should be answered, step by step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise

from transformers import PreTrainedTokenizerBase

from hfkv.demo.measures import equal_tokens
from hfkv.demo.texts import Note, continuations, noted_texts
from hfkv.eval.score import Asked

FOLLOWING = 96
"""Tokens of real text that follow a prompt of the task `text`."""

NOTES = 8
PAIRS = 12
AWARE_QUESTIONS = 2
"""Questions per prompt where each is part of a prompt of its own."""

DIGITS = "0123456789"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Anna Boris Clara David Emma Felix Grace Henry Irene James Laura Martin Nora Oscar Peter Rosa Simon Tina
    Victor Wendy Alice Bruno Carmen Diego Elena Frank Gloria Hugo Isabel Jacob Karen Lucas Maria Nathan Olivia
    Paul Rachel Samuel Teresa Vincent Walter Adam Betty Charles Diana Edward Fiona""")
WORDS = _words("""
    tiger eagle dolphin rabbit camel horse wolf falcon turtle panda zebra lion river forest mountain garden
    castle bridge tower island apple banana cherry lemon mango orange peach pear plum grape melon window table
    chair lamp mirror carpet pillow blanket bottle basket hammer needle ladder anchor candle ribbon button
    pocket""")

_INTRODUCTION = "\n\nSo much for the documents. Now some questions about them, each answered in one sentence.\n"


@dataclass(frozen=True)
class Question:
    """As text: what is asked, how the answer begins, and its steps."""

    asked: str
    lead: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A text and its questions; for real text the tokens that follow it instead."""

    text: str
    questions: tuple[Question, ...] = ()
    context: tuple[int, ...] = ()
    following: tuple[int, ...] = ()


@dataclass(frozen=True)
class Making:
    """What a task makes its prompts from."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    seed: int
    index: int

    @property
    def rng(self) -> random.Random:
        """The same for every method and every run."""
        return random.Random(f"{self.seed} {self.index} {self.tokens}")

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def filler(self, tokens: int) -> str:
        """Documentation of about so many tokens."""
        if tokens < 1:
            raise ValueError(f"--lengths {self.tokens}: the task's own text leaves no room; use a larger length")
        stretches = continuations(self.tokenizer, tokens, 1, self.seed + 1)
        return str(self.tokenizer.decode(_nth(stretches, self).context))


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: in words, for plots.
        make: a prompt; the same for the same `Making`.
        aware: the question is part of the compressed prompt.
    """

    title: str
    make: Callable[[Making], Prompt]
    aware: bool = False


def _nth(stretches, making: Making):  # type: ignore[no-untyped-def]
    found = next(islice(stretches, making.index, None), None)
    if found is None:
        raise ValueError(f"--samples: the texts hold only {making.index} stretches of {making.tokens} tokens")
    return found


# ---- retrieval ---------------------------------------------------------------------------------------------------


def needle(making: Making) -> Prompt:
    """One note in real text."""
    return _noted(making, 1)


def notes(making: Making) -> Prompt:
    """Several notes in real text, each asked for."""
    return _noted(making, NOTES)


def _noted(making: Making, count: int) -> Prompt:
    made = _nth(noted_texts(making.tokenizer, making.tokens, count, making.seed), making)
    return Prompt(made.text + _INTRODUCTION, tuple(_about(note) for note in made.notes))


def _about(note: Note) -> Question:
    return Question(f"\n\nQuestion: {note.question}\n", f"Answer: {note.answer}", (f" {note.value}",))


def recall(making: Making) -> Prompt:
    """A list of names with numbers somewhere in real text; several of them are asked for."""
    rng = making.rng
    names = rng.sample(NAMES, PAIRS)
    numbers = [_number(rng) for _ in names]
    listed = "A list of numbers:\n" + "".join(f"{a} {b}\n" for a, b in zip(names, numbers, strict=True))
    text = _inside(making, listed, rng)
    picked = rng.sample(range(PAIRS), PAIRS // 2)
    return Prompt(text, tuple(Question("\n\nThe list again:\n", names[i], (f" {numbers[i]}",)) for i in picked))


def _number(rng: random.Random) -> str:
    return "".join(rng.choices(DIGITS, k=4))


def _inside(making: Making, own: str, rng: random.Random) -> str:
    """`own` as lines of their own somewhere in the first two thirds of documentation that fills the prompt."""
    lines = making.filler(making.tokens - making.count(own)).split("\n")
    lines.insert(rng.randrange(len(lines) * 2 // 3 + 1), own)
    return "\n".join(lines)


# ---- long answers, where one slip derails the rest ----------------------------------------------------------------


def copy(making: Making) -> Prompt:
    """Numbers that the prompt lists twice, to be listed once more."""
    rng = making.rng
    numbers = [_number(rng) for _ in range(32)]
    listed = "Numbers: " + " ".join(numbers) + "\n"
    steps = tuple(f" {number}" for number in numbers[2:])
    return Prompt(_inside(making, listed * 2, rng), (Question("\n\n", " ".join(["Numbers:", *numbers[:2]]), steps),))


def walk(making: Making) -> Prompt:
    """A map of roads from place to place, listed twice in stretches of four; a walk along them, once around."""
    rng, places, stretch = making.rng, 12, 4
    names = rng.sample(range(1000, 10000), places)
    roads = [f"{a} {b}\n" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    stretches = ["".join(roads[first : first + stretch]) for first in range(0, places, stretch)]
    start = rng.randrange(places)
    walked = roads[start:] + roads[:start]
    question = Question("\n\nRoads:\n", walked[0][:4], (walked[0][4:], *walked[1:]))
    return Prompt(_inside(making, _twice("Roads:\n", stretches, rng), rng), (question,))


def variables(making: Making) -> Prompt:
    """Chains of variables, each referring to the next and the last to a number, listed twice; followed to the end."""
    rng, chains, length = making.rng, 4, 3
    numbers = rng.sample(range(10, 100), chains * length)
    names = [f"{name} {number}" for name, number in zip(rng.sample(NAMES, chains * length), numbers, strict=True)]
    follow = [[*names[i * length : (i + 1) * length], _number(rng)] for i in range(chains)]
    lines = [[f"{a} {b}\n" for a, b in pairwise(chain)] for chain in follow]
    questions = [
        Question("\n\nVariables:\n", chain[0], (own[0][len(chain[0]) :], *own[1:]))
        for chain, own in zip(follow, lines, strict=True)
    ]
    listed = _twice("Variables:\n", ["".join(own) for own in lines], rng)
    return Prompt(_inside(making, listed, rng), tuple(questions))


def _twice(head: str, blocks: list[str], rng: random.Random) -> str:
    """The blocks under a heading, in one random order and then in another."""
    return "".join(head + "".join(rng.sample(blocks, len(blocks))) + "\n" for _ in range(2))


# ---- the whole prompt counts ---------------------------------------------------------------------------------------


def words(making: Making) -> Prompt:
    """A list of words; the three most frequent ones, which make up half of it, are asked for in order."""
    rng = making.rng
    top = rng.sample(WORDS, 3)
    rest = [word for word in WORDS if word not in top]
    per_word = making.count("".join(f"{word}\n" for word in WORDS)) / len(WORDS)
    count = max(12, int((making.tokens - 8) / per_word))
    listed = [word for word, share in zip(top, (0.25, 0.15, 0.10), strict=True) for _ in range(round(share * count))]
    listed += [rng.choice(rest) for _ in range(count - len(listed))]
    rng.shuffle(listed)
    text = "List of words:\n" + "\n".join(listed) + "\n"
    steps = tuple(f" {word}" if i == 0 else f", {word}" for i, word in enumerate(top))
    return Prompt(text, (Question("\n\n", "The most common words of the list, the most common one first:", steps),))


def real_text(making: Making) -> Prompt:
    """Documentation and the tokens that follow it."""
    made = _nth(continuations(making.tokenizer, making.tokens, FOLLOWING, making.seed), making)
    return Prompt("", (), tuple(made.context), tuple(made.following))


TEXT = "text"

TASKS = {
    "needle": Task("one note in real text, asked for after compression", needle),
    "needle-aware": Task("one note in real text, the question in the prompt", needle, aware=True),
    "notes": Task(f"{NOTES} notes in real text, asked for after compression", notes),
    "notes-aware": Task(f"{NOTES} notes in real text, the question in the prompt", notes, aware=True),
    "recall": Task(f"{PAIRS} names with numbers, asked for after compression", recall),
    "recall-aware": Task(f"{PAIRS} names with numbers, the question in the prompt", recall, aware=True),
    "variables": Task("assignments followed to their value", variables),
    "walk": Task("a walk through a map, until the first slip", walk),
    "copy": Task("numbers copied, until the first slip", copy),
    "words": Task("the most frequent words, in order", words),
    TEXT: Task("real text: agreement with the exact cache", real_text),
}


# ---- as token ids ----------------------------------------------------------------------------------------------------


def context_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokens of what is compressed, a question in the prompt not included."""
    return list(prompt.context) or tokenizer(prompt.text, verbose=False)["input_ids"]


def question_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], Asked]:
    """Tokens of what is asked, and of the answer's beginning and steps."""
    asked, so_far = _ids(tokenizer, question.asked), question.lead
    whole = _ids(tokenizer, question.lead + "".join(question.steps))
    ends = []
    for step in ("", *question.steps):
        so_far += step
        ends.append(equal_tokens(_ids(tokenizer, so_far), whole))
    steps = [whole[start:end] for start, end in pairwise(ends)]
    steps[-1] = whole[ends[-2] :]
    return asked, Asked(whole[: ends[0]], [step for step in steps if step])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
