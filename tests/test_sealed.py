"""Sealed pages: whatever is written comes back, no byte is owned twice, and generate does not notice."""

import copy
import ctypes
from collections import Counter

import pytest
import torch
from families import build, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import check_bytes, incoming, packed_layer, step, tiers_held
from test_packing import tokens_of
from transformers import DynamicCache

import hfkv
from hfkv import LeanKVCache, LeanKVConfig, OutOfPages, Packed
from hfkv.kernels.quantize_pack import code_tokens
from hfkv.kernels.sealing import pack_words
from hfkv.packing import BLOCK, HEAD, PACK, RAW, WORD
from hfkv.paging.pool import SLOT_BITS
from hfkv.paging.rooms import DEAD, NOTHING, OFFSET_BITS, room_bytes
from hfkv.paging.sealed import SealingPool
from hfkv.quant import PageLayout

LAYOUTS = [
    PageLayout.of((8, 4), (16, 16), torch.float32, "fitted", BLOCK, True),
    PageLayout.of(Packed(key_bits=4, value_bits=2), (16, 16), torch.float32, "fitted", BLOCK, True),
    PageLayout.of(Packed(repack="bucket"), (16, 16), torch.float32, "fitted", BLOCK, True),
]


def some_pages(layout, filled, seed):
    """Pages with so many tokens each; most features hardly vary, so that packs differ in size."""
    generator = torch.Generator().manual_seed(seed)
    n = len(filled) * BLOCK
    vary = torch.rand(len(filled), 1, 16, generator=generator) * (torch.rand(1, 1, 16, generator=generator) < 0.6)
    x = torch.randn(len(filled), 1, 16, generator=generator) + vary * torch.randn(len(filled), BLOCK, 16)
    pages = torch.zeros(len(filled), layout.page_bytes, dtype=torch.uint8)
    free = torch.arange(BLOCK) >= torch.tensor(filled)[:, None]
    for name, part in code_tokens(layout, x.flatten(0, 1), x.flatten(0, 1), torch.rand(n), torch.arange(n)).items():
        part = part.unflatten(0, (-1, BLOCK)).clone()
        part[free] = 0
        layout.view(pages, name).copy_(part.transpose(1, 2) if name == "value" else part)
    return pages


def check_pool(pool):
    """Packs do not overlap, every live byte is counted, pages of packs are never more than a quarter dead."""
    for sealed in pool._sealed:
        address = sealed.address
        assert torch.equal(
            torch.isin(torch.arange(address.shape[0]), pool.numbers(torch.tensor(sealed.free, dtype=torch.int32))),
            ~held(pool, sealed),
        )
        packed = address[:, 1] != NOTHING
        where = address[packed].flatten()
        size = pool._read_words(sealed, where, 1)
        words = hfkv.kernels.sealing.words_of(sealed.layout, size)
        spans = sorted(
            zip((where >> OFFSET_BITS).tolist(), (where & (1 << OFFSET_BITS) - 1).tolist(), words.tolist(), strict=True)
        )
        live = {}
        for (page, start, count), (other, next_start, _) in zip(spans, [*spans[1:], (-1, 0, 0)], strict=False):
            live[page] = live.get(page, 0) + count
            assert start + count <= sealed.end[page] <= room_bytes(sealed.layout) // WORD
            assert page != other or start + count <= next_start
        assert live == sealed.live and live.keys() == sealed.end.keys()
        for page, end in sealed.end.items():
            assert end - live[page] < DEAD * sealed.words
    plain = sum((c.pages - c.free) * c.layout.page_bytes for c in pool._classes)
    assert pool.used_bytes + pool.slack_bytes == plain
    assert pool.slack_bytes >= 0


