"""The ways in which people call `generate` and `forward`, on `exact` against DynamicCache: equal tokens or logits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from threading import Thread

import pytest
import torch
from families import BY_NAME, VOCAB, attention_of, build, config_of, lean, left_padded, native, prompt, relative_rms
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

NEW_TOKENS = 70  # two flushes
LOGITS = 1e-5  # relative RMS of float32 logits: rounding only


def exact() -> LeanKVCache:
    return LeanKVCache(LeanKVConfig.preset("exact"))


def greedy(model: PreTrainedModel, cache: Cache, inputs: dict[str, torch.Tensor], **kwargs: object) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    return model.generate(**inputs, past_key_values=cache, **options)


@functools.cache
def said_by(name: str, *lengths: int, new: int = NEW_TOKENS) -> torch.Tensor:
    """What the native model says after such prompts, once for all cases that ask."""
    return greedy(native(name), DynamicCache(), left_padded(list(lengths)), max_new_tokens=new)


def assert_same_tokens(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def both(name: str, run: Callable[[PreTrainedModel, Cache], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `run` returns under leankv with a LeanKVCache, and on the native model with a DynamicCache."""
    return run(lean(name), exact()), run(native(name), DynamicCache(config=native(name).config))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose word `w7` is token 7."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w4"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


def text(ids: torch.Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.flatten().tolist())


# ---- ways to generate


@pytest.mark.parametrize("inputs", [{"input_ids": prompt(150)}, left_padded([3, 150])], ids=["one", "padded"])
def test_sampling(inputs: dict[str, torch.Tensor]) -> None:
    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        torch.manual_seed(7)
        return greedy(model, cache, inputs, do_sample=True, temperature=0.9, top_k=40, top_p=0.95)

    assert_same_tokens(*both("llama", run))


def test_num_return_sequences() -> None:
    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        torch.manual_seed(7)
        return greedy(model, cache, left_padded([40, 100]), do_sample=True, num_return_sequences=3)

    got, want = both("qwen3", run)
    assert got.shape[0] == 6
    assert_same_tokens(got, want)


def test_inputs_embeds() -> None:
    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        embeds = model.get_input_embeddings()(prompt(100))
        return greedy(model, cache, {"inputs_embeds": embeds})

    assert_same_tokens(*both("llama", run))


