"""KVCrush: one bit per query head and token, the distance to an anchor, and evenly spaced seats among equals.

    bit_ht = A_ht >= median_t A_h        distance_t = popcount(bits_t xor anchor)        (KVCrush, section 3; PMLR v304)

`A` is the attention that each token receives; tokens are in the order of their positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def medians(received: Tensor, exists: Tensor) -> Tensor:
    """Each head's n // 2 th largest value over the n tokens that exist, float32 [batch, heads].

    So for even n and no ties exactly half of a head's tokens reach it. A head without tokens has infinity.

    Args:
        received: float32 [batch, heads, T]; exists: bool, the same shape.
    """
    ordered = torch.where(exists, received, float("-inf")).sort(-1, descending=True).values
    count = exists.sum(-1, keepdim=True)
    median = ordered.gather(-1, (count // 2 - 1).clamp_min(0)).squeeze(-1)
    return median.masked_fill(count.squeeze(-1) == 0, float("inf"))


def head_bits(received: Tensor, exists: Tensor, median: Tensor) -> Tensor:
    """Which heads give a token at least their median: bool [batch, heads, T]; none where it does not exist."""
    return (received >= median[..., None]) & exists


def majority(ones: Tensor, count: Tensor) -> Tensor:
    """The anchor MEAN: whether more than half (strictly) of `count` tokens have the bit, which `ones` have."""
    return ones * 2 > count


def hamming(bits: Tensor, anchor: Tensor) -> Tensor:
    """In how many heads bits [batch, heads, T] differ from the anchor [batch, heads]: int64 [batch, T]."""
    return (bits != anchor[..., None]).sum(1)


def crush_distances(received: Tensor, exists: Tensor, anchor: Tensor | None) -> Tensor:
    """Distance of every token to the anchor, int64 [batch, T].

    Args:
        received: float32 [batch, heads, T]; exists: bool [batch, heads, T].
        anchor: bool [batch, heads]; None: MEAN, the majority over each head's tokens.
    """
    bits = head_bits(received, exists, medians(received, exists))
    return hamming(bits, majority(bits.sum(-1), exists.sum(-1)) if anchor is None else anchor)


def elect(among: Tensor, distance: Tensor, seats: Tensor, most: int) -> Tensor:
    """Seats at evenly spaced ranks of the tokens `among`, sorted by (distance, position): bool [rows, T].

    Args:
        among: bool [rows, T], who may be elected.
        distance: int [rows, T], >= 0.
        seats: int64 [rows]; more than there are candidates elect them all.
        most: the largest distance there can be: the number of heads.
    """
    rank = torch.where(among, distance.long(), most + 1).argsort(dim=1, stable=True).argsort(1)
    count, seats = among.sum(1, keepdim=True), seats[:, None]
    return seat_at(rank, count, seats) & among


def seat_at(rank: Tensor, count: Tensor, seats: Tensor) -> Tensor:
    """Whether `rank` < count is one of `seats` evenly spaced ranks: exactly min(seats, count) of them are."""
    count = count.clamp_min(1)
    seats = torch.minimum(seats, count)
    return (rank + 1) * seats // count > rank * seats // count
