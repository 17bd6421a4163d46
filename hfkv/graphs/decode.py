"""`hfkv.compile_decode(model)`: decode steps as CUDA graphs, everything else as it was; `host` has the CPU's part."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from hfkv.attention import NAME
from hfkv.backends.built import require_compiler
from hfkv.cache import LeanKVCache
from hfkv.graphs.host import HostDecode, original
from hfkv.graphs.step import DecodeStep, Recorder, Request
from hfkv.layer import LeanKVLayer
from hfkv.masks import GROW, follow_growth, made_from

logger = logging.getLogger("hfkv")

_STATE = "_hfkv_decode"
_FORWARD = "forward"

_FLAGS = {"use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What a call may say of these and still be captured, beside nothing."""


@dataclass(frozen=True)
class DecodeReport:
    """What became of a model's forwards with a LeanKVCache since `compile_decode`.

    Attributes:
        captured: graphs that were recorded.
        replayed: steps that were replays of one.
        warmed: steps that were run once or twice before a recording, by the same code.
        eager: forwards that ran as without `compile_decode`, by reason.
    """

    captured: int
    replayed: int
    warmed: int
    eager: dict[str, int]

    def __str__(self) -> str:
        lines = [f"decode steps: {self.replayed} replayed, {self.warmed} to warm up, {self.captured} graphs captured"]
        return "\n".join(lines + [f"  {count} forwards ran eagerly: {reason}" for reason, count in self.eager.items()])


