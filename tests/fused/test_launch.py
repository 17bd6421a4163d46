"""On a machine with several GPUs every kernel is launched on the one that its tensors are on."""

import contextlib

import pytest
import torch
from test_races import SCENARIOS, flushed  # noqa: F401 (a fixture)
from triton.runtime.interpreter import InterpretedFunction

from hfkv.kernels.triton import launch


@pytest.fixture
def devices(monkeypatch):
    """The devices that are current, innermost last; a launch without one, or on another one, fails."""
    current, run = [], InterpretedFunction.run

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    def checked(kernel, *args, **named):
        assert current, f"{kernel.fn.__name__} goes to whatever device is current"
        assert {x.device for x in args if isinstance(x, torch.Tensor)} == {current[-1]}
        return run(kernel, *args, **named)

    monkeypatch.setattr(launch, "on", on)
    monkeypatch.setattr(InterpretedFunction, "run", checked)
    return current


@pytest.mark.parametrize("name", ["flush-shared", "step-packs", "observe", "chunk", "append", "kvcrush", "seal"])
def test_launches_are_on_the_device_of_their_tensors(name, flushed, devices):  # noqa: F811
    scenario, _ = SCENARIOS[name]
    scenario(flushed)
    assert not devices


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
