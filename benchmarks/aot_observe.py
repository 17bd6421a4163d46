"""Ahead-of-time builds of the kernels for prompts and flushes: registers, spills and shared memory without a GPU."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hfkv.kernels.triton import chunk_attention, observe, prompt_attention
from hfkv.kernels.triton.tiles import Pages, power_of_two
from hfkv.quant import Codec, PageLayout

FLOAT_ARGS = {"scale", "softcap"}
POINTERS = {
    **dict.fromkeys(("last", "start", "ids", "lengths", "bounds"), "i32"),
    **dict.fromkeys(("addresses", "token_counts", "window_counts"), "i64"),
    **dict.fromkeys(("rotated", "constant", "sinks", "lse", "part_out", "part_lse", "own_out", "own_lse"), "fp32"),
    "shown": "u8",
}
NAMES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Build(NamedTuple):
    """One build: `tensors` types the arguments that hold the model's tensors, `fp32_out` the outputs."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    model: str
    tensors: tuple[str, ...]


def aot_builds(major: int) -> list[Build]:
    """The builds for a compute capability, as the entry functions would launch them."""
    builds = []
    for dim, groups in ((64, 8), (128, 4), (256, 4)):
        paged = {n: x for n, x in _pages(dim).constants(True).items() if n not in ("V0", "V1")}
        for name, queries, tiers in (("flush", 8, paged), ("prompt", 64, observe.NO_TIERS)):
            shape = {**_observed(dim, groups, queries), "CONSTANT": name == "flush", **tiers}
            four = {"num_warps": 4}
            builds.append(Build(f"observe_lse {name} D{dim}", observe.observe_lse, {**shape, "SINKS": False}, four,
                                "bf16", ("q", "k")))  # fmt: skip
            builds.append(Build(f"observe_scores {name} D{dim}", observe.observe_scores, shape, four, "bf16",
                                ("q", "k")))  # fmt: skip
        shape, options = chunk_attention.tile_shape(dim, dim, True, 1 << 16, major)
        constants = {**_pages(dim).constants(True), **shape, "SOFTCAP": False, "CONSTANT": True}
        builds.append(Build(f"attend_pages D{dim}", chunk_attention.attend_pages_forward, constants, options, "fp32",
                            ("q",)))  # fmt: skip
        constants = {"DV": dim, "DVB": dim, "BM": 2048 // dim, "OWN": True}
        builds.append(Build(f"join D{dim}", chunk_attention.join_forward, constants, {"num_warps": 4}, "bf16", ()))
        for model, flags in (("bf16", {}), ("bf16", {"PADDED": True, "WINDOW": True}),
                             ("bf16", {"SOFTCAP": True, "SINKS": True}), ("fp32", {"WINDOW": True})):  # fmt: skip
            builds.append(_prompt(dim, groups, model, flags, major))
    return builds


def _prompt(dim: int, groups: int, model: str, flags: dict[str, bool], major: int) -> Build:
    shape, options = prompt_attention.tile_shape(dim, dim, NAMES[model], 1 << 16, major, "PADDED" in flags)
    off = dict.fromkeys(("SOFTCAP", "SINKS", "PADDED", "WINDOW"), False)
    constants = {"GROUPS": groups, "CAUSAL": True, "LSE": True, **off, **flags, **shape}
    tensors = ("q", "k", "v", "window_k", "window_v")
    name = " ".join(["prompt", f"D{dim}", model, *(flag.lower() for flag in flags)])
    return Build(name, prompt_attention.prompt_forward, constants, options, model, tensors)


def _pages(dim: int) -> Pages:
    layouts = [
        PageLayout(*(Codec.of(t, s, dim, torch.bfloat16, "fitted") for s in ("key", "value")), 64, True)
        for t in ((8, 4), (4, 2))
    ]
    none = torch.zeros(1, 1, dtype=torch.int32)
    return Pages(none, none, none, tuple(layouts), 16)


def _observed(dim: int, groups: int, queries: int) -> dict[str, Any]:
    k = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16)
    q = torch.zeros(1, groups, queries, dim, dtype=torch.bfloat16)
    zeros = torch.zeros(1, queries)
    call = observe.Observation(q, k, zeros, zeros, 1.0, None, None)
    assert call.shape["ALL"] == power_of_two(queries)
    return call.shape


def compile_build(build: Build, arch: int) -> dict[str, int]:
    """Registers, bytes of stack (spills) and shared memory of a build."""
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for index, name in enumerate(build.kernel.arg_names):
        if name in build.constants:
            signature[name], constants[(index,)] = "constexpr", build.constants[name]
        elif name in POINTERS and name != "out":
            signature[name] = "*" + POINTERS[name]
        elif name in build.tensors or name == "out":
            fp32 = build.kernel in (observe.observe_lse, observe.observe_scores) and name == "out"
            signature[name] = "*fp32" if fp32 else "*" + build.model
        else:
            signature[name] = "fp32" if name in FLOAT_ARGS else "i32"
        if signature[name].startswith("*") or (name.startswith("stride") and not name.endswith("x")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK")}  # type: ignore[union-attr]
    return {"registers": found["REG"], "spilled bytes": found["STACK"], "shared": kernel.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 120])
    parser.add_argument("--only", default="", help="part of a build's name")
    options = parser.parse_args()
    for arch in options.arch:
        for build in aot_builds(arch // 10):
            if options.only in build.name:
                usage = compile_build(build, arch)
                print(f"sm_{arch} {build.name:40} {build.options} {usage}", flush=True)


if __name__ == "__main__":
    main()
