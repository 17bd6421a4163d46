"""The options of `python -m hfkv eval`; this needs nothing but what hfkv itself does."""

from __future__ import annotations

import argparse

import torch

from hfkv.demo import smollm2
from hfkv.eval.methods import METHODS
from hfkv.eval.tasks import TASKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    known = ", ".join(METHODS).replace("%", "%%")
    parser.add_argument(
        "--model", default=smollm2.NAME, help="name or path for from_pretrained (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"of {known}")
    parser.add_argument("--config", action="append", metavar="JSON", help="a LeanKVConfig of your own; may be repeated")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the prompts (default: 1000 4000)")
    parser.add_argument("--samples", type=int, help="prompts per task and length (default: 8)")
    parser.add_argument("--out", default="eval-output", help="folder for the results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few tasks and methods, short prompts: a few minutes")
    parser.add_argument("--budget-seconds", type=float, help="stop in time; finished cells are kept, not repeated")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: float32, on a GPU the model's)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has measured")
