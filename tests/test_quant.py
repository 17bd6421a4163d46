import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv.config import BITS
from hfkv.kernels.compaction import clear, put, take
from hfkv.kernels.folding import planes_together
from hfkv.kernels.quantize_pack import code_tokens, unpack_tokens
from hfkv.quant import Codec, PageLayout, decode, encode, pack_codes, rotation, spread_plane, unpack_codes

TIERS = [(k, v) for k in BITS for v in BITS]


def rms(error, truth):
    return (error.norm() / truth.norm()).item()


@pytest.mark.parametrize("dim", [12, 16, 20, 24, 28, 40, 48, 56, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256])
def test_rotation_is_orthogonal_and_named(dim):
    matrix, name = rotation(dim, seed=0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=2e-6, rtol=0)
    assert ("hadamard" in name) == (dim not in (72, 100))
    assert torch.equal(matrix, rotation(dim, seed=0)[0])
    assert matrix.is_contiguous()  # kernels read it row by row
    if "hadamard" in name:
        torch.testing.assert_close(matrix.abs(), torch.full((dim, dim), dim**-0.5))


@given(st.sampled_from([8, 4, 3, 2]), st.integers(1, 80), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_packing_is_lossless(bits, dim, count, random):
    codec = Codec(bits, dim, "affine")
    levels = torch.tensor([[random.randrange(2**bits) for _ in range(dim)] for _ in range(count)], dtype=torch.uint8)
    packed = pack_codes(levels, codec)
    assert packed.shape == (count, codec.rows)
    assert torch.equal(unpack_codes(packed, codec), levels)
    planes = [spread_plane(packed[:, first : first + rows], bits) for first, rows, bits in codec.planes]
    side_by_side = torch.cat([fields.movedim(0, 1).flatten(1) for fields in planes], 1)
    assert side_by_side.shape == (count, codec.columns)
    assert torch.equal(side_by_side.float() @ planes_together(codec), levels.float())


@pytest.mark.parametrize("scheme", ["fitted", "minmax"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_error_of_normal_vectors(bits, dim, scheme):
    x = torch.randn(400, dim, generator=torch.Generator().manual_seed(bits * dim))
    bound = {8: 0.012, 4: 0.14, 3: 0.24, 2: 0.58}[bits]  # min/max wastes levels at 2 bits
    for side in ("key", "value"):
        codec = Codec.of((bits, bits), side, dim, torch.float32, scheme)
        assert rms(decode(codec, *encode(codec, x)) - x, x) < bound


@pytest.mark.parametrize("bits", [2, 3])
def test_fitted_codes(bits):
    """Values keep <x, code> unbiased, keys have the least squared error that a rescaling can give."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    value = Codec.of((bits, bits), "value", 64, torch.float32, "fitted")
    back = decode(value, *encode(value, x))
    torch.testing.assert_close((x * back).sum(-1), x.square().sum(-1), rtol=0.035, atol=0)  # one scale byte: 2.9 %
    key = Codec.of((bits, bits), "key", 64, torch.float32, "fitted")
    assert rms(decode(key, *encode(key, x)) - x, x) <= rms(back - x, x)


@pytest.mark.parametrize("scheme", ["fitted", "minmax"])
@pytest.mark.parametrize("tier", TIERS)
def test_constant_and_zero_vectors(tier, scheme):
    for value in (0.0, 3.25, -7.5):
        x = torch.full((2, 32), value)
        for side in ("key", "value"):
            codec = Codec.of(tier, side, 32, torch.float32, scheme)
            back = decode(codec, *encode(codec, x))
            assert torch.isfinite(back).all()
            bound = 0.3 if codec.kind == "fitted" else 0.05
            assert (back - x).abs().max() <= bound * abs(value) + 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tier", [(8, 4), (4, 2), (3, 3), "exact"])
@pytest.mark.parametrize("scheme", ["fitted", "minmax"])
def test_nan_and_infinity_are_errors(bad, tier, scheme):
    x = torch.randn(5, 32)
    x[3, 7] = bad
    for side in ("key", "value"):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            encode(Codec.of(tier, side, 32, torch.float32, scheme), x)


def test_a_scale_beyond_its_format_is_an_error():
    x = torch.full((1, 32), 5e6)
    with pytest.raises(ValueError, match=r"5e\+06.*minmax"):
        encode(Codec.of((4, 2), "key", 32, torch.float32, "fitted"), x)
    with pytest.raises(ValueError, match="exact"):
        encode(Codec.of((4, 2), "key", 32, torch.float32, "minmax"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tier", [(8, 4), (4, 2), (3, 3), (2, 8), "exact"])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 96), (192, 128), (20, 10)], ids=str)
def test_tokens_survive_half_filled_poisoned_pages(tier, dtype, dims):
    """What is put into some slots comes back, whatever lies in the free ones."""
    key_dim, value_dim = dims
    layout = PageLayout(
        Codec.of(tier, "key", key_dim, dtype, "fitted"), Codec.of(tier, "value", value_dim, dtype, "fitted"), 32, True
    )
    generator = torch.Generator().manual_seed(1)
    k, v = (
        torch.randn(37, key_dim, generator=generator).to(dtype),
        torch.randn(37, value_dim, generator=generator).to(dtype),
    )
    tokens = code_tokens(layout, k, v, torch.rand(37, generator=generator), torch.arange(37))
    pages = torch.randint(0, 256, (3, layout.page_bytes), dtype=torch.uint8, generator=generator)
    slots = torch.randperm(96, generator=generator)[:37]
    put(layout, pages, slots, tokens)
    back = take(layout, pages, slots)
    for name, data in tokens.items():
        assert torch.equal(back[name], data), name
    keys, values = unpack_tokens(layout, back)
    if tier == "exact":
        assert torch.equal(keys.to(dtype), k)
        assert torch.equal(values.to(dtype), v)
    free = torch.ones(96, dtype=torch.bool)
    free[slots] = False
    clear(layout, pages, free.view(3, 32))
    for name in layout.meta_names:
        part = layout.view(pages, name).flatten()
        assert (part[free] == 0).all()
        assert torch.equal(part[slots], tokens[name])


def test_the_table_of_bytes():
    """Bytes per token and head at head_dim 128: codes, one-byte scales and zeros, fp16 score, int32 birth."""

    def bytes_of(tier, scheme="fitted", scored=False, dim=128):
        codecs = [Codec.of(tier, side, dim, torch.bfloat16, scheme) for side in ("key", "value")]
        return PageLayout(*codecs, 64, scored).token_bytes

    assert bytes_of((8, 4)) == 128 + 64 + 4
    assert bytes_of((4, 2)) == 64 + 32 + 3
    assert bytes_of((4, 3)) == 64 + 48 + 3
    assert bytes_of((4, 2), "minmax") == 64 + 32 + 8
    assert bytes_of((4, 2), scored=True) == 64 + 32 + 3 + 6
    assert bytes_of("exact") == 512
    assert bytes_of((8, 4), dim=64, scored=True) == 106


@pytest.mark.parametrize("tier", [*TIERS, "exact"])
@pytest.mark.parametrize("tokens", [32, 64])
def test_parts_of_a_page_do_not_overlap_and_are_aligned(tier, tokens):
    layout = PageLayout(
        Codec.of(tier, "key", 80, torch.float16, "minmax"),
        Codec.of(tier, "value", 96, torch.float16, "minmax"),
        tokens,
        True,
    )
    end = 0
    for start, stop in layout.fields.values():
        assert start == end
        assert start % 16 == 0
        end = stop
    assert end == layout.page_bytes
