"""Attention over what a layer holds: packed pages in their rotated basis, the exact window, a chunk of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfkv.fill import Fill
from hfkv.handle import Chunk
from hfkv.kernels.decode_attention import ExactKeys, JointLogits, WorkList, exact_keys, hidden_bias, join
from hfkv.kernels.prompt_attention import prompt_attention
from hfkv.kernels.quantize_pack import Basis
from hfkv.rope import Rotary
from hfkv.window import Window

if TYPE_CHECKING:
    from hfkv.paging.packed import PackedLayer

CHUNK_LOGITS = 1 << 24
"""Logits of one block of a long chunk's queries, at most."""


@dataclass(frozen=True)
class Call:
    """What one call of the attention function brings beside tensors.

    Attributes:
        scaling: factor of q . k.
        softcap: logits are softcap * tanh(logits / softcap), or None.
        sinks: [q_heads] logits of a column without a value, or None.
        rotary: the model's rotary embedding where the layer's score turns queries; else None.
    """

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Past:
    """What a layer holds at some moment; it stays readable while tokens are only appended.

    Attributes:
        packed: the packed tokens as they are by now.
        view: the pages as they were at that moment, in the form that the layer's kernels read them in.
        window, fill: the window, and how full it was.
    """

    packed: PackedLayer
    view: Any
    window: Window
    fill: Fill

    @property
    def basis(self) -> Basis:
        return self.packed.basis

    @property
    def work(self) -> WorkList:
        """The view of the plain-torch path."""
        return self.view


def attend_own(chunk: Chunk, q: Tensor, mask: Tensor | None, valid: Tensor | None, call: Call) -> Tensor:
    """Exact attention of a chunk over itself -> [batch, q_heads, queries, Dv].

    Args:
        mask: a 4-D mask (then it alone counts), or None or padding: then causal, sequences with pads one by one.
        valid: bool [batch, tokens], real tokens; None for all. The queries are the last of the tokens.
    """
    terms = (call.scaling, call.softcap, call.sinks)
    if says_more_than_padding(mask):
        return prompt_attention(q, chunk.k, chunk.v, mask, False, *terms)
    if valid is None:
        return prompt_attention(q, chunk.k, chunk.v, None, True, *terms)
    skipped = chunk.k.shape[2] - q.shape[2]
    out = q.new_zeros(*q.shape[:3], chunk.v.shape[3])
    for b in range(q.shape[0]):
        tokens = valid[b].nonzero().squeeze(1)
        if tokens.numel():
            own, row = tokens[tokens >= skipped] - skipped, slice(b, b + 1)
            k, v = chunk.k[row, :, tokens], chunk.v[row, :, tokens]
            out[row, :, own] = prompt_attention(q[row, :, own], k, v, None, True, *terms)
    return out


def attend_step(past: Past, q: Tensor, call: Call) -> Tensor:
    """Attention of the newest queries, whose tokens are in the window already -> [batch, q_heads, queries, Dv]."""
    return output(joint_logits(past, q, call, []), q)


def attend_chunk(
    past: Past, chunk: Chunk, q: Tensor, valid: Tensor | None, call: Call, observed: int
) -> tuple[Tensor, Tensor | None]:
    """A long chunk over the past and, causally, over itself, by blocks of queries.

    Returns:
        (output [batch, q_heads, queries, Dv], log-sum-exp over all keys [rows, groups, queries]; the latter is None
        where no query is `observed`).
    """
    heads, skipped = chunk.k.shape[1], chunk.k.shape[2] - q.shape[2]
    k, v = chunk.k.flatten(0, 1).float(), chunk.v.flatten(0, 1).float()
    pads = None if valid is None else hidden_bias(~valid)[:, None]  # [batch, 1, tokens]
    keys_of_all = past.work.width + past.fill.most + k.shape[1]
    step = max(16, CHUNK_LOGITS // (q.shape[0] * q.shape[1] * keys_of_all))
    outs, lses = [], []
    for first in range(0, q.shape[2], step):
        block = q[:, :, first : first + step]
        count, end = block.shape[2], skipped + first + block.shape[2]
        slot = torch.arange(end, device=q.device)
        bias = hidden_bias(slot > slot[end - count :, None])[None]  # [1, count, end]
        if pads is not None:
            bias = bias + pads[..., :end]
        rows = head_rows(block, heads, call)
        own = exact_keys(rows, k[:, :end], v[:, :end], _spread(bias, rows, count, heads), call.softcap)
        joint = joint_logits(past, block, call, [own], in_window=False)
        outs.append(output(joint, block))
        if observed:
            lses.append(joint.logits.logsumexp(-1).unflatten(1, (-1, count)))
    return torch.cat(outs, 2), torch.cat(lses, 2) if lses else None


def joint_logits(past: Past, q: Tensor, call: Call, own: list[ExactKeys], in_window: bool = True) -> JointLogits:
    """Logits of q [batch, q_heads, queries, D] over pages, window and `own` keys.

    With `in_window` the queries belong to the window's newest tokens, else the whole window lies before them.
    """
    heads, queries, window, fill = past.window.heads, q.shape[2], past.window, past.fill
    rows = head_rows(q, heads, call)
    k, v = (x.flatten(0, 1)[:, : fill.most].float() for x in (window.k, window.v))
    bias = _spread(fill.bias(queries if in_window else 1), rows, queries, heads)
    exact = [exact_keys(rows, k, v, bias, call.softcap), *own]
    return join(past.work, rows, exact, call.softcap, sink_rows(q, heads, call))


def output(joint: JointLogits, q: Tensor) -> Tensor:
    """The attention output [batch, q_heads, queries, Dv] in q's dtype."""
    return joint.attend().view(*q.shape[:3], -1).to(q.dtype)


def head_rows(q: Tensor, kv_heads: int, call: Call) -> Tensor:
    """[batch, q_heads, queries, D] -> float32 [batch * kv_heads, groups * queries, D], scaled."""
    batch, heads, queries, dim = q.shape
    return (q.float() * call.scaling).reshape(batch * kv_heads, heads // kv_heads * queries, dim)


def sink_rows(q: Tensor, kv_heads: int, call: Call) -> Tensor | None:
    """The call's sinks [q_heads] -> [batch * kv_heads, groups * queries]."""
    if call.sinks is None:
        return None
    return call.sinks.float()[None, :, None].expand(*q.shape[:3]).reshape(q.shape[0] * kv_heads, -1)


def says_more_than_padding(mask: Tensor | None) -> bool:
    """Whether a mask is a 4-D one of its own rather than the padding that `leankv_mask` gives."""
    return mask is not None and (mask.shape[-2] > 1 or mask.dtype != torch.bool or mask.shape[1] > 1)


def _spread(bias: Tensor | None, rows: Tensor, queries: int, kv_heads: int) -> Tensor | None:
    """[batch or 1, queries or 1, tokens] -> [rows or 1, groups * queries or 1, tokens]."""
    if bias is None:
        return None
    if bias.shape[1] > 1:
        bias = bias.repeat(1, rows.shape[1] // queries, 1)
    return bias if bias.shape[0] == 1 else bias.repeat_interleave(kv_heads, 0)
