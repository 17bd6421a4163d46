"""The goals that the project has set itself, judged on the measured rows."""

from __future__ import annotations

from dataclasses import dataclass

from hfkv.bench import decode, flush, generate, prompt
from hfkv.bench.caches import DYNAMIC, GRAPHS, LEAN
from hfkv.bench.results import LARGEST, OK, Row, number

COPY_SHARE = 0.80
COPY_SHARE_FROM = 64 * 1024
SPEEDUP_AT = (32 * 1024, 8)
SPEEDUP = {"k8v4": 2.1, "k4v2": 3.8}
SMALL = (1024, 1)
PROMPT_FROM, PROMPT_OVERHEAD = 8 * 1024, 0.02
FLUSH_SHARE = 0.01
LARGEST_AT, LARGEST_SPEEDUP = 16 * 1024, 3.0
SINGLE_BEYOND = 4 * 1024


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured for it.

    Attributes:
        text: what shall hold.
        measured: the figure in words; empty where there is none.
        reached: None where nothing was measured.
    """

    text: str
    measured: str = ""
    reached: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "reached", False: "not reached", None: "not measured"}[self.reached]


def judge(rows: list[Row]) -> list[Goal]:
    """All goals, for the rows of one machine."""
    good = [row for row in rows if row["status"] == OK]
    parts = {name: [r for r in good if r["part"] == name] for name in ("decode", "prompt", "flush", "generate")}
    return [
        *_copy_share(parts[decode.PART]),
        *_speedups(parts[decode.PART]),
        *_prompt(parts[prompt.PART]),
        _flush(parts[flush.PART]),
        *_largest(parts[generate.PART]),
        *_single(parts[generate.PART]),
    ]


def best_reference(rows: list[Row], row: Row) -> Row | None:
    """The fastest exact attention at a row's shape, length and batch, launched as the row was."""
    same = [r for r in rows if r["cache"] in decode.REFERENCES and r["status"] == OK and _point(r) == _point(row)]
    return min(same, key=lambda r: milliseconds(r, row["launch"]), default=None)


def speedup(rows: list[Row], row: Row) -> float | None:
    """How many times faster than the best reference."""
    reference = best_reference(rows, row)
    return None if reference is None else milliseconds(reference, row["launch"]) / float(row["ms"])


def milliseconds(row: Row, launch: str) -> float:
    """A row's time under a way of launching; its own best where it was not timed so."""
    return float(row["eager_ms"] if launch == "eager" and row["eager_ms"] else row["ms"])


def _point(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("q_heads", "kv_heads", "head_dim", "tokens", "batch"))


def _at(row: Row) -> tuple[int, int]:
    return int(row["tokens"]), int(row["batch"])


def _shape(row: Row) -> str:
    return f"{row['q_heads']}/{row['kv_heads']} x {row['head_dim']}"


def _copy_share(rows: list[Row]) -> list[Goal]:
    goals = []
    for name in LEAN:
        text = f"{name} decode: {COPY_SHARE:.0%} of the copy bandwidth from {COPY_SHARE_FROM:,} tokens in all"
        own = [r for r in rows if r["cache"] == name and int(r["tokens"]) * int(r["batch"]) >= COPY_SHARE_FROM]
        if not own:
            goals.append(Goal(text))
            continue
        least = min(own, key=lambda r: float(r["copy_share"]))
        share = float(least["copy_share"])
        where = f"{least['tokens']} x {least['batch']}, {_shape(least)}"
        goals.append(Goal(text, f"{share:.1%} at least, of {len(own)} ({where})", share >= COPY_SHARE))
    return goals


def _speedups(rows: list[Row]) -> list[Goal]:
    wanted = [(name, SPEEDUP_AT, factor) for name, factor in SPEEDUP.items()]
    wanted += [(name, SMALL, 1.0) for name in SPEEDUP]
    goals = []
    for name, (tokens, batch), factor in wanted:
        text = f"{name} decode: {factor}x the best exact attention at {tokens} x {batch}"
        own = [r for r in rows if r["cache"] == name and _at(r) == (tokens, batch)]
        found = [(speedup(rows, r), r) for r in own]
        known = [(s, r) for s, r in found if s is not None]
        if not known:
            goals.append(Goal(text))
        for value, row in known:
            reference = best_reference(rows, row)
            assert reference is not None
            said = f"{value:.2f}x ({_shape(row)}, against {reference['cache']}, {row['launch']})"
            goals.append(Goal(text, said, value >= factor))
    return goals


