"""Significance: how much attention every token receives from a block of queries.

received_t = max over the GQA group of mean over the queries behind t of softmax(q . k)_t        (LeanKV, section 4.1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfkv.kernels.decode_attention import cap

LOGIT_BYTES = 64 << 20
HIDDEN = -1e30
"""Added to the logit of a token that a query does not see; finite, so that a query that sees none gives no NaN."""


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
    rows, tokens, queries = q.shape[0], k.shape[1], visible.shape[1]
    received = torch.zeros(rows, tokens, device=q.device)
    hidden, seen_by = HIDDEN * (~visible).float(), visible.sum(1).clamp_min(1)
    sees_any = visible.any(-1).float()[:, None, None]  # [rows or 1, 1, 1, queries]
    step = max(1, LOGIT_BYTES // max(1, 4 * q.shape[1] * tokens))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        bias, count, sees = (x if x.shape[0] == 1 else x[part] for x in (hidden, seen_by, sees_any))
        logits = cap(torch.bmm(q[part], k[part].float().transpose(1, 2)), softcap)
        logits = logits.unflatten(1, (groups, -1)).add_(bias[:, None])
        p = _probabilities(logits, *(None if x is None else x[part].unflatten(1, (groups, -1)) for x in (sinks, lse)))
        weights = sees.expand(*p.shape[:2], 1, queries)
        received[part] = (torch.matmul(weights, p).squeeze(2) / count[:, None]).amax(1)
    return received


def _probabilities(logits: Tensor, sinks: Tensor | None, lse: Tensor | None) -> Tensor:
    """Softmax of logits [rows, groups, queries, tokens], with sinks or a known log-sum-exp [rows, groups, queries]."""
    if lse is None:
        if sinks is None:
            return logits.softmax(-1)
        lse = torch.logaddexp(logits.logsumexp(-1), sinks)
    return logits.sub_(lse[..., None]).exp_()
