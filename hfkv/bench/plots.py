"""One picture per part, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hfkv.bench import decode, flush, generate, goals, long, packs, prompt
from hfkv.bench.caches import DYNAMIC, GRAPHS, LEAN, QUANTIZED, STATIC, STATIC_COMPILED
from hfkv.bench.results import LARGEST, OK, Row, number

INK = {
    "k8v4": "#1f5fa8",
    "k4v4": "#2a9d8f",
    "k4v2": "#c8553d",
    "mixed": "#7b4ea3",
    "packed k4v2": "#e08e79",
    "packed 0.1/0.2": "#e9c46a",
    **dict(zip(GRAPHS, ("#5b9bdd", "#ab7fd0"), strict=True)),
    DYNAMIC: "#555555",
    STATIC: "#8a8a8a",
    STATIC_COMPILED: "#b5b5b5",
    **dict(zip(QUANTIZED, ("#d9a441", "#b98a2f", "#8f6a1f"), strict=True)),
}
GREY = "#999999"


def available() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(part: str, rows: list[Row], path: Path, machine: str) -> bool:
    """Draw a part's rows into a PNG; False where there is nothing to draw."""
    own = [row for row in rows if row["part"] == part and row["status"] == OK]
    if not own:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    make = {
        decode.PART: _decode,
        prompt.PART: _prompt,
        flush.PART: _flush,
        generate.PART: _generate,
        long.PART: _long,
        packs.PART: _packs,
    }[part]
    figure = make(pyplot, own)
    backends = ", ".join(sorted({row["backend"] for row in own if row["backend"]}))
    figure.suptitle(f"{part}: {machine}, {own[0]['dtype']}, backend {backends}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _decode(pyplot: Any, rows: list[Row]) -> Any:
    """Per shape two lines of panels: speed against the best exact attention, and share of the copy bandwidth."""
    shapes = sorted({_shape(row) for row in rows}, key=lambda shape: -int(shape.split()[-1]))
    batches = sorted({int(row["batch"]) for row in rows})
    figure, grid = pyplot.subplots(
        2 * len(shapes),
        len(batches),
        figsize=(3.6 * len(batches) + 1, 5.2 * len(shapes) + 0.5),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for i, shape in enumerate(shapes):
        for j, batch in enumerate(batches):
            here = [row for row in rows if _shape(row) == shape and int(row["batch"]) == batch]
            speed, share = grid[2 * i][j], grid[2 * i + 1][j]
            for name in LEAN:
                own = _by_tokens(here, name)
                faster = [(int(r["tokens"]), s) for r in own if (s := goals.speedup(rows, r)) is not None]
                _line(speed, faster, name)
                _line(share, [(int(r["tokens"]), 100 * float(r["copy_share"])) for r in own], name)
            _line(share, _best_shares(here), "best exact", GREY)
            speed.axhline(1, color=GREY, lw=0.8)
            share.axhline(100 * goals.COPY_SHARE, color=GREY, lw=0.8, ls=":")
            speed.set_title(f"{shape}, batch {batch}", fontsize=9)
            speed.set_ylim(bottom=0)
            share.set_ylim(bottom=0)
            _tokens_axis(speed, sorted({int(row["tokens"]) for row in rows}))
        grid[2 * i][0].set_ylabel("times the best\nexact attention", fontsize=8)
        grid[2 * i + 1][0].set_ylabel("% of copy bandwidth", fontsize=8)
    for axis in grid[-1]:
        axis.set_xlabel("cached tokens", fontsize=8)
    lines, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _best_shares(rows: list[Row]) -> list[tuple[int, float]]:
    found: dict[int, float] = {}
    for row in rows:
        if row["cache"] in decode.REFERENCES:
            tokens = int(row["tokens"])
            found[tokens] = max(found.get(tokens, 0.0), 100 * float(row["copy_share"]))
    return sorted(found.items())


def _prompt(pyplot: Any, rows: list[Row]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lengths = sorted({int(row["tokens"]) for row in rows})
    for name in (n for n in prompt.KINDS if n in LEAN):
        over = [
            (int(r["tokens"]), 100 * (float(r["ms"]) / float(r["reference_ms"]) - 1))
            for r in _by_tokens(rows, name)
            if r["ms"]
        ]
        _line(left, over, name)
    left.axhline(100 * goals.PROMPT_OVERHEAD, color=GREY, lw=0.8, ls=":")
    left.set_ylabel("% over DynamicCache's time")
    for name in prompt.KINDS:
        peaks = [(int(r["tokens"]), p / 2**20) for r in _by_tokens(rows, name) if (p := number(r, "peak_bytes"))]
        _line(right, peaks, name)
    right.set_ylabel("peak MiB above the weights")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:.0f}")
    for axis in (left, right):
        _tokens_axis(axis, lengths)
        axis.set_xlabel("tokens of the prompt")
        axis.legend(fontsize=8)
    return figure


def _flush(pyplot: Any, rows: list[Row]) -> Any:
    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    points = sorted({(int(r["tokens"]), int(r["batch"])) for r in rows})
    _bars(axis, rows, flush.KINDS, [f"{t} x {b}" for t, b in points], lambda r: 100 * float(r["flush_share"]))
    axis.axhline(100 * goals.FLUSH_SHARE, color=GREY, lw=0.8, ls=":")
    axis.set_ylabel("flush, % of decode time")
    axis.set_xlabel("cached tokens x batch")
    axis.legend(fontsize=8)
    return figure


def _packs(pyplot: Any, rows: list[Row]) -> Any:
    points = sorted({(int(r["tokens"]), int(r["batch"])) for r in rows})
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    _bars(axis, rows, packs.KINDS, [f"{t} x {b}" for t, b in points], lambda r: 100 * float(r["copy_share"]))
    axis.set_yscale("log")
    axis.set_xlabel("tokens x batch")
    axis.set_ylabel("bytes read, % of copy bandwidth")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _generate(pyplot: Any, rows: list[Row]) -> Any:
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 3.8), layout="constrained", gridspec_kw={"width_ratios": [3, 2]}
    )
    single = [row for row in rows if row["batch"] == "1"]
    names = list(dict.fromkeys(row["cache"] for row in rows))
    places = [f"{t} x 1" for t in sorted({int(r["tokens"]) for r in single})]
    _bars(left, single, names, places, lambda r: float(r["tokens_per_second"]))
    left.set_ylabel("tokens/s")
    left.set_xlabel("cached tokens x batch")
    left.legend(fontsize=7)
    largest = [row for row in rows if row["batch"] == LARGEST]
    for i, row in enumerate(largest):
        right.barh(i, float(row["tokens_per_second"]), color=INK.get(row["cache"], GREY))
    labels = [f"{row['cache']}, batch {row['sequences']}" for row in largest]
    right.set_yticks(range(len(largest)), labels, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("tokens/s at the largest batch" + (f", {largest[0]['tokens']} tokens" if largest else ""))
    return figure


def _long(pyplot: Any, rows: list[Row]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in long.KINDS:
        own = sorted((r for r in rows if r["cache"] == name), key=lambda r: int(r["step"]))
        _line(left, [(int(r["step"]), float(r["mean_ms"])) for r in own], name)
        _line(right, [(int(r["step"]), float(r["physical_bytes"]) / 2**20) for r in own], name)
    left.set_ylabel("ms per step, flushes included")
    right.set_ylabel("MiB of the cache")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("generated tokens")
        axis.legend(fontsize=8)
    return figure


def _bars(axis: Any, rows: list[Row], names: Any, places: list[str], value: Any) -> None:
    width = 0.8 / max(len(names), 1)
    for j, name in enumerate(names):
        at = {f"{row['tokens']} x {row['batch']}": value(row) for row in rows if row["cache"] == name}
        spots = [i for i, place in enumerate(places) if place in at]
        heights = [at[places[i]] for i in spots]
        color = INK.get(name)
        axis.bar([i + j * width for i in spots], heights, width * 0.92, label=name, color=color)
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(places))], places, fontsize=8)


def _line(axis: Any, points: list[tuple[int, float]], name: str, color: str | None = None) -> None:
    if points:
        color = color or INK.get(name, GREY)
        axis.plot(*zip(*sorted(points), strict=True), marker="o", ms=3, lw=1.3, color=color, label=name)


def _tokens_axis(axis: Any, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths], fontsize=7)
    axis.minorticks_off()


def _by_tokens(rows: list[Row], name: str) -> list[Row]:
    return sorted((row for row in rows if row["cache"] == name), key=lambda r: int(r["tokens"]))


def _shape(row: Row) -> str:
    return f"{row['q_heads']} query, {row['kv_heads']} KV heads of {row['head_dim']}"
