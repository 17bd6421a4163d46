"""Which kernels a layer gets, and what is said where a GPU does not get Triton's."""

import logging

import pytest
import torch

from hfkv.backends import choose, select
from hfkv.quant import PageLayout

CUDA = torch.device("cuda")
REASONS = {
    "not installed": (lambda: None, (9, 0), torch.float16, 64, "triton is not installed"),
    "old GPU": (object, (7, 5), torch.float16, 64, "compute capability 7.5"),
    "dtype": (object, (9, 0), torch.float64, 64, "torch.float64"),
    "head_dim": (object, (9, 0), torch.float16, 512, "512 is beyond 256"),
}


@pytest.mark.parametrize("spec, capability, dtype, dim, reason", REASONS.values(), ids=REASONS)
def test_a_fallback_on_a_gpu_is_said_once_with_its_reason(spec, capability, dtype, dim, reason, monkeypatch, caplog):
    monkeypatch.delenv("HFKV_BACKEND", raising=False)
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: spec())
    monkeypatch.setattr(select.importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    select._say_once.cache_clear()
    layouts = [PageLayout.of((8, 4), (dim, dim), torch.float16, "fitted", 64, True)]
    with caplog.at_level(logging.WARNING, logger="hfkv"):
        assert [choose(CUDA, layouts, dtype) for _ in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1 and reason in caplog.text and "slower" in caplog.text
    monkeypatch.setenv("HFKV_BACKEND", "triton")
    with pytest.raises(ValueError, match="HFKV_BACKEND=torch"):
        choose(CUDA, layouts, dtype)


@pytest.mark.parametrize("room, got", [(163 << 10, "triton"), (99 << 10, "torch")], ids=["163K", "99K"])
def test_pages_that_no_multiprocessor_holds_are_left_to_torch(room, got, monkeypatch, caplog):
    monkeypatch.delenv("HFKV_BACKEND", raising=False)
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(select.importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(select, "shared_room", lambda device: room)
    select._say_once.cache_clear()
    layouts = [PageLayout.of("exact", (256, 256), torch.float32, "fitted", 64, True)]
    with caplog.at_level(logging.WARNING, logger="hfkv"):
        assert choose(CUDA, layouts, torch.float32) == got
    assert ("takes 139,264 bytes of shared memory, and the GPU has 101,376" in caplog.text) == (got == "torch")


def test_a_gpu_gets_triton_unless_told_otherwise(monkeypatch, caplog):
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(select.importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(select, "shared_room", lambda device: 163 << 10)
    layouts = [PageLayout.of((8, 4), (128, 128), torch.bfloat16, "fitted", 64, True)]
    for wanted, got in ((None, "triton"), ("auto", "triton"), ("torch", "torch"), ("triton", "triton")):
        if wanted is None:
            monkeypatch.delenv("HFKV_BACKEND", raising=False)
        else:
            monkeypatch.setenv("HFKV_BACKEND", wanted)
        assert choose(CUDA, layouts, torch.bfloat16) == got
    assert not caplog.records
