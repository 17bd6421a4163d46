"""One prompt, many continuations: packed pages are held once, whatever is done with the cache afterwards."""

from __future__ import annotations

import copy
import gc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from families import lean, left_padded, native, prompt, relative_rms
from shared_pages import check_owners
from test_faults import Interrupt
from transformers import Cache, DynamicCache, PreTrainedModel

from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.paging.pool import PagePool

LOGITS = 1e-5
PROMPT = prompt(300)
PLACES = 25


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def steps(model: PreTrainedModel, cache: Cache, count: int, batch: int, seed: int = 3) -> torch.Tensor:
    return torch.cat([feed(model, cache, ids) for ids in prompt(count, seed=seed, batch=batch).split(1, dim=1)], 1)


def made(preset: str = "exact", **changes: object) -> LeanKVCache:
    return LeanKVCache(LeanKVConfig.preset(preset, **changes))


def forked(preset: str = "exact", rows: int = 8, **changes: object) -> LeanKVCache:
    cache = made(preset, **changes)
    feed(lean("llama"), cache, PROMPT)
    cache.batch_repeat_interleave(rows)
    return cache


def reference(rows: int = 8) -> DynamicCache:
    cache = DynamicCache()
    feed(native("llama"), cache, PROMPT)
    cache.batch_repeat_interleave(rows)
    return cache


def pages(cache: LeanKVCache) -> int:
    return sum(pool.used_bytes for pool in cache.pools)


def copied(cache: LeanKVCache) -> int:
    return sum(pool.copied_bytes for pool in cache.pools)


def limited(cache: LeanKVCache, most: int | None) -> None:
    cache.config = LeanKVConfig.preset("exact", max_bytes=most)
    cache.pools[0].max_bytes = most


def check(cache: LeanKVCache) -> None:
    for pool in cache.pools:
        check_owners(pool, [tokens.packed for tokens in cache.compressed])


# ---- pages are held once


@pytest.mark.parametrize("preset", ["exact", "k8v4", "balanced", "aggressive"])
def test_eight_continuations_hold_the_prompt_once(preset: str) -> None:
    cache = made(preset)
    feed(lean("llama"), cache, PROMPT)
    once, report = pages(cache), cache.report()
    cache.batch_repeat_interleave(8)
    after = cache.report()
    assert (pages(cache), copied(cache)) == (once, 0)
    for kind in ("codes", "metadata", "free_slots"):
        assert after.bytes[kind] == report.bytes[kind]
    assert after.shared_bytes == 7 * once
    assert "sequences share" in str(after)
    assert "sequences share" not in str(report)
    assert sum(int(layer.head_bytes.sum()) for layer in after.layers) == once
    steps(lean("llama"), cache, 40, 8)
    assert pages(cache) < 5 * once  # eight times the last pages and new ones, once the rest; copies: over 8 times
    check(cache)
    cache.batch_select_indices(torch.tensor([3]))
    assert pages(cache) <= 1.3 * once
    assert cache.report().shared_bytes == 0


def test_continuations_are_those_of_the_exact_cache() -> None:
    cache, other = forked(), reference()
    for seed in range(3):  # with a flush each
        got, want = (steps(m, c, 40, 8, seed) for m, c in ((lean("llama"), cache), (native("llama"), other)))
        assert relative_rms(got, want) < LOGITS
        index = torch.tensor([7, 7, 0, 1, 5, 5, 5, 2])
        cache.reorder_cache(index)
        other.reorder_cache(index)
        check(cache)
    got, want = (feed(m, c, prompt(100, batch=8)) for m, c in ((lean("llama"), cache), (native("llama"), other)))
    assert relative_rms(got, want) < LOGITS
    check(cache)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_several_answers_hold_the_prompt_once(preset: str) -> None:
    used = []
    for count in (1, 6):
        cache = made(preset)
        options = {"do_sample": True, "num_return_sequences": count, "max_new_tokens": 4}
        lean("llama").generate(PROMPT, past_key_values=cache, **options)
        used.append(pages(cache))
        check(cache)
    assert used[0] == used[1]


