"""What the queries of later tokens look at: exact attention over the tokens that a cache holds, per KV head."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache

from hfkv.attention import leankv_attention, leankv_mask
from hfkv.enable import _implementation, _switch
from hfkv.kernels.decode_attention import cap
from hfkv.kernels.prompt_attention import lower_right

NAME = "leankv_probe"


@dataclass(frozen=True)
class Span:
    """Where one looks: `queries` tokens that follow the first `held`."""

    held: int
    queries: int


@dataclass
class Probe:
    """Records, in an exact forward of one sequence, how later queries spread their attention.

    Attributes:
        layers: the layers to record.
        spans: what to record of each.
        attention: by layer, per span float32 [kv_heads, held]: the share of the attention on the held tokens that each
            of them gets, the mean over the queries and over the query heads of the group; it adds up to 1.
    """

    layers: Collection[int]
    spans: list[Span]
    attention: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        index = getattr(module, "layer_idx", -1)
        if index in self.layers and index not in self.attention:
            scaling = kwargs.get("scaling")
            terms = (
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                kwargs.get("softcap"),
                kwargs.get("s_aux"),
            )
            self.attention[index] = [received(span, query[0], key[0], *terms) for span in self.spans]
        return leankv_attention(module, query, key, value, *args, **kwargs)


def received(
    span: Span, q: Tensor, k: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Share of the attention on the first `span.held` tokens that each of them gets: float32 [kv_heads, held].

    Probabilities are those of softmax over all that a query sees, sinks included; then what falls on held tokens is
    averaged over the span's queries and the group's query heads, and brought to a sum of 1.

    Args:
        q: [q_heads, tokens, D]; k: [kv_heads, tokens, D], of the whole sequence.
        sinks: [q_heads] logits of a column without a value.
    """
    end, groups = span.held + span.queries, q.shape[0] // k.shape[0]
    hidden = ~lower_right(span.queries, end, q.device)
    shares = torch.empty(k.shape[0], span.held)
    for head in range(k.shape[0]):
        own = slice(head * groups, (head + 1) * groups)
        logits = cap(q[own, span.held : end].float() * scaling @ k[head, :end].float().T, softcap)
        logits = logits.masked_fill(hidden, float("-inf"))  # [groups, queries, end]
        if sinks is not None:
            column = sinks[own].float()[:, None, None].expand(-1, span.queries, 1)
            logits = torch.cat([logits, column], -1)
        mass = logits.softmax(-1)[..., : span.held].mean((0, 1))
        shares[head] = (mass / mass.sum().clamp_min(1e-30)).cpu()
    return shares


@torch.no_grad()
def later_attention(
    model: PreTrainedModel, ids: list[int], layers: Collection[int], spans: list[Span]
) -> dict[int, list[Tensor]]:
    """Run a sequence exactly, once, and record what the queries of each span look at; see `Probe.attention`.

    Raises:
        ValueError: a layer's attention does not go through transformers' attention interface.
    """
    probe = Probe(layers, spans)
    with _probing(model, probe):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)
    missing = sorted(set(layers) - set(probe.attention))
    if missing:
        raise ValueError(f"the attention of layer {missing[0]} cannot be seen: it does not use the attention interface")
    return probe.attention


@contextmanager
def _probing(model: PreTrainedModel, probe: Probe) -> Iterator[None]:
    """Let the model's attention go through a probe, and put its own implementation back."""
    before, token = _implementation(model), _active.set(probe)
    try:
        _switch(model, NAME)
        yield
    finally:
        _switch(model, before)
        _active.reset(token)


_active: ContextVar[Probe] = ContextVar("probe")


def _probed_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _active.get()(module, *args, **kwargs)


AttentionInterface.register(NAME, _probed_attention)
AttentionMaskInterface.register(NAME, leankv_mask)
