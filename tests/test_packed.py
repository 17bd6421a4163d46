"""Packed layers: every kept token in exactly one tier, with its own bytes, whatever a policy demands."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_pages import check_owners

from hfkv.kernels.compaction import touched_pages
from hfkv.kernels.quantize_pack import Basis
from hfkv.paging.packed import PackedLayer
from hfkv.paging.pool import PagePool
from hfkv.paging.rows import Incoming, PackedRows
from hfkv.paging.sharing import select_rows
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PRUNED, PageLayout

DIM = 16


def packed_layer(rows, tokens=32, tiers=((8, 8), (4, 4)), pool=None):
    pool = PagePool("cpu") if pool is None else pool
    layouts = [PageLayout.of(tier, (DIM, DIM), torch.float32, "fitted", tokens, True) for tier in tiers]
    return PackedLayer(pool, layouts, rows, Basis(None, None, None), False)


def incoming(counts, births):
    """Tokens whose key says which they are: feature 0 is the birth, the rest a pattern of row and birth."""
    rows, most = len(counts), max(counts, default=0)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    birth = torch.tensor([[b + i for i in range(most)] for b in births]).view(rows, most)
    pattern = torch.sin(torch.arange(DIM) * (birth[..., None] % 97 + 1.0))
    return Incoming(pattern, pattern.flip(-1), torch.rand(rows, most), birth, valid)


def slots(layer):
    return [layer.slots(tier, ("score", "birth")) for tier in range(layer.tiers)]


def step(layer, counts, births, random):
    """One flush with random tiers; returns per row {birth: tier} as the policy said it."""
    fresh = incoming(counts, births)
    stored = slots(layer)
    now = [torch.where(filled, (HIGH, LOW)[t], EMPTY) for t, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(fresh.valid, NEW, EMPTY)], 1).to(torch.int8)
    choice = torch.tensor([[random.choice((HIGH, LOW, PRUNED)) for _ in range(current.shape[1])] for _ in counts])
    choice = choice.view(current.shape)
    target = torch.where((current == LOW) & (choice == HIGH), LOW, choice)
    births_all = torch.cat([*(parts["birth"].long() for _, parts in stored), fresh.birth], 1)
    kept = (current != EMPTY) & (target != PRUNED)
    expected = [
        dict(zip(b[k].tolist(), t[k].tolist(), strict=True)) for b, t, k in zip(births_all, target, kept, strict=True)
    ]
    scores = [torch.rand(filled.shape) for filled, _ in stored]
    plan = layer.plan(target, current, scores)
    coded = layer.code_incoming(plan, fresh)
    needed = {}
    for cls, (grow, _) in zip(layer.classes, plan.growth, strict=True):
        needed[cls] = needed.get(cls, 0) + grow
    layer.pool.reserve(needed)
    layer.apply(plan, coded)
    return expected


def tiers_held(layer):
    held = [{} for _ in range(layer.rows)]
    for tier, (filled, parts) in enumerate(slots(layer)):
        for row, birth in zip(filled.nonzero()[:, 0].tolist(), parts["birth"][filled].tolist(), strict=True):
            assert birth not in held[row], "a token is in two places"
            held[row][birth] = tier
        assert (parts["birth"][~filled] == 0).all()
        assert (parts["score"][~filled] == 0).all()
    return held


def check_bytes(layer):
    """Every stored key still decodes to the pattern of its birth."""
    from hfkv.kernels.compaction import take
    from hfkv.kernels.quantize_pack import unpack_tokens

    for tier, page_layout in enumerate(layer.layouts):
        ids, row, index = layer.table.pages(tier, layer.page_counts(tier))
        pages = layer.pool.gather(layer.classes[tier], ids)
        slot = index[:, None] * page_layout.tokens + torch.arange(page_layout.tokens)
        filled = (slot < layer.table.lengths[row, tier][:, None]).flatten().nonzero().squeeze(1)
        tokens = take(page_layout, pages, filled)
        keys, values = unpack_tokens(page_layout, tokens)
        pattern = torch.sin(torch.arange(DIM) * (tokens["birth"][:, None] % 97 + 1.0))
        bound = 0.02 if tier == 0 else 0.2
        if keys.numel():
            assert (keys - pattern).abs().max() < bound
            assert (values - pattern.flip(-1)).abs().max() < bound


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 70), min_size=4, max_size=4), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
    st.sampled_from([32, 64]),
)
@settings(max_examples=400, deadline=None)
def test_every_kept_token_is_in_exactly_one_tier(rows, flushes, random, tokens):
    layer = packed_layer(rows, tokens)
    births = [0] * rows
    for counts in flushes:
        counts = counts[:rows]
        expected = step(layer, counts, births, random)
        births = [b + c for b, c in zip(births, counts, strict=True)]
        assert tiers_held(layer) == expected
        check_bytes(layer)
        for tier, page_layout in enumerate(layer.layouts):  # pages are returned at once
            pages = (layer.table.lengths[:, tier].long() + page_layout.tokens - 1) // page_layout.tokens
            page_class = layer.pool._classes[layer.classes[tier]]
            assert page_class.pages - page_class.free == int(pages.sum())
    layer.release()
    assert layer.pool.used_bytes == 0


@given(
    st.lists(st.integers(0, 90), min_size=3, max_size=3),
    st.lists(st.integers(0, 90), min_size=3, max_size=3),
    st.randoms(),
)
@settings(max_examples=150, deadline=None)
def test_restore_undoes_appending(first, second, random):
    layer = packed_layer(3)
    step(layer, first, [0, 0, 0], random)
    before, used = copy.deepcopy(tiers_held(layer)), layer.pool.used_bytes
    table = layer.table.clone()
    fresh = incoming(second, first)
    stored = slots(layer)
    now = [torch.where(filled, (HIGH, LOW)[t], EMPTY) for t, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(fresh.valid, NEW, EMPTY)], 1).to(torch.int8)
    target = torch.where(current == NEW, LOW, current)
    plan = layer.plan(target, current, [parts["score"].float() for _, parts in stored])
    layer.pool.reserve({cls: grow for cls, (grow, _) in zip(layer.classes, plan.growth, strict=True)})
    layer.apply(plan, layer.code_incoming(plan, fresh))
    layer.restore(table)
    assert tiers_held(layer) == before
    assert layer.pool.used_bytes == used
    check_bytes(layer)


@given(
    st.lists(st.integers(0, 90), min_size=3, max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.randoms(),
)
@settings(max_examples=150, deadline=None)
def test_select_shares_rows(counts, index, random):
    layer = packed_layer(3)
    step(layer, counts, [0, 100, 200], random)
    before = tiers_held(layer)
    chosen = torch.tensor(index)
    used = layer.pool.used_bytes
    select_rows(layer, chosen)
    assert tiers_held(layer) == [before[i] for i in index]
    assert layer.pool.used_bytes <= used
    check_bytes(layer)
    check_owners(layer.pool, [layer])


def compact(layer, counts, births, choose):
    """One flush; `choose` maps (birth, current tier) to tiers. Returns what each row then holds, {birth: tier}."""
    fresh = incoming(counts, births)
    stored = slots(layer)
    now = [torch.where(filled, (HIGH, LOW)[t], EMPTY) for t, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(fresh.valid, NEW, EMPTY)], 1).to(torch.int8)
    birth = torch.cat([*(parts["birth"].long() for _, parts in stored), fresh.birth], 1)
    target = choose(birth, current)
    plan = layer.plan(target, current, [parts["score"].float() for _, parts in stored])
    coded = layer.code_incoming(plan, fresh)
    layer.pool.reserve({cls: grow for cls, (grow, _) in zip(layer.classes, plan.growth, strict=True)})
    layer.apply(plan, coded)
    kept = (current != EMPTY) & (target != PRUNED)
    return [dict(zip(b[k].tolist(), t[k].tolist(), strict=True)) for b, t, k in zip(birth, target, kept, strict=True)]


def test_one_tier_grows_into_columns_that_the_other_leaves():
    """Both ends of a full row of the page table move at once."""
    layer = packed_layer(1)
    compact(layer, [200], [0], lambda birth, _: torch.where(birth < 90, HIGH, LOW))

    def thin_out(birth, now):
        return torch.where((now == LOW) & (birth % 4 > 0), PRUNED, torch.where(now == NEW, HIGH, now))

    expected = compact(layer, [90], [200], thin_out)
    assert tiers_held(layer) == expected
    check_bytes(layer)


@given(st.lists(st.integers(0, 70), min_size=6, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_layers_flushed_together_keep_their_own_tokens(counts, random):
    pool = PagePool("cpu")
    layers = [packed_layer(2, pool=pool) for _ in range(3)]
    for index, layer in enumerate(layers):
        step(layer, counts[index : index + 2], [0, 0], random)
    rows = PackedRows.stacked(layers)
    expected = step(rows, counts, [100 + i for i in range(6)], random)
    rows.hand_back(layers)
    assert [held for layer in layers for held in tiers_held(layer)] == expected
    for layer in layers:
        check_bytes(layer)
        layer.release()
    assert pool.used_bytes == 0


def test_pages_whose_tokens_stay_are_not_touched():
    stay = torch.zeros(3, 12, dtype=torch.bool)
    stay[0, :10] = True  # nothing changes
    stay[1, :10], stay[1, 1] = True, False  # a hole in page 0, filled from page 2
    stay[2, :6] = True  # new tokens behind 6: page 1 has room for two
    before, after = torch.tensor([10, 10, 6]), torch.tensor([10, 9, 12])
    assert touched_pages(stay, before, after, 4).tolist() == [
        [False, False, False],
        [True, False, True],
        [False, True, False],
    ]
