"""The plain-torch twins against attention on the same dequantised keys and values, on odd shapes."""

import pytest
import torch
from oracle import PAGE_CASES, dequantised, make_layer, poison, relative_rms, scatter_pages, softmax_attention

from hfkv.kernels import decode_attention
from hfkv.kernels.decode_attention import attention_received, exact_keys, join
from hfkv.kernels.observe import received_exact
from hfkv.kernels.prompt_attention import QUERY_BLOCK, prompt_attention

CASES = [
    *PAGE_CASES,
    pytest.param([(100, 40), (7, 3)], ("exact", (4, 2)), 192, 128, 32, id="exact-tier-D192-Dv128"),
    pytest.param([(511, 0), (129, 0)], ("exact",), 64, 64, 64, id="exact"),
]


@pytest.mark.parametrize("counts, tiers, key_dim, value_dim, tokens", CASES)
@pytest.mark.parametrize("codec", ["fitted", "minmax"])
@pytest.mark.parametrize("groups, queries", [(1, 1), (4, 1), (7, 2), (8, 5)], ids=["G1", "G4", "G7-Q2", "G8-Q5"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
def test_attention_over_pages(counts, tiers, key_dim, value_dim, tokens, codec, groups, queries, softcap, monkeypatch):
    monkeypatch.setattr("hfkv.paging.packed.BLOCK_TOKENS", 256)  # several blocks
    layer, _, _ = make_layer(counts, tiers, key_dim, value_dim, tokens, codec)
    poison(layer)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(len(counts), groups * queries, key_dim, generator=generator) * key_dim**-0.5
    sinks = torch.randn(len(counts), groups * queries, generator=generator)
    extra_k, extra_v = (torch.randn(len(counts), 3, dim, generator=generator) for dim in (key_dim, value_dim))
    joint = joined(layer, rows, softcap, sinks, extra_k, extra_v)
    out = joint.attend()
    received = attention_received(joint.logits.softmax(-1), layer.work(), groups)
    for row, count in enumerate(counts):
        k, v, births = dequantised(layer, row)
        k, v = torch.cat([k, extra_k[row]]), torch.cat([v, extra_v[row]])
        want, p = softmax_attention(rows[row], k, v, softcap, sinks[row])
        assert relative_rms(out[row], want) < 2e-5
        if sum(count) == 0:
            continue
        significance = p[:, :-3].unflatten(0, (groups, queries)).mean(1).amax(0)  # [tokens]
        stored = [layer.slots(t, ("birth",)) for t in range(layer.tiers)]
        for tier, (filled, parts) in enumerate(stored):
            got = received[tier][row][filled[row]]
            here = torch.searchsorted(births.sort().values, parts["birth"][row][filled[row]])
            assert relative_rms(got, significance[births.argsort()][here]) < 1e-4 or got.numel() == 0


def joined(layer, rows, softcap=None, sinks=None, extra_k=None, extra_v=None):
    """Joint logits of plain queries over a packed layer and some exact keys."""
    extra_k = torch.zeros(rows.shape[0], 0, rows.shape[-1]) if extra_k is None else extra_k
    extra_v = torch.zeros(rows.shape[0], 0, layer.layouts[0].value.dim) if extra_v is None else extra_v
    exact = [exact_keys(rows, extra_k, extra_v, None, softcap)]
    return join(layer.work(), rows, exact, softcap, sinks)


def test_work_over_several_arenas():
    """Pages of one row that lie in several arenas are read in the right order."""
    layer, _, _ = make_layer([(300, 300), (10, 500)], ((8, 4), (4, 2)), 64, 64)
    scatter_pages(layer)
    assert max(len(block.sources) for block in layer.work().blocks) > 1
    rows = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)) / 8
    out = joined(layer, rows).attend()
    for row in range(2):
        k, v, _ = dequantised(layer, row)
        assert relative_rms(out[row], softmax_attention(rows[row], k, v)[0]) < 1e-5


