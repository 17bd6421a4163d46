"""Flushes by kernels over pages that rows share: the same as the twin's, and no page of another row is changed."""

import copy

import pytest
import torch
from shared_pages import check_owners, contents
from test_compaction import check_same, flush, packed_layer

from hfkv.kernels.triton.compaction import copy_pages
from hfkv.kernels.triton.quantize_pack import TierPages
from hfkv.paging.sharing import select_rows

CASES = {
    "K8V4": (((8, 4),), [1.0, 0.0, 0.0]),
    "K8V4-K4V2-pruned": (((8, 4), (4, 2)), [0.5, 0.3, 0.2]),
    "one-class": (((8, 4), (8, 4)), [0.4, 0.4, 0.2]),
    "exact": (("exact",), [1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("tiers, weights", CASES.values(), ids=CASES)
def test_flushes_of_shared_pages_do_what_the_twin_does(tiers, weights):
    layer = packed_layer(2, tiers)
    flush(layer, [50, 75], 0, torch.Generator().manual_seed(9), weights, on_device=False)
    first = 100
    for number, (index, counts) in enumerate(
        (([1, 1, 0], [9, 0, 30]), ([2, 0, 0], [0, 5, 40]), ([2, 2, 1], [8, 8, 8]))
    ):
        select_rows(layer, torch.tensor(index))
        twin = copy.deepcopy(layer)
        flush(twin, counts, first, torch.Generator().manual_seed(number), weights, on_device=False)
        flush(layer, counts, first, torch.Generator().manual_seed(number), weights, on_device=True)
        check_same(layer, twin, 1e-3)
        for each in (layer, twin):
            check_owners(each.pool, [each])
        assert layer.pool.copied_bytes == twin.pool.copied_bytes
        assert layer.pool.used_bytes == twin.pool.used_bytes
        first += 50
    assert layer.pool.copied_bytes > 0


@pytest.mark.parametrize("tier", [0, 1])
def test_copied_pages_are_those_that_were_asked_for(tier):
    layer = packed_layer(3, ((8, 4), (4, 2)))
    flush(layer, [40, 90, 10], 0, torch.Generator().manual_seed(1), [0.5, 0.5, 0.0], on_device=False)
    select_rows(layer, torch.tensor([0, 1, 1, 1]))
    pool, before, cls = layer.pool, contents(layer), layer.classes[tier]
    counts = layer.page_counts(tier)
    copied = torch.arange(int(counts.max())) + 1 == counts[:, None]  # every row's last page
    copied[1] = False
    asked, free = int(copied.sum()), 0
    pool.reserve({cls: asked})
    free = pool._classes[cls].free
    old, ids = TierPages(layer.table.ids, pool.chunk_addresses, layer.layouts[tier], tier), layer.table.ids.clone()
    pool.owners.join(layer.table.pages(tier, counts)[0][:1])  # of row 0, which is copied though nobody shares it
    copy_pages(old, ids, copied, pool.owners.extra, *pool.free_list(cls))
    pool.note_exchange(cls, 0, asked)
    changed = ids != layer.table.ids
    assert int(changed.sum()) == asked == free - pool._classes[cls].free
    layer.table.ids = ids
    assert contents(layer) == before
    if counts[0] == 1:
        pool.release(cls, old.ids[0, [0 if tier == 0 else -1]])
        check_owners(pool, [layer])
