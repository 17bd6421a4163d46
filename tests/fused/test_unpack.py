"""Vectors of rows read by the kernel, for all slots that there may be, against the twin's lists of pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_rms
from test_compaction import flush, packed_layer

from hfkv.kernels.triton.quantize_pack import TierPages
from hfkv.kernels.triton.unpack import unpack_rows

CASES = {
    "k8v4 and k4v2": ([(8, 4), (4, 2)], (16, 16), torch.float32, "fitted"),
    "k3v8 and k2v3, fp16": ([(3, 8), (2, 3)], (20, 32), torch.float16, "fitted"),
    "minmax": ([(8, 3), (3, 8)], (16, 40), torch.float32, "minmax"),
    "exact, fp16": (["exact"], (24, 16), torch.float16, "fitted"),
}


def check_vectors(layer, extra=0):
    """Every tier and side; also slots of `extra` pages behind the longest row."""
    for tier, layout in enumerate(layer.layouts):
        pages = TierPages(layer.table.ids, layer.pool.chunk_addresses, layout, tier)
        width = (layer.widest[tier] + extra) * layout.tokens
        free = torch.arange(width) >= layer.table.lengths[:, tier, None]
        for side in ("key", "value"):
            want = layer.vectors(side, tier, width)
            got = unpack_rows(pages, layer.table.lengths, layer.basis, side, width)
            assert got.shape == want.shape == (layer.rows, width, getattr(layout, side).dim)
            assert relative_rms(got, want) < 1e-6 or not width
            assert not got[free].any() and not want[free].any()


@pytest.mark.parametrize("tiers, dims, dtype, scheme", CASES.values(), ids=CASES)
def test_vectors_are_the_twins(tiers, dims, dtype, scheme):
    layer = packed_layer(3, tiers, dims, dtype, scheme=scheme)
    weights = [0.4, 0.5, 0.1] if len(tiers) > 1 else [0.9, 0.0, 0.1]
    flush(layer, [70, 0, 33], 0, torch.Generator().manual_seed(0), weights, on_device=False)
    check_vectors(layer, extra=1)


@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    tokens=st.sampled_from([16, 32]),
)
def test_vectors_of_ragged_rows(counts, seed, tokens):
    """Rows of any lengths, some with nothing, after a second flush that moves tokens between tiers."""
    layer, generator = packed_layer(len(counts), [(8, 4), (4, 2)], tokens=tokens), torch.Generator().manual_seed(seed)
    flush(layer, counts, 0, generator, [0.3, 0.5, 0.2], on_device=False)
    flush(layer, [7] * len(counts), 90, generator, [0.1, 0.5, 0.4], on_device=False)
    check_vectors(layer)
