"""The kernel that seals pages, byte for byte its twin."""

import pytest
import torch
from test_packing import TIERS, full_pages

from hfkv import Packed
from hfkv.kernels import sealing
from hfkv.kernels.triton.packing import seal
from hfkv.packing import BLOCK
from hfkv.quant import PageLayout

MORE = [
    Packed(key_bits=3, value_bits=3, repack="median", sides="keys"),
    Packed(rel_key=0.05, rel_value=0.1, repack="greedy", sides="values"),
    Packed(key_bits=8, value_bits=8),
]


@pytest.mark.parametrize("tier", TIERS + MORE, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (72, 20)], ids=str)
def test_seals_as_its_twin(tier, dims):
    layout = PageLayout.of(tier, dims, torch.float32, "fitted", BLOCK, dims == (64, 64))
    pages = full_pages(layout, 2)
    packs, words = seal(layout, pages)
    want, want_words = sealing.seal(layout, pages)
    assert torch.equal(words, want_words)
    assert torch.equal(packs, want)
