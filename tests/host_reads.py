"""What a GPU would have to be waited for, and what memory it would be asked for, counted without a GPU."""

from __future__ import annotations

import traceback
from contextlib import ExitStack

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hfkv.graphs.trace import WAITS, _masks_by_index, _sizeless

CHECKED = {"_linalg_check_errors", "_unique", "isin"}
"""More operations that a GPU is waited for in, as far as a test may meet them."""

READS = ("tolist", "numpy", "__array__", "cpu")
"""Methods by which the host takes numbers past the dispatcher of CPU tensors."""


class Watch(TorchDispatchMode):
    """Notes every place where the host takes numbers from tensors, and every tensor made with memory of its own.

    Launches of Triton's interpreter are the device's work: nothing inside them counts.

    Attributes:
        reads: one text per look of the host.
        made: operations that made memory; largest: most numbers of one of their tensors.
        written: operations that wrote into memory that was there.
        launches: kernels of Triton.
    """

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.made: list[str] = []
        self.largest = 0
        self.written: list[str] = []
        self.launches: list[str] = []
        self._launching = 0
        self._stack = ExitStack()
        for name in READS:
            self._patch(monkeypatch, name)
        try:
            from triton.runtime.interpreter import InterpretedFunction
        except ImportError:
            return
        original = InterpretedFunction.run

        def run(kernel, *args, **kwargs):
            self._launching += 1
            self.launches.append(kernel.fn.__name__)
            try:
                with _disable_current_modes():
                    return original(kernel, *args, **kwargs)
            finally:
                self._launching -= 1

        monkeypatch.setattr(InterpretedFunction, "run", run)

    def _patch(self, monkeypatch, name: str) -> None:
        original, watch = getattr(Tensor, name), self

        def read(tensor, *args, **kwargs):
            if watch._inside and not watch._launching:
                watch._note(name)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, read)

    _inside = False

    def __enter__(self):
        self._inside, self.reads, self.made, self.written, self.launches = True, [], [], [], []
        self.largest = 0
        return super().__enter__()

    def __exit__(self, *args):
        self._inside = False
        return super().__exit__(*args)

    def _note(self, name: str) -> None:
        own = [f for f in traceback.extract_stack() if "/hfkv/" in f.filename]
        where = f"{own[-1].filename.rsplit('/hfkv/', 1)[1]}:{own[-1].lineno}" if own else "elsewhere"
        self.reads.append(f"{name} at {where}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, inputs = func.overloadpacket.__name__, tree_leaves((args, kwargs or {}))
        if (
            name in WAITS | CHECKED
            or _number_by_index(name, inputs)
            or _masks_by_index(name, inputs)
            or (name == "repeat_interleave" and _sizeless(inputs))
        ):
            self._note(name)
        if func._schema.is_mutable:
            self.written.append(name)
        before = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() not in before:
                self.made.append(name)
                self.largest = max(self.largest, x.numel())
        return out


def _number_by_index(name: str, inputs: list) -> bool:
    """Whether a number of the host is put where indices say: it is brought to the device first, and waited for."""
    held = [x for x in inputs if isinstance(x, Tensor)]
    return name in ("index_put", "index_put_", "_index_put_impl_") and len(held) > 2 and held[-1].dim() == 0
