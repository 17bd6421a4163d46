"""One prompt, processed once: its exact keys and values, significance, and what recoding some of them costs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hfkv.cache import LeanKVCache
from hfkv.calibrate.coding import Coding, high_tokens, recoded
from hfkv.config import EXACT, LeanKVConfig
from hfkv.policy import Candidates
from hfkv.quant import HIGH

Prompt = tuple[list[int], list[int]]
"""Token ids of a context, which is compressed, and of what follows it."""


class Recording:
    """A prompt's exact cache and the logits behind it, and the divergence from them with some layers recoded.

    Args:
        model: attends through `leankv`.
        prompt: its context must be longer than the config's window.
        config: window, observed queries and codec of the cache that is being calibrated.

    Raises:
        ValueError: the context is too short, or no layer of the model is compressed.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt, config: LeanKVConfig) -> None:
        context, following = prompt
        if len(context) <= config.window + config.flush or not following:
            raise ValueError(
                f"a prompt of {len(context)} tokens and {len(following)} that follow: it must be longer than window "
                f"and flush block together ({config.window + config.flush}), and at least one token must follow"
            )
        self.digest = hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]
        self.prompt, self.config, self._model = prompt, config, model
        self.scores = _observed(model, context, config)
        self.exact = DynamicCache(config=model.config)
        _forward(model, context, self.exact, logits_to_keep=1)
        self._outputs: dict[int, Any] = {}
        with self._noting_outputs():
            self.reference = _forward(model, following, _fork(self.exact)).log_softmax(-1)  # [tokens, vocab]
        self.high = cache(self._high)

    @property
    def layers(self) -> list[int]:
        """The layers that LeanKVCache compresses."""
        return list(self.scores)

    def packed(self, layer: int, side: str) -> Tensor:
        """Exact vectors [heads, tokens before the window, dim] of a layer."""
        x = getattr(self.exact.layers[layer], f"{side}s")[0]
        return x[:, : x.shape[1] - self.config.window]

    def _high(self, layer: int, share: float) -> Tensor:
        """The tokens, bool [heads, tokens], that a high tier with this share would hold."""
        return high_tokens(self.scores[layer], share)

    @torch.no_grad()
    def divergence(self, codings: dict[int, list[Coding]]) -> float:
        """Mean KL(exact || recoded) in nats over the tokens that follow, with these sides of these layers recoded."""
        held = _fork(self.exact)
        for layer, sides in codings.items():
            for coding in sides:
                whole = getattr(held.layers[layer], f"{coding.side}s")[0]
                old = self.packed(layer, coding.side)
                high = self.high(layer, coding.share) if coding.share else None
                back = recoded(old, coding, high, self.config)
                setattr(held.layers[layer], f"{coding.side}s", torch.cat([back, whole[:, old.shape[1] :]], 1)[None])
        with self._beginning_at(min(codings)):
            return divergence(self.reference, _forward(self._model, self.prompt[1], held))

    def _noting_outputs(self) -> contextlib.ExitStack:
        """Note what every decoder layer gives in the exact forward."""
        stack = contextlib.ExitStack()
        for index, block in enumerate(_blocks(self._model)):

            def note(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                self._outputs[index] = output

            stack.callback(block.register_forward_hook(note).remove)
        return stack

    @contextlib.contextmanager
    def _beginning_at(self, layer: int) -> Iterator[None]:
        """Let the decoder layers before `layer`, which see nothing new, answer with what they gave in the exact run."""
        skipped = _blocks(self._model)[:layer]
        before = [block.__dict__.get("forward") for block in skipped]
        for index, block in enumerate(skipped):
            block.__dict__["forward"] = _answering(self._outputs[index])
        try:
            yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean KL in nats between log-probabilities and logits, [tokens, vocab] each."""
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean().item()


def behind(model: PreTrainedModel, prompt: Prompt, held: LeanKVCache) -> Tensor:
    """Logits of the tokens that follow, behind what a filled cache holds: [tokens, vocab]; the cache goes on."""
    return _forward(model, prompt[1], held)


def filled(model: PreTrainedModel, prompt: Prompt, config: LeanKVConfig) -> LeanKVCache:
    """A real cache that holds the prompt's context."""
    held = LeanKVCache(config)
    _forward(model, prompt[0], held, logits_to_keep=1)
    return held


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: list[int], held: DynamicCache, **options: Any) -> Tensor:
    return model(torch.tensor([ids], device=model.device), past_key_values=held, **options).logits[0].float()


def _observed(model: PreTrainedModel, context: list[int], config: LeanKVConfig) -> dict[int, Tensor]:
    """Significance [heads, tokens before the window] by compressed layer, as the cache itself observes it."""
    scores: list[Tensor] = []

    def note(candidates: Candidates) -> Tensor:
        scores.append(candidates.score[0])
        return torch.full_like(candidates.tier, HIGH)

    observing = LeanKVConfig(
        tiers=(EXACT,), policy=note, window=config.window, flush=config.flush, observe=config.observe
    )
    held = LeanKVCache(observing)
    _forward(model, context, held, logits_to_keep=1)
    layers = [layer.index for layer in held.lean_layers if layer.tokens is not None]
    if not layers:
        reasons = "; ".join(sorted(set(held.plain_reasons.values()))) or "its attention does not go through `leankv`"
        raise ValueError(
            f"no layer of this model is compressed ({reasons}): load it with attn_implementation='leankv' or call "
            "hfkv.enable(model)"
        )
    return dict(zip(layers, scores, strict=True))


def _fork(held: DynamicCache) -> DynamicCache:
    """A cache that goes on from the same keys and values, which new tokens do not change."""
    fork = copy.copy(held)
    fork.layers = [copy.copy(x) if isinstance(x, DynamicLayer) else copy.deepcopy(x) for x in held.layers]
    return fork


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in their order; empty where they cannot be told."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    attending = [m for m in lists if all(any(hasattr(x, "layer_idx") for x in block.modules()) for block in m)]
    return list(attending[0]) if len(attending) == 1 else []


def _answering(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
