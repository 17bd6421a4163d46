"""docs/compatibility.md: every way to generate x every kind of model, ours against the caches of transformers.

    python tests/compatibility.py [FAMILY ...]    # measures with the transformers at hand, replaces its section or rows

A cell runs one mode on one tiny random model with DynamicCache, with `exact` and `k8v4`, and with QuantizedCache
(quanto, 4 bits) where optimum-quanto is installed.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from families import BY_NAME, TRANSFORMERS, build, lean, left_padded, native, prompt, relative_rms
from packaging.version import Version
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, QuantizedCache

from hfkv import LeanKVCache, LeanKVConfig

FILE = Path(__file__).parent.parent / "docs" / "compatibility.md"
NAMES = ["llama", "qwen3", "phi", "gpt2", "gemma2", "gemma3-text", "gpt-oss", "mistral-sliding", "llama4-text"]
NAMES += ["qwen3-next", "deepseek-v3", "falcon", "llava", "bart", "t5"]
NEW_TOKENS = 40
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
Run = Callable[[PreTrainedModel, Callable[[], Cache]], torch.Tensor]


def ids(model: PreTrainedModel, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, for an encoder-decoder those of the decoder."""
    if not model.config.is_encoder_decoder:
        return left_padded(lengths)
    decoder = prompt(max(lengths), batch=len(lengths))
    return {"input_ids": prompt(20, batch=len(lengths)), "decoder_input_ids": decoder}


def generated(model: PreTrainedModel, cache: Cache, lengths: list[int], **options: object) -> torch.Tensor:
    torch.manual_seed(7)
    return model.generate(**ids(model, lengths), past_key_values=cache, **(GREEDY | options))[:, max(lengths) :]


def generating(lengths: list[int], **options: object) -> Run:
    return lambda model, new: generated(model, new(), lengths, **options)


def turns(model: PreTrainedModel, new: Callable[[], Cache]) -> torch.Tensor:
    """A conversation: what was said and 60 more tokens, on the same cache."""
    cache, said, inputs = new(), [], ids(model, [150])
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    for turn in range(3):
        known = {} if name == "decoder_input_ids" else {"attention_mask": torch.ones_like(inputs[name])}
        out = model.generate(**inputs | known, past_key_values=cache, **GREEDY)
        said.append(out[:, -NEW_TOKENS:])
        inputs = {**inputs, name: torch.cat([out, prompt(60, seed=turn)], 1)}
    return torch.cat(said, 1)


def reused(model: PreTrainedModel, new: Callable[[], Cache]) -> torch.Tensor:
    cache = new()
    first = generated(model, cache, [150])
    cache.reset()
    if Version("5.20") > TRANSFORMERS:  # DynamicCache.reset kept the length: no reference, nor a cross-attention part
        own = getattr(cache, "self_attention_cache", cache)
        cache = wrapped(model, own if isinstance(own, LeanKVCache) else DynamicCache(config=model.config))
    return torch.cat([first, generated(model, cache, [150])], 1)


def forked(model: PreTrainedModel, new: Callable[[], Cache]) -> torch.Tensor:
    """One prefix, two continuations on deep copies."""
    cache, known = new(), ids(model, [150])
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    with torch.no_grad():
        model(**{k: v for k, v in known.items() if k != "attention_mask"}, past_key_values=cache)
    answers = []
    for seed in (1, 2):
        longer = {k: v for k, v in known.items() if k != "attention_mask"}
        longer[name] = torch.cat([known[name], prompt(20, seed=seed)], 1)
        answers.append(model.generate(**longer, past_key_values=copy.deepcopy(cache), **GREEDY)[:, -NEW_TOKENS:])
    return torch.cat(answers, 1)


def batched(model: PreTrainedModel, new: Callable[[], Cache]) -> torch.Tensor:
    """batch_repeat_interleave and batch_select_indices, as remote-code decoding calls them."""
    cache, known = new(), ids(model, [150, 150])
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    rest = {} if name == "input_ids" else {"input_ids": known["input_ids"]}
    with torch.no_grad():
        model(**rest, **{name: known[name]}, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 1]))
        rest = {k: v[[0, 1, 0]] for k, v in rest.items()}
        steps = prompt(NEW_TOKENS, batch=3).split(1, dim=1)
        logits = [model(**rest, **{name: s}, past_key_values=cache).logits for s in steps]
    return torch.cat(logits, 1).argmax(-1)


def assisted(model: PreTrainedModel, new: Callable[[], Cache]) -> torch.Tensor:
    return generated(model, new(), [150], assistant_model=build("mistral"))


MODES: dict[str, Run] = {
    "greedy": generating([150]),
    "padded batch": generating([3, 150]),
    "sampling": generating([150], do_sample=True, top_k=20),
    "beams": generating([3, 150], num_beams=3),
    "beam sampling": generating([150], num_beams=2, do_sample=True),
    "several answers": generating([150], do_sample=True, num_return_sequences=3),
    "prompt lookup": generating([150], prompt_lookup_num_tokens=5),
    "assisted": assisted,
    "chunked prefill": generating([150], prefill_chunk_size=64),
    "turns": turns,
    "reset, reuse": reused,
    "fork": forked,
    "repeat, select": batched,
}


def wrapped(model: PreTrainedModel, own: Cache) -> Cache:
    return EncoderDecoderCache(own, DynamicCache()) if model.config.is_encoder_decoder else own