def _prompt(rows: list[Row]) -> list[Goal]:
    text = f"prompt: at most {PROMPT_OVERHEAD:.0%} over the exact cache from {PROMPT_FROM:,} tokens"
    timed = [
        (float(r["ms"]) / float(r["reference_ms"]) - 1, r)
        for r in rows
        if r["cache"] in LEAN and r["ms"] and int(r["tokens"]) >= PROMPT_FROM
    ]
    goals = [Goal(text)]
    if timed:
        worst, row = max(timed, key=lambda pair: pair[0])
        goals = [Goal(text, f"{worst:+.1%} at most ({row['cache']}, {row['tokens']} tokens)", worst <= PROMPT_OVERHEAD)]
    return [*goals, *_peaks(rows)]


def _peaks(rows: list[Row]) -> list[Goal]:
    """Peak above a forward without a cache, against packed bytes and two layers of exact keys and values."""
    text = "prompt peak: at most the packed bytes and two exact layers above a forward without a cache"
    bare = {r["tokens"]: number(r, "peak_bytes") for r in rows if r["cache"] == prompt.NO_CACHE}
    goals = []
    for row in rows:
        peak, base = number(row, "peak_bytes"), bare.get(row["tokens"])
        if row["cache"] not in LEAN or peak is None or base is None:
            continue
        allowed = float(row["physical_bytes"]) + 2 * float(row["exact_bytes"]) / int(row["layers"])
        said = f"{(peak - base) / 2**20:.0f} of {allowed / 2**20:.0f} MiB ({row['cache']}, {row['tokens']} tokens)"
        goals.append(Goal(text, said, peak - base <= allowed))
    return goals or [Goal(text)]


def _flush(rows: list[Row]) -> Goal:
    text = f"flush: at most {FLUSH_SHARE:.0%} of decode time"
    if not rows:
        return Goal(text)
    worst = max(rows, key=lambda r: float(r["flush_share"]))
    said = f"{float(worst['flush_share']):.2%} at most ({worst['cache']}, {worst['tokens']} x {worst['batch']})"
    return Goal(text, said, float(worst["flush_share"]) <= FLUSH_SHARE)


def _largest(rows: list[Row]) -> list[Goal]:
    text = f"generate at {LARGEST_AT:,} tokens: {LARGEST_SPEEDUP:.0f}x DynamicCache, each at its largest batch"
    at = [r for r in rows if r["batch"] == LARGEST and int(r["tokens"]) == LARGEST_AT]
    return _against_dynamic(text, at, LARGEST_SPEEDUP)


def _single(rows: list[Row]) -> list[Goal]:
    text = f"generate at batch 1: never slower than DynamicCache beyond {SINGLE_BEYOND:,} tokens"
    at = [r for r in rows if r["batch"] == "1" and int(r["tokens"]) > SINGLE_BEYOND]
    return _against_dynamic(text, at, 1.0)


def _against_dynamic(text: str, rows: list[Row], factor: float) -> list[Goal]:
    exact = {r["tokens"]: r for r in rows if r["cache"] == DYNAMIC}
    goals = []
    for row in rows:
        if row["cache"] not in (*LEAN, *GRAPHS) or row["tokens"] not in exact:
            continue
        ratio = float(row["tokens_per_second"]) / float(exact[row["tokens"]]["tokens_per_second"])
        batches = f"batch {row['sequences']} against {exact[row['tokens']]['sequences']}"
        goals.append(Goal(text, f"{ratio:.2f}x ({row['cache']}, {row['tokens']} tokens, {batches})", ratio >= factor))
    return goals or [Goal(text)]
