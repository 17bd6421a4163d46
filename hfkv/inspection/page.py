"""An examination as one HTML page: the data in compact form, and the template that shows them.

Per layer, head and token the page holds two bits for the tier, an fp16 score and one byte for the attention of the
later queries, in base64; everything else is JSON. `data.js` reads them, `page.js` and `tokens.js` show them.
"""

from __future__ import annotations

import base64
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hfkv.inspection.examine import Examination, Moment
from hfkv.report import HIGH, LOW, PRUNED, WINDOW, LayerReport
from hfkv.version import __version__

ORDER = (HIGH, LOW, WINDOW, PRUNED)
"""The order in which the page lists the places of a token."""

ATTENTION_STEPS = 9
"""Steps per factor of 2 of the attention's one-byte code: a relative error of at most 4 %."""
ATTENTION_LEAST = 2.0**-12
"""The smallest multiple of uniform attention that the code tells from nothing."""


def write_page(made: Examination, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path` as UTF-8; returns the path."""
    Path(path).write_text(make_page(made), encoding="utf-8")
    return Path(path)


def make_page(made: Examination) -> str:
    """The page as text: no script, style, font or picture comes from elsewhere."""
    text = json.dumps(page_data(made), separators=(",", ":"), allow_nan=False)  # ASCII
    parts = {
        "style": _file("page.css"),
        "script": "\n".join(_file(name) for name in ("data.js", "page.js", "tokens.js")),
        "data": text.replace("<", "\\u003c"),
    }
    return re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], _file("page.html"))


def page_data(made: Examination) -> dict[str, Any]:
    """What the page knows, ready for JSON."""
    compressed = sorted(made.moments[0].layers)
    layers = [layer for layer in made.moments[0].report.layers if layer.index in compressed]
    return {
        "model": made.model,
        "dtype": made.dtype,
        "device": made.device,
        "setting": made.setting,
        "config": made.config.to_json(),
        "versions": f"hfkv {__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        "backend": made.moments[0].report.backend,
        "ids": made.ids,
        "texts": made.texts,
        "prompt": made.prompt,
        "laterIsGiven": made.later_is_given,
        "layerCount": len(made.moments[0].report.layers),
        "plain": [[x.index, x.reason or x.kind] for x in made.moments[0].report.layers if not x.compressed],
        "layers": [
            {"index": layer.index, "heads": _heads(layer), "tiers": layer.tiers, "rotation": layer.rotation}
            for layer in layers
        ],
        "attentionSteps": ATTENTION_STEPS,
        "attentionLeast": ATTENTION_LEAST,
        "moments": [_moment_data(moment, compressed) for moment in made.moments],
    }


def _moment_data(moment: Moment, compressed: list[int]) -> dict[str, Any]:
    views = [moment.layers[index] for index in compressed]
    tiers, scores, attention = (
        torch.cat([getattr(view, name) for view in views]) for name in ("tier", "score", "attention")
    )  # [rows of all layers, tokens]
    report = moment.report
    return {
        "tokens": moment.tokens,
        "later": moment.later,
        "physical": report.physical_bytes,
        "exact": report.exact_bytes,
        "plainBytes": report.plain_bytes,
        "bytes": report.bytes,
        "layers": [
            {
                "physical": layer.physical_bytes,
                "exact": layer.exact_bytes,
                "window": layer.bytes["window"] // _heads(layer),
                "pages": [] if layer.head_bytes is None else layer.head_bytes[0].tolist(),
                "mass": torch.stack([moment.layers[layer.index].mass(place) for place in ORDER], 1).tolist(),
            }
            for layer in report.layers
            if layer.index in compressed
        ],
        "tier": _base64(packed_tiers(tiers)),
        "score": _base64(scores.half().view(torch.uint8)) if bool(scores.isfinite().any()) else None,
        "attention": _base64(coded_attention(attention * moment.tokens)),
    }


def packed_tiers(tiers: Tensor) -> Tensor:
    """Tiers [rows, tokens] in four to a byte, the first in the lowest bits: uint8 [rows, ceil(tokens / 4)]."""
    padded = torch.nn.functional.pad(tiers, (0, -tiers.shape[1] % 4)).unflatten(1, (-1, 4)).int()
    return (padded << torch.tensor([0, 2, 4, 6])).sum(2).to(torch.uint8)


def coded_attention(multiple: Tensor) -> Tensor:
    """Multiples of uniform attention as bytes: 0 for less than `ATTENTION_LEAST`, else 1 + steps above it."""
    steps = (multiple.clamp_min(ATTENTION_LEAST) / ATTENTION_LEAST).log2() * ATTENTION_STEPS
    code = (steps.round() + 1).clamp_max(255)
    return torch.where(multiple < ATTENTION_LEAST * 2 ** (-0.5 / ATTENTION_STEPS), 0, code).to(torch.uint8)


def _heads(layer: LayerReport) -> int:
    return 0 if layer.head_bytes is None else layer.head_bytes.shape[1]


def _base64(data: Tensor) -> str:
    return base64.b64encode(data.contiguous().numpy().tobytes()).decode("ascii")


def _file(name: str) -> str:
    return resources.files("hfkv.inspection").joinpath(name).read_text(encoding="utf-8")
