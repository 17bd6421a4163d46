"""Significance by the Triton kernels against the twins of `hfkv.observe`."""

import copy
from types import SimpleNamespace

import pytest
import torch
from host_reads import Watch
from oracle import make_layer, poison, relative_rms

from hfkv.attend import Call
from hfkv.backends.fused import FusedKernels
from hfkv.backends.plain import PlainKernels
from hfkv.fill import Fill, advance
from hfkv.kernels.quantize_pack import Basis
from hfkv.paging.table import PageTable
from hfkv.window import Sequences

EXACT = 2e-5
"""float32 throughout."""
HALF = 4e-3
"""Products in fp16, as models in half precision have them; the score itself is stored in fp16."""


@pytest.mark.parametrize("dim, groups, softcap, sinks", [(64, 1, None, True), (80, 3, 4.0, False), (96, 7, 4.0, True)])
@pytest.mark.parametrize("tokens, queries, count", [(1, 1, 64), (63, 63, 64), (111, 111, 64), (111, 20, 70)])
def test_a_prompt(dim, groups, softcap, sinks, tokens, queries, count):
    check_prompt(2, 2, groups, dim, tokens, queries, count, softcap, sinks, None, torch.float32, EXACT)


@pytest.mark.parametrize("known_lse", [False, True])
def test_a_ragged_prompt(known_lse):
    valid = torch.ones(3, 111, dtype=torch.bool)
    valid[0, :50], valid[1, 100:], valid[2, 3:40], valid[2, 60:] = False, False, False, False
    check_prompt(3, 1, 4, 64, 111, 111, 64, None, True, valid, torch.float32, EXACT, known_lse)


def test_more_queries_than_one_product_takes():
    check_prompt(1, 1, 2, 64, 150, 150, 130, None, False, None, torch.float32, EXACT)


@pytest.mark.parametrize("dim, groups", [(128, 8), (256, 1)])
def test_a_prompt_in_half_precision(dim, groups):
    check_prompt(1, 2, groups, dim, 111, 111, 64, None, True, None, torch.float16, HALF)


def test_no_probabilities_of_a_prompt_are_kept(monkeypatch):
    """Nothing is made that is as large as [batch, heads, queries, keys]; the twin makes it."""
    generator, largest = torch.Generator().manual_seed(0), []
    q, k = (torch.randn(1, n, 192, 32, generator=generator) for n in (4, 1))
    args = (Sequences(k, k, advance(Fill.empty(1, k.device), 192, None)), q, None, Call(0.2, None, None), None, 64)
    for kernels in (FusedKernels, PlainKernels):
        watch = Watch(monkeypatch)
        with watch:
            kernels.observe_chunk(*args)
        largest.append(watch.largest)
        assert watch.reads == []
    assert largest[0] < 4 * 64 * 192 <= largest[1]


def check_prompt(batch, heads, groups, dim, tokens, queries, count, softcap, sinks, valid, dtype, bound, known=False):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads * groups, queries, dim, generator=generator).to(dtype)
    k = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    call = Call(2.0 * dim**-0.5, softcap, torch.randn(heads * groups, generator=generator) if sinks else None)
    fill = advance(Fill.empty(batch, torch.device("cpu")), tokens, valid)
    lse = torch.rand(batch * heads, groups, queries, generator=generator) + 6 if known else None
    k = k[:, :, : fill.most]
    for row, length in enumerate(fill.counts.tolist()):
        k[row, :, length:] = float("nan")  # slots without a token
    args = (Sequences(k, k, fill), q, valid, call, lse, count)
    got = FusedKernels.observe_chunk(*args)
    want = PlainKernels.observe_chunk(Sequences(k.nan_to_num(), k, fill), *args[1:])
    assert torch.equal(got == 1, want == 1) or valid is None
    assert relative_rms(got, want) < bound


STORED = [
    # tokens per row and tier, tiers, key dim, page tokens, codec, groups, queries, dtype, softcap, sinks
    pytest.param([(1, 0)], ((8, 4), (4, 2)), 64, 32, "fitted", 1, 1, torch.float32, None, False, id="one-token"),
    pytest.param([(63, 111), (0, 0), (5, 300), (0, 1)], ((8, 4), (4, 2)), 80, 64, "fitted", 3, 8, torch.float32, None,
                 True, id="empty-row-D80-G3"),
    pytest.param([(33, 257), (64, 32)], ((8, 4), (3, 2)), 96, 32, "minmax", 7, 5, torch.float32, 5.0, False,
                 id="minmax-K3-D96-G7"),
    pytest.param([(100, 40), (7, 3)], ("exact", (4, 2)), 64, 16, "fitted", 4, 8, torch.float32, None, False,
                 id="exact-tier-P16"),
    pytest.param([(40, 100), (1, 1)], ((8, 8), (2, 2)), 128, 64, "fitted", 8, 8, torch.float16, None, True,
                 id="K2-D128-G8-half"),
    pytest.param([(70, 0), (0, 0)], ((4, 4),), 256, 128, "fitted", 4, 8, torch.float32, None, True,
                 id="one-tier-D256"),
]  # fmt: skip


