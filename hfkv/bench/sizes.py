"""What is measured: shapes, lengths and batches, for a GPU, for the CPU, and quickly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

K = 1024


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer."""

    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads} x {self.head_dim}"


@dataclass(frozen=True)
class ModelShape:
    """A Llama with random weights."""

    heads: Shape
    hidden: int
    intermediate: int
    layers: int
    vocab: int


@dataclass(frozen=True)
class Sizes:
    """Everything that `bench` measures on one kind of device.

    Attributes:
        decode_first: (tokens, batch) that the goals ask for: measured before the others.
        flex_tokens: lengths at which FlexAttention is compiled and timed; each one costs a compilation.
        flush_at: (tokens, batch) at which the flush is timed.
        single_tokens: contexts of `generate` at batch 1.
        largest_tokens: context at which every cache gets the largest batch that fits.
        new_tokens: tokens that `generate` makes per cell.
        room_bytes: bytes for caches where the device does not say what fits (CPU); None: until memory runs out.
        long_tokens, long_every: generated tokens of the long run, and how many of them make one row.
        repeat_seconds: time spent on repeats of one measurement.
    """

    decode_tokens: tuple[int, ...]
    decode_batches: tuple[int, ...]
    decode_shapes: tuple[Shape, ...]
    decode_first: tuple[tuple[int, int], ...]
    flex_tokens: tuple[int, ...]
    model: ModelShape
    prompt_tokens: tuple[int, ...]
    flush_at: tuple[tuple[int, int], ...]
    single_tokens: tuple[int, ...]
    largest_tokens: int
    new_tokens: int
    room_bytes: int | None
    long_tokens: int
    long_every: int
    long_prompt: int
    long_batch: int
    long_layers: int
    repeat_seconds: float


LLAMA_8B = ModelShape(Shape(32, 8, 128), hidden=4096, intermediate=14336, layers=32, vocab=128256)
TINY = ModelShape(Shape(8, 2, 64), hidden=256, intermediate=512, layers=4, vocab=1000)

GPU = Sizes(
    decode_tokens=(K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K),
    decode_batches=(1, 8, 32),
    decode_shapes=(Shape(32, 8, 128), Shape(64, 8, 64)),
    decode_first=((32 * K, 8), (K, 1), (64 * K, 1), (128 * K, 8)),
    flex_tokens=(K, 32 * K, 128 * K),
    model=LLAMA_8B,
    prompt_tokens=(4 * K, 8 * K, 32 * K, 128 * K),
    flush_at=((16 * K, 1), (16 * K, 8), (64 * K, 1)),
    single_tokens=(4 * K, 8 * K, 32 * K),
    largest_tokens=16 * K,
    new_tokens=64,
    room_bytes=None,
    long_tokens=10_000,
    long_every=500,
    long_prompt=K,
    long_batch=8,
    long_layers=4,
    repeat_seconds=0.3,
)
CPU = Sizes(
    decode_tokens=(K, 4 * K),
    decode_batches=(1, 4),
    decode_shapes=(Shape(8, 2, 128), Shape(16, 2, 64)),
    decode_first=((K, 1),),
    flex_tokens=(),
    model=TINY,
    prompt_tokens=(K, 4 * K),
    flush_at=((K, 1), (4 * K, 2)),
    single_tokens=(K, 4 * K),
    largest_tokens=2 * K,
    new_tokens=40,
    room_bytes=48 << 20,
    long_tokens=800,
    long_every=100,
    long_prompt=256,
    long_batch=2,
    long_layers=2,
    repeat_seconds=0.3,
)


def sizes_for(device: torch.device, quick: bool) -> Sizes:
    """The sizes for a device; `quick` takes the fewest that still fill every table."""
    if device.type != "cpu":
        if not quick:
            return GPU
        return replace(
            GPU,
            decode_tokens=(K, 32 * K),
            decode_batches=(1, 8),
            decode_first=((32 * K, 8), (K, 1)),
            flex_tokens=(32 * K,),
            prompt_tokens=(8 * K,),
            flush_at=((16 * K, 1),),
            single_tokens=(8 * K,),
            long_tokens=1000,
            long_every=100,
        )
    if not quick:
        return CPU
    return replace(
        CPU,
        decode_tokens=(512,),
        decode_batches=(1,),
        decode_shapes=(Shape(8, 2, 64),),
        decode_first=(),
        model=replace(TINY, layers=2, hidden=64, intermediate=64),
        prompt_tokens=(256,),
        flush_at=((256, 1),),
        single_tokens=(256,),
        largest_tokens=256,
        new_tokens=34,
        room_bytes=1 << 20,
        long_tokens=80,
        long_every=40,
        long_prompt=128,
        long_batch=1,
        repeat_seconds=0.02,
    )
