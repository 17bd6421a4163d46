"""Triton's kernels in its interpreter; nothing to test where Triton does not exist.

Where there is a GPU kernels are compiled for it, and `tests/gpu` holds them to their twins: the interpreter's tests
then need `CUDA_VISIBLE_DEVICES=`.
"""

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
if not collect_ignore_glob and not torch.cuda.is_available():
    import interpreter

    interpreter.hasten()


@pytest.fixture(autouse=True)
def _interpreted():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU here: CUDA_VISIBLE_DEVICES= runs them in the interpreter")
