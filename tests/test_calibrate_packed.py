"""Calibration with packed tiers: their bytes and errors against the real cache, and that the smaller one is taken."""

from __future__ import annotations

import csv
import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import measured_and_real
from tiny import byte_tokenizer, tiny_llama

from hfkv import LeanKVConfig, Packed, cli
from hfkv.calibrate import calibrate
from hfkv.calibrate.choose import compared
from hfkv.calibrate.options import SHARES, Basis, Option, Packs, Sizes, config_of
from hfkv.calibrate.packs import PackSizes, packed_options, undominated
from hfkv.calibrate.plan import Planner
from hfkv.calibrate.recording import Recording, filled
from hfkv.calibrate.result import LayerResult, Packing
from hfkv.kernels.sealing import ADDRESS, PACKS, bytes_per_token
from hfkv.packing import BLOCK, WORD
from hfkv.quant import rotation

K4V2 = Packed(key_bits=4, value_bits=2, sides="keys", repack="none")
PLANE = Basis((True, False), (True, True), False)


def tiny():
    return tiny_llama(num_hidden_layers=3, num_key_value_heads=4, head_dim=32, max_position_embeddings=2048)


def noise(tokens: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Tokens that have nothing in common: packing has nothing to take."""
    ids = torch.randint(1, 256, (tokens + 24,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids[:tokens], ids[tokens:]


def runs(tokens: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Runs of the same token, whose vectors are alike: packing takes most of their codes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (tokens // 64 + 1,), generator=generator).repeat_interleave(64).tolist()
    return ids[:tokens], torch.randint(1, 256, (24,), generator=generator).tolist()


@cache
def records(make=runs) -> list[Recording]:
    return [Recording(tiny(), make(tokens, seed=tokens), LeanKVConfig()) for tokens in (500, 900)]


@cache
def measured(make=runs) -> dict[int, Sizes]:
    """Sizes of every layer, with all packed options."""
    found = {}
    for layer in records(make)[0].layers:
        found[layer] = Sizes.of(records(make), layer, SHARES, torch.float32, BLOCK)
        packs = PackSizes(records(make), layer, Basis(), found[layer])
        found[layer].packs.update(packs.best(option) for option in packed_options((8, 4, 3)))
    return found


# ---- bytes and errors against the real cache ---------------------------------------------------------------------


OPTIONS = [
    Option(Packed(key_bits=4, value_bits=2)),
    Option(Packed(key_bits=3, value_bits=4, sides="keys", repack="none"), rotate_keys=False),
    Option(Packed(), rotate_keys=False),
    Option(Packed(key_bits=8, value_bits=8, repack="none")),
    Option(Packed(key_bits=4, value_bits=2), 0.1, rotate_keys=False),
    Option(K4V2, 0.03),
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option} {option.tier.repack}")
def test_a_measurement_is_what_the_real_cache_does(option):
    for basis in (Basis(), PLANE):
        alone, real = measured_and_real(tiny(), records()[0], option, basis)
        assert alone == pytest.approx(real, rel=0.01)
        assert real > 1e-6


@pytest.mark.parametrize("make", [runs, noise])
@pytest.mark.parametrize("place", range(0, 64, 7))
def test_words_and_chunks_are_those_of_the_real_cache(make, place):
    sizes = measured(make)
    layers = list(sizes)
    options = {layer: [list(sizes[layer].packs)[place]] for layer in layers}
    planner = Planner(sizes, options, {layer: torch.zeros(1) for layer in layers})
    choice = planner.cheapest()
    config = config_of(LeanKVConfig(), choice.options, dict.fromkeys(layers, Basis()), None)
    pools = [filled(tiny(), one.prompt, config).pools[0] for one in records(make)]
    physical = sum(pool.physical_bytes for pool in pools) / len(pools)
    assert choice.bytes == pytest.approx(physical, rel=0.08)  # chunks of a pool that is still small
    for number, pool in enumerate(pools):
        used = 0
        for layer, (option,) in options.items():
            own, packs = sizes[layer], sizes[layer].packs[option]
            layouts = option.layouts(own)
            used += WORD * int(packs.words[number]) + int(packs.loose[number]) * layouts[-1].page_bytes
            high = -(-own.high[option.share][number] // BLOCK) if option.share else torch.zeros(1)
            used += int(high.sum()) * layouts[0].page_bytes
        assert used == pool.used_bytes


@pytest.mark.parametrize("repack", ["none", "greedy"])
@pytest.mark.parametrize("sides", ["keys", "both"])
def test_words_are_those_that_sealing_says(repack, sides):
    basis, layer = Basis(), 1
    sizes = Sizes.of(records(), layer, SHARES, torch.float32, BLOCK)
    option = Option(Packed(rel_key=0.1, value_bits=3, sides=sides, repack=repack), rotate_keys=False)
    words = PackSizes(records(), layer, basis, sizes).words(0, option)
    one = records()[0]
    keys, values = (one.packed(layer, side) for side in ("key", "value"))
    values = values @ rotation(values.shape[-1], 0)[0]
    for key, value, own in zip(keys, values, words.chunk(len(keys)), strict=True):
        said = bytes_per_token(option.layouts(sizes)[0], key, value)
        assert float(own.sum()) * WORD / (len(own) // PACKS * BLOCK) + ADDRESS * PACKS / BLOCK == pytest.approx(said)


def test_the_order_that_takes_fewest_words_is_chosen():
    sizes = Sizes.of(records(), 0, SHARES, torch.float32, BLOCK)
    packs = PackSizes(records(), 0, Basis(), sizes)
    for tier in (Packed(key_bits=4, value_bits=4), Packed()):
        best, held = packs.best(Option(tier, rotate_keys=False))
        for sides, repack in itertools.product(("keys", "both"), ("none", "greedy") if tier.rel_value else ("none",)):
            other = Option(
                Packed(tier.rel_key, tier.rel_value, tier.key_bits, tier.value_bits, sides, repack), 0, False
            )
            assert int(packs.words(0, best).sum()) <= 1.01 * int(packs.words(0, other).sum())
        assert best.tier.sides == "both"  # alike tokens have alike values
        assert held.words.tolist() == [int(packs.words(i, best).sum()) for i in (0, 1)]


def test_a_prompt_shorter_than_a_block_has_no_packs():
    one = [Recording(tiny(), noise(110), LeanKVConfig())]
    sizes = Sizes.of(one, 0, SHARES, torch.float32, BLOCK)
    for share in (0.0, 0.1):
        _, packs = PackSizes(one, 0, Basis(), sizes).best(Option(K4V2, share))
        assert (packs.words.tolist(), packs.pages.tolist(), packs.loose.tolist()) == ([0], [4], [4])


# ---- the choice --------------------------------------------------------------------------------------------------


PLAIN, PACKED = Option((4, 4)), Option(Packed(key_bits=4, value_bits=4, sides="keys", repack="none"))


def planner(share: float, more_error: float = 1.0, layers: int = 6) -> Planner:
    """Layers whose packs take this share of the plain codes, at so many times their error."""
    sizes = {}
    for layer in range(layers):
        tokens, heads = torch.tensor([6400]), 4
        size = Sizes({"key": 64, "value": 64}, tokens, {0.0: torch.zeros(1, heads)}, BLOCK, torch.float32, "fitted")
        words = int(share * 6400 * heads * size_of(size) / WORD)
        size.packs[PACKED] = Packs(torch.tensor([words]), torch.tensor([400]), torch.tensor([0]))
        sizes[layer] = size
    errors = torch.tensor([0.001, 0.001 * more_error], dtype=torch.float64)
    return Planner(sizes, {layer: [PLAIN, PACKED] for layer in sizes}, dict.fromkeys(sizes, errors))


def size_of(sizes: Sizes) -> int:
    return PLAIN.layouts(sizes)[0].token_bytes


@pytest.mark.parametrize(("share", "packed"), [(0.7, True), (0.9, True), (0.98, False), (1.02, False)])
def test_the_smaller_one_is_taken_at_equal_error(share, packed):
    """Slack, addresses and the growth of the pool take what packs spare of 2 %."""
    choice = planner(share).within_error(0.0061)
    assert {option.packed for option in choice.options.values()} == {packed}
    most = planner(share).uniform(PLAIN).bytes
    assert choice.bytes < most if packed else choice.bytes == most


def test_packs_with_more_error_are_taken_where_it_is_left():
    own = planner(0.7, more_error=3.0)
    assert own.within_error(0.0061) is not None
    assert not any(option.packed for option in own.within_error(0.0061).options.values())
    some = own.within_error(0.0125).options.values()  # 6 layers at 0.001, three of them at 0.003
    assert 0 < sum(option.packed for option in some) <= 3
    assert all(option.packed for option in own.within_error(0.0181).options.values())


def test_the_smallest_option_of_a_layer():
    own = planner(0.7, more_error=3.0)
    assert own.smallest(0, 0.001, packed=False) == PLAIN
    assert own.smallest(0, 0.001, packed=True) is None
    assert own.smallest(0, 0.003, packed=True) == PACKED


def test_a_layer_is_compared_at_no_more_error_than_it_has():
    sizes = dict.fromkeys([0], planner(0.7)._sizes[0])
    options, errors = [Option("exact"), PLAIN], torch.tensor([0.0, 0.001], dtype=torch.float64)
    plain, packed = Planner(sizes, {0: options}, {0: errors}), planner(0.7, more_error=3.0, layers=1)
    assert compared(plain, packed, LayerResult(0, PLAIN, Basis(), 0.001, 0.0, 0)).packed is None
    loose = compared(plain, packed, LayerResult(0, PLAIN, Basis(), 0.002, 0.001, 0))
    assert (loose.plain, loose.packed, loose.taken) == (PLAIN, PACKED, False) and loose.saved > 0.2
    taken = compared(plain, packed, LayerResult(0, PACKED, Basis(), -1e-9, 0.0, 0))
    assert (taken.plain, taken.packed, taken.taken) == (Option("exact"), PACKED, True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_only_packed_options_that_another_one_beats_are_left_out(rows):
    choices = [
        (Option(Packed(rel_key=0.005 + i / 100)) if packed else Option((4, 2), i / 100), float(size), float(error))
        for i, (packed, size, error) in enumerate(rows)
    ]
    kept = set(undominated(choices))
    assert kept.issuperset(option for option, _, _ in choices if not option.packed)
    for option, size, error in choices:
        better = [o for o, s, e in choices if s <= size and e <= error and (s, e) != (size, error)]
        assert option in kept or kept.intersection(better)
        assert not (option.packed and option in kept and better)


def test_what_is_said_of_a_layer():
    assert str(Packing(PLAIN, 1000, PACKED, 900, True)) == "saves 10.0%, taken"
    assert str(Packing(PLAIN, 1000, PACKED, 1021, False)) == "costs 2.1%, not taken"
    assert str(Packing(PLAIN, 1000, None, None, False)) == "none errs as little"


# ---- end to end --------------------------------------------------------------------------------------------------


@cache
def calibrated(make, packed: bool):
    return calibrate(tiny(), [make(900)], kl=0.05, packed=packed)


def test_packed_tiers_are_taken_where_the_real_cache_is_smaller_with_them():
    result, plain = calibrated(runs, True), calibrated(runs, False)
    assert result.config.packs and result.reached and result.taken.kl <= 0.05
    assert result.taken.ratio < 0.95 * plain.taken.ratio
    assert [x.config for x in result.attempts if not x.config.packs] == [x.config for x in plain.attempts]
    again = LeanKVConfig.from_json(result.config.to_json())
    assert again == result.config
    report = filled(tiny(), runs(900), again).report()
    assert (report.physical_bytes, report.exact_bytes) == (result.taken.physical_bytes, result.taken.exact_bytes)
    assert report.bytes["pack_headers"] > 0
    check_layers(result.layers)
    assert any(x.packing.taken for x in result.layers)
    for layer in result.layers:
        assert again.for_layer(layer.index).tiers == layer.option.tiers
        assert again.for_layer(layer.index).rotate_keys == layer.option.coding("key", layer.basis).rotate


def check_layers(layers: list[LayerResult]) -> None:
    for x in layers:
        assert x.packing.taken == x.option.packed == isinstance(x.option.tier, Packed)
        assert not x.packing.plain.packed
        assert x.packing.packed is None or x.packing.packed.packed
        held = x.packing.packed if x.option.packed else x.packing.plain
        assert held == x.option


def test_plain_tiers_are_kept_where_packing_spares_nothing():
    result, plain = calibrated(noise, True), calibrated(noise, False)
    assert not result.config.packs
    assert result.config == plain.config
    check_layers(result.layers)
    assert plain.best(packed=True) is None and all(x.packing is None for x in plain.layers) and not plain.choices


def test_a_target_that_only_packs_reach():
    with pytest.raises(ValueError, match="out of reach"):
        calibrate(tiny(), [runs(1500)], ratio=0.16)
    result = calibrate(tiny(), [runs(1500)], ratio=0.16, packed=True)
    assert result.reached and result.config.packs
    assert result.best(packed=False) is None
    with pytest.raises(ValueError, match=r"ratio 0\.01 is out of reach"):
        calibrate(tiny(), [runs(900)], ratio=0.01, packed=True)


@pytest.mark.parametrize(("base", "said"), [({"codec": "minmax"}, "'minmax'"), ({"page_tokens": 32}, "64 tokens")])
def test_a_config_that_cannot_be_packed_is_refused(base, said):
    with pytest.raises(ValueError, match=said):
        calibrate(tiny(), [runs(300)], ratio=0.5, packed=True, base=LeanKVConfig(**base))


def test_command(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("".join(letter * 64 for letter in "abcdefghijklmnopqrst"))
    out = tmp_path / "own.json"
    arguments = ["calibrate", "--model", str(tmp_path / "model"), "--tokens", "900", "--count", "1", "--packed"]
    arguments += ["--prompts", str(tmp_path / "text"), "--kl", "0.05", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    config = LeanKVConfig.from_json(str(out))
    assert config.packs
    assert "without; taken." in printed and ", taken" in printed and "Packed K" in printed
    with (tmp_path / "own.packing.csv").open() as file:
        rows = list(csv.DictReader(file))
    taken = [row for row in rows if row["taken"] == "1"]
    assert [row["layer"] for row in taken] == ["0", "1", "2"]
    assert any(row["packed"] for row in taken)
    packed = {row["keys_rotated"] for row in rows if row["packed"]}
    assert packed == {"0", "1"}
    assert cli.main([*arguments, "--config", '{"codec": "minmax"}']) == 2
    assert "minmax" in capsys.readouterr().err
