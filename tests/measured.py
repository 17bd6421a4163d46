"""What a calibration's measurement of one option says, beside what the real cache does with it."""

from __future__ import annotations

from transformers import PreTrainedModel

from hfkv import LeanKVConfig
from hfkv.calibrate.options import Basis, Option, config_of
from hfkv.calibrate.recording import Recording, behind, divergence, filled


def measured_and_real(model: PreTrainedModel, one: Recording, option: Option, basis: Basis) -> tuple[float, float]:
    """KL of one option in all layers: of the recording with recoded keys and values, and of the cache."""
    config = config_of(LeanKVConfig(), dict.fromkeys(one.layers, option), dict.fromkeys(one.layers, basis), None)
    real = divergence(one.reference, behind(model, one.prompt, filled(model, one.prompt, config)))
    sides = [option.coding(side, basis) for side in ("key", "value")]
    return one.divergence(dict.fromkeys(one.layers, sides)), real
