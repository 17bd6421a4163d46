"""What the parts of the benchmark share: the device, the clock, the models, the time that is left."""

from __future__ import annotations

import functools
import platform
import time

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hfkv.bench.caches import random_llama
from hfkv.bench.sizes import Sizes
from hfkv.bench.timing import Clock


class Session:
    """One run on one device.

    Args:
        device: where everything is measured.
        dtype: of keys, values and weights.
        sizes: what is measured.
        budget: seconds that the run may take, or None.

    Attributes:
        copy_gbps: the device's copy bandwidth, measured at the start of this run.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, budget: float | None = None) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self._deadline = None if budget is None else time.monotonic() + budget
        self.clock = Clock(device, sizes.repeat_seconds)
        self.like: Tensor = torch.empty(0, dtype=dtype, device=device)
        self._models: dict[int, LlamaForCausalLM] = {}

    @functools.cached_property
    def copy_gbps(self) -> float:
        return self.clock.copy_gbps()

    @property
    def seconds_left(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def model(self, layers: int, attention: str) -> LlamaForCausalLM:
        """The random Llama of this run, with so many layers, under an attention implementation; one at a time."""
        if layers not in self._models:
            self._models.clear()
            self._models[layers] = random_llama(self.sizes.model, layers, self.like)
        model = self._models[layers]
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        return model

    def random_ids(self, batch: int, tokens: int) -> Tensor:
        """Token ids int64 [batch, tokens]."""
        return torch.randint(self.sizes.model.vocab, (batch, tokens), device=self.device)


def machine_name(device: torch.device) -> str:
    """What the results are labelled with: the GPU's name, or the CPU's kind and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
