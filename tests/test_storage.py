"""Caches on disk: the same continuation afterwards, no larger than in memory, no damaged or foreign file used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build, lean, left_padded, native, prompt
from safetensors.torch import load_file, save_file
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from hfkv import LeanKVCache, LeanKVConfig, storage
from hfkv.natives import TensorReader

FAMILIES = ["llama", "gemma2", "gpt-oss", "qwen3-next", "falcon-h1", "gemma3n-text", "deepseek-v3", "gptj"]
NEW_TOKENS = 40


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


def steps(model: PreTrainedModel, cache: Cache, count: int = 70, batch: int = 1) -> torch.Tensor:
    return torch.cat([feed(model, cache, ids) for ids in prompt(count, seed=3, batch=batch).split(1, dim=1)], 1)


def filled(name: str, preset: str = "balanced", **changes: object) -> LeanKVCache:
    """A cache after a padded prompt and some steps, in the midst of two flushes."""
    cache = LeanKVCache(LeanKVConfig.preset(preset, **changes))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    lean(name).generate(**left_padded([3, 150]), past_key_values=cache, **options)
    return cache


def continued(name: str, cache: Cache) -> torch.Tensor:
    mask = torch.cat([left_padded([3, 150])["attention_mask"], torch.ones(2, NEW_TOKENS - 1 + 5)], 1).long()
    first = feed(lean(name), cache, prompt(5, seed=1, batch=2), attention_mask=mask)
    logits = [first]
    for ids in prompt(70, seed=2, batch=2).split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits.append(feed(lean(name), cache, ids, attention_mask=mask))
    return torch.cat(logits, 1)


def resigned(path: Path, **changes: str) -> None:
    """Change metadata of a file and give it a valid checksum again."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    save_file(load_file(path), path, metadata | changes | {"checksum": storage.UNSIGNED})
    storage._sign(path)


# ---- what comes back


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_continues_as_if_never_saved(name: str, preset: str, tmp_path: Path) -> None:
    cache, path = filled(name, preset), tmp_path / "cache.safetensors"
    cache.save(path)
    report = cache.report()
    assert path.stat().st_size <= report.physical_bytes + report.plain_bytes + (64 << 10)
    loaded = LeanKVCache.load(path)
    assert loaded.config == cache.config
    assert loaded.get_seq_length() == cache.get_seq_length()
    again = loaded.report()
    assert [(x.kind, x.reason) for x in again.layers] == [(x.kind, x.reason) for x in report.layers]
    assert torch.equal(continued(name, loaded), continued(name, cache))


@pytest.mark.parametrize("preset", ["k8v4", "aggressive", "paper"])
def test_other_presets(preset: str, tmp_path: Path) -> None:
    cache = filled("qwen3", preset)
    cache.save(tmp_path / "cache")
    assert torch.equal(continued("qwen3", LeanKVCache.load(tmp_path / "cache")), continued("qwen3", cache))


def test_config_with_overrides_and_budget(tmp_path: Path) -> None:
    for number, config in enumerate(
        (LeanKVConfig(layers={1: {"tiers": [(8, 8)]}}), LeanKVConfig(budget=0.5, max_bytes=1 << 22))
    ):
        cache = LeanKVCache(config)
        feed(lean("llama"), cache, prompt(400))
        cache.save(tmp_path / str(number))
        loaded = LeanKVCache.load(tmp_path / str(number), device="cpu")
        assert loaded.config == config
        assert torch.equal(steps(lean("llama"), loaded), steps(lean("llama"), cache))


