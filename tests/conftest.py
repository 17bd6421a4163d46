"""One thread per test process: tiny tensors gain nothing from two, and parallel workers would fight over the cores.

No loops are built unasked (tests/test_loops.py asks): each kind takes a compiler up to a minute.
"""

import os
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from hfkv.backends import select  # noqa: E402

select.LEAST = 1 << 62


def _behind(call):
    return call()


# Python keeps frames in chunks of 16 KiB and hands one back to the system as soon as it is empty: a loop at the edge of
# a chunk maps memory at every call, up to half of a test's time. Behind a frame of 1 MiB there is room for 1 MiB more.
_behind.__code__ = _behind.__code__.replace(co_stacksize=(1 << 17) + 512)


def pytest_collection_modifyitems(items):
    for item in items:
        item.setup, item.runtest = partial(_behind, item.setup), partial(_behind, item.runtest)