def test_the_mean_shift_is_exact_in_itself():
    """With and without the shift an 8-bit layer gives the attention of the exact keys."""
    for shift in (False, True):
        layer, k, v = make_layer([(200, 0)], ((8, 8), (4, 2)), 64, 64, shift=shift)
        rows = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)) / 8
        out = joined(layer, rows).attend()
        want, _ = softmax_attention(rows[0], k[0], v[0])
        assert relative_rms(out[0], want) < 0.03


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_of_one_tier_are_read_together_where_that_wastes_little(ragged):
    counts = [(0, 3000), (0, 150), (0, 31), (0, 0)] if ragged else [(0, 3000), (0, 2700), (0, 2600), (0, 2900)]
    layer, _, _ = make_layer(counts, ((8, 4), (4, 2)), 32, 32)
    blocks = layer.work().blocks
    assert all((block.row is None) != ragged for block in blocks)
    read = sum(words.numel() for block in blocks for _, words, _ in block.sources)
    assert read <= 1.25 * int(layer.page_counts(1).sum())
    assert layer.work().nbytes <= 0.01 * layer.pool.used_bytes
    for block in blocks:
        rows = 4 if block.row is None else block.row.numel()
        assert rows * (block.columns[1] - block.columns[0]) <= decode_attention.BLOCK_TOKENS


def test_unused_memory_of_exact_pages_may_have_been_anything():
    """A chunk that comes from another class carries its bytes along; as exact values they could be NaN."""
    layer, _, _ = make_layer([(5, 0)], ("exact", (4, 2)), 64, 64)
    pool, cls = layer.pool, layer.classes[0]
    pool.reserve({cls: 400})
    ids = pool.allocate(cls, torch.tensor([400]))
    pages = pool.gather(cls, ids)
    assert (layer.layouts[0].view(pages, "value") == 0).all()


@pytest.mark.parametrize("softcap, sinks", [(None, False), (4.0, False), (None, True), (4.0, True)])
@pytest.mark.parametrize(
    "queries, tokens", [(1, 1), (63, 63), (111, 111), (1, 111), (20, 111), (QUERY_BLOCK + 9, QUERY_BLOCK + 9)]
)
def test_prompt_attention(queries, tokens, softcap, sinks):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, queries, 32, generator=generator)
    k, v = (torch.randn(1, 2, tokens, 32, generator=generator) for _ in range(2))
    sink = torch.randn(6, generator=generator) if sinks else None
    out = prompt_attention(q, k, v, None, True, 0.2, softcap, sink)
    for head in range(6):
        for i in range(0, queries, 7):
            seen = tokens - queries + i + 1
            column = None if sink is None else sink[head : head + 1]
            want, _ = softmax_attention(
                0.2 * q[0, head, i : i + 1], k[0, head // 3, :seen], v[0, head // 3, :seen], softcap, column
            )
            assert relative_rms(out[0, head, i], want[0]) < 1e-5


@pytest.mark.parametrize("softcap, with_sinks", [(None, False), (4.0, True)])
def test_received_attention_is_the_paper_s_significance(softcap, with_sinks, monkeypatch):
    """max over the group of the mean over the queries behind a token; also when rows are taken one by one."""
    monkeypatch.setattr("hfkv.kernels.at_once.CACHE_BYTES", 1)
    generator = torch.Generator().manual_seed(4)
    rows, groups, queries, tokens = 3, 2, 5, 40
    q = torch.randn(rows, groups * queries, 16, generator=generator)
    k = torch.randn(rows, tokens, 16, generator=generator)
    sinks = torch.randn(rows, groups * queries, generator=generator) if with_sinks else None
    visible = torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None]
    got = received_exact(q, k, visible[None], groups, softcap, sinks)
    torch.testing.assert_close(received_exact(q, k, visible[None, :, -queries:], groups, softcap, sinks), got)
    for row in range(rows):
        for t in range(tokens):
            best = 0.0
            for g in range(groups):
                seen = []
                for i in range(queries):
                    last = tokens - queries + i
                    if t <= last:
                        n = g * queries + i
                        column = None if sinks is None else sinks[row, n : n + 1]
                        _, p = softmax_attention(
                            q[row, n : n + 1], k[row, : last + 1], k[row, : last + 1], softcap, column
                        )
                        seen.append(p[0, t].item())
                best = max(best, sum(seen) / len(seen))
            assert got[row, t].item() == pytest.approx(best, rel=1e-4)
