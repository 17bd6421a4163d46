"""Turning queries on to other positions by the model's own rotary embedding, found in its modelling file."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

logger = logging.getLogger("hfkv")

TOLERANCE = 1e-3


class Rotary:
    """RoPE as a map: `turn(x, positions)` moves vectors that are rotated already by so many positions more.

    Args:
        angles: positions int64 [1, n] -> (cos, sin), float32 [1, n, dims].
        apply: the modelling file's `apply_rotary_pos_emb(q, k, cos, sin)`.
    """

    def __init__(self, angles: Callable[[Tensor], tuple[Tensor, Tensor]], apply: Callable[..., Any]) -> None:
        self._angles, self._apply = angles, apply

    def turn(self, x: Tensor, positions: Tensor, seen: int = 0) -> Tensor:
        """x [batch, heads, n, D] turned by `positions` int64 [n] or [1]; -> float32.

        Args:
            seen: length of the prompt, on which scaled rotary embeddings depend.
        """
        asked = torch.cat([positions, positions.new_tensor([max(seen - 1, 0)])])[None]
        cos, sin = (part[:, :-1].float().to(x.device) for part in self._angles(asked))
        return self._rotated(x.float(), cos, sin) / self._length(cos, sin, x)

    def matrix(self, positions: int, like: Tensor, seen: int = 0) -> Tensor:
        """float32 [D, D] with x @ matrix = x turned by `positions`, for vectors `like` these; `seen` as of `turn`."""
        basis = torch.eye(like.shape[-1], device=like.device)[None, None]
        return self.turn(basis, torch.full((1,), positions, device=like.device), seen)[0, 0]

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        try:
            return self._apply(x, x, cos, sin)[0]
        except RuntimeError:  # rotates a part of every vector, split off by the attention module
            part = cos.shape[-1]
            if part >= x.shape[-1]:
                raise
            return torch.cat([self._apply(x[..., :part], x[..., :part], cos, sin)[0], x[..., part:]], -1)

    @staticmethod
    def _length(cos: Tensor, sin: Tensor, x: Tensor) -> Tensor | float:
        """By how much a scaled rotary embedding (YaRN) makes the rotated part longer; 1 where it does not."""
        length = (cos.square() + sin.square()).mean().sqrt()
        part = cos.shape[-1] if cos.shape[-1] < x.shape[-1] // 2 or cos.shape[-1] == x.shape[-1] else x.shape[-1]
        if part == x.shape[-1]:
            return length
        return torch.cat([length.expand(part), length.new_ones(x.shape[-1] - part)])

    def works(self, dim: int, device: torch.device) -> bool:
        """Whether turns keep lengths, add up, and are none for position 0: what RoPE is."""
        x = torch.linspace(-1, 1, 2 * dim, device=device).sin().view(1, 1, 2, dim) + 0.1

        def by(vectors: Tensor, positions: int) -> Tensor:
            return self.turn(vectors, torch.tensor([positions], device=device))

        try:
            same = torch.allclose(by(x, 0), x, atol=TOLERANCE)
            adds = torch.allclose(by(by(x, 3), 5), by(x, 8), atol=TOLERANCE)
            moves = not torch.allclose(by(x, 3), x, atol=TOLERANCE)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        return same and adds and moves


def rotary_of(module: nn.Module, dim: int, device: torch.device) -> Rotary | None:
    """The rotary embedding of an attention module's model; None where it has none or none that is understood."""
    config = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    config = config.get_text_config(decoder=True)
    found = _found(module, config, device)
    if found is not None and found.works(dim, device):
        return found
    if getattr(config, "rope_parameters", None):
        logger.warning(
            "%s: its rotary embedding is not understood, so score='replay' asks queries from their own positions",
            type(module).__name__,
        )
    return None


def _found(module: nn.Module, config: PretrainedConfig, device: torch.device) -> Rotary | None:
    source = sys.modules.get(type(module).__module__)
    apply = getattr(source, "apply_rotary_pos_emb", None)
    classes = [
        item
        for name, item in vars(source).items()
        if isinstance(item, type) and name.endswith("RotaryEmbedding") and "Vision" not in name
    ]
    if apply is None or len(classes) != 1:
        return None
    try:
        embedding = classes[0](config=config).to(device)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    by_type = "layer_type" in inspect.signature(embedding.forward).parameters

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.zeros(1, device=positions.device)
        return embedding(x, positions, "full_attention") if by_type else embedding(x, positions)

    return Rotary(angles, apply)
