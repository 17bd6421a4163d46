"""Triton's kernels in its interpreter, or on a GPU where there is one; nothing to test where Triton does not exist."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
