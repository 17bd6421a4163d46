"""Significance: how much attention every token receives from a block of queries.

received_t = max over the GQA group of mean over the queries behind t of softmax(q . k)_t        (LeanKV, section 4.1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfkv.kernels.at_once import logits_at_once
from hfkv.kernels.decode_attention import cap

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
        visible: bool [rows or 1, queries, n], which query sees which of the last n tokens (causality, padding); what is
            before them all queries see.
        sinks: [rows, groups * queries] logits without a value.
        lse: [rows, groups * queries] log-sum-exp over *all* keys; None where k is all there is.
    """
    rows, tokens, (queries, limited) = q.shape[0], k.shape[1], visible.shape[1:]
    before = tokens - limited
    q = q.unflatten(1, (groups, -1))
    sinks, lse = (None if x is None else x.unflatten(1, (groups, -1)) for x in (sinks, lse))
    hidden, seen_by = HIDDEN * (~visible).float(), pad(visible.sum(1), (before, 0), value=queries)
    sees_any = (visible.any(-1) | (before > 0)).float()[:, None, None]  # [rows or 1, 1, 1, queries]
    received = torch.zeros(rows, tokens, device=q.device)
    at_once = logits_at_once(q.device, tokens) // queries  # heads
    each = max(1, min(groups, at_once))
    for first in range(0, rows, step := max(1, at_once // groups)):
        part = slice(first, first + step)
        bias, sees = (x if x.shape[0] == 1 else x[part] for x in (hidden, sees_any))
        keys = k[part].float().transpose(1, 2)
        for group in range(0, groups, each):
            some = (part, slice(group, group + each))
            logits = cap(torch.bmm(q[some].flatten(1, 2), keys), softcap).unflatten(1, (-1, queries))
            logits[..., before:] += bias[:, None]
            p = _probabilities(logits, *(None if x is None else x[some] for x in (sinks, lse)))
            total = torch.matmul(sees.expand(*p.shape[:2], 1, queries), p).squeeze(2)
            received[part] = torch.maximum(received[part], total.amax(1))
    return received / seen_by.clamp_min(1)


def _probabilities(logits: Tensor, sinks: Tensor | None, lse: Tensor | None) -> Tensor:
    """Softmax of logits [rows, groups, queries, tokens], with sinks or a known log-sum-exp [rows, groups, queries]."""
    if lse is None:
        if sinks is None:
            return logits.softmax(-1)
        lse = torch.logaddexp(logits.logsumexp(-1), sinks)
    return logits.sub_(lse[..., None]).exp_()
