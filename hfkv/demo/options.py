"""The arguments of `python -m hfkv demo`."""

from __future__ import annotations

import argparse

from hfkv.config import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the demo takes."""
    add = parser.add_argument
    add("--model", default="smollm2", help="name or path for from_pretrained (default: SmolLM2-135M-Instruct)")
    add("--prompt-file", help="a text of your own instead of documentation with hidden notes")
    add("--question", action="append", default=[], help="asked about --prompt-file; may be repeated")
    add("--preset", action="append", choices=list(PRESETS), help="setting to show; may be repeated")
    add("--config", metavar="JSON", help="LeanKVConfig of your own: JSON text or the path of a JSON file")
    add("--tokens", type=int, default=1900, help="length of the documentation text (default: %(default)s)")
    add("--out", default="demo-output", help="folder for the pictures (default: %(default)s)")
    add("--quick", action="store_true", help="a short prompt and one setting: under a minute")
