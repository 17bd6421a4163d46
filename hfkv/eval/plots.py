"""One Pareto plot per task: share of physical bytes on x, score on y, one curve per family of methods.

A curve joins a family's best points; those that another one of the family beats with no more bytes are hollow. Methods
measured on fewer prompts than the exact cache are in the CSV alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hfkv.eval.methods import EXACT, KEPT, OURS, OWN, PAPER, PRUNED
from hfkv.eval.table import Row, frontier, quality
from hfkv.eval.tasks import TASKS, TEXT

INK = {
    KEPT: "#1f5fa8",
    PRUNED: "#2a9d8f",
    OWN: "#7b4ea3",
    PAPER: "#c8553d",
    "KIVI": "#d9a441",
    "QuantizedCache, quanto": "#8f6a1f",
    "QuantizedCache, hqq": "#b06fa8",
    "QuantizedCache, fp8": "#555555",
    "SnapKV": "#6b8e23",
    "H2O": "#888888",
}
TICKS = (0.1, 0.125, 0.2, 0.25, 0.33, 0.5, 1.0)


def available() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: list[Row], task: str, folder: Path, stem: str) -> list[Path]:
    """Write `<stem>_<task>.png` and `.svg`; rows of other tasks are left out."""
    from matplotlib.figure import Figure

    own = [row for row in rows if row["task"] == task and quality(row) > -float("inf")]
    lengths = sorted({row["tokens"] for row in own if row["family"] in INK})
    if not lengths:
        return []
    figure = Figure(figsize=(1.6 + 5.4 * len(lengths), 5.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for panel, tokens in zip(panels, lengths, strict=True):
        _panel(panel, [row for row in own if row["tokens"] == tokens], task)
    panels[0].set_ylabel("KL from the exact cache, nats (up is better)" if task == TEXT else "score")
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3 * len(lengths),
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(f"{Path(own[0]['model']).name}: {TASKS[task].title}", fontsize=11)
    paths = [folder / f"{stem}_{task}{suffix}" for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _panel(panel: Any, rows: list[Row], task: str) -> None:
    from matplotlib.ticker import NullFormatter

    column = "kl" if task == TEXT else "score"
    of = next(row for row in rows if row["method"] == EXACT)
    rows = [row for row in rows if row["samples"] == of["samples"]]
    for family in (name for name in INK if any(row["family"] == name for row in rows)):
        own = [row for row in rows if row["family"] == family]
        curve, ours = frontier(own), family in OURS
        style = {"color": INK[family], "marker": "o" if ours else "s", "ms": 5}
        panel.plot([r["share"] for r in own], [r[column] for r in own], **style, ls="", mfc="white")
        xy = [r["share"] for r in curve], [r[column] for r in curve]
        panel.plot(*xy, **style, lw=2 if ours else 1.2, label=family)
        for number, row in enumerate(curve if ours else ()):
            place = {"xytext": (2, -9 if number % 2 else 5), "textcoords": "offset points"}
            panel.annotate(row["method"], (row["share"], row[column]), **place, fontsize=6, color=INK[family])
    if task == TEXT:
        panel.set_yscale("log")
        if not panel.yaxis_inverted():  # panels share it
            panel.invert_yaxis()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(-0.03, 1.05)
        panel.axhline(1, color="#bbbbbb", lw=0.8)
    counted = [row for row in rows if row["method"] == EXACT] or rows[:1]
    said = (
        f"{counted[0]['steps']} positions"
        if task == TEXT
        else f"{counted[0]['counted']} of {counted[0]['steps']} count"
    )
    panel.set_title(f"{of['tokens']:,} tokens, {of['samples']} prompts, {said}", fontsize=9)
    panel.set_xscale("log")
    panel.set_xlim(0.09, 1.1)
    panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize=8)
    panel.minorticks_off()
    panel.set_xlabel("physical bytes, share of the exact cache's", fontsize=9)
    panel.grid(color="#eeeeee")
