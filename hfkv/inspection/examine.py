"""Run a prompt through a real cache, and look at it: tiers, scores, bytes, and the attention that what is kept gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkv.cache import LeanKVCache
from hfkv.config import PRESETS, LeanKVConfig
from hfkv.enable import _implementation, _switch
from hfkv.inspection.pieces import pieces
from hfkv.inspection.probe import Span, later_attention
from hfkv.report import Report

LATER = 64
"""Later tokens whose queries judge what is kept, by default."""


@dataclass(frozen=True)
class LayerView:
    """One compressed layer at one moment, for the tokens that the cache has seen.

    Attributes:
        tier: uint8 [kv_heads, tokens], see `hfkv.report.TokenMap`.
        score: float32 [kv_heads, tokens], NaN where none is stored.
        attention: float32 [kv_heads, tokens], the share of the later queries' attention on these tokens that each gets,
            computed exactly; it adds up to 1.
    """

    tier: Tensor
    score: Tensor
    attention: Tensor

    def mass(self, tier: int) -> Tensor:
        """Share of the later queries' attention that falls on a tier's tokens, float32 [kv_heads]."""
        return (self.attention * (self.tier == tier)).sum(1)


@dataclass(frozen=True)
class Moment:
    """The cache at one moment: what the report says, and the compressed layers by index."""

    tokens: int
    later: int
    report: Report
    layers: dict[int, LayerView]


@dataclass(frozen=True)
class Examination:
    """A prompt seen through a cache.

    Attributes:
        model: name of the model, of a local one its folder's; dtype, device: what it ran in and on.
        setting: the preset that the config is, or `own config`.
        config: the cache's config.
        ids, texts: all tokens: the prompt's, those generated, and the later ones, that the cache has not seen.
        prompt: number of the prompt's tokens.
        moments: after the prompt and, where tokens were generated, after them.
        later_is_given: the later tokens are the text's own, not the model's.
    """

    model: str
    dtype: str
    device: str
    setting: str
    config: LeanKVConfig
    ids: list[int]
    texts: list[str]
    prompt: int
    moments: list[Moment]
    later_is_given: bool


def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    config: LeanKVConfig | None = None,
    *,
    generate: int = 0,
    later: int = LATER,
    following: list[int] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Examination:
    """Run a prompt through a LeanKVCache and see what it keeps, held against what later queries look at.

    Args:
        ids: the prompt's token ids.
        config: the cache's config; None is the preset `balanced`.
        generate: tokens to decode greedily with the cache; it is then looked at again.
        later: later tokens whose queries judge; fewer where the model ends its text before.
        following: the tokens that follow the prompt in its text, which then are the later ones; without them, or
            with tokens to generate, the later ones are what the model writes next, greedily, with this cache.
        say: told what happens, a line at a time.

    Raises:
        ValueError: an empty prompt, a negative number, too many tokens for the model, or no layer can be compressed.
    """
    _check(model, ids, generate, later)
    config = config if config is not None else LeanKVConfig()
    cache, before = LeanKVCache(config), _implementation(model)
    _switch(model, "leankv")
    try:
        run = _Run(model, cache, list(ids))
        given = bool(following) and not generate
        say(f"prompt of {len(ids):,} tokens")
        run.generate(1)
        seen = [(cache.get_seq_length(), cache.report(), _maps(cache))]
        if generate:
            say(f"generating {generate:,} tokens")
            run.generate(generate)
            if cache.get_seq_length() > len(ids):  # else the model ended its text at once
                seen.append((cache.get_seq_length(), cache.report(), _maps(cache)))
        if given:
            run.ids = [*ids, *(following or [])[:later]]
        else:
            say(f"letting the model write {later:,} later tokens")
            run.generate(len(ids) + generate + later - len(run.ids))
        spans = [Span(tokens, min(later, len(run.ids) - tokens)) for tokens, _, _ in seen]
        say("attention of the later tokens, exactly")
        attention = later_attention(model, run.ids, seen[0][2].keys(), spans)
    finally:
        _switch(model, before)
    moments = [
        Moment(tokens, span.queries, report, {i: LayerView(*maps[i], attention[i][number]) for i in maps})
        for number, (span, (tokens, report, maps)) in enumerate(zip(spans, seen, strict=True))
    ]
    return Examination(
        _name(model),
        str(model.dtype).removeprefix("torch."),
        str(model.device),
        next((name for name in PRESETS if LeanKVConfig.preset(name) == config), "own config"),
        config,
        run.ids,
        pieces(tokenizer, run.ids),
        len(ids),
        moments,
        given,
    )


class _Run:
    """Greedy generation on one cache, a part at a time; `ids` is one token ahead of the cache."""

    def __init__(self, model: PreTrainedModel, cache: LeanKVCache, ids: list[int]) -> None:
        self.model, self.cache, self.ids = model, cache, ids
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def generate(self, count: int) -> None:
        """`count` tokens more, unless the text has come to its end."""
        if count <= 0 or (self.cache.get_seq_length() and self.ids[-1] in self.ends):
            return
        prompt = torch.tensor([self.ids], device=self.model.device)
        out = self.model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=count,
            do_sample=False,
        )
        self.ids = out[0].tolist()


def _maps(cache: LeanKVCache) -> dict[int, tuple[Tensor, Tensor]]:
    """Tier and score [kv_heads, tokens] of the one sequence, by compressed layer."""
    layers = cache.report().layers
    maps = {layer.index: cache.token_map(layer.index) for layer in layers if layer.compressed}
    if not maps:
        raise ValueError(f"no layer of this model is compressed: {layers[0].reason if layers else 'it has no cache'}")
    return {index: (found.tier[0], found.score[0]) for index, found in maps.items()}


def _name(model: PreTrainedModel) -> str:
    name = str(model.config.name_or_path or type(model).__name__)
    return Path(name).resolve().name if Path(name).exists() else name


def _check(model: PreTrainedModel, ids: list[int], generate: int, later: int) -> None:
    if not ids:
        raise ValueError("the prompt is empty: give it at least one token")
    if generate < 0:
        raise ValueError(f"generate = {generate}: the number of tokens to generate cannot be negative")
    if later < 1:
        raise ValueError(f"later = {later}: at least one later token is needed, its queries judge what is kept")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = len(ids) + generate + later
    if limit and needed > limit:
        raise ValueError(
            f"{len(ids)} tokens of the prompt, {generate} generated and {later} later ones need {needed} positions, "
            f"the model has {limit}: use a shorter text"
        )
