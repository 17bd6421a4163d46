"""One prompt through several caches: every cache is filled once, asked on forks, and then chatted with."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hfkv import LeanKVCache
from hfkv.demo.dialogue import Dialogue, continued
from hfkv.demo.measures import Agreement, StepClock, agreement, equal_tokens, fill, forced_logits
from hfkv.demo.picture import Tiers
from hfkv.report import tier_map

EXACT = "DynamicCache"


@dataclass(frozen=True)
class Contender:
    """A cache that takes part: its name and how to make it."""

    name: str
    new_cache: Callable[[], DynamicCache]


@dataclass(frozen=True)
class Lengths:
    """How many tokens are generated at most, per answer and per chat turn."""

    answer: int = 24
    chat: int = 60


@dataclass(frozen=True)
class Talk:
    """What is asked: a dialogue's questions, the last of which opens the chat, and the chat's second turn."""

    dialogue: Dialogue
    second_turn: list[int]
    lengths: Lengths

    @property
    def budget(self) -> int:
        """Tokens generated at most, for the progress bar."""
        return self.lengths.answer * (len(self.dialogue.questions) - 1) + 2 * self.lengths.chat


@dataclass
class Outcome:
    """What one cache said and cost. Bytes are those after the prompt, of all layers."""

    name: str
    prompt_tokens: int
    prompt_seconds: float = 0.0
    physical_bytes: int = 0
    exact_bytes: int = 0
    answers: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    chat_ids: list[int] = field(default_factory=list)
    agreement: Agreement | None = None
    equal_tokens: int | None = None
    tokens_per_second: float = float("nan")
    report: str = ""
    tiers: Tiers = field(default_factory=dict)


class Contest:
    """Runs contenders one after another on the same talk; the first is the exact cache the others are held to."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talk: Talk):
        self._model, self._tokenizer, self._talk = model, tokenizer, talk
        self._exact_logits: torch.Tensor | None = None  # [chat tokens, vocab]
        self._exact_chat_ids: list[int] = []

    def run(self, contender: Contender) -> Outcome:
        """Fill, ask, chat; everything a table or a picture needs, and the cache is dropped."""
        outcome = Outcome(contender.name, len(self._talk.dialogue.prompt))
        with tqdm(total=self._talk.budget, desc=f"{contender.name:<14}prompt   ", unit="token") as bar:
            cache = self._fill(contender, outcome)
            bar.set_description(f"{contender.name:<14}questions")
            for question in self._talk.dialogue.questions[:-1]:
                prompt = self._talk.dialogue.prompt + question
                outcome.answers.append(self._text(self._generate(copy.deepcopy(cache), prompt, StepClock(bar.update))))
            bar.set_description(f"{contender.name:<14}chat     ")
            fork = copy.deepcopy(cache)
            self._chat(cache, outcome, bar)
            self._compare(fork, outcome)
            bar.total = bar.n
        return outcome

    def _fill(self, contender: Contender, outcome: Outcome) -> DynamicCache:
        cache = contender.new_cache()
        start = time.perf_counter()
        fill(self._model, self._talk.dialogue.prompt, cache)
        outcome.prompt_seconds = time.perf_counter() - start
        if isinstance(cache, LeanKVCache):
            report = cache.report()
            outcome.physical_bytes = report.physical_bytes + report.plain_bytes
            outcome.exact_bytes = report.exact_bytes + report.plain_bytes
            outcome.report = str(report)
            outcome.tiers = tiers_by_layer(cache)
        else:
            outcome.physical_bytes = outcome.exact_bytes = exact_bytes(cache)
        return cache

    def _chat(self, cache: Cache, outcome: Outcome, bar: tqdm) -> None:
        """Two turns on the filled cache itself, the second behind the answer of the first."""
        talk, clock = self._talk, StepClock(bar.update)
        first = talk.dialogue.prompt + talk.dialogue.questions[-1]
        answer = self._generate(cache, first, clock, talk.lengths.chat)
        second = continued(first + answer, talk.second_turn)
        outcome.chat = [self._text(answer), self._text(self._generate(cache, second, clock, talk.lengths.chat))]
        outcome.chat_ids, outcome.tokens_per_second = answer, clock.tokens_per_second

    def _compare(self, cache: Cache, outcome: Outcome) -> None:
        """Hold the cache to the exact one, on the words that the exact one chose in the first chat turn."""
        if self._exact_logits is None:
            self._exact_chat_ids = outcome.chat_ids
            self._exact_logits = self._logits_of_exact_chat(cache)
        else:
            outcome.agreement = agreement(self._exact_logits, self._logits_of_exact_chat(cache))
            outcome.equal_tokens = equal_tokens(self._exact_chat_ids, outcome.chat_ids)

    def _logits_of_exact_chat(self, cache: Cache) -> torch.Tensor:
        question, said = self._talk.dialogue.questions[-1], self._exact_chat_ids
        return forced_logits(self._model, cache, question + said[:-1])[len(question) - 1 :]  # [said, vocab]

    def _generate(self, cache: Cache, ids: list[int], clock: StepClock, tokens: int | None = None) -> list[int]:
        prompt = torch.tensor([ids], device=self._model.device)  # [1, all tokens so far]
        out = self._model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=tokens or self._talk.lengths.answer,
            do_sample=False,
            streamer=clock,
        )
        return out[0, len(ids) :].tolist()

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def exact_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that an exact cache holds."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def tiers_by_layer(cache: LeanKVCache) -> Tiers:
    """Tier of every token of the first sequence, for the compressed layers: {layer: uint8 [kv_heads, tokens]}."""
    return {layer.index: tier_map(cache, layer.index)[0] for layer in cache.report().layers if layer.compressed}
