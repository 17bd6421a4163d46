"""The kernels' inline assembly, run in Triton's interpreter: a few instructions of PTX, on numpy.

As in the compiler, `pack` elements of one thread share a register: here those that follow each other in the last
dimension, which is what kernels count on where it matters to them.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

WORD = {32: np.uint32, 64: np.uint64}


class Results:
    """What the interpreter asks results of."""

    def __init__(self, handles: list[TensorHandle]) -> None:
        self.handles = handles

    def get_result(self, i: int) -> TensorHandle:
        return self.handles[i]


def emulate(monkeypatch) -> list[str]:
    """Let the interpreter run inline assembly; returns the list of all that it will have run."""
    ran: list[str] = []

    def create_inline_asm(builder, text, constraints, values, types, is_pure, pack):
        text = re.sub(r"constexpr\[(.*?)\]", r"\1", text)  # the compiler puts in the values of constants
        ran.append(text)
        return Results(run(text, constraints, values, types, pack))

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", lambda builder, *x: _fused(*x))
    return ran


def _fused(x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x y + z, rounded once as far as float64 goes; the interpreter's own is rounded twice."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)


def run(text: str, constraints: str, values: list[TensorHandle], types: list, pack: int) -> list[TensorHandle]:
    """One piece of assembly on all elements of `values`, which have one shape; results of the given types."""
    kinds = constraints.split(",")
    outputs = [kind for kind in kinds if kind.startswith("=")]
    shape, held = values[0].data.shape, {}
    number = len(outputs)
    for value in values:
        words = _to_registers(value.data, pack)
        for word in words:
            assert WORD[64 if kinds[number] == "l" else 32] == word.dtype, (kinds[number], word.dtype)
            held[f"${number}"] = word
            number += 1
    assert number == len(kinds)
    begun = _execute(text, held)
    # A register that is written before an input is read for the last time must not share that input's.
    early = {f"${i}" for i, kind in enumerate(outputs) if not kind.startswith("=&")}
    assert not early & begun, "an output without & is written while inputs are still to be read"
    results, number = [], 0
    for kind in types:
        scalar = kind.scalar
        bits = scalar.primitive_bitwidth
        each = max(1, pack * bits // 32) if bits < 64 else pack
        words = [held[f"${number + i}"] for i in range(each)]
        number += each
        results.append(TensorHandle(_from_registers(words, scalar, bits, shape), scalar))
    assert number == len(outputs)
    return results


def _to_registers(x: np.ndarray, pack: int) -> list[np.ndarray]:
    """Elements [...] -> registers [n], so many as `pack` elements take."""
    if x.dtype.itemsize * pack < 4:
        raise ValueError(f"{pack} elements of {x.dtype} do not fill a register")
    words = np.ascontiguousarray(x).reshape(-1, pack).view(WORD[max(32, 8 * x.dtype.itemsize)])
    return [words[:, i].copy() for i in range(words.shape[1])]


def _from_registers(words: list[np.ndarray], scalar, bits: int, shape) -> np.ndarray:
    kinds = {"fp16": np.float16, "fp32": np.float32}
    dtype = kinds.get(scalar.name) or np.dtype(f"i{bits // 8}")
    return np.stack(words, 1).view(dtype).reshape(shape)


def _execute(text: str, held: dict[str, np.ndarray]) -> set[str]:
    """Run instructions on registers; returns the outputs that were written before an input was last read."""
    steps = [step.split(None, 1) for step in re.split(r"[;{}]", text) if step.strip() and ".reg" not in step]
    parts = [(name, [x.strip() for x in re.split(r",(?![^\[]*\])", operands)]) for name, operands in steps]
    inputs = set(held)
    last = max(i for i, (_, operands) in enumerate(parts) if any(r in " ".join(operands[1:]) for r in inputs))
    early = set()
    for i, (name, operands) in enumerate(parts):
        target, *sources = operands
        if target.startswith("$") and i < last:
            early.add(target)
        held[target] = _step(name, [_source(x, held) for x in sources])
    return early


def _source(text: str, held: dict[str, np.ndarray]):
    if text.startswith("["):
        base, *offset = text[1:-1].split("+")
        return held[base.strip()].astype(np.int64) + (int(offset[0]) if offset else 0)
    return held[text] if text in held else int(text, 0)


def _step(name: str, x: list) -> np.ndarray:
    if name == "mov.b32":
        return np.uint32(x[0])
    if name == "and.b32":
        return x[0] & np.uint32(x[1])
    if name == "xor.b32":
        return x[0] ^ np.uint32(x[1])
    if name == "or.b32":
        return x[0] | x[1]
    if name == "shr.u32":
        return x[0] >> np.uint32(x[1])
    if name == "shl.b32":
        return x[0] << np.uint32(x[1])
    if name == "prmt.b32":
        return _permute(*x)
    if name == "mad.wide.u32":
        return x[0].astype(np.uint64) * np.uint64(x[1]) + x[2]
    if name in ("ld.global.nc.b32", "ld.global.nc.b64"):
        kind = ctypes.c_uint32 if name.endswith("32") else ctypes.c_uint64
        return np.array([kind.from_address(int(at)).value for at in x[0]], np.uint32 if name.endswith("32") else "u8")
    raise NotImplementedError(name)


def _permute(a, b, selector: int) -> np.ndarray:
    """Byte i of the result is byte `selector`'s nibble i of the eight bytes of a, then b; 8 more: its sign alone."""
    a, b = np.broadcast_arrays(np.uint32(a), np.uint32(b))
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(both)
    for i in range(4):
        byte = (both >> np.uint64(8 * (selector >> (4 * i) & 7))) & np.uint64(255)
        if selector >> (4 * i) & 8:
            byte = (byte >> np.uint64(7)) * np.uint64(255)
        out |= byte << np.uint64(8 * i)
    return out.astype(np.uint32)
