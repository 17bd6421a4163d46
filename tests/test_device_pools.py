"""One page pool per device, simulated: bytes and limits of each, files, faults, and what has to say no."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate
from emulated_graph import EmulatedGraph
from families import build, left_padded, prompt
from placed import LAYERS, SPLITS, check_places, device_map, devices, greedy, held_of, load, model_on, small, turn_after
from simulated_devices import device
from transformers import PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.graphs.decode import install


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    with devices():
        yield


def filled(split: str | None = "two", **changes: Any) -> LeanKVCache:
    """A cache after a prompt of 60 tokens; `changes` to `small`."""
    cache = LeanKVCache(small(**changes))
    feed(model_on(split), cache, 60)
    return cache


@torch.no_grad()
def feed(model: PreTrainedModel, cache: LeanKVCache, tokens: int, seed: int = 0) -> torch.Tensor:
    return model(prompt(tokens, seed=seed).to(model.device), past_key_values=cache).logits.cpu()


def test_device_map_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device_map="auto"` on a machine of which accelerate says that it has two devices, too small for all layers."""
    room = {str(device(0)): 450_000, str(device(1)): 10**9, "cpu": 10**9}
    monkeypatch.setattr(transformers.integrations.accelerate, "accelerate_max_memory", lambda given=None: dict(room))
    model = load(device_map="auto")
    split = tuple(layer.self_attn.q_proj.weight.device.index for layer in model.model.layers)
    assert 0 < sum(split) < LAYERS
    hfkv.enable(model, small("exact"))
    inputs = left_padded([3, 70])
    cache = LeanKVCache(small("exact"))
    assert torch.equal(greedy(model, cache, inputs), greedy(model_on(), LeanKVCache(small("exact")), inputs))
    check_places(cache, split)
    own = model.generate(**{name: x.to(model.device) for name, x in inputs.items()}, max_new_tokens=4, do_sample=False)
    assert torch.equal(own.cpu(), greedy(model_on(), LeanKVCache(small("exact")), inputs, max_new_tokens=4))


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_of_each_device() -> None:
    """Layers take the same bytes wherever they are; each pool counts its own free pages."""
    there, here = filled("two").report(), filled(None).report()
    assert [a.bytes for a in there.layers] == [b.bytes for b in here.layers]
    assert len(here.device_bytes) == 1
    assert "on cpu" not in str(here)
    assert sum(there.device_bytes.values()) == there.physical_bytes
    a, b = there.device_bytes.values()
    assert abs(a - b) < 0.1 * a  # half the layers each


def test_budget() -> None:
    """The bytes of all devices together, up to a chunk of each pool and tier."""
    options = {"window": 16, "flush": 8, "budget": 0.2}
    ratio, slack = {}, 0.0
    for split in (None, "two", "in-turn"):
        cache = LeanKVCache(LeanKVConfig(**options))
        feed(model_on(split), cache, 700)
        report = cache.report()
        ratio[split] = report.ratio
        slack = max(slack, sum(2 * pool.chunk_bytes for pool in cache.pools) / report.exact_bytes)
    assert ratio[None] < 0.21
    assert max(ratio.values()) < 0.2 + slack / 2, (ratio, slack)


def test_max_bytes_limits_each_device() -> None:
    limit = 30_000  # too little for all layers together
    report = filled("two", preset="k8v4", max_bytes=limit).report()
    assert max(report.device_bytes.values()) <= limit < report.physical_bytes
    with pytest.raises(OutOfPages):
        filled(None, preset="k8v4", max_bytes=limit)