def test_repeated_prompts_of_a_padded_batch() -> None:
    """Neighbours that are equal share; another prompt, or the same one elsewhere in the batch, has its own pages."""
    inputs = {name: x[[0, 0, 1, 1, 1, 0]] for name, x in left_padded([180, 250]).items()}
    cache, options = made(), {"do_sample": False, "max_new_tokens": 70}
    got = lean("llama").generate(**inputs, past_key_values=cache, **options)
    assert torch.equal(got, native("llama").generate(**inputs, **options))
    check(cache)
    first = made()
    with torch.no_grad():
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        lean("llama")(**inputs, position_ids=positions, past_key_values=first, use_cache=True)
    table = first.compressed[0].packed.table.ids.view(6, 2, -1)
    same = [[bool((table[a] == table[b]).all()) for b in range(6)] for a in range(6)]
    assert same == [[a == b or {a, b} <= {0, 1} or {a, b} <= {2, 3, 4} for b in range(6)] for a in range(6)]


def test_beams_share_and_equal_the_exact_cache() -> None:
    """Nothing is copied until a flush, then one last page for every beam but one at most."""
    options = {"num_beams": 4, "do_sample": False}
    cache = made()
    lean("llama").generate(PROMPT, past_key_values=cache, max_new_tokens=20, **options)
    assert copied(cache) == 0
    assert cache.report().shared_bytes == 3 * pages(cache)
    cache = made()
    got = lean("llama").generate(PROMPT, past_key_values=cache, max_new_tokens=130, **options)
    assert torch.equal(got, native("llama").generate(PROMPT, max_new_tokens=130, **options))
    page = cache.compressed[0].packed.layouts[0].page_bytes
    rows = sum(tokens.packed.rows for tokens in cache.compressed)
    assert 0 < copied(cache) <= 4 * rows * page * 3 // 4  # four flushes
    check(cache)


@pytest.mark.parametrize("preset", ["balanced", "aggressive", "paper"])
def test_beams_with_tiers_take_less_than_copies_would(preset: str) -> None:
    cache = made(preset)
    out = lean("llama").generate(PROMPT, past_key_values=cache, num_beams=4, max_new_tokens=70, do_sample=False)
    assert out.shape[1] == 370
    assert cache.report().shared_bytes > 0.8 * pages(cache)
    check(cache)


# ---- what is done with a fork


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_files_and_copies_keep_the_sharing(preset: str, tmp_path: Path) -> None:
    cache = forked(preset)
    steps(lean("llama"), cache, 30, 8)
    cache.reorder_cache(torch.tensor([1, 1, 2, 3, 0, 0, 0, 7]))
    cache.save(tmp_path / "fork")
    physical = cache.report().physical_bytes
    assert (tmp_path / "fork").stat().st_size <= physical + 64 * 1024
    twins = [copy.deepcopy(cache), LeanKVCache.load(tmp_path / "fork")]
    want = steps(lean("llama"), cache, 40, 8)
    for twin in twins:
        assert twin.report().physical_bytes <= physical
        assert twin.report().shared_bytes > 0
        check(twin)
        assert torch.equal(steps(lean("llama"), twin, 40, 8), want)
        assert pages(twin) == pages(cache)
        check(twin)


def test_a_flush_without_room_for_its_copies_changes_nothing() -> None:
    cache, model = forked(rows=4), lean("llama")
    steps(model, cache, 32, 4)  # the next step flushes
    limited(cache, cache.report().physical_bytes)
    owners, used = cache.pools[0].owners.extra.clone(), pages(cache)
    for _ in range(3):
        with pytest.raises(OutOfPages):
            feed(model, cache, prompt(1, seed=9, batch=4))
        assert (pages(cache), copied(cache), cache.get_seq_length()) == (used, 0, 332)
        assert torch.equal(cache.pools[0].owners.extra, owners)
        check(cache)
    limited(cache, None)
    other = reference(4)
    steps(native("llama"), other, 32, 4)
    got, want = (steps(m, c, 40, 4, 5) for m, c in ((model, cache), (native("llama"), other)))
    assert relative_rms(got, want) < LOGITS
    assert copied(cache) > 0


