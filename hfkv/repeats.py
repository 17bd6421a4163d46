"""Prompts that a batch repeats, as `num_return_sequences` and beams have them: they are packed once."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.fill import select
from hfkv.window import Sequences


def repeated(sequences: Sequences) -> tuple[Tensor, Tensor] | None:
    """Which sequences differ from the one before them, and which of these each sequence equals.

    Returns:
        (int64 [distinct], index of each distinct sequence; int64 [batch], its number for every sequence); None where no
        sequence repeats the one before it.
    """
    k, v, fill = sequences.k, sequences.v, sequences.fill
    if fill.batch == 1 or not fill.most:
        return None
    newest = k[torch.arange(fill.batch, device=k.device), :, (fill.counts - 1).clamp_min(0)].flatten(1)
    alike = (newest[1:] == newest[:-1]).all(1) & (fill.counts[1:] == fill.counts[:-1])
    maybe = alike.tolist()  # a look at one token spares most batches the look at all of them
    same = [False] + [maybe[i] and _equal(i, i + 1, k, v, fill.positions) for i in range(len(maybe))]
    if not any(same):
        return None
    fresh = ~torch.tensor(same, device=k.device)
    return fresh.nonzero().squeeze(1), fresh.long().cumsum(0) - 1


def _equal(a: int, b: int, *parts: Tensor | None) -> bool:
    return all(part is None or torch.equal(part[a], part[b]) for part in parts)


def chosen(sequences: Sequences, index: Tensor) -> Sequences:
    """The sequences `index`, int64 [n]."""
    return Sequences(sequences.k[index], sequences.v[index], select(sequences.fill, index))
