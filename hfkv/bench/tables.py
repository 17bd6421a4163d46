"""The rows as tables to read: one per part, and the goals."""

from __future__ import annotations

import re
from collections.abc import Callable

from hfkv.bench import decode, flush, generate, goals, long, packs, prompt
from hfkv.bench.goals import Goal
from hfkv.bench.results import LARGEST, OK, Row, number

_NUMBER = re.compile(r"-|[-+]?[\d,.]+[%x]?")

Columns = dict[str, Callable[[Row], str]]


def show(part: str, rows: list[Row]) -> str:
    """The table of one part, from the rows of one machine; below it what could not be measured, and why."""
    own = [row for row in rows if row["part"] == part]
    own.sort(key=lambda r: (-int(r["head_dim"]), int(r["tokens"]), r["batch"].zfill(8), int(r["step"] or 0)))
    good = [row for row in own if row["status"] == OK]
    columns = _places(good) | _columns(part, good)
    text = aligned(list(columns), [[cell(row) for cell in columns.values()] for row in good]) if good else ""
    return "\n".join([text, *_missing([row for row in own if row["status"] != OK])])


def show_goals(found: list[Goal]) -> str:
    """Every goal with its verdict."""
    return aligned(["goal", "measured", ""], [[goal.text, goal.measured or "-", goal.verdict] for goal in found])


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned, those of numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numbers = {i for i in range(len(header)) if all(_NUMBER.fullmatch(row[i]) for row in rows)}
    text = [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _places(rows: list[Row]) -> Columns:
    """What a row is about; the heads only where they differ."""
    heads: Columns = {"heads": _heads} if len({_heads(row) for row in rows}) > 1 else {}
    return {"cache": lambda r: r["cache"]} | heads | {"tokens": lambda r: r["tokens"], "batch": _batch}


def _heads(row: Row) -> str:
    return f"{row['q_heads']}/{row['kv_heads']} x {row['head_dim']}"


def _batch(row: Row) -> str:
    return f"largest: {row['sequences']}" if row["batch"] == LARGEST else row["batch"]


def _missing(rows: list[Row]) -> list[str]:
    """What was not measured, one line per cache and reason."""
    places: dict[str, list[str]] = {}
    for row in rows:
        said = f"{row['cache']}: {row['status']}" + (f", {row['note']}" if row["note"] else "")
        places.setdefault(said, []).append(f"{row['tokens']} x {row['batch']}")
    return [f"{said} (at {', '.join(dict.fromkeys(at))})" for said, at in places.items()]


def _columns(part: str, rows: list[Row]) -> Columns:
    common: Columns = {"ms": _figure("ms", "{:.3f}")}
    if part in (decode.PART, packs.PART):
        best: Columns = {"best exact": lambda r: _times(goals.speedup(rows, r))} if part == decode.PART else {}
        return common | {
            "launch": lambda r: r["launch"],
            "from Python": _figure("eager_ms", "{:.3f}"),
            "MiB": _mib("physical_bytes"),
            "of exact": _ratio("physical_bytes", "exact_bytes"),
            "GB/s": _figure("gbps", "{:.1f}"),
            "of copy": _figure("copy_share", "{:.1%}"),
            **best,
        }
    if part == prompt.PART:
        return common | {
            "DynamicCache ms": _figure("reference_ms", "{:.3f}"),
            "overhead": _overhead,
            "peak MiB": _mib("peak_bytes"),
            "held MiB": _mib("physical_bytes"),
            "of exact": _ratio("physical_bytes", "exact_bytes"),
        }
    if part == flush.PART:
        return common | {
            "flush ms": _figure("flush_ms", "{:.3f}"),
            "of decode": _figure("flush_share", "{:.2%}"),
            "MiB": _mib("physical_bytes"),
        }
    if part == generate.PART:
        return (
            {"tokens/s": _figure("tokens_per_second", "{:.1f}")}
            | common
            | {
                "launch": lambda r: r["launch"],
                "cache MiB": _mib("physical_bytes"),
                "of exact": _ratio("physical_bytes", "exact_bytes"),
                "DynamicCache": lambda r: _times(_to_dynamic(rows, r)),
                "note": lambda r: r["note"] or "-",
            }
        )
    assert part == long.PART
    return (
        {"generated": lambda r: r["step"]}
        | common
        | {
            "mean ms": _figure("mean_ms", "{:.3f}"),
            "cache MiB": _mib("physical_bytes"),
            "of exact": _ratio("physical_bytes", "exact_bytes"),
            "device MiB": _mib("held_bytes"),
        }
    )


def _figure(column: str, form: str) -> Callable[[Row], str]:
    return lambda row: form.format(value) if (value := number(row, column)) is not None else "-"


def _mib(column: str) -> Callable[[Row], str]:
    return lambda row: f"{value / 2**20:.2f}" if (value := number(row, column)) is not None else "-"


def _ratio(above: str, below: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        a, b = number(row, above), number(row, below)
        return "-" if a is None or not b else f"{a / b:.3f}"

    return text


def _overhead(row: Row) -> str:
    own, reference = number(row, "ms"), number(row, "reference_ms")
    return "-" if own is None or not reference else f"{own / reference - 1:+.1%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _to_dynamic(rows: list[Row], row: Row) -> float | None:
    """Tokens per second over DynamicCache's at the same context and batch (or each one's largest)."""
    for other in rows:
        same = other["tokens"] == row["tokens"] and other["batch"] == row["batch"]
        if same and other["cache"] == generate.DYNAMIC and other["status"] == OK:
            return float(row["tokens_per_second"]) / float(other["tokens_per_second"])
    return None
