"""The one CSV of the benchmark: kept after every cell, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkv.bench.sizes import Shape

KEY = ("part", "machine", "dtype", "cache", "q_heads", "kv_heads", "head_dim", "layers", "tokens", "batch", "step")
MEASURED = (
    "status",
    "sequences",
    "ms",
    "launch",
    "eager_ms",
    "mean_ms",
    "reference_ms",
    "tokens_per_second",
    "physical_bytes",
    "exact_bytes",
    "read_bytes",
    "gbps",
    "copy_gbps",
    "copy_share",
    "peak_bytes",
    "held_bytes",
    "flush_ms",
    "flush_share",
    "backend",
    "torch",
    "hfkv",
    "note",
)
COLUMNS = KEY + MEASURED

OK, NO_MEMORY, STOPPED = "ok", "out of memory", "stopped by the budget"
LARGEST = "largest"
"""`batch` of a cell that looks for the largest batch that fits; `sequences` holds what was found."""

Row = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One measurement: a cache (or a reference) at a shape, a length and a batch.

    Attributes:
        last_step: for a cell of several rows, the step of its last one.
    """

    part: str
    cache: str
    shape: Shape
    layers: int
    tokens: int
    batch: int | str
    last_step: int | None = None


class Results:
    """All rows measured so far, by key; every `add` writes the file anew."""

    def __init__(self, path: Path, machine: str, dtype: str) -> None:
        self._path, self._machine, self._dtype = path, machine, dtype
        self._rows: dict[tuple[str, ...], Row] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise ValueError(f"{path} has other columns than this version writes: move it away, or use --fresh")
                self._rows = {tuple(row[name] for name in KEY): row for row in reader}

    @property
    def rows(self) -> list[Row]:
        """The rows of this machine and dtype."""
        return [r for r in self._rows.values() if r["machine"] == self._machine and r["dtype"] == self._dtype]

    def finished(self, cell: Cell) -> bool:
        """Whether a cell need not be measured again: it was, or it does not fit this machine's memory."""
        keys = (self._key(cell, cell.last_step), self._key(cell, None))
        return any(self._rows[key]["status"] in (OK, NO_MEMORY) for key in keys if key in self._rows)

    def tried(self, cell: Cell) -> bool:
        """Whether there is a row of the cell, whatever it says."""
        return any(self._key(cell, step) in self._rows for step in (None, cell.last_step))

    def add(self, cell: Cell, rows: list[dict[str, Any]]) -> None:
        """Put a cell's rows in the place of what is known of it."""
        old = self._key(cell, None)[:-1]
        self._rows = {key: row for key, row in self._rows.items() if key[:-1] != old}
        for measured in rows:
            unknown = set(measured) - set(MEASURED) - {"step"}
            assert not unknown, f"columns that the CSV does not have: {unknown}"
            key = self._key(cell, measured.get("step"))
            self._rows[key] = dict(zip(KEY, key, strict=True)) | {n: _text(measured.get(n)) for n in MEASURED}
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows.values())
        os.replace(temporary, self._path)

    def _key(self, cell: Cell, step: int | None) -> tuple[str, ...]:
        shape = cell.shape
        values = (cell.part, self._machine, self._dtype, cell.cache, shape.q_heads, shape.kv_heads, shape.head_dim)
        return tuple(_text(x) for x in (*values, cell.layers, cell.tokens, cell.batch, step))


def number(row: Row, column: str) -> float | None:
    """A measured number, or None where there is none."""
    return float(row[column]) if row.get(column) else None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
