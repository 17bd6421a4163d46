"""Invariants of the page pool under random operation sequences: no page owned twice, none lost."""

import copy
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv import OutOfPages
from hfkv.paging.pool import SLOT_BITS, PagePool
from hfkv.quant import Codec, PageLayout


def layout(tier, dim=32, tokens=32, scored=True):
    codecs = [Codec.of(tier, side, dim, torch.float32, "fitted") for side in ("key", "value")]
    return PageLayout(*codecs, tokens, scored)


LAYOUTS = [layout((8, 4)), layout((4, 2)), layout((4, 3), scored=False)]


def check(pool: PagePool, held: dict[int, list[torch.Tensor]]) -> None:
    """Every page is free or held once; pages of different classes never share bytes; the counters agree."""
    spans = []
    for cls, page_class in enumerate(pool._classes):
        mine = torch.cat(held[cls]) if held[cls] else torch.zeros(0, dtype=torch.int32)
        free = pool._free_ids(page_class)
        every = torch.cat([mine, free])
        assert every.unique().numel() == every.numel() == page_class.pages
        assert free.numel() == page_class.free == int(page_class.pointers[1] - page_class.pointers[0])
        chunks = (every >> SLOT_BITS).unique().tolist()
        assert chunks == [c for c, owner in enumerate(pool._owner) if owner == cls]
        spans += chunks
    assert len(spans) == len(set(spans))
    born = {chunk for arena in pool._arenas.values() for chunk in arena.chunks}
    assert sorted(spans + pool._spare) == sorted(born)
    used = torch.zeros_like(pool._used)
    for ids in (ids for lists in held.values() for ids in lists):
        used.index_add_(0, ids >> SLOT_BITS, torch.ones_like(ids))
    assert torch.equal(used, pool._used)
    assert pool.memory_bytes == len(born) * pool.chunk_bytes


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "release", "trim", "mix"]), st.integers(0, 2), st.integers(0, 120), st.randoms()
    ),
    max_size=25,
)


@given(OPERATIONS)
@settings(max_examples=1500, deadline=None)
def test_no_page_is_owned_twice_or_lost(operations):
    pool = PagePool("cpu")
    for each in LAYOUTS:
        pool.class_of(each)
    held: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    marks: dict[int, int] = {}
    for name, cls, size, random in operations:
        if name == "allocate":
            demand = torch.tensor([random.randrange(4) for _ in range(size)], dtype=torch.long)
            total = int(demand.sum())
            pool.reserve({cls: total}, slack=random.choice([0.0, 0.5]))
            ids = pool.allocate(cls, demand)
            assert ids.numel() == total
            pages = pool.gather(cls, ids)
            assert (pages[:, pool.layout(cls).meta_start :] == 0).all()
            pages[:] = random.randrange(1, 256)
            pages.view(torch.int64)[:, 0] = ids.long()
            pool.scatter(cls, ids, pages)
            if total:
                held[cls].append(ids)
                marks.update(dict.fromkeys(((cls, i) for i in ids.tolist()), int(pages[0, -1])))
        elif name == "release" and held[cls]:
            ids = held[cls].pop(random.randrange(len(held[cls])))
            pool.release(cls, ids)
        elif name == "trim":
            pool.trim()
        elif name == "mix" and held[cls]:  # rows give single pages back
            ids = torch.cat(held[cls])
            keep = torch.tensor([random.random() < 0.7 for _ in range(ids.numel())])
            held[cls] = [ids[keep]] if keep.any() else []
            pool.release(cls, ids[~keep])
        if pool.chunk_bytes:
            check(pool, held)
    for cls, lists in held.items():  # what others did has not touched the pages that are held
        for ids in lists:
            pages = pool.gather(cls, ids)
            assert torch.equal(pages.view(torch.int64)[:, 0], ids.long())
            assert pages[:, -1].tolist() == [marks[cls, i] for i in ids.tolist()]


def test_an_empty_chunk_serves_another_class():
    pool = PagePool("cpu")
    first, second = pool.class_of(LAYOUTS[0]), pool.class_of(LAYOUTS[1])
    pool.reserve({first: 100})
    ids = pool.allocate(first, torch.tensor([100]))
    size = pool.memory_bytes
    pool.release(first, ids)
    pool.reserve({second: 90})
    pool.allocate(second, torch.tensor([90]))
    assert pool.memory_bytes == size


def test_trim_gives_memory_back():
    pool = PagePool("cpu")
    cls = pool.class_of(LAYOUTS[0])
    pool.reserve({cls: 300})
    ids = pool.allocate(cls, torch.tensor([300]))
    pool.release(cls, ids)
    assert pool.memory_bytes > 0
    pool.trim()
    assert pool.memory_bytes == 0
    pool.reserve({cls: 5})
    assert pool.allocate(cls, torch.tensor([2, 3])).numel() == 5


