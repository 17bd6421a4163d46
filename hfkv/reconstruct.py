"""KVzip: have the model repeat its prompt, and keep what it looks at while it does (Kim et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfkv.cache import LeanKVCache

BLOCK = 1024
"""Tokens that are repeated at once; each block sees the whole cache."""

LEAD = 8
"""Tokens before a block that are repeated with it, so that its first ones are asked for in context."""


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel, input_ids: Tensor, cache: LeanKVCache, attention_mask: Tensor | None = None
) -> LeanKVCache:
    """Fill a cache whose score is `"kvzip"` by two passes over the prompt, and prune it; returns the cache.

        cache = hfkv.reconstruct(model, ids, LeanKVCache(LeanKVConfig(budget=0.15, score="kvzip")))
        model.generate(torch.cat([ids, question], 1), past_key_values=cache)

    The first pass stores everything in the lower tier, the second repeats the prompt, block by block, behind it and
    notes the largest probability that each token receives. It costs at least as much time as the first (on plain torch
    nearly three times that) and, until it is over, the memory of an unpruned cache; what is pruned is given back then.
    `score="replay"`, the default, needs neither.

    Args:
        input_ids: int64 [batch, tokens]; where the cache is filled already, what it was filled with.
        attention_mask: of `input_ids`, [batch, tokens]; None: all are real.

    Raises:
        ValueError: the cache's score is not `"kvzip"`, it was pruned already, or it holds another number of tokens.
    """
    if not cache.config.reconstructs:
        raise ValueError(f"reconstruct needs LeanKVConfig(score='kvzip'), and this cache has {cache.config.score!r}")
    held, tokens = cache.get_seq_length(), input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # as `generate` counts them
    if not held:
        model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    elif held != tokens or not cache.awaits_reconstruction:
        raise ValueError(
            f"reconstruct was given {tokens} tokens and a cache of {held} that "
            f"{'waits for them' if cache.awaits_reconstruction else 'is pruned already'}: use a fresh cache"
        )
    if not cache.awaits_reconstruction:  # short enough for the window
        return cache
    with cache.reconstructing():
        for start in range(0, tokens, BLOCK):
            part = slice(max(0, start - LEAD), min(start + BLOCK, tokens))
            if not mask[:, part].any():
                continue
            model(
                input_ids[:, part],
                attention_mask=torch.cat([mask, mask[:, part]], 1),
                position_ids=mask.sum(1, keepdim=True) + positions[:, part] - positions[:, part.start, None],
                past_key_values=cache,
                logits_to_keep=1,
            )
            cache.undo_forward()
    cache.flush()
    cache.close_up()
    return cache
