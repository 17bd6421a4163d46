"""The committed docs/compatibility.md says what the code does, in a sample of its cells."""

from __future__ import annotations

import re

import pytest
import transformers
from compatibility import FILE, MODES, NAMES, cell

SAMPLE = [(name, list(MODES)[(3 * i + j) % len(MODES)]) for i, name in enumerate(NAMES) for j in (0, 6)]


def tables() -> dict[str, dict[tuple[str, str], str]]:
    """Version of transformers -> (family, mode) -> cell."""
    found = {}
    for part in re.split(r"^## transformers ", FILE.read_text(), flags=re.M)[1:]:
        rows = [[x.strip() for x in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        cells = {(row[0], mode): x for row in rows[2:] for mode, x in zip(rows[0][1:], row[1:], strict=True)}
        found[part.split()[0]] = cells
    return found


def test_oldest_and_newest_are_there_and_exact_is_exact() -> None:
    made = tables()
    assert {"5.15.0", "5.23.0"} <= set(made)
    for cells in made.values():
        assert {mode for _, mode in cells} == {*MODES, "logits"}
        for (name, mode), text in cells.items():
            if mode == "logits":
                assert float(text.split("%")[0]) < 10, name
            else:
                assert text.startswith(("= / ", "—")), (name, mode, text)


@pytest.mark.skipif(transformers.__version__ not in tables(), reason="the table was not made for this transformers")
@pytest.mark.parametrize(("name", "mode"), SAMPLE)
def test_cells_are_what_the_code_gives(name: str, mode: str) -> None:
    committed = tables()[transformers.__version__][name, mode]
    now = cell(name, mode)
    if committed.startswith("—"):
        assert now["dynamic"] != "="
    else:
        assert [now["exact"], now["k8v4"]] == committed.split(" / ")[:2]
