"""Builds of the kernels of packed tiers: attention over packs, and packing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot_launches import Build

from hfkv.kernels.triton import pack_attention, packing
from hfkv.kernels.triton.pack_attention import pack_attention_constants
from hfkv.kernels.triton.work import COLUMNS, row_entries
from hfkv.packing import BLOCK, PACK, Packed
from hfkv.quant import PageLayout

K4V2, BOUNDED = Packed(key_bits=4, value_bits=2), Packed()


def attend(arch: int, tier: Packed = K4V2, dim: int = 128, dtype: str = "bf16", capped: bool = False) -> Build:
    """Decode attention over the packs of one tier."""
    layout = PageLayout.of(tier, (dim, dim), torch.float32, "fitted", BLOCK, True)
    pointers = {"split_ptr": dtype, "terms_ptr": "fp32", "sealed_ptr": "i32", "counts_ptr": "i32", "address_ptr": "i64"}
    pointers |= {"chunks_ptr": "i64", "acc_ptr": "fp32", "stats_ptr": "fp32"}
    full = dtype == "fp32"
    pack = layout.page_bytes * PACK // BLOCK
    return Build(
        name=" ".join(["attend_packs", str(tier), f"D{dim}", *[dtype] * (dtype != "bf16"), *["softcap"] * capped]),
        kernel=pack_attention.attend_packs,
        arch=arch,
        types={name: f"*{kind}" for name, kind in pointers.items()}
        | {"softcap": "fp32"}
        | dict.fromkeys(("width", "tiles", "splits", "parts", "part"), "i32"),
        constants=pack_attention_constants(layout)
        | {"NH": COLUMNS, "DV": dim, "WIDE": row_entries(dim), "WIDE_V": row_entries(dim), "CAPPED": capped}
        | {"FULL": full},
        warps=pack_attention.warps_of(layout),
        loops=() if full else ((str(tier), PACK * 2 * dim, pack, pack),),
        product="HMMA",
        held=False,
    )


def seal(arch: int, tier: Packed = K4V2, dim: int = 128) -> Build:
    """Packing full pages."""
    layout = PageLayout.of(tier, (dim, dim), torch.float32, "fitted", BLOCK, True)
    return Build(
        name=f"seal {tier} {tier.repack} D{dim}",
        kernel=packing.seal_kernel,
        arch=arch,
        types={"pages_ptr": "*u8", "packs_ptr": "*u8", "words_ptr": "*i64"},
        constants=packing.seal_constants(layout),
        warps=packing.WARPS,
        held=False,
    )


def guarding() -> Iterator[Build]:
    """One build of each."""
    yield attend(90)
    yield seal(90)


def further() -> Iterator[Build]:
    """Other architectures, codes, sizes and orders."""
    for arch in (80, 89, 90, 100, 120):
        yield attend(arch)
        yield attend(arch, BOUNDED)
        yield seal(arch)
    for dim in (64, 256):
        yield attend(90, dim=dim)
        yield seal(90, dim=dim)
    yield attend(90, dtype="fp32", dim=64)
    yield attend(90, capped=True)
    yield attend(90, Packed(key_bits=8, value_bits=4))
    for repack in ("none", "bucket", "median"):
        yield seal(90, Packed(key_bits=4, value_bits=2, repack=repack))