def held(pool, sealed):
    return sealed.address[:, 0] != NOTHING


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["new", "write", "release", "settle", "score", "file", "close up"]),
        st.integers(0, 2),
        st.integers(1, 12),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=14,
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_pages_hold_what_was_written(operations):
    pool = SealingPool("cpu")
    classes = [pool.class_of(layout) for layout in LAYOUTS]
    books = [{} for _ in LAYOUTS]  # handle -> bytes of its page
    for what, which, count, seed in operations:
        cls, layout, book = classes[which], LAYOUTS[which], books[which]
        generator = torch.Generator().manual_seed(seed)
        some = [id for id in book if torch.rand(1, generator=generator) < 0.5]
        if what == "new":
            pool.reserve({cls: count})
            some = pool.allocate(cls, torch.tensor([count])).tolist()
            assert not set(some) & {id for other in books for id in other}
        ids = torch.tensor(some, dtype=torch.int32)
        if what in ("new", "write") and some:
            filled = [BLOCK if seed % 3 else int(torch.randint(1, BLOCK + 1, (1,), generator=generator)) for _ in some]
            pages = some_pages(layout, filled, seed)
            pool.scatter(cls, ids, pages)
            book |= dict(zip(some, pages, strict=True))
        if what == "release":
            pool.release(cls, ids)
            for id in some:
                del book[id]
        if what == "settle":
            pool.settle(cls, ids)
        if what == "score" and some:
            pages = pool.gather(cls, ids)
            start, stop = layout.fields["score"]
            pages[:, start:stop] = torch.randint(0, 100, (len(some), stop - start), generator=generator)
            pool.write(cls, ids, start, pages[:, start:stop].clone())
            book |= dict(zip(some, pages, strict=True))
        if what == "file" and some:
            parts = pool.dump(cls, ids)
            pool.release(cls, ids)
            ids = pool.allocate(cls, torch.tensor([len(some)]))
            pool.undump(cls, ids, parts.__getitem__)
            moved = [book.pop(id) for id in some]
            book |= dict(zip(ids.tolist(), moved, strict=True))
        if what == "close up":
            pool.tighten()
            for each in pool.classes:
                moved = dict(zip(*(ids.tolist() for ids in pool.close_up(each)), strict=True))
                if each == classes[0]:
                    books[0] = {moved.get(id, id): page for id, page in books[0].items()}
            pool.trim()
        for cls, layout, book in zip(classes, LAYOUTS, books, strict=True):
            ids = torch.tensor(list(book), dtype=torch.int32)
            pages = pool.gather(cls, ids) if book else []
            for got, want in zip(pages, book.values(), strict=True):
                assert tokens_of(layout, got) == tokens_of(layout, want)
            if book:
                start, stop = layout.fields["score"][0], layout.fields["birth"][1]
                assert torch.equal(pool.read(cls, ids, start, stop), pages[:, start:stop])
        check_pool(pool)
    for cls, book in zip(classes, books, strict=True):
        pool.release(cls, torch.tensor(list(book), dtype=torch.int32))
    assert pool.used_bytes == pool.slack_bytes == 0