def test_any_moment(tmp_path: Path) -> None:
    """Short of one window, after a crop, a reorder, a long later turn, a reset, and empty."""
    model, cache, path = lean("llama"), LeanKVCache(LeanKVConfig()), tmp_path / "cache"
    changes = (
        lambda: feed(model, cache, prompt(20, batch=2)),
        lambda: cache.crop(-5),
        lambda: feed(model, cache, prompt(200, seed=4, batch=2)),
        lambda: cache.crop(-30),
        lambda: cache.reorder_cache(torch.tensor([1, 1])),
        lambda: feed(model, cache, prompt(100, seed=5, batch=2)),
        cache.reset,
        lambda: feed(model, cache, prompt(97, seed=6, batch=2)),
    )
    for change in (lambda: None, *changes):
        change()
        cache.save(path)
        one, two = LeanKVCache.load(path), LeanKVCache.load(path)
        assert one.get_seq_length() == cache.get_seq_length()
        two.save(path)
        assert torch.equal(steps(model, one, 40, batch=2), steps(model, LeanKVCache.load(path), 40, batch=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_as_exact_as_a_dynamic_cache(tmp_path: Path) -> None:
    """What has been said goes on from the file, as from a cache that was there all the time."""
    question, more = prompt(150), prompt(90, seed=8)
    cache, other = LeanKVCache(LeanKVConfig.preset("exact")), DynamicCache()
    options = {"max_new_tokens": 40, "do_sample": False}
    said = lean("llama").generate(question, past_key_values=cache, **options)
    native("llama").generate(question, past_key_values=other, **options)
    cache.save(tmp_path / "cache")
    ids = torch.cat([said, more], 1)
    ones = torch.ones_like(ids)
    loaded = LeanKVCache.load(tmp_path / "cache")
    got = lean("llama").generate(ids, attention_mask=ones, past_key_values=loaded, **options)
    want = native("llama").generate(ids, attention_mask=ones, past_key_values=other, **options)
    assert torch.equal(got, want)


def test_encoder_decoder(tmp_path: Path) -> None:
    """The self-attention part is saved; the cross-attention part is made anew from the encoder."""
    inputs, options = {"input_ids": prompt(20)}, {"max_new_tokens": 110, "do_sample": False}

    def run(model: PreTrainedModel, own: Cache, path: Path | None) -> torch.Tensor:
        said = model.generate(**inputs, past_key_values=EncoderDecoderCache(own, DynamicCache()), **options)
        if path is not None:
            own.save(path)
            own = LeanKVCache.load(path)
        past = EncoderDecoderCache(own, DynamicCache())
        return model.generate(**inputs, decoder_input_ids=said, past_key_values=past, **options)

    got = run(lean("bart"), LeanKVCache(LeanKVConfig.preset("exact")), tmp_path / "cache")
    assert torch.equal(got, run(native("bart"), DynamicCache(), None))


ELSEWHERE = """
import sys
sys.path[:0] = sys.argv[2:]
from families import lean, prompt
from hfkv import LeanKVCache
for preset in ("exact", "k8v4", "balanced"):
    cache = LeanKVCache.load(f"{sys.argv[1]}/{preset}")
    out = lean("llama").generate(prompt(300), past_key_values=cache, max_new_tokens=60, do_sample=False)
    print(out[0, 300:].tolist())
"""


def test_in_another_process(tmp_path: Path) -> None:
    wanted = []
    for preset in ("exact", "k8v4", "balanced"):
        cache = LeanKVCache(LeanKVConfig.preset(preset))
        feed(lean("llama"), cache, prompt(300)[:, :299])
        cache.save(tmp_path / preset)
        out = lean("llama").generate(prompt(300), past_key_values=cache, max_new_tokens=60, do_sample=False)
        wanted.append(str(out[0, 300:].tolist()))
    arguments = [sys.executable, "-c", ELSEWHERE, str(tmp_path), *sys.path]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == wanted


# ---- what is refused


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    filled("llama", "k8v4").save(path)
    whole = path.read_bytes()
    LeanKVCache.load(path)
    for size in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            LeanKVCache.load(path)
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(whole[:8], "little")
    keys = [whole.index(f'"{key}":'.encode()) + 1 for key in sorted(storage.HEADER)]
    places = [0, 1, 8, 9, *torch.randint(10, header, (150,), generator=generator).tolist(), *keys]
    places += torch.randint(header, len(whole), (150,), generator=generator).tolist()
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=str(path)):
            LeanKVCache.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="altered"):
        LeanKVCache.load(path)


