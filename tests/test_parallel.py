"""Tensor parallel: two processes, each with half of the heads in its own cache, give the tokens of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from families import build, left_padded, native

WORKER = """
import json, sys
sys.path[:0] = sys.argv[2:]
import torch.distributed as dist
import torch
from families import left_padded
from transformers import AutoModelForCausalLM
from hfkv import LeanKVCache, LeanKVConfig
dist.init_process_group("gloo")
options = {"attn_implementation": "leankv", "dtype": torch.float32}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", **options).eval()
cache = LeanKVCache(LeanKVConfig.preset("exact"))
out = model.generate(**left_padded([3, 150]), past_key_values=cache, max_new_tokens=70, do_sample=False)
heads = [layer.tokens.window.heads for layer in cache.layers]
with open(f"{sys.argv[1]}/said{dist.get_rank()}", "w") as file:
    json.dump({"tokens": out.tolist(), "heads": heads}, file)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*launch, str(script), str(tmp_path), *sys.path]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    want = native("llama").generate(**left_padded([3, 150]), max_new_tokens=70, do_sample=False)
    for rank in (0, 1):
        said = json.loads((tmp_path / f"said{rank}").read_text())
        assert said["heads"] == [1, 1]  # of two
        assert torch.equal(torch.tensor(said["tokens"]), want)
