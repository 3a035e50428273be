"""What torch does in another thread, flags of whose process are seen in all, changes nothing here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import fm_fast as fm
from fm_fast import _modes

X = fm.noise((16, 6), seed=0, step=0)
Call = Callable[[], Any]


def in_a_thread(call: Call) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def beside_a_compiler(call: Call) -> Any:
    """While this thread compiles, for which later versions of torch have a flag of the process."""
    found = []

    def slow(graph, inputs):
        found.append(in_a_thread(call))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.sin(), backend=slow)(torch.ones(2))
    return found[0]


def beside_forward_differentiation(call: Call) -> Any:
    """While this thread is within torch.func.jvp, whose level is the process's."""
    found = []

    def slow(x):
        found.append(in_a_thread(call))
        return x.sin()

    one = torch.ones(2)
    torch.func.jvp(slow, (one,), (one,))
    return found[0]


def beside_an_export(call: Call) -> Any:
    """While this thread exports a program, and records gradients."""
    found = []

    def slow(x):
        found.append(in_a_thread(call))
        return x * 2.0

    torch.export.export(Looking(slow), (torch.ones(2),), strict=False)
    return found[0]


beside = pytest.mark.parametrize("beside", [beside_a_compiler, beside_an_export, beside_forward_differentiation])


def loss_and_gradient(x1=X):
    o = X.clone().requires_grad_()
    loss = fm.sample_path(x1, seed=1, step=2).loss(o)
    loss.backward()
    return loss.detach(), o.grad


def adaptive_solve():
    return fm.sample(lambda x, t: -x, X, method="dopri5").x


@beside
def test_results_are_the_same_to_the_bit(beside):
    def results():
        return *loss_and_gradient(), adaptive_solve(), fm.couplings.optimal_ids(X, seed=0, step=0)

    assert all(map(torch.equal, results(), beside(results)))


def written_between_the_phases():
    x1 = X.clone()
    s = fm.sample_path(x1, seed=1, step=2)
    x1.mul_(2.0)
    s.loss(X)


@beside
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fm.sample(lambda x, t: x / 0.0, X, steps=1), "not finite"),
        (lambda: fm.sample_path(X, t=torch.tensor(7.0)), "t must lie in"),
        (written_between_the_phases, "changed in place"),
    ],
    ids=["not finite", "time", "written"],
)
def test_what_is_wrong_is_still_noticed(beside, call, error):
    with pytest.raises(Exception, match=error):  # a compiler puts its own around it
        beside(call)


@beside
def test_tensors_of_inference_mode_are_still_copied(beside):
    with torch.inference_mode():
        x1 = X.clone()
    alone, found = loss_and_gradient(), beside(lambda: loss_and_gradient(x1))
    assert all(map(torch.allclose, alone, found))


def test_compilers_and_transforms_are_seen_where_they_run():
    seen = []

    def look(x):
        seen.append((_modes.is_compiling(), _modes.transforms_active()))
        return x * 2.0

    one = torch.ones(2)
    torch.func.jvp(look, (one,), (one,))
    with forward_ad.dual_level():
        look(one)
    torch.export.export(Looking(look), (one,), strict=False)
    look(one)
    assert seen == [(False, True), (False, True), *[(True, False)] * (len(seen) - 3), (False, False)] and len(seen) > 3


class Looking(torch.nn.Module):
    def __init__(self, look):
        super().__init__()
        self.look = look

    def forward(self, x):
        return self.look(x)