@given(st.integers(0, 400), st.floats(0, 1), st.booleans(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_pages_move_together_and_the_rest_is_given_back(count, share, sharing, random):
    pool = PagePool("cpu")
    cls, other = pool.class_of(LAYOUTS[0]), pool.class_of(LAYOUTS[1])
    taken = []
    for part in (count // 3, count - count // 3):  # two arenas
        pool.reserve({cls: part, other: 3})
        taken.append(pool.allocate(cls, torch.tensor([part])))
        pool.allocate(other, torch.tensor([3]))
    ids = torch.cat(taken)
    others = pool._used[(torch.tensor(pool._owner) == other).nonzero().flatten()].clone()
    marks = torch.arange(count)
    pages = torch.zeros(count, pool.layout(cls).page_bytes, dtype=torch.uint8)
    pages.view(torch.int64)[:, 0] = marks
    pool.scatter(cls, ids, pages)
    keep = torch.tensor([random.random() < share for _ in range(count)], dtype=torch.bool)
    if sharing:
        pool.share(ids[keep][::2])
    pool.release(cls, ids[~keep])
    ids, marks = ids[keep], marks[keep]
    old, new = pool.close_up(cls)
    moved = dict(zip(old.tolist(), new.tolist(), strict=True))
    ids = torch.tensor([moved.get(i, i) for i in ids.tolist()], dtype=torch.int32)
    pool.trim()
    assert torch.equal(pool.gather(cls, ids).view(torch.int64)[:, 0], marks)
    every = torch.cat([ids, pool._free_ids(pool._classes[cls])])
    assert every.unique().numel() == every.numel() == pool._classes[cls].pages
    assert pool._classes[cls].free < max(pool._classes[cls].per_chunk, 1)
    free = pool.gather(cls, pool._free_ids(pool._classes[cls]))
    assert (free[:, pool.layout(cls).meta_start :] == 0).all()
    if sharing and len(ids):
        assert torch.equal(pool.owners.shared(ids), torch.arange(len(ids)) % 2 == 0)
    assert torch.equal(others, pool._used[(torch.tensor(pool._owner) == other).nonzero().flatten()])


def test_growth_moves_nothing():
    pool = PagePool("cpu")
    cls = pool.class_of(LAYOUTS[0])
    pool.reserve({cls: 10})
    pool.allocate(cls, torch.tensor([10]))
    before = {number: arena.memory.data_ptr() for number, arena in pool._arenas.items()}
    pool.reserve({cls: 5000})
    assert {number: pool._arenas[number].memory.data_ptr() for number in before} == before


@pytest.mark.parametrize("limit", [1, 40_000, 300_000])
def test_out_of_pages_changes_nothing(limit):
    pool = PagePool("cpu", max_bytes=limit)
    cls = pool.class_of(LAYOUTS[0])
    got = 0
    with pytest.raises(OutOfPages, match=r"max_bytes.*nothing was changed"):
        while True:
            pool.reserve({cls: 3})
            got += pool.allocate(cls, torch.tensor([3])).numel()
            assert pool.physical_bytes <= limit
    size, free = pool.physical_bytes, pool._classes[cls].free
    with pytest.raises(OutOfPages):
        pool.reserve({cls: 10**6})
    assert (pool.physical_bytes, pool._classes[cls].free) == (size, free)
    if free:
        assert pool.allocate(cls, torch.tensor([1])).numel() == 1


def test_page_ids_of_32_bits_are_all_that_there_are(monkeypatch):
    """A chunk beyond them would have the id of another, or a negative one."""
    monkeypatch.setattr("hfkv.paging.pool.MOST_CHUNKS", 5)
    pool = PagePool("cpu")
    cls = pool.class_of(LAYOUTS[0])
    pool.reserve({cls: 1})
    each = pool._classes[cls].per_chunk
    pool.reserve({cls: 4 * each}, slack=10.0)
    size, free = pool.physical_bytes, pool._classes[cls].free
    assert pool.memory_bytes == 5 * pool.chunk_bytes
    with pytest.raises(OutOfPages, match=r"32 bits number 5 chunks: nothing was changed"):
        pool.reserve({cls: 5 * each + 1})
    assert (pool.physical_bytes, pool._classes[cls].free) == (size, free)
    pool.reserve({cls: 5 * each})
    ids = pool.allocate(cls, torch.tensor([5 * each]))
    assert (ids >> SLOT_BITS).unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [32, 64])
def test_chunks_waste_little(dim, tokens):
    pool = PagePool("cpu")
    classes = [pool.class_of(layout(tier, dim, tokens)) for tier in ((8, 4), (4, 2))]
    pool.reserve(dict.fromkeys(classes, 2000))
    for cls in classes:
        page_class = pool._classes[cls]
        assert 1 - page_class.per_chunk * page_class.layout.page_bytes / pool.chunk_bytes <= 0.02


def test_chunk_addresses_point_into_the_arenas():
    pool = PagePool("cpu")
    cls = pool.class_of(LAYOUTS[0])
    pool.reserve({cls: 5})
    ids = pool.allocate(cls, torch.tensor([5]))
    for own in (pool, copy.deepcopy(pool)):
        page_bytes = own.layout(cls).page_bytes
        own.scatter(cls, ids, torch.arange(5, dtype=torch.uint8)[:, None].repeat(1, page_bytes))
        for number, page in enumerate(ids.tolist()):
            address = int(own.chunk_addresses[page >> SLOT_BITS]) + (page & ((1 << SLOT_BITS) - 1)) * page_bytes
            assert ctypes.c_uint8.from_address(address).value == number
