"""What goes wrong in the midst of things: the cache goes on, or says that it must be reset, and nothing leaks."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from families import build, lean, left_padded, native, prompt, relative_rms
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation import StoppingCriteria

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.paging.pool import PagePool

PACKAGE = str(Path(hfkv.__file__).parent)
LOGITS = 1e-5
IDS = prompt(400, batch=2)
FILLED = 150 + 26  # one step before a flush
PLACES = 50


def exact(**changes: object) -> LeanKVCache:
    return LeanKVCache(LeanKVConfig.preset("exact", **changes))


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call of a function of hfkv; counts them all where n is None."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls += 1
            if self.calls == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    @contextmanager
    def watching(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def start() -> LeanKVCache:
    cache = exact()
    feed(lean("llama"), cache, IDS[:, :150])
    for ids in IDS[:, 150:FILLED].split(1, dim=1):
        feed(lean("llama"), cache, ids)
    return cache


def next_step(cache: LeanKVCache) -> None:
    for ids in IDS[:, FILLED : FILLED + 8].split(1, dim=1):
        feed(lean("llama"), cache, ids)


def next_turn(cache: LeanKVCache) -> None:
    feed(lean("llama"), cache, IDS[:, FILLED : FILLED + 100])


def reorder(cache: LeanKVCache) -> None:
    cache.reorder_cache(torch.tensor([0, 1]).flip(0))
    cache.reorder_cache(torch.tensor([0, 1]).flip(0))


def crop(cache: LeanKVCache) -> None:
    cache.crop(-7)


def first_prompt(cache: LeanKVCache) -> None:
    cache.reset()
    feed(lean("llama"), cache, IDS[:, :FILLED])


@pytest.mark.parametrize("act", [next_step, next_turn, reorder, crop, first_prompt], ids=lambda act: act.__name__)
def test_interrupted_anywhere(act: Callable[[LeanKVCache], None]) -> None:
    """Ctrl-C inside any function of the package: afterwards right logits, or an error that asks for a reset."""
    prepared = start()
    act(copy.deepcopy(prepared))  # what is worked out once per process is there from now on
    counter, cache = Interrupt(None), copy.deepcopy(prepared)
    with counter.watching():
        act(cache)
    usable = 0
    for place in sorted({1 + i * (counter.calls - 1) // PLACES for i in range(PLACES + 1)}):
        cache = copy.deepcopy(prepared)
        with pytest.raises(KeyboardInterrupt), Interrupt(place).watching():
            act(cache)
        seen = cache.get_seq_length()
        rows = [0, 1]
        if act is reorder:
            rows = [0, 1] if held_first(cache) else [1, 0]
        try:
            feed(lean("llama"), cache, IDS[rows, seen : seen + 1])
        except RuntimeError as error:
            assert "reset" in str(error), error
            with pytest.raises(RuntimeError, match="reset"):
                feed(lean("llama"), cache, IDS[:, :1])
            cache.reset()
            feed(lean("llama"), cache, IDS[:, :100])
            assert cache.get_seq_length() == 100
            continue
        usable += 1
        got = feed(lean("llama"), cache, IDS[rows, seen + 1 : seen + 5])
        other = DynamicCache()
        if seen:
            feed(native("llama"), other, IDS[rows, :seen])
        feed(native("llama"), other, IDS[rows, seen : seen + 1])
        want = feed(native("llama"), other, IDS[rows, seen + 1 : seen + 5])
        assert relative_rms(got, want) < LOGITS, place
    assert usable > 0


def held_first(cache: LeanKVCache) -> bool:
    """Whether the first sequence is still the first, by the newest keys of layer 0."""
    tokens = cache.layers[0].tokens
    original = exact()
    feed(lean("llama"), original, IDS[:, :FILLED])
    newest = original.layers[0].tokens
    a = tokens.window.k[0, 0, tokens.fill.most - 1]
    return (a - newest.window.k[0, 0, newest.fill.most - 1]).abs().max() < 1e-4


# ---- nothing leaks


def live(kind: type) -> int:
    gc.collect()
    return sum(issubclass(type(item), kind) for item in gc.get_objects())


def used_pages(cache: LeanKVCache) -> int:
    return sum(pool.used_bytes for pool in cache.pools)


def pages_of_tables(cache: LeanKVCache) -> int:
    """Bytes of the pages that the page tables name; one that several sequences name counts once."""
    return sum(
        t.packed.table.pages(tier, t.packed.page_counts(tier))[0].unique().numel() * layout.page_bytes
        for t in cache.compressed
        for tier, layout in enumerate(t.packed.layouts)
    )


@contextmanager
def failing(module: torch.nn.Module, error: type[BaseException]) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise error

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_hundreds_of_failing_forwards_and_resets() -> None:
    model, cache = lean("llama"), LeanKVCache(LeanKVConfig.preset("aggressive"))
    errors = (KeyboardInterrupt, ValueError, MemoryError)
    tensors = 0
    for cycle in range(300):
        feed(model, cache, prompt(120))
        where = (model.model.layers[0].mlp, model.model.layers[1].self_attn.q_proj, model.lm_head)[cycle % 3]
        with failing(where, errors[cycle % 3]), pytest.raises(errors[cycle % 3]):
            feed(model, cache, prompt((1, 5, 100)[cycle // 3 % 3]))
        if where is model.lm_head:  # every layer had it
            feed(model, cache, prompt(1))
        else:
            with pytest.raises(RuntimeError, match="reset"):
                feed(model, cache, prompt(1))
        cache.reset()
        assert cache.report().physical_bytes == 0
        if cycle == 5:
            tensors = live(torch.Tensor)
    assert live(torch.Tensor) <= tensors
    cache = None
    assert live(PagePool) == 0


def test_hundreds_of_times_out_of_pages() -> None:
    """A turn that does not fit changes nothing, however often it is tried."""
    model, cache = lean("llama"), exact(max_bytes=200 * 1024)
    feed(model, cache, prompt(150))
    held, pages = cache.report().physical_bytes, used_pages(cache)
    long_turn = prompt(700)
    for _ in range(100):
        with pytest.raises(OutOfPages):
            feed(model, cache, long_turn)
        assert used_pages(cache) == pages == pages_of_tables(cache)
        assert cache.report().physical_bytes <= held
    other = DynamicCache()
    feed(native("llama"), other, prompt(150))
    steps = prompt(70, seed=3).split(1, dim=1)
    got, want = (torch.cat([feed(m, c, s) for s in steps], 1) for m, c in ((model, cache), (native("llama"), other)))
    assert relative_rms(got, want) < LOGITS


@pytest.mark.parametrize("preset", ["exact", "aggressive"])
def test_pages_are_accounted_for_through_everything(preset: str) -> None:
    model, cache = lean("llama"), LeanKVCache(LeanKVConfig.preset(preset))
    feed(model, cache, prompt(150, batch=2))
    for cycle in range(120):
        change: Callable[[], object] = (
            lambda: feed(model, cache, prompt(40, seed=1, batch=2)),
            lambda: cache.reorder_cache(torch.tensor([1, 1])),
            lambda: feed(model, cache, prompt(1, batch=2)),
            lambda: cache.crop(-9),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([3, 0])),
        )[cycle % 6]
        change()
        assert used_pages(cache) == pages_of_tables(cache)
    for tokens in cache.compressed:
        tokens.release()
    assert used_pages(cache) == 0


class StopLike(StoppingCriteria):
    """Raises in the midst of generate, as a user's own criterion might."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return torch.zeros(2, dtype=torch.bool)