class ListStreamer(BaseStreamer):
    """Keeps what generate streams: the prompt, then one token per step."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_streaming_tokens() -> None:
    streamer = ListStreamer()
    out = greedy(lean("llama"), exact(), {"input_ids": prompt(100)}, streamer=streamer)
    assert streamer.ended
    assert len(streamer.parts) == 1 + NEW_TOKENS
    assert_same_tokens(torch.cat(streamer.parts), out[0])
    assert_same_tokens(out, greedy(native("llama"), DynamicCache(), {"input_ids": prompt(100)}))


def test_streaming_text_from_a_thread(tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    inputs = {"input_ids": prompt(100)}
    thread = Thread(target=greedy, args=(lean("llama"), exact(), inputs), kwargs={"streamer": streamer})
    thread.start()
    streamed = "".join(streamer).split()
    thread.join()
    want = greedy(native("llama"), DynamicCache(), inputs)[0, 100:]
    assert streamed == text(want).split()


def test_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    question = text(prompt(120))

    def answer(model: PreTrainedModel, cache: Cache) -> str:
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        out = generate(question, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
        return out[0]["generated_text"]

    got, want = both("llama", answer)
    assert got == want
    assert got.startswith(question)
    assert len(got) > len(question) + NEW_TOKENS


@pytest.mark.parametrize("lengths", [[200], [3, 150], [150, 64, 1]], ids=str)
@pytest.mark.parametrize("chunk", [16, 64])
def test_chunked_prefill(lengths: list[int], chunk: int) -> None:
    got = greedy(lean("llama"), exact(), left_padded(lengths), prefill_chunk_size=chunk)
    assert_same_tokens(got, said_by("llama", *lengths))


def test_ragged_3_beside_2000() -> None:
    assert_same_tokens(*both("llama", lambda model, cache: greedy(model, cache, left_padded([3, 2000]))))


def test_built_by_the_string() -> None:
    config = config_of("llama")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="leankv").eval()
    model.load_state_dict(native("llama").state_dict())
    assert attention_of(model) == "leankv"
    inputs = {"input_ids": prompt(100)}
    got = greedy(model, exact(), inputs, eos_token_id=None)
    assert_same_tokens(got, greedy(native("llama"), DynamicCache(), inputs))


@pytest.mark.parametrize("name", ["llama", "gemma3-text", "gemma3n-text", "qwen3-next", "mistral-sliding"])
def test_told_the_model_config(name: str) -> None:
    inputs = left_padded([3, 150])
    cache = LeanKVCache(LeanKVConfig.preset("exact"), model_config=lean(name).config)
    got = greedy(lean(name), cache, inputs)
    assert_same_tokens(got, greedy(native(name), DynamicCache(config=native(name).config), inputs))
    compressed = tuple(layer.index for layer in cache.report().layers if layer.compressed)
    assert compressed == BY_NAME[name].compressed


@pytest.mark.parametrize("preset", ["exact", "k8v4", "balanced", "aggressive", "paper"])
def test_every_preset_generates_and_reports(preset: str) -> None:
    cache = LeanKVCache(LeanKVConfig.preset(preset))
    out = greedy(lean("qwen3"), cache, left_padded([3, 400]))
    assert out.shape == (2, 400 + NEW_TOKENS)
    assert cache.get_seq_length() == 400 + NEW_TOKENS - 1
    report = cache.report()
    assert report.physical_bytes > 0
    assert str(report)


@pytest.mark.parametrize(("window", "flush"), [(1, 1), (5, 3), (16, 8), (128, 64), (64, 200)])
@pytest.mark.parametrize("lengths", [[97], [3, 150]], ids=str)
def test_other_windows(window: int, flush: int, lengths: list[int]) -> None:
    cache = LeanKVCache(LeanKVConfig.preset("exact", window=window, flush=flush))
    got = greedy(lean("llama"), cache, left_padded(lengths))
    assert_same_tokens(got, said_by("llama", *lengths))


@pytest.mark.parametrize("page_tokens", [32, 64])
@pytest.mark.parametrize(
    "choice",
    [{"high_share": 0.1}, {"high_share": 0.5}, {"alpha_high": 1.0}, {"high_share": 0.0}, {"high_share": 1.0}],
    ids=str,
)
def test_two_exact_tiers(choice: dict[str, float], page_tokens: int) -> None:
    """Tokens are demoted from page to page but lose nothing: the machinery of tiers, without its errors."""
    coding = {"rotate_keys": False, "rotate_values": False, "shift_keys": False}
    config = LeanKVConfig(tiers=("exact", "exact"), page_tokens=page_tokens, **coding, **choice)
    for lengths in ((3, 400), (64,)):
        got = greedy(lean("qwen3"), LeanKVCache(config), left_padded(list(lengths)), max_new_tokens=130)
        assert_same_tokens(got, said_by("qwen3", *lengths, new=130))


def test_default_config_generates() -> None:
    out = greedy(lean("qwen3"), LeanKVCache(), {"input_ids": prompt(200)})
    assert out.shape == (1, 200 + NEW_TOKENS)


# ---- the same cache again


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3-next"])
@pytest.mark.parametrize("turns", [(150, 5, 90, 1), (1, 40, 200), (64, 64, 64)], ids=str)
def test_conversation(name: str, turns: tuple[int, ...]) -> None:
    """Every turn appends a question to all that was said, on the same cache."""

    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        ids = torch.empty(1, 0, dtype=torch.long)
        for number, length in enumerate(turns):
            ids = torch.cat([ids, prompt(length, seed=number)], 1)
            said = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            }  # or a said pad token would count as a pad
            ids = greedy(model, cache, said, max_new_tokens=40)
            assert cache.get_seq_length() == ids.shape[1] - 1
        return ids

    assert_same_tokens(*both(name, run))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_conversation_of_a_padded_batch(name: str) -> None:
    """Questions of different lengths in later turns put pads between what was said and what is asked."""

    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        ids = mask = torch.empty(2, 0, dtype=torch.long)
        for number, lengths in enumerate([(3, 150), (40, 7), (12, 20), (1, 90)]):
            question = left_padded(list(lengths), seed=10 * number)
            ids = torch.cat([ids, question["input_ids"]], 1)
            mask = torch.cat([mask, question["attention_mask"]], 1)
            ids = greedy(model, cache, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=40)
            mask = torch.nn.functional.pad(mask, (0, 40), value=1)
        return ids

    assert_same_tokens(*both(name, run))


def test_only_the_new_ids_and_the_full_mask() -> None:
    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        first = greedy(model, cache, {"input_ids": prompt(150)}, max_new_tokens=40)
        new = torch.cat([first[:, -1:], prompt(20, seed=1)], 1)
        mask = torch.ones(1, first.shape[1] + 20, dtype=torch.long)
        return greedy(model, cache, {"input_ids": new, "attention_mask": mask})

    assert_same_tokens(*both("llama", run))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_reset_and_again(name: str) -> None:
    cache = exact()
    for lengths in ([3, 150], [3, 150], [64], [5, 1, 97]):
        inputs = left_padded(lengths)
        got = greedy(lean(name), cache, inputs)
        assert_same_tokens(got, greedy(native(name), DynamicCache(config=native(name).config), inputs))
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["llama", "gemma3-text"])
def test_deepcopy_forks(name: str) -> None:
    """One prefix, several continuations; the fork that was copied from is not touched."""

    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        prefix = prompt(150)
        with torch.no_grad():
            model(input_ids=prefix, past_key_values=cache, use_cache=True)
        answers = []
        for number in range(3):
            ids = torch.cat([prefix, prompt(20, seed=1 + number)], 1)
            fork = cache if number == 2 else copy.deepcopy(cache)
            answers.append(greedy(model, fork, {"input_ids": ids}))
        return torch.cat(answers)

    assert_same_tokens(*both(name, run))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding", "gptj"])
def test_beam_search(name: str) -> None:
    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        return greedy(model, cache, left_padded([3, 150]), num_beams=3)

    assert_same_tokens(*both(name, run))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding", "falcon"])
def test_batch_calls(name: str) -> None:
    """Repeat, select and reorder sequences, before and after the next flush."""

    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        logits = []
        with torch.no_grad():
            model(input_ids=prompt(150, batch=2), past_key_values=cache, use_cache=True)
            for number, change in enumerate(
                (
                    lambda: cache.batch_repeat_interleave(3),
                    lambda: cache.reorder_cache(torch.tensor([5, 0, 0, 3, 3, 1])),
                    lambda: cache.batch_select_indices(torch.tensor([0, 3, 4])),
                    lambda: cache.reorder_cache(torch.tensor([0, 0, 0])),
                )
            ):
                change()
                rows = (6, 6, 3, 3)[number]
                for ids in prompt(40, seed=number, batch=rows).split(1, dim=1):
                    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                    logits.append(out.logits[:, -1])
        return torch.cat(logits)

    assert relative_rms(*both(name, run)) < LOGITS


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_prompt_lookup(name: str) -> None:
    repeated = {"input_ids": prompt(50).repeat(1, 3)}
    got = greedy(lean(name), exact(), repeated, prompt_lookup_num_tokens=5)
    assert_same_tokens(got, greedy(native(name), DynamicCache(config=native(name).config), repeated))


def test_assisted_decoding() -> None:
    """The assistant's weights differ in the last layer, so some of its tokens are rejected."""
    assistant = build("llama")
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.02 * torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator()))
    inputs = {"input_ids": prompt(150)}
    got = greedy(lean("llama"), exact(), inputs, assistant_model=assistant)
    assert_same_tokens(got, greedy(native("llama"), DynamicCache(), inputs))


