"""Real text for the demo and the benchmarks: documentation of the standard library, and notes hidden in it."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from transformers import PreTrainedTokenizerBase


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MODULES = _words("""
    argparse logging subprocess typing statistics decimal pathlib collections difflib string textwrap random asyncio
    unittest datetime fractions functools itertools json csv zipfile tarfile threading socket inspect ast calendar
    configparser contextlib email.message gettext heapq http.client imaplib ipaddress locale mailbox multiprocessing
    optparse pdb pickle pprint queue sched selectors shelve shlex shutil smtplib sqlite3 ssl struct tempfile timeit
    traceback urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree zlib""")

_CITIES = _words(
    "Oslo Lima Rome Bern Cairo Delhi Paris Tokyo Seoul Quito Accra Lagos Tunis Dakar Minsk Riga Doha Madrid"
)
_COLOURS = _words("red blue green yellow purple orange black white silver golden brown pink")
_PEOPLE = _words("Anna Boris Clara David Emma Felix Grace Henry Irene James Laura Martin Nora Oscar Peter Rosa")
_FRUITS = _words("apple banana cherry lemon mango orange peach pear plum grape melon coconut")
_ANIMALS = _words("tiger eagle dolphin rabbit camel horse wolf falcon turtle panda zebra lion")


@dataclass(frozen=True)
class Continuation:
    """A text cut in two: token ids to compress, and token ids that follow them."""

    context: list[int]
    following: list[int]


@dataclass(frozen=True)
class Note:
    """One fact hidden in a text, and how to ask for it: `answer` ends where `value` begins."""

    sentence: str
    question: str
    answer: str
    value: str


@dataclass(frozen=True)
class NotedText:
    """A text with notes in it, each on a line of its own."""

    text: str
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class _NoteKind:
    sentences: tuple[str, ...]
    question: str
    answer: str
    keys: tuple[str, ...]
    values: tuple[str, ...] | int  # words to choose from, or the number of digits

    def draw(self, key: str, rng: random.Random) -> Note:
        value = (
            "".join(rng.choices("0123456789", k=self.values))
            if isinstance(self.values, int)
            else rng.choice(self.values)
        )
        sentence = rng.choice(self.sentences).format(key=key, value=value)
        return Note(sentence, self.question.format(key=key), self.answer.format(key=key), value)


_KINDS = (
    _NoteKind(
        ("The secret code of {key} is {value}.", "Remember that the secret code of {key} is {value}."),
        "What is the secret code of {key}?",
        "The secret code of {key} is",
        _CITIES,
        4,
    ),
    _NoteKind(
        ("The {key} door opens with the number {value}.", "Note: the {key} door opens with the number {value}."),
        "Which number opens the {key} door?",
        "The {key} door opens with the number",
        _COLOURS,
        3,
    ),
    _NoteKind(
        ("The favourite fruit of {key} is the {value}.", "By the way, the favourite fruit of {key} is the {value}."),
        "What is the favourite fruit of {key}?",
        "The favourite fruit of {key} is the",
        _PEOPLE,
        _FRUITS,
    ),
    _NoteKind(
        ("The password of {key} is {value}.", "It was agreed that the password of {key} is {value}."),
        "What is the password of {key}?",
        "The password of {key} is",
        _PEOPLE,
        _ANIMALS,
    ),
    _NoteKind(
        ("{key} lives in {value}.", "The records say that {key} lives in {value}."),
        "Where does {key} live?",
        "{key} lives in",
        _PEOPLE,
        _CITIES,
    ),
)


@cache
def documentation() -> str:
    """The docstrings of a fixed list of standard modules, in their order of definition, each text once (about 1 MB)."""
    return "\n\n".join(dict.fromkeys(doc for name in _MODULES for doc in _docstrings(name)))


def continuations(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, new_tokens: int, seed: int
) -> Iterator[Continuation]:
    """Stretches of documentation that do not overlap, of `context_tokens` and the `new_tokens` that follow."""
    ids = _documentation_ids(tokenizer)
    for start in _starts(len(ids), context_tokens + new_tokens, random.Random(seed)):
        middle = start + context_tokens
        yield Continuation(ids[start:middle], ids[middle : middle + new_tokens])


def noted_texts(tokenizer: PreTrainedTokenizerBase, tokens: int, notes: int, seed: int) -> Iterator[NotedText]:
    """Stretches of documentation of about `tokens` tokens that do not overlap, each with `notes` notes hidden in it."""
    rng = random.Random(seed)
    ids = _documentation_ids(tokenizer)
    for start in _starts(len(ids), tokens, rng):
        drawn = draw_notes(notes, rng)
        room = tokens - sum(len(tokenizer(note.sentence)["input_ids"]) for note in drawn)
        if room < tokens // 2:
            raise ValueError(
                f"{notes} notes leave {room} of {tokens} tokens for text: ask for fewer notes or more tokens"
            )
        yield NotedText(_hide(str(tokenizer.decode(ids[start : start + room])), drawn, rng), drawn)


def draw_notes(count: int, rng: random.Random) -> tuple[Note, ...]:
    """`count` notes of changing kinds; no two share a kind and a key, so every question has one answer."""
    pairs = [(kind, key) for kind in _KINDS for key in kind.keys]
    if not 0 < count <= len(pairs):
        raise ValueError(f"notes={count}: at most {len(pairs)} different notes can be drawn, and at least 1")
    return tuple(kind.draw(key, rng) for kind, key in rng.sample(pairs, count))


def _hide(text: str, notes: tuple[Note, ...], rng: random.Random) -> str:
    """Each note on a line of its own in the first nine tenths, so that no recent window holds it."""
    lines = text.split("\n")
    for note in notes:
        lines.insert(rng.randrange(len(lines) * 9 // 10 + 1), note.sentence)
    return "\n".join(lines)


def _docstrings(module: str) -> Iterator[str]:
    """Docstrings of fair length: of what the module holds, and of the methods of its classes."""
    for item in vars(importlib.import_module(module)).values():
        members = list(vars(item).values()) if inspect.isclass(item) else []
        for documented in [item, *members]:
            doc = getattr(documented, "__doc__", None)
            if isinstance(doc, str) and 80 < len(doc) < 3000:
                yield inspect.cleandoc(doc)


@lru_cache(maxsize=2)
def _documentation_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(documentation(), add_special_tokens=False, verbose=False)["input_ids"]


def _starts(length: int, width: int, rng: random.Random) -> list[int]:
    """Starts of all stretches of `width` side by side, from a random offset, in random order."""
    if not 0 < width <= length:
        raise ValueError(
            f"a text of {width} tokens: it must have at least 1 and at most {length}, which is all there is"
        )
    offset = rng.randrange(length % width + 1)
    starts = list(range(offset, length - width + 1, width))
    rng.shuffle(starts)
    return starts
