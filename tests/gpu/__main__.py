"""Run the GPU tests where there is no pytest: `python -m tests.gpu [part of a name ...]`."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]  # the helpers beside the tests; the package


def main(wanted: list[str]) -> int:
    """Run every test whose `file::name` contains one of `wanted` (all, if there are none); 1 where one failed."""
    _describe()
    results: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    budget, begun = float(os.environ.get("HFKV_TEST_SECONDS", "inf")), time.monotonic()
    for name, test in _tests():
        if wanted and not any(part in name for part in wanted):
            continue
        start = time.monotonic()
        if start - begun > budget:
            outcome, said = "skipped", f"HFKV_TEST_SECONDS={budget:.0f} are used up"
        else:
            outcome, said = _run(test)
        results[outcome].append(name)
        print(f"{outcome:7}  {name}  {time.monotonic() - start:.1f} s{f': {said}' if said else ''}", flush=True)
    print(", ".join(f"{len(names)} {outcome}" for outcome, names in results.items()))
    return 1 if results["failed"] or not any(results.values()) else 0


def _tests() -> list[tuple[str, object]]:
    found = []
    for path in sorted(HERE.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        found += [(f"{path.stem}::{n}", getattr(module, n)) for n in vars(module) if n.startswith("test_")]
    return found


def _run(test) -> tuple[str, str]:
    try:
        test()
    except unittest.SkipTest as skip:
        return "skipped", str(skip)
    except Exception:
        return "failed", "\n" + traceback.format_exc()
    return "passed", ""


def _describe() -> None:
    import torch
    import transformers
    from gpu_support import DEVICE, ON_GPU, backend

    exists = not ON_GPU or torch.cuda.is_available()
    where = torch.cuda.get_device_name() if ON_GPU and exists else str(DEVICE)
    runs = f", backend {backend()}" if exists else ", which does not exist here"
    print(f"{where}{runs}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
