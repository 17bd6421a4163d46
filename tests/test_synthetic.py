"""Known orderings of quantisation errors on structured streams, and that the streams are what they say."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hfkv import LeanKVConfig
from hfkv.calibrate.coding import Coding, recoded
from hfkv.synthetic import STREAMS, Traits, stream

SEEDS = (0, 1, 2)
HARD = ("outliers", "biases", "all")


@cache
def drawn(name: str, seed: int):
    return stream(STREAMS[name], seed)


@cache
def errors(name: str, key_bits: int, value_bits: int, rotated: bool, shifted: bool) -> tuple[float, float]:
    """(relative RMS error of the output, KL of the attention), the mean over seeds."""
    pairs = []
    for seed in SEEDS:
        one = drawn(name, seed)
        k = recoded(one.k, Coding("key", key_bits, 0.0, rotated, shifted), None, LeanKVConfig())
        pairs.append(one.errors(k, recoded(one.v, Coding("value", value_bits, 0.0, rotated), None, LeanKVConfig())))
    return tuple(sum(column) / len(SEEDS) for column in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_keys_deserve_more_bits_than_values(name, rotated, shifted):
    if name == "outliers" and rotated and shifted:
        pytest.skip("nothing is left of the outliers: keys are as plain as values")
    assert errors(name, 8, 4, rotated, shifted)[0] < errors(name, 4, 8, rotated, shifted)[0]
    assert errors(name, 4, 2, rotated, shifted)[0] < errors(name, 2, 4, rotated, shifted)[0]


@pytest.mark.parametrize("name", STREAMS)
def test_rotated_keys_of_4_bits_keep_the_attention_better_than_plain_ones(name):
    for shifted in (False, True):
        assert errors(name, 4, 4, True, shifted)[1] < errors(name, 4, 4, False, shifted)[1]


@pytest.mark.parametrize("name", HARD)
def test_rotation_helps_the_output_where_channels_differ(name):
    for shifted in (False, True):
        assert errors(name, 4, 4, True, shifted)[0] < errors(name, 4, 4, False, shifted)[0]


@pytest.mark.parametrize("name", ["outliers", "biases"])
def test_mean_shift_takes_what_is_constant_over_tokens(name):
    assert errors(name, 4, 4, True, True)[1] < 0.9 * errors(name, 4, 4, True, False)[1]


@pytest.mark.parametrize("name", STREAMS)
def test_errors_fall_with_bits(name):
    for bits, fewer in ((8, 4), (4, 3), (3, 2)):
        assert errors(name, bits, 8, True, True)[1] < errors(name, fewer, 8, True, True)[1]
        assert errors(name, 8, bits, True, True)[0] < errors(name, 8, fewer, True, True)[0]


def test_plain_random_keys_flatter():
    for rotated in (False, True):
        assert errors("random", 4, 4, rotated, False)[1] < 0.5 * errors("all", 4, 4, rotated, False)[1]


def test_attention_falls_off_as_a_power_of_the_rank():
    one = stream(Traits(exponent=1.2), seed=3)
    p = one.attention(one.k, one.v)[0].exp().mean(1).sort(-1, descending=True).values.mean(0)  # [tokens]
    rank = torch.arange(4, 400).float()
    slope = torch.linalg.lstsq(torch.stack([rank.log(), torch.ones_like(rank)], 1), p[3:399].log()[:, None]).solution[0]
    assert slope.item() == pytest.approx(-1.2, abs=0.2)


def test_sinks_draw_attention_and_outliers_are_large_and_constant():
    one = drawn("sinks", 0)
    assert 0.25 < one.attention(one.k, one.v)[0].exp()[..., :4].sum(-1).mean() < 0.55
    k = drawn("outliers", 0).k
    largest = k.abs().mean((0, 1)).topk(4)
    assert largest.values.min() > 10 * k.abs().mean((0, 1)).median()
    assert (k[..., largest.indices].std(1) / k[..., largest.indices].mean(1).abs()).max() < 0.5


def test_exact_vectors_have_no_error():
    one = drawn("all", 0)
    output, kl = one.errors(one.k, one.v)
    assert output == 0 and kl == pytest.approx(0, abs=1e-6)
