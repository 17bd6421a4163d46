"""The knapsack against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkv.calibrate.knapsack import Frontier

ERROR = st.integers(0, 1000).map(lambda n: n / 1000)


@st.composite
def layers(draw):
    """Costs and errors of up to 4 options in each of up to 5 layers."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    costs = [draw(st.lists(st.integers(0, 60), min_size=n, max_size=n)) for n in sizes]
    errors = [draw(st.lists(ERROR, min_size=n, max_size=n)) for n in sizes]
    return costs, errors


def frontier(costs, errors, **options) -> Frontier:
    return Frontier([torch.tensor(c) for c in costs], [torch.tensor(e, dtype=torch.float64) for e in errors], **options)


def sums(costs, errors, picked) -> tuple[int, float]:
    return (
        sum(cost[i] for cost, i in zip(costs, picked, strict=True)),
        sum(error[i] for error, i in zip(errors, picked, strict=True)),
    )


def everything(costs, errors) -> list[tuple[int, float]]:
    return [sums(costs, errors, picked) for picked in itertools.product(*(range(len(cost)) for cost in costs))]


@settings(max_examples=300, deadline=None)
@given(layers(), st.integers(0, 320))
def test_least_error_within_bytes(problem, limit):
    costs, errors = problem
    best = min((error for cost, error in everything(costs, errors) if cost <= limit), default=None)
    picked = frontier(costs, errors).within_bytes(limit)
    if best is None:
        assert picked is None
    else:
        cost, error = sums(costs, errors, picked)
        assert cost <= limit
        assert error == pytest.approx(best)


@settings(max_examples=300, deadline=None)
@given(layers(), ERROR.map(lambda x: 4 * x))
def test_fewest_bytes_within_error(problem, limit):
    costs, errors = problem
    best = min((cost for cost, error in everything(costs, errors) if error <= limit + 1e-9), default=None)
    picked = frontier(costs, errors).within_error(limit)
    if best is None:
        assert picked is None
    else:
        cost, error = sums(costs, errors, picked)
        assert error <= limit + 1e-9
        assert cost == best


@settings(max_examples=200, deadline=None)
@given(layers(), st.integers(0, 320), st.integers(2, 9))
def test_a_coarse_unit_stays_within_and_wastes_at_most_a_unit_per_layer(problem, limit, units):
    costs, errors = problem
    coarse = frontier(costs, errors, units=units)
    picked = coarse.within_bytes(limit)
    spread = coarse.most_bytes - coarse.least_bytes
    unit = max(1, -(-spread // units))
    tighter = limit - unit * (len(costs) + 1)
    best = min((error for cost, error in everything(costs, errors) if cost <= tighter), default=None)
    if picked is not None:
        cost, error = sums(costs, errors, picked)
        assert cost <= limit
        assert best is None or error <= best + 1e-9
    else:
        assert limit < coarse.least_bytes


def test_more_bytes_never_hurt():
    generator = torch.Generator().manual_seed(0)
    costs = [torch.randint(1000, 90000, (29,), generator=generator) for _ in range(30)]
    errors = [torch.rand(29, generator=generator, dtype=torch.float64) for _ in range(30)]
    whole = Frontier(costs, errors)
    limits = torch.linspace(whole.least_bytes, whole.most_bytes, 20).long().tolist()
    found = [whole.within_bytes(limit) for limit in limits]
    totals = [sum(error[i].item() for error, i in zip(errors, picked, strict=True)) for picked in found]
    assert all(more <= less for less, more in itertools.pairwise(totals))


def test_layers_without_errors_are_refused():
    with pytest.raises(ValueError, match="one of each per layer"):
        frontier([[1]], [])
