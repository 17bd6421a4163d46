"""Time and memory on a device: events, cold caches, CUDA graphs, the copy bandwidth, peaks."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

COLD_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Bytes that pass the caches before every repeat, so that nothing measured lies there: several times an L2.

A GPU reads them: what is written waits in the L2 to go to memory, and takes bandwidth from what is measured.
"""

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
MMAP_THRESHOLD = -3
"""glibc's option: blocks of at least so many bytes are mapped on their own and go back when they are freed."""

RETURNED_BYTES = 256 << 10, 32 << 20
"""That option while a peak is measured, and afterwards: what glibc adapts itself to."""

WARM_UP = 3
REPEATS = (7, 100)


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds.

    Attributes:
        ms: the best launch that works: a CUDA graph's replay, else `eager_ms`.
        eager_ms: launched call by call from Python.
        launch: `graph` or `eager`.
        note: why there is no graph, on a GPU.
    """

    ms: float
    eager_ms: float
    launch: str
    note: str = ""


class Clock:
    """Times work on one device.

    Args:
        device: the device.
        seconds: time to spend on the repeats of one measurement.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._cold = torch.zeros(COLD_BYTES.get(device.type, 64 << 20) // 8, dtype=torch.int64, device=device)

    def time(self, step: Callable[[], object], graph: bool = True) -> Timing:
        """Time a step that can be repeated at will and changes nothing; on a GPU also as a CUDA graph."""
        for _ in range(WARM_UP):
            step()
        eager = self._median(step)
        if self.device.type != "cuda" or not graph:
            return Timing(eager, eager, "eager")
        try:
            replay = captured(step)
        except RuntimeError as error:  # what cannot be captured says so here; the eager time stands
            torch.cuda.synchronize()
            return Timing(eager, eager, "eager", f"no CUDA graph: {str(error).splitlines()[0][:120]}")
        return Timing(self._median(replay), eager, "graph")

    def copy_gbps(self) -> float:
        """Bandwidth of a large copy on the device, bytes read and written, in GB/s."""
        source = torch.empty(COPY_BYTES.get(self.device.type, 256 << 20), dtype=torch.uint8, device=self.device)
        source.random_(0, 256)
        target = torch.empty_like(source)
        for _ in range(WARM_UP):
            target.copy_(source)
        return 2 * source.nbytes / self._median(lambda: target.copy_(source)) / 1e6

    def once(self, work: Callable[[], object]) -> float:
        """Milliseconds of work that cannot be repeated, from call to completion."""
        synchronize(self.device)
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return 1000 * (time.perf_counter() - start)

    def _median(self, step: Callable[[], object]) -> float:
        first = self._repeat(step, 1)
        count = int(1000 * self.seconds / max(first[0], 1e-3))
        return statistics.median(self._repeat(step, min(max(count, REPEATS[0]), REPEATS[1])))

    def _repeat(self, step: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of `count` runs, each after the device's caches were filled with something else."""
        if self.device.type != "cuda":
            times = []
            for _ in range(count):
                self._cold.fill_(1)
                times.append(self.once(step))
            return times
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            self._cold.sum()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """A step as a CUDA graph; returns its replay.

    Raises:
        RuntimeError: the step synchronises or does something else that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose and allocate what they need outside of the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def held_bytes(device: torch.device) -> int | None:
    """Bytes of live tensors on a GPU; None where the device does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peak_above(device: torch.device, work: Callable[[], object]) -> int | None:
    """Run work -> the most bytes it held above what was held before; None where the device cannot say.

    On the CPU these are resident bytes of the process, on Linux with glibc.
    """
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    mark, libc = Path("/proc/self/clear_refs"), ctypes.CDLL(None)
    if not (mark.exists() and hasattr(libc, "malloc_trim")):
        work()
        return None
    libc.mallopt(MMAP_THRESHOLD, RETURNED_BYTES[0])  # else what earlier frees left resident hides what is taken
    libc.malloc_trim(0)
    mark.write_text("5")  # resets the high-water mark to what is resident now
    start = _high_water()
    work()
    peak = _high_water() - start
    libc.mallopt(MMAP_THRESHOLD, RETURNED_BYTES[1])
    return peak


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
