"""The simulation of several devices itself: what mixes them raises, what may cross does, and views share memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from simulated_devices import device, simulated_devices
from torch import Tensor

HERE, THERE = device(0), device(1)


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    with simulated_devices():
        yield


MIXES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda a, b: a + b,
    "compare": lambda a, b: a == b,
    "in place": lambda a, b: a.add_(b),
    "out": lambda a, b: torch.add(b, b, out=a),
    "number": lambda a, b: a + b.sum(),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "cat": lambda a, b: torch.cat([a, b]),
    "matmul": lambda a, b: a @ b.t(),
    "gather": lambda a, b: a.gather(0, b.long()),
    "index": lambda a, b: a[b[0].long()],
    "put": lambda a, b: a.__setitem__(a > 0, b[0]),
    "put by": lambda a, b: a.__setitem__(b > 0, 1.0),
    "index_add": lambda a, b: a.index_add_(0, torch.tensor([0], device=HERE), b[:1]),
    "scatter": lambda a, b: a.scatter_(1, a.long(), b),
    "equal": lambda a, b: torch.equal(a, b),
    "attention": lambda a, b: torch.nn.functional.scaled_dot_product_attention(a[None, None], b[None, None], b[None]),
}


@pytest.mark.parametrize("other", [THERE, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("name", MIXES)
def test_mixing_raises(name: str, other: torch.device) -> None:
    a = torch.zeros(2, 3, device=HERE)
    if (name, other.type) in (("number", "cpu"), ("index", "cpu"), ("put by", "cpu")):
        MIXES[name](a, torch.zeros(2, 3))  # numbers and indices of the host are welcome, as CUDA has it
        return
    with pytest.raises(RuntimeError, match=r"Expected .* the same device"):
        MIXES[name](a, torch.zeros(2, 3, device=other))
    assert a.sum().item() == 0


def test_crossing() -> None:
    a = torch.arange(6.0).view(2, 3)
    b = a.to(HERE)
    c = b.to(THERE)
    assert (b.device, c.device, c.cpu().device.type) == (HERE, THERE, "cpu")
    assert b.to(HERE) is b
    assert type(c.cpu()) is Tensor
    c[:] = 7  # of its own memory
    assert b.tolist() == a.tolist()
    b.copy_(c)
    b[1] = torch.ones(3)  # a copy into a slice
    assert b.tolist() == [[7.0] * 3, [1.0] * 3]


def test_what_is_made_stays() -> None:
    a = torch.tensor([[1.5, -2.0]], device=THERE)
    made = [a.new_zeros(2), a.new_tensor([1]), torch.ones_like(a), a.float(), a.max(1)[0], a > 0, a.nonzero(), a[0]]
    made += [torch.arange(3, device=THERE), torch.empty(2, device=THERE), a.contiguous(), ~(a > 0), copy.deepcopy(a)]
    assert {x.device for x in made} == {THERE}
    assert torch.zeros(2, device=HERE).sum().item() == 0
    assert bool((a > 0).any())
    assert int(a[0, 1]) == -2


def test_views_share_memory() -> None:
    arena = torch.zeros(8, dtype=torch.int64, device=HERE)
    rows = arena.as_strided((3, 4), (2, 1))
    rows[1] = torch.tensor([1, 2, 3, 4], device=HERE)
    assert arena.tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
    halves = arena.view(torch.int16)
    halves.view(8, 4)[2, 0] += 5
    assert rows[1].tolist() == [6, 2, 3, 4]
    out = torch.empty(3, 4, dtype=torch.int64, device=HERE)
    assert torch.add(rows, 1, out=out) is out
    assert rows.add_(1) is rows
    assert out.tolist()[0] == [1, 1, 7, 3]
    assert arena.index_copy_(0, torch.tensor([7], device=HERE), torch.tensor([9], device=HERE)).tolist()[7] == 9
    assert rows.data_ptr() == arena.data_ptr()