class CompiledDecode:
    """What a model's forward does under `compile_decode`.

    Args:
        config: the text config.
        takes_positions: whether the forward has `position_ids`.
        recorder: what records steps.
        before: what the model had as its own `forward` and `_update_model_kwargs_for_generation`, by name.
    """

    def __init__(self, config: Any, takes_positions: bool, recorder: Recorder, before: dict[str, Any]) -> None:
        self.config = config
        self.takes_positions, self.recorder, self.before = takes_positions, recorder, before
        self.refusal: str | None = None
        self.captured = self.replayed = self.warmed = 0
        self.eager: Counter[str] = Counter()
        self._said: set[str] = set()

    def note_capture(self) -> None:
        self.captured += 1

    def forward(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's forward: a decode step that fits is a replay, everything else runs as always."""
        forward = original(self.before, model, _FORWARD)
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, LeanKVCache) or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        found = self._request(model, cache, args, kwargs)
        if isinstance(found, str):
            self.eager[found] += 1
            return forward(*args, **kwargs)
        step, request = found
        cache.begin_step()
        try:
            if not step.is_current(cache):
                step.bind(cache, request)
            out = step.run(cache, request, forward)
        except Exception as error:
            step.forget()
            out = forward(*args, **kwargs)  # raises what is wrong with the call itself
            self._refuse(model, error)
            return out
        if step.replayed:
            self.replayed += 1
        else:
            self.warmed += 1
        return out

    def _step(self, cache: LeanKVCache) -> DecodeStep:
        if cache.decode_step is None or cache.decode_step.owner is not self:
            cache.decode_step = DecodeStep(self, self.recorder)
        return cache.decode_step

    def _refuse(self, model: Any, error: Exception) -> None:
        self.refusal = f"its step cannot be captured: {str(error).splitlines()[0] if str(error) else repr(error)}"
        self.eager[self.refusal] += 1
        logger.warning("%s decodes without CUDA graphs: %s", type(model).__name__, self.refusal)

    # ---- what fits ---------------------------------------------------------------------------------------------------

    def _request(
        self, model: Any, cache: LeanKVCache, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[DecodeStep, Request] | str:
        """The cache's step and a call as a request of it, or why the call runs eagerly."""
        if self.refusal is not None:
            return self.refusal
        given = {name: value for name, value in kwargs.items() if value is not None and name != "past_key_values"}
        if args:
            if len(args) > 1 or "input_ids" in given:
                return "positional arguments behind input_ids"
            given["input_ids"] = args[0]
        ids = given.pop("input_ids", None)
        positions, mask = given.pop("position_ids", None), given.pop("attention_mask", None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return "a prompt, or several new tokens at once"
        extras = {name: value for name, value in given.items() if name not in _FLAGS or value != _FLAGS[name]}
        for name, value in extras.items():
            if name != "logits_to_keep" or not isinstance(value, int):
                return f"the call passes {name}"
        if torch.is_grad_enabled() or model.training:
            return "gradients or training mode"
        if torch.is_autocast_enabled(ids.device.type):
            return "autocast"
        if self.config._attn_implementation != NAME:
            return f"the model's attn_implementation is no longer {NAME!r}"
        reason = self._obstacle(cache, ids)
        if reason is not None:
            return reason
        if positions is None and not (self.takes_positions and cache.compressed[0].fill.pads is None):
            return "position_ids are not passed, beside padding or to a model that does not take them"
        if positions is None and self.config is not model.config:
            return "position_ids are not passed to a model of several parts"
        extras.update((name, given[name]) for name in _FLAGS if name in given)
        request, step = Request(ids, positions, mask, extras), self._step(cache)
        reason = self._mask_obstacle(cache, step, request)
        return (step, request) if reason is None else reason

    def _obstacle(self, cache: LeanKVCache, ids: Tensor) -> str | None:
        """Why this cache's steps cannot be captured now; the ones that last are said once in the log."""
        held = [layer.tokens if isinstance(layer, LeanKVLayer) else None for layer in cache.layers]
        if not any(tokens is not None for tokens in held):
            why = next(iter(cache.plain_reasons.values()), None)
            return "an empty cache" if why is None else self._say(f"no layer of the cache is compressed: {why}")
        for index, tokens in enumerate(held):
            if tokens is None:
                why = cache.plain_reasons.get(index, "it has no tokens yet")
                return self._say(
                    f"layer {index} (and others alike) keeps its state where a replay cannot add to it: {why}"
                )
        first = held[0]
        assert first is not None
        if ids.shape[0] != first.fill.batch or ids.device != first.device:
            return "another batch size or device than the cache's"
        queries = None
        for tokens in held:
            assert tokens is not None
            if tokens.device != first.device:
                return self._say("its layers are on several devices")
            if any(layout.pack is not None for layout in tokens.packed.layouts):
                return self._say("the host looks where the packs of a Packed tier lie")
            if tokens.fill is not first.fill:
                return "layers hold different tokens"
            if tokens.config.selects:
                now = (len(tokens.queries.positions), tokens.queries.stands_for)
                if queries not in (None, now):
                    return "layers keep different queries"
                queries = now
        return None

    def _say(self, reason: str) -> str:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("decode steps are not captured: %s", reason)
        return reason

    @staticmethod
    def _mask_obstacle(cache: LeanKVCache, step: DecodeStep, request: Request) -> str | None:
        """Why a padding mask says more than what the cache holds already, and one real token more.

        A mask that `generate` has made from the last step's is not looked at; others are, which waits for the device.
        """
        mask, fill = request.mask, cache.compressed[0].fill
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape != (fill.batch, fill.seen + 1):
            return "an attention mask of another shape than [batch, tokens]"
        if step.mask is not None and made_from(mask) == step.mask and step.is_current(cache):
            return None
        real = mask != 0
        agrees = real[:, -1].all() & (real.sum(1) == fill.lengths + 1).all()
        return None if bool(agrees) else "the attention mask hides the new token, or not just the padding"


# ---- installation ---------------------------------------------------------------------------------------------------


def compile_decode(model: PreTrainedModel) -> PreTrainedModel:
    """Compile a model's decode steps with a LeanKVCache, by themselves in `generate`; returns the model.

        model = hfkv.compile_decode(hfkv.enable(model))
        model.generate(**inputs)
        print(hfkv.decode_report(model))

    On a GPU steps become CUDA graphs. A cache's first two decode steps warm up, the third is captured, the rest are
    replays; a flush in between renews what they read, and a page table that grows is captured anew. Prompts, several
    tokens at once and whatever else does not fit run as always; `decode_report` says why. A model whose step waits for
    the device is left as it was, with one warning.

    On the CPU nothing is captured, and attention reads packed codes by built loops however few there are; without this
    call it does so once that pays (`hfkv.backends.built`).

    `hfkv.disable(model)` undoes it. Call it again after adapters or weights have been exchanged.

    Raises:
        TypeError: not a model of transformers that generates.
        ValueError: another attention implementation, an encoder-decoder, not all on the CPU or on one CUDA device, or
            on the CPU and without a C++ compiler.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(
            f"compile_decode needs a model of transformers with generate(), not {type(model).__name__}; give it the "
            "model itself, before torch.compile or any wrapper"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"compile_decode needs a decoder-only model, and {type(model).__name__} is an encoder-decoder")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f"compile_decode needs attn_implementation={NAME!r}, and the model has {implementation!r}: call "
            f"hfkv.enable(model) or model.set_attn_implementation({NAME!r}) first"
        )
    devices = sorted({str(x.device) for x in model.parameters()})
    if devices == ["cpu"]:
        require_compiler()
        return _install(model, HostDecode)
    if len(devices) != 1 or not devices[0].startswith("cuda"):
        raise ValueError(
            f"compile_decode needs a model on the CPU or on one CUDA device, and this one is on "
            f"{', '.join(devices) or 'none'}: move it with model.to(...)"
        )
    from hfkv.graphs.device import CudaGraph

    return install(model, CudaGraph)


def install(model: PreTrainedModel, recorder: Recorder) -> PreTrainedModel:
    """`compile_decode` by graphs without its checks, with another recorder."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    text = model.config.get_text_config(decoder=True)
    _install(model, functools.partial(CompiledDecode, text, takes_positions, recorder))
    follow_growth(model)
    return model


def _install(model: PreTrainedModel, made: Callable[[dict[str, Any]], CompiledDecode | HostDecode]) -> PreTrainedModel:
    """Run the model's forward by what is `made` of the methods that it has as its own, by name."""
    remove(model)
    before = {name: model.__dict__[name] for name in (_FORWARD, GROW) if name in model.__dict__}
    model.__dict__[_STATE] = made(before)
    model.__dict__[_FORWARD] = types.MethodType(_wrapped(type(model).forward), model)
    return model


def remove(model: PreTrainedModel) -> None:
    """Undo `compile_decode`, if it was called."""
    state = model.__dict__.pop(_STATE, None)
    if state is not None:
        for name in (_FORWARD, GROW):
            model.__dict__.pop(name, None)
        model.__dict__.update(state.before)


def decode_report(model: PreTrainedModel) -> DecodeReport:
    """How many of a model's decode steps were replayed, and why the others were not.

    Raises:
        ValueError: `compile_decode` was not called for the model.
    """
    state: CompiledDecode | HostDecode | None = model.__dict__.get(_STATE)
    if state is None:
        raise ValueError(f"decode_report needs hfkv.compile_decode(model) first, on this {type(model).__name__}")
    if isinstance(state, HostDecode):
        return DecodeReport(0, 0, 0, state.eager)
    return DecodeReport(state.captured, state.replayed, state.warmed, dict(state.eager))


def _wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the signature of the model's own, which generate looks at."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_STATE].forward(self, args, kwargs)

    return forward
