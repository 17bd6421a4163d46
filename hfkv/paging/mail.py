"""Numbers between device and host that nobody has to wait for."""

from __future__ import annotations

import torch
from torch import Tensor


class Mail:
    """Numbers on their way to the host, behind the work that makes them; asked for later, they are there.

    Args:
        numbers: int64 [n], not to be written any more.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> list[int]:
        """The numbers; waits where they have not arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


def sent(numbers: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A list of the host's on a device, [n]; the host does not wait for earlier work there."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