def attempt(run: Run, model: PreTrainedModel, new: Callable[[], Cache]) -> torch.Tensor | str:
    try:
        return run(model, lambda: wrapped(model, new()))
    except Exception as error:
        return type(error).__name__


def verdict(got: torch.Tensor | str, want: torch.Tensor | str) -> str:
    """`=` for DynamicCache's tokens, `runs` for others, or the error."""
    if isinstance(got, str):
        return got
    return "=" if isinstance(want, torch.Tensor) and torch.equal(got, want) else "runs"


@torch.no_grad()
def logits(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
    """Of 40 tokens fed one by one after a prompt of 150."""
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    rest = {"input_ids": prompt(20)} if name != "input_ids" else {}
    past, tokens = wrapped(model, cache), prompt(150 + NEW_TOKENS)
    parts = [tokens[:, :150], *tokens[:, 150:].split(1, dim=1)]
    return torch.cat([model(**rest, **{name: part}, past_key_values=past).logits[:, -1] for part in parts][1:])


def closeness(name: str, quantized: bool) -> str:
    """Relative RMS error of the logits, k8v4 / QuantizedCache, with weights at gain 1."""
    plain, model = native(name, gain=1.0), build(name, gain=1.0)
    model.set_attn_implementation("leankv")
    text = plain.config.get_text_config(decoder=True)
    want = logits(plain, DynamicCache(config=text))
    errors = [relative_rms(logits(model, LeanKVCache(LeanKVConfig.preset("k8v4"))), want)]
    found = [f"{errors[0]:.1%}"]
    if quantized:
        try:
            found.append(f"{relative_rms(logits(plain, QuantizedCache('quanto', text, nbits=4)), want):.1%}")
        except Exception as error:
            found.append(type(error).__name__)
    return " / ".join(found)


def cell(name: str, mode: str, quantized: bool = False) -> dict[str, str]:
    """What DynamicCache, exact, k8v4 and QuantizedCache do: {cache: verdict}."""
    run, model, plain = MODES[mode], lean(name), native(name)
    want = attempt(run, plain, lambda: DynamicCache(config=plain.config.get_text_config(decoder=True)))
    found = {"dynamic": want if isinstance(want, str) else "="}
    for preset in ("exact", "k8v4"):
        config = LeanKVConfig.preset(preset)
        found[preset] = verdict(attempt(run, model, lambda config=config: LeanKVCache(config)), want)
    if quantized:
        text = plain.config.get_text_config(decoder=True)
        found["quantized"] = verdict(attempt(run, plain, lambda: QuantizedCache("quanto", text, nbits=4)), want)
    return found


def shown(found: dict[str, str]) -> str:
    if found["dynamic"] != "=":
        return f"— ({found['dynamic']} with DynamicCache too)" if found["exact"] == found["dynamic"] else "—"
    return " / ".join(found[key] for key in ("exact", "k8v4", "quantized") if key in found)


def section(before: str, names: list[str]) -> str:
    """The table of the transformers at hand: rows of `names` measured, the others as they were."""
    quantized = importlib.util.find_spec("optimum") is not None
    known = {line.split("|")[1].strip(): line for line in before.splitlines() if line.startswith("|")}
    lines = [f"## transformers {transformers.__version__}", "", "| | " + " | ".join(MODES) + " | logits |"]
    lines.append("|---" * (len(MODES) + 2) + "|")
    for name in NAMES:
        if Version(BY_NAME[name].needs) > TRANSFORMERS:
            continue
        if name in known and name not in names:
            lines.append(known[name])
            continue
        cells = [name, *(shown(cell(name, mode, quantized)) for mode in MODES), closeness(name, quantized)]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


HEAD = """# What works with what

Made by `python tests/compatibility.py`, checked in part by `tests/test_compatibility.py`. Every cell is a run on a tiny
model with random weights: a prompt of 150 tokens, 40 more. Its three entries are the preset `exact`, `k8v4`, and
transformers' `QuantizedCache` (quanto, 4 bits); `=` means the tokens of `DynamicCache`, `runs` other tokens without an
error, a name the error that is raised. `—` marks what DynamicCache itself cannot do there.

The last column is how far the logits of `k8v4` and of `QuantizedCache` are from DynamicCache's (relative RMS, 40 tokens
fed one by one). Random models amplify every error, so quantised caches soon say other tokens, and these figures say
little about real models; [the benchmarks](../benchmarks/README.md) measure those. Models whose layers are all kept by
transformers (sliding windows, latents, an attention of their own) show `=` and 0.0 %: nothing is compressed there, and
the report says so.

Layers on several devices (`device_map`) are no column here: no machine with two GPUs has run them. On simulated
devices, which refuse every operator that mixes two, the ways of generating of `tests/test_devices.py` say what one CPU
says, bit for bit; `tests/test_device_pools.py` holds bytes, limits, files and faults.

"""


def sections() -> dict[str, str]:
    """Version of transformers -> its section in the file."""
    parts = re.split(r"^(?=## transformers )", FILE.read_text(), flags=re.M)[1:] if FILE.exists() else []
    return {part.split()[2]: part.rstrip() + "\n" for part in parts}


def main() -> None:
    made = section(sections().get(transformers.__version__, ""), sys.argv[1:] or NAMES)
    found = sections() | {transformers.__version__: made}
    ordered = [found[version] for version in sorted(found, key=Version, reverse=True)]
    FILE.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=FILE.parent, delete=False) as file:
        file.write(HEAD + "\n".join(ordered))
    Path(file.name).chmod(0o644)
    Path(file.name).replace(FILE)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
