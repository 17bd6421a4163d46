"""Replay: queries turned as the model itself would turn them, and what they then look at."""

from __future__ import annotations

import math

import pytest
import torch
from families import SUPPORTED, build
from transformers import AttentionInterface, AttentionMaskInterface

from hfkv.kernels import replay
from hfkv.kernels.replay import Asking, most_received
from hfkv.rope import rotary_of

ROTARY = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_oss", "olmo2", "glm", "cohere", "phi"]
NAMES = [name for name in ROTARY if name in {family.name for family in SUPPORTED}]
asked: list[tuple] = []


def noting(module, q, k, v, mask, **kwargs):
    asked.append((module, q))
    return torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype), None


AttentionInterface.register("noting_queries", noting)
AttentionMaskInterface.register("noting_queries", lambda **kwargs: None)


def first_queries(model, positions):
    """Queries of the first layer, which depend on tokens and positions alone."""
    asked.clear()
    ids = torch.arange(3, 3 + len(positions))[None]
    with torch.no_grad():
        model(ids, position_ids=torch.tensor([positions]), use_cache=False)
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_queries_are_turned_as_the_model_turns_them(name):
    model = build(name)
    model.set_attn_implementation("noting_queries")
    layer = next(
        (i for i, (m, _) in enumerate(first_queries(model, [0])) if getattr(m, "sliding_window", None) is None)
    )
    here = first_queries(model, [0, 1, 2, 3, 4])[layer]
    there = first_queries(model, [60, 61, 62, 63, 64])[layer]
    rotary = rotary_of(here[0], here[1].shape[-1], torch.device("cpu"))
    assert rotary is not None
    turned = rotary.turn(here[1], torch.tensor([60]), 65)
    torch.testing.assert_close(turned, there[1].float(), rtol=1e-3, atol=1e-3)
    matrix = rotary.matrix(60, here[1], 65)
    torch.testing.assert_close(here[1].float() @ matrix, turned, rtol=1e-4, atol=1e-4)
    back = rotary.turn(there[1], -torch.arange(60, 65), 65)
    at_zero = torch.cat([first_queries(model, [0] * 5)[layer][1]], 2)
    torch.testing.assert_close(back, at_zero.float(), rtol=1e-3, atol=1e-3)


def test_a_model_without_rotary_embedding_has_none():
    model = build("gpt2")
    attention = model.transformer.h[0].attn
    assert rotary_of(attention, 16, torch.device("cpu")) is None


def naive(q, k, scaling, counts, block, overlap, sinks):
    """The formula, one query at a time; every sequence from its first token."""
    best = torch.zeros(k.shape[:3])
    groups = q.shape[1] // k.shape[1]
    for b, count in enumerate(counts):
        for h in range(k.shape[1]):
            for s in range(count):
                start = s // block * block
                seen = sorted({*range(min(sinks, count)), *range(start, min(start + block + overlap, count))})
                for g in range(groups):
                    p = (k[b, h, seen] @ q[b, h * groups + g, s] * scaling).softmax(0)
                    best[b, h, seen] = torch.maximum(best[b, h, seen], p)
    return best


@pytest.mark.parametrize("groups", [1, 3])
def test_the_formula(groups, monkeypatch):
    monkeypatch.setattr(replay, "BLOCK", 8)
    monkeypatch.setattr(replay, "OVERLAP", 3)
    generator = torch.Generator().manual_seed(groups)
    k = torch.randn(2, 2, 45, 16, generator=generator)
    q = torch.randn(2, 2 * groups, 45, 16, generator=generator)
    counts = torch.tensor([45, 13])
    slot = torch.arange(45)
    last = torch.where(slot < counts[:, None], slot, -1)
    got = most_received(q, k, Asking(counts, last[:, 0]), None, 0.5, None, None)
    want = naive(q, k, 0.5, counts.tolist(), 8, 3, replay.SINKS)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1, :, :13], want[1, :, :13])
    torch.testing.assert_close(most_received(q[:1], k[:1], None, None, 0.5, None, None), want[:1])


@pytest.mark.parametrize(
    "tokens, own, before", [(1, 1, 0), (63, 4, 0), (300, 4, 0), (300, 0, 0), (300, 4, 130), (64, 0, 0)]
)
def test_every_block_is_asked_once(tokens, own, before, monkeypatch):
    monkeypatch.setattr(replay, "BLOCK", 16)
    runs = list(replay._runs(tokens, own, before))
    blocks = [start for first, behind in runs for start in range(first, behind, 16)]
    assert blocks == list(range(before // 16 * 16, tokens, 16))
    assert runs[-1][1] == tokens
    for first, behind in runs:
        if behind - first > 16:
            assert first >= max(own, before) and behind + replay.OVERLAP <= tokens


def test_few_logits_at_a_time_give_the_same(monkeypatch):
    monkeypatch.setattr(replay, "BLOCK", 8)
    monkeypatch.setattr(replay, "OVERLAP", 3)
    generator = torch.Generator().manual_seed(5)
    k, q = (torch.randn(2, heads, 40, 8, generator=generator) for heads in (2, 4))
    last = torch.arange(40).expand(2, -1)
    terms = (q, k, Asking(torch.tensor([40, 31]), last[:, 0]), None, 1.0, 3.0, None)
    whole = most_received(*terms)
    for most in (1, 4 * 15 * 10, 4 * 15 * 40):  # a query, 10 of a block's 16, two blocks
        monkeypatch.setattr("hfkv.kernels.at_once.CACHE_BYTES", most)
        torch.testing.assert_close(most_received(*terms), whole)


@pytest.mark.parametrize("queries", [100, 70, 3])
@pytest.mark.parametrize("behind", [False, True], ids=["first chunk", "behind stored tokens"])
def test_sequences_that_are_alike_need_no_masks(queries, behind, monkeypatch):
    monkeypatch.setattr(replay, "BLOCK", 16)
    generator = torch.Generator().manual_seed(queries)
    k, q = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((2, 100), (6, queries)))
    last = torch.arange(100 - queries, 100).expand(2, -1)
    first = torch.randn(2, 2, 4, 8, generator=generator) if behind else None
    masked = most_received(q, k, Asking(torch.tensor([100, 100]), last[:, 0]), first, 0.3, None, None)
    torch.testing.assert_close(most_received(q, k, None, first, 0.3, None, None), masked)


def test_what_only_its_own_context_asks_for_is_found():
    """A value that no later token asks for is what the query of its name, asked again, finds behind the name."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 100, 32, generator=generator)
    q = torch.randn(1, 1, 100, 32, generator=generator)
    q[0, 0, 40] = k[0, 0, 41] * 3  # an induction head: the query of token 40 wants the key behind it
    score = most_received(q, k, None, None, 1 / math.sqrt(32), None, None)
    assert score[0, 0].argmax() == 41


def test_tokens_without_a_query_of_their_own_are_not_the_first_to_go():
    """What the window holds of an earlier chunk gets the mean of the others if that is more than its own."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 30, 8, generator=generator)
    q = torch.randn(1, 2, 20, 8, generator=generator)
    score = most_received(q, k, None, k[:, :, :4] * 2, 1.0, None, None)  # ten tokens were there before the chunk
    assert (score[..., :10] >= score[..., 10:].mean(-1, keepdim=True) - 1e-6).all()
