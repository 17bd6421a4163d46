"""What a compiled kernel costs: its machine code, taken apart without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin"
TENSOR = re.compile(r"^(HMMA|IMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA|DMMA)")
LOAD = re.compile(r"^(LDG|LDGSTS)\.")
SPILL = ("LDL", "STL")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*[^\s;]*)\s*([^;]*);")
LABEL = re.compile(r"^\s*(\.L\S+):")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions by opcode, all lanes of a warp counting as one."""

    counts: Counter[str]

    @property
    def size(self) -> int:
        return self.counts.total()

    @property
    def products(self) -> dict[str, int]:
        """Tensor-core instructions by opcode."""
        return {op: n for op, n in self.counts.items() if TENSOR.match(op)}

    @property
    def loads(self) -> dict[str, int]:
        """Loads from device memory by opcode, without bookkeeping."""
        return {op: n for op, n in self.counts.items() if LOAD.match(op)}

    @property
    def wide_async(self) -> int:
        """128-bit copies from device to shared memory."""
        return sum(n for op, n in self.counts.items() if op.startswith("LDGSTS") and "128" in op)


@dataclass(frozen=True)
class Code:
    """A kernel's resources and innermost loops, in the order of the code."""

    registers: int
    stack: int
    spills: int
    size: int
    loops: tuple[Loop, ...]


def disassemble(cubin: bytes) -> Code:
    """Take a binary apart with the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    instructions, labels = _parse(text)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    assert found is not None, usage
    return Code(
        registers=int(found.group(1)),
        stack=int(found.group(2)),
        spills=sum(op.startswith(SPILL) for op, _ in instructions),
        size=len(instructions),
        loops=tuple(_loops(instructions, labels)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _parse(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) of every instruction, and the instruction that each label stands before."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append((found.group(2), found.group(3)))
    return instructions, labels


def _loops(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[Loop]:
    """Innermost loops: what lies between a label and a branch back to it."""
    ranges = []
    for end, (op, operands) in enumerate(instructions):
        target = re.search(r"(\.L\w+)", operands) if op.startswith("BRA") else None
        if target and labels.get(target.group(1), end) < end:  # not the idle loop behind the end
            ranges.append((labels[target.group(1)], end))
    inner = [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    return [Loop(Counter(op for op, _ in instructions[first : last + 1])) for first, last in sorted(set(inner))]
