"""What a GPU does to a launch and Triton's interpreter does not: programs in any order, side by side, undefined lanes.

The interpreter runs programs one after the other, from the first to the last. Under `Races` they run in a random order,
lanes that a load masks without `other` hold garbage, and every byte that a program reads or writes is noted. No program
may write other values than another one of its launch writes, nor read what another one writes, nor read again what it
has written itself: other threads may have written it, and no kernel here has a barrier of its own. Numbers of 32 bits
must not overflow, in no lane, and nothing be shifted by as many bits as it has.
"""

from __future__ import annotations

import numpy as np
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

READ, WRITTEN, ATOMIC = range(3)
ORDERS = ("forward", "reversed", "shuffled")


class Races:
    """Run every launch of a test in some order of its programs, and find those that do not bear it.

    Args:
        order: one of ORDERS.
        seed: of the shuffled order.

    Attributes:
        found: one text per kind of flaw of a kernel; launches: names of the kernels that ran.
    """

    def __init__(self, monkeypatch, order: str = "shuffled", seed: int = 0) -> None:
        assert order in ORDERS
        self.found: set[str] = set()
        self.launches: list[str] = []
        self._order, self._random = order, np.random.default_rng(seed)
        self._places = np.zeros((0, 3), int)
        self._program = self._clock = 0
        self._notes: list[list[np.ndarray]] = []
        self._flaws: set[str] = set()
        for name, function in (("create_add", np.add), ("create_mul", np.multiply)):
            monkeypatch.setattr(InterpreterBuilder, name, self._wide(getattr(InterpreterBuilder, name), function))
        for name in ("create_shl", "create_lshr", "create_ashr"):
            monkeypatch.setattr(InterpreterBuilder, name, self._shift(getattr(InterpreterBuilder, name)))
        for name in ("set_grid_dim", "set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw"):
            monkeypatch.setattr(InterpreterBuilder, name, self._patched(name, getattr(InterpreterBuilder, name)))
        run = InterpretedFunction.run

        def watched(kernel, *args, **kwargs):
            self._notes, self._flaws = [], set()
            out = run(kernel, *args, **kwargs)
            self.launches.append(kernel.fn.__name__)
            self.found |= {f"{kernel.fn.__name__}: {text}" for text in conflicts(self._notes) | self._flaws}
            return out

        monkeypatch.setattr(InterpretedFunction, "run", watched)

    def _patched(self, name: str, original):
        own = getattr(self, f"_{name}")
        return lambda builder, *args: own(original, builder, *args)

    def _wide(self, original, function):
        def checked(builder, x, y):
            out = original(builder, x, y)
            if out.data.dtype == np.int32 and (function(x.data.astype(int), y.data.astype(int)) != out.data).any():
                self._flaws.add("a number of 32 bits overflows")
            return out

        return checked

    def _shift(self, original):
        def checked(builder, x, y):
            if ((y.data < 0) | (y.data.astype(int) >= 8 * x.data.itemsize)).any():
                self._flaws.add("a shift by all bits of a number, or more")
            return original(builder, x, y)

        return checked

    def _set_grid_dim(self, original, builder, *dims):
        original(builder, *dims)
        self._places = np.stack(np.unravel_index(np.arange(int(np.prod(dims))), dims), 1)
        if self._order == "reversed":
            self._places = self._places[::-1]
        elif self._order == "shuffled":
            self._places = self._random.permutation(self._places)
        self._program = -1

    def _set_grid_idx(self, original, builder, *_):
        """The interpreter's next program is ours of another place."""
        self._program += 1
        original(builder, *(int(i) for i in self._places[self._program]))

    def _create_masked_load(self, original, builder, ptrs, mask, other, *rest):
        self._note(ptrs, mask, READ)
        if other is None:  # undefined lanes
            element = ptrs.get_element_ty()
            zeros = original(builder, ptrs, TensorHandle(np.zeros_like(mask.data), mask.dtype), None, *rest).data
            garbage = zeros.view(f"u{zeros.itemsize}") + zeros.dtype.type(0).view(f"u{zeros.itemsize}")
            garbage = np.full_like(garbage, np.iinfo(garbage.dtype).max - 2).view(zeros.dtype)  # NaN, or about -3
            other = TensorHandle(garbage, element)
        return original(builder, ptrs, mask, other, *rest)

    def _create_masked_store(self, original, builder, ptrs, value, mask, *rest):
        self._note(ptrs, mask, WRITTEN, value.data)
        return original(builder, ptrs, value, mask, *rest)

    def _create_atomic_rmw(self, original, builder, op, ptrs, value, mask, *rest):
        self._note(ptrs, mask, ATOMIC)
        return original(builder, op, ptrs, value, mask, *rest)

    def _note(self, ptrs, mask, kind: int, value=0) -> None:
        data, mask, value = np.broadcast_arrays(ptrs.data, mask.data.astype(bool), np.asarray(value))
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        at = (data[mask].astype(np.int64)[:, None] + np.arange(size)).ravel()
        bytes_ = np.ascontiguousarray(value[mask]).view(np.uint8).reshape(-1, value.itemsize)[:, :size].ravel()
        self._clock += 1
        self._notes.append([at, bytes_, *(np.full_like(at, x) for x in (self._program, kind, self._clock))])


def conflicts(notes: list[list[np.ndarray]]) -> set[str]:
    """What is wrong with the bytes that a launch's programs touch: per access address, byte, program, kind and time."""
    if not notes:
        return set()
    at, byte, program, kind, time = (np.concatenate(parts) for parts in zip(*notes, strict=True))
    changes = kind != READ
    changed, place = np.unique(at[changes], return_inverse=True)
    if not changed.size:
        return set()

    def limits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.full(changed.size, np.iinfo(np.int64).max), np.full(changed.size, -1)
        np.minimum.at(low, place, x[changes])
        np.maximum.at(high, place, x[changes])
        return low, high

    found = set()
    (least, most), (low, high), (begun, ended), (first, last) = map(limits, (byte, program, time, kind))
    differ = (least != most) | (first != last)  # values, or stores beside atomic operations
    if (differ & (low != high)).any():
        found.add("several programs write one byte")
    if (differ & (begun == ended)).any():
        found.add("several lanes write one byte")
    place = np.searchsorted(changed, at).clip(max=changed.size - 1)
    reads = (changed[place] == at) & (kind == READ)
    low, high, begun = low[place], high[place], begun[place]
    if ((low != program) | (high != program))[reads].any():
        found.add("a program reads what another one writes")
    if ((low == program) & (high == program) & (time > begun))[reads].any():
        found.add("a program reads what it has written")
    return found
