"""What torch does in another thread, flags of whose process are seen in all, changes nothing here."""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad

import fm_fast as fm
from fm_fast import _modes

X = fm.noise((16, 6), seed=0, step=0)
WAIT = 300.0  # seconds, for what takes milliseconds


@contextmanager
def compiling_elsewhere():
    """Another thread compiles, for as long as the block takes, something that is none of ours; later versions of torch flag the process."""
    entered, done = threading.Event(), threading.Event()

    def slow(graph, inputs):
        entered.set()
        assert done.wait(WAIT)
        return graph.forward

    thread = threading.Thread(target=lambda: torch.compile(lambda x: x.sin(), backend=slow)(torch.ones(2)), daemon=True)
    thread.start()
    try:
        assert entered.wait(WAIT)
        yield
    finally:
        done.set()
        thread.join(WAIT)


@contextmanager
def differentiating_elsewhere():
    """Another thread is within torch.func.jvp for as long as the block takes."""
    entered, done = threading.Event(), threading.Event()

    def slow(x):
        entered.set()
        assert done.wait(WAIT)
        return x.sin()

    one = torch.ones(2)
    thread = threading.Thread(target=lambda: torch.func.jvp(slow, (one,), (one,)), daemon=True)
    thread.start()
    try:
        assert entered.wait(WAIT) and forward_ad._current_level >= 0
        yield
    finally:
        done.set()
        thread.join(WAIT)


elsewhere = pytest.mark.parametrize("elsewhere", [compiling_elsewhere, differentiating_elsewhere])


def loss_and_gradient():
    o = X.clone().requires_grad_()
    loss = fm.sample_path(X, seed=1, step=2).loss(o)
    loss.backward()
    return loss.detach(), o.grad


def adaptive_solve():
    return fm.sample(lambda x, t: -x, X, method="dopri5").x


@elsewhere
def test_results_are_the_same_to_the_bit(elsewhere):
    def results():
        return *loss_and_gradient(), adaptive_solve(), fm.couplings.optimal_ids(X, seed=0, step=0)

    alone = results()
    with elsewhere():
        beside = results()
    assert all(map(torch.equal, alone, beside))


def written_between_the_phases():
    x1 = X.clone()
    s = fm.sample_path(x1, seed=1, step=2)
    x1.mul_(2.0)
    s.loss(X)


@elsewhere
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fm.sample(lambda x, t: x / 0.0, X, steps=1), "not finite"),
        (lambda: fm.sample_path(X, t=torch.tensor(7.0)), "t must lie in"),
        (written_between_the_phases, "changed in place"),
    ],
    ids=["not finite", "time", "written"],
)
def test_what_is_wrong_is_still_noticed(elsewhere, call, error):
    with elsewhere(), pytest.raises((ValueError, RuntimeError, FloatingPointError), match=error):
        call()


@elsewhere
def test_tensors_of_inference_mode_are_still_copied(elsewhere):
    with torch.inference_mode():
        x1 = X.clone()
    with elsewhere():
        fm.sample_path(x1, seed=1, step=2).loss(X.clone().requires_grad_()).backward()


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
