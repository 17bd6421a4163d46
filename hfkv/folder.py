"""Where things are kept on disk that were made once and serve later processes."""

from __future__ import annotations

import os
from pathlib import Path


def kept_folder() -> Path:
    """`$HFKV_CACHE`, by default `~/.cache/hfkv`; it need not exist yet."""
    return Path(os.environ.get("HFKV_CACHE") or Path.home() / ".cache" / "hfkv")
