"""`Fingerprint`: which model filled a cache, by its config and a sample of its attention weights."""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

SAMPLE = 16
"""Numbers looked at per parameter."""

MOST_ENTRIES = 256
"""Longest list of a config that is compared."""

INDIFFERENT = {
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "name_or_path",
}
"""Fields of a config that say nothing about keys and values."""

_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, dict[str, int]]] = weakref.WeakKeyDictionary()


class Fingerprint:
    """Remembers the attention modules that read a cache, and refuses those of another model.

    Attributes:
        config: scalar fields of the first layer's config.
        weights: per layer, a checksum of a few numbers of every parameter of its attention module. Parameters that are
            offloaded, quantised or not plain tensors are left out: about them nothing is said.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.weights: dict[str, dict[str, int]] = {}
        self._modules: dict[str, weakref.ref[nn.Module]] = {}

    def check(self, module: nn.Module, index: int) -> None:
        """Note the attention module that reads layer `index`, or compare it with the one noted before.

        Raises:
            ValueError: it belongs to another model.
        """
        key = f"{index}/{getattr(module, 'layer_idx', index)}"
        known = self._modules.get(key)
        if known is not None and known() is module:
            return
        weights = describe_weights(module)
        if key not in self.weights:
            if not self.weights:
                self.config = describe_config(getattr(module, "config", None))
            self.weights[key] = dict(weights)
        else:
            if key == next(iter(self.weights)):
                self._compare(describe_config(getattr(module, "config", None)), self.config, "config.")
            self._compare(weights, self.weights[key], f"weights of layer {index}: ")
            self.weights[key] = {**self.weights[key], **weights}
        self._modules[key] = weakref.ref(module)

    @staticmethod
    def _compare(new: dict[str, Any], old: dict[str, Any], what: str) -> None:
        for name in old:
            if name in new and new[name] != old[name]:
                values = f" ({old[name]!r} then, {new[name]!r} now)" if what == "config." else ""
                raise ValueError(
                    f"this LeanKVCache was filled by another model, {what}{name} differs{values}: use it with the "
                    "model that filled it, or start from a fresh cache"
                )

    def to_json(self) -> str:
        return json.dumps({"config": self.config, "weights": self.weights}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        made, fields = cls(), json.loads(text)
        made.config, made.weights = dict(fields["config"]), dict(fields["weights"])
        return made


def describe_config(config: Any) -> dict[str, Any]:
    """The scalar fields, lists and dicts of a model's text config, as JSON would return them."""
    if not isinstance(config, PretrainedConfig):
        return {}
    text = config.get_text_config(decoder=True)
    found = {"model_type": text.model_type, "quantization": "none"}
    for name, value in vars(text).items():
        if not name.startswith("_") and name not in INDIFFERENT:
            found |= _entries(name, value)
    return found


def _entries(name: str, value: Any) -> dict[str, Any]:
    if name == "quantization_config":
        fields = value if isinstance(value, dict) else value.to_dict()
        method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
        return {"quantization": str(method), **_entries("quantization", fields)}
    if isinstance(value, bool | int | float | str):
        return {name: value}
    if isinstance(value, list | tuple) and len(value) <= MOST_ENTRIES:
        simple = all(isinstance(item, bool | int | float | str) for item in value)
        return {name: list(value)} if simple else {}
    if isinstance(value, dict) and name.startswith(("rope", "quantization")):
        return {k: v for key, item in value.items() for k, v in _entries(f"{name}.{key}", item).items()}
    return {}


def describe_weights(module: nn.Module) -> dict[str, int]:
    """A checksum per parameter of a module; worked out once as long as its parameters do not change."""
    held = list(_in_memory(module))
    stamp = tuple((id(x), -1 if x.is_inference() else x._version, local.data_ptr()) for _, x, local in held)
    known = _known.get(module)
    if known is None or known[0] != stamp:
        known = _known[module] = (stamp, {name: _checksum(local) for name, _, local in held})
    return known[1]


def _in_memory(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, parameter and its plain local tensor; packed integer weights are left out, as backends repack them."""
    for name, x in module.named_parameters():
        local = x.to_local() if hasattr(x, "to_local") else x.data
        if type(local) is Tensor and local.is_floating_point() and not local.is_meta and local.numel():
            yield name, x, local


@torch.no_grad()
def _checksum(x: Tensor) -> int:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    at = torch.linspace(0, x.numel() - 1, min(SAMPLE, x.numel()), dtype=torch.float64).long()
    sample = x.reshape(-1).view(bits)[at.to(x.device)].cpu()
    return zlib.crc32(bytes(sample.view(torch.uint8).tolist()), x.numel() & 0xFFFFFFFF)
