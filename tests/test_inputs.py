"""What goes in: ragged batches, rows of pads alone, rows that end early, images, speech; equal to DynamicCache."""

from __future__ import annotations

import torch
import transformers
from families import VOCAB, build, lean, left_padded, native, prompt
from transformers import Cache, DynamicCache, PreTrainedModel

import hfkv
from hfkv import LeanKVCache, LeanKVConfig

OPTIONS = {"max_new_tokens": 70, "do_sample": False}


def exact() -> LeanKVCache:
    return LeanKVCache(LeanKVConfig.preset("exact"))


def both(name: str, inputs: dict[str, torch.Tensor], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    runs = ((lean(name), exact()), (native(name), DynamicCache(config=native(name).config)))
    got, want = (model.generate(**inputs, past_key_values=cache, **(OPTIONS | options)) for model, cache in runs)
    return got, want


def test_many_lengths_in_one_batch() -> None:
    got, want = both("llama", left_padded([1, 2, 31, 64, 65, 97, 300, 600, 5, 1]))
    assert torch.equal(got, want)


def test_a_row_of_pads_alone_does_not_disturb_the_others() -> None:
    """transformers gives such a row an arbitrary answer; ours need not be the same, but must be finite."""
    inputs = left_padded([3, 150, 64])
    inputs["input_ids"][0], inputs["attention_mask"][0] = 0, 0
    for preset in ("exact", "balanced"):
        cache = LeanKVCache(LeanKVConfig.preset(preset))
        out = lean("llama").generate(
            **inputs, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **OPTIONS
        )
        assert all(bool(torch.isfinite(logits).all()) for logits in out.logits)
        if preset == "exact":
            want = native("llama").generate(**inputs, **OPTIONS)
            assert torch.equal(out.sequences[1:], want[1:])


def test_rows_that_end_early() -> None:
    """They go on as pads; the others are not disturbed."""
    inputs = left_padded([3, 150, 64, 20])
    free = native("llama").generate(**inputs, **OPTIONS)
    ends = [free[0, 150 + 5].item(), free[2, 150 + 40].item()]
    got, want = both("llama", inputs, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(got, want)
    assert (want[:, -1] == 0).any()


def test_images_in_the_prompt() -> None:
    """LLaVA: four image tokens take the place of a picture, the vision tower runs under leankv as well."""
    torch.manual_seed(0)
    ids = prompt(120, batch=2)
    ids[:, 10:14] = VOCAB - 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 28, 28)}
    got, want = both("llava", inputs)
    assert torch.equal(got, want)
    inputs["pixel_values"] = torch.randn(2, 3, 28, 28)
    assert not torch.equal(both("llava", inputs)[1], want)  # the picture matters


def whisper() -> PreTrainedModel:
    torch.manual_seed(3)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=448,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        init_std=0.4,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None, decoder_start_token_id=3, suppress_tokens=None)
    return model


def test_speech() -> None:
    """Whisper's self-attention is compressed, its cross-attention stays exact."""
    torch.manual_seed(1)
    features = torch.randn(2, 16, 100)
    options = {"input_features": features, "max_new_tokens": 150, "do_sample": False}
    model = whisper()
    want = model.generate(**options)
    hfkv.enable(model, LeanKVConfig.preset("exact"))
    made: list[Cache] = []
    hook = model.model.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: made.append(kwargs["past_key_values"]), with_kwargs=True
    )
    got = model.generate(**options)
    hook.remove()
    assert torch.equal(got, want)
    assert want.shape[1] > 100
    own = made[-1].self_attention_cache
    assert isinstance(own, LeanKVCache)
    assert all(layer.compressed for layer in own.report().layers)


def test_enabled_pipeline_chat(tmp_path: object) -> None:
    """A chat through an untouched pipeline, its model enabled, gives the answers of the plain model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w4"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}w10"
    texts = [" ".join(f"w{i}" for i in prompt(length).flatten().tolist()) for length in (100, 30)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    answers = []
    for model in (hfkv.enable(build("llama"), LeanKVConfig.preset("exact")), build("llama")):
        chat = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
        answers.append(chat(chats, **OPTIONS))
    assert answers[0] == answers[1]


def test_generation_config_round_trip(tmp_path: object) -> None:
    """Saving an enabled model saves a plain one; loading and enabling it gives the same tokens."""
    model = hfkv.enable(build("llama"), LeanKVConfig.preset("exact"))
    model.generation_config.max_new_tokens = 33
    want = model.generate(prompt(100), do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation != "leankv"
    assert loaded.generation_config.max_new_tokens == 33
    assert want.shape == (1, 133)
    assert torch.equal(loaded.generate(prompt(100), do_sample=False), want)
    assert torch.equal(hfkv.enable(loaded, LeanKVConfig.preset("exact")).generate(prompt(100), do_sample=False), want)
