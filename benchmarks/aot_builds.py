"""What is compiled ahead of time: every kernel, for the cases and architectures that it is meant for.

Decode kernels are described here; all others are taken from the launches of their entry functions (`aot_launches`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import aot_packs
import torch
from aot_launches import Build, chunk, counted, elected, flush, observed, prompt, replayed

from hfkv.config import Tier
from hfkv.kernels.triton import decode_kernels
from hfkv.kernels.triton.decode_attention import MERGED, ROTATED
from hfkv.kernels.triton.pages import pages_of
from hfkv.kernels.triton.work import COLUMNS, WARPS, registers_of, row_entries, stages_of
from hfkv.quant import Codec, PageLayout

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
K8V4, K4V4, K4V2, K3V3 = (8, 4), (4, 4), (4, 2), (3, 3)


def decode(
    tiers: tuple[Tier, ...],
    arch: int,
    dim: int = 128,
    dtype: str = "bf16",
    tokens: int = 64,
    codec: str = "fitted",
    capped: bool = False,
    warps: int = WARPS,
    held: bool = True,
) -> Build:
    """The decode kernel over one or two tiers and the window."""
    layouts = [
        PageLayout(*(Codec.of(t, side, dim, TORCH[dtype], codec) for side in ("key", "value")), tokens, True)
        for t in tiers
    ]
    full, wide = dtype == "fp32", row_entries(dim)
    stages = stages_of(full)
    names = ["exact" if t == "exact" else f"K{t[0]}V{t[1]}" for t in tiers]
    extras = [codec] * (codec != "fitted") + [dtype] * (dtype != "bf16") + ["softcap"] * capped
    pointers = {
        "q_ptr": dtype,
        "whole_ptr": "i8",
        "split_ptr": dtype,
        "terms_ptr": "fp32",
        "ids_ptr": "i32",
        "lengths_ptr": "i32",
        "chunks_ptr": "i64",
        "items_ptr": "i32",
        "window_k_ptr": dtype,
        "window_v_ptr": dtype,
        "counts_ptr": "i64",
        "acc_ptr": "fp32",
        "stats_ptr": "fp32",
    }
    strides = ("stride_batch", "stride_head", "stride_query")
    numbers = ("table_width", "heads", "queries", "columns", "tiles", "capacity", *strides)
    loops = tuple(
        (
            name,
            warps * tokens * (layout.key.dim + layout.value.dim),
            warps * layout.page_bytes,
            warps * layout.fields["value_zero"][1],
        )
        for name, layout in zip(names, layouts, strict=True)
        if layout.key.bits and not full
    )
    return Build(
        name=" ".join(["decode", "/".join(names), f"D{dim}", f"P{tokens}", *extras]),
        kernel=decode_kernels.decode_items,
        arch=arch,
        types={name: f"*{kind}" for name, kind in pointers.items()}
        | {"scale": "fp32", "softcap": "fp32"}
        | dict.fromkeys(numbers, "i32"),
        constants=dict(
            HIGH=pages_of(layouts[0]),
            LOW=pages_of(layouts[1]) if len(layouts) == 2 else None,
            NH=COLUMNS,
            D=dim,
            DV=dim,
            WIDE=wide,
            WIDE_V=wide,
            CAPPED=capped,
            FULL=full,
            STAGES=stages[0],
            STAGES_LOW=stages[1],
            W=warps,
        ),
        warps=4 * warps if full else warps,
        aligned=strides,
        registers=None if full else registers_of(arch, tuple(layouts)),
        loops=loops,
        held=held,
    )


def prepare(
    arch: int, dim: int = 128, dtype: str = "bf16", plain: bool = False, coded: bool = True, split: bool = False
) -> Build:
    """The kernel that makes queries the operands of pages; `plain`: without rotation and mean."""
    absent = ("rotation_ptr", "mean_ptr") if plain else ()
    pointers = {"q_ptr": dtype, "rotation_ptr": "fp32", "mean_ptr": "fp32"}
    pointers |= {"whole_ptr": "i8", "split_ptr": dtype, "terms_ptr": "fp32"}
    strides = ("stride_batch", "stride_head", "stride_query")
    extras = [dtype] * (dtype != "bf16") + ["plain"] * plain + ["split"] * split
    return Build(
        name=" ".join(["prepare", f"D{dim}", *extras]),
        kernel=decode_kernels.prepare_queries,
        arch=arch,
        types={name: f"*{kind}" for name, kind in pointers.items() if name not in absent}
        | {"scale": "fp32"}
        | dict.fromkeys(("heads", "queries", "columns", "tiles", *strides), "i32"),
        constants=dict(NH=COLUMNS, D=dim, BLOCK=ROTATED, WIDE=row_entries(dim), CODED=coded, SPLIT=split)
        | {"FULL": dtype == "fp32", **dict.fromkeys(absent)},
        warps=4,
        aligned=strides,
    )


def combine(arch: int, dim: int = 128, dtype: str = "bf16", plain: bool = False, parts: int = 0) -> Build:
    """The kernel that merges a row's items; `plain`: without rotation and sinks; `parts`: results of packs per row."""
    absent = ("rotation_ptr", "sinks_ptr") if plain else ()
    pointers = {"acc_ptr": "fp32", "stats_ptr": "fp32", "more_acc_ptr": "fp32", "more_stats_ptr": "fp32"}
    pointers |= {"items_ptr": "i32", "offsets_ptr": "i32"}
    pointers |= {"rotation_ptr": "fp32", "sinks_ptr": "fp32", "out_ptr": dtype}
    return Build(
        name=" ".join(["combine", f"D{dim}", *["plain"] * plain, *["packs"] * (parts > 0)]),
        kernel=decode_kernels.combine_items,
        arch=arch,
        types={name: f"*{kind}" for name, kind in pointers.items() if name not in absent}
        | dict.fromkeys(("window", "heads", "queries", "columns", "tiles"), "i32"),
        constants=dict(PARTS=parts, NH=COLUMNS, DV=dim, WIDE_V=row_entries(dim), BLOCK=ROTATED, STEP=MERGED)
        | dict.fromkeys(absent),
        warps=4,
    )


