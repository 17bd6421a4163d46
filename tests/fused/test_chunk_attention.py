"""A continued prompt by the Triton kernels against `hfkv.attend.attend_chunk`."""

from types import SimpleNamespace

import pytest
import torch
from oracle import make_layer, poison, relative_rms

from hfkv.attend import Call, Past, attend_chunk
from hfkv.fill import Fill
from hfkv.kernels.triton import chunk_attention
from hfkv.kernels.triton.tiles import Pages
from hfkv.window import Window

EXACT = 5e-6
HALF = 2e-3

CASES = [
    # tokens per row and tier, tiers, dims, page tokens, codec, groups, queries, dtype, softcap, sinks
    pytest.param([(1, 0)], ((8, 4), (4, 2)), (64, 64), 32, "fitted", 1, 33, torch.float32, None, True, id="one-token"),
    pytest.param([(63, 111), (0, 0), (5, 700), (0, 1)], ((8, 4), (4, 2)), (80, 80), 64, "fitted", 3, 40, torch.float32,
                 None, True, id="empty-row-D80-G3"),
    pytest.param([(33, 257), (64, 32)], ((8, 4), (3, 3)), (96, 64), 32, "minmax", 7, 33, torch.float32, 5.0, False,
                 id="minmax-K3V3-D96-Dv64-G7"),
    pytest.param([(100, 40), (7, 3)], ("exact", (4, 2)), (64, 64), 16, "fitted", 4, 63, torch.float32, None, False,
                 id="exact-tier-P16"),
    pytest.param([(40, 100), (1, 1)], ((8, 8), (2, 2)), (128, 128), 64, "fitted", 8, 33, torch.float16, None, True,
                 id="K2V2-D128-G8-half"),
    pytest.param([(70, 0), (0, 0)], ((4, 4),), (256, 256), 128, "fitted", 1, 33, torch.float16, 20.0, False,
                 id="one-tier-D256-half"),
    pytest.param([(0, 0), (0, 0)], ((8, 4), (4, 2)), (20, 10), 32, "fitted", 2, 33, torch.float32, None, True,
                 id="nothing-packed-odd-dims"),
]  # fmt: skip


@pytest.mark.parametrize("counts, tiers, dims, page, codec, groups, queries, dtype, softcap, sinks", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_continued_prompt(
    counts, tiers, dims, page, codec, groups, queries, dtype, softcap, sinks, padded, monkeypatch
):
    monkeypatch.setattr(chunk_attention, "BLOCK_ROWS", 64)  # several passes
    monkeypatch.setattr(chunk_attention, "PROGRAMS", 64)
    monkeypatch.setattr(chunk_attention, "TILES_EACH", 1)  # several parts
    layer, _, _ = make_layer(counts, tiers, *dims, page, codec)
    poison(layer)
    generator = torch.Generator().manual_seed(5)
    heads = 2 if len(counts) > 1 else 1
    batch, tokens, most = len(counts) // heads, queries + 7, 23
    random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    q, k, v = random(batch, heads * groups, queries, dims[0]), random(batch, heads, tokens, dims[0]), random(
        batch, heads, tokens, dims[1]
    )  # fmt: skip
    held = torch.randint(0, most + 1, (batch,), generator=generator)
    window = Window(random(batch, heads, most + 9, dims[0]), random(batch, heads, most + 9, dims[1]))
    fill = Fill(None, held, most, torch.zeros(batch, most, dtype=torch.long), 5000, None)
    call = Call(1.5 * dims[0] ** -0.5, softcap, torch.randn(heads * groups, generator=generator) if sinks else None)
    valid = None
    if padded:
        valid = torch.ones(batch, tokens, dtype=torch.bool)
        valid[0, :11] = False
        valid[-1, 20:23] = False
    past = Past(layer, layer.work(), window, fill)
    want, total = attend_chunk(past, SimpleNamespace(k=k, v=v), q, valid, call, 64)
    for row, length in enumerate(held.tolist()):
        window.k[row, :, length:] = window.v[row, :, length:] = float("nan")
    got, lse = chunk_attention.attend_chunk(
        Pages.of(layer), layer.basis, (window.k[:, :, :most], window.v[:, :, :most], held), k, v, q, valid,
        call.scaling, softcap, call.sinks, True,
    )  # fmt: skip
    bound = HALF if dtype == torch.float16 else EXACT
    assert got.dtype == dtype and lse.shape == total.shape
    sees = total.isfinite().view(got.shape[:3])
    assert torch.equal(lse.view(got.shape[:3]).isfinite(), sees)
    assert relative_rms(got[sees], want[sees]) < bound
    assert relative_rms(lse[lse.isfinite()], total[total.isfinite()]) < bound


def test_pages_stay_readable_while_tokens_are_appended():
    layer, _, _ = make_layer([(40, 90)], ((8, 4), (4, 2)), 64, 64)
    pages = Pages.of(layer)
    q = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    before = chunk_attention.attend_pages(pages, q, None, 0.2, None, False)
    layer.table = layer.table.widened(100, layer.page_counts(0))
    layer.table.lengths += 5
    after = chunk_attention.attend_pages(pages, q, None, 0.2, None, False)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
