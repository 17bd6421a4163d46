"""On which device launches run: Triton sends them to the current one, wherever their arguments lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def launches(entry: Callable[P, T]) -> Callable[P, T]:
    """A function that launches kernels, with the device of its first tensor as the current one."""

    @functools.wraps(entry)
    def run(*args: P.args, **named: P.kwargs) -> T:
        with on(next(x.device for x in (*args, *named.values()) if isinstance(x, Tensor))):
            return entry(*args, **named)

    return run


def on(device: torch.device) -> AbstractContextManager[None]:
    """Inside, launches run on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
