"""From kept results to rows: one per task, length and method; the CSV, the tables, and who is above whom."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkv.bench.tables import aligned
from hfkv.eval.methods import EXACT, OURS, Method
from hfkv.eval.study import Cell, Study
from hfkv.eval.tasks import TASKS, TEXT
from hfkv.version import __version__

COLUMNS = (
    "model",
    "dtype",
    "task",
    "asked",
    "tokens",
    "method",
    "family",
    "share",
    "score",
    "score_all",
    "exact_score",
    "counted",
    "steps",
    "questions",
    "samples",
    "kl",
    "top1",
    "perplexity",
    "exact_perplexity",
    "diverges",
    "seed",
    "hfkv",
)

BEST_SHARE, LEAST_SHARE = 0.5, 0.125
"""Shares of the bytes between which curves are held against each other: 2x to 8x."""

Row = dict[str, Any]


def rows_of(study: Study, tasks: list[str], lengths: list[int], samples: int, methods: list[Method]) -> Iterator[Row]:
    """A row per task, length and method, over the prompts that all the methods measured there have finished.

    A method with at most half of the most prompts does not count for that and stands on its own, as `samples` says.
    """
    for task in tasks:
        for tokens in lengths:
            found = {
                method: {
                    sample: result
                    for sample in range(samples)
                    if (result := study.result(Cell(task, tokens, sample, method))) is not None
                }
                for method in methods
            }
            exact = next((results for method, results in found.items() if method.name == EXACT), {})
            most = max(map(len, found.values()))
            common = set(exact).intersection(*(results for results in found.values() if 2 * len(results) > most))
            for method, results in found.items():
                own = sorted(common & set(results))
                if own:
                    key = study.key(Cell(task, tokens, 0, method))
                    yield _row(key, method, [results[i] for i in own], [exact[i] for i in own])


def _row(key: dict[str, Any], method: Method, results: list[Row], exact: list[Row]) -> Row:
    task = key["task"]
    asked = "" if task == TEXT else "before" if TASKS[task].aware else "after"
    row = {name: key[name] for name in ("model", "dtype", "task", "tokens", "method", "seed")}
    row |= {"asked": asked, "family": method.family, "samples": len(results), "share": _share(results)}
    row |= _fidelity(results, exact) if task == TEXT else _scores(results, exact)
    return row | {"hfkv": __version__}


def _share(results: list[Row]) -> float:
    measured = [result for result in results if "physical" in result]
    exact = sum(result["exact"] for result in measured)
    return sum(result["physical"] for result in measured) / exact if exact else math.nan


def _scores(results: list[Row], exact: list[Row]) -> Row:
    """Steps count only as far as the exact cache gets; `score_all` and `exact_score` are over all that were asked."""
    right = [n for result in results for n in result["right"]]
    steps = [n for result in results for n in result["steps"]]
    reached = [n for result in exact for n in result["right"]]
    counted = sum(reached)
    together = sum(min(own, most) for own, most in zip(right, reached, strict=True))
    return {
        "score": together / counted if counted else math.nan,
        "score_all": sum(right) / sum(steps),
        "exact_score": counted / sum(steps),
        "counted": counted,
        "steps": sum(steps),
        "questions": len(steps),
    }


def _fidelity(results: list[Row], exact: list[Row]) -> Row:
    tokens = sum(result["tokens"] for result in results)

    def mean(name: str, of: list[Row]) -> float:
        return sum(result[name] * result["tokens"] for result in of) / tokens

    return {
        "steps": tokens,
        "kl": mean("kl", results),
        "top1": mean("top1", results),
        "perplexity": math.exp(mean("nll", results)),
        "exact_perplexity": math.exp(mean("nll", exact)),
        "diverges": sum(result["diverges"] for result in results) / len(results),
    }


def write_csv(path: Path, rows: list[Row]) -> None:
    """The whole table, in one go."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    os.replace(temporary, path)


def show(rows: list[Row]) -> str:
    """A table per task and length, each under its title."""
    parts = []
    for task, tokens in dict.fromkeys((row["task"], row["tokens"]) for row in rows):
        own = sorted((r for r in rows if (r["task"], r["tokens"]) == (task, tokens)), key=lambda r: -r["share"])
        columns = _TEXT_COLUMNS if task == TEXT else _COLUMNS
        lines = [[form.format(**row, smaller=1 / row["share"]) for form in columns.values()] for row in own]
        head = f"{task}, {tokens} tokens: {TASKS[task].title}"
        parts.append(f"{head}\n{aligned(list(columns), lines)}")
    return "\n\n".join(parts)


_PLACE = {"method": "{method}", "of exact": "{share:.3f}", "smaller": "{smaller:.2f}x"}
_COLUMNS = _PLACE | {
    "score": "{score:.1%}",
    "of all": "{score_all:.1%}",
    "exact of all": "{exact_score:.1%}",
    "counted": "{counted}/{steps}",
    "prompts": "{samples}",
}
_TEXT_COLUMNS = _PLACE | {
    "KL": "{kl:.4f}",
    "top-1": "{top1:.1%}",
    "perplexity": "{perplexity:.3f}",
    "exact": "{exact_perplexity:.3f}",
    "diverges after": "{diverges:.1f}",
    "prompts": "{samples}",
}


@dataclass(frozen=True)
class Verdict:
    """A peer's point, and the best of ours that takes no more bytes (None: none of ours is that small)."""

    peer: Row
    ours: Row | None

    @property
    def reached(self) -> bool:
        return self.ours is not None and quality(self.ours) >= quality(self.peer)


def quality(row: Row) -> float:
    """What is better the larger it is: the score, or the negative KL."""
    value = -row["kl"] if row["task"] == TEXT else row["score"]
    return -math.inf if math.isnan(value) else value


def frontier(rows: list[Row]) -> list[Row]:
    """The points that no other one reaches with fewer bytes, by share: the curve of a family."""
    best, found = -math.inf, []
    for row in sorted(rows, key=lambda r: (r["share"], -quality(r))):
        if quality(row) > best:
            best = quality(row)
            found.append(row)
    return found


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Every peer's point from 2x to 8x, against the best of ours at no more bytes on the same prompts."""
    found = []
    for peer in rows:
        if peer["family"] in OURS or not LEAST_SHARE <= peer["share"] <= BEST_SHARE:
            continue
        same = (r for r in rows if all(r[name] == peer[name] for name in ("task", "tokens", "samples")))
        ours = [r for r in same if r["family"] in OURS and r["share"] <= peer["share"]]
        found.append(Verdict(peer, max(ours, key=quality, default=None)))
    return found


def show_verdicts(found: list[Verdict]) -> str:
    """How many points of the peers are reached, and those that are not."""
    above = sum(verdict.reached for verdict in found)
    lines = [f"At no more bytes, 2x to 8x, ours is on or above {above} of {len(found)} points of the peers."]
    for verdict in (v for v in found if not v.reached):
        peer, ours = verdict.peer, verdict.ours
        held = "none of ours is that small" if ours is None else f"{ours['method']} {_point(ours)}"
        lines.append(f"  below: {peer['task']}, {peer['tokens']} tokens, {peer['method']} {_point(peer)}; {held}")
    return "\n".join(lines)


def _point(row: Row) -> str:
    value = f"KL {row['kl']:.4f}" if row["task"] == TEXT else f"{row['score']:.1%}"
    return f"{value} at {row['share']:.3f}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return str(value)