@pytest.mark.parametrize("counts, tiers, dim, page, codec, groups, queries, dtype, softcap, sinks", STORED)
def test_a_flush(counts, tiers, dim, page, codec, groups, queries, dtype, softcap, sinks):
    layer, _, _ = make_layer(counts, tiers, dim, dim, page, codec)
    poison(layer)
    generator = torch.Generator().manual_seed(5)
    rows, window, seen = len(counts), 23, 5000
    heads = 2 if rows % 2 == 0 else 1
    batch = rows // heads
    q = torch.randn(batch, heads * groups, queries, dim, generator=generator).to(dtype)
    k = torch.randn(batch, heads, window, dim, generator=generator).to(dtype)
    held = torch.randint(1, window + 1, (batch,), generator=generator)
    held[0] = window
    position = torch.arange(seen - window, seen) - (window - held[:, None])
    position = torch.where(torch.arange(window) < held[:, None], position + window - held[:, None], -1)
    fill = Fill(None, held, window, position, seen, torch.arange(batch))
    for row, length in enumerate(held.tolist()):
        k[row, :, length:] = float("nan")
    at = torch.arange(seen - 2 * queries, seen, 2)
    tokens = SimpleNamespace(
        packed=layer,
        window=SimpleNamespace(heads=heads),
        queries=SimpleNamespace(kept=lambda: q, positions=at.tolist(), stands_for=31),
        call=Call(2.0 * dim**-0.5, softcap, torch.randn(heads * groups, generator=generator) if sinks else None),
    )
    before = [layer.slots(tier, ("score",))[1]["score"] for tier in range(layer.tiers)]
    held_plain, held_fused = scores(PlainKernels, layer), scores(FusedKernels, layer)
    in_window = PlainKernels.observe_stored([tokens], [Sequences(k.nan_to_num(), k, fill)], held_plain)
    got_window = FusedKernels.observe_stored([tokens], [Sequences(k, k, fill)], held_fused)
    assert relative_rms(got_window, in_window) < (HALF if dtype == torch.float16 else EXACT)
    for tier in range(layer.tiers):
        filled, parts = layer.slots(tier, ("score",))
        assert torch.equal(parts["score"], before[tier])  # until the flush has its pages
        got, want = held_fused[tier]["score"], held_plain[tier]["score"].clamp_max(65504.0)
        assert (got[~filled] == 0).all()
        if filled.any():
            assert relative_rms(got[filled], want[filled]) < (HALF if dtype == torch.float16 else 5e-4)


def scores(kernels, layer):
    """Scores in float32 and births of the stored tokens, per tier, as a flush reads them."""
    held = [parts for _, parts in kernels.stored(layer, True)]
    return [{"score": parts["score"].float(), "birth": parts["birth"]} for parts in held]


def test_a_score_stays_in_its_format():
    """One token that all attention goes to, among many: its score is clamped, the others' fall."""
    layer, _, _ = make_layer([(100, 0)], ((8, 4), (4, 2)), 64, 64)
    q, k = torch.zeros(1, 1, 8, 64), torch.zeros(1, 1, 1, 64)
    fill = Fill(1, torch.ones(1, dtype=torch.long), 1, None, 10**7, None)
    at = torch.full((8,), 10**7)
    tokens = SimpleNamespace(
        packed=layer,
        window=SimpleNamespace(heads=1),
        queries=SimpleNamespace(kept=lambda: q, positions=at.tolist(), stands_for=8192),
        call=Call(1.0, None, None),
    )
    held = scores(FusedKernels, layer)
    FusedKernels.observe_stored([tokens], [Sequences(k, k, fill)], held)
    assert (held[0]["score"][layer.slots(0, ())[0]] == 65504.0).all()


@pytest.mark.parametrize("tokens_at_once", [1, 1 << 18])
def test_layers_that_are_observed_together(tokens_at_once, monkeypatch):
    """As each alone: pages of other lengths, other sinks and scales, and one that is asked otherwise."""
    monkeypatch.setattr("hfkv.observe.STACKED_TOKENS", tokens_at_once)
    generator = torch.Generator().manual_seed(0)
    fill = Fill(9, torch.tensor([9]), 9, None, 900, None)
    pool_layer, _, _ = make_layer(
        [(100, 70), (0, 200), (64, 1), (30, 0), (5, 130), (128, 64)], ((8, 4), (4, 2)), 64, 64
    )
    ids, lengths = pool_layer.table.ids.chunk(3), pool_layer.table.lengths.chunk(3)
    layers, windows = [], []
    for index in range(3):
        packed = copy.copy(pool_layer)
        packed.table = PageTable.of(ids[index], lengths[index])
        packed.basis = Basis(pool_layer.basis.key, pool_layer.basis.value, pool_layer.basis.mean.chunk(3)[index])
        packed.has_mean = pool_layer.has_mean.chunk(3)[index]
        packed.changed()
        q = torch.randn(1, 6, 5, 64, generator=generator)
        kept = SimpleNamespace(kept=lambda q=q: q, positions=[860, 870, 880, 890, 899], stands_for=32)
        call = Call(0.1 + 0.1 * index, 30.0 if index == 2 else None, torch.randn(6, generator=generator))
        layers.append(SimpleNamespace(packed=packed, window=SimpleNamespace(heads=2), queries=kept, call=call))
        k = torch.randn(1, 2, 9, 64, generator=generator)
        windows.append(Sequences(k, k, fill))
    stored = [parts for _, parts in PlainKernels.stored(pool_layer, True)]
    alone = [{name: x.float().clone() for name, x in parts.items()} for parts in stored]
    together = [{name: x.float().clone() for name, x in parts.items()} for parts in stored]
    got = PlainKernels.observe_stored(layers, windows, together)
    want = []
    for index, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        part = slice(2 * index, 2 * index + 2)
        own = [{name: x[part] for name, x in parts.items()} for parts in alone]
        want.append(PlainKernels.observe_stored([layer], [window], own))
    torch.testing.assert_close(got, torch.cat(want))
    for tier in range(2):
        filled = pool_layer.slots(tier, ())[0]
        torch.testing.assert_close(together[tier]["score"][filled], alone[tier]["score"][filled])
        assert not torch.equal(together[tier]["score"][filled], stored[tier]["score"][filled].float())
