"""Draws `results/packing.csv`: KL against bytes per token of codes as plain tiers hold them, and packed.

Settings of both sides at 1,000 tokens. A packed point has the least bytes of its four orders of tokens; an arrow leads
to it from the same codes in plain pages, at the same KL.

    python benchmarks/packing_curve.py
"""

from __future__ import annotations

import csv

from rows import RESULTS

TOKENS = "1000"
FAMILIES = {
    "keys and values rotated": ("h4|h4", "h4|h3", "h4|h2", "h3|h2"),
    "values rotated": ("4|h2",),
    "nothing rotated": ("4|4", "4|3", "4|2"),
    "min/max with fp16 metadata, nothing rotated": ("m4|m4", "m4|m2"),
    "error-bounded keys": ("h0.15|h2", "0.1|h2", "0.1|0.2"),
}
INK = ("#1f5fa8", "#2a9d8f", "#d9a441", "#888888", "#c8553d")
BELOW = ("0.1|h2",)
"""Settings whose names stand below their points."""


def main() -> None:
    from matplotlib.figure import Figure

    with (RESULTS / "packing.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["tokens"] == TOKENS]
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    panel = figure.subplots()
    for (family, settings), ink in zip(FAMILIES.items(), INK, strict=True):
        plain, packed = [], []
        for setting in settings:
            own = {row["order"]: float(row["bytes_token"]) for row in rows if row["setting"] == setting}
            kl = next(float(row["kl"]) for row in rows if row["setting"] == setting)
            plain.append((own.pop("plain"), kl))
            packed.append((min(own.values()), kl))
            panel.annotate(
                "", packed[-1], plain[-1], arrowprops={"arrowstyle": "->", "color": ink, "alpha": 0.5, "lw": 1}
            )
            place = (5, -10) if setting in BELOW else (5, 4)
            panel.annotate(setting, plain[-1], place, textcoords="offset points", fontsize=7, color=ink)
        panel.plot(*zip(*plain, strict=True), "o", color=ink, fillstyle="none")
        panel.plot(*zip(*sorted(packed), strict=True), "o-", color=ink, label=family)
    panel.margins(x=0.09)
    panel.set_yscale("log")
    panel.invert_yaxis()
    panel.set_xlabel("bytes per token and KV head, metadata and addresses counted (o plain, filled: packed)")
    panel.set_ylabel("KL from the exact cache, nats (up is better)")
    panel.set_title("SmolLM2, 1,000 tokens: what packing saves (keys | values; h: rotated)", fontsize=10)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8, frameon=False)
    for suffix in (".png", ".svg"):
        figure.savefig(
            RESULTS / f"packing_curve{suffix}", dpi=90, metadata={"Date": None} if suffix == ".svg" else None
        )


if __name__ == "__main__":
    main()
