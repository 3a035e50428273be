"""step_control against the independent float64 model, which takes one sample after the other; and what it refuses."""

import control_cases
import numpy as np
import oracle
import pytest
import torch
from control_cases import CASES, case
from thread_counts import on_thread_counts

from fm_fast import _backends, _ops

needs_cpp = pytest.mark.skipif(_backends.why_not("step_control", "cpu", "cpp") is not None, reason="the C++ library is not built")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_situation(name, dtype, backend):
    control_cases.check(_ops.step_control(backend), CASES[name], dtype)


def test_the_cases_cover_every_situation():
    """Which is what makes the test above worth something."""
    given = CASES["one part"]
    numbers, counts, totals, accepted, _, factors = oracle.step_control(
        given.numbers, given.counts, given.means, given.stops, given.nodes, given.order, given.evaluations
    )
    assert set(given.counts[2]) == set(counts[2]) == {0, 1, 2} and (totals > 10).all()
    arrived = (numbers[0] == given.stops[given.counts[0]]) & accepted
    for inner in (True, False):
        assert (arrived & (counts[0] != given.counts[0])).sum() > 10 if inner else (arrived & (counts[2] == 0)).sum() > 10
    assert (accepted & ~arrived).any() and (~accepted & (given.counts[2] == 1)).any()
    growth = numbers[1] / np.where(given.numbers[2] == 0, np.nan, given.numbers[2])
    assert (
        (growth == 0.2).any() and (growth == 10.0).any() and ((growth > 0.2) & (growth < 1)).any() and ((growth > 1) & (growth < 10)).any()
    )
    assert (factors[1] == 0).any() and (factors[1] != 0).any()


def test_a_step_that_was_cut_does_not_shorten_the_next(backend):
    given = case(1, stops=(0.0, 0.5, 1.0))
    given.numbers[:, 0], given.counts[:, 0], given.means[:, 0] = (0.499, 0.4, 0.001), (1, 0, 1), 0.9
    numbers, counts, *_ = control_cases.controlled(_ops.step_control(backend), given, torch.float64)
    assert numbers[:, 0].tolist() == [0.5, 0.4, 0.4] and counts[:, 0].tolist() == [2, 6, 1]


@pytest.mark.parametrize("stop", [3, 2**40, -1])
def test_a_stop_that_there_is_not_is_not_read(stop, backend):
    if backend == "reference":
        pytest.skip("plain PyTorch checks every index")
    given = case(2, stops=(0.0, 0.5, 1.0))
    given.counts[:, 0], given.counts[:, 1] = (stop, 0, 1), (1, 0, 1)
    _, counts, *_ = control_cases.controlled(_ops.step_control(backend), given, torch.float64)
    assert counts[2, 0] == 2 and counts[0, 0] == stop


@needs_cpp
def test_the_number_of_threads_changes_nothing():
    given = case(5000)
    results = on_thread_counts(lambda: control_cases.controlled(_ops.step_control("cpp"), given, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_cpp
def test_what_follows_is_not_written_to():
    """Guards behind every tensor that the op fills."""
    given = case(37)
    shapes = {"numbers": (3, 37), "counts": (3, 37), "totals": (3,), "accepted": (37,), "times": (7, 37), "factors": (2, 37)}
    dtypes = [torch.float64, torch.int64, torch.int64, torch.uint8, torch.float64, torch.float32]
    memory = [torch.full((int(np.prod(shape)) + 8,), 9, dtype=dtype) for shape, dtype in zip(shapes.values(), dtypes, strict=True)]
    views = [whole[:-8].view(shape) for whole, shape in zip(memory, shapes.values(), strict=True)]
    views[0].copy_(torch.tensor(given.numbers)), views[1].copy_(torch.tensor(given.counts))
    inputs = (torch.tensor(x) for x in (given.means, given.stops, given.nodes))
    _ops.step_control("cpp")(*views, *inputs, given.order, given.evaluations)
    assert all(bool((whole[-8:] == 9).all()) for whole in memory)


def arguments():
    given = case(4)
    tensors = {"numbers": torch.tensor(given.numbers), "counts": torch.tensor(given.counts), "totals": torch.zeros(3, dtype=torch.int64)}
    tensors |= {"accepted": torch.empty(4, dtype=torch.uint8), "times": torch.empty(7, 4, dtype=torch.float64)}
    tensors |= {"factors": torch.empty(2, 4), "means": torch.tensor(given.means)}
    return tensors | {"stops": torch.tensor(given.stops), "nodes": torch.tensor(given.nodes), "order": 5, "evaluations": 6}


DOUBLES = {"dtype": torch.float64}
WRONG = {
    "argument numbers: expected float64": {"numbers": torch.zeros(3, 4)},
    "argument numbers: expected a contiguous tensor of 12": {"numbers": torch.zeros(3, 5, **DOUBLES)},
    "argument counts: expected 12 numbers": {"counts": torch.zeros(2, 4, dtype=torch.int64)},
    "argument counts: expected a contiguous int64": {"counts": torch.zeros(3, 4)},
    "argument totals: expected 3 numbers": {"totals": torch.zeros(2, dtype=torch.int64)},
    "argument accepted: expected uint8": {"accepted": torch.zeros(4)},
    "argument times: expected a contiguous tensor of 28": {"times": torch.zeros(6, 4, **DOUBLES)},
    "argument factors: expected float32 or float64": {"factors": torch.zeros(2, 4, dtype=torch.bfloat16)},
    "argument factors: expected a contiguous tensor of 8": {"factors": torch.zeros(4)},
    "argument means: expected rows of 4 numbers": {"means": torch.zeros(1, 5, **DOUBLES)},
    "argument means: expected float64": {"means": torch.zeros(1, 4)},
    "argument stops: expected at least 2 numbers": {"stops": torch.zeros(1, **DOUBLES)},
    "argument nodes: expected at least 1 number": {"nodes": torch.zeros(0, **DOUBLES)},
    "argument order: expected 1 to 64, got 0": {"order": 0},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.step_control(**(arguments() | WRONG[message]))


@needs_cpp
def test_handles_are_given_back():
    """Neither a call nor a refused call keeps a reference to a tensor."""
    right = arguments()
    tensors = [x for x in right.values() if isinstance(x, torch.Tensor)]
    before = [x._use_count() for x in tensors]
    for _ in range(10):
        torch.ops.fm_fast.step_control(**right)
        with pytest.raises(RuntimeError, match="argument order"):
            torch.ops.fm_fast.step_control(**(right | {"order": 0}))
    assert [x._use_count() for x in tensors] == before
