"""Compile the kernels ahead of time for every architecture and look at their machine code. No GPU is needed.

For each build: registers, spills, shared memory, 128-bit asynchronous copies and tensor-core instructions of the hot
loops, instructions per code (K and V, as executed by the lanes of one loop iteration), and the share of all issue slots
that they take while the device passes over the pages at full bandwidth: above 100 % a kernel cannot, whatever else it
does well. `issue_share` takes all bytes of a page, as the floor of a decode call does (physical bytes over bandwidth).
`issue_share_read` takes only what is read, without scores and births, and is the higher one; the limit is on it.

`--check` exits with 1 where a build does not compile, does not fit into shared memory or spills (`Build.held`), or
where a decode loop is over a limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels do not compile

import triton
from aot_builds import WARPS, Build, builds
from rows import RESULTS, merge_csv
from sass import Code, Loop, disassemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BYTES_PER_CLOCK = {80: 1.94e12 / 108 / 1.41e9, 90: 4.8e12 / 132 / 1.98e9, 100: 8.0e12 / 148 / 1.85e9}
"""Device memory per multiprocessor: A100, H200, B200. Four instructions can be issued per clock."""

SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program may have."""

MAX_PER_CODE, MAX_ISSUE = 1.5, 0.5


# ---- compiling and looking ------------------------------------------------------------------------------------------


def compiled(build: Build) -> tuple[Code, int]:
    """A build's machine code, and its bytes of shared memory."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        if name in build.constants:
            signature[name], constants[(i,)] = "constexpr", build.constants[name]
            continue
        signature[name] = build.types[name]
        if build.types[name].startswith("*") or name in build.aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": build.warps, "maxnreg": build.registers}
    if build.stages is not None:
        options["num_stages"] = build.stages
    made = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)
    return disassemble(made.asm["cubin"]), made.metadata.shared


def hot_loops(build: Build, code: Code) -> list[Loop]:
    """The page loops of a build without masks, one per entry of `build.loops`: a mask makes the longer of two."""
    found = [loop for loop in code.loops if any(op.startswith(build.product) for op in loop.products)]
    groups: dict[tuple[int, ...], list[Loop]] = {}
    for loop in found:
        groups.setdefault((loop.wide_async, *sorted(loop.products.values())), []).append(loop)
    fastest = [min(group, key=lambda loop: loop.size) for group in groups.values()]
    return sorted(fastest, key=lambda loop: -loop.wide_async)


def measure_nth(ci: bool, index: int) -> list[dict[str, Any]]:
    """`measure` of one of `builds`, for another process: kernels cannot be sent to it."""
    return measure(builds(ci)[index])


def measure(build: Build) -> list[dict[str, Any]]:
    """One row per hot loop, or one for a build without any."""
    common: dict[str, Any] = {"build": build.name, "warps": build.warps, "sm": build.arch}
    try:
        code, shared = compiled(build)
    except Exception as error:
        text = str(error).strip().splitlines()
        return [common | {"loop": "", "error": (text[-1] if text else type(error).__name__)[:120]}]
    common |= {"registers": code.registers, "spills": code.spills, "shared": shared, "size": code.size}
    rows = []
    loops = hot_loops(build, code)
    if len(loops) != len(build.loops):
        return [common | {"loop": "", "error": f"{len(loops)} page loops where {len(build.loops)} were expected"}]
    for (name, codes, held, read), loop in zip(build.loops, loops, strict=True):
        executed = loop.size * build.warps  # of warps, per iteration
        row = common | {
            "loop": name,
            "instructions": loop.size,
            "per_code": f"{executed * 32 / codes:.3f}",
            "wide_loads": loop.wide_async,
            "products": " ".join(f"{n} {op}" for op, n in sorted(loop.products.items())),
        }
        if build.arch in BYTES_PER_CLOCK:
            issued = executed / 4 * BYTES_PER_CLOCK[build.arch]
            row |= {"issue_share": f"{issued / held:.3f}", "issue_share_read": f"{issued / read:.3f}"}
        rows.append(row)
    return rows or [common | {"loop": ""}]


def faults(build: Build, rows: list[dict[str, Any]]) -> Iterator[str]:
    """What is over a limit."""
    where = f"{build.name} sm_{build.arch}"
    for row in rows:
        if "error" in row:
            yield f"{where}: {row['error']}"
            continue
        if row["shared"] > SHARED[build.arch] << 10:
            yield f"{where}: {row['shared']:,} bytes of shared memory do not fit"
        if not build.held:
            continue
        if row["spills"]:
            yield f"{where}: {row['spills']} spill instructions"
        strict = build.arch in (80, 90) and (build.name, build.warps) == ("decode K8V4/K4V2 D128 P64", WARPS)
        if strict and float(row["per_code"]) > MAX_PER_CODE:
            yield f"{where} {row['loop']}: {row['per_code']} instructions per code, more than {MAX_PER_CODE}"
        if strict and float(row["issue_share_read"]) > MAX_ISSUE:
            yield f"{where} {row['loop']}: {row['issue_share_read']} of the issue slots, more than {MAX_ISSUE}"
        if row["loop"] and not row["wide_loads"]:
            yield f"{where} {row['loop']}: codes do not come by 128-bit asynchronous copies"


COLUMNS_SHOWN = ("build", "warps", "sm", "loop", "registers", "spills", "shared", "size", "instructions", "per_code",
                 "issue_share", "issue_share_read", "wide_loads", "products", "error")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a limit is passed")
    parser.add_argument("--ci", action="store_true", help="only one build or so of every kernel, what the gate needs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="builds at once")
    parser.add_argument("--only", default="", help="only builds with this in their name")
    arguments = parser.parse_args()
    every = builds(arguments.ci)
    chosen = [i for i, build in enumerate(every) if arguments.only in build.name]
    if not chosen:
        parser.error(f"no build has {arguments.only!r} in its name")
    todo, wrong, table, begin = [every[i] for i in chosen], [], [], time.monotonic()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        done = pool.map(measure_nth, [arguments.ci] * len(todo), chosen)
        for build, rows in zip(todo, done, strict=True):
            for row in rows:
                table.append({column: row.get(column, "") for column in COLUMNS_SHOWN})
                shown = (f"{column} {row[column]}" for column in COLUMNS_SHOWN[4:] if row.get(column, "") != "")
                print(
                    f"{build.name}, {build.warps} warps, sm_{build.arch} {row['loop']}: {', '.join(shown)}", flush=True
                )
            wrong += faults(build, rows)
    if len(todo) == len(builds(False)):  # all anew: nothing that is no longer built stays
        (RESULTS / "aot.csv").unlink(missing_ok=True)
    merge_csv(RESULTS / "aot.csv", table, by=("build", "warps", "sm", "loop"))
    print(f"{len(todo)} builds in {time.monotonic() - begin:.0f} s; triton {triton.__version__}")
    for text in wrong:
        print(f"over a limit: {text}", file=sys.stderr)
    return 1 if arguments.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
