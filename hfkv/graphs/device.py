"""A step on a CUDA device, recorded once as a CUDA graph and replayed.

The rules of https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs that matter here: what is recorded is
kernels with their addresses, so every tensor from outside must stay where it is; tensors made while recording live in
the graph's private pool, and graphs that never run at once may share one; libraries and Triton load their kernels at
the first launch, which must come before; nothing may wait for the device.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_lock = threading.RLock()
_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_last_streams: dict[torch.device, torch.cuda.Stream] = {}


class CudaGraph:
    """One recorded step.

    Args:
        device: the CUDA device it runs on.
        step: device work without arguments; it is recorded and not run.
        before: an earlier recording of the same cache, whose memory this one may share; None for none.

    Attributes:
        out: what `step` returned; its tensors are written by every replay.

    Raises:
        RuntimeError: something in the step cannot be recorded.
    """

    def __init__(self, device: torch.device, step: Callable[[], Any], before: CudaGraph | None = None) -> None:
        self.device = device
        self._graph = torch.cuda.CUDAGraph()
        pool = None if before is None else before._graph.pool()
        with _lock, _on_side_stream(device), _no_collection():
            torch.cuda.synchronize(device)
            # Not `torch.cuda.graph`: it also empties the allocator's cache, which every `generate` would pay for. Other
            # threads may go on allocating.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.out = step()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    @staticmethod
    def warm_up(device: torch.device, step: Callable[[], T]) -> T:
        """Run a step as it will be recorded: on the stream of the recording, for which libraries keep workspaces."""
        with _lock, _on_side_stream(device):
            return step()

    def replay(self) -> None:
        """Run the recorded step on the current stream, behind all earlier ones: they share libraries' workspaces."""
        with _lock:
            _follow(self.device, torch.cuda.current_stream(self.device))
            self._graph.replay()


@contextlib.contextmanager
def _on_side_stream(device: torch.device) -> Iterator[None]:
    """Inside, work is queued on the device's side stream, behind what the current stream has and before its rest."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    side, current = _side_streams[device], torch.cuda.current_stream(device)
    _follow(device, current)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


def _follow(device: torch.device, stream: torch.cuda.Stream) -> None:
    """Let a stream wait for the one that ran the last recorded step, or warmed one up."""
    last = _last_streams.get(device)
    if last is not None and last != stream:
        stream.wait_stream(last)
    _last_streams[device] = stream


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: what it frees may unload kernels or graphs, which ends a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