# ---- the lists -------------------------------------------------------------------------------------------------------


def guarding() -> Iterator[Build]:
    """One build or more of every kernel: what the gate compiles."""
    for arch in (90, 80, 89, 100, 120):
        yield decode((K8V4, K4V2), arch)
    yield prepare(90)
    yield combine(90)
    yield combine(90, parts=8)
    yield decode((K8V4,), 90)
    yield decode((K8V4, K4V2), 90, tokens=32)
    yield decode((K8V4, K4V2), 90, dim=64)
    yield decode(("exact",), 90)
    others = ("recode values", "unpack values")  # 40 builds in all: of these two, that of the keys stands for both
    yield from (build for build in flush(90) if not build.name.startswith(others))
    yield from observed(90)
    yield from chunk(90)
    yield from prompt(90)
    yield from replayed(90)
    yield from elected(90)
    yield from counted(90)
    yield from aot_packs.guarding()


def further() -> Iterator[Build]:
    """Other shapes, dtypes, codecs and optional arguments, and other architectures."""
    for arch in (90, 80):
        yield decode((K8V4, K4V2), arch, capped=True)
        yield decode((K8V4, K4V2), arch, dim=256, held=False)
        yield decode((K8V4, K4V2), arch, dim=96)
        yield decode((K8V4, K4V2), arch, codec="minmax")
        yield decode((K4V4, K3V3), arch, held=False)
        yield decode(("exact", K4V2), arch)
        yield decode((K8V4, K4V2), arch, dim=64, tokens=32, dtype="fp32", held=False)
        yield decode((K8V4, K4V2), arch, warps=4, held=False)
        yield decode((K8V4, K4V2), arch, warps=1, held=False)
        yield prepare(arch, plain=True)
        yield prepare(arch, split=True)
        yield prepare(arch, dtype="fp32", coded=False, split=True)
        yield combine(arch, plain=True)
    for arch in (80, 89, 100, 120):
        yield prepare(arch)
        yield combine(arch)
    for arch in (80, 100, 120):
        yield from counted(arch)
    yield from prompt(80)
    for arch in (80, 89, 100, 120):
        yield from replayed(arch)
    for dim, dtype in ((64, torch.float32), (64, torch.bfloat16), (256, torch.bfloat16), (256, torch.float32)):
        yield from replayed(90, dim, dtype)
    yield from replayed(90, softcap=30.0, stored=True)
    yield from flush(90)
    for arch in (80, 120):
        yield from flush(arch)
        yield from observed(arch)
        yield from elected(arch)
    yield from elected(90, heads=128)
    yield from flush(90, (K4V4, K3V3))
    yield from flush(90, (K4V2, K4V2), which="pack")
    yield from flush(90, codec="minmax")
    yield from flush(90, ("exact", K4V2), which="pack")
    yield from flush(90, (aot_packs.BOUNDED, K4V2), which="pack")
    yield from flush(90, (K8V4, aot_packs.BOUNDED), which="recode")
    yield from flush(90, ("exact", K4V2), which="recode")
    yield from flush(90, rotated=False, which="pack")
    yield from flush(90, (K8V4, "exact"), which="unpack")
    yield from observed(90, softcap=30.0, sinks=True)
    for arch in (80, 90, 120):
        for dim in (64, 128, 256):
            yield from prompt(arch, dim)
            yield from prompt(arch, dim, padded=True, window=True)
            yield from prompt(arch, dim, torch.float32, window=True)
            yield from chunk(arch, dim)
        yield from prompt(arch, softcap=30.0, sinks=True)
        yield from chunk(arch, softcap=30.0)
    for dim in (64, 256):
        yield from observed(90, dim)
        yield from flush(90, dim=dim, which="pack")
        yield from flush(90, dim=dim, which="recode")
        yield from flush(90, dim=dim, which="unpack")
    yield from chunk(90, 64, torch.float32)
    yield from aot_packs.further()


@functools.cache
def builds(ci: bool) -> tuple[Build, ...]:
    """Everything that is compiled, once each; with `ci` the few that guard the limits."""
    found: dict[tuple[str, int, int], Build] = {}
    for build in [*guarding(), *([] if ci else further())]:
        found.setdefault((build.name, build.warps, build.arch), build)
    return tuple(found.values())
