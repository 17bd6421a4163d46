"""What cannot work says so, names the option to change, and leaves the cache usable."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import transformers
from families import build, config_of, lean, left_padded, llama_like, native, prompt, relative_rms
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages

PROMPT = 150  # more than W + R: packed
LOGITS = 1e-5


def exact(**changes: object) -> LeanKVCache:
    return LeanKVCache(LeanKVConfig.preset("exact", **changes))


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


def assert_continues(cache: LeanKVCache, seen: torch.Tensor, name: str = "llama") -> None:
    """The cache holds exactly `seen`: 70 further steps, two flushes among them, give DynamicCache's logits."""
    other = DynamicCache()
    feed(native(name), other, seen)
    steps = prompt(70, seed=3, batch=seen.shape[0]).split(1, dim=1)
    got, want = (torch.cat([feed(m, c, s) for s in steps], 1) for m, c in ((lean(name), cache), (native(name), other)))
    assert relative_rms(got, want) < LOGITS


def lengths(cache: LeanKVCache) -> list[int]:
    return [cache.get_seq_length(index) for index in range(len(cache.layers))]


@contextlib.contextmanager
def failing(module: torch.nn.Module) -> Iterator[None]:
    """The module raises when it is called."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


# ---- models that cannot run under leankv


@pytest.mark.parametrize("name", ["bloom", "codegen"])
def test_families_that_accept_the_string_but_attend_themselves(name: str) -> None:
    with pytest.raises(ValueError, match="attn_implementation"):
        model = AutoModelForCausalLM.from_config(config_of(name), attn_implementation="leankv")
        model(input_ids=prompt(5))


@pytest.mark.parametrize("own_cache", [True, False], ids=["lean", "dynamic"])
def test_sparse_attention(own_cache: bool) -> None:
    """Under a name it does not know such a model would attend to everything, whatever the cache."""
    options = llama_like(
        kv_lora_rank=24,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=2,
        num_key_value_heads=4,
    )
    model = AutoModelForCausalLM.from_config(transformers.DeepseekV32Config(**options)).eval()
    feed(model, DynamicCache(config=model.config), prompt(20))
    with pytest.raises(ValueError, match="attn_implementation"):
        hfkv.enable(model, LeanKVConfig.preset("exact"))
    model.set_attn_implementation("leankv")
    with pytest.raises(ValueError, match="attn_implementation"):
        feed(model, exact() if own_cache else DynamicCache(config=model.config), prompt(20))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_bare_cache_in_an_encoder_decoder(name: str) -> None:
    """Twice with one cache: what fails must not pretend to work the second time."""
    cache = exact()
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match="EncoderDecoderCache"):
            lean(name).generate(prompt(20), past_key_values=cache, max_new_tokens=5)


def test_bare_cache_in_an_encoder_decoder_left_on_its_own_attention() -> None:
    with pytest.raises((ValueError, RuntimeError), match="EncoderDecoderCache"):
        native("t5").generate(prompt(20), past_key_values=exact(), max_new_tokens=5)


SAYING = """
import logging, sys
sys.path[:0] = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="LOG %(name)s %(levelname)s %(message)s")
from families import lean, prompt
from hfkv import LeanKVCache, LeanKVConfig
for name in ("gptj", "deepseek-v3", "mistral-sliding"):
    print("FAMILY", name)
    cache = LeanKVCache(LeanKVConfig.preset("exact"))
    lean(name).generate(prompt(20), past_key_values=cache, max_new_tokens=40)
    print(cache.report())
