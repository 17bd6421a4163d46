"""Builds from launches: an entry function runs on small CPU tensors while its kernels only note how they are launched.

What is compiled is thus what would be launched: tile sizes, warps, stages, absent arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime import JITFunction

from hfkv.config import Tier
from hfkv.kernels.quantize_pack import Basis
from hfkv.kernels.triton import (
    append,
    chunk_attention,
    compaction,
    kvcrush,
    observe,
    prompt_attention,
    quantize_pack,
    replay,
    tiles,
    unpack,
)
from hfkv.packing import Packed
from hfkv.quant import Codec, PageLayout

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
ROWS, HEADS, WIDTH, TOKENS = 4, 2, 16, 64
"""Rows and KV heads, pages of a row, and tokens of a page."""

SPILLING = {
    # 64 rows of 256 sums beside a tile of unpacked keys or values need more than 255 registers; 192 bytes of stack.
    ("attend_pages chunk D256", 90),
    # Float32 products without tensor cores: the compiler stops at 64 or 128 registers, full or half occupancy.
    ("prompt D64 fp32 window", 80),  # 24 bytes of stack, none of it used in the loops
    ("prompt D256 fp32 window", 90),
    ("prompt D256 fp32 window", 120),
}
"""Builds (name, architecture) that are known to spill and are not held to the limit."""


@dataclass(frozen=True)
class Build:
    """One kernel compiled for one architecture.

    Attributes:
        name: what is compiled, for people.
        kernel, arch: the Triton function, and the target.
        types: Triton type of every argument that is not a constant; pointers are taken to be aligned to 16 bytes.
        constants: value of every constant argument.
        warps: per program.
        stages: of pipelined loops; None: the compiler's default.
        aligned: arguments besides pointers that are multiples of 16.
        registers: that a thread may have; None: the compiler decides.
        loops: per hot loop, most bytes first: its name, and its codes, page bytes and bytes read per iteration.
        product: tensor-core instruction that the hot loops are known by.
        held: whether the limits on hot loops and spills hold for it.
    """

    name: str
    kernel: Any
    arch: int
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int | None = None
    aligned: tuple[str, ...] = ()
    registers: int | None = None
    loops: tuple[tuple[str, int, int, int], ...] = ()
    product: str = "IMMA"
    held: bool = True


@dataclass
class Recorder:
    """Stands in for a kernel: notes its launches (itself, arguments, options) in `calls`."""

    kernel: JITFunction
    calls: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **named: self.calls.append((self.kernel, arguments, named))


def launched(case: str, arch: int, run: Callable[[], Any]) -> Iterator[Build]:
    """The builds of whatever `run` launches, once each; `case` completes their names."""
    calls: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(tiles, "major", lambda device: arch // 10))
        modules = (
            append, chunk_attention, compaction, kvcrush, observe, prompt_attention, quantize_pack, replay, unpack,
        )  # fmt: skip
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(patch.object(module, name, Recorder(value, calls)))
        run()
    for kernel, arguments, named in calls:
        yield _build(case, arch, kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named)


def counted(arch: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Iterator[Build]:
    """A recorded step's counters, and a layer's token and queries."""
    k, q = torch.zeros(ROWS, HEADS, 1, dim, dtype=dtype), torch.zeros(ROWS, 4 * HEADS, 1, dim, dtype=dtype)
    window, queries = torch.zeros(ROWS, HEADS, 96, dim, dtype=dtype), torch.zeros(ROWS, 4 * HEADS, 8, dim, dtype=dtype)
    counts, kept = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)

    def run() -> None:
        append.begin_step(counts, kept, 4, 8)
        append.append_step(k, k, q, window, window, counts, queries, kept)

    yield from launched(f"D{dim}", arch, run)


def _build(case: str, arch: int, kernel: JITFunction, given: dict[str, Any]) -> Build:
    warps, stages = given.pop("num_warps", 4), given.pop("num_stages", None)
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    types, constants, aligned = {}, {}, []
    for name, value in given.items():
        if name in constexprs or value is None:
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
            if name.startswith("stride") and value % 16 == 0:
                aligned.append(name)
    parts = [kernel.__name__.removesuffix("_kernel").removesuffix("_forward")]
    for constant, names in (("VALUE", ("keys", "values")), ("OWN", ("parts", "own"))):
        if isinstance(constants.get(constant), bool):
            parts.append(names[constants[constant]])
    full = " ".join([*parts, case])
    return Build(full, kernel, arch, types, constants, warps, stages, tuple(aligned), held=(full, arch) not in SPILLING)


# ---- launches of every kernel ----------------------------------------------------------------------------------------


def layouts(dim: int, tiers: tuple[Tier, ...], dtype: torch.dtype, codec: str) -> tuple[PageLayout, ...]:
    return tuple(
        PageLayout(*(Codec.of(t, side, dim, dtype, codec) for side in ("key", "value")), TOKENS, True) for t in tiers
    )


def flush(
    arch: int,
    tiers: tuple[Tier, Tier] = ((8, 4), (4, 2)),
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    codec: str = "fitted",
    rotated: bool = True,
    which: str = "",
) -> Iterator[Build]:
    """Everything a flush launches after observing; `which`: only kernels whose name begins so."""
    both = layouts(dim, tiers, dtype, codec)
    ids, addresses = torch.zeros(ROWS, WIDTH, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    old, new = (quantize_pack.TierPages(ids, addresses, layout, i) for i, layout in enumerate(both))
    turn = torch.zeros(dim, dim) if rotated else None
    basis = Basis(turn, turn, torch.zeros(ROWS, dim) if rotated else None)
    x, score, birth = torch.zeros(ROWS, TOKENS, dim, dtype=dtype), torch.zeros(ROWS, TOKENS), _longs(ROWS, TOKENS)
    slots, flags, lengths = _ints(ROWS, TOKENS), _ints(1), _ints(ROWS, 2)
    counts = _longs(ROWS)

    def run() -> None:
        compaction.write_scores(old, lengths, score)
        compaction.read_scores(old, lengths, TOKENS)
        compaction.move_tokens(old, slots)
        compaction.copy_pages(old, ids, slots[:, :1] > 0, _ints(1, 8), _ints(16), _longs(2), _ints(1))
        compaction.clear_slots(old, counts, counts, counts, 1)
        compaction.exchange_pages(0, ids, ids, counts, counts, _ints(16), _longs(2), _ints(1))
        compaction.recode_tokens(old, new, slots, flags)
        quantize_pack.pack_rows(old, basis, x, x, score, birth, slots, flags)
        for side in ("key", "value"):
            unpack.unpack_rows(new, lengths, basis, side, TOKENS)

    names = "/".join(str(t) if isinstance(t, str | Packed) else f"K{t[0]}V{t[1]}" for t in tiers)
    extras = _extras(dtype, None, False) + [codec] * (codec != "fitted") + ["plain"] * (not rotated)
    found = launched(" ".join([names, f"D{dim}", *extras]), arch, run)
    return (build for build in found if build.name.startswith(which))


def elected(arch: int, heads: int = 32) -> Iterator[Build]:
    """KVCrush: bits, distances and the election of `heads` query heads."""
    batch, tokens = 1, TOKENS
    received, there = torch.zeros(batch, heads, tokens), torch.ones(batch, heads, tokens, dtype=torch.bool)

    def run() -> None:
        distance = kvcrush.crush_distances(received, there, None)
        kvcrush.elect(there[:, 0], distance, _longs(batch), heads)

    yield from launched(f"H{heads}", arch, run)


def replayed(
    arch: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16, softcap: float | None = None, stored: bool = False
) -> Iterator[Build]:
    """Replay of a prompt; `stored`: behind an earlier chunk whose first tokens are packed."""
    q = torch.zeros(1, 4 * HEADS, TOKENS, dim, dtype=dtype)
    k, first = q[:, :HEADS].contiguous(), torch.zeros(1, HEADS, 4, dim) if stored else None
    name = " ".join([f"D{dim}", *["stored"] * stored, *_extras(dtype, softcap, False)])
    yield from launched(name, arch, lambda: replay.most_received(q, k, None, first, 1.0, softcap, None))


def view(dim: int, dtype: torch.dtype) -> tiles.Pages:
    """Pages of both tiers, as kernels outside the decode loop take them."""
    both = layouts(dim, ((8, 4), (4, 2)), dtype, "fitted")
    return tiles.Pages(_ints(ROWS, WIDTH), _ints(ROWS, 2), _longs(1), both, 16)


def observed(
    arch: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16, softcap: float | None = None, sinks: bool = False
) -> Iterator[Build]:
    """Both passes: of a flush with eight queries over pages and window, and of a prompt's last 64 queries."""
    groups, extras = (8 if dim < 128 else 4), _extras(dtype, softcap, sinks)
    batch, k = ROWS // HEADS, torch.zeros(ROWS // HEADS, HEADS, TOKENS, dim, dtype=dtype)
    terms = (1.0, softcap, torch.zeros(groups * HEADS) if sinks else None)

    def stored() -> None:
        q, rotated = k.new_zeros(batch, groups * HEADS, 8, dim), torch.zeros(ROWS, groups * 8, dim)
        constant, last = torch.zeros(ROWS, groups * 8), _ints(batch, 8)
        observe.observe_pages(q, rotated, constant, view(dim, dtype), k, last, _longs(batch), 64, 8, 512, *terms)

    def exact() -> None:
        q = k.new_zeros(batch, groups * HEADS, TOKENS, dim)
        observe.observe_exact(q, k, _ints(batch, TOKENS), _longs(batch), *terms)

    yield from launched(" ".join(["flush", f"D{dim}", *extras]), arch, stored)
    yield from launched(" ".join(["prompt", f"D{dim}", *extras]), arch, exact)


