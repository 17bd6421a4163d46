"""Flushes of packed tiers by kernels, which open the pages that they change, against the twin."""

import copy

import pytest
import test_compaction
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compaction import check_same, packed_layer
from test_sealed import check_pool

from hfkv import Packed
from hfkv.kernels.triton import packing
from hfkv.paging.rooms import NOTHING
from hfkv.paging.sharing import select_rows

AS_THEY_LIE = dict(repack="none")  # a code that rounds the other way moves no token
FIXED = Packed(key_bits=4, value_bits=2, **AS_THEY_LIE)
BOUNDED = Packed(rel_key=0.05, rel_value=0.2, **AS_THEY_LIE)

CASES = [
    (((8, 4), FIXED), (32, 32), torch.float32),
    (((8, 4), BOUNDED), (24, 20), torch.float32),
    ((Packed(key_bits=8, value_bits=8, **AS_THEY_LIE), BOUNDED), (16, 24), torch.float32),
    ((BOUNDED,), (32, 32), torch.float16),
    (("exact", Packed(key_bits=3, value_bits=3, sides="keys", **AS_THEY_LIE)), (16, 16), torch.float16),
]


def flush(layer, *args, on_device):
    if on_device:
        layer.pool.sealer = packing.seal
    test_compaction.flush(layer, *args, on_device=on_device)
    layer.settle()


@pytest.mark.parametrize("tiers, dims, dtype", CASES, ids=["demoted", "bounded", "both packed", "one tier", "exact"])
def test_flushes_do_what_the_twin_does(tiers, dims, dtype):
    """Tokens enter, are demoted and pruned; pages fill, are sealed, opened, emptied."""
    layer, first = packed_layer(2, tiers, dims, dtype, 64), 0
    weights = [0.8, 0.0, 0.2] if len(tiers) == 1 else [0.3, 0.6, 0.1]
    for number, counts in enumerate(([130, 70], [40, 0])):
        twin = copy.deepcopy(layer)
        for each in (twin, layer):
            given = (counts, first, torch.Generator().manual_seed(number), weights)
            flush(each, *given, on_device=each is layer)
            check_pool(each.pool)
        check_same(layer, twin, 4e-4)
        if number == 0:
            assert any((sealed.address[:, 1] != NOTHING).any() for sealed in layer.pool._sealed)
        first += max(counts)
    layer.release()
    assert layer.pool.used_bytes == layer.pool.slack_bytes == 0


@given(
    st.lists(st.lists(st.integers(0, 70), min_size=2, max_size=2), min_size=2, max_size=2),
    st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=3, max_size=3).filter(lambda w: sum(w) > 0),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=4, deadline=None)
def test_no_token_is_lost_whatever_is_demanded(flushes, weights, shared, seed):
    layer = packed_layer(2, (Packed(key_bits=8, value_bits=8, **AS_THEY_LIE), FIXED), tokens=64)
    for number, counts in enumerate(flushes):
        twin = copy.deepcopy(layer)
        for each in (twin, layer):
            given = (counts, 100 * number, torch.Generator().manual_seed(seed + number), weights)
            flush(each, *given, on_device=each is layer)
            check_pool(each.pool)
        check_same(layer, twin, 1e-3)
        if shared:  # a page of two rows is copied when one of them is to change it
            select_rows(layer, torch.tensor([0, 0]))


def test_pages_that_do_not_change_have_no_part_in_it():
    """Row 0 gets nothing: its page is not opened, and what is cleared in its free slots reaches no other page."""
    layer = packed_layer(2, (FIXED,), tokens=64)
    for number, counts in enumerate(([70, 90], [0, 40])):
        twin = copy.deepcopy(layer)
        for each in (twin, layer):
            flush(
                each, counts, 90 * number, torch.Generator().manual_seed(number), [1.0, 0, 0], on_device=each is layer
            )
        check_same(layer, twin)
