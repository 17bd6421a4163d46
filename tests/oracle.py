"""What the kernels' twins are held to: plain attention on the same dequantised keys and values, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfkv.kernels import compaction
from hfkv.kernels.quantize_pack import Basis, unpack_tokens
from hfkv.paging.packed import PackedLayer
from hfkv.paging.pool import PagePool
from hfkv.paging.rows import Incoming
from hfkv.paging.sealed import SealingPool
from hfkv.quant import EMPTY, HIGH, LOW, NEW, PageLayout, rotation

PAGE_CASES = [
    # tokens per row and tier, tiers, key dim, value dim, page tokens
    pytest.param([(1, 0)], ((8, 4), (4, 2)), 64, 64, 32, id="one-token"),
    pytest.param([(0, 63), (111, 1)], ((8, 4), (4, 2)), 64, 64, 32, id="T63-T111-D64"),
    pytest.param([(63, 111), (0, 0), (5, 700)], ((8, 4), (4, 2)), 80, 80, 64, id="empty-row-D80"),
    pytest.param([(33, 257), (64, 32)], ((8, 4), (4, 3)), 96, 96, 32, id="V3-D96"),
    pytest.param([(111, 63)], ((4, 4), (3, 2)), 128, 128, 64, id="K3-D128"),
    pytest.param([(40, 300), (1, 1)], ((8, 8), (2, 2)), 256, 256, 64, id="K2V2-D256"),
    pytest.param([(100, 40)], ((8, 4), (4, 2)), 20, 10, 32, id="odd-dims"),
]


def make_layer(
    counts, tiers, key_dim, value_dim, tokens=32, codec="fitted", rotate=True, shift=True, seed=0, dtype=torch.float32
):
    """A packed layer whose row r holds counts[r][t] tokens in tier t."""
    generator = torch.Generator().manual_seed(seed)
    rows, layouts = len(counts), [PageLayout.of(t, (key_dim, value_dim), dtype, codec, tokens, True) for t in tiers]
    pool = SealingPool("cpu") if any(layout.pack for layout in layouts) else PagePool("cpu")
    turns = (rotation(key_dim, 0)[0], rotation(value_dim, 0)[0]) if rotate else (None, None)
    layer = PackedLayer(pool, layouts, rows, Basis(*turns, None), shift)
    most = max(sum(c) for c in counts)
    k = torch.randn(rows, most, key_dim, generator=generator) + 3 * torch.randn(rows, 1, key_dim, generator=generator)
    v = torch.randn(rows, most, value_dim, generator=generator)
    valid = torch.arange(most) < torch.tensor([sum(c) for c in counts])[:, None]
    birth = torch.arange(most).expand(rows, -1)
    fresh = Incoming(k, v, torch.rand(rows, most, generator=generator), birth, valid)
    tier = torch.full((rows, most), EMPTY)
    for row, count in enumerate(counts):
        order = torch.randperm(sum(count), generator=generator)
        tier[row, order[: count[0]]] = HIGH
        tier[row, order[count[0] :]] = LOW
    current = torch.where(valid, NEW, EMPTY)
    scores = [torch.zeros(rows, 0) for _ in tiers]
    plan = layer.plan(tier, current, scores)
    needed: dict[int, int] = {}
    for cls, (grow, _) in zip(layer.classes, plan.growth, strict=True):
        needed[cls] = needed.get(cls, 0) + grow
    layer.pool.reserve(needed)
    layer.apply(plan, layer.code_incoming(plan, fresh))
    return layer, k, v


def scatter_pages(layer: PackedLayer) -> None:
    """Move every other page of the second tier into a new arena, three times over."""
    pool = layer.pool
    for _ in range(3):  # move the pages of the second tier into new arenas
        table = layer.table
        ids, row, index = table.pages(1, layer.page_counts(1))
        odd = torch.arange(ids.numel()) % 2 == 0
        pages = pool.gather(layer.classes[1], ids[odd])
        blocked = pool._classes[layer.classes[1]].free
        pool.allocate(layer.classes[1], torch.tensor([blocked]))
        pool.reserve({layer.classes[1]: int(odd.sum())})
        fresh = pool.allocate(layer.classes[1], torch.tensor([int(odd.sum())]))
        pool.scatter(layer.classes[1], fresh, pages)
        table.write(1, row[odd], index[odd], fresh)
    layer._work = None


def poison(layer: PackedLayer) -> None:
    """Fill the codes of every free slot with garbage; metadata stays zero, as it always is."""
    for tier, layout in enumerate(layer.layouts):
        ids, row, index = layer.table.pages(tier, layer.page_counts(tier))
        pages = layer.pool.gather(layer.classes[tier], ids)
        free = index[:, None] * layout.tokens + torch.arange(layout.tokens) >= layer.table.lengths[row, tier][:, None]
        if layout.key.bits:
            layout.view(pages, "key")[free] = 255
        if layout.value.bits:
            layout.view(pages, "value").transpose(1, 2)[free] = 255
        layer.pool.scatter(layer.classes[tier], ids, pages)


def dequantised(layer: PackedLayer, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a row in the plain basis, and their births."""
    keys, values, births = [], [], []
    for tier, layout in enumerate(layer.layouts):
        ids, rows, _ = layer.table.pages(tier, layer.page_counts(tier))
        pages = layer.pool.gather(layer.classes[tier], ids[rows == row])
        count = int(layer.table.lengths[row, tier])
        tokens = compaction.take(layout, pages, torch.arange(count))
        k, v = unpack_tokens(layout, tokens)
        if layer.basis.mean is not None:
            k = k + layer.basis.mean[row]
        keys.append(k if layer.basis.key is None else k @ layer.basis.key.T)
        values.append(v if layer.basis.value is None else v @ layer.basis.value.T)
        births.append(tokens["birth"])
    return torch.cat(keys), torch.cat(values), torch.cat(births)


def softmax_attention(q, k, v, softcap=None, sink=None):
    """q [n, D] scaled, k, v [t, ...] -> (output [n, Dv], probabilities [n, t]), in float64."""
    logits = q.double() @ k.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sink is not None:
        logits = torch.cat([logits, sink.double()[:, None]], 1)
    p = logits.softmax(-1)[:, : k.shape[0]]
    return p @ v.double(), p


def relative_rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()
