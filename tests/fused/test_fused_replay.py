"""Replay by its Triton kernel against the twin of `hfkv.kernels.replay`."""

import pytest
import torch
from host_reads import Watch
from oracle import relative_rms

from hfkv.kernels import replay as twin
from hfkv.kernels.replay import Asking
from hfkv.kernels.triton import replay as fused

BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3}
"""In half precision turned keys are rounded too."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    for module in (twin, fused):
        monkeypatch.setattr(module, "BLOCK", 64)
        monkeypatch.setattr(module, "OVERLAP", 5)


def turn(dim):
    """RoPE of the first half of the features with the second, back by so many positions as replay asks for."""
    angle = -twin.AHEAD * torch.logspace(0, -3, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = torch.eye(dim).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def check(batch, heads, groups, dim, tokens, queries, dtype=torch.float32, counts=None, stored=0, softcap=None):
    generator = torch.Generator().manual_seed(dim + tokens)
    q = torch.randn(batch, queries, heads * groups, dim, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)
    first = torch.randn(batch, heads, stored, dim, generator=generator).to(dtype) if stored else None
    asking = None
    if counts is not None:
        counts = torch.tensor(counts)
        own = counts.clamp_max(queries)  # real queries, left-aligned
        asking = Asking(counts, torch.where(own > 0, counts - own, -1))
        for row, count in enumerate(counts.tolist()):
            k[row, :, count:] = 1e4 if dtype == torch.float16 else float("inf")  # slots without a token
    terms = (asking, first, 1.5 * dim**-0.5, softcap, turn(dim))
    got = fused.most_received(q, k, *terms)
    want = twin.most_received(q, k.nan_to_num(0, 0, 0) if dtype == torch.float32 else k, *terms)
    assert got.dtype == torch.float32 and got.shape == (batch, heads, tokens)
    real = torch.ones(1, tokens, dtype=torch.bool) if counts is None else asking.real(tokens)
    real = real[:, None].expand(batch, heads, -1)
    assert relative_rms(got[real], want[real]) < BOUNDS[dtype]


@pytest.mark.parametrize("tokens", [1, 4, 63, 111, 200])
@pytest.mark.parametrize("dim, groups", [(64, 1), (80, 7), (96, 4)])
def test_a_prompt(tokens, dim, groups):
    check(1, 2, groups, dim, tokens, tokens)


@pytest.mark.parametrize("dim, groups, softcap", [(128, 8, None), (256, 1, 4.0)])
def test_in_half_precision(dim, groups, softcap):
    check(1, 1, groups, dim, 111, 111, torch.float16, softcap=softcap)


def test_a_chunk_behind_stored_tokens_and_a_window():
    """The prompt's first tokens are packed by now, and the first of the exact ones have no query."""
    check(2, 2, 2, 64, 140, 71, stored=4)
    check(1, 1, 3, 64, 90, 90, stored=3, softcap=2.0)


def test_sequences_that_differ():
    check(4, 2, 2, 64, 111, 111, counts=[111, 64, 3, 1])
    check(3, 1, 2, 64, 111, 40, counts=[111, 40, 7], stored=4)


def test_few_keys_matter_where_a_query_is_missing():
    """Without queries nothing is received; the mean of the others then stands for it."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, n, 32, generator=generator) for heads, n in ((2, 3), (1, 100)))
    got = fused.most_received(q, k, None, None, 0.2, None, None)
    assert (got[..., :97] >= got[..., 97:].mean() - 1e-6).all() and got.max() <= 1


def test_nothing_is_made_that_grows_with_the_square(monkeypatch):
    q, k = torch.randn(1, 2, 256, 32), torch.randn(1, 1, 256, 32)
    watch = Watch(monkeypatch)
    with watch:
        fused.most_received(q, k, None, None, 0.2, None, turn(32))
    assert watch.reads == [] and watch.largest <= q.numel()
