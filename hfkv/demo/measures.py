"""What a compressed cache costs: agreement with the exact cache, notes found, time per decode step."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from hfkv.demo.texts import Note


@dataclass(frozen=True)
class Agreement:
    """How close next-token distributions are to the exact cache's: KL(exact || other) in nats and the share of equal
    first choices, both averaged over `tokens` positions."""

    kl: float
    top1: float
    tokens: int


@torch.no_grad()
def fill(model: PreTrainedModel, ids: list[int], cache: Cache) -> Cache:
    """Run the prompt through the model, so that `cache` holds it (and has compressed it); returns `cache`."""
    model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def forced_logits(model: PreTrainedModel, cache: Cache, ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, which are given behind what `cache` holds: [len(ids), vocab], float32.

    Works on a copy: `cache` can serve any number of continuations and questions.
    """
    fork = copy.deepcopy(cache)
    return model(torch.tensor([ids], device=model.device), past_key_values=fork).logits[0].float()


def agreement(exact: torch.Tensor, other: torch.Tensor) -> Agreement:
    """Compare two sets of logits, [tokens, vocab] each."""
    if exact.shape != other.shape:
        raise ValueError(f"logits of shapes {tuple(exact.shape)} and {tuple(other.shape)}: compare the same tokens")
    p, q = exact.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Agreement(kl, (p.argmax(-1) == q.argmax(-1)).float().mean().item(), len(exact))


def mean_agreement(parts: list[Agreement]) -> Agreement:
    """The average over all positions of several comparisons."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        raise ValueError("no agreement to average: compare at least one token")
    return Agreement(
        sum(part.kl * part.tokens for part in parts) / tokens,
        sum(part.top1 * part.tokens for part in parts) / tokens,
        tokens,
    )


def equal_tokens(exact: list[int], other: list[int]) -> int:
    """How many tokens two greedy answers share before they first differ."""
    pairs = zip(exact, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(exact), len(other)))


def question_ids(tokenizer: PreTrainedTokenizerBase, note: Note) -> tuple[list[int], list[int]]:
    """Token ids of the question up to the value, and of the value that should follow."""
    asked = f"\n\nQuestion: {note.question}\nAnswer: {note.answer}"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, f"{asked} {note.value}")]
    start = equal_tokens(*ids)
    return ids[1][:start], ids[1][start:]


def finds_note(model: PreTrainedModel, cache: Cache, asked: list[int], value: list[int]) -> bool:
    """Whether greedy decoding behind `cache` and the question gives exactly the value (one forward, on a copy)."""
    logits = forced_logits(model, cache, asked + value[:-1])  # [asked + value - 1, vocab]
    return logits[len(asked) - 1 :].argmax(-1).tolist() == value


class StepClock(BaseStreamer):
    """Given to `generate(streamer=...)`: stamps every new token, and calls `on_token` for a progress bar."""

    def __init__(self, on_token: Callable[[], object] = lambda: None):
        self.steps: list[float] = []  # seconds from one new token to the next, over all calls of generate
        self._on_token = on_token
        self._calls = 0  # of `put` in this generate: the first carries the prompt, the second its first new token
        self._last = 0.0

    def put(self, value: torch.Tensor) -> None:
        now, self._calls = time.perf_counter(), self._calls + 1
        if self._calls > 1:
            self._on_token()
        if self._calls > 2:
            self.steps.append(now - self._last)
        self._last = now

    def end(self) -> None:
        self._calls = 0

    @property
    def tokens_per_second(self) -> float:
        """From the median step; NaN before the second token."""
        return 1 / statistics.median(self.steps) if self.steps else float("nan")
