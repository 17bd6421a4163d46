"""`python -m hfkv inspect`: what the page holds against the cache, its escaping, its files, and its faults."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import softmax_attention
from tiny import TEMPLATE, byte_tokenizer, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from hfkv import LeanKVCache, LeanKVConfig, cli
from hfkv.inspection import examine, make_page
from hfkv.inspection.page import ATTENTION_LEAST, ATTENTION_STEPS
from hfkv.inspection.pieces import pieces
from hfkv.inspection.probe import Span, later_attention, received
from hfkv.report import HIGH, LOW, PRUNED, WINDOW

ROOT = Path(__file__).parent.parent
CONFIG = LeanKVConfig(window=16, flush=8, high_share=0.1, keep_share=0.6)
NASTY = (
    '</script><script>alert("x")</script> <!-- <img src=x onerror=alert(1)> ]]> &amp; &lt; @@data@@ @@style@@ \\u003c '
    "'single' \"double\" `tick` ${x}\n\ttab\r\nend \u202eabc\u202c \x01\x00 naïve 日本語 עברית 👩‍👩‍👧 \ufffd é\n"
)


def tiny_model():
    heads = dict(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    sizes = dict(hidden_size=48, intermediate_size=48, max_position_embeddings=600)
    return tiny_llama(**heads, **sizes, initializer_range=0.3)


@cache
def hybrid_model():
    """Two sliding layers between two full ones, whose logits are capped."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        attn_logit_softcapping=2.0,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="leankv").eval()


def text_ids(count: int, text: str = NASTY) -> list[int]:
    ids = byte_tokenizer()(text)["input_ids"]
    return (ids * (count // len(ids) + 1))[:count]


class Document(HTMLParser):
    """Every element of a page with its attributes, and the text in every script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def page_data_of(page: str) -> dict:
    return json.loads(Document(page).scripts[0])


def decoded(moment: dict, rows: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Tiers, scores and multiples of uniform attention [rows, tokens] out of a page, as its script reads them."""
    tokens = moment["tokens"]
    packed = torch.tensor(list(base64.b64decode(moment["tier"]))).view(rows, -1)
    tiers = (packed[..., None] >> torch.tensor([0, 2, 4, 6]) & 3).flatten(1)[:, :tokens]
    score = None
    if moment["score"] is not None:
        score = torch.tensor(struct.unpack(f"<{rows * tokens}e", base64.b64decode(moment["score"]))).view(rows, tokens)
    code = torch.tensor(list(base64.b64decode(moment["attention"]))).view(rows, tokens)
    attention = torch.where(code > 0, ATTENTION_LEAST * 2 ** ((code - 1) / ATTENTION_STEPS), 0.0)
    return tiers, score, attention


# ---- the page against the cache ----------------------------------------------------------------------------------


def test_the_page_holds_what_the_cache_says_at_both_moments():
    ids, model = text_ids(301), tiny_model()
    made = examine(model, byte_tokenizer(), ids, CONFIG, generate=50, later=20)
    data = page_data_of(make_page(made))
    assert [moment["tokens"] for moment in data["moments"]] == [301, 351]
    cache = LeanKVCache(CONFIG)
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
        for number, moment in enumerate(data["moments"]):
            for token in data["ids"][301:351] if number else []:
                model(torch.tensor([[token]]), past_key_values=cache)
            maps = [cache.token_map(layer) for layer in range(3)]
            tiers, scores, attention = decoded(moment, rows=9)
            assert torch.equal(tiers, torch.cat([found.tier[0] for found in maps]).long())
            assert torch.equal(scores.nan_to_num(-1), torch.cat([found.score[0] for found in maps]).nan_to_num(-1))
            report = cache.report()
            assert (moment["physical"], moment["exact"]) == (report.physical_bytes, report.exact_bytes)
            assert moment["bytes"] == report.bytes
            for layer, own in zip(report.layers, moment["layers"], strict=True):
                assert own["pages"] == layer.head_bytes[0].tolist()
                assert 3 * own["window"] == layer.bytes["window"]
            view = made.moments[number].layers
            exact = torch.cat([view[layer].attention for layer in range(3)]) * moment["tokens"]
            seen = exact > 2 * ATTENTION_LEAST
            torch.testing.assert_close(attention[seen], exact[seen], rtol=0.04, atol=0)
            mass = torch.tensor([own["mass"] for own in moment["layers"]])  # [layers, heads, places]
            torch.testing.assert_close(mass.sum(-1), torch.ones(3, 3))
            kept = (exact * (tiers != PRUNED)).sum(1) / moment["tokens"]
            torch.testing.assert_close(1 - mass[..., 3].flatten(), kept)
    assert {HIGH, LOW, PRUNED, WINDOW} == set(tiers.flatten().tolist())


def test_later_attention_is_what_the_models_own_eager_attention_says():
    ids, model = text_ids(160), tiny_model()
    found = later_attention(model, ids, [0, 1, 2], [Span(100, 20), Span(140, 20)])
    assert model.config._attn_implementation == "leankv"
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation("leankv")
    for layer, spans in found.items():
        for got, (held, end) in zip(spans, [(100, 120), (140, 160)], strict=True):
            mass = seen[layer][0, :, held:end, :held].unflatten(0, (3, 2)).mean((1, 2))  # [kv_heads, held]
            torch.testing.assert_close(got, mass / mass.sum(1, keepdim=True))


def test_sinks_and_softcap_take_their_part():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 30, 8, generator=generator), torch.randn(2, 30, 8, generator=generator)
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0])
    got = received(Span(20, 10), q, k, 0.5, softcap=1.5, sinks=sinks)
    for head in range(2):
        total = torch.zeros(20, dtype=torch.double)
        for i in (2 * head, 2 * head + 1):
            for t in range(20, 30):
                own = (q[i, t : t + 1] * 0.5, k[head, : t + 1], torch.zeros(t + 1, 1))
                total += softmax_attention(*own, softcap=1.5, sink=sinks[i : i + 1])[1][0, :20]
        torch.testing.assert_close(got[head].double(), total / total.sum(), rtol=1e-4, atol=1e-6)


