"""A CUDA graph without CUDA: what a step does is taken down and done again on the same memory.

Every operation of torch and every launch of Triton's interpreter is kept with its very tensors and numbers, so that
what the host knows is as frozen in a recording as it is in a CUDA graph. As there, recording runs nothing: what it has
written is put back, and what it has made is spoilt until a replay makes it again. Whatever would wait for a device
raises.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hfkv.graphs.trace import WAITS

LAUNCHES = []
"""The tape that launches of kernels go to, innermost last."""


class HostRead(Exception):
    """A replay, or the host's part of a step, has asked for a number."""


class NoHostReads(TorchDispatchMode):
    """Raises where the host asks for numbers; `allowed` operations may."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Takes down what is done inside."""

    def __init__(self):
        super().__init__()
        self.entries, self.saved, self.made = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITS:
            raise HostRead(str(func))
        before = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.save(value)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and storage_of(x) not in before:
                self.made[storage_of(x)] = x
        self.entries.append((func, args, kwargs, out))
        return out

    def launch(self, run, args, kwargs):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self.save(x)
        run(*args, **kwargs)
        self.entries.append((run, args, kwargs, None))

    def save(self, x):
        """Keep the numbers that lay in a tensor's memory before this recording first wrote there."""
        for one in tree_leaves(x):
            key = storage_of(one)
            if key not in self.saved and key not in self.made:
                whole = one.untyped_storage()
                self.saved[key] = (one, whole, whole.clone())

    @property
    def outside(self):
        """Addresses of the memory that was there before and is used, every tensor of it once."""
        found = {}
        for _, args, kwargs, _ in self.entries:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor) and storage_of(x) not in self.made:
                    found[storage_of(x)] = x
        return found


class EmulatedGraph:
    """The interface of `hfkv.graphs.device.CudaGraph`."""

    def __init__(self, device, step, before=None):
        self.tape = Tape()
        LAUNCHES.append(self.tape)
        try:
            with self.tape:
                self.out = step()
        finally:
            LAUNCHES.pop()
            for _, whole, old in self.tape.saved.values():
                whole.copy_(old)
        self.tape.saved = {}
        for x in self.tape.made.values():
            spoil(x)

    @staticmethod
    def warm_up(device, step):
        return step()

    def replay(self):
        with NoHostReads():
            for func, args, kwargs, out in self.tape.entries:
                again = func(*args, **kwargs)  # a launch puts the modes aside: the interpreter may look
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and storage_of(old) != storage_of(new):
                        old.copy_(new)


def storage_of(x):
    return x.untyped_storage().data_ptr()


def spoil(x):
    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    whole.fill_(255)  # NaN in every float format, and no index at all


def record_launches(monkeypatch):
    """Let tapes take down the launches of Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run

    def run(self, *args, **kwargs):
        with _disable_current_modes():
            if LAUNCHES:
                LAUNCHES[-1].launch(lambda *a, **k: original(self, *a, **k), args, kwargs)
            else:
                original(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
