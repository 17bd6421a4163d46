"""Packing kernels against their twin: the bytes of pages, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv import Packed
from hfkv.kernels import compaction
from hfkv.kernels.quantize_pack import BEYOND_BYTE, BEYOND_HALF, NOT_FINITE, Basis, check_flags, code_tokens
from hfkv.kernels.triton.quantize_pack import TierPages, pack_rows
from hfkv.paging.pool import PagePool
from hfkv.paging.table import PageTable, ragged_index
from hfkv.quant import Codec, PageLayout, rotation


def make(tier, dims, dtype, scheme="fitted", tokens=32, rows=3, n=41, rotate=True, seed=0):
    """Rows with pages for n tokens in random slots; returns everything that both sides need."""
    generator = torch.Generator().manual_seed(seed)
    layout = PageLayout(
        *(Codec.of(tier, s, d, dtype, scheme) for s, d in zip(("key", "value"), dims, strict=True)), tokens, True
    )
    pool = PagePool("cpu")
    cls = pool.class_of(layout)
    pages = -(-(n + 9) // tokens)
    counts = torch.full((rows,), pages)
    pool.reserve({cls: rows * pages})
    table = PageTable(rows, pool.device)
    table.ids = torch.zeros(rows, pages + 1, dtype=torch.int32)
    tier_index = seed % 2
    table.write(tier_index, *ragged_index(counts), pool.allocate(cls, counts))
    slots = torch.stack([torch.randperm(pages * tokens, generator=generator)[:n] for _ in range(rows)]).int()
    slots[torch.rand(rows, n, generator=generator) < 0.3] = -1
    turns = [rotation(d, 0)[0] if rotate else None for d in dims]
    mean = torch.randn(rows, dims[0], generator=generator)
    basis = Basis(*turns, mean)
    k = (torch.randn(rows, n, dims[0], generator=generator) * 2).to(dtype)
    v = torch.randn(rows, n, dims[1], generator=generator).to(dtype)
    score = (torch.rand(rows, n + 3, generator=generator) * 3)[:, :n]
    birth = torch.arange(n).repeat(rows, 1)
    return pool, layout, cls, tier_index, table, basis, k, v, score, birth, slots


def both(pool, layout, cls, tier, table, basis, k, v, score, birth, slots):
    """Pages [rows * pages, page_bytes] as the kernel and as the twin write them."""
    flags = torch.zeros(1, dtype=torch.int32)
    pack_rows(TierPages(table.ids, pool.chunk_addresses, layout, tier), basis, k, v, score, birth, slots, flags)
    assert int(flags) == 0
    rows, pages = slots.shape[0], table.ids.shape[1] - 1
    ids = table.pages(tier, torch.full((rows,), pages))[0]
    got, want = pool.gather(cls, ids), torch.zeros(rows * pages, layout.page_bytes, dtype=torch.uint8)
    row, column = (slots >= 0).nonzero(as_tuple=True)
    coded = (basis.of_keys(k)[row, column], basis.rotate_values(v)[row, column])
    tokens = code_tokens(layout, *coded, score[row, column], birth[row, column])
    compaction.put(layout, want, row * pages * layout.tokens + slots[row, column].long(), tokens)
    return got, want, row.numel()


CASES = [
    ((8, 4), (64, 64), torch.float32, "fitted"),
    ((4, 2), (64, 64), torch.float16, "fitted"),
    ((8, 4), (80, 80), torch.float16, "fitted"),
    ((4, 2), (80, 80), torch.float32, "fitted"),
    ((3, 3), (96, 96), torch.float32, "fitted"),
    ((2, 8), (128, 96), torch.float32, "fitted"),
    ((4, 3), (128, 128), torch.float16, "fitted"),
    ((3, 2), (20, 12), torch.float32, "fitted"),
    ((8, 4), (72, 100), torch.float16, "fitted"),
    ((8, 4), (96, 80), torch.float32, "minmax"),
    ((4, 2), (64, 128), torch.float16, "minmax"),
    ("exact", (80, 64), torch.float16, "fitted"),
    (Packed(), (64, 64), torch.float32, "fitted"),
    (Packed(rel_key=0.005, rel_value=0.4), (80, 96), torch.float16, "fitted"),
    (Packed(rel_key=0.3, value_bits=4), (72, 20), torch.float32, "fitted"),
]


@pytest.mark.parametrize("tier, dims, dtype, scheme", CASES, ids=str)
def test_pages_hold_the_twins_bytes(tier, dims, dtype, scheme):
    """At most 2 of 10,000 bytes may differ, by rounding (2 of 1,000 where fp16 numbers of a rotation are stored)."""
    case = make(tier, dims, dtype, scheme, seed=sum(dims) + len(scheme))
    got, want, tokens = both(*case)
    layout = case[1]
    differ = (got != want).sum().item()
    assert differ <= (2e-3 if tier == "exact" else 2e-4) * tokens * layout.token_bytes
    for name in ("score", "birth"):
        assert torch.equal(layout.view(got, name), layout.view(want, name))


def test_without_rotation_and_shift():
    case = make((8, 4), (64, 80), torch.float32, rotate=False, seed=3)
    case[5].mean = None
    got, want, _ = both(*case)
    assert torch.equal(got, want)


def test_vectors_of_zeros_and_constants():
    case = make((4, 2), (64, 64), torch.float32, seed=4)
    case[5].mean = None
    case[6][:, ::2], case[7][:, ::2] = 0.0, 0.0
    case[6][:, 1::4] = 3.0
    got, want, _ = both(*case)
    assert (got != want).float().mean() < 2e-4


@given(
    st.sampled_from(
        [
            *(("fitted", tier) for tier in ((8, 4), (4, 2), (3, 3), "exact", Packed(), Packed(rel_key=0.5))),
            ("minmax", (4, 2)),
        ]
    ),
    st.floats(-3, 6),
    st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_looking_without_storing_flags_what_storing_does(codec, power, seed):
    """A norm that is safe spares the quantising: no flag is lost by that, whatever the vectors' size."""
    scheme, tiers = codec
    pool, layout, _, tier, table, basis, k, v, score, birth, slots = make(
        tiers, (32, 32), torch.float32, scheme, rows=1, n=9, seed=seed
    )
    spread = 10**power * torch.rand(9, 1, generator=torch.Generator().manual_seed(seed)) ** 3
    found = []
    for store in (True, False):
        found.append(torch.zeros(1, dtype=torch.int32))
        pages = TierPages(table.ids, pool.chunk_addresses, layout, tier)
        pack_rows(pages, basis, k * spread, v * spread, score, birth, slots, found[-1], store=store)
    assert int(found[0]) == int(found[1])


