"""Where kernels are launched: the device of the first tensor; `test_fused_devices.py` has the whole path."""

import contextlib

import torch

from hfkv.kernels.triton import launch


def test_the_first_tensor_says_where(monkeypatch):
    """Whatever lies in tuples and other objects before it; a device of CUDA becomes the current one."""
    seen = []
    monkeypatch.setattr(launch, "on", lambda device: seen.append(device) or contextlib.nullcontext())
    entry = launch.launches(lambda *args, **named: (args, named))
    x = torch.zeros(1, device="meta")
    args, named = entry((torch.zeros(1),), 3, x, torch.zeros(1), y=2)
    assert args[1:3] == (3, x) and named == {"y": 2}
    assert entry(n=1, x=x) == ((), {"n": 1, "x": x})
    assert [device.type for device in seen] == ["meta", "meta"]
    monkeypatch.undo()
    assert isinstance(launch.on(torch.device("cuda", 1)), torch.cuda.device)
    assert launch.on(torch.device("cuda", 1)).idx == 1
