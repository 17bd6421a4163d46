"""Diversity of keys: how badly the others explain one, and which ones cover them all."""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 8
"""A round of `farthest_first` takes at most one token more for so many that are taken already."""


def ridge_leverage(x: Tensor, ridge: float) -> Tensor:
    """x_t (X'X + ridge I)^-1 x_t of vectors [..., T, D] -> [..., T]: one D x D solve per head.

    Rows of zeros, as of empty slots, change nothing.
    """
    x = x.float()
    gram = x.transpose(-1, -2) @ x + ridge * torch.eye(x.shape[-1], device=x.device)
    factor = torch.linalg.cholesky_ex(gram).L  # positive definite by its ridge: nobody has to wait for a check
    half = torch.linalg.solve_triangular(factor, x.transpose(-1, -2), upper=False)  # [..., D, T]
    return half.square().sum(-2)


def farthest_first(x: Tensor, exists: Tensor, held: Tensor | None) -> Tensor:
    """Unit vectors [batch, heads, T, D] in farthest-first order (Gonzalez 1985), as scores: the first taken is largest.

    Taken in rounds: those farthest from all taken before, an eighth as many as there are, without those that one taken
    in the same round has come closer to. So it needs some 8 ln(T) rounds of batched products instead of T steps.

    Args:
        exists: bool [batch, heads, T].
        held: bool [batch, heads, T], tokens that are taken already; the others are then scored by their distance to the
            nearest of them, in one round. None: none are.

    Returns:
        float32 [batch, heads, T].
    """
    shape, x = exists.shape, x.float().flatten(0, 1)
    exists = exists.flatten(0, 1)
    if held is not None:
        return _distance_to(x, held.flatten(0, 1)).view(shape)
    rows, tokens = exists.shape
    score = torch.zeros(rows, tokens, device=x.device)
    centre = torch.nn.functional.normalize(x.sum(1, keepdim=True), dim=-1)
    away = (1 - (x @ centre.transpose(1, 2)).squeeze(2)).clamp_min(0)
    distance = torch.where(exists, away, -1.0)  # of those not taken; else -1
    taken = torch.zeros(rows, 1, device=x.device)
    most = 1
    while bool((distance >= 0).any()):
        far, pick = distance.topk(min(most, tokens), dim=1)  # [rows, most]
        chosen = x.gather(1, pick[..., None].expand(-1, -1, x.shape[2]))
        take = far >= 0
        if most > 1:
            earlier = torch.ones(pick.shape[1], pick.shape[1], dtype=torch.bool, device=x.device).tril(-1)
            apart = (1 - chosen @ chosen.transpose(1, 2)).masked_fill(~earlier, float("inf"))
            take &= apart.amin(2) >= far
            take[:, 0] = far[:, 0] >= 0
        value = tokens - taken - take.cumsum(1) + 1
        score.scatter_(1, pick, torch.where(take, value, score.gather(1, pick)))
        similar = torch.where(take[:, None], x @ chosen.transpose(1, 2), -1.0).amax(2)
        nearer = (1 - similar).clamp_min(0)
        distance = torch.where(distance >= 0, nearer if most == 1 else torch.minimum(distance, nearer), distance)
        distance.scatter_(1, pick, torch.where(take, -1.0, distance.gather(1, pick)))
        taken += take.sum(1, keepdim=True)
        most = max(2, int(taken.max()) // GROWTH)
    return score.view(shape)


def _distance_to(x: Tensor, held: Tensor) -> Tensor:
    """1 - the largest cosine to a held vector: x [rows, T, D], held bool [rows, T] -> [rows, T]; 1 where none is."""
    nearest = torch.full(held.shape, float("-inf"), device=x.device)
    step = max(1, (1 << 24) // max(1, x.shape[0] * x.shape[1]))
    for first in range(0, x.shape[1], step):
        similar = x @ x[:, first : first + step].transpose(1, 2)  # [rows, T, step]
        similar = similar.masked_fill(~held[:, None, first : first + step], float("-inf"))
        nearest = torch.maximum(nearest, similar.amax(2))
    return 1 - nearest.masked_fill(nearest == float("-inf"), 0.0)
