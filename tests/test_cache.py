"""The cache as a whole: bytes that add up, budgets that are kept, tokens that are where the report says."""

import copy
import gc
import weakref

import pytest
import torch
from families import VOCAB, lean, native, prompt, relative_rms
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages
from hfkv.config import PRESETS
from hfkv.policy import Candidates, Thresholds
from hfkv.quant import LOW, PRUNED
from hfkv.report import HIGH, WINDOW, tier_map
from hfkv.version import check_transformers


def random_model(dtype=torch.bfloat16, layers=4, heads=8, kv_heads=4, head_dim=64, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=72,
        intermediate_size=72,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=16_384,
        initializer_range=0.2,
        **changes,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="leankv", dtype=dtype).eval()


@torch.no_grad()
def feed(model, cache, ids, **kwargs):
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **kwargs).logits


def generate_on(model, cache, steps, seed=1):
    for token in prompt(max(steps, 1), seed=seed).split(1, dim=1)[:steps]:
        feed(model, cache, token)


def tensors_held(cache):
    """Every storage reachable from the cache, once: {address: bytes}."""
    storages, seen, waiting = {}, set(), [cache]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif type(item).__module__.startswith("hfkv"):
            waiting += getattr(item, "__dict__", {}).values()
    return storages


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tokens, steps", [(60, 0), (700, 0), (700, 70)])
def test_physical_bytes_are_all_bytes_held(name, tokens, steps):
    """The report's sum against the storages that the cache really holds; all caches share rotations and foldings."""
    cache = LeanKVCache(LeanKVConfig.preset(name))
    feed(random_model(), cache, prompt(tokens))
    generate_on(random_model(), cache, steps)
    report = cache.report()
    packed = cache.layers[0].tokens.packed
    shared = [packed.basis.key, packed.basis.value, *packed.work().folding.tensors]
    storages = {m.untyped_storage().data_ptr(): m.untyped_storage().nbytes() for m in shared if m is not None}
    held = sum(n for address, n in tensors_held(cache).items() if address not in storages)
    assert report.physical_bytes == sum(report.bytes.values())
    assert abs(held - report.physical_bytes) <= 0.005 * report.physical_bytes + 4096
    assert report.exact_bytes == 4 * 4 * (tokens + steps) * 2 * 64 * 2
    assert report.ratio == report.physical_bytes / report.exact_bytes


@pytest.mark.parametrize(
    "name, tokens, bound",
    [
        ("k8v4", 1000, 0.50),
        ("balanced", 1000, 0.365),
        ("aggressive", 1000, 0.28),
        ("balanced", 4000, 0.29),
    ],
)
def test_presets_are_as_small_as_promised(name, tokens, bound, monkeypatch):
    """At SmolLM2's shape, 9 query and 3 KV heads of 64, and 12 of its 30 layers: more share the pool's free pages.

    What attention says changes no byte: the prompt's is left out.
    """
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: torch.zeros_like(q)
    )
    cache = LeanKVCache(LeanKVConfig.preset(name))
    feed(random_model(layers=12, heads=9, kv_heads=3), cache, prompt(tokens))
    assert cache.report().ratio <= bound


@pytest.mark.parametrize("budget", [0.25, 0.35, 0.6])
@pytest.mark.parametrize("tokens, steps", [(1500, 0), (1500, 130), (400, 400)])
def test_a_budget_counts_everything(budget, tokens, steps):
    model, cache = random_model(layers=8), LeanKVCache(LeanKVConfig(budget=budget))
    feed(model, cache, prompt(tokens))
    generate_on(model, cache, steps)
    report = cache.report()
    fixed = sum(layer.bytes["window"] + layer.bytes["queries"] + layer.bytes["tables"] for layer in report.layers)
    if fixed < 0.6 * budget * report.exact_bytes:
        assert report.ratio <= budget
        assert report.ratio >= 0.75 * min(budget, 0.30)


def test_a_budget_below_the_fixed_cost_says_what_can_be_had(caplog):
    model, cache = random_model(), LeanKVCache(LeanKVConfig(budget=0.05))
    with caplog.at_level("WARNING", logger="hfkv"):
        feed(model, cache, prompt(300))
        generate_on(model, cache, 70)
    said = [r.getMessage() for r in caplog.records if "budget" in r.getMessage()]
    assert len(said) == 1
    assert "0.05" in said[0]


