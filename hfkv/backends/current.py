"""Triton launches on the current device, whatever its tensors are on; torch's own operators look at these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Work = TypeVar("Work", bound=Callable[..., Any])


def on_device_of(tensor: Callable[..., Tensor]) -> Callable[[Work], Work]:
    """Have a function's launches go to the device, and its current stream, of a tensor among the arguments.

    Args:
        tensor: from the positional arguments to the tensor.
    """

    def decorate(work: Work) -> Work:
        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(tensor(*args)):  # nothing happens where it is the current one, or on the CPU
                return work(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate
