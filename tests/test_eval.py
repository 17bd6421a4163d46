"""The evaluation: tasks, scores, peers' bytes, replayed prompts, resuming, the command; on tiny random models."""

from __future__ import annotations

import copy
import csv
import json
import math
from itertools import islice

import pytest
import torch
from tiny import SIZES, byte_tokenizer, tiny_llama
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hfkv import LeanKVCache, LeanKVConfig, cli, reconstruct
from hfkv.demo import smollm2
from hfkv.demo.measures import equal_tokens, fill
from hfkv.eval import kivi, methods, plots, record, run, score, study, table, tasks
from hfkv.eval.eviction import H2O, SnapKV, config_of
from hfkv.eval.forks import fork
from hfkv.eval.methods import EXACT, METHODS
from hfkv.eval.rows import Rows, merge_csv
from hfkv.eval.tasks import TASKS, Making


def tiny_model() -> LlamaForCausalLM:
    return tiny_llama(head_dim=64)


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_same_every_time_and_about_as_long_as_asked(name):
    for tokens in (1500, 3000):
        made = [TASKS[name].make(Making(byte_tokenizer(), tokens, 3, index)) for index in (0, 0, 1)]
        assert made[0] == made[1] != made[2]
        assert 0.8 * tokens < len(tasks.context_ids(byte_tokenizer(), made[0])) < 1.2 * tokens


@pytest.mark.parametrize("name", [name for name in TASKS if name != "text"])
def test_what_is_expected_stands_in_the_prompt_and_cuts_into_steps(name):
    prompt = TASKS[name].make(Making(byte_tokenizer(), 2000, 5, 0))
    for question in prompt.questions:
        asked, answer = tasks.question_ids(byte_tokenizer(), question)
        assert byte_tokenizer().decode(asked) == question.asked
        assert byte_tokenizer().decode(answer.lead) == question.lead
        assert [byte_tokenizer().decode(step) for step in answer.steps] == list(question.steps)
        for step in question.steps:
            assert step.strip(" ,\n.") in prompt.text


def test_walks_follow_the_map_once_around():
    prompt = tasks.walk(Making(byte_tokenizer(), 1500, 5, 0))
    (question,) = prompt.questions
    walked = (question.lead + "".join(question.steps)).splitlines()
    assert len(set(walked)) == len(walked) == 12
    for line, after in zip(walked, walked[1:] + walked[:1], strict=True):
        assert line.split()[1] == after.split()[0]
        assert prompt.text.splitlines().count(line) == 2


def test_the_most_frequent_words_are_the_most_frequent():
    from collections import Counter

    prompt = tasks.words(Making(byte_tokenizer(), 4000, 5, 0))
    counts = Counter(prompt.text.splitlines()[1:])
    (question,) = prompt.questions
    assert [word for word, _ in counts.most_common(3)] == [step.strip(" ,") for step in question.steps]


def test_a_prompt_without_room_says_what_to_change():
    with pytest.raises(ValueError, match="--lengths 100"):
        tasks.recall(Making(byte_tokenizer(), 100, 0, 0))
    with pytest.raises(ValueError, match="--samples"):
        tasks.needle(Making(byte_tokenizer(), 400_000, 0, 50))


# ---- scores ------------------------------------------------------------------------------------------------------


