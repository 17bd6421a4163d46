"""What the demo prints: answers side by side, the final table, headings in bold on a terminal."""

from __future__ import annotations

import math
import os
import sys
import textwrap

from hfkv.demo.contest import Outcome
from hfkv.demo.dialogue import Question
from hfkv.demo.texts import Note

_WIDTH = 118
_EXPLANATION = """
MiB, of exact: every byte held after the prompt; the share falls with its length, since every layer keeps its newest
tokens exact, in a short prompt as in a long one. notes: hidden facts whose value the answer has. KL (nats), top-1:
next-token probabilities against DynamicCache's, on the words of its first chat answer. same start: tokens of that
answer before this cache's own first differs from it. tokens/s: from the median step of the chat."""


def heading(text: str) -> None:
    """A title on a line of its own, set off from what stands above."""
    print(f"\n{_styled(text, '1;36')}")


def answers(question: Question, note: Note | None, number: int, outcomes: list[Outcome]) -> None:
    """One question with every cache's answer; with a note, whether the answer has the hidden value."""
    hidden = f"   [hidden: {note.sentence}]" if note else ""
    print(f"\n  {_styled(question.text, '1')}{_styled(hidden, '2')}")
    for outcome in outcomes:
        answer = outcome.answers[number]
        print(f"    {outcome.name:<13}{_mark(note, answer)} {_one_line(f'{question.begun} {answer}', _WIDTH - 22)}")


def chat(turns: list[str], outcomes: list[Outcome]) -> None:
    """Both chat turns, every cache's answers in full."""
    for number, turn in enumerate(turns):
        print(f"\n  {_styled(turn, '1')}")
        for outcome in outcomes:
            lines = textwrap.wrap(" ".join(outcome.chat[number].split()), _WIDTH - 20) or ["(nothing)"]
            print("\n".join(f"    {outcome.name if i == 0 else '':<13}  {line}" for i, line in enumerate(lines)))


def results(outcomes: list[Outcome], notes: tuple[Note, ...]) -> None:
    """The final table: one row per cache."""
    header = ["cache", "MiB", "of exact", "notes", "KL", "top-1", "same start", "tokens/s", "prompt s"]
    print(table(header, [_row(outcome, notes) for outcome in outcomes]))
    print(_EXPLANATION)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned, the first to the left and numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *rows]
    ]
    return "\n".join([_styled(lines[0], "1"), "-" * len(lines[0]), *lines[1:]])


def notes_found(outcome: Outcome, notes: tuple[Note, ...]) -> int:
    """How many answers contain the value that was hidden."""
    return sum(note.value in answer for note, answer in zip(notes, outcome.answers, strict=True))


def _row(outcome: Outcome, notes: tuple[Note, ...]) -> list[str]:
    close = outcome.agreement
    return [
        outcome.name,
        f"{outcome.physical_bytes / 2**20:.1f}",
        f"{outcome.physical_bytes / outcome.exact_bytes:.1%}",
        f"{notes_found(outcome, notes)}/{len(notes)}" if notes else "-",
        f"{close.kl:.4f}" if close else "-",
        f"{close.top1:.1%}" if close else "-",
        f"{outcome.equal_tokens}/{close.tokens}" if close else "-",
        "-" if math.isnan(outcome.tokens_per_second) else f"{outcome.tokens_per_second:.1f}",
        f"{outcome.prompt_seconds:.1f}",
    ]


def _mark(note: Note | None, answer: str) -> str:
    if note is None:
        return " "
    return _styled("+", "1;32") if note.value in answer else _styled("-", "1;31")


def _one_line(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" ...") or "(nothing)"


def _styled(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if text and sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
