"""`python -m hfkv calibrate`: the config for a model and a target, found by measuring the model.

from hfkv.calibrate import calibrate, generated
result = calibrate(model, generated(tokenizer, tokens=1000, count=4), ratio=0.3)
cache = LeanKVCache(result.config)
"""

from hfkv.calibrate.prompts import from_files, generated
from hfkv.calibrate.result import Attempt, Calibration, LayerResult, Target
from hfkv.calibrate.search import calibrate

__all__ = ["Attempt", "Calibration", "LayerResult", "Target", "calibrate", "from_files", "generated"]