def test_a_turn_without_room_takes_its_copies_back() -> None:
    """The first layer has stored the turn, in copies of shared pages, when the second finds no room for it."""
    cache, model, turn = forked(rows=3), lean("llama"), prompt(90, seed=4, batch=3)
    whole = copy.deepcopy(cache)
    feed(model, whole, turn)
    used = pages(cache)
    for room in range(0, whole.report().physical_bytes - cache.report().physical_bytes, 8192):
        limited(cache, cache.report().physical_bytes + room)
        try:
            feed(model, cache, turn)
            break
        except OutOfPages:
            assert (pages(cache), cache.get_seq_length()) == (used, 300)
            check(cache)
    limited(cache, None)
    if cache.get_seq_length() == 300:
        feed(model, cache, turn)
    assert copied(cache) > copied(whole)  # some were taken back
    other = reference(3)
    feed(native("llama"), other, turn)
    got, want = (steps(m, c, 40, 3) for m, c in ((model, cache), (native("llama"), other)))
    assert relative_rms(got, want) < LOGITS


def test_a_repeat_without_room_changes_nothing() -> None:
    cache = made(max_bytes=400 * 1024)
    feed(lean("llama"), cache, PROMPT)
    with pytest.raises(OutOfPages, match="max_bytes is 409,600: nothing was changed"):
        cache.batch_repeat_interleave(8)
    assert cache.compressed[0].fill.batch == 1
    feed(lean("llama"), cache, prompt(1))


def test_forks_leave_nothing_behind() -> None:
    cache = forked()
    steps(lean("llama"), cache, 40, 8)
    cache.reset()
    assert cache.report().physical_bytes == 0
    feed(lean("llama"), cache, PROMPT)
    assert cache.pools[0].owners is None
    for tokens in cache.compressed:
        tokens.release()
    assert pages(cache) == 0
    cache = tokens = None
    gc.collect()
    assert not any(issubclass(type(item), PagePool) for item in gc.get_objects())


@pytest.mark.parametrize("act", ["flush", "turn", "reorder"])
def test_a_fork_interrupted_anywhere(act: str) -> None:
    """Afterwards right logits, or an error that asks for a reset."""
    model, other = lean("llama"), reference(2)
    prepared = forked(rows=2)
    for m, c in ((model, prepared), (native("llama"), other)):
        steps(m, c, 32, 2)
    new = prompt(100, seed=6, batch=2)

    def run(cache: LeanKVCache) -> None:
        if act == "reorder":
            cache.reorder_cache(torch.tensor([0, 0]))
        else:
            feed(model, cache, new[:, : 1 if act == "flush" else 90])

    run(copy.deepcopy(prepared))
    counter, cache = Interrupt(None), copy.deepcopy(prepared)
    with counter.watching():
        run(cache)
    usable = 0
    for place in sorted({1 + i * (counter.calls - 1) // PLACES for i in range(PLACES + 1)}):
        cache, twin = copy.deepcopy(prepared), copy.deepcopy(other)
        with (
            suppress(KeyboardInterrupt),
            Interrupt(place).watching(),
        ):  # Python drops what a generator raises at its end
            run(cache)
        seen = cache.get_seq_length() - 332
        try:
            got = [feed(model, cache, new[:, seen : seen + 1])]
        except RuntimeError as error:
            assert "reset" in str(error), error
            cache.reset()
            assert cache.report().physical_bytes == 0
            continue
        usable += 1
        check(cache)
        got.append(feed(model, cache, new[:, seen + 1 : seen + 3]))
        if seen:
            feed(native("llama"), twin, new[:, :seen])
        want = [feed(native("llama"), twin, new[:, seen : seen + 1])]
        want.append(feed(native("llama"), twin, new[:, seen + 1 : seen + 3]))
        got, want = torch.cat(got, 1), torch.cat(want, 1)
        rows = 1 if act == "reorder" else 2  # row 1 may be what it was or what row 0 is
        assert relative_rms(got[:rows], want[:rows]) < LOGITS, place
    assert usable > 0
