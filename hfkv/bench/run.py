"""The run: parts, cells, the budget, what is kept, what is shown."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hfkv.bench import decode, flush, generate, goals, long, packs, plots, prompt, tables
from hfkv.bench.caches import Unavailable
from hfkv.bench.results import NO_MEMORY, OK, STOPPED, Cell, Results
from hfkv.bench.session import Session, machine_name
from hfkv.bench.sizes import Sizes, sizes_for
from hfkv.bench.timing import free_memory
from hfkv.version import __version__

CSV = "bench.csv"
UNAVAILABLE, FAILED = "unavailable", "failed"
OVERTIME = 20.0
"""Seconds that a cell may go on for once the budget is used up; then it is broken off."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class BrokenOff(BaseException):
    """A cell takes longer than the budget allows; not to be taken for an error by what runs in it."""


@dataclass(frozen=True)
class Part:
    """One table of the benchmark."""

    title: str
    cells: Callable[[Sizes, torch.device], list[Cell]]
    measure: Callable[[Session, Cell], list[dict[str, Any]]]


PARTS = {
    decode.PART: Part("attention of one decode step, one layer", decode.cells, decode.measure),
    prompt.PART: Part("prompt of a random Llama", prompt.cells, prompt.measure),
    flush.PART: Part("flush beside the steps of a random Llama", flush.cells, flush.measure),
    generate.PART: Part("generate of a random Llama behind a filled cache", generate.cells, generate.measure),
    long.PART: Part("a long generation", long.cells, long.measure),
    packs.PART: Part("a decode step over packed tiers, one layer", packs.cells, packs.measure),
}


def run(args: argparse.Namespace) -> int:
    """Measure the parts asked for, print their tables and the goals; 1 where a cell failed.

    Raises:
        ValueError: there is no such device, or the CSV is of another version.
    """
    device = _device(args.device)
    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    sizes = sizes_for(device, args.quick)
    if args.layers is not None:
        sizes = replace(sizes, model=replace(sizes.model, layers=args.layers))
    out = Path(args.out)
    if args.fresh:
        (out / CSV).unlink(missing_ok=True)
    results = Results(out / CSV, machine_name(device), str(dtype).removeprefix("torch."))
    session = Session(device, dtype, sizes, args.budget_seconds)
    names = list(PARTS) if args.part == "all" else [args.part]
    _say(f"{machine_name(device)}, torch {torch.__version__}, copy {session.copy_gbps:.0f} GB/s (read and written)")
    failed = sum([measure_part(name, PARTS[name], session, results) for name in names])
    show(names, results, out, machine_name(device))
    return 1 if failed else 0


def measure_part(name: str, part: Part, session: Session, results: Results) -> int:
    """Measure what is not finished yet, as far as the budget goes -> number of cells that failed."""
    cells = part.cells(session.sizes, session.device)
    if name == long.PART:
        cells = [replace(cell, last_step=session.sizes.long_tokens) for cell in cells]
    waiting = [cell for cell in cells if not results.finished(cell)]
    waiting.sort(key=results.tried)  # what has failed before must not keep the others from being measured
    _say(f"\n{name}: {len(waiting)} of {len(cells)} cells to measure")
    failed, slowest = 0, 0.0
    for number, cell in enumerate(waiting):
        if session.seconds_left < slowest:  # the next one may take as long as the slowest so far
            _say(f"{name}: the budget is used up, {len(waiting) - number} cells are left for another run")
            break
        start = time.monotonic()
        rows = _measure_cell(part, session, cell)
        results.add(cell, [row | _origin(session) for row in rows])
        failed += rows[0]["status"].startswith(FAILED)
        _say(f"{name} {number + 1}/{len(waiting)}: {_told(cell, rows)}, {time.monotonic() - start:.1f} s")
        free_memory(session.device)
        slowest = max(slowest, time.monotonic() - start)
    return failed


def show(names: list[str], results: Results, out: Path, machine: str) -> None:
    """Print the parts' tables and all goals; draw the pictures."""
    for name in names:
        if any(row["part"] == name for row in results.rows):
            print(f"\n{name}: {PARTS[name].title}\n{tables.show(name, results.rows)}")
        if plots.available() and plots.draw(name, results.rows, out / f"{name}.png", machine):
            print(f"picture: {out / f'{name}.png'}")
    print(f"\ngoals, on {machine}\n{tables.show_goals(goals.judge(results.rows))}")
    print(f"\nall rows: {out / CSV}")


def _measure_cell(part: Part, session: Session, cell: Cell) -> list[dict[str, Any]]:
    """A cell's rows; what cannot be measured becomes a row that says why."""
    try:
        with _broken_off_after(session.seconds_left + OVERTIME):
            return part.measure(session, cell)
    except BrokenOff:
        return [{"status": STOPPED, "note": f"it took longer than what was left and {OVERTIME:.0f} s"}]
    except torch.OutOfMemoryError as error:
        return [{"status": NO_MEMORY, "note": _first_line(error)}]
    except Unavailable as error:
        return [{"status": UNAVAILABLE, "note": str(error)}]
    except Exception as error:  # kept in the CSV, told at once, and in the exit status; the other cells go on
        return [{"status": f"{FAILED}: {type(error).__name__}", "note": _first_line(error)}]


@contextlib.contextmanager
def _broken_off_after(seconds: float) -> Iterator[None]:
    """Raise BrokenOff inside once so many seconds have passed, as soon as Python runs again."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise BrokenOff

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _origin(session: Session) -> dict[str, Any]:
    return {"copy_gbps": session.copy_gbps, "torch": torch.__version__, "hfkv": __version__}


def _told(cell: Cell, rows: list[dict[str, Any]]) -> str:
    last = rows[-1]
    where = f"{cell.cache}, {cell.shape}, {cell.tokens} x {last.get('sequences', cell.batch)}"
    if last["status"] != OK:
        return f"{where}: {last['status']} {last.get('note', '')}"
    return f"{where}: {last['ms']:.3f} ms" if last.get("ms") is not None else f"{where}: done"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    return device


def _say(text: str) -> None:
    print(text, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hfkv bench`."""
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="one table, or all (default)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--out", default="bench-results", help="folder for the CSV and plots (default: %(default)s)")
    parser.add_argument(
        "--budget-seconds", type=float, help="stop measuring in time; finished cells are kept and not repeated"
    )
    parser.add_argument("--quick", action="store_true", help="few and small cells, all tables")
    parser.add_argument("--layers", type=int, help="layers of the random Llama (default: 32, on a CPU 4)")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has measured")
