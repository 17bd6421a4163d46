"""Compaction kernels against their twin: the same flush on two copies, compared token by token and page by page."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv import Packed
from hfkv.kernels.compaction import hole_moves
from hfkv.kernels.quantize_pack import BEYOND_BYTE, BEYOND_HALF, Basis
from hfkv.kernels.triton.compaction import hole_sources, read_scores
from hfkv.kernels.triton.quantize_pack import TierPages
from hfkv.paging.device import apply_on_device, check_incoming
from hfkv.paging.opened import apply_opened
from hfkv.paging.packed import PackedLayer
from hfkv.paging.pool import PagePool
from hfkv.paging.rows import Incoming
from hfkv.paging.sealed import SealingPool
from hfkv.paging.sharing import frozen
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PRUNED, PageLayout, rotation


def packed_layer(rows, tiers, dims=(16, 16), dtype=torch.float32, tokens=32, scheme="fitted", scored=True):
    pool = (SealingPool if any(isinstance(t, Packed) for t in tiers) else PagePool)("cpu")
    layouts = [PageLayout.of(t, dims, dtype, scheme, tokens, scored) for t in tiers]
    turned = tiers[0] != "exact"  # exact numbers are equal to the last bit
    basis = Basis(*(rotation(d, 0)[0] if turned else None for d in dims), None)
    return PackedLayer(pool, layouts, rows, basis, True)


def flush(layer, counts, first, generator, weights, on_device):
    """Random new tokens, random tiers with these weights for high, low and pruned."""
    rows, most = layer.rows, max(counts, default=0)
    dims = layer.layouts[0].key.dim, layer.layouts[0].value.dim
    k, v = (torch.randn(rows, most, d, generator=generator).to(layer.layouts[0].key.dtype) for d in dims)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    fresh = Incoming(
        k, v, torch.rand(rows, most, generator=generator), first + torch.arange(most).repeat(rows, 1), valid
    )
    filled = [layer.slots(tier, ())[0] for tier in range(layer.tiers)]
    now = [torch.where(f, (HIGH, LOW)[t], EMPTY) for t, f in enumerate(filled)]
    current = torch.cat([*now, torch.where(valid, NEW, EMPTY)], 1)
    choice = torch.multinomial(torch.tensor(weights), max(current.numel(), 1), True, generator=generator)
    choice = torch.tensor([HIGH, LOW, PRUNED])[choice[: current.numel()]].view(current.shape)
    target = torch.where((current == LOW) & (choice == HIGH), LOW, choice)
    scores = [torch.rand(f.shape, generator=generator) for f in filled]
    for tier, f in enumerate(filled):
        shared = frozen(layer, tier, f.shape[1])
        if shared is not None and layer.layouts[tier].scored:
            scores[tier] = torch.where(shared, layer.slots(tier, ("score",))[1]["score"].float(), scores[tier])
    check = (lambda entering: check_incoming(layer, entering, fresh)) if on_device else None
    plan = layer.plan(target, current, scores, check=check)
    assert plan.flags == 0
    needed = {}
    for cls, (grow, _) in zip(layer.classes, plan.growth, strict=True):
        needed[cls] = needed.get(cls, 0) + grow
    for cls, copies in zip(layer.classes, plan.copies, strict=False):
        needed[cls] += copies
    layer.pool.reserve(needed)
    if on_device:
        (apply_opened if isinstance(layer.pool, SealingPool) else apply_on_device)(layer, plan, fresh)
    else:
        layer.apply(plan, layer.code_incoming(plan, fresh))


def pages_of(layer, tier):
    ids, row, index = layer.table.pages(tier, layer.page_counts(tier))
    pages = layer.pool.gather(layer.classes[tier], ids)
    layout = layer.layouts[tier]
    slot = index[:, None] * layout.tokens + torch.arange(layout.tokens)
    return pages, slot < layer.table.lengths[row, tier][:, None]


def check_same(got, want, share=2e-4):
    """Equal tables, equal metadata in free slots (none), and equal bytes of tokens but for rounding."""
    assert torch.equal(got.table.lengths, want.table.lengths)
    for tier, layout in enumerate(got.layouts):
        (pages, filled), (twin, _) = pages_of(got, tier), pages_of(want, tier)
        for name in layout.meta_names:
            assert (layout.view(pages, name)[~filled] == 0).all(), name
        differ = 0
        for name, (first, last) in layout.fields.items():
            if first == last:
                continue
            a, b = layout.view(pages, name), layout.view(twin, name)
            if name == "value":
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            differ += (a[filled] != b[filled]).sum().item()
        assert differ <= share * int(filled.sum()) * layout.token_bytes + 1


def check_pool(layer):
    """Every page is free or in one place of the table; free pages hold no metadata; the counters agree."""
    pool, every = layer.pool, []
    used = torch.zeros_like(pool._used)
    for cls in set(layer.classes):
        held = [layer.table.pages(t, layer.page_counts(t))[0] for t in range(layer.tiers) if layer.classes[t] == cls]
        page_class = pool._classes[cls]
        free = pool._free_ids(page_class)
        every = torch.cat([*held, free])
        assert every.unique().numel() == every.numel() == page_class.pages
        assert free.numel() == page_class.free == int(page_class.pointers[1] - page_class.pointers[0])
        assert (pool.gather(cls, free)[:, page_class.layout.zero_start :] == 0).all()
        for ids in held:
            used.index_add_(0, ids >> 10, torch.ones_like(ids))
    assert torch.equal(used, pool._used)


CASES = [
    (((8, 4), (4, 2)), (64, 64), torch.float32, "fitted"),
    (((8, 8), (3, 3)), (80, 96), torch.float32, "fitted"),
    (((8, 4), (4, 2)), (128, 80), torch.float32, "minmax"),
    (((4, 3), (2, 2)), (96, 128), torch.float32, "fitted"),
    (("exact", (8, 4)), (64, 80), torch.float16, "fitted"),
    (("exact", "exact"), (20, 12), torch.float32, "fitted"),
    (((8, 4), (8, 4)), (64, 64), torch.float32, "fitted"),
    (((4, 2),), (64, 64), torch.float32, "fitted"),
]


@pytest.mark.parametrize("tiers, dims, dtype, scheme", CASES, ids=str)
def test_flushes_do_what_the_twin_does(tiers, dims, dtype, scheme):
    layer = packed_layer(2, tiers, dims, dtype, 32, scheme)
    weights = [0.6, 0.0, 0.4] if len(tiers) == 1 else [0.5, 0.3, 0.2]
    first = 0
    for number, counts in enumerate(([50, 33], [0, 40])):
        twin = copy.deepcopy(layer)
        flush(twin, counts, first, torch.Generator().manual_seed(number), weights, on_device=False)
        flush(layer, counts, first, torch.Generator().manual_seed(number), weights, on_device=True)
        check_same(layer, twin, 4e-4)
        check_pool(layer)
        first += max(counts)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=2), min_size=2, max_size=3),
    st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=3, max_size=3).filter(lambda w: sum(w) > 0),
    st.integers(0, 10**6),
)
@settings(max_examples=3, deadline=None)
def test_no_page_is_lost_and_no_token_moves_twice(flushes, weights, seed):
    layer = packed_layer(2, ((8, 8), (4, 4)))
    for number, counts in enumerate(flushes):
        twin = copy.deepcopy(layer)
        for each, on_device in ((twin, False), (layer, True)):
            flush(each, counts, 100 * number, torch.Generator().manual_seed(seed + number), weights, on_device)
        check_same(layer, twin, 1e-3)
        check_pool(layer)


@given(st.integers(1, 4), st.integers(0, 90), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_hole_sources_are_the_twins_moves(rows, slots, seed):
    stay = torch.rand(rows, slots, generator=torch.Generator().manual_seed(seed)) < 0.6
    sources = hole_sources(stay)
    row, source, target = hole_moves(stay)
    want = torch.full((rows, slots), -1, dtype=torch.int32)
    want[row, target] = source.int()
    assert torch.equal(sources, want)


def test_scores_and_births_are_read_as_they_lie():
    layer = packed_layer(2, ((8, 4), (4, 2)))
    flush(layer, [50, 90], 5, torch.Generator().manual_seed(1), [0.5, 0.5, 0.0], on_device=False)
    for tier, layout in enumerate(layer.layouts):
        filled, parts = layer.slots(tier, ("score", "birth"))
        pages = TierPages(layer.table.ids, layer.pool.chunk_addresses, layout, tier)
        score, birth = read_scores(pages, layer.table.lengths, filled.shape[1])
        assert torch.equal(score, parts["score"].float())
        assert torch.equal(birth, parts["birth"].long())


def test_an_unscored_layer_is_packed_too():
    layer = packed_layer(2, ((8, 4),), scored=False)
    twin = copy.deepcopy(layer)
    for each, on_device in ((twin, False), (layer, True)):
        flush(each, [40, 40], 0, torch.Generator().manual_seed(0), [1.0, 0.0, 0.0], on_device)
        flush(each, [40, 40], 40, torch.Generator().manual_seed(1), [1.0, 0.0, 0.0], on_device)
    check_same(layer, twin)
    check_pool(layer)


def enter(layer, k, v, on_device, tier=HIGH, old=HIGH):
    """Plan that k, v [rows, n, dim] enter a tier, and what is stored in the high one becomes `old`; applied if True."""
    rows, n = k.shape[:2]
    fresh = Incoming(k, v, torch.zeros(rows, n), torch.zeros(rows, n, dtype=torch.long), torch.ones(rows, n) > 0)
    filled = [layer.slots(t, ())[0] for t in range(layer.tiers)]
    now = [torch.where(f, (HIGH, LOW)[t], EMPTY) for t, f in enumerate(filled)]
    current = torch.cat([*now, torch.full((rows, n), NEW)], 1)
    target = torch.cat([torch.where(filled[0], old, EMPTY), now[1], torch.full((rows, n), tier)], 1)
    check = (lambda entering: check_incoming(layer, entering, fresh)) if on_device else None
    return layer.plan(target, current, [f.float() for f in filled], check=check), fresh


@pytest.mark.parametrize("scheme, spread, bit", [("fitted", 1200, BEYOND_BYTE), ("minmax", 1e9, BEYOND_HALF)])
def test_a_token_that_could_not_be_demoted_is_refused(scheme, spread, bit):
    """A high tier of 8 bits, or of the model's dtype, holds vectors that no scale of the low one does."""
    tiers = ((8, 4), (4, 2)) if scheme == "fitted" else ("exact", (4, 2))
    layer = packed_layer(1, tiers, scheme=scheme)
    k, v = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(0))
    k[0, 3] *= spread
    plan, fresh = enter(layer, k, v, on_device=False)
    with pytest.raises(ValueError, match=r"one byte|fp16"):
        layer.code_incoming(plan, fresh)
    plan, _ = enter(layer, k, v, on_device=True)
    assert plan.flags & bit and int(layer.table.lengths.sum()) == 0
    k[0, 3] /= spread
    assert enter(packed_layer(1, tiers, scheme=scheme), k, v, on_device=True)[0].flags == 0