def test_every_logical_token_is_accounted_for():
    cache = LeanKVCache(LeanKVConfig.preset("aggressive"))
    model = random_model(torch.float32)
    feed(model, cache, prompt(500))
    generate_on(model, cache, 75)
    assert cache.get_seq_length() == 575
    for layer in cache.report().layers:
        total = sum(layer.tokens.values())
        assert (total == 575).all()
        where = tier_map(cache, layer.index)
        assert where.shape == (1, 4, 575)
        for code, name in ((HIGH, "K8V4"), (1, "K4V2"), (WINDOW, "window"), (0, "pruned")):
            assert torch.equal((where == code).sum(-1), layer.tokens[name])
        assert (where[..., -64:] == WINDOW).all()


def test_shares_hold_through_generation():
    cache, model = LeanKVCache(LeanKVConfig(high_share=0.1, keep_share=0.7)), random_model(torch.float32)
    feed(model, cache, prompt(800))
    for _ in range(4):
        generate_on(model, cache, 33)
        for layer in cache.report().layers:
            old = 4 * (cache.get_seq_length() - int(layer.tokens["window"][0, 0]))
            assert layer.tokens["K8V4"].sum() <= 0.1 * old + 1
            assert 0.66 * old <= layer.tokens["K8V4"].sum() + layer.tokens["K4V2"].sum() <= 0.7 * old + 1


