"""Rows that share pages: owners, copies before a change, and the same contents as rows that copy."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_pages import check_owners, contents, copy_rows
from test_packed import check_bytes, incoming, packed_layer, slots, tiers_held

from hfkv import OutOfPages
from hfkv.kernels.quantize_pack import Basis
from hfkv.paging.owners import Owners
from hfkv.paging.packed import PackedLayer
from hfkv.paging.pool import PagePool
from hfkv.paging.sharing import frozen, pages_once, select_rows, share_pages
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PRUNED, Codec, PageLayout


def one_tier(rows, tier, pool, tokens=32, dim=16):
    codecs = (Codec.of(tier, side, dim, torch.float32, "fitted") for side in ("key", "value"))
    return PackedLayer(pool, [PageLayout(*codecs, tokens, True)], rows, Basis(None, None, None), False)


def flush(layer, counts, births, random=None):
    """Append tokens; with `random` tiers are chosen anew. Returns per row {birth: tier} as it should be."""
    fresh, stored = incoming(counts, births), slots(layer)
    now = [torch.where(filled, (HIGH, LOW)[t], EMPTY) for t, (filled, _) in enumerate(stored)]
    current = torch.cat([*now, torch.where(fresh.valid, NEW, EMPTY)], 1).to(torch.int8)
    target = torch.where(current == NEW, HIGH, current)
    scores = [parts["score"].float() for _, parts in stored]
    if random is not None:
        choice = torch.tensor([[random.choice((HIGH, LOW, PRUNED)) for _ in range(current.shape[1])] for _ in counts])
        target = torch.where((current == LOW) & (choice.view(current.shape) == HIGH), LOW, choice.view(current.shape))
    keeps = [frozen(layer, tier, filled.shape[1]) for tier, (filled, _) in enumerate(stored)]
    plan = layer.plan(target, current, scores)
    coded, needed = layer.code_incoming(plan, fresh), {}
    for cls, (grow, _) in zip(layer.classes, plan.growth, strict=True):
        needed[cls] = needed.get(cls, 0) + grow
    for cls, copies in zip(layer.classes, plan.copies, strict=False):
        needed[cls] += copies
    before = dict.fromkeys(needed, 0) | {cls: layer.pool._classes[cls].free for cls in needed}
    layer.pool.reserve(needed)
    if all(before[cls] >= count for cls, count in needed.items()):
        assert {cls: layer.pool._classes[cls].free for cls in needed} == before
    layer.apply(plan, coded)
    shared = torch.cat([torch.zeros_like(f) if k is None else k for k, (f, _) in zip(keeps, stored, strict=True)], 1)
    shared = torch.nn.functional.pad(shared, (0, fresh.valid.shape[1]))
    target = torch.where(shared, current, target)
    birth = torch.cat([*(parts["birth"].long() for _, parts in stored), fresh.birth], 1)
    kept = (current != EMPTY) & (target != PRUNED)
    return [dict(zip(b[k].tolist(), t[k].tolist(), strict=True)) for b, t, k in zip(birth, target, kept, strict=True)]


COUNTS = st.lists(st.integers(0, 70), min_size=6, max_size=6)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), COUNTS),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=6, max_size=6)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=6)),
        st.tuples(st.just("repeat"), st.integers(2, 3)),
        st.tuples(st.sampled_from(["copy", "reset", "undo", "trim"]), COUNTS),
    ),
    min_size=1,
    max_size=12,
)


def index_of(name, value, rows):
    if name == "repeat":
        return torch.arange(rows).repeat_interleave(value)[:6]
    chosen = torch.tensor(value) % rows
    return chosen[:rows] if name == "reorder" else chosen


@given(OPERATIONS, st.integers(1, 3), st.sampled_from(["exact", (8, 4)]))
@settings(max_examples=150, deadline=None)
def test_rows_hold_what_copies_would(operations, rows, tier):
    pools, births = [PagePool("cpu"), PagePool("cpu")], [0] * rows
    pair = [[one_tier(rows, tier, pool) for _ in range(2)] for pool in pools]  # two layers that share, two that copy
    for name, value in operations:
        rows = pair[0][0].rows
        if name in ("append", "undo"):
            tables = [layer.table.clone() for layer in pair[0]]
            torch.manual_seed(len(births))
            state = torch.get_rng_state()
            for layers in pair if name == "append" else pair[:1]:
                torch.set_rng_state(state)
                for layer in layers:
                    flush(layer, value[:rows], births)
            if name == "append":
                births = [b + c for b, c in zip(births, value, strict=False)]
            else:
                for layer, table in zip(pair[0], tables, strict=True):
                    layer.restore(table)
        elif name == "copy":
            pair[0] = copy.deepcopy(pair[0])
        elif name == "reset":
            for layers in pair:
                for layer in layers:
                    layer.release()
            births = [0] * rows
        elif name == "trim":
            pair[0][0].pool.trim()
        else:
            index = index_of(name, value, rows)
            share_pages(pair[0], index)
            for layer in pair[1]:
                copy_rows(layer, index)
            births = [births[i] for i in index.tolist()]
        check_owners(pair[0][0].pool, pair[0])
        for shared, own in zip(*pair, strict=True):
            assert torch.equal(shared.table.lengths, own.table.lengths)
            assert contents(shared) == contents(own)
        assert pair[0][0].pool.used_bytes <= pair[1][0].pool.used_bytes
    for layer in pair[0]:
        layer.release()
    assert pair[0][0].pool.used_bytes == 0


@given(
    OPERATIONS, st.integers(1, 3), st.randoms(use_true_random=False), st.sampled_from([((8, 8), (4, 4)), ((8, 8),) * 2])
)
@settings(max_examples=150, deadline=None)
def test_every_kept_token_of_a_fork_is_in_exactly_one_tier(operations, rows, random, tiers):
    layer, births = packed_layer(rows, tiers=tiers), [0] * rows
    for name, value in operations:
        rows = layer.rows
        if name == "append":
            expected = flush(layer, value[:rows], births, random)
            births = [b + c for b, c in zip(births, value, strict=False)]
        elif name == "undo":
            expected, table = tiers_held(layer), layer.table.clone()
            flush(layer, value[:rows], births)
            layer.restore(table)
        elif name == "copy":
            expected, layer = tiers_held(layer), copy.deepcopy(layer)
        elif name == "reset":
            layer.release()
            expected, births = [{} for _ in range(rows)], [0] * rows
        elif name == "trim":
            layer.pool.trim()
        else:
            index = index_of(name, value, rows)
            before = tiers_held(layer)
            select_rows(layer, index)
            expected, births = [before[i] for i in index.tolist()], [births[i] for i in index.tolist()]
        if name != "trim":
            assert tiers_held(layer) == expected
        check_owners(layer.pool, [layer])
        if tiers[1] == (4, 4):
            check_bytes(layer)
    layer.release()
    assert layer.pool.used_bytes == 0
    assert layer.pool.owners is None or int(layer.pool.owners.extra.sum()) == 0


def test_a_reorder_copies_no_page_and_a_flush_one_per_beam_but_one():
    layer = one_tier(1, (8, 4), PagePool("cpu"))
    flush(layer, [300], [0])
    used = layer.pool.used_bytes
    select_rows(layer, torch.zeros(4, dtype=torch.long))
    select_rows(layer, torch.tensor([1, 1, 0, 2]))
    assert (layer.pool.used_bytes, layer.pool.copied_bytes) == (used, 0)
    flush(layer, [3] * 4, [300] * 4)  # 300 = 9 pages and 12 tokens
    page = layer.layouts[0].page_bytes
    assert (layer.pool.used_bytes, layer.pool.copied_bytes) == (used + 3 * page, 3 * page)
    flush(layer, [3] * 4, [303] * 4)  # the last pages are each row's own by now
    assert layer.pool.copied_bytes == 3 * page


def test_a_page_that_nobody_else_owns_any_more_is_not_copied():
    layer = one_tier(2, (8, 4), PagePool("cpu"))
    flush(layer, [40, 0], [0, 0])
    select_rows(layer, torch.tensor([0, 0]))
    flush(layer, [1, 0], [40, 40])  # row 1 stays as it is: row 0 takes a copy
    page = layer.layouts[0].page_bytes
    assert layer.pool.copied_bytes == page
    flush(layer, [0, 1], [41, 40])  # the page is row 1's alone
    assert layer.pool.copied_bytes == page
    assert [sorted(held) for held in tiers_held(layer)] == [list(range(41))] * 2
    check_owners(layer.pool, [layer])


def test_where_nothing_is_shared_owners_are_not_kept():
    layer = one_tier(2, (8, 4), PagePool("cpu"))
    flush(layer, [40, 90], [0, 0])
    assert layer.pool.owners is None
    size = layer.pool.table_bytes
    select_rows(layer, torch.tensor([1, 1]))
    assert layer.pool.owners is not None
    assert layer.pool.table_bytes == size + layer.pool.owners.nbytes
    select_rows(layer, torch.tensor([1]))
    flush(layer, [1], [90])
    assert layer.pool.owners is None
    assert layer.pool.table_bytes == size


def test_copies_are_reserved_with_the_flush():
    """Room for the new tokens alone is not enough; nothing has changed then."""
    layer = one_tier(1, (8, 4), PagePool("cpu"))
    flush(layer, [40], [0])
    select_rows(layer, torch.zeros(200, dtype=torch.long))
    fresh, stored = incoming([1] * 200, [40] * 200), slots(layer)
    filled = stored[0][0]
    current = torch.cat([torch.where(filled, HIGH, EMPTY), torch.full((200, 1), NEW)], 1)
    target = torch.where(current == EMPTY, EMPTY, HIGH)
    before, used, owners = contents(layer), layer.pool.used_bytes, layer.pool.owners.extra.clone()
    plan = layer.plan(target, current, [stored[0][1]["score"].float()])
    assert plan.growth == [[0, 0]]
    assert plan.copies == [199]
    layer.pool.max_bytes = layer.pool.physical_bytes
    with pytest.raises(OutOfPages):
        layer.pool.reserve({layer.classes[0]: plan.copies[0]})
    assert (contents(layer), layer.pool.used_bytes) == (before, used)
    assert torch.equal(layer.pool.owners.extra, owners)
    layer.pool.max_bytes = None
    layer.pool.reserve({layer.classes[0]: plan.copies[0]})
    layer.apply(plan, layer.code_incoming(plan, fresh))
    check_owners(layer.pool, [layer])


def test_pages_are_counted_once():
    layer = one_tier(2, (8, 4), PagePool("cpu"))
    flush(layer, [40, 70], [0, 0])
    select_rows(layer, torch.tensor([1, 0, 1, 0]))
    _, row, filled = pages_once(layer, 0)
    assert row.tolist() == [0, 0, 0, 1, 1]
    assert filled.tolist() == [32, 32, 6, 32, 8]


def test_owners_leave_and_need_copies():
    owners = Owners(2, 4, torch.device("cpu"))
    pages = torch.tensor([2, 1 << 10 | 1], dtype=torch.int32)
    owners.join(pages[[0, 0, 1]])  # three owners and two
    assert owners.shared(pages).tolist() == [True, True]
    grid = pages[torch.tensor([[0, 1], [0, 1], [0, 1]])]
    changed = torch.tensor([[True, True], [False, True], [True, False]])
    assert owners.need_copy(grid, changed).tolist() == [[True, False], [False, True], [True, False]]
    assert owners.leave(pages[[0, 1]]).tolist() == []
    assert owners.leave(pages[[0, 0, 1]]).tolist() == pages.tolist()
    assert int(owners.extra.abs().sum()) == 0
    owners.fit(3, 9)
    assert owners.extra.shape == (3, 9)
