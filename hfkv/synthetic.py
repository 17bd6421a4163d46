"""Structured synthetic keys and values: what makes real caches hard to quantise, each trait to be switched on alone.

Plain random keys flatter per-token quantisation: real ones have a few large channels that hardly change from token to
token (outliers), biases under RoPE (Qwen2.5), first tokens that draw attention to themselves (sinks), and attention
whose mass falls off as a power of the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Traits:
    """What a stream is like; the default is plain random numbers with attention of power-law mass.

    Attributes:
        outliers: key channels `gain` times larger than the others (10 to 30 in real models), constant over tokens.
        bias: size of a bias on the key channels before RoPE, heavy-tailed: most are small, a few many times this.
        sinks: first tokens that draw `sink_mass` of the attention, with keys of their own and small values.
        exponent: the token at rank r draws attention in proportion to r ** -exponent.
    """

    tokens: int = 1024
    queries: int = 64
    heads: int = 2
    groups: int = 4
    head_dim: int = 128
    outliers: int = 0
    gain: float = 20.0
    bias: float = 0.0
    sinks: int = 0
    sink_mass: float = 0.4
    exponent: float = 1.0


STREAMS = {
    "random": Traits(),
    "outliers": Traits(outliers=4),
    "biases": Traits(bias=1.5),
    "sinks": Traits(sinks=4),
    "all": Traits(outliers=4, bias=1.5, sinks=4),
}


@dataclass(frozen=True)
class Stream:
    """One layer's tensors: keys and values [heads, tokens, dim], queries [heads, groups * queries, dim], after RoPE."""

    k: Tensor
    v: Tensor
    q: Tensor

    def attention(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [heads, queries, tokens] and output [heads, queries, dim] of these keys and values."""
        logits = (self.q @ k.transpose(1, 2) * self.q.shape[-1] ** -0.5).log_softmax(-1)
        return logits, logits.exp() @ v

    def errors(self, k: Tensor, v: Tensor) -> tuple[float, float]:
        """Relative RMS error of the attention output, and mean KL(exact || these) of the attention in nats."""
        exact, out = self.attention(self.k, self.v)
        other, approx = self.attention(k, v)
        return ((approx - out).norm() / out.norm()).item(), (exact.exp() * (exact - other)).sum(-1).mean().item()


def stream(traits: Traits, seed: int = 0) -> Stream:
    """Draw a stream.

    A token's significance lies along one direction of slow RoPE channels that all queries share, so that attention
    falls off as the power law says; beyond it queries look in random directions. Outliers lie in slow channels too,
    where RoPE leaves them constant, and queries hardly look at them.
    """
    g = torch.Generator().manual_seed(seed)
    t = traits
    k, v = (torch.randn(t.heads, t.tokens, t.head_dim, generator=g) for _ in range(2))
    q = torch.randn(t.heads, t.groups * t.queries, t.head_dim, generator=g) * 0.5
    slow = _slow_channels(t.head_dim)
    significance, outliers = slow[:2], slow[2 : 2 + t.outliers]
    rank = torch.stack([torch.randperm(t.tokens, generator=g) for _ in range(t.heads)]) + 1
    wanted = -t.exponent * rank.log()  # [heads, tokens] logits
    if t.sinks:
        others = wanted[:, t.sinks :].logsumexp(1, keepdim=True)
        odds = t.sink_mass / (1 - t.sink_mass) / t.sinks
        wanted[:, : t.sinks] = others + torch.tensor(odds).log()
        k[:, : t.sinks] += 3 * torch.randn(t.heads, 1, t.head_dim, generator=g)
        v[:, : t.sinks] *= 0.1
    if t.bias:
        k = k + t.bias * torch.randn(t.heads, 1, t.head_dim, generator=g) ** 3
    strength = t.head_dim**0.25
    k[..., significance] = (wanted * strength)[..., None] / 2
    q[..., significance] = strength
    if t.outliers:
        sign = torch.randn(t.heads, 1, t.outliers, generator=g).sign()
        k[..., outliers] = t.gain * sign * (1 + 0.02 * torch.randn(t.heads, t.tokens, t.outliers, generator=g))
        q[..., outliers] *= 0.1
    positions = t.tokens - t.queries + torch.arange(t.queries).repeat(t.groups)
    return Stream(_rope(k, torch.arange(t.tokens)), v, _rope(q, positions))


def _slow_channels(dim: int) -> Tensor:
    """Channels by the wavelength of their rotation, longest first, both of a pair together."""
    half = dim // 2
    first = torch.arange(half - 1, -1, -1)
    return torch.stack([first, first + half], 1).flatten()


def _rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x [heads, n, dim], halves as pairs (Su et al., arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * ROPE_BASE ** (-torch.arange(half) / half)  # [n, half]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
