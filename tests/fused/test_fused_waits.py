"""Who waits for the device: nobody in a step, and in a flush the host once for all layers, where something may grow."""

import copy

import pytest
import torch
from host_reads import Watch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_pages import check_owners
from transformers import LlamaConfig, LlamaForCausalLM

import hfkv
from hfkv import LeanKVCache, LeanKVConfig
from hfkv.bench import caches
from hfkv.bench.sizes import Shape
from hfkv.paging.bounds import most_ahead
from hfkv.paging.pool import PagePool
from hfkv.tiering import Flush

TINY = dict(
    hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=64,
 initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=0,
)  # fmt: skip
IDS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :6] = 0
STEPS, FLUSH = 14, 4


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("HFKV_BACKEND", "triton")


def llama(layers=1):
    torch.manual_seed(0)
    return hfkv.enable(LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=layers)).eval())


def fresh(preset, **changes):
    return LeanKVCache(LeanKVConfig.preset(preset, window=8, flush=FLUSH, observe=4, page_tokens=32, **changes))


def generated(monkeypatch, layers, preset, mask=None, **changes):
    """(tokens, cache, of every step of one token whether a flush was due, what was read, and whether memory grew)."""
    model, cache, watch, steps = llama(layers), fresh(preset, **changes), Watch(monkeypatch), []
    original = type(model).forward

    def forward(self, *args, **kwargs):
        if not cache.layers:
            return original(self, *args, **kwargs)
        due, before = cache._must_flush(1), grown(cache)
        with watch:
            out = original(self, *args, **kwargs)
        steps.append((due, list(watch.reads), grown(cache) > before))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        ids = IDS[:1] if mask is None else IDS
        mask = torch.ones_like(ids) if mask is None else mask
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    assert cache.report().backend == "triton" and len(steps) == STEPS - 1
    return out, cache, steps


def grown(cache):
    """Memory and columns of tables: what only a flush that has asked may make more of."""
    return sum(pool.memory_bytes for pool in cache.pools) + sum(t.packed.table.nbytes for t in cache.compressed)


CASES = {
    "k8v4-padded": (1, "k8v4", PADDED, {}),
    "balanced": (2, "balanced", None, {}),
    "aggressive-padded": (1, "aggressive", PADDED, {}),
    "budget": (1, "balanced", None, dict(high_share=None, keep_share=None, budget=0.9)),
}


@pytest.mark.parametrize("layers, preset, mask, changes", CASES.values(), ids=CASES)
def test_nobody_waits_between_flushes_and_a_flush_waits_once(layers, preset, mask, changes, monkeypatch):
    out, cache, steps = generated(monkeypatch, layers, preset, mask, **changes)
    mail = [f"tolist at paging/mail.py:{line}" for line in range(100)]  # of the flush before: long there
    looks = [(due, [read for read in reads if read not in mail], grew) for due, reads, grew in steps]
    assert [reads for due, reads, _ in looks if not due and reads] == []
    flushes = [(len(reads), grew) for due, reads, grew in looks if due]
    assert len(flushes) >= 3 and max(reads for reads, _ in flushes) <= 1, looks
    assert all(reads == 1 for reads, grew in flushes if grew), "nothing grows unasked"
    if "budget" not in changes:  # its policy may make any number of tokens low
        assert sum(reads == 0 for reads, _ in flushes) >= 1, looks
    for pool in cache.pools:
        pool.catch_up()
        check_owners(pool, [tokens.packed for tokens in cache.compressed])
    if preset != "balanced" or changes:
        return
    monkeypatch.setattr(Flush, "most", None)  # the host asks always
    again, asked, _ = generated(monkeypatch, layers, preset, mask)
    assert torch.equal(out, again)
    for a, b in zip(cache.compressed, asked.compressed, strict=True):
        assert torch.equal(a.packed.table.lengths, b.packed.table.lengths)
        assert all(x >= y for x, y in zip(a.packed.widest, b.packed.widest, strict=True))
    assert [pool.used_bytes for pool in cache.pools] == [pool.used_bytes for pool in asked.pools]


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_steps_take_four_launches_and_make_their_output_and_a_counter(preset, monkeypatch):
    """Attention as the model calls it: one output per layer, and how full the windows are, once. Kept queries too."""
    shape, layers = Shape(2, 1, 32), 2
    cache, watch = fresh(preset), Watch(monkeypatch)
    caches.fill(cache, shape, layers, 1, 40, torch.zeros(0))
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(2 * FLUSH + 1):
        k, v, q = (torch.randn(1, n, 1, 32, generator=generator) for n in (1, 1, 2))
        due = cache._must_flush(1)
        with watch:
            for layer in range(layers):
                caches.attend(cache.update(k, v, layer), q)
        if not due:
            made.append((list(watch.made), watch.written, watch.launches))
    assert len(made) > 5 and max(len(new) for new, *_ in made[1:]) <= layers + 1, made
    assert all(not written and len(launches) == 4 * layers for _, written, launches in made[1:]), made


