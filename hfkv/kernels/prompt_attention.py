"""Attention over a prompt's own exact keys and values, and over plain tensors in general."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkv.kernels.decode_attention import cap

QUERY_BLOCK = 256


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(softcap(q k^T scaling) + mask, sinks) v -> [batch, q_heads, queries, Dv].

    Args:
        q: [batch, q_heads, queries, D]; k, v: [batch, kv_heads, tokens, D or Dv].
        mask: bool (True = look) or additive, broadcast to [batch, q_heads, queries, tokens].
        causal: queries are the last of the tokens and look no further than themselves; only without a mask.
        sinks: [q_heads] logits of a column without a value.
    """
    if softcap is not None or sinks is not None:
        return _blocked(q, k, v, mask, causal, scaling, softcap, sinks)
    groups = q.shape[1] // k.shape[1]
    queries, tokens = q.shape[2], k.shape[2]
    if causal and queries not in (1, tokens):
        mask, causal = lower_right(queries, tokens, q.device), False
    causal = causal and queries > 1
    grouped = groups > 1 and mask is None and k.shape[3] == v.shape[3] <= 256  # else SDPA falls back to its slow path
    if groups > 1 and not grouped:
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[batch, kv_heads, tokens, D] -> [batch, kv_heads * groups, tokens, D]."""
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def lower_right(queries: int, tokens: int, device: torch.device) -> Tensor:
    """bool [queries, tokens]: the last `queries` of the tokens look no further than themselves."""
    last = torch.arange(tokens - queries, tokens, device=device)[:, None]
    return torch.arange(tokens, device=device) <= last


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores by blocks of queries, for what SDPA does not know: a softcap and sinks."""
    groups, tokens = q.shape[1] // k.shape[1], k.shape[2]
    k, v = repeat_heads(k, groups).float(), repeat_heads(v, groups).float()
    out = []
    for first in range(0, q.shape[2], QUERY_BLOCK):
        part = q[:, :, first : first + QUERY_BLOCK].float() * scaling
        end = tokens - q.shape[2] + first + part.shape[2] if causal else tokens
        logits = cap(part @ k[:, :, :end].transpose(-1, -2), softcap)  # [batch, q_heads, block, end]
        if causal:
            logits = logits.masked_fill(~lower_right(part.shape[2], end, q.device), float("-inf"))
        if mask is not None:
            own = mask[..., first : first + part.shape[2], :] if mask.shape[-2] > 1 else mask
            logits = (
                logits.masked_fill(~own, torch.finfo(torch.float32).min) if own.dtype == torch.bool else logits + own
            )
        if sinks is not None:
            column = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, column], -1)
        p = logits.softmax(-1)
        out.append(p[..., :end] @ v[:, :, :end])
    return torch.cat(out, 2).to(q.dtype)
