"""Calibration of tiny models: measurements against the real cache, targets, biases, the command line."""

from __future__ import annotations

import csv
from functools import cache

import pytest
import torch
from measured import measured_and_real
from tiny import SIZES as TINY
from tiny import byte_tokenizer, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hfkv import LeanKVCache, LeanKVConfig, cli
from hfkv.calibrate import Target, calibrate, from_files, generated, recording
from hfkv.calibrate.choose import physical_bytes
from hfkv.calibrate.coding import Coding, recoded
from hfkv.calibrate.options import SHARES, Basis, Option, all_options, best_basis, codings, config_of
from hfkv.calibrate.recording import Recording, behind, divergence, filled

CHANGES = dict(num_hidden_layers=3, head_dim=32, max_position_embeddings=2048)
SIZES = {**TINY, **CHANGES}


def tiny() -> LlamaForCausalLM:
    return tiny_llama(**CHANGES)


@cache
def biased(size: float, layer: int = 2) -> Qwen2ForCausalLM:
    """Four layers, and key biases as in Qwen2.5, heavy-tailed, in one of them."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_hidden_layers": 4})).eval()
    bias = model.model.layers[layer].self_attn.k_proj.bias
    with torch.no_grad():
        bias.copy_(size * torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)) ** 3)
    return model


def prompt(tokens: int = 300, seed: int = 0) -> tuple[list[int], list[int]]:
    ids = torch.randint(1, 256, (tokens + 24,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids[:tokens], ids[tokens:]


@cache
def record() -> Recording:
    return Recording(tiny(), prompt(), LeanKVConfig())


@cache
def calibrated(**target: float):
    return calibrate(tiny(), [prompt(), prompt(seed=1)], **target)


# ---- measurements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [Option((4, 2)), Option((4, 2), 0.1), Option((3, 4), 0.03), Option((8, 3))], ids=str)
@pytest.mark.parametrize("basis", [Basis(), Basis((False, True), (True, False), False)], ids=["default", "other"])
def test_a_measurement_is_what_the_real_cache_does(option, basis):
    measured, real = measured_and_real(tiny(), record(), option, basis)
    assert measured == pytest.approx(real, rel=0.01)
    assert real > 1e-6


def test_only_layers_that_are_compressed_are_measured():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 4, "initializer_range": 0.05, "sliding_window": 40}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()  # every other layer slides; softcap
    one = Recording(model, prompt(), LeanKVConfig())
    assert one.layers == [1, 3]
    measured, real = measured_and_real(model, one, Option((4, 2), 0.03), Basis())
    assert measured == pytest.approx(real, rel=0.02)
    assert calibrate(model, [prompt()], ratio=0.6).reached


def test_layers_before_the_recoded_one_need_not_run(monkeypatch):
    one, coding = record(), Coding("key", 3)
    short = [one.divergence({layer: [coding]}) for layer in one.layers]
    calls = []
    handle = tiny().model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    one.divergence({2: [coding]})
    handle.remove()
    assert not calls
    monkeypatch.setattr(recording, "_blocks", lambda model: [])
    assert [one.divergence({layer: [coding]}) for layer in one.layers] == pytest.approx(short, rel=1e-3)


def test_a_recording_leaves_the_model_as_it_was():
    model, (context, following) = tiny(), prompt(seed=5)
    ids = torch.tensor([context + following])
    before = model(ids).logits
    Recording(model, (context, following), LeanKVConfig()).divergence({2: [Coding("value", 2)]})
    assert torch.equal(model(ids).logits, before)
    assert all("forward" not in block.__dict__ for block in model.model.layers)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_errors_fall_with_bits_and_with_a_high_tier():
    one = record()
    for side in ("key", "value"):
        kl = [one.divergence({1: [Coding(side, bits)]}) for bits in (8, 4, 3, 2)]
        assert kl == sorted(kl)
    assert one.divergence({1: [Coding("key", 3, 0.1)]}) < one.divergence({1: [Coding("key", 3)]})
    assert one.divergence({1: [Coding("key", 0)]}) == pytest.approx(0, abs=1e-7)


def test_exact_coding_changes_nothing():
    x = torch.randn(2, 5, 32)
    assert recoded(x, Coding("key", 0), None, LeanKVConfig()) is x


def test_bytes_of_another_dtype_are_what_that_model_takes():
    config = LeanKVConfig(layers={1: {"tiers": ["exact"], "shift_keys": False}})
    context = torch.tensor([prompt()[0]])
    half = LeanKVCache(config)
    LlamaForCausalLM(tiny().config).to(torch.bfloat16)(context, past_key_values=half)
    report = filled(tiny(), prompt(), config).report()
    physical, exact = physical_bytes(report, torch.bfloat16, torch.float32)
    assert exact == half.report().exact_bytes
    assert physical == pytest.approx(half.report().physical_bytes, rel=0.1)  # chunks are of another size
    uniform = LeanKVConfig.preset("balanced")
    half = LeanKVCache(uniform)
    LlamaForCausalLM(tiny().config).to(torch.bfloat16)(context, past_key_values=half)
    physical, _ = physical_bytes(filled(tiny(), prompt(), uniform).report(), torch.bfloat16, torch.float32)
    assert physical == pytest.approx(half.report().physical_bytes, rel=0.02)


# ---- options -----------------------------------------------------------------------------------------------------


def test_every_option_is_measured_and_is_a_config():
    options = all_options()
    measured = set(codings(options, Basis()))
    for option in options:
        config = config_of(LeanKVConfig(), {0: option, 1: Option((4, 2))}, {0: Basis(), 1: Basis()}, "a note")
        again = LeanKVConfig.from_json(config.to_json())
        assert again == config
        assert again.made_for == "a note"
        layer = again.for_layer(0)
        assert layer.tiers == option.tiers
        assert layer.high_share == (option.share or None)
        assert layer.selects == bool(option.share)
        for side in ("key", "value"):
            coding = option.coding(side, Basis())
            assert not coding.bits or coding in measured


def test_what_a_base_config_chooses_gives_way():
    base = LeanKVConfig(budget=0.3, window=32, flush=16, codec="minmax")
    config = config_of(base, {0: Option((4, 3)), 1: Option((4, 2), 0.03)}, dict.fromkeys((0, 1), Basis()), None)
    assert (config.budget, config.window, config.flush, config.codec) == (None, 32, 16, "minmax")
    assert not config.for_layer(0).selects and config.for_layer(1).high_share == 0.03


def test_another_basis_is_taken_where_it_is_clearly_better():
    errors = {
        Coding("key", 4, 0.0, True, False): 1.0,
        Coding("key", 4, 0.0, True, True): 0.9,
        Coding("key", 4, 0.0, False, True): 0.95,
        Coding("key", 4, SHARES[0], True, False): 1.0,
        Coding("key", 4, SHARES[0], True, True): 0.9,
        Coding("key", 4, SHARES[0], False, True): 0.2,
        Coding("value", 2, SHARES[0], True): 0.3,
        Coding("value", 2, SHARES[0], False): 0.2,
    }
    assert best_basis(errors, SHARES[0]) == Basis((True, False), (False, True), False)


# ---- targets -----------------------------------------------------------------------------------------------------


def test_bytes_are_kept_by_the_real_cache_and_used():
    result = calibrated(ratio=0.5)
    assert result.reached
    physical = exact = 0
    for seed in (0, 1):
        report = filled(tiny(), prompt(seed=seed), result.config).report()
        physical, exact = physical + report.physical_bytes, exact + report.exact_bytes
    assert physical / exact == pytest.approx(result.taken.ratio)
    assert 0.42 < result.taken.ratio <= 0.5
    assert result.taken.kl == pytest.approx(result.taken.predicted_kl, rel=0.5, abs=1e-4)


def test_more_bytes_mean_less_error():
    tight, loose = calibrated(ratio=0.45, key_bits=(8, 4, 3)), calibrated(ratio=0.6)
    assert loose.taken.kl < tight.taken.kl


def test_it_is_better_than_the_preset_of_its_bytes():
    preset = LeanKVConfig.preset("balanced")
    parts = [filled(tiny(), prompt(seed=seed), preset) for seed in (0, 1)]
    reports = [held.report() for held in parts]
    ratio = sum(r.physical_bytes for r in reports) / sum(r.exact_bytes for r in reports)
    kls = []
    for seed, held in enumerate(parts):
        one = Recording(tiny(), prompt(seed=seed), LeanKVConfig())
        kls.append(divergence(one.reference, behind(tiny(), one.prompt, held)))
    result = calibrated(ratio=ratio)
    assert result.taken.ratio <= ratio
    assert result.taken.kl < 0.9 * sum(kls) / 2


def test_a_tolerated_kl_is_kept_with_few_bytes():
    strict, loose = calibrated(kl=0.002), calibrated(kl=0.05)
    for result in (strict, loose):
        assert result.reached
        assert result.taken.kl <= result.target.kl
    assert loose.taken.ratio < strict.taken.ratio


def test_bytes_per_token():
    wanted = calibrated(ratio=0.5).taken.bytes_per_token
    assert calibrated(bytes_per_token=wanted).taken.bytes_per_token <= wanted


def test_a_target_out_of_reach_names_the_range():
    with pytest.raises(ValueError, match=r"ratio 0\.1 is out of reach: .* reach from 0\.\d+ to 1\.\d+"):
        calibrated(ratio=0.1)


@pytest.mark.parametrize("target", [{}, {"ratio": 0.3, "kl": 0.1}])
def test_exactly_one_target(target):
    with pytest.raises(ValueError, match="exactly one of ratio, bytes_per_token and kl"):
        Target(**target)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "0.3"])
def test_a_target_is_a_positive_number(value):
    with pytest.raises(ValueError, match="a positive number"):
        Target(ratio=value)


def test_no_prompt_and_short_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate(tiny(), [], ratio=0.5)
    with pytest.raises(ValueError, match="longer than window"):
        calibrate(tiny(), [prompt(90)], ratio=0.5)


def test_a_model_that_is_not_compressed_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "attn_implementation": "sdpa"})).eval()
    with pytest.raises(ValueError, match="leankv"):
        calibrate(model, [prompt()], ratio=0.5)


def test_biased_keys_get_8_bits_where_needed():
    plain, large = (calibrate(biased(size), [prompt(900)], kl=0.1, dtype=torch.bfloat16) for size in (0.0, 12.0))
    assert plain.reached and large.reached
    bits = [[layer.option.bits("key") for layer in result.layers] for result in (plain, large)]
    assert bits[0][2] < 8 and bits[1][2] == 8
    assert bits[0][3] < 8 and bits[1][3] < 8
    at_4_bits = [min(kl for c, kl in x.errors[2].items() if (c.side, c.bits) == ("key", 4)) for x in (plain, large)]
    assert at_4_bits[1] > 20 * at_4_bits[0]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    keep = tmp_path / "kept.jsonl"
    first = calibrate(tiny(), [prompt()], ratio=0.5, keep=keep)
    lines = keep.read_text().splitlines(keepends=True)
    keep.write_text("".join(lines[:-5]) + lines[-5][:20])
    done = []
    measure = Recording.divergence
    monkeypatch.setattr(Recording, "divergence", lambda self, codings: done.append(1) or measure(self, codings))
    again = calibrate(tiny(), [prompt()], ratio=0.5, keep=keep)
    assert len(done) == 5
    assert again.config == first.config
    calibrate(tiny(), [prompt()], ratio=0.5, keep=keep)
    assert len(done) == 5
    keep.write_text("[not a measurement]\n")
    with pytest.raises(ValueError, match="does not hold measurements"):
        calibrate(tiny(), [prompt()], ratio=0.5, keep=keep)


# ---- prompts and the command line --------------------------------------------------------------------------------


def test_generated_prompts_differ_and_come_back():
    first, again = (generated(byte_tokenizer(), 300, 3) for _ in range(2))
    assert first == again
    assert len({tuple(context) for context, _ in first}) == 3
    for context, following in first:
        assert len(context) == 300
        text = "".join(map(chr, context))
        assert "".join(map(chr, following[-24:])) in text
    with pytest.raises(ValueError, match="holds"):
        generated(byte_tokenizer(), 400_000, 9)


def test_prompts_from_files(tmp_path):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("a sentence of text. " * 60)
    short.write_text("another one, shorter. " * 15)
    found = from_files(byte_tokenizer(), [long, short], tokens=400, count=3)
    assert [len(context) for context, _ in found] == [400, 290, 400]
    short.write_text("too short")
    with pytest.raises(ValueError, match="needs at least"):
        from_files(byte_tokenizer(), [short], tokens=400, count=3)
    short.write_bytes(b"\xff\xfe\x00" * 400)
    with pytest.raises(ValueError, match="UTF-8"):
        from_files(byte_tokenizer(), [short], tokens=400, count=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_command(saved, tmp_path, capsys):
    out = tmp_path / "own.json"
    arguments = ["calibrate", "--model", saved, "--tokens", "300", "--count", "1", "--out", str(out)]
    assert cli.main([*arguments, "--ratio", "0.55"]) == 0
    printed = capsys.readouterr().out
    assert "measured KL" in printed and str(out) in printed
    config = LeanKVConfig.from_json(str(out))
    assert saved in config.made_for
    with (tmp_path / "own.errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows} == {"0", "1", "2"}
    assert {row["bits"] for row in rows if row["side"] == "value"} == {"8", "4", "3", "2"}
    cache = LeanKVCache(config)
    tokens = torch.tensor([prompt()[0]])
    tiny().generate(tokens, past_key_values=cache, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert [layer.tiers for layer in cache.report().layers] == [
        tuple(f"K{k}V{v}" if (k, v) != tuple("exact") else "exact" for k, v in config.for_layer(i).tiers)
        for i in range(3)
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "exactly one of"),
        (["--ratio", "0.3", "--kl", "0.1"], "exactly one of"),
        (["--ratio", "-1"], "positive number"),
        (["--ratio", "0.5", "--count", "0"], "at least 1"),
        (["--ratio", "0.5", "--tokens", "5000"], "positions"),
        (["--ratio", "0.5", "--prompts", "missing.txt"], "missing.txt"),
        (["--ratio", "0.5", "--out", "nowhere/there.json"], "no folder"),
        (["--ratio", "0.5", "--config", '{"tiers": 3}'], "tiers"),
        (["--ratio", "0.01", "--tokens", "300", "--count", "1"], "out of reach"),
    ],
)
def test_command_errors(saved, arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", "--model", saved, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "hfkv calibrate:" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("bits", [(), (5,), (8, 16)])
def test_bits_that_keys_cannot_have(bits):
    with pytest.raises(ValueError, match=r"key_bits=.*8, 4, 3, 2"):
        calibrated(ratio=0.5, key_bits=bits)