@pytest.mark.parametrize(
    "scheme, value, bit",
    [
        ("fitted", float("nan"), NOT_FINITE),
        ("fitted", float("inf"), NOT_FINITE),
        ("fitted", 1e7, BEYOND_BYTE),
        ("minmax", 1e9, BEYOND_HALF),
    ],
)
@pytest.mark.parametrize("store", [True, False])
def test_what_cannot_be_coded_is_flagged(scheme, value, bit, store):
    pool, layout, cls, tier, table, basis, k, v, score, birth, slots = make((8, 4), (64, 64), torch.float32, scheme)
    before = pool.gather(cls, table.ids[:, :1].flatten())
    row, column = (slots >= 0).nonzero()[5].tolist()
    (k, v)[column % 2][row, column, 7] = value
    flags = torch.zeros(1, dtype=torch.int32)
    pack_rows(
        TierPages(table.ids, pool.chunk_addresses, layout, tier), basis, k, v, score, birth, slots, flags, store=store
    )
    assert int(flags) & bit
    with pytest.raises(ValueError):
        check_flags(int(flags))
    if not store:
        assert torch.equal(pool.gather(cls, table.ids[:, :1].flatten()), before)


def test_tokens_that_do_not_enter_are_not_looked_at():
    pool, layout, _, tier, table, basis, k, v, score, birth, slots = make((8, 4), (64, 64), torch.float32)
    k[slots < 0] = float("nan")
    flags = torch.zeros(1, dtype=torch.int32)
    pack_rows(TierPages(table.ids, pool.chunk_addresses, layout, tier), basis, k, v, score, birth, slots, flags)
    assert int(flags) == 0