def test_what_nobody_waited_for_is_said_later(monkeypatch, tmp_path):
    """NaN that a flush has packed unasked: the next flush, or a file, says so."""
    model, cache = llama(), fresh("k8v4")
    with torch.no_grad():
        model(input_ids=IDS[:1], past_key_values=cache)
        while not (cache._must_flush(1) and cache.compressed[0].packed.ahead):
            model(input_ids=IDS[:1, :1], past_key_values=cache)
        control = copy.deepcopy(cache)
        cache.compressed[0].window.k[0, 0, 2, 5] = float("nan")
        model(input_ids=IDS[:1, :1], past_key_values=cache)
        other = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"NaN.*the flush before this one has packed them.*reset"):
            for _ in range(FLUSH):
                model(input_ids=IDS[:1, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="reset"):
            other.save(tmp_path / "spoilt")
        cache.reset()
        model(input_ids=IDS[:1], past_key_values=cache)
        control.compressed[0].packed.ahead = []  # an asked flush finds it before anything has changed
        control.compressed[0].window.k[0, 0, 2, 5] = float("nan")
        lengths = control.compressed[0].packed.table.lengths.clone()
        with pytest.raises(ValueError, match="nothing was stored"):
            model(input_ids=IDS[:1, :1], past_key_values=control)
        assert torch.equal(control.compressed[0].packed.table.lengths, lengths)


@given(
    st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 5]), st.sampled_from([(16, 4), (32, 32), (64, 32)]),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_flush_takes_more_than_was_said(layers, batch, heads, sizes, one_tier, seed):
    """Whatever enters, and however many tokens become low up to as many as enter; the worst case is reached."""
    (tokens, entering), generator = sizes, torch.Generator().manual_seed(seed)
    tiers = 1 if one_tier else 2
    before = torch.randint(0, 3 * tokens, (layers, batch, heads, tiers), generator=generator)
    ahead = most_ahead(before.view(-1, tiers), tokens, entering, layers, heads)
    pages = -(-before // tokens)

    def check(after, tight=()):
        new = -(-after // tokens)
        took = (new - pages).clamp_min(0).sum((1, 2))  # [layers, tiers]
        assert (took <= ahead[:, :tiers]).all()
        assert (new.sum(3).amax((1, 2)) <= ahead[:, -1]).all()
        for tier in tight:
            assert torch.equal(took[:, tier], ahead[:, tier])

    everything = before.clone()
    everything[..., 0] += entering
    check(everything, tight=[0])
    if one_tier:
        assert torch.equal((-(-everything // tokens))[..., 0].amax((1, 2)), ahead[:, -1])
        return
    for _ in range(5):  # so many of the entering go high, and no more than enter become low, in whatever heads
        high = torch.randint(0, entering + 1, (layers, batch, heads), generator=generator)
        low = torch.rand(layers, batch, heads, generator=generator).pow(4)
        low = (low / low.sum(2, keepdim=True) * (entering * heads)).long()
        after = torch.stack([before[..., 0] + high, before[..., 1] + low], 3)
        after[..., 0] = torch.minimum(after[..., 0], (before.sum(3) + entering - after[..., 1]).clamp_min(0))
        check(after)
    worst, left = before.clone(), torch.full((layers, batch), entering * heads)
    for _ in range(heads):  # open the page that is nearest to being full, again and again
        room = torch.where(worst[..., 1] == before[..., 1], -worst[..., 1] % tokens + 1, tokens * 9)
        cost, head = room.min(2)
        cost = torch.where(cost <= left, cost, 0)
        worst[..., 1].scatter_add_(2, head[..., None], cost[..., None])
        left -= cost
    worst[..., 0, 1] += left
    took = (-(-worst[..., 1] // tokens) - pages[..., 1]).sum((1, 2))
    assert (took <= ahead[:, 1]).all() and (ahead[:, 1] - took <= layers * batch).all()


@given(st.integers(1, 200), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_what_a_pool_has_room_for_takes_no_more_memory(first, second, other):
    from test_pool import LAYOUTS

    pool = PagePool("cpu")
    classes = [pool.class_of(layout) for layout in LAYOUTS[:2]]
    pool.reserve({classes[0]: first}, slack=0.5)
    pool.allocate(classes[0], torch.tensor([first // 2]))
    demand, size = dict(zip(classes, (second, other), strict=True)), pool.memory_bytes
    if pool.has_room(demand):
        pool.reserve(demand)
        assert pool.memory_bytes == size
    else:
        free = [pool._classes[cls].free for cls in classes]
        pool.reserve(demand)
        assert pool.memory_bytes > size or [pool._classes[cls].free for cls in classes] != free