"""


def test_what_is_not_compressed_is_said_once() -> None:
    """In the log, once for all layers and steps, and in the report; in a process where nothing has been said before."""
    run = subprocess.run([sys.executable, "-c", SAYING, *sys.path], capture_output=True, text=True, check=True)
    families = run.stdout.split("FAMILY ")[1:]
    assert len(families) == 3
    for lines in (family.splitlines() for family in families):
        said = [line for line in lines if line.startswith("LOG hfkv WARNING") and "not compressed" in line]
        reported = [line for line in lines if not line.startswith("LOG") and "not compressed" in line]
        assert len(said) == 1, lines
        assert reported, lines


def test_enabling_a_family_left_on_eager_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hfkv"):
        hfkv.enable(build("gptj"), LeanKVConfig.preset("exact"))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hfkv")]
    assert len(said) == 1
    assert "eager" in said[0]


# ---- arguments


def test_model_config_in_place_of_the_config() -> None:
    with pytest.raises(TypeError, match="model_config"):
        LeanKVCache(native("llama").config)
    with pytest.raises(TypeError, match="LeanKVConfig"):
        LeanKVCache({"tiers": ((8, 4),)})
    with pytest.raises(TypeError):
        hfkv.enable(build("llama"), build("llama").config)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_4d_mask_over_packed_tokens(dtype: torch.dtype) -> None:
    mask = torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.bool)
    mask[..., 20:60] = False
    if dtype.is_floating_point:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT))
    with pytest.raises(ValueError, match="4-D"):
        feed(lean("llama"), cache, prompt(1), attention_mask=mask)
    assert lengths(cache) == [PROMPT, PROMPT]
    assert_continues(cache, prompt(PROMPT))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_4d_mask_on_a_prompt_is_applied(dtype: torch.dtype) -> None:
    """Nothing is packed yet: a prompt of two documents that do not see each other."""
    mask = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()
    mask[60:, :60] = False
    mask = mask[None, None]
    if dtype.is_floating_point:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    got, want = (
        feed(model, cache, prompt(PROMPT), attention_mask=mask)
        for model, cache in ((lean("llama"), exact()), (native("llama"), DynamicCache()))
    )
    assert relative_rms(got, want) < LOGITS


def test_mask_that_covers_only_the_new_tokens() -> None:
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT))
    with pytest.raises(ValueError, match="attention_mask"):
        feed(lean("llama"), cache, prompt(5), attention_mask=torch.ones(1, 5, dtype=torch.long))


def test_changed_batch_size() -> None:
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT, batch=2))
    for rows in (1, 3):
        with pytest.raises(ValueError, match="batch"):
            feed(lean("llama"), cache, prompt(1, batch=rows))
    assert lengths(cache) == [PROMPT, PROMPT]
    assert_continues(cache, prompt(PROMPT, batch=2))


def test_another_model() -> None:
    """A different number of key/value heads cannot be the model that filled the cache."""
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT))
    with pytest.raises(ValueError):
        feed(lean("llama3-rope"), cache, prompt(1))


def test_gradients_through_a_packed_past() -> None:
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT))
    with pytest.raises((ValueError, RuntimeError), match="no_grad"):
        lean("llama")(input_ids=prompt(1), past_key_values=cache, use_cache=True)
    assert lengths(cache) == [PROMPT, PROMPT]
    assert_continues(cache, prompt(PROMPT))


def test_gradients_without_a_cache_are_right() -> None:
    grads, inputs = [], left_padded([3, 60])
    for model in (lean("gemma2"), native("gemma2")):
        loss = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().mean()
        grads.append(torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)[0])
    assert relative_rms(*grads) < LOGITS


def test_cache_and_cache_implementation() -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        lean("llama").generate(prompt(5), past_key_values=exact(), cache_implementation="static", max_new_tokens=5)


def test_torch_compile() -> None:
    """A whole graph is refused, one with breaks is right."""
    ids = prompt(PROMPT)
    want = feed(native("llama"), DynamicCache(), ids)
    model = build("llama")
    model.set_attn_implementation("leankv")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?i)dynamo|unsupported|compiler.disable"):
        feed(torch.compile(model, backend="eager", fullgraph=True), exact(), ids)
    torch._dynamo.reset()
    cache = exact()
    got = feed(torch.compile(model, backend="eager"), cache, ids)
    torch._dynamo.reset()
    assert relative_rms(got, want) < LOGITS
    assert_continues(cache, ids)


# ---- crop


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_crop_into_packed_tokens(name: str) -> None:
    cache = exact()
    cache.activate_past_recording()
    feed(lean(name), cache, prompt(PROMPT))
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-(PROMPT - 10))
    assert set(lengths(cache)) == {PROMPT}
    cache.crop(torch.tensor(-10))
    cache.crop(0)
    assert set(lengths(cache)) == {PROMPT - 10}
    assert_continues_past_recording(cache, prompt(PROMPT)[:, :-10], name)


def assert_continues_past_recording(cache: LeanKVCache, seen: torch.Tensor, name: str) -> None:
    other = DynamicCache(config=native(name).config)
    feed(native(name), other, seen)
    step = prompt(1, seed=3)
    assert relative_rms(feed(lean(name), cache, step), feed(native(name), other, step)) < LOGITS


def test_crop_all_of_the_window_again_and_again() -> None:
    """Drafts of 20 tokens, all rejected, beyond what one window holds."""
    cache, ids = exact(), prompt(PROMPT)
    feed(lean("llama"), cache, ids)
    for number in range(6):
        feed(lean("llama"), cache, prompt(20, seed=number))
        cache.crop(-20)
    assert_continues(cache, ids)


# ---- forwards that stop halfway


@pytest.mark.parametrize("chunk", [1, 5, 100], ids=["step", "draft", "turn"])
def test_aborted_forward_is_noticed(chunk: int) -> None:
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT))
    with failing(lean("llama").model.layers[0].mlp), pytest.raises(KeyboardInterrupt):
        feed(lean("llama"), cache, prompt(chunk))
    with pytest.raises(RuntimeError, match="reset"):
        feed(lean("llama"), cache, prompt(chunk))
    cache.reset()
    feed(lean("llama"), cache, prompt(PROMPT))
    assert_continues(cache, prompt(PROMPT))


def test_aborted_prompt_is_noticed() -> None:
    cache = exact()
    with failing(lean("llama").model.layers[0].mlp), pytest.raises(KeyboardInterrupt):
        feed(lean("llama"), cache, prompt(PROMPT))
    with pytest.raises(RuntimeError, match="reset"):
        feed(lean("llama"), cache, prompt(PROMPT))
    cache.reset()
    feed(lean("llama"), cache, prompt(PROMPT))
    assert_continues(cache, prompt(PROMPT))


def test_aborted_before_the_attention() -> None:
    """Layer 0 has taken the tokens in `update`, but its attention never came."""
    cache = exact()
    feed(lean("llama"), cache, prompt(PROMPT))
    hidden = torch.randn(1, 2, 1, 16)
    cache.update(hidden, hidden, 0)
    with pytest.raises(RuntimeError, match="reset"):
        feed(lean("llama"), cache, prompt(1))


# ---- memory


ROOM = 256 * 1024  # some 400 tokens of the tiny Llama beside its windows


def test_out_of_pages_in_the_first_prompt() -> None:
    cache = exact(max_bytes=ROOM)
    with pytest.raises(OutOfPages, match="max_bytes"):
        feed(lean("llama"), cache, prompt(3000))
    assert cache.get_seq_length() == 0
    feed(lean("llama"), cache, prompt(PROMPT))
    assert cache.report().physical_bytes <= ROOM
    assert_continues(cache, prompt(PROMPT))


def test_out_of_pages_after_a_layer_that_transformers_keeps() -> None:
    """Layer 0 slides and had its tokens when layer 1 found no room: the next prompt starts afresh in both."""
    cache = exact(max_bytes=ROOM // 2)
    with pytest.raises(OutOfPages, match="max_bytes"):
        feed(lean("gemma2"), cache, prompt(3000))
    ids, steps = prompt(PROMPT), prompt(40, seed=3).split(1, dim=1)
    other = DynamicCache(config=native("gemma2").config)
    feed(lean("gemma2"), cache, ids)
    feed(native("gemma2"), other, ids)
    got, want = (
        torch.cat([feed(m, c, s) for s in steps], 1) for m, c in ((lean("gemma2"), cache), (native("gemma2"), other))
    )
    assert relative_rms(got, want) < LOGITS


def test_out_of_pages_in_a_later_turn() -> None:
    cache = exact(max_bytes=ROOM)
    feed(lean("llama"), cache, prompt(PROMPT))
    before = cache.report().physical_bytes
    for _ in range(2):
        with pytest.raises(OutOfPages, match="max_bytes"):
            feed(lean("llama"), cache, prompt(3000))
        assert lengths(cache) == [PROMPT, PROMPT]
    assert cache.report().physical_bytes <= before
    assert_continues(cache, prompt(PROMPT))


def test_out_of_pages_at_a_flush() -> None:
    """The step that would flush raises, again and again, and nothing has changed; cropping makes room."""
    cache, ids = exact(max_bytes=ROOM), prompt(3000)
    feed(lean("llama"), cache, ids[:, :PROMPT])
    taken = PROMPT
    with pytest.raises(OutOfPages, match="max_bytes"):
        for taken in range(PROMPT, 3000):
            feed(lean("llama"), cache, ids[:, taken : taken + 1])
    assert taken > PROMPT + 32
    for _ in range(2):
        assert lengths(cache) == [taken, taken]
        with pytest.raises(OutOfPages):
            feed(lean("llama"), cache, ids[:, taken : taken + 1])
    assert cache.report().physical_bytes <= ROOM
    cache.crop(-20)
    other = DynamicCache()
    feed(native("llama"), other, ids[:, : taken - 20])
    steps = ids[:, taken - 20 : taken].split(1, dim=1)
    got, want = (
        torch.cat([feed(model, held, step) for step in steps], 1)
        for model, held in ((lean("llama"), cache), (native("llama"), other))
    )
    assert relative_rms(got, want) < LOGITS


def test_too_small_for_anything() -> None:
    cache = exact(max_bytes=1024)
    with pytest.raises(OutOfPages, match="max_bytes"):
        feed(lean("llama"), cache, prompt(PROMPT))
    assert cache.get_seq_length() == 0
