"""One thread per test process: tiny tensors gain nothing from two, and parallel workers would fight over the cores.

No loops are built unasked (tests/test_loops.py asks): each kind takes a compiler some ten seconds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from hfkv.backends import select  # noqa: E402

select.LEAST = 1 << 62