def test_layers_that_are_not_compressed_are_named_with_their_reason():
    made = examine(hybrid_model(), byte_tokenizer(), text_ids(120), CONFIG, later=10)
    data = page_data_of(make_page(made))
    assert data["layerCount"] == 4
    assert [layer["index"] for layer in data["layers"]] == [0, 3]
    assert [index for index, _ in data["plain"]] == [1, 2]
    assert all("transformers" in reason for _, reason in data["plain"])
    assert data["moments"][0]["plainBytes"] > 0
    torch.testing.assert_close(
        torch.tensor([x["mass"] for x in data["moments"][0]["layers"]]).sum(-1), torch.ones(2, 2)
    )


@pytest.mark.parametrize(
    "config, tokens, places",
    [
        (LeanKVConfig.preset("k8v4"), 200, {HIGH, WINDOW}),
        (LeanKVConfig.preset("exact"), 200, {HIGH, WINDOW}),
        (LeanKVConfig.preset("balanced"), 30, {WINDOW}),
        (LeanKVConfig(tiers=[(8, 4)], keep_share=0.5), 200, {HIGH, WINDOW, PRUNED}),
    ],
    ids=["k8v4", "exact", "short", "one-tier-pruned"],
)
def test_settings_without_tiers_or_scores(config, tokens, places):
    made = examine(tiny_model(), byte_tokenizer(), text_ids(tokens), config, later=5)
    moment = page_data_of(make_page(made))["moments"][0]
    tiers, score, _ = decoded(moment, rows=9)
    assert set(tiers.flatten().tolist()) == places
    assert (score is not None) == (config.selects and tokens > 64)


def test_later_tokens_are_the_texts_own_where_it_goes_on():
    ids, following = text_ids(150), text_ids(40)[10:]
    data = page_data_of(make_page(examine(tiny_model(), byte_tokenizer(), ids, CONFIG, later=8, following=following)))
    assert data["ids"] == ids + following[:8]
    assert data["laterIsGiven"] and data["moments"][0]["later"] == 8


def test_a_text_that_ends_is_looked_at_where_it_ended():
    model, ids = tiny_model(), text_ids(100)
    first = examine(model, byte_tokenizer(), ids, CONFIG, generate=12, later=3)
    for stop, tokens in ((100, [100]), (105, [100, 105])):  # the token at which the text is over
        end = first.ids[stop]
        if end in first.ids[100:stop]:
            continue
        model.generation_config.eos_token_id = end
        try:
            made = examine(model, byte_tokenizer(), ids, CONFIG, generate=12, later=3)
        finally:
            model.generation_config.eos_token_id = None
        assert [moment.tokens for moment in made.moments] == tokens
        assert made.moments[-1].later == 1 and made.ids[-1] == end


def test_a_page_of_4000_tokens_in_30_layers_of_3_heads_stays_small():
    from hfkv.inspection.page import coded_attention, packed_tiers

    tiers = torch.zeros(90, 4000, dtype=torch.uint8)
    stored = packed_tiers(tiers).numel() + 2 * tiers.numel() + coded_attention(tiers.float()).numel()
    assert stored * 4 / 3 < 1.7e6  # of one moment, in base64


# ---- text --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.integers(0, 255), max_size=60))
def test_pieces_join_to_the_decoded_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text  # the latter: bytes that need not be UTF-8
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_last_of_a_characters_tokens_has_its_text():
    tokenizer = byte_tokenizer()
    assert pieces(tokenizer, tokenizer("aé日😀b")["input_ids"]) == ["a", "", "é", "", "", "日", "", "", "", "😀", "b"]
    assert pieces(tokenizer, []) == []