@pytest.mark.parametrize("scheme", ["fitted", "minmax"])
def test_what_demotion_cannot_hold_saturates_as_in_the_twin(scheme, monkeypatch):
    """Only the high tier's rounding can lead there; here vectors that were let in unasked, far beyond the scale."""
    monkeypatch.setattr("hfkv.paging.rows.check_codable", lambda *args: None)
    layer = packed_layer(1, ((8, 4), (4, 2)) if scheme == "fitted" else ("exact", (4, 2)), scheme=scheme)
    k, v = torch.randn(2, 1, 40, 16, generator=torch.Generator().manual_seed(0))
    k[0, 7:20] *= 1200 if scheme == "fitted" else 1e6
    plan, fresh = enter(layer, k, v, on_device=False)
    layer.pool.reserve({layer.classes[0]: 2})
    layer.apply(plan, layer.code_incoming(plan, fresh))
    twin, none = copy.deepcopy(layer), torch.zeros(1, 0, 16)
    for each, on_device in ((layer, True), (twin, False)):
        plan, fresh = enter(each, none, none, on_device, old=LOW)
        each.pool.reserve({each.classes[1]: 2})
        if on_device:
            apply_on_device(each, plan, fresh)
        else:
            each.apply(plan, each.code_incoming(plan, fresh))
    assert layer.table.lengths.tolist() == [[0, 40]]
    check_same(layer, twin, 1e-3)