def test_files_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LeanKVCache.load(tmp_path / "absent")
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    save_file({"x": torch.zeros(3)}, tmp_path / "more", {"format": "pt"})
    for name in ("weights", "more"):
        with pytest.raises(ValueError, match="not a file of LeanKVCache"):
            LeanKVCache.load(tmp_path / name)


def test_another_version_or_layout(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache = filled("llama")
    cache.save(path)
    resigned(path, version="99")
    with pytest.raises(ValueError, match=r"format 99.*reads 1.*hfkv"):
        LeanKVCache.load(path)
    cache.save(path)
    resigned(path, config=LeanKVConfig(tiers=((8, 4), (3, 2))).to_json())
    with pytest.raises(ValueError, match="layout"):
        LeanKVCache.load(path)
    cache.save(path)
    resigned(path, config='{"nonsense": 1}')
    with pytest.raises(ValueError, match="nonsense"):
        LeanKVCache.load(path)


def test_a_device_that_is_not_here() -> None:
    reader = TensorReader({}.__getitem__, None, "cache")
    with pytest.raises(ValueError, match="device="):
        reader.place("cuda:63")


def other_weights() -> PreTrainedModel:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.add_(1e-3)
    return model


def other_rope() -> PreTrainedModel:
    model = build("llama")
    model.config.rope_parameters["rope_theta"] = 5e5
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (other_weights, r"another model, weights of layer 1: k_proj\.weight"),
        (other_rope, "another model, config.rope_parameters.rope_theta"),
        (lambda: build("llama3-rope"), "another model"),
        (lambda: build("llama").double(), "dtype"),
    ],
    ids=["weights", "rope", "heads", "dtype"],
)
@pytest.mark.parametrize("stored", [True, False], ids=["loaded", "at hand"])
def test_wrong_model(model: object, message: str, stored: bool, tmp_path: Path) -> None:
    """Raised at the first use; the right model goes on afterwards."""
    cache = LeanKVCache(LeanKVConfig.preset("k8v4"))
    feed(lean("llama"), cache, prompt(150))
    cache.save(tmp_path / "cache")
    if stored:
        cache = LeanKVCache.load(tmp_path / "cache")
    stranger = model()
    stranger.set_attn_implementation("leankv")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            feed(stranger, cache, prompt(1))
    assert cache.get_seq_length() == 150
    right = LeanKVCache.load(tmp_path / "cache")
    assert torch.equal(steps(lean("llama"), cache), steps(lean("llama"), right))


def test_the_same_weights_in_another_object_are_the_same_model(tmp_path: Path) -> None:
    cache = filled("llama")
    cache.save(tmp_path / "cache")
    twin = build("llama")
    twin.set_attn_implementation("leankv")
    mask = torch.cat([left_padded([3, 150])["attention_mask"], torch.ones(2, NEW_TOKENS)], 1).long()
    feed(twin, LeanKVCache.load(tmp_path / "cache"), prompt(1, batch=2), attention_mask=mask)


def test_a_wrong_model_for_layers_that_transformers_keeps(tmp_path: Path) -> None:
    cache = LeanKVCache(LeanKVConfig())
    feed(lean("mistral-sliding"), cache, prompt(60))
    cache.save(tmp_path / "cache")
    loaded = LeanKVCache.load(tmp_path / "cache")
    with pytest.raises(ValueError, match="another model"):
        feed(lean("llama3-rope"), loaded, prompt(1))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache = LeanKVCache(LeanKVConfig(policy=lambda c: torch.zeros_like(c.tier)))
    feed(lean("llama"), cache, prompt(150))
    with pytest.raises(ValueError, match="policy"):
        cache.save(path)
    cache = LeanKVCache()
    feed(lean("llama"), cache, prompt(150))
    hidden = torch.randn(1, 2, 1, 16)
    cache.update(hidden, hidden, 0)
    with pytest.raises(RuntimeError, match="reset"):
        cache.save(path)
    assert not path.exists()


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    filled("llama").save(path)
    before = path.read_bytes()

    def fail(_: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "_sign", fail)
    with pytest.raises(OSError, match="no space"):
        filled("llama", "k8v4").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
