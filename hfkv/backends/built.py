"""Loops for the CPU, built once by torch's AOTInductor, kept on disk, loaded by later processes.

What is on disk is machine code for this processor, in `loops/` of `hfkv.folder.kept_folder`, one file per `StepShape`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfkv import quant
from hfkv.folder import kept_folder
from hfkv.kernels import decode_attention, loops
from hfkv.kernels.folding import Folding
from hfkv.kernels.loops import StepShape, step_loops
from hfkv.paging.addressed import no_pages

logger = logging.getLogger("hfkv")

Step = Callable[..., Tensor]

_steps: dict[StepShape, Step | None] = {}
_one_at_a_time = threading.Lock()


def require_compiler() -> None:
    """Raise ValueError where no C++ compiler is found."""
    reason = _obstacle()
    if reason is not None:
        raise ValueError(
            f"loops for the CPU need a C++ compiler: {reason}; install g++ or clang++, or decode without "
            "hfkv.compile_decode and HFKV_BACKEND=inductor"
        )


@functools.cache
def _obstacle() -> str | None:
    """Why nothing can be built, or None."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # here and not above: it imports the compiler

        get_cpp_compiler()
    except Exception as error:
        return _first_line(error)
    return None


def built_step(shape: StepShape, folding: Folding) -> Step | None:
    """The loops for a shape, with the arguments of `step_loops`; None where they cannot be had, which is said once.

    They are loaded, or else built, which takes up to a minute or so, once on a machine.
    """
    with _one_at_a_time:
        if shape not in _steps:
            try:
                _steps[shape] = _loaded(shape, folding)
            except Exception as error:
                logger.warning(
                    "decode steps are left to plain torch, which is slower: loops could not be built: %s",
                    _first_line(error),
                )
                _steps[shape] = None
        return _steps[shape]


def _loaded(shape: StepShape, folding: Folding) -> Step:
    file = _folder() / f"{_name(shape)}.pt2"
    if file.is_file():
        try:
            return _runner(file)
        except Exception as error:
            logger.warning("%s is not readable and is built anew: %s", file, _first_line(error))
    logger.warning(
        "building the loops that read packed codes on this CPU, for a minute or so, once per kind of layer; they are "
        "kept in %s (HFKV_BACKEND=torch does without)",
        file.parent,
    )
    begin = time.monotonic()
    _build(shape, folding, file)
    logger.info("built in %.0f s", time.monotonic() - begin)
    return _runner(file)


def _build(shape: StepShape, folding: Folding, file: Path) -> None:
    """Compile into a file beside `file`, then rename: `file` is whole or absent.

    The example's sizes are such that no two are the same by chance: equal ones would be taken for one.
    """
    arguments, open_dims = _example(shape, folding)
    dims = _like(arguments, lambda x: dict.fromkeys(open_dims.get(id(x), ()), torch.export.Dim.AUTO))
    descriptor, partial = tempfile.mkstemp(prefix=f"{file.stem}.", suffix=".pt2", dir=file.parent)
    os.close(descriptor)
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own parts
            program = torch.export.export(_Step(shape), tuple(arguments), dynamic_shapes=(tuple(dims),), strict=False)
            options: Any = {"cpp.threads": shape.threads}
            torch._inductor.aoti_compile_and_package(program, package_path=partial, inductor_configs=options)
        os.replace(partial, file)
    finally:
        Path(partial).unlink(missing_ok=True)


class _Step(nn.Module):
    """`step_loops` as what can be exported."""

    def __init__(self, shape: StepShape) -> None:
        super().__init__()
        self.step = step_loops(shape)

    def forward(self, *arguments: Any) -> Tensor:
        return self.step(*arguments)


def _runner(file: Path) -> Step:
    """What is in a file. Its own call would read its description again each time."""
    loader = torch._inductor.aoti_load_package(str(file)).loader
    run = getattr(loader, "boxed_run", loader.run)

    def step(*arguments: Any) -> Tensor:
        return run(list(_tensors(arguments)))[0]

    return step


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """Tensors in nested lists and tuples, in the order in which an exported program takes them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif argument is not None:
            yield from _tensors(argument)


def _like(arguments: Any, of: Callable[[Tensor], Any]) -> list[Any]:
    """`of` every tensor, in lists and tuples nested alike."""
    return [
        of(x) if isinstance(x, Tensor) else None if x is None else type(x)(_like(x, of))  # type: ignore[call-arg]
        for x in arguments
    ]


def _example(shape: StepShape, folding: Folding) -> tuple[list[Any], dict[int, set[int]]]:
    """Arguments of `step_loops`, and by tensor's id the dimensions of it that are open."""
    rows, queries = (1 if single else size for single, size in zip(shape.single, (3, 5), strict=True))
    dims = (shape.layouts[0].key.dim, shape.layouts[0].value.dim)
    q = torch.zeros(rows, shape.groups, queries, dims[0], dtype=shape.dtype)
    k, v = (torch.zeros(rows, shape.slots, dim, dtype=shape.dtype) for dim in dims)
    filled = torch.full((rows,), queries)
    sinks = None if shape.absent[0] else torch.zeros(rows, shape.groups * queries)
    mean = None if shape.absent[1] else torch.zeros(rows, dims[0])
    pages = []
    for tier, layout in enumerate(shape.layouts):
        which = torch.zeros(rows, 101 + 2 * tier, dtype=torch.int64)
        pages.append((no_pages(layout, 51 + 2 * tier), which, torch.zeros_like(which, dtype=torch.int32)))
    per_row = [q, k, v, filled, sinks, mean, *(x for part in pages for x in part[1:])]
    opened = [(x, 0) for x in per_row if not shape.single[0]]
    opened += [(x, 2 if x is q else 1) for x in (q, sinks) if not shape.single[1]]
    opened += [(part[0], 0) for part in pages] + [(x, 1) for part in pages for x in part[1:]]
    open_dims: dict[int, set[int]] = {}
    for x, dim in opened:
        open_dims.setdefault(id(x), set()).add(dim)
    return [q, k, v, filled, sinks, folding.queries, mean, list(folding.values), pages], open_dims


# ---- on disk -----------------------------------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    """Where loops are kept; a folder of this process's own where that cannot be written."""
    folder = kept_folder() / "loops"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning("%s cannot be written, loops are kept for this process alone: %s", folder, _first_line(error))
        return Path(tempfile.mkdtemp(prefix="hfkv-loops-"))


def _name(shape: StepShape) -> str:
    """What a shape's loops are called for this torch, processor and code."""
    return hashlib.sha256(repr((_machine(), shape)).encode()).hexdigest()[:32]


@functools.cache
def _machine() -> tuple[str, ...]:
    """All that loops depend on besides their shape."""
    source = b"".join(Path(module.__file__ or "").read_bytes() for module in (loops, decode_attention, quant))
    return (torch.__version__, platform.machine(), _processor(), hashlib.sha256(source).hexdigest())


def _processor() -> str:
    """The instructions that this processor has: a folder may be shared with others."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