def prompt(
    arch: int,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
    window: bool = False,
) -> Iterator[Build]:
    """Attention over exact keys and values, causal, with its log-sum-exp."""
    k, v, q, mask, before = _chunk(dim, dtype, padded, window)
    column = torch.zeros(q.shape[1]) if sinks else None
    extras = _extras(dtype, softcap, sinks) + ["padded"] * padded + ["window"] * window

    def run() -> None:
        prompt_attention.prompt_attention(q, k, v, True, 1.0, softcap, column, mask, before, None, True)

    return launched(" ".join([f"D{dim}", *extras]), arch, run)


def chunk(
    arch: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16, softcap: float | None = None
) -> Iterator[Build]:
    """A long chunk over pages, window and itself, the past split in parts: attention over both, and both joins."""
    k, v, q, mask, before = _chunk(dim, dtype, False, True)
    turn, mean = torch.zeros(dim, dim), torch.zeros(ROWS, dim)

    def run() -> None:
        held = (view(dim, dtype), Basis(turn, turn, mean), before, k, v)
        chunk_attention.attend_chunk(*held, q, mask, 1.0, softcap, None, True)

    return launched(" ".join(["chunk", f"D{dim}", *_extras(dtype, softcap, False)]), arch, run)


def _chunk(dim: int, dtype: torch.dtype, padded: bool, window: bool) -> tuple[Any, ...]:
    batch, groups = ROWS // HEADS, 8 if dim < 128 else 4
    k = torch.zeros(batch, HEADS, TOKENS, dim, dtype=dtype)
    q = k.new_zeros(batch, groups * HEADS, TOKENS, dim)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool) if padded else None
    return k, k, q, mask, (k, k, _longs(batch)) if window else None


def _extras(dtype: torch.dtype, softcap: float | None, sinks: bool) -> list[str]:
    kind = [str(dtype).removeprefix("torch.").replace("float", "fp")]
    return kind * (dtype != torch.bfloat16) + ["softcap"] * (softcap is not None) + ["sinks"] * sinks


def _ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def _longs(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)
