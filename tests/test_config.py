import json

import pytest

from hfkv import LeanKVConfig
from hfkv.config import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = LeanKVConfig.preset(name)
    assert LeanKVConfig.from_json(config.to_json()) == config


def test_json_file_and_layers(tmp_path):
    config = LeanKVConfig(layers={3: {"tiers": [(8, 4), (4, 3)]}, 5: {"tiers": ["exact"]}}, max_bytes=10**9)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    again = LeanKVConfig.from_json(str(path))
    assert again == config
    assert again.for_layer(3).tiers == ((8, 4), (4, 3))
    assert again.for_layer(5).tiers == ("exact",)
    assert again.for_layer(0) is again


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tiers": ((5, 2),)}, "tiers"),
        ({"tiers": ()}, "tiers"),
        ({"tiers": ((8, 4), (4, 2), (2, 2))}, "tiers"),
        ({"tiers": "K8V4"}, "tiers"),
        ({"high_share": 1.5}, "high_share"),
        ({"keep_share": 0.0}, "keep_share"),
        ({"high_share": 0.9, "keep_share": 0.5}, "high_share"),
        ({"alpha_high": -1.0}, "alpha_high"),
        ({"alpha_high": 0.1, "alpha_low": 0.2}, "alpha_low"),
        ({"alpha_low": 0.2}, "alpha_high"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": 0.5, "high_share": 0.1}, "budget"),
        ({"alpha_high": 1.0, "high_share": 0.1}, "alpha_high"),
        ({"policy": 3}, "policy"),
        ({"tiers": ((4, 2),), "high_share": 0.1}, "high_share"),
        ({"tiers": ((4, 2),), "alpha_high": 0.1}, "alpha_high"),
        ({"window": 0}, "window"),
        ({"flush": 0}, "flush"),
        ({"flush": True}, "flush"),
        ({"observe": 1.5}, "observe"),
        ({"rotation_seed": -1}, "rotation_seed"),
        ({"codec": "zip"}, "codec"),
        ({"page_tokens": 48}, "page_tokens"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"rotate_keys": 1}, "rotate_keys"),
        ({"shift_keys": "yes"}, "shift_keys"),
        ({"layers": {-1: {}}}, "layers"),
        ({"layers": {0: {"window": 3}}}, "layers"),
        ({"layers": {0: {"tiers": ((9, 9),)}}}, "tiers"),
        ({"layers": {0: {"tiers": ((4, 2),), "high_share": 0.1}}}, "layers"),
        ({"layers": [1]}, "layers"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:60] if isinstance(value, dict) else value,
)
def test_invalid_combinations_name_the_field(fields, named):
    with pytest.raises(ValueError, match=rf"LeanKVConfig\.{named}"):
        LeanKVConfig(**fields)


def test_errors_name_the_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"page_tokens = 48 .*\(32, 64\)"):
        LeanKVConfig(page_tokens=48)
    with pytest.raises(ValueError, match=r"'tiny'.*exact, k8v4, balanced, aggressive, paper"):
        LeanKVConfig.preset("tiny")


@pytest.mark.parametrize("text", ["[1, 2]", '{"tiers": [[8, 4]], "colour": 1}', '{"window": '])
def test_bad_json_is_a_value_error(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="from_json"):
        LeanKVConfig.from_json(str(path))


def test_a_policy_of_ones_own_is_not_json():
    with pytest.raises(ValueError, match="policy"):
        LeanKVConfig(policy=lambda candidates: candidates.tier).to_json()


def test_defaults_follow_from_tiers():
    assert LeanKVConfig().high_share == 0.10
    assert LeanKVConfig().shift_keys
    one = LeanKVConfig(tiers=((4, 2),))
    assert not one.shift_keys
    assert not one.selects
    assert LeanKVConfig(tiers=((4, 2),), keep_share=0.5).selects
    assert LeanKVConfig.preset("exact").lossless
    assert not LeanKVConfig.preset("k8v4").lossless


def test_a_preset_with_another_choice_drops_its_own():
    config = LeanKVConfig.preset("aggressive", budget=0.3, window=128)
    assert (config.budget, config.high_share, config.window) == (0.3, None, 128)


def test_an_override_with_one_tier_needs_no_high_share():
    layer = LeanKVConfig(layers={1: {"tiers": ((8, 8),)}}).for_layer(1)
    assert (layer.high_share, layer.shift_keys, layer.selects) == (None, False, False)
