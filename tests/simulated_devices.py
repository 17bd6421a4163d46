"""Several devices on a machine with none: tensors that say they are on `maia:0`, `maia:1`, ... and live on the CPU.

MAIA is a device type that torch can name and that nobody's code treats specially. Inside `simulated_devices()` every
operator looks where its tensors are, as CUDA's do: one that mixes devices raises, `.to(device)` and `copy_` alone cross
them, and whatever an operator makes is on the device that it was asked for, else on that of its arguments.

What this does not show: streams and asynchronous execution, kernels of a real device and their rounding, its allocator.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

KIND = "maia"
HOST = torch.device("cpu")

CROSSES = {aten.copy_.default, aten._to_copy.default}
INDEXES = {  # takes indices from the host too
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
TAKES_NUMBERS = {aten.fill.Tensor, aten.fill_.Tensor, aten.index_put.default, aten.index_put_.default}
"""Operators that take numbers from the host in tensors without dimensions, beside all that are pointwise."""


def device(index: int) -> torch.device:
    """The simulated device of that number."""
    return torch.device(KIND, index)


class OnDevice(Tensor):
    """A tensor of a simulated device: a shell with shape, dtype and device, around the CPU tensor `held`.

    Shells of views share memory because what they hold does.
    """

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are what operators return, not all shells

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> OnDevice:
        shape, strides, offset = held.shape, held.stride(), held.storage_offset()
        shell = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=offset, dtype=held.dtype, device=place
        )
        shell.held = held
        return shell

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.held!r}, {self.device})"

    def __deepcopy__(self, memo: dict) -> OnDevice:
        if id(self) not in memo:
            memo[id(self)] = OnDevice(copy.deepcopy(self.held, memo), self.device)
        return memo[id(self)]

    # torch's own would ask for the device's guard, which is not there

    def __getitem__(self, index: Any) -> OnDevice:
        self._check_index(index)
        return OnDevice(self.held[_bare(index)], self.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        one_by_one = self._check_index(index)
        if one_by_one and isinstance(value, Tensor) and (value.device != HOST or value.dim()):
            _one_place([self, value], "__setitem__")  # slices are copied to, and copies may cross
        self.held[_bare(index)] = _bare(value)

    def _check_index(self, index: Any) -> bool:
        """Whether it names elements one by one, by tensors or lists; the tensors may be on the host."""
        parts = [x for x in (index if isinstance(index, tuple) else (index,)) if isinstance(x, Tensor | list)]
        _one_place([self, *(x for x in parts if isinstance(x, Tensor) and x.device != HOST)], "an index")
        return bool(parts)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def copy_(self, other: Tensor, non_blocking: bool = False) -> OnDevice:
        self.held.copy_(_bare(other))
        return self

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return self if self.is_contiguous() else self.clone(memory_format=memory_format)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found = aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __int__(self) -> int:
        return int(self.held)

    def __index__(self) -> int:
        return self.held.__index__()

    def __float__(self) -> float:
        return float(self.held)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _OnDevices(TorchDispatchMode):
    """Sees the operators that make tensors from nothing, which no shell would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not set(types) <= {Tensor, torch.nn.Parameter, OnDevice}:
            return NotImplemented  # another subclass has to make plain tensors first
        kwargs = kwargs or {}
        ours = OnDevice in types or kwargs.get("device") is not None
        return run(func, args, kwargs) if ours else func(*args, **kwargs)


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator on the CPU tensors that shells hold, after a look at where the shells are.

    Raises:
        RuntimeError: the arguments are on several devices.
    """
    shells: dict[int, OnDevice] = {}
    given: list[Tensor] = []

    def bare(x: Tensor) -> Tensor:
        given.append(x)
        if isinstance(x, OnDevice):
            shells[id(x.held)] = x
            return x.held
        return x

    own, own_kwargs = _map(bare, args), {name: _map(bare, x) for name, x in kwargs.items()}
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not shells and (asked is None or asked.type != KIND):
        return func(*args, **kwargs)
    place = _common_device(func, args, given)
    if asked is not None:
        place, own_kwargs["device"] = device(asked.index or 0) if asked.type == KIND else asked, HOST

    def shell(x: Tensor) -> Tensor:
        known = shells.get(id(x))  # written in place, or into out=
        if known is not None:
            assert known.shape == x.shape and known.stride() == x.stride(), f"{func} changes the shape of its argument"
            return known
        return OnDevice(x, place) if place.type == KIND else x

    return _map(shell, func(*own, **own_kwargs))


def _map(function: Callable[[Tensor], Any], x: Any) -> Any:
    """The function of every tensor in nested lists and tuples; all else as it is."""
    if isinstance(x, Tensor):
        return function(x)
    if type(x) not in (list, tuple):
        return x
    return type(x)([_map(function, item) if isinstance(item, Tensor | list | tuple) else item for item in x])


def _common_device(func: Any, args: tuple, given: list[Tensor]) -> torch.device:
    """Where an operator runs, of all the tensors that it is given; the destination where it may cross devices."""
    if func in CROSSES:
        return args[0].device
    numbers = torch.Tag.pointwise in func.tags or func in TAKES_NUMBERS
    indices = args[1] if func in INDEXES else ()
    tensors = [
        x for x in given if x.device != HOST or not ((numbers and x.dim() == 0) or any(x is index for index in indices))
    ]
    return _one_place(tensors, func)


def _one_place(tensors: list[Tensor], what: Any) -> torch.device:
    places = {x.device for x in tensors} or {HOST}
    if len(places) > 1:
        found = ", ".join(sorted(map(str, places)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {what}")
    return places.pop()


def _bare(x: Any) -> Any:
    return _map(lambda tensor: tensor.held if isinstance(tensor, OnDevice) else tensor, x)


@contextlib.contextmanager
def simulated_devices() -> Iterator[None]:
    """Inside, tensors can be made on, and brought to, `device(0)`, `device(1)` and so on; on this thread."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies by an operator that can be seen
    try:
        with torch.no_grad(), _OnDevices():  # autograd would ask for a guard too
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
