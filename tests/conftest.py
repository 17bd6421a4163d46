"""One thread per test process: tiny tensors gain nothing from two, and parallel workers would fight over the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