# ---- forward calls


@pytest.mark.parametrize("chunk", [2, 5, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("lengths", [[150], [3, 150]], ids=str)
def test_several_new_tokens_at_once(chunk: int, lengths: list[int]) -> None:
    """Speculation and continued prompts: q > 1 over a packed past is causal inside."""
    inputs = left_padded(lengths)
    new = prompt(3 * chunk, seed=5, batch=len(lengths))

    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        mask, logits = inputs["attention_mask"], []
        with torch.no_grad():
            model(**inputs, position_ids=positions(mask), past_key_values=cache, use_cache=True)
            for ids in new.split(chunk, dim=1):
                mask = torch.nn.functional.pad(mask, (0, chunk), value=1)
                step = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, -chunk:]}
                logits.append(model(**step, past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, 1)

    assert relative_rms(*both("llama", run)) < LOGITS


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_right_padded_batch(name: str) -> None:
    """Prompt logits at every real token, then 70 steps on every row at its own position."""
    lengths = [20, 150, 64]
    width = max(lengths)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = prompt(length, seed=row)[0]
        mask[row, :length] = 1
    steps = prompt(NEW_TOKENS, seed=9, batch=3)

    def run(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        seen, kept = mask, []
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            kept += [out[row, :length] for row, length in enumerate(lengths)]
            for token in steps.split(1, dim=1):
                seen = torch.nn.functional.pad(seen, (0, 1), value=1)
                step = {"attention_mask": seen, "position_ids": positions(seen)[:, -1:]}
                kept.append(model(input_ids=token, **step, past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.cat(kept)

    assert relative_rms(*both(name, run)) < LOGITS


def test_inference_mode() -> None:
    with torch.inference_mode():
        assert_same_tokens(*both("llama", lambda model, cache: greedy(model, cache, {"input_ids": prompt(100)})))


def test_leankv_without_a_lean_cache() -> None:
    """Plain tensors through the attention function: no cache, DynamicCache, StaticCache."""
    inputs = left_padded([3, 150])
    want = greedy(native("gemma2"), DynamicCache(), inputs, max_new_tokens=20)
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static", "disable_compile": True}):
        got = lean("gemma2").generate(**inputs, max_new_tokens=20, do_sample=False, **options)
        assert_same_tokens(got, want)


@pytest.mark.parametrize("lengths", [[200], [3, 150]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek-v3"])
def test_dynamic_cache_under_leankv(name: str, lengths: list[int]) -> None:
    """Chunks of a prompt and drafts attend to the whole past of a cache that is not ours as well."""
    inputs, config = left_padded(lengths), native(name).config
    want = greedy(native(name), DynamicCache(config=config), inputs)
    assert_same_tokens(greedy(lean(name), DynamicCache(config=config), inputs, prefill_chunk_size=32), want)
    if len(lengths) == 1:
        assert_same_tokens(greedy(lean(name), DynamicCache(config=config), inputs, prompt_lookup_num_tokens=5), want)


# ---- enable and disable


@pytest.mark.parametrize("name", ["llama", "gemma3-text", "qwen3-next", "gptj", "deepseek-v3", "bart", "t5"])
def test_enable_and_disable(name: str) -> None:
    model, inputs = build(name), left_padded([3, 150])
    before = attention_of(model)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(**inputs, **options)

    hfkv.enable(model, LeanKVConfig.preset("exact"))
    for _ in range(2):
        got = model.generate(**inputs, **options)
        assert_same_tokens(got.sequences, want.sequences)
        cache = got.past_key_values
        assert isinstance(cache.self_attention_cache if BY_NAME[name].encoder_decoder else cache, LeanKVCache)

    hfkv.disable(model)
    got = model.generate(**inputs, **options)
    assert attention_of(model) == before
    assert type(got.past_key_values) is type(want.past_key_values)
    assert_same_tokens(got.sequences, want.sequences)


def test_enable_leaves_the_users_cache_alone() -> None:
    model = build("llama")
    hfkv.enable(model, LeanKVConfig.preset("exact"))
    mine = DynamicCache()
    out = greedy(model, mine, {"input_ids": prompt(20)}, return_dict_in_generate=True)
    assert out.past_key_values is mine
    assert_same_tokens(out.sequences, greedy(native("llama"), DynamicCache(), {"input_ids": prompt(20)}))


def test_enable_survives_deepcopy_of_the_model() -> None:
    model = build("llama")
    hfkv.enable(model, LeanKVConfig.preset("exact"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.copy_(native("llama").lm_head.weight.flip(0))
    options = {"max_new_tokens": 20, "do_sample": False}
    mirrored = twin.generate(prompt(100), **options)
    assert_same_tokens(model.generate(prompt(100), **options), native("llama").generate(prompt(100), **options))
    assert not torch.equal(mirrored, model.generate(prompt(100), **options))


@pytest.mark.parametrize("name", ["llama", "gemma3-text", "bart", "qwen3-next", "lfm2", "falcon-h1", "deepseek-v3"])
def test_enabled_beam_search(name: str) -> None:
    model = build(name)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 3}
    want = native(name).generate(**left_padded([3, 150]), **options)
    hfkv.enable(model, LeanKVConfig.preset("exact"))
    assert_same_tokens(model.generate(**left_padded([3, 150]), **options), want)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3n-text", "lfm2", "deepseek-v3", "bart"])
def test_enabled_prompt_lookup(name: str) -> None:
    repeated = {"input_ids": prompt(50).repeat(1, 3), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    model = hfkv.enable(build(name), LeanKVConfig.preset("exact"))
    assert_same_tokens(model.generate(**repeated, prompt_lookup_num_tokens=5), native(name).generate(**repeated))


@pytest.mark.parametrize("name", ["qwen3-next", "gemma3n-text", "falcon-h1"])
def test_told_the_model_config_and_reset(name: str) -> None:
    config = native(name).config
    cache = LeanKVCache(LeanKVConfig.preset("exact"), model_config=config)
    for lengths in ([3, 150], [64]):
        got = greedy(lean(name), cache, left_padded(lengths))
        assert_same_tokens(got, greedy(native(name), DynamicCache(config=config), left_padded(lengths)))
        cache.reset()


def test_enabled_with_an_assistant() -> None:
    model, assistant = build("llama"), build("mistral-sliding")
    hfkv.enable(model, LeanKVConfig.preset("exact"))
    hfkv.enable(assistant, LeanKVConfig.preset("exact"))
    inputs = {"input_ids": prompt(150), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert_same_tokens(model.generate(**inputs, assistant_model=assistant), native("llama").generate(**inputs))


# ---- sequences that end early


def ended_early(steps: int, ends: int, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Ids and mask of a batch whose second answer ends after `ends` of `steps` tokens, then the next question."""
    inputs = left_padded([90, 150])
    free = native("llama").generate(**inputs, max_new_tokens=steps, do_sample=False)
    ids = free.clone()
    ids[1, 150 + ends :] = pad
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, steps), value=1)
    mask[1, 150 + ends :] = 0
    question = left_padded([12, 20], seed=5)
    ids, mask = torch.cat([ids, question["input_ids"]], 1), torch.cat([mask, question["attention_mask"]], 1)
    return inputs["input_ids"], ids, mask, 150 + steps


def tiers_without_loss() -> LeanKVCache:
    coding = {"rotate_keys": False, "rotate_values": False, "shift_keys": False}
    return LeanKVCache(LeanKVConfig(tiers=("exact", "exact"), high_share=0.3, **coding))


def fed(model: PreTrainedModel, cache: Cache, first: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Cache:
    """The first turn as generate runs it: pads are fed with a mask of ones."""
    seen = mask[:, :150]
    with torch.no_grad():
        model(input_ids=first, attention_mask=seen, position_ids=positions(seen), past_key_values=cache)
        for step in ids.split(1, dim=1):
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
            where = positions(seen)[:, -1:]
            model(input_ids=step, attention_mask=seen, position_ids=where, past_key_values=cache)
    return cache


@pytest.mark.parametrize("make", [exact, tiers_without_loss])
@pytest.mark.parametrize(("steps", "ends"), [(20, 5), (40, 30), (70, 8), (70, 69), (130, 3), (200, 7)], ids=str)
def test_a_sequence_that_ended_early_goes_on(steps: int, ends: int, make: Callable[[], LeanKVCache]) -> None:
    """What was appended to it, pads, is stored as if it were said, packed even, and masked in the next turn."""
    first, ids, mask, said = ended_early(steps, ends)
    answers = []
    for model, cache in ((lean("llama"), make()), (native("llama"), DynamicCache())):
        fed(model, cache, first, ids[:, 150 : said - 1], mask)
        answers.append(greedy(model, cache, {"input_ids": ids, "attention_mask": mask}))
    assert_same_tokens(*answers)


@pytest.mark.parametrize("preset", ["k8v4", "balanced", "aggressive"])
def test_dropped_tokens_give_their_pages_back(preset: str) -> None:
    first, ids, mask, said = ended_early(200, 7)
    cache = LeanKVCache(LeanKVConfig.preset(preset))
    fed(lean("llama"), cache, first, ids[:, 150 : said - 1], mask)
    before = cache.compressed[0].packed.table.lengths.view(2, 2, 2).sum(-1)
    with torch.no_grad():
        lean("llama")(input_ids=ids[:, said - 1 :], attention_mask=mask, past_key_values=cache, use_cache=True)
    for tokens in cache.compressed:
        after = tokens.packed.table.lengths.view(2, 2, 2).sum(-1)
        assert preset == "aggressive" or (after[0] >= before[0]).all()
        assert (after[1] < before[1]).all()
        assert tokens.fill.lengths.tolist() == mask.sum(1).tolist()
    named = sum(
        int(t.packed.page_counts(i).sum()) * x.page_bytes
        for t in cache.compressed
        for i, x in enumerate(t.packed.layouts)
    )
    assert sum(pool.used_bytes for pool in cache.pools) == named


def test_hidden_tokens_that_cannot_be_dropped() -> None:
    """Tokens in the midst of a sequence, those that sequences share, and pads that are no longer masked."""
    model, cache = lean("llama"), exact()
    with torch.no_grad():
        model(input_ids=prompt(150), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    held = cache.report().physical_bytes
    for hidden in (slice(20, 30), slice(60, 150)):
        mask = torch.ones(2, 151, dtype=torch.long)
        mask[1, hidden] = 0
        with pytest.raises(ValueError, match="only the newest of a sequence may be hidden later"), torch.no_grad():
            model(input_ids=prompt(1, batch=2), attention_mask=mask, past_key_values=cache, use_cache=True)
        assert (cache.get_seq_length(), cache.report().physical_bytes) == (150, held)
    mask = torch.ones(2, 151, dtype=torch.long)
    mask[1, 130:150] = 0
    with torch.no_grad():
        model(input_ids=prompt(1, batch=2), attention_mask=mask, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="hides tokens of a compressed past"):
            full = torch.ones(2, 152, dtype=torch.long)
            model(input_ids=prompt(1, batch=2), attention_mask=full, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(("steps", "ends"), [(40, 30), (130, 3)], ids=str)
def test_a_turn_that_fails_after_dropping(steps: int, ends: int) -> None:
    """What the window had dropped comes back; what pages had dropped stays away, and the turn can be had again."""
    first, ids, mask, said = ended_early(steps, ends)
    cache = fed(lean("llama"), exact(), first, ids[:, 150 : said - 1], mask)
    before = cache.compressed[0].fill
    cache.config = LeanKVConfig.preset("exact", max_bytes=cache.report().physical_bytes)
    long = torch.nn.functional.pad(ids, (0, 500), value=7)
    with pytest.raises(hfkv.OutOfPages), torch.no_grad():
        seen = torch.nn.functional.pad(mask, (0, 500), value=1)
        lean("llama")(input_ids=long[:, said - 1 :], attention_mask=seen, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == said - 1
    assert (cache.compressed[0].fill is before) == (steps == 40)
    cache.config, cache.pools[0].max_bytes = LeanKVConfig.preset("exact"), None
    got = greedy(lean("llama"), cache, {"input_ids": ids, "attention_mask": mask})
    other = fed(native("llama"), DynamicCache(), first, ids[:, 150 : said - 1], mask)
    assert_same_tokens(got, greedy(native("llama"), other, {"input_ids": ids, "attention_mask": mask}))
