"""EleutherAI's lm-evaluation-harness with our cache: the model `hfkv`, for every one of its tasks.

    python -m hfkv lm-eval --model hfkv --model_args pretrained=NAME,preset=balanced --tasks gsm8k

`lm_eval` knows the models that have been registered when it starts and has no way of finding others, so the command
above registers this one and then is `lm_eval` itself. From Python, importing this module is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache

from hfkv.attention import NAME
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig
from hfkv.demo.measures import fill
from hfkv.eval.forks import fork
from hfkv.eval.methods import METHODS, Method, config_method
from hfkv.eval.score import BLOCK


@register_model("hfkv")
class HfkvLM(HFLM):
    """A HuggingFace model whose answers all come through a compressed cache.

    Generation is `generate` with the cache. A log-likelihood is teacher-forced behind the compressed context: the
    context but its last token is a prompt, what follows is given in blocks as decoding would store it.

    Args:
        pretrained: as lm_eval's model `hf`; so is everything that is not named here.
        preset: of `LeanKVConfig` (default: balanced).
        config: path of a JSON file with a `LeanKVConfig`.
        method: a method of `python -m hfkv eval`, peers included, as `kivi-4` or `snapkv-0.25`.
        block: tokens of a continuation that are given at once.

    Raises:
        ValueError: more than one of preset, config and method, or an unknown one; an encoder-decoder.
    """

    def __init__(
        self,
        pretrained: Any,
        preset: str | None = None,
        config: str | None = None,
        method: str | None = None,
        block: int = BLOCK,
        **kwargs: Any,
    ) -> None:
        self.method = _chosen(preset, config, method)
        if int(block) < 1:
            raise ValueError(f"block={block}: at least 1 token has to be given at once")
        self.block = int(block)
        self.longest: tuple[int, float] | None = None  # tokens of the longest context, physical share of its bytes
        if isinstance(pretrained, str):
            kwargs["attn_implementation"] = NAME
        super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"--model hfkv evaluates causal language models, {pretrained} is an encoder-decoder")
        if self.model.config._attn_implementation != NAME:
            self.model.set_attn_implementation(NAME)

    def new_cache(self) -> Cache:
        """An empty cache of the method."""
        return self.method.new_cache(self.model.config)

    def get_model_info(self) -> dict[str, Any]:
        """lm_eval's own, the method, and what the cache of the longest context took."""
        tokens, share = self.longest or (None, None)
        own = {"method": self.method.name, "setting": self.method.setting}
        return super().get_model_info() | {"hfkv": own | {"longest_context": tokens, "physical_share": share}}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        cache = self.new_cache()
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)
        self._note(cache, context.shape[1])
        return out

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding says it) of every (key, context, continuation).

        Requests of one context are asked on forks of one cache.
        """
        answers: dict[int, tuple[float, bool]] = {}
        before: tuple[list[int], Cache] | None = None
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], len(requests[i][2])))
        for i in tqdm(order, disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"):
            key, context, continuation = requests[i]
            prompt, lead = self._cut(context, continuation)
            if before is None or before[0] != prompt:
                before = (prompt, self._filled(prompt))
            answers[i] = self._judge(before[1], lead, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[i])
        return [answers[i] for i in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What is compressed, and the tokens from the context's last one to the continuation's last but one."""
        given = (context + continuation)[:-1][-self.max_length :]
        first = len(given) - len(continuation)
        return given[:first], given[first:]

    def _filled(self, prompt: list[int]) -> Cache:
        cache = self.new_cache()
        if prompt:
            fill(self.model, prompt, cache)
            self._note(cache, len(prompt))
        return cache

    @torch.no_grad()
    def _judge(self, filled: Cache, lead: list[int], continuation: list[int]) -> tuple[float, bool]:
        cache, total, greedy = fork(filled), 0.0, True
        for first in range(0, len(lead), self.block):
            given = torch.tensor([lead[first : first + self.block]], device=self.device)
            target = torch.tensor(continuation[first : first + self.block], device=self.device)
            logits = self.model(given, past_key_values=cache).logits[0].float()  # [tokens, vocab]
            total -= torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            greedy = greedy and bool((logits.argmax(-1) == target).all())
        return total, greedy

    def _note(self, cache: Cache, tokens: int) -> None:
        if isinstance(cache, LeanKVCache) and (self.longest is None or tokens > self.longest[0]):
            self.longest = tokens, cache.report().ratio


def _chosen(preset: str | None, config: str | None, method: str | None) -> Method:
    given = {k: v for k, v in (("preset", preset), ("config", config), ("method", method)) if v is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'{k}={v}' for k, v in given.items())}: choose one of preset, config, method")
    if method is not None:
        if method not in METHODS or METHODS[method].missing:
            usable: Iterable[str] = (name for name, known in METHODS.items() if not known.missing)
            raise ValueError(f"method={method}: there is no such method here, choose from {', '.join(usable)}")
        return METHODS[method]
    if config is not None:
        return config_method(config, LeanKVConfig.from_json(config))
    return config_method(preset or "balanced", LeanKVConfig.preset(preset or "balanced"))


def main(argv: list[str]) -> None:
    """`lm_eval` with these arguments; it ends the process as it does on its own."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *argv]
    cli_evaluate()
