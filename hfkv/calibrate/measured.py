"""Measurements kept as they are made, so that an interrupted calibration goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path


class Measured:
    """Numbers by key, in memory and, with a path, in a JSON-lines file.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._numbers: dict[str, float] = {}
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                self._read(line)
            if text and not text.endswith("\n"):  # a run that was stopped while writing
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def get(self, *key: object) -> float | None:
        return self._numbers.get(_text(key))

    def add(self, number: float, *key: object) -> float:
        self._numbers[_text(key)] = number
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([_text(key), number]) + "\n")
        return number

    def _read(self, line: str) -> None:
        try:
            key, number = json.loads(line)
            self._numbers[str(key)] = float(number)
        except (TypeError, ValueError) as error:
            if line.endswith("]"):
                raise ValueError(
                    f"{self._path} does not hold measurements of a calibration: remove it, or give another --out"
                ) from error


def _text(key: tuple[object, ...]) -> str:
    return " | ".join(map(str, key))
