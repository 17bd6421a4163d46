"""Where the benchmarks' results lie, and how they are kept."""

from pathlib import Path

from hfkv.eval.rows import Rows, merge_csv

__all__ = ["RESULTS", "Rows", "merge_csv"]

RESULTS = Path(__file__).parent / "results"
