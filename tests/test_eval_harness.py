"""lm_eval's model `hfkv`: a local toy task through the compressed cache, offline."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from hfkv import LeanKVCache, cli

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install 'hfkv[eval]'", allow_module_level=True)

import lm_eval

from hfkv.eval import harness

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a b", "c d e"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
---
task: toy_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
---
task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos_token="Ā", pad_token="Ā")


def model() -> LlamaForCausalLM:
    return tiny_llama(head_dim=64, max_position_embeddings=2048, bos_token_id=None, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    data = tmp_path / "data.jsonl"
    texts = [" ".join(str(i * j) for i in range(60)) for j in (3, 7)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for number, text in enumerate(TASK.format(data=data).split("---")):
        (tmp_path / f"toy{number}.yaml").write_text(text)
    return tmp_path


def lm(**kwargs):
    return harness.HfkvLM(model(), tokenizer=tokenizer(), device="cpu", **kwargs)


def random_ids(count, seed=0):
    return torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def exact(context, continuation):
    """Log-likelihood and greediness by one plain forward."""
    with torch.no_grad():
        logits = model()(torch.tensor([context + continuation]), past_key_values=DynamicCache()).logits[0].float()
    said = logits[len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(continuation)
    return said.gather(1, target[:, None]).sum().item(), bool((said.argmax(-1) == target).all())


REQUESTS = [(None, random_ids(300), random_ids(5, 1)), (None, random_ids(1), random_ids(200, 2))]
REQUESTS += [(None, random_ids(300), random_ids(40, 3)), (None, random_ids(20, 4), random_ids(1, 5))]


def test_the_exact_cache_gives_plain_log_likelihoods_in_order():
    for answer, (_, context, continuation) in zip(
        lm(preset="exact")._loglikelihood_tokens(REQUESTS), REQUESTS, strict=True
    ):
        assert answer == (pytest.approx(exact(context, continuation)[0], abs=1e-2), exact(context, continuation)[1])


def test_a_greedy_continuation_is_told_as_one():
    context = random_ids(250)
    with torch.no_grad():
        out = model().generate(torch.tensor([context]), max_new_tokens=30, do_sample=False)[0, 250:].tolist()
    wrong = [*out[:-1], (out[-1] + 1) % 256]
    answers = lm(preset="exact")._loglikelihood_tokens([(None, context, out), (None, context, wrong)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_the_context_is_compressed_before_the_continuation_is_scored():
    coarse, fine = lm(method="k8v4-k2v2-5%"), lm(preset="k8v4")
    _, context, continuation = REQUESTS[0]
    plain = exact(context, continuation)[0]
    errors = [abs(one._loglikelihood_tokens(REQUESTS[:1])[0][0] - plain) for one in (coarse, fine)]
    assert errors[0] > 3 * errors[1] > 0
    assert fine.longest[0] == 299 and 0 < fine.longest[1] < 1


def test_contexts_too_long_are_cut_from_the_left():
    own = lm(preset="exact", max_length=100)
    _, context, continuation = REQUESTS[2]
    expected = exact((context + continuation)[-101:-40], continuation)
    assert own._loglikelihood_tokens([REQUESTS[2]])[0][0] == pytest.approx(expected[0], abs=1e-2)


TOYS = ["toy_choice", "toy_generate", "toy_rolling"]


@pytest.fixture
def filled(monkeypatch):
    """The caches that the model has made."""
    made = []
    new_cache = harness.HfkvLM.new_cache
    monkeypatch.setattr(harness.HfkvLM, "new_cache", lambda self: made.append(new_cache(self)) or made[-1])
    return made


def test_the_command_is_lm_eval_with_our_model(saved, tasks, filled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    options = ["--model", "hfkv", "--model_args", f"pretrained={saved},dtype=float32,preset=balanced"]
    options += ["--device", "cpu", "--tasks", ",".join(TOYS), "--include_path", str(tasks), "--batch_size", "2"]
    assert cli.main(["lm-eval", *options, "--output_path", str(tmp_path / "out")]) == 0
    assert "toy_generate" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    told = json.loads(results.read_text())
    assert set(told["results"]) == set(TOYS)
    assert told["config"]["hfkv"]["method"] == "balanced"
    assert 0.1 < told["config"]["hfkv"]["physical_share"] < 1.0
    assert all(isinstance(cache, LeanKVCache) for cache in filled)
    lengths = sorted(cache.get_seq_length() for cache in filled)
    assert len(lengths) == 4 and lengths[-1] > 150


def test_peers_run_the_same_tasks(tasks, filled):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    told = lm_eval.simple_evaluate(
        lm(method="kivi-4", batch_size=2), tasks=TOYS, task_manager=manager, bootstrap_iters=0
    )
    assert set(told["results"]) == set(TOYS)
    assert {type(cache).__name__ for cache in filled} == {"KIVICache"}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(preset="best"), "best"),
        (dict(preset="k8v4", method="exact"), "preset=k8v4 and method=exact"),
        (dict(method="magic"), "method=magic"),
        (dict(preset="k8v4", block=0), "block=0"),
    ],
)
def test_wrong_arguments_are_told(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lm(**kwargs)
