"""Significance: how much attention every token receives from a block of queries.

received_t = max over the GQA group of mean over the queries behind t of softmax(q . k)_t        (LeanKV, section 4.1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.kernels.decode_attention import cap

LOGIT_BYTES = 64 << 20


def received_exact(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    groups: int,
    softcap: float | None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention that exact tokens receive, float32 [rows, tokens]; 0 for a token that no query sees.

    Args:
        q: float32 [rows, groups * queries, D], scaled; k: [rows, tokens, D].
        visible: bool [rows or 1, queries, tokens], which query sees which token (causality, padding).
        sinks: [rows, groups * queries] logits without a value.
        lse: [rows, groups * queries] log-sum-exp over *all* keys; None where k is all there is.
    """
    rows, tokens = q.shape[0], k.shape[1]
    received = torch.zeros(rows, tokens, device=q.device)
    seen_by = visible.sum(1).clamp_min(1)  # [rows or 1, tokens]
    step = max(1, LOGIT_BYTES // max(1, 4 * q.shape[1] * tokens))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        sees = visible if visible.shape[0] == 1 else visible[part]
        logits = cap(torch.bmm(q[part], k[part].float().transpose(1, 2)), softcap)
        logits = logits.unflatten(1, (groups, -1)).masked_fill_(~sees[:, None], float("-inf"))
        total = (
            _lse(logits, None if sinks is None else sinks[part])
            if lse is None
            else lse[part].unflatten(1, (groups, -1))
        )
        p = logits.sub_(total[..., None]).exp_().masked_fill_(~sees[:, None], 0.0)
        count = seen_by if seen_by.shape[0] == 1 else seen_by[part]
        received[part] = (p.sum(2) / count[:, None]).amax(1)
    return received


def _lse(logits: Tensor, sinks: Tensor | None) -> Tensor:
    total = logits.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.unflatten(1, (logits.shape[1], -1)))
    return total.masked_fill(total == float("-inf"), 0.0)