@given(st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_what_is_left_of_many_pages_moves_together(share, seed):
    """Full pages and such that were only begun, in chunks that other pages leave empty."""
    pool, layout, generator = SealingPool("cpu"), LAYOUTS[1], torch.Generator().manual_seed(seed)
    cls, count = pool.class_of(layout), 240
    pool.reserve({cls: count})
    ids = pool.allocate(cls, torch.tensor([count]))
    pool.scatter(cls, ids, some_pages(layout, [BLOCK if i % 3 else 1 + i % 60 for i in range(count)], seed))
    keep = torch.rand(count, generator=generator) < share
    pool.release(cls, ids[~keep])
    ids, before = ids[keep], pool.physical_bytes
    pages = pool.gather(cls, ids)
    pool.tighten()
    moved = sum(pool.close_up(each)[0].numel() for each in pool.classes)
    pool.trim()
    assert torch.equal(pool.gather(cls, ids), pages)
    check_pool(pool)
    if 0.1 < share < 0.5:
        assert moved and pool.physical_bytes < 0.8 * before


@given(
    st.integers(1, 3),
    st.lists(st.lists(st.integers(0, 150), min_size=3, max_size=3), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from([((8, 8), Packed(key_bits=4, value_bits=4)), (Packed(key_bits=8, value_bits=8), (4, 4))]),
)
@settings(max_examples=30, deadline=None)
def test_every_kept_token_is_in_exactly_one_tier(rows, flushes, random, tiers):
    layer = packed_layer(rows, BLOCK, tiers, SealingPool("cpu"))
    births = [0] * rows
    for counts in flushes:
        counts = counts[:rows]
        expected = step(layer, counts, births, random)
        layer.settle()
        births = [b + c for b, c in zip(births, counts, strict=True)]
        assert tiers_held(layer) == expected
        check_bytes(layer)
        check_pool(layer.pool)
    layer.release()
    assert layer.pool.used_bytes == layer.pool.slack_bytes == 0


def test_appended_tokens_can_be_taken_back():
    """A page that was begun before stays in its order until a flush, so that a failed prompt leaves no trace."""
    layer = packed_layer(2, BLOCK, (Packed(key_bits=8, value_bits=8),), SealingPool("cpu"))
    append(layer, [100, 40], [0, 0])
    before, table = tiers_held(layer), layer.table.clone()
    append(layer, [90, 30], [100, 40])
    assert tiers_held(layer) != before
    layer.restore(table)
    assert tiers_held(layer) == before
    check_bytes(layer)
    check_pool(layer.pool)
    assert (layer.pool._sealed[0].address[:, 1] != NOTHING).sum() == 1  # one row's first page is full and sealed


def append(layer, counts, births):
    fresh = incoming(counts, births)
    stored = [layer.slots(0, ("score", "birth"))]
    current = torch.cat([torch.where(stored[0][0], 0, 4), torch.where(fresh.valid, 3, 4)], 1).to(torch.int8)
    target = torch.where(current == 4, current, 0)
    plan = layer.plan(target, current, [stored[0][1]["score"].float()], rescored=False)
    layer.pool.reserve({layer.classes[0]: plan.growth[0][0]})
    layer.apply(plan, layer.code_incoming(plan, fresh))


# ---- generate


@pytest.fixture(scope="module")
def model():
    return hfkv.enable(build("llama"))


def logits_of(model, config, new=100, **inputs):
    cache = LeanKVCache(config)
    options = dict(max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True)
    out = model.generate(**(inputs or left_padded([150, 260])), past_key_values=cache, **options)
    return cache, torch.stack(out.logits, 1)


CHOICES = [{}, {"keep_share": 0.6, "high_share": 0.1}]


@pytest.mark.parametrize("choice", CHOICES, ids=["two tiers", "pruned"])
@pytest.mark.parametrize("bits", [(4, 2), (8, 4)], ids=str)
def test_generate_as_with_plain_tiers(model, choice, bits):
    """The same codes, packed or not: the logits are the same up to the order of sums."""
    packed = Packed(key_bits=bits[0], value_bits=bits[1])
    _, plain = logits_of(model, LeanKVConfig(tiers=[(8, 4), bits], page_tokens=64, **choice))
    cache, sealed = logits_of(model, LeanKVConfig(tiers=[(8, 4), packed], **choice))
    torch.testing.assert_close(sealed, plain, atol=2e-5, rtol=1e-4)
    check_pool(cache.pools[0])
    assert sum(len(sealed.end) for sealed in cache.pools[0]._sealed) > 0


@torch.no_grad()
def test_error_bounded_tier_stays_close(model):
    """Over a prompt and two flushes, the closer the smaller the bound."""
    caches = [DynamicCache()] + [
        LeanKVCache(LeanKVConfig(tiers=[Packed(rel_key=b, rel_value=b)])) for b in (0.006, 0.2)
    ]
    exact, *others = (torch.cat([model(prompt(200), past_key_values=c).logits, steps(model, c, 1)], 1) for c in caches)
    near, far = ((other - exact).norm() / exact.norm() for other in others)
    assert near < 0.02 < 0.1 < far


def test_report_counts_every_byte(model):
    cache, _ = logits_of(model, LeanKVConfig(tiers=[(8, 4), Packed()]))
    report, pool = cache.report(), cache.pools[0]
    assert sum(report.bytes.values()) == report.physical_bytes
    assert report.bytes["pack_headers"] > 0 and report.pack_slack_bytes == pool.slack_bytes > 0
    paged = sum(int(layer.head_bytes.sum()) for layer in report.layers)
    assert paged == pool.used_bytes
    outside = sum(tokens.unpaged_bytes for tokens in cache.compressed)
    arenas = sum(arena.memory.nbytes for arena in pool._arenas.values())
    assert report.physical_bytes == arenas + pool.table_bytes + outside
    assert "Packed K0.1V0.2" in str(report)


def counted_in_memory(cache):
    """Bytes by kind, read out of the memory that addresses lead to; widths are added up bit by bit."""
    found, rooms, pool = Counter(), {}, cache.pools[0]

    def side(data, form, size):
        """Bytes of header and payload of a side of a pack."""
        if size >= RAW:
            return 0, size - RAW
        assert form.packed and size < 2 * form.bits * form.dim
        planes = data[: (form.bits + form.bits.bit_length()) * -(-form.dim // 8)]
        ones = [bin(byte).count("1") for byte in planes[form.bits * -(-form.dim // 8) :]]
        per_plane = len(ones) // form.bits.bit_length()
        words = sum(2 ** (i // per_plane) * count for i, count in enumerate(ones))
        header = len(planes) + len(planes) % 2
        assert size == header + 2 * words
        return header, 2 * words

    for tokens in cache.compressed:
        packed = tokens.packed
        for tier, (cls, layout) in enumerate(zip(packed.classes, packed.layouts, strict=True)):
            meta = sum(layout.view(torch.zeros(1, layout.page_bytes, dtype=torch.uint8), name).element_size()
                       for name in layout.meta_names)  # fmt: skip
            codes = layout.key.rows + layout.value.rows
            ids, row, index = packed.table.pages(tier, packed.page_counts(tier))
            for id, r, i in zip(ids, row.tolist(), index.tolist(), strict=True):
                filled = min(BLOCK, int(packed.table.lengths[r, tier]) - i * BLOCK)
                found["metadata"] += filled * meta
                where = pool.addresses(cls)[pool.numbers(id)].tolist() if cls < 0 else [0, NOTHING]
                if where[1] == NOTHING:
                    found["codes"] += filled * codes
                    found["free_slots"] += (BLOCK - filled) * (codes + meta)
                    continue
                assert filled == BLOCK
                for address in where:
                    page, word = address >> OFFSET_BITS, address & (1 << OFFSET_BITS) - 1
                    rooms[page] = room_bytes(layout)
                    start = int(pool.chunk_addresses[page >> SLOT_BITS]) + (page & (1 << SLOT_BITS) - 1) * rooms[page]
                    data = ctypes.string_at(start + WORD * word, WORD * pack_words(layout))
                    sizes = [int.from_bytes(data[at : at + 2], "little") for at in (0, 2)]
                    at = HEAD + PACK * meta
                    key = side(data[at:], layout.pack.key, sizes[0])
                    value = side(data[at + sum(key) :], layout.pack.value, sizes[1])
                    payload = key[1] + value[1]
                    header = HEAD + key[0] + value[0]
                    padding = -(header + PACK * meta + payload) % WORD
                    found["pack_headers"] += header
                    found["codes"] += payload + padding
                    found["in rooms"] += header + PACK * meta + payload + padding
    found["pack_slack"] = sum(rooms.values()) - found.pop("in rooms")
    return found


@pytest.mark.parametrize("tiers", [[(8, 4), Packed()], [Packed(key_bits=4, value_bits=2, sides="keys")]], ids=str)
def test_report_is_what_lies_in_memory(model, tiers):
    cache, _ = logits_of(model, LeanKVConfig(tiers=tiers))
    assert {kind: cache.report().bytes[kind] for kind in KINDS} == {k: counted_in_memory(cache)[k] for k in KINDS}


KINDS = ("codes", "metadata", "pack_headers", "free_slots", "pack_slack")


def steps(model, cache, batch, count=70):
    out = [model(ids, past_key_values=cache).logits for ids in prompt(count, seed=3, batch=batch).split(1, 1)]
    return torch.cat(out, 1)


@torch.no_grad()
def test_copies_files_and_reorder(model, tmp_path):
    config = LeanKVConfig(tiers=[(8, 4), Packed()], keep_share=0.8, high_share=0.1)
    cache = LeanKVCache(config)
    model(prompt(200, batch=2), past_key_values=cache)
    steps(model, cache, 2)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    assert path.stat().st_size <= cache.report().physical_bytes + (64 << 10)
    loaded, copied, swapped = LeanKVCache.load(path), copy.deepcopy(cache), copy.deepcopy(cache)
    assert loaded.report().bytes["codes"] == cache.report().bytes["codes"]
    want = steps(model, cache, 2)
    assert torch.equal(steps(model, copied, 2), want)
    torch.testing.assert_close(steps(model, loaded, 2), want)
    swapped.reorder_cache(torch.tensor([1, 0]))
    got = steps(model, swapped, 2)
    ids = prompt(70, seed=3, batch=2)
    crossed = copy.deepcopy(LeanKVCache.load(path))
    model_out = [model(i.flip(0), past_key_values=crossed).logits for i in ids.split(1, 1)]
    torch.testing.assert_close(got.flip(0), torch.cat(model_out, 1), atol=1e-4, rtol=1e-4)
    for each in (cache, loaded, copied, swapped):
        check_pool(each.pools[0])


def test_beams(model):
    plain, packed = (
        model.generate(
            prompt(150),
            past_key_values=LeanKVCache(LeanKVConfig(tiers=[tier], page_tokens=64)),
            num_beams=3,
            max_new_tokens=60,
            do_sample=False,
        )
        for tier in ((4, 2), Packed(key_bits=4, value_bits=2))
    )
    assert torch.equal(plain, packed)


@torch.no_grad()
def test_out_of_pages_leaves_the_cache_usable(model):
    cache = LeanKVCache(LeanKVConfig(tiers=[Packed()], max_bytes=160_000))
    model(prompt(150), past_key_values=cache)
    with pytest.raises(OutOfPages, match="max_bytes"):
        model(prompt(3000, seed=1), past_key_values=cache)
    assert cache.get_seq_length() == 150
    check_pool(cache.pools[0])
    steps(model, cache, 1)
    assert cache.report().physical_bytes <= 160_000


@torch.no_grad()
def test_continued_prompts_and_reset(model):
    config = LeanKVConfig(tiers=[Packed(rel_key=0.006, rel_value=0.006)])
    cache, exact = LeanKVCache(config), DynamicCache()
    for turn in range(3):
        ids = prompt(130, seed=turn)
        got, want = (model(ids, past_key_values=c).logits for c in (cache, exact))
        assert (got - want).norm() / want.norm() < 0.03
    pool = cache.pools[0]
    assert pool.slack_bytes > 0
    cache.reset()
    assert cache.report().physical_bytes == 0
