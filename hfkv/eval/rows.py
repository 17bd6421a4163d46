"""Measurements kept as they are made, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

Key = dict[str, Any]


class Rows:
    """A JSON-lines file of measurements, each under a key of its own; the last one of a key counts."""

    def __init__(self, path: Path):
        self._path = path
        self._measured: dict[str, Key] = {}
        if path.exists():
            self._read(path.read_text(encoding="utf-8"))

    def _read(self, text: str) -> None:
        lines = text.split("\n")  # what follows the last line break was never finished
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
                self._measured[_text(row["key"])] = row["measured"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}, line {number} is no measurement: remove it, or use --fresh") from error
        if lines[-1]:
            self._path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._measured.get(_text(key))

    def add(self, key: Key, measured: dict[str, Any]) -> None:
        self._measured[_text(key)] = measured
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "measured": measured}) + "\n")


def merge_csv(path: Path, rows: list[dict[str, Any]], by: tuple[str, ...]) -> None:
    """Write rows into a table: those with the same values in the columns `by` are replaced, others stay."""
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            table = {tuple(row[column] for column in by): row for row in csv.DictReader(file)}
    table |= {tuple(str(row[column]) for column in by): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
