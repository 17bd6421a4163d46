"""Pictures of where the tiers lie, by layer, head and position: a PNG through matplotlib, and blocks in the terminal.

Both take `{layer index: tiers}`, tiers uint8 [kv_heads, tokens]: 0 pruned, 1 low, 2 high, 3 recent window.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

Tiers = Mapping[int, torch.Tensor]

NAMES = ("pruned", "low tier", "high tier", "recent window, exact")
COLOURS = ((236, 236, 230), (158, 202, 225), (8, 69, 148), (244, 148, 64))  # RGB, by tier
_MAX_HEADS = 8
PLOT_EXTRA = "pip install matplotlib"


def tier_shares(tiers: Tiers) -> dict[str, float]:
    """The share of tokens in each tier, over all layers and heads."""
    tokens = torch.cat([layer.flatten() for layer in _checked(tiers).values()])
    counts = torch.bincount(tokens.long(), minlength=len(NAMES))
    return dict(zip(NAMES, (counts / counts.sum()).tolist(), strict=True))


def is_tiered(tiers: Tiers) -> bool:
    """Whether tokens differ in more than being in the recent window, so that there is something to see."""
    return len({tier for layer in tiers.values() for tier in layer.unique().tolist()} - {3}) > 1


def draw_png(tiers: Tiers, path: str | Path, title: str) -> Path:
    """Write the picture: rows are heads, columns positions; above and beside it the shares by position and by head.

    Raises ImportError with the command to run where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"The picture needs matplotlib, install it with: {PLOT_EXTRA}") from error
    rows = torch.cat(list(_checked(tiers).values()))  # [layers * kv_heads, tokens]
    figure = Figure(figsize=(15, max(5.0, min(14.0, 2.6 + 0.085 * len(rows)))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 5))
    main = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0], sharex=main), figure.add_subplot(grid[1, 1], sharey=main)
    _draw_map(main, rows, tiers)
    _draw_by_position(above, rows)
    _draw_by_head(beside, rows)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=len(NAMES), frameon=False)
    figure.savefig(path, dpi=130)
    return Path(path)


def terminal_picture(tiers: Tiers, width: int = 100, max_rows: int = 32, stream: TextIO = sys.stdout) -> str:
    """The picture as text: a line per layer, its heads side by side; in colour where `stream` is a terminal."""
    layers = _checked(tiers)
    heads = _merged(list(range(len(next(iter(layers.values()))))), _MAX_HEADS)
    cells = (width - 6) // len(heads) - 1
    coloured = stream.isatty() and "NO_COLOR" not in os.environ
    paint = _coloured_cell if coloured else _plain_cell
    lines = ["layer " + " ".join(f"head {_span(group)}".ljust(cells)[:cells] for group in heads)]
    for group in _merged(list(layers), max_rows):
        shares = torch.stack([_shares_by_cell(layers[index], cells) for index in group]).mean(
            0
        )  # [heads, cells, tiers]
        merged = [shares[of_head].mean(0).tolist() for of_head in heads]
        lines.append(f"{group[0]:>4}  " + " ".join("".join(paint(cell) for cell in head) for head in merged))
    return "\n".join([*lines, " " * 6 + _terminal_legend(coloured)])


def _checked(tiers: Tiers) -> Tiers:
    if not tiers:
        raise ValueError("no compressed layer to draw: fill the cache with a prompt first")
    return tiers


def _merged(indices: list[int], most: int) -> list[list[int]]:
    """Neighbours together, in at most `most` groups."""
    step = -(-len(indices) // most)
    return [indices[i : i + step] for i in range(0, len(indices), step)]


def _span(group: list[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def _shares_by_cell(tiers: torch.Tensor, cells: int) -> torch.Tensor:
    """[heads, tokens] -> the share of each tier in `cells` equal stretches of positions: [heads, cells, tiers]."""
    one_hot = torch.nn.functional.one_hot(tiers.long(), len(NAMES)).float()  # [heads, tokens, tiers]
    return torch.nn.functional.adaptive_avg_pool1d(one_hot.transpose(1, 2), cells).transpose(1, 2)


def _coloured_cell(shares: list[float]) -> str:
    """One blank on the mean colour of its tokens, out of the 6 x 6 x 6 cube that every colour terminal has."""
    mean = [sum(share * colour[i] for share, colour in zip(shares, COLOURS, strict=True)) for i in range(3)]
    red, green, blue = (round(channel / 255 * 5) for channel in mean)
    return f"\x1b[48;5;{16 + 36 * red + 6 * green + blue}m \x1b[0m"


def _plain_cell(shares: list[float]) -> str:
    pruned, low, high, window = shares
    if window > 0.5:
        return "w"
    if high >= 0.125:
        return "#" if high >= 0.5 else "+"
    return "." if pruned > low else "-"


def _terminal_legend(coloured: bool) -> str:
    if not coloured:
        return "# half of it high  + an eighth of it high  - low  . pruned  w recent window"
    one_hot = torch.eye(len(NAMES)).tolist()
    return "  ".join(f"{_coloured_cell(tier) * 2} {name}" for tier, name in zip(one_hot, NAMES, strict=True))


def _palette() -> torch.Tensor:
    return torch.tensor(COLOURS) / 255  # [tiers, RGB]


def _draw_map(axes: Axes, rows: torch.Tensor, tiers: Tiers) -> None:
    image = _palette()[rows.long()].numpy()  # [rows, tokens, RGB]
    axes.imshow(image, aspect="auto", interpolation="antialiased", interpolation_stage="rgba")
    heads = len(next(iter(tiers.values())))
    shown = range(0, len(tiers), -(-len(tiers) // 32))
    axes.set_yticks([i * heads + (heads - 1) / 2 for i in shown], [str(list(tiers)[i]) for i in shown])
    for i in range(1, len(tiers)):
        axes.axhline(i * heads - 0.5, color="white", linewidth=0.6)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel(f"layer ({heads} key/value heads each)")


def _draw_by_position(axes: Axes, rows: torch.Tensor) -> None:
    cells = min(200, rows.shape[1])
    shares = _shares_by_cell(rows, cells).mean(0)  # [cells, tiers]
    centres = (torch.arange(cells) + 0.5) * rows.shape[1] / cells
    axes.stackplot(centres.numpy(), shares.T.numpy(), colors=_palette().numpy())
    axes.set_ylim(0, 1)
    axes.tick_params(labelbottom=False)
    axes.set_title("share of heads, by position", fontsize=10)


def _draw_by_head(axes: Axes, rows: torch.Tensor) -> None:
    shares = _shares_by_cell(rows, 1)[:, 0]  # [rows, tiers]
    left = torch.cat([torch.zeros(len(shares), 1), shares.cumsum(1)], 1)
    for tier, colour in enumerate(_palette().numpy()):
        axes.barh(range(len(rows)), shares[:, tier].numpy(), left=left[:, tier].numpy(), height=1.0, color=colour)
    axes.set_xlim(0, 1)
    axes.tick_params(labelleft=False)
    axes.set_title("share of tokens, by head", fontsize=10)


def _legend(rows: torch.Tensor) -> list[Patch]:
    from matplotlib.patches import Patch

    shares = tier_shares({0: rows})
    return [
        Patch(facecolor=tuple(colour), edgecolor="grey", label=f"{name} ({shares[name]:.1%})")
        for name, colour in zip(NAMES, _palette().tolist(), strict=True)
    ]
