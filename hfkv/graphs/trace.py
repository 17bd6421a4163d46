"""What a step asks of torch, operation by operation: two steps that ask the same can be recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose result, or its size, the host must wait for."""


IDLE = {"alias", "detach", "lift_fresh"}
"""Operations that give a tensor another face and no work to the device; modes may add them."""


class NotCapturable(Exception):
    """A step cannot be recorded and replayed; the message says why."""


class StepTrace(TorchDispatchMode):
    """Records every operation of a step: its name, numbers, and the shapes it works on.

    Attributes:
        entries: one text per operation.
        outside: tensors that were there before and that an operation took; a recording of the step needs them.

    Raises:
        NotCapturable: inside the step, where the host waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[str] = []
        self._taken: dict[int, Tensor] = {}
        self._made: set[int] = set()

    @property
    def outside(self) -> list[Tensor]:
        return list(self._taken.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in IDLE:
            return func(*args, **kwargs)
        inputs = tree_leaves((args, kwargs))
        if name in WAITS or _masks_by_index(name, inputs) or (name == "repeat_interleave" and _sizeless(inputs)):
            raise NotCapturable(f"it waits for the device ({func})")
        out = func(*args, **kwargs)
        outputs = tree_leaves(out)
        self._sort(inputs, outputs)
        _check_places(name, func, inputs, outputs)
        on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs)
        self.entries.append(f"{func}({', '.join(_described(x, on_device) for x in inputs)})")
        return out

    def _sort(self, inputs: list[Any], outputs: list[Any]) -> None:
        """Tell memory that was there before from what the step has made."""
        places = {_place(x): x for x in inputs if isinstance(x, Tensor)}
        self._taken.update((place, x) for place, x in places.items() if place not in self._made)
        self._made.update(place for x in outputs if isinstance(x, Tensor) and (place := _place(x)) not in places)

    def around(self, step: Callable[[], T]) -> T:
        """Run a step and record it."""
        with self:
            return step()

    def check_same(self, later: StepTrace) -> None:
        """Raise NotCapturable where a later step asked for something else."""
        if self.entries == later.entries:
            return
        pairs = zip(self.entries, later.entries, strict=False)
        first = next(((a, b) for a, b in pairs if a != b), None)
        what = f"{first[0]}, then {first[1]}" if first else f"{len(self.entries)} operations, then {len(later.entries)}"
        raise NotCapturable(f"its steps differ, so that they depend on more than their inputs: {what}")


def _place(x: Tensor) -> int:
    """Where a tensor's memory begins; of one that has no memory of its own, what it is."""
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return -id(x)


def _masks_by_index(name: str, inputs: list[Any]) -> bool:
    """Whether an index is a mask, whose ones must be counted first."""
    masked = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
    return name in ("index", "index_put", "index_put_", "_index_put_impl_") and masked


def _sizeless(inputs: list[Any]) -> bool:
    """Whether the size of what is repeated follows from a tensor's numbers alone."""
    return all(isinstance(x, Tensor) for x in inputs if x is not None)


def _check_places(name: str, func: Any, inputs: list[Any], outputs: list[Any]) -> None:
    """Raise NotCapturable where numbers travel between the host and a device."""
    held = [x for x in inputs if isinstance(x, Tensor)]
    made = [x for x in outputs if isinstance(x, Tensor)]
    on_host = [x for x in held if x.device.type == "cpu"]
    if len(on_host) == len(held) and all(x.device.type == "cpu" for x in made):
        return
    if any(x.device.type == "cpu" for x in made):
        raise NotCapturable(f"it copies from the device to the host ({func})")
    if any(x.dim() for x in on_host) or (on_host and (len(on_host) == len(held) or name == "copy_")):
        raise NotCapturable(f"it copies from the host to the device ({func})")


def _described(x: Any, on_device: bool) -> str:
    """A number that lies on the host and enters a device's operation is frozen in a recording: so it is compared."""
    if not isinstance(x, Tensor):
        return type(x).__name__ if isinstance(x, torch.UntypedStorage | torch.Generator) else repr(x)
    if on_device and x.device.type == "cpu":
        return repr(x.item())
    return f"{x.dtype}{list(x.shape)}"
