"""Partial softmax results and their merge by log-sum-exp; attention over exact keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1e30
"""Running maximum of a row that has seen no key yet; finite, so that no difference of maxima is NaN."""


@dataclass
class Partial:
    """Softmax over some of a query's keys, not yet normalised.

    Attributes:
        acc: float32 [rows, queries, value_dim], sum of exp(logit - max) times the value.
        top: float32 [rows, queries], the maximum logit, `EMPTY` where there is no key.
        mass: float32 [rows, queries], sum of exp(logit - max).
    """

    acc: Tensor
    top: Tensor
    mass: Tensor

    @classmethod
    def empty(cls, rows: int, queries: int, value_dim: int, device: torch.device) -> Partial:
        acc = torch.zeros(rows, queries, value_dim, device=device)
        return cls(acc, torch.full((rows, queries), EMPTY, device=device), torch.zeros(rows, queries, device=device))

    @property
    def lse(self) -> Tensor:
        """Log of the summed exponentials, [rows, queries]."""
        return self.top + self.mass.log()


def merge(parts: list[Partial], sinks: Tensor | None = None) -> Partial:
    """One partial result from several over disjoint keys; `sinks` [rows, queries] are logits without a value."""
    top = parts[0].top
    for part in parts[1:]:
        top = torch.maximum(top, part.top)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    weights = [torch.exp(part.top - top) for part in parts]
    mass, acc = parts[0].mass * weights[0], parts[0].acc * weights[0][..., None]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        mass, acc = mass + part.mass * weight, acc + part.acc * weight[..., None]
    if sinks is not None:
        mass = mass + torch.exp(sinks - top)
    return Partial(acc, top, mass)


def normalise(part: Partial) -> Tensor:
    """The attention output [rows, queries, value_dim]; zero where a query has no key at all."""
    return part.acc / part.mass.clamp_min(1e-30)[..., None]


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def hidden_bias(hidden: Tensor) -> Tensor:
    """bool -> float32: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def attend_exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None) -> Partial:
    """Attention over exact keys: q [rows, queries, D] (scaled), k [rows, tokens, D], v [rows, tokens, Dv], all float32.

    `bias` broadcasts to [rows, queries, tokens]: 0, or -inf for a key that a query does not see.
    """
    logits = cap(torch.bmm(q, k.transpose(1, 2)), softcap)  # [rows, queries, tokens]
    if bias is not None:
        logits += bias
    top = logits.amax(-1).clamp_min_(EMPTY)
    p = logits.sub_(top[..., None]).exp_()
    return Partial(torch.bmm(p, v), top, p.sum(-1))