def test_interrupted_generate_goes_on() -> None:
    """Between two forwards the cache is whole: the conversation goes on from what it holds."""
    inputs, cache = left_padded([3, 150]), exact()
    options = {"do_sample": False, "max_new_tokens": 70}
    want = native("llama").generate(**inputs, **options)
    with pytest.raises(KeyboardInterrupt):
        lean("llama").generate(**inputs, past_key_values=cache, stopping_criteria=[StopLike(40)], **options)
    seen = cache.get_seq_length()
    assert seen == 150 + 39
    ids = want[:, : seen + 1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 40)], 1).long()
    rest = {"do_sample": False, "max_new_tokens": 30}
    got = lean("llama").generate(ids, attention_mask=mask, past_key_values=cache, **rest)
    assert torch.equal(got, want)


def test_interrupted_generate_of_an_enabled_model_leaves_nothing() -> None:
    model = hfkv.enable(build("llama"), LeanKVConfig.preset("exact"))
    options = {"do_sample": False, "max_new_tokens": 70}
    for after in (1, 20, 50):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**left_padded([3, 150]), stopping_criteria=[StopLike(after)], **options)
    assert live(PagePool) == 0
    want = native("llama").generate(prompt(100), **options)
    assert torch.equal(model.generate(prompt(100), **options), want)


@pytest.mark.parametrize("preset", ["exact", "k8v4", "balanced", "aggressive", "paper"])
def test_a_flush_of_nothing(preset: str) -> None:
    """Before anything is packed, and twice in a row."""
    said = []
    for flushes in (0, 2):
        cache = LeanKVCache(LeanKVConfig.preset(preset, window=16, flush=8))
        with torch.no_grad():
            lean("llama")(prompt(10), past_key_values=cache)
            for _ in range(flushes):
                cache.flush()
            lean("llama")(prompt(40), past_key_values=cache)
            said.append(lean("llama")(prompt(3), past_key_values=cache).logits)
        for _ in range(flushes):
            cache.flush()
    assert torch.equal(*said)