def greedy(model, filled, lead, count):
    with torch.no_grad():
        out = fork(filled)
        said, given = [], lead
        for _ in range(count):
            said.append(int(model(torch.tensor([given]), past_key_values=out).logits[0, -1].argmax()))
            given = said[-1:]
    return said


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
def test_right_steps_are_what_greedy_decoding_says(count):
    model = tiny_model()
    filled = fill(model, random_ids(300), DynamicCache())
    said = greedy(model, filled, [1, 2, 3], count)
    whole = score.Asked([1, 2, 3], [[token] for token in said])
    assert score.right_steps(model, filled, whole) == 1.0
    for slip in {0, count // 2, count - 1}:
        wrong = [[token if i != slip else (token + 1) % 256] for i, token in enumerate(said)]
        assert score.right_steps(model, filled, score.Asked([1, 2, 3], wrong)) == slip / count
    assert filled.get_seq_length() == 300


@pytest.mark.parametrize("name", [EXACT, "balanced", "k4v2", "kivi-2", "snapkv-0.5", "quanto-4"])
def test_questions_asked_together_are_answered_as_one_by_one(name, monkeypatch):
    if METHODS[name].missing:
        pytest.skip(f"{METHODS[name].missing} is not installed")
    model = tiny_model()
    filled = fill(model, random_ids(400), METHODS[name].new_cache(model.config))
    asked = []
    for i, length in enumerate((3, 12, 7, 20, 2, 5)):
        lead = random_ids(length, seed=10 + i)
        said = greedy(model, fork(filled), lead, (1, 4, 20, 6, 2, 16)[i])
        said[len(said) // 2] = (said[len(said) // 2] + i % 2) % 256  # every other one slips
        asked.append(score.Asked(lead, [[token] for token in said]))
    alone = [score.right_steps(model, filled, question) for question in asked]
    assert 0 < sum(share == 1.0 for share in alone) < 6
    assert score.answers(model, filled, asked) == alone
    monkeypatch.setattr(score, "TOGETHER_BYTES", 3 * methods.physical_bytes(filled))
    assert score.answers(model, filled, asked) == alone
    assert filled.get_seq_length() == 400


def test_a_step_counts_when_all_of_it_is_right():
    model = tiny_model()
    filled = fill(model, random_ids(100), DynamicCache())
    a, b, c, d = greedy(model, filled, [7], 4)
    assert score.right_steps(model, filled, score.Asked([7], [[a, b], [c, d]])) == 1.0
    assert score.right_steps(model, filled, score.Asked([7], [[a, b], [c, (d + 1) % 256]])) == 0.5


def test_the_exact_cache_is_faithful_to_itself_and_a_coarse_one_is_not():
    model, following = tiny_model(), random_ids(40, seed=2)
    filled = fill(model, random_ids(400), DynamicCache())
    exact = score.reference(model, filled, following, 32)
    assert exact.greedy == greedy(model, filled, following[:1], 32)
    same = score.fidelity(model, filled, following, exact)
    assert (same.kl, same.top1, same.diverges, same.tokens) == (pytest.approx(0, abs=1e-6), 1.0, 32, 39)
    expected = torch.nn.functional.cross_entropy(exact.logits[:-1], torch.tensor(following[1:]))
    assert same.nll == pytest.approx(expected.item())
    coarse = fill(model, random_ids(400), LeanKVCache(LeanKVConfig(tiers=((2, 2),))))
    far = score.fidelity(model, coarse, following, exact)
    assert far.kl > 1e-3 and far.top1 < 1.0


# ---- replayed prompts --------------------------------------------------------------------------------------------

INSTALLED = [name for name, method in METHODS.items() if not method.missing]


@pytest.mark.parametrize("name", INSTALLED)
def test_a_replayed_prompt_is_a_prefilled_one(name):
    model, ids, after = tiny_model(), random_ids(500), torch.tensor([random_ids(9, seed=4)])
    method = METHODS[name]
    made = record.record(model, ids, max(method.observe, 70))
    assert made.replays and model.config._attn_implementation == "leankv"
    replayed = record.filled(model, made, method.new_cache(model.config))
    prefilled = fill(model, ids, method.new_cache(model.config))
    assert replayed.get_seq_length() == prefilled.get_seq_length() == 500
    assert methods.physical_bytes(replayed) == methods.physical_bytes(prefilled)
    with torch.no_grad():
        logits = [model(after, past_key_values=fork(filled)).logits for filled in (replayed, prefilled)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["k8v4", "balanced"])
def test_a_question_behind_a_recorded_prompt_is_one_prompt(preset):
    model, ids, config = tiny_model(), random_ids(300), LeanKVConfig.preset(preset)
    before = record.record(model, ids[:280], 64)
    made = record.follow(model, before, ids[280:])
    assert before.cache.get_seq_length() == 280 and made.ids == ids
    logits = []
    for filled in (record.filled(model, made, LeanKVCache(config)), fill(model, ids, LeanKVCache(config))):
        with torch.no_grad():
            logits.append(model(torch.tensor([[5, 6]]), past_key_values=filled).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_score_of_two_passes_gets_both_behind_a_recorded_prompt(dtype):
    model, ids, config = tiny_model(), random_ids(300), LeanKVConfig(keep_share=0.5, score="kvzip")
    twin = copy.deepcopy(model).to(dtype)
    replayed = record.filled(model, record.record(model, ids, 300), LeanKVCache(config), dtype)
    own = reconstruct(twin, torch.tensor([ids]), LeanKVCache(config))
    assert not replayed.awaits_reconstruction and model.dtype == torch.float32
    assert methods.physical_bytes(replayed) == methods.physical_bytes(own)
    with torch.no_grad():
        logits = [twin(torch.tensor([[5, 6]]), past_key_values=cache).logits for cache in (replayed, own)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_replayed_is_prefilled():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, head_dim=64, sliding_window=64)).eval()
    made = record.record(model, random_ids(200), 64)
    assert not made.replays
    cached = record.filled(model, made, LeanKVCache())
    assert cached.get_seq_length() == 200
    with pytest.raises(ValueError, match="cannot be replayed"):
        record.filled(model, made, LeanKVCache(), torch.bfloat16)


# ---- peers -------------------------------------------------------------------------------------------------------


def test_kivi_codes_keys_per_channel_and_values_per_token():
    x = torch.zeros(1, 1, 64, 64)
    x[..., 5] = 100.0  # a channel that is large throughout: free for keys, coarse for values
    x += torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rest = [i for i in range(64) if i != 5]
    error = {f.__name__: (f(x, 4, 32) - x)[..., rest].pow(2).mean().sqrt() for f in (kivi.per_channel, kivi.per_token)}
    assert error["per_channel"] < 0.2 < error["per_token"]
    assert torch.equal(kivi.per_token(torch.full((1, 1, 3, 40), 2.0), 2, 32), torch.full((1, 1, 3, 40), 2.0))


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_keeps_the_recent_part_exact_and_counts_its_bytes(bits):
    layer, dim, heads = kivi.KIVILayer(bits), 64, 2
    k, v = torch.randn(2, 1, heads, 300, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = layer.update(k, v)
    assert torch.equal(out[0], k) and torch.equal(out[1], v)  # the prompt itself is attended exactly
    assert layer.coded == {"keys": 256, "values": 172}
    assert torch.equal(layer.keys[:, :, 256:], k[:, :, 256:]) and not torch.equal(layer.keys[:, :, :256], k[:, :, :256])
    assert torch.equal(layer.values[:, :, 172:], v[:, :, 172:])
    codes = (256 + 172) * dim * bits // 8
    metadata = 4 * (256 // 32 * dim + 172 * 2)
    exact = 2 * dim * (44 + 128)
    assert layer.physical_bytes == heads * (codes + metadata + exact)
    seen = layer.keys.clone()
    layer.update(*torch.randn(2, 1, heads, 84, dim).bfloat16())
    assert layer.coded == {"keys": 384, "values": 256}
    assert torch.equal(layer.keys[:, :, :256], seen[:, :, :256])  # coded once


@pytest.mark.parametrize("policy", [SnapKV(0.4), SnapKV(0.2), H2O(0.4)], ids=repr)
def test_eviction_keeps_to_its_bytes_and_every_head_alike(policy):
    cached = fill(tiny_model(), random_ids(1500), LeanKVCache(config_of(policy)))
    report = cached.report()
    assert 0.75 * policy.share < report.ratio <= policy.share
    for layer in report.layers:
        assert len(layer.tokens["exact"].unique()) == 1 and int(layer.tokens["pruned"].min()) > 0


def test_h2o_keeps_the_newest_and_the_attended():
    model, ids = tiny_model(), random_ids(1500)
    cached = fill(model, ids, LeanKVCache(config_of(H2O(0.4))))
    from hfkv.report import PRUNED, tier_map

    tiers = tier_map(cached, 1)[0]
    kept = (tiers != PRUNED).float()
    assert kept[:, 1300:].mean() == 1.0  # half of what is kept lies directly before the window
    assert 0.1 < kept[:, :1000].mean() < 0.5


def test_forks_are_independent():
    model, ids = tiny_model(), random_ids(400)
    for name in INSTALLED:
        filled = fill(model, ids, METHODS[name].new_cache(model.config))
        with torch.no_grad():
            first = model(torch.tensor([[1, 2]]), past_key_values=fork(filled)).logits
            model(torch.tensor([random_ids(150)]), past_key_values=fork(filled))
            again = model(torch.tensor([[1, 2]]), past_key_values=fork(filled)).logits
        assert torch.equal(first, again), name
        assert filled.get_seq_length() == 400
        empty = METHODS[name].new_cache(model.config)
        fill(model, ids[:50], fork(empty))
        assert empty.get_seq_length() == 0


def test_quantized_caches_are_counted_in_the_model_s_dtype():
    names = [name for name in INSTALLED if name.startswith(("quanto", "hqq"))]
    if not names:
        pytest.skip("neither optimum-quanto nor hqq is installed")
    made = record.record(tiny_model(), random_ids(640), 64)
    exact = methods.physical_bytes(made.cache) // 2
    for name in names:
        bits = METHODS[name].name.split("-")[1]
        cached = record.filled(tiny_model(), made, METHODS[name].new_cache(tiny_model().config), torch.bfloat16)
        assert int(bits) / 16 < methods.physical_bytes(cached) / exact < int(bits) / 16 + 0.08


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_measured_again_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "kept.jsonl"
    Rows(path).add({"a": 1}, {"x": 2})
    with path.open("a") as file:
        file.write('{"key": {"a": 2}, "meas')
    kept = Rows(path)
    assert kept.get({"a": 1}) == {"x": 2} and kept.get({"a": 2}) is None
    kept.add({"a": 2}, {"x": 3})
    assert Rows(path).get({"a": 2}) == {"x": 3}
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1"):
        Rows(path)


def test_rows_of_a_table_are_replaced_by_their_key(tmp_path):
    path = tmp_path / "t.csv"
    merge_csv(path, [{"a": 1, "b": 2}, {"a": 2, "b": 3}], by=("a",))
    merge_csv(path, [{"a": 2, "b": 4}], by=("a",))
    assert path.read_text().split() == ["a,b", "1,2", "2,4"]


def evaluation(tmp_path, names=(EXACT, "balanced", "kivi-4"), task=("needle", "recall-aware", "text"), **changes):
    fields = dict(
        model=tiny_model(),
        tokenizer=byte_tokenizer(),
        name="tiny",
        tasks=list(task),
        methods=[METHODS[name] for name in names],
        lengths=[900],
        samples=2,
        seed=1,
        out=tmp_path,
        budget=None,
        kept=Rows(tmp_path / run.KEPT),
    )
    return run.Eval(**{**fields, **changes})


def test_a_run_writes_rows_prompts_and_plots_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    run.run(evaluation(tmp_path))
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == table.COLUMNS
    assert len(rows) == 9 and {row["samples"] for row in rows} == {"2"}
    exact = {row["task"]: row for row in rows if row["method"] == EXACT}
    assert {row["share"] for row in exact.values()} == {"1"}
    assert float(exact["text"]["kl"]) == pytest.approx(0, abs=1e-5) and exact["text"]["top1"] == "1"
    assert exact["recall-aware"]["asked"] == "before" and exact["needle"]["asked"] == "after"
    assert all(float(row["share"]) < 0.6 for row in rows if row["method"] != EXACT)
    prompts = [json.loads(line) for line in (tmp_path / "accuracy_prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 6 and len(prompts[0]["questions"]) == 1
    if plots.available():
        assert (tmp_path / "accuracy_text.png").stat().st_size > 5000
        assert "<svg" in (tmp_path / "accuracy_text.svg").read_text()
    assert "At no more bytes" in capsys.readouterr().out
    monkeypatch.setattr(study, "record", None)  # whatever would be measured again fails
    before = (tmp_path / "accuracy.csv").read_bytes(), (tmp_path / "accuracy_prompts.jsonl").read_bytes()
    run.run(evaluation(tmp_path))
    assert before == ((tmp_path / "accuracy.csv").read_bytes(), (tmp_path / "accuracy_prompts.jsonl").read_bytes())


@pytest.mark.parametrize("lengths", [(1000,), (1000, 4000)])
def test_less_divergence_is_drawn_higher_in_every_panel(lengths, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **options: drawn.append(self))
    rows = [
        {"model": "m", "task": "text", "tokens": tokens, "method": name, "family": METHODS[name].family, "kl": kl}
        | {"share": share, "samples": 1, "steps": 95}
        for tokens in lengths
        for name, share, kl in ((EXACT, 1.0, 0.0), ("k8v4", 0.5, 0.001), ("k4v2", 0.3, 0.1))
    ]
    plots.draw(rows, "text", tmp_path, "stem")
    assert len(drawn[0].axes) == len(lengths)
    for panel in drawn[0].axes:
        low, high = (panel.transData.transform((0.5, kl))[1] for kl in (0.1, 0.001))
        assert low < high


def test_a_run_that_stops_goes_on(tmp_path, capsys):
    run.run(evaluation(tmp_path, budget=-1.0))
    out = capsys.readouterr().out
    assert "Nothing is finished yet" in out and "goes on from here" in out
    run.run(evaluation(tmp_path, samples=1))
    first = (tmp_path / "accuracy.jsonl").read_text()
    run.run(evaluation(tmp_path))
    both = (tmp_path / "accuracy.jsonl").read_text()
    assert both.startswith(first) and len(both.splitlines()) == 2 * len(first.splitlines()) == 18
    assert table_of(tmp_path)[0]["samples"] == "2"


def broken(error):
    def raises(_):
        raise error

    return methods.Method("broken", "KIVI", raises)


def test_a_method_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    made = evaluation(tmp_path, task=("needle",), samples=1)
    made.methods.insert(1, broken(RuntimeError("no kernel\nfor this")))
    assert run.run(made) == 1
    assert "failed: broken, needle, 900 tokens, prompt 1: RuntimeError: no kernel" in capsys.readouterr().out
    assert [row["method"] for row in table_of(tmp_path)] == [EXACT, "balanced", "kivi-4"]


def test_an_interrupted_run_shows_what_it_has(tmp_path, capsys):
    made = evaluation(tmp_path, task=("needle",), samples=1)
    made.methods.append(broken(KeyboardInterrupt()))
    assert run.run(made) == 0
    assert "Interrupted; the same command goes on from here." in capsys.readouterr().out
    assert len(table_of(tmp_path)) == 3


def test_half_measured_prompts_count_for_those_that_finished_them(tmp_path):
    run.run(evaluation(tmp_path, task=("needle",)))
    lines = (tmp_path / "accuracy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "accuracy.jsonl").write_text("".join(lines[:-1]))
    run.run(evaluation(tmp_path, task=("needle",), budget=-1.0))
    assert {row["method"]: row["samples"] for row in table_of(tmp_path)} == {EXACT: "2", "balanced": "2", "kivi-4": "1"}


def test_a_method_measured_on_few_prompts_does_not_cost_the_others_theirs(tmp_path):
    run.run(evaluation(tmp_path, names=(EXACT, "k4v2"), task=("needle",), samples=3))
    run.run(evaluation(tmp_path, task=("needle",), samples=1))
    run.run(evaluation(tmp_path, names=(EXACT, "k4v2", "kivi-4"), task=("needle",), samples=3, budget=-1.0))
    assert {row["method"]: row["samples"] for row in table_of(tmp_path)} == {EXACT: "3", "k4v2": "3", "kivi-4": "1"}


def table_of(path):
    with (path / "accuracy.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- rows and verdicts -------------------------------------------------------------------------------------------


def test_steps_count_as_far_as_the_exact_cache_gets():
    exact = [{"right": [4, 0], "steps": [4, 4]}]
    row = table._scores([{"right": [2, 3], "steps": [4, 4]}], exact)
    assert row["score"] == 0.5 and row["exact_score"] == 0.5 and row["score_all"] == 5 / 8
    assert (row["counted"], row["steps"], row["questions"]) == (4, 8, 2)
    assert math.isnan(table._scores([{"right": [0], "steps": [4]}], [{"right": [0], "steps": [4]}])["score"])


def point(method, family, share, value, task="needle"):
    fields = {"kl": value} if task == "text" else {"score": value}
    place = {"task": task, "tokens": 1000, "samples": 2}
    return {**place, "method": method, "family": family, "share": share, **fields}


def test_a_frontier_leaves_out_what_fewer_bytes_reach():
    rows = [
        point(str(i), "KIVI", share, value) for i, (share, value) in enumerate([(0.4, 0.9), (0.3, 0.9), (0.2, 0.5)])
    ]
    assert [row["share"] for row in table.frontier([*rows, point("x", "KIVI", 0.25, 0.4)])] == [0.2, 0.3]
    text = [point("a", "KIVI", 0.4, 0.01, "text"), point("b", "KIVI", 0.3, 0.2, "text")]
    assert len(table.frontier(text)) == 2


def test_verdicts_compare_at_no_more_bytes():
    ours = [point("a", methods.KEPT, 0.3, 0.9), point("b", methods.PRUNED, 0.2, 0.5)]
    peers = [point("p", "KIVI", 0.35, 0.9), point("q", "KIVI", 0.25, 0.6), point("r", "H2O", 0.15, 0.1)]
    outside = [point("s", "KIVI", 0.6, 1.0), point("t", "H2O", 0.05, 1.0)]
    found = table.verdicts([*ours, *peers, *outside])
    assert [verdict.reached for verdict in found] == [True, False, False]
    text = table.show_verdicts(found)
    assert "1 of 3" in text and "q 60.0% at 0.250; b 50.0% at 0.200" in text and "none of ours is that small" in text
    peers[0]["samples"] = 1  # others' prompts say nothing about it
    assert [verdict.reached for verdict in table.verdicts([*ours, *peers])] == [False, False, False]
    lower = [point("a", methods.KEPT, 0.3, 0.01, "text"), point("p", "KIVI", 0.3, 0.02, "text")]
    assert [verdict.reached for verdict in table.verdicts(lower)] == [True]


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--samples", "0"], "--samples 0"),
        (["--lengths", "0", "1000"], "--lengths 0"),
        (["--lengths", "999999"], "--lengths 999999"),
        (["--tasks", "needle", "--lengths", "800", "--samples", "99999"], "--samples"),
        (["--tasks", "copy", "--lengths", "200"], "--lengths 200"),
        (["--config", "{"], "not JSON"),
        (["--config", '{"tiers": [[9, 9]]}'], "tiers"),
        (["--config", "no-such-file.json"], "no-such-file.json"),
        (["--model", "./no-such-model"], "no-such-model"),
    ],
)
def test_mistakes_are_one_message_and_status_2(options, message, capsys, monkeypatch, tmp_path):
    if options[0] != "--model":
        monkeypatch.setattr(smollm2, "load", lambda *_, **__: (tiny_model(), byte_tokenizer()))
    assert cli.main(["eval", "--out", str(tmp_path), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hfkv eval: ") and message in err and "Traceback" not in err


def test_a_file_of_results_that_cannot_be_read_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "load", lambda *_, **__: (tiny_model(), byte_tokenizer()))
    (tmp_path / run.KEPT).write_text("not json\n")
    options = ["--tasks", "needle", "--lengths", "700", "--samples", "1", "--methods", "k4v2", "--out", str(tmp_path)]
    assert cli.main(["eval", *options]) == 2
    assert "line 1" in capsys.readouterr().err
    assert cli.main(["eval", *options, "--fresh"]) == 0


def test_missing_packages_are_named_and_left_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "load", lambda *_, **__: (tiny_model(), byte_tokenizer()))
    monkeypatch.setitem(METHODS, "hqq-4", methods.Method("hqq-4", "KIVI", lambda _: None, "no_such_package"))
    made = ["--methods", "hqq-4", "k4v2", "--tasks", "needle", "--lengths", "700", "--samples", "1"]
    own = ["--config", '{"tiers": [[4, 4]]}', "--out", str(tmp_path)]
    assert cli.main(["eval", *made, *own]) == 0
    out = capsys.readouterr().out
    assert "hqq-4 is left out: no_such_package is not installed" in out
    assert [row["method"] for row in table_of(tmp_path)] == [EXACT, "k4v2", "config 1"]


def test_quick_is_a_run_of_its_own(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "load", lambda *_, **__: (tiny_model(), byte_tokenizer()))
    assert cli.main(["eval", "--quick", "--samples", "1", "--lengths", "700", "--out", str(tmp_path)]) == 0
    rows = table_of(tmp_path)
    assert {row["task"] for row in rows} == set(run.QUICK_TASKS)
    assert {row["method"] for row in rows} == {name for name in run.QUICK_METHODS if not METHODS[name].missing}


def test_own_configs_are_kept_apart():
    one, two = methods.own_methods(['{"tiers": [[4, 4]]}', '{"tiers": [[4, 2]]}'])
    assert (one.name, two.name) == ("config 1", "config 2") and one.setting != two.setting
    assert next(iter(islice(methods.own_methods(['{"tiers": [[4, 4]]}']), 1))).setting == one.setting


def test_equal_tokens_is_what_blocks_are_cut_by():
    assert equal_tokens([1, 2, 3], [1, 2, 4]) == 2