def test_out_of_pages_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device has no room for a flush: nothing changes on the first, not even the size of its pool."""
    cache, twin = filled("two"), filled("two")
    for step in range(8):
        for own in (cache, twin):
            feed(model_on("two"), own, 1, seed=step)
    first, second = cache.pools
    before, held = first.memory_bytes, held_of(cache)
    first_reserve = first.reserve

    def reserve(demand: dict[int, int], slack: float = 0.0) -> None:
        first_reserve(dict.fromkeys(demand, 500), slack)  # it has to grow

    def no_room(demand: dict[int, int], slack: float = 0.0) -> None:
        assert first.memory_bytes > before
        raise OutOfPages("no room")

    monkeypatch.setattr(first, "reserve", reserve)
    monkeypatch.setattr(second, "reserve", no_room)
    cache.request_flush()
    for _ in range(2):
        with pytest.raises(OutOfPages):
            feed(model_on("two"), cache, 1, seed=9)
        assert first.memory_bytes == before
        torch.testing.assert_close(held_of(cache), held, rtol=0, atol=0)
    monkeypatch.undo()
    twin.request_flush()
    assert torch.equal(feed(model_on("two"), cache, 1, seed=9), feed(model_on("two"), twin, 1, seed=9))


def test_prompt_that_fits_one_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the first device have stored the prompt when the second has no room: they give it back."""
    cache = LeanKVCache(small())
    feed(model_on("two"), cache, 10)

    def no_room(demand: dict[int, int], slack: float = 0.0) -> None:
        raise OutOfPages("no room")

    monkeypatch.setattr(cache.pools[1], "reserve", no_room)
    with pytest.raises(OutOfPages):
        feed(model_on("two"), cache, 60, seed=1)
    assert [pool.memory_bytes for pool in cache.pools] == [0, 0]
    assert cache.get_seq_length() == 10
    monkeypatch.undo()
    twin = LeanKVCache(small())
    feed(model_on("two"), twin, 10)
    assert torch.equal(feed(model_on("two"), cache, 60, seed=1), feed(model_on("two"), twin, 60, seed=1))


# ---- files, other caches -------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    """Each layer comes back to its device, or all to one, where they go on as if they had always been there."""
    cache, inputs = LeanKVCache(small()), left_padded([30, 70])
    more = turn_after(greedy(model_on("two"), cache, inputs), inputs["attention_mask"])
    cache.save(tmp_path / "cache")
    back, here = LeanKVCache.load(tmp_path / "cache"), LeanKVCache.load(tmp_path / "cache", device="cpu")
    check_places(back, SPLITS["two"])
    assert len(here.pools) == 1
    assert len({id(tokens.fill) for tokens in here.compressed}) == 1
    want = greedy(model_on("two"), cache, more)
    assert torch.equal(greedy(model_on("two"), back, more), want)
    assert torch.equal(greedy(model_on(), here, more), want)
    with pytest.raises(ValueError, match=r"holds keys in torch.float32 on maia:1 and got torch.float32 on cpu"):
        model_on()(prompt(1, batch=2), past_key_values=LeanKVCache.load(tmp_path / "cache", device=device(1)))


def test_a_cache_of_another_split() -> None:
    """Layers found on another device than their tokens: an error before anything changes."""
    cache = filled("two")
    before = held_of(cache)
    with pytest.raises(ValueError, match=r"layer 1 .*on maia:0 and got .*on maia:1: .*fresh cache"):
        feed(model_on("three"), cache, 1)
    torch.testing.assert_close(held_of(cache), before, rtol=0, atol=0)
    feed(model_on("two"), cache, 1)


def test_a_second_pass_over_the_prompt() -> None:
    held = []
    for model in (model_on("two"), model_on()):
        cache = LeanKVCache(LeanKVConfig(keep_share=0.5, score="kvzip", window=16, flush=8))
        hfkv.reconstruct(model, prompt(90).to(model.device), cache)
        held.append((feed(model, cache, 3), held_of(cache)))
    torch.testing.assert_close(held[0], held[1], rtol=0, atol=0)


def test_layers_of_transformers_beside_them() -> None:
    """A sliding layer on the second device: beams, and sequences selected by a tensor on the first."""
    said = []
    for places in (None, device_map((1, 0, 1))):
        model = load(build("gemma3-text"), device_map=places)
        cache = LeanKVCache(small())
        beams = greedy(model, cache, left_padded([20, 50]), num_beams=2)
        cache.batch_select_indices(torch.tensor([2], device=model.device))
        more = torch.cat([beams[1:], prompt(3)], 1)
        said.append((beams, greedy(model, cache, {"input_ids": more})))
        assert [layer.compressed for layer in cache.report().layers] == [False, True, True]
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=0)


def test_decode_steps_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    """A graph belongs to one device: the steps run as always, and the log says why."""
    model = install(load(device_map=device_map(SPLITS["two"])), EmulatedGraph)
    inputs = {"input_ids": prompt(40)}
    assert torch.equal(
        greedy(model, LeanKVCache(small()), inputs), greedy(model_on("two"), LeanKVCache(small()), inputs)
    )
    assert hfkv.decode_report(model).replayed == 0
    assert "its layers are on several devices" in caplog.text