def test_tiers_follow_the_attention_received():
    """Tokens chosen as high are those with the largest mean attention of the last queries, computed from scratch."""
    model, cache = random_model(torch.float32, layers=1), LeanKVCache(LeanKVConfig(high_share=0.2))
    ids = prompt(300)
    feed(model, cache, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[0]
    received = probabilities[0, :, -64:, :-64].mean(1).unflatten(0, (4, 2)).amax(1)  # [kv_heads, packed]
    want = received.flatten() >= received.flatten().topk(round(0.2 * received.numel())).values.min()
    got = tier_map(cache, 0)[0, :, :-64].flatten() == HIGH
    assert (got == want).float().mean() > 0.999


def test_a_policy_of_ones_own():
    def forget_the_first_half(c: Candidates):
        return torch.where(c.birth >= c.seen[:, None, None] // 2, LOW, PRUNED)

    cache, model = LeanKVCache(LeanKVConfig(policy=forget_the_first_half)), random_model(torch.float32)
    feed(model, cache, prompt(464))
    where = tier_map(cache, 0)
    assert (where[..., :200] == 0).all()
    assert (where[..., 200:400] == 1).all()


def test_layers_may_differ():
    config = LeanKVConfig(
        layers={1: {"tiers": [(8, 8)]}, 2: {"tiers": ["exact"], "rotate_keys": False}, 3: {"high_share": 0.5}}
    )
    cache = LeanKVCache(config)
    feed(random_model(torch.float32), cache, prompt(400))
    tiers = [layer.tiers for layer in cache.report().layers]
    assert tiers == [("K8V4", "K4V2"), ("K8V8",), ("exact",), ("K8V4", "K4V2")]
    assert cache.report().layers[3].tokens["K8V4"].sum() == round(0.5 * 4 * 336)
    generate_on(random_model(torch.float32), cache, 70)
    assert cache.get_seq_length() == 470


@pytest.mark.parametrize("window, flush", [(1, 1), (16, 64), (64, 32), (5, 8)])
def test_policies_at_odd_windows(window, flush):
    cache = LeanKVCache(LeanKVConfig.preset("aggressive", window=window, flush=flush, observe=100))
    model = random_model(torch.float32, layers=2)
    feed(model, cache, prompt(200))
    generate_on(model, cache, 100)
    for layer in cache.report().layers:
        assert (sum(layer.tokens.values()) == 300).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, bound", [("exact", 0.01), ("k8v4", 0.25)])
def test_logits_stay_near_the_exact_cache(name, bound, dtype):
    model = random_model(dtype, layers=2)
    ids, steps = prompt(260), prompt(40, seed=2).split(1, dim=1)
    logits = []
    for cache in (LeanKVCache(LeanKVConfig.preset(name)), DynamicCache()):
        feed(model, cache, ids)
        logits.append(torch.cat([feed(model, cache, s) for s in steps], 1))
    assert relative_rms(*logits) < bound


def test_thresholds_prune_while_generating():
    cache, model = LeanKVCache(LeanKVConfig(policy=Thresholds(2.0, 0.9))), random_model(torch.float32)
    feed(model, cache, prompt(300))
    before = sum(layer.tokens["pruned"].sum() for layer in cache.report().layers)
    generate_on(model, cache, 100)
    assert sum(layer.tokens["pruned"].sum() for layer in cache.report().layers) > before


def test_nan_in_a_prompt_changes_nothing():
    cache, model = LeanKVCache(), random_model(torch.float32)
    feed(model, cache, prompt(200))
    before = str(cache.report())
    broken = torch.randn(1, 150, 72)
    broken[0, 30] = float("nan")
    with pytest.raises(ValueError, match="NaN"), torch.no_grad():
        model(inputs_embeds=broken, past_key_values=cache)
    assert str(cache.report()) == before
    generate_on(model, cache, 40)


def test_a_fork_is_independent():
    model, cache = random_model(torch.float32), LeanKVCache()
    feed(model, cache, prompt(300))
    fork = copy.deepcopy(cache)
    assert not set(tensors_held(cache.layers)) & set(tensors_held(fork.layers)) - shared_rotations(cache)
    first = feed(model, fork, prompt(40, seed=5))
    generate_on(model, cache, 40)
    again = copy.deepcopy(fork)
    assert first.shape == feed(model, again, prompt(1)).shape
    assert (cache.get_seq_length(), fork.get_seq_length(), again.get_seq_length()) == (340, 340, 341)


def shared_rotations(cache):
    basis = cache.layers[0].tokens.packed.basis
    return {m.untyped_storage().data_ptr() for m in (basis.key, basis.value) if m is not None}


def test_reset_and_deletion_free_everything():
    model, cache = random_model(torch.float32), LeanKVCache(LeanKVConfig.preset("aggressive"))
    for _ in range(3):
        feed(model, cache, prompt(300))
        generate_on(model, cache, 40)
        pool = weakref.ref(cache.pools[0])
        cache.reset()
        gc.collect()
        assert pool() is None
        assert cache.get_seq_length() == 0
        assert cache.report().physical_bytes == 0


def test_a_cache_filled_in_inference_mode_goes_on_outside():
    model, cache = random_model(torch.float32), LeanKVCache()
    with torch.inference_mode():
        model(input_ids=prompt(300), past_key_values=cache)
        model(input_ids=prompt(1), past_key_values=cache)
    generate_on(model, cache, 70)
    with torch.inference_mode():
        model(input_ids=prompt(100), past_key_values=cache)
    generate_on(model, copy.deepcopy(cache), 5)
    cache.crop(-3)
    assert cache.get_seq_length() == 468


def test_a_dropped_cache_is_freed_without_the_garbage_collector():
    model, cache = random_model(torch.float32), LeanKVCache()
    feed(model, cache, prompt(300))
    generate_on(model, cache, 40)
    fork = copy.deepcopy(cache)
    pools = [weakref.ref(c.pools[0]) for c in (cache, fork)]
    gc.disable()
    try:
        del cache
        assert pools[0]() is None
        generate_on(model, fork, 40)
        del fork
        assert pools[1]() is None
    finally:
        gc.enable()


def test_max_bytes_bounds_physical_bytes():
    model = random_model(torch.float32)
    limit = 1_200_000
    cache = LeanKVCache(LeanKVConfig(max_bytes=limit))
    feed(model, cache, prompt(150))
    with pytest.raises(OutOfPages):
        generate_on(model, cache, 5000)
    assert cache.report().physical_bytes <= limit


def test_import_changes_nothing_but_the_registries():
    from transformers import AttentionInterface, AttentionMaskInterface

    assert "leankv" in AttentionInterface()
    assert "leankv" in AttentionMaskInterface()
    assert native("llama").config._attn_implementation != "leankv"
    assert lean("llama").config._attn_implementation == "leankv"
    assert hfkv.__version__


def test_the_report_reads_well():
    cache = LeanKVCache()
    assert "0 tokens" in str(cache.report())
    feed(random_model(), cache, prompt(400))
    text = str(cache.report())
    for part in ("400 tokens, 4 of 4 layers compressed", "ratio", "window", "hadamard 64", "K8V4", "K4V2", "pruned"):
        assert part in text


def test_versions_of_transformers(caplog):
    with pytest.raises(ImportError, match=r"5\.15.*4\.57\.1"):
        check_transformers("4.57.1")
    check_transformers("5.15.0")
    with caplog.at_level("WARNING", logger="hfkv"):
        check_transformers("5.23.9")
        assert not caplog.records
        check_transformers("5.99.0")
    assert "5.99.0" in caplog.records[0].getMessage()