def test_no_text_can_leave_the_data():
    ids = byte_tokenizer()(NASTY)["input_ids"]
    page = make_page(examine(tiny_model(), byte_tokenizer(), ids, CONFIG, later=4))
    document = Document(page)
    assert [tag for tag, _ in document.elements].count("script") == len(document.scripts) == 2
    assert not {"img", "iframe", "b"} & {tag for tag, _ in document.elements}
    assert [tag for tag, _ in document.elements].count("style") == 1
    data = json.loads(document.scripts[0])
    assert "".join(data["texts"][: len(ids)]) == NASTY
    assert data["config"] == CONFIG.to_json()
    assert "<" not in document.scripts[0] and document.scripts[0].isascii()


def test_the_page_asks_for_nothing_from_elsewhere():
    page = make_page(examine(tiny_model(), byte_tokenizer(), text_ids(40, "plain words "), CONFIG, later=4))
    document = Document(page)
    links = [value for _, attrs in document.elements for name, value in attrs.items() if name in ("src", "href")]
    assert links == ["data:,", "#tokens"]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
    policy = next(attrs["content"] for _, attrs in document.elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_colours_have_contrast():
    style = (ROOT / "hfkv/inspection/page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in style.split("* {")[0].split("@media"))
    pairs = [("ink", "page"), ("quiet", "page"), ("quiet", "panel"), ("accent", "page"), ("ink", "panel")]
    pairs += [(f"on-{place}", place) for place in ("high", "low", "window", "pruned")] + [("on-pruned", "page")]
    pairs += [("low-ink", f"s{step}") for step in range(4)] + [("top-ink", f"s{step}") for step in range(4, 7)]
    assert len(light) == len(dark)
    for colours in (light, dark):
        for text, ground in pairs:
            a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---- files and the command line ----------------------------------------------------------------------------------


def test_the_wheel_holds_the_page(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hfkv", source / "hfkv", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as build, sys; build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    own = {f"hfkv/inspection/{path.name}" for path in (ROOT / "hfkv/inspection").iterdir() if path.is_file()}
    assert own <= set(zipfile.ZipFile(wheel).namelist())
    assert {Path(name).suffix for name in own} == {".py", ".html", ".css", ".js"}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return str(folder)


def test_the_command_writes_a_page(saved_model, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "new" / "page.html"
    text.write_text("Some words, and some more of them. " * 8, encoding="utf-8")
    config = '{"window": 16, "flush": 8, "high_share": 0.1, "keep_share": 0.5}'
    options = ["--model", saved_model, "--prompt-file", str(text), "--chat", "--config", config, "--generate", "20"]
    assert cli.main(["inspect", *options, "--later", "6", "--out", str(out)]) == 0
    data = page_data_of(out.read_text(encoding="utf-8"))
    assert "".join(data["texts"][: data["prompt"]]).startswith("<user>Some words")
    assert (data["setting"], data["model"]) == ("own config", Path(saved_model).name)
    assert [moment["later"] for moment in data["moments"]] == [6, 6]
    assert f"{data['moments'][1]['physical']:,} of" in capsys.readouterr().out


def test_documentation_text_needs_no_file(saved_model, tmp_path):
    out = tmp_path / "page.html"
    assert cli.main(["inspect", "--model", saved_model, "--tokens", "80", "--later", "9", "--out", str(out)]) == 0
    data = page_data_of(out.read_text(encoding="utf-8"))
    assert (data["prompt"], data["laterIsGiven"], data["setting"]) == (80, True, "balanced")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt-file", "EMPTY"], "the prompt is empty"),
        (["--prompt-file", "LATIN"], "is not UTF-8 text"),
        (["--chat"], "--prompt-file"),
        (["--tokens", "590"], "the model has 600"),
        (["--tokens", "50", "--later", "0"], "later = 0"),
        (["--tokens", "50", "--generate", "-1"], "generate = -1"),
        (["--config", '{"window": 0}'], "LeanKVConfig.window = 0"),
        (["--tokens", "200", "--config", '{"max_bytes": 1000}'], "max_bytes"),
        (["--out", "FOLDER"], "is a folder"),
        (["--model", "./nowhere"], "./nowhere"),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_ends_with_status_2_and_what_to_do(saved_model, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("")
    Path("LATIN").write_bytes(b"caf\xe9")
    Path("FOLDER").mkdir()
    assert cli.main(["inspect", "--model", saved_model, "--out", "page.html", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("page.html").exists()


def test_a_model_without_a_layer_to_compress_is_refused():
    model = hybrid_model()
    layers = model.config.layer_types
    torch.manual_seed(0)
    config = Gemma2Config(**{**model.config.to_dict(), "layer_types": ["sliding_attention"] * len(layers)})
    sliding = Gemma2ForCausalLM._from_config(config, attn_implementation="leankv").eval()
    with pytest.raises(ValueError, match=r"no layer of this model is compressed: .* fits it better"):
        examine(sliding, byte_tokenizer(), text_ids(50), CONFIG, later=4)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    try:
        examine(model, byte_tokenizer(), text_ids(40), CONFIG, later=4)
        assert model.config._attn_implementation == "sdpa"
    finally:
        model.set_attn_implementation("leankv")
