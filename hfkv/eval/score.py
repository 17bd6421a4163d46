"""What a filled cache answers: greedy decoding held to what is expected, step by step, and agreement on text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hfkv.demo.measures import agreement, equal_tokens
from hfkv.eval.forks import fork as forked
from hfkv.eval.forks import repeated
from hfkv.eval.methods import physical_bytes

BLOCK = 16
"""Expected tokens that are checked in one forward: fewer than a flush takes, so that the cache ages as in decoding."""


TOGETHER_BYTES = 2 << 30
"""Bytes of a cache that may be repeated to ask several questions at once."""


@dataclass(frozen=True)
class Asked:
    """A question as token ids: what follows the compressed prompt, and the steps that should come then.

    Attributes:
        lead: tokens given behind the compressed prompt, at least one.
        steps: tokens of each step of the answer.
    """

    lead: list[int]
    steps: list[list[int]]


@torch.no_grad()
def answers(model: PreTrainedModel, cache: Cache, questions: list[Asked]) -> list[float]:
    """`right_steps` of each question, many short ones in one forward."""
    most = max(1, TOGETHER_BYTES // max(physical_bytes(cache), 1))
    short = [i for i, asked in enumerate(questions) if sum(map(len, asked.steps)) <= BLOCK]
    right: dict[int, float] = {}
    for first in range(0, len(short), most):
        group = short[first : first + most]
        repeats = repeated(cache, len(group)) if len(group) > 1 else None
        if repeats is not None:
            right |= zip(group, _together(model, repeats, [questions[i] for i in group]), strict=True)
    return [right[i] if i in right else right_steps(model, cache, asked) for i, asked in enumerate(questions)]


def _together(model: PreTrainedModel, cache: Cache, questions: list[Asked]) -> list[float]:
    """`right_steps` of questions of one block each, of which `cache` holds a copy of the prompt for every one.

    What is short gets tokens behind it, which causal attention keeps from what comes before.
    """
    expected = [[token for step in asked.steps for token in step] for asked in questions]
    given = [asked.lead + own[:-1] for asked, own in zip(questions, expected, strict=True)]
    width = max(map(len, given))
    ids = torch.tensor([own + own[-1:] * (width - len(own)) for own in given], device=model.device)
    keep = width - min(len(asked.lead) for asked in questions) + 1
    said = model(ids, past_key_values=cache, logits_to_keep=keep).logits.argmax(-1).tolist()
    shares = []
    for asked, own, row in zip(questions, expected, said, strict=True):
        first = len(asked.lead) - 1 - (width - len(row))
        shares.append(_finished(asked.steps, equal_tokens(row[first:], own)) / len(asked.steps))
    return shares


@torch.no_grad()
def right_steps(model: PreTrainedModel, cache: Cache, asked: Asked) -> float:
    """Share of the steps before greedy decoding first differs from them, in [0, 1]; `cache` is left as it was.

    The expected tokens are given in blocks of `BLOCK`, until one is not the most probable: up to there they are
    exactly what greedy decoding would have chosen and stored.
    """
    fork = forked(cache)
    expected = [token for step in asked.steps for token in step]
    given, right = asked.lead + expected[: BLOCK - 1], 0
    while right < len(expected):
        said = _greedy(model, fork, given, len(given) if right else len(given) - len(asked.lead) + 1)
        equal = equal_tokens(said, expected[right:])
        right += equal
        if equal < len(said):
            break
        given = expected[right - 1 :][:BLOCK]
    return _finished(asked.steps, right) / len(asked.steps)


def _greedy(model: PreTrainedModel, cache: Cache, ids: list[int], last: int = 1) -> list[int]:
    """What greedy decoding says behind the `last` of the tokens given."""
    logits = model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=last).logits[0]
    return logits[-last:].argmax(-1).tolist()


def _finished(steps: list[list[int]], tokens: int) -> int:
    """How many of the first steps lie within `tokens` tokens."""
    count = 0
    for step in steps:
        tokens -= len(step)
        if tokens < 0:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Fidelity:
    """Agreement with the exact cache on the tokens that follow a prompt.

    Attributes:
        kl: KL(exact || other), nats a token; top1: share of equal first choices.
        nll: nats a token of the text itself; its exponential is the perplexity.
        tokens: how many of the text.
        diverges: the first of the exact cache's greedy tokens that this cache would not have chosen.
    """

    kl: float
    top1: float
    nll: float
    tokens: int
    diverges: int


@dataclass
class Reference:
    """What the exact cache said: logits [tokens, vocab] on the text, and its own greedy continuation."""

    logits: Tensor
    greedy: list[int]


@torch.no_grad()
def reference(model: PreTrainedModel, cache: Cache, following: list[int], generate: int) -> Reference:
    """The exact cache on `following`, and `generate` greedy tokens behind the first of them."""
    logits = _logits(model, cache, following)
    fork, greedy = forked(cache), []
    token = following[0]
    for _ in range(generate):
        token = _greedy(model, fork, [token])[0]
        greedy.append(token)
    return Reference(logits, greedy)


@torch.no_grad()
def fidelity(model: PreTrainedModel, cache: Cache, following: list[int], exact: Reference) -> Fidelity:
    """Hold a filled cache to the exact one; `cache` is left as it was."""
    logits = _logits(model, cache, following)
    close = agreement(exact.logits[:-1], logits[:-1])
    target = torch.tensor(following[1:], device=logits.device)
    nll = torch.nn.functional.cross_entropy(logits[:-1], target).item()
    share = right_steps(model, cache, Asked(following[:1], [[token] for token in exact.greedy]))
    return Fidelity(close.kl, close.top1, nll, close.tokens, round(share * len(exact.greedy)))


def _logits(model: PreTrainedModel, cache: Cache, ids: list[int]) -> Tensor:
    """Logits behind each of `ids` [tokens, vocab] in float32, given in blocks as decoding would give them."""
    fork = forked(cache)
    blocks = [ids[first : first + BLOCK] for first in range(0, len(ids), BLOCK)]
    given = (torch.tensor([block], device=model.device) for block in blocks)
    return torch.cat([model(block, past_key_values=fork).logits[0].float() for block in given])
