"""Packs of codes: lossless whatever the codes are, never larger than raw, in the order that was asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv import LeanKVConfig, Packed
from hfkv.kernels.packing import bit_length, measure, pack, repack, unpack
from hfkv.kernels.quantize_pack import code_tokens
from hfkv.kernels.sealing import PACKS, bytes_per_token, is_full, pack_words, seal, unseal, words_of
from hfkv.packing import BLOCK, HEAD, PACK, REPACKS, PackedSide
from hfkv.quant import PageLayout, decode, encode

KINDS = ("random", "constant", "narrow", "mixed", "adversarial", "normal")


def codes_of(kind, count, tokens, dim, bits, seed):
    """Codes uint8 [count, tokens, dim] below 2 ** bits."""
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (count, tokens, dim), generator=generator)
    first = codes[:, :1].expand_as(codes)
    if kind == "constant":
        codes = first
    if kind == "narrow":
        codes = (first // 2 + codes % 2).clamp(max=top)
    if kind == "mixed":
        codes = torch.where(torch.rand(count, 1, dim, generator=generator) < 0.5, codes, first)
    if kind == "adversarial":  # every mini-pack needs all its bits, and no two tokens are alike
        codes = (torch.arange(tokens)[:, None] % 2 * top).expand_as(codes).clone()
        codes[:, tokens // 2 :] = top - codes[:, tokens // 2 :]
    if kind == "normal":
        spread = torch.randn(count, tokens, dim, generator=generator) + 2 * torch.randn(count, 1, dim)
        codes = ((spread + 4) / 8 * top).round().clamp(0, top)
    return codes.to(torch.uint8).contiguous()


# ---- packs


@given(
    st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 140), st.integers(1, 8), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=400, deadline=None)
def test_packs_are_lossless_and_never_larger_than_raw(kind, count, dim, bits, packed, seed):
    side = PackedSide(dim, bits, packed)
    codes = codes_of(kind, count, PACK, dim, bits, seed)
    data, size, raw = pack(side, codes)
    assert (size <= side.raw_bytes).all()
    assert torch.equal(size, measure(side, codes)[2])
    assert packed or raw.all()
    behind = torch.arange(data.shape[1]) >= size[:, None]
    assert (data[behind] == 0).all()
    data[behind] = 0xA5  # what lies behind a pack is another's
    assert torch.equal(unpack(side, data, raw), codes)


def test_bytes_of_known_packs():
    side = PackedSide(16, 4)
    assert side.header == (4 + 3) * 2
    constant = torch.full((1, PACK, 16), 9, dtype=torch.uint8)
    assert pack(side, constant)[1].item() == side.header  # width 0 stores nothing
    one = constant.clone()
    one[0, 3, 5] = 12  # 9 and 12: two bits above the minimum
    data, size, raw = pack(side, one)
    assert size.item() == side.header + 2 * 2 and not raw
    words = data[0, side.header : side.header + 4].view(torch.int16).tolist()
    assert words == [1 << 3, 1 << 3]
    every = torch.arange(16, dtype=torch.uint8).view(1, PACK, 1).expand(1, PACK, 16)
    assert pack(side, every)[1].item() == side.raw_bytes and pack(side, every)[2].item()  # raw, without a header


def test_bit_length():
    every = torch.arange(256, dtype=torch.uint8)
    want = [x.bit_length() for x in range(256)]
    assert bit_length(every).tolist() == want
    assert bit_length(every.repeat(100))[:256].tolist() == want  # the form for many numbers


# ---- orders


def median(codes):
    return sorted(codes)[(len(codes) - 1) // 2]


@pytest.mark.parametrize("how", REPACKS)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_orders(how, kind, seed):
    keys, values = codes_of(kind, 2, BLOCK, 12, 4, seed), codes_of(kind, 2, BLOCK, 7, 3, seed + 1)
    order = repack(keys, values, how)
    assert torch.equal(order.sort(1).values, torch.arange(BLOCK).expand(2, -1))
    for k, v, own in zip(keys.tolist(), values.tolist(), order.tolist(), strict=True):
        if how == "none":
            assert own == list(range(BLOCK))
        if how == "median":
            assert own == sorted(range(BLOCK), key=lambda t: median(v[t]))
        if how == "bucket":
            total = [sum(a) + sum(b) for a, b in zip(k, v, strict=True)]
            low, high = min(total), max(total)
            assert own == sorted(range(BLOCK), key=lambda t: (total[t] - low) * 4 // (high - low + 1))
        if how == "greedy":
            assert own == grown([a + b for a, b in zip(k, v, strict=True)])


def grown(tokens):
    """The greedy order, token by token."""
    left, order = list(range(BLOCK)), []
    while left:
        members = order[len(order) // PACK * PACK :]
        costs = {t: bits_of([tokens[m] for m in [*members, t]]) if members else 0 for t in left}
        order.append(min(left, key=costs.__getitem__))
        left.remove(order[-1])
    return order


def bits_of(tokens):
    """Bits of a token in mini-packs of these."""
    return sum((max(feature) - min(feature)).bit_length() for feature in zip(*tokens, strict=True))


def test_greedy_finds_what_belongs_together():
    """Four kinds of tokens, shuffled: packed by kind nothing but headers remains."""
    kinds = torch.randint(0, 16, (4, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = kinds[torch.arange(BLOCK) % 4][None]
    order = repack(codes, codes[..., :0], "greedy")
    side = PackedSide(32, 4)
    packs = codes[:, order[0]].unflatten(1, (-1, PACK)).flatten(0, 1)
    assert measure(side, packs)[2].tolist() == [side.header] * 4
    shuffled = codes.unflatten(1, (-1, PACK)).flatten(0, 1)
    assert measure(side, shuffled)[2].min() > 4 * side.header


# ---- pages


TIERS = [
    Packed(),
    Packed(key_bits=4, value_bits=2),
    Packed(key_bits=8, value_bits=3, sides="keys", repack="none"),
    Packed(rel_key=0.01, value_bits=4, sides="values", repack="median"),
    Packed(rel_key=0.3, rel_value=0.5, repack="bucket"),
]


@pytest.mark.parametrize("tier", TIERS, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (72, 100), (16, 24)], ids=str)
@pytest.mark.parametrize("scored", [True, False])
def test_pages_come_back_with_all_that_belongs_to_their_tokens(tier, dims, scored):
    layout = PageLayout.of(tier, dims, torch.float32, "fitted", BLOCK, scored)
    pages = full_pages(layout, 5)
    packs, words = seal(layout, pages)
    assert packs.shape == (5, PACKS, pack_words(layout))
    assert torch.equal(words_of(layout, packs.flatten(0, 1)), words.flatten())
    inside = torch.arange(packs.shape[2]) < words[..., None]
    again = unseal(layout, torch.where(inside, packs, -1))
    assert [tokens_of(layout, page) for page in again] == [tokens_of(layout, page) for page in pages]
    if tier.repack == "none":
        assert torch.equal(again, pages)
    assert HEAD + PACK * layout.token_bytes + 8 >= 8 * int(words.max())


def test_bytes_per_token_are_those_of_the_packs():
    """Offsets in the channels are what packing gains on, rotated or not; without them it gains nothing."""
    plain, packed = (PageLayout.of(t, (64, 64), torch.float32, "fitted", BLOCK, False) for t in ((4, 2), TIERS[1]))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    offset = 4 * torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    assert bytes_per_token(packed, x + offset, x) < 0.9 * plain.token_bytes < bytes_per_token(packed, x, x)
    with pytest.raises(ValueError, match="63 tokens"):
        bytes_per_token(packed, x[:63], x[:63])


def full_pages(layout, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, pages = count * BLOCK, torch.zeros(count, layout.page_bytes, dtype=torch.uint8)
    keys = torch.randn(n, layout.key.dim, generator=generator) + 3 * torch.randn(1, layout.key.dim, generator=generator)
    values = torch.randn(n, layout.value.dim, generator=generator)
    score = torch.rand(n, generator=generator)
    for name, part in code_tokens(layout, keys, values, score, torch.arange(n)).items():
        part = part.unflatten(0, (count, BLOCK))
        layout.view(pages, name).copy_(part.transpose(1, 2) if name == "value" else part)
    assert is_full(layout, pages).all()
    return pages


def tokens_of(layout, page):
    """The tokens of a page as a sorted list of bytes: order does not count."""
    parts = []
    for name in ("key", "value", *layout.meta_names):
        part = layout.view(page[None], name)[0]
        part = part.T if name == "value" else part
        parts.append(part.reshape(BLOCK, -1).contiguous().view(torch.uint8))
    return sorted(bytes(row) for row in torch.cat(parts, 1).tolist())


# ---- error-bounded codes


@given(
    st.floats(0.005, 0.5),
    st.sampled_from([16, 64, 80]),
    st.sampled_from([1e-3, 0.1, 1.0]),
    st.floats(0, 2),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_bound_holds(bound, dim, size, shift, seed):
    codec = PageLayout.of(Packed(rel_key=bound), (dim, dim), torch.float32, "fitted", BLOCK, False).key
    x = (torch.randn(30, dim, generator=torch.Generator().manual_seed(seed)) + shift) * size
    x[::3, seed % dim] *= 8  # outliers stretch the range
    codes, scale, zero = encode(codec, x)
    error = (decode(codec, codes, scale, zero) - x).abs().amax(1)
    spread = x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)
    assert (error <= 0.5001 * bound * spread + 2e-5).all()


# ---- config


def test_config_survives_json():
    config = LeanKVConfig(
        tiers=[(8, 4), Packed(rel_key=0.05, value_bits=2, sides="keys")], layers={2: {"tiers": [(8, 8), Packed()]}}
    )
    again = LeanKVConfig.from_json(config.to_json())
    assert again == config and hash(again.tiers) == hash(config.tiers)
    assert again.packs and again.for_layer(2).tiers[1] == Packed(rel_key=0.1, rel_value=0.2)
    assert LeanKVConfig(layers={1: {"tiers": [(8, 4), Packed()]}}).packs and not LeanKVConfig().packs


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rel_key": 0.0}, "rel_key"),
        ({"rel_value": 0.6}, "rel_value"),
        ({"rel_key": "0.1"}, "rel_key"),
        ({"rel_key": True}, "rel_key"),
        ({"key_bits": 5}, "key_bits"),
        ({"value_bits": 4, "rel_value": 0.1}, "value_bits"),
        ({"sides": "key"}, "sides"),
        ({"repack": "best"}, "repack"),
    ],
    ids=str,
)
def test_invalid_fields_are_named(fields, named):
    with pytest.raises(ValueError, match=f"Packed.{named}"):
        Packed(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codec": "minmax"}, "codec"),
        ({"page_tokens": 32}, "page_tokens"),
        ({"tiers": [{"rel_keys": 0.1}]}, "rel_keys"),
    ],
    ids=str,
)
def test_invalid_combinations(fields, message):
    with pytest.raises(ValueError, match=message):
        LeanKVConfig(**{"tiers": [Packed()], **fields})
