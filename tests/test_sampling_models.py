"""What a model may do to a solve, and what a solve may not do: views of buffers, reused memory, modes, conditions, the caller's noise."""

import numpy as np
import pytest
import torch
from sampling_helpers import FIXED, network, noise64, solve
from torch import nn

import fm_fast as fm

X0 = noise64(3, 2, 4)
IMAGES = noise64(2, 3, 4, 4)


def hand(x, method, steps, model=network):
    return solve(method, model, x.double(), np.arange(steps + 1) / steps)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.dropout(self.linear(x)) * t[:, None, None]


@pytest.mark.parametrize("method", FIXED)
def test_a_model_may_return_its_input(method, backend):
    """dx/dt = x through the very tensor that it was given, which is a buffer of the solver."""
    noise = X0.float()
    expected = hand(noise, method, 5, lambda x, t: x)
    for model in (lambda x, t: x, lambda x, t: x.view_as(x), lambda x, t: x.detach()):
        found = fm.sample(model, noise, method=method, steps=5, backend=backend)
        torch.testing.assert_close(found.x.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2"])
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(-1, -2), lambda x: x[:1].expand_as(x), lambda x: x[..., :1].expand_as(x)],
    ids=["transposed", "first sample", "first column"],
)
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4), (4, 4)], ids=str)
def test_a_model_may_return_a_rearranged_view_of_its_input(view, shape, method, backend):
    noise = noise64(*shape).float()
    found = fm.sample(lambda x, t: view(x), noise, method=method, steps=5, backend=backend)
    expected = hand(noise, method, 5, lambda x, t: view(x))
    torch.testing.assert_close(found.x.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("objective", ["velocity", "data"])
def test_a_model_that_returns_the_same_memory_every_time(method, objective, backend):
    """Right where only the newest output is read; an error where earlier ones are. Never a wrong result."""
    buffer = torch.empty_like(X0)

    def model(x, t):
        return buffer.copy_(network(x, t))

    arguments = {"method": method, "objective": objective, "steps": 4, "t0": 0.1, "t1": 0.9}
    expected = fm.sample(network, X0, backend="reference", **arguments).x
    try:
        found = fm.sample(model, X0, backend=backend, **arguments).x
    except RuntimeError as error:
        assert "model returned the memory of an earlier output, which this method still needs; return a new tensor" in str(error)
        assert method not in ("euler", "midpoint") or objective == "data"
        assert method != "euler"
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["ab2", "rk4"])
def test_a_model_may_cycle_through_as_many_buffers_as_the_method_remembers(method, backend):
    buffers = [torch.empty_like(X0) for _ in range(3 if method == "ab2" else 4)]
    calls = iter(range(1000))

    def model(x, t):
        return buffers[next(calls) % len(buffers)].copy_(network(x, t))

    found = fm.sample(model, X0, method=method, steps=6, backend=backend)
    torch.testing.assert_close(found.x, hand(X0, method, 6), rtol=1e-12, atol=1e-13)


def test_the_callers_noise_is_never_altered(backend):
    for method in FIXED:
        for noise in (X0.clone(), X0.float(), IMAGES.float().to(memory_format=torch.channels_last)):
            before, version = noise.clone(), noise._version
            found = fm.sample(lambda x, t: x, noise, method=method, steps=2, save="steps", backend=backend)
            fm.encode(lambda x, t: x, noise, method=method, steps=2, backend=backend)
            assert torch.equal(noise, before) and noise._version == version
            assert found.x.untyped_storage().data_ptr() != noise.untyped_storage().data_ptr()
            assert found.saved.untyped_storage().data_ptr() != noise.untyped_storage().data_ptr()


def test_conditions_reach_the_model_untouched():
    labels, extra = torch.tensor([1, 2, 3]), object()
    seen = []

    def model(x, t, *, y, extra):
        seen.append((y, extra))
        return x * y[:, None, None]

    fm.sample(model, X0, cond={"y": labels, "extra": extra}, steps=2)
    assert len(seen) == 4 and all(y is labels and other is extra for y, other in seen)


def test_modules_keep_their_mode_and_draw_their_dropout():
    model = Wrapped().train()
    torch.manual_seed(0)
    one = fm.sample(model, X0.float(), steps=4).x
    two = fm.sample(model, X0.float(), steps=4).x
    assert model.training and not torch.equal(one, two)
    model.eval()
    assert torch.equal(fm.sample(model, X0.float(), steps=4).x, fm.sample(model, X0.float(), steps=4).x)
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_compiled_model(backend):
    model = torch.compile(network, backend="eager", fullgraph=True)
    found = fm.sample(model, X0, method="rk4", steps=4, backend=backend)
    torch.testing.assert_close(found.x, hand(X0, "rk4", 4), rtol=1e-12, atol=1e-13)


def test_inference_mode(backend):
    with torch.inference_mode():
        noise = X0 + 0
        found = fm.sample(network, noise, method="ab2", steps=4, backend=backend)
    torch.testing.assert_close(found.x, hand(X0, "ab2", 4), rtol=1e-12, atol=1e-13)


def test_a_model_that_differentiates_inside(backend):
    """An energy: its output requires grad whatever the solver wants."""

    def model(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = (x.sin() * (1 + t[:, None, None])).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    found = fm.sample(model, X0, steps=4, backend=backend)
    expected = hand(X0, "midpoint", 4, lambda x, t: x.cos() * (1 + t))
    assert not found.x.requires_grad
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=1e-13)


CONSTANT = noise64(3, 4)
SEVERAL_OUTPUTS = ["heun2", "rk4", "ab2", "ab3"]


@pytest.mark.parametrize("grad", ["none", "direct"])
@pytest.mark.parametrize("method", SEVERAL_OUTPUTS)
@pytest.mark.parametrize("field", [lambda x: CONSTANT, lambda x: CONSTANT[:1].expand_as(x)], ids=["itself", "a view"])
def test_a_constant_field_may_be_one_tensor(field, method, grad, backend):
    x0 = noise64(3, 4)
    found = fm.sample(lambda x, t: field(x), x0, method=method, steps=4, grad=grad, backend=backend).x
    torch.testing.assert_close(found, x0 + field(x0), rtol=1e-12, atol=1e-12)


def _array(x, kept, t):
    kept.numpy()[:] = (x * t[0]).numpy()
    return torch.from_numpy(kept.numpy())


def _alternating(x, kept, t):
    """The first step in one tensor, written over and over; new ones in the second."""
    return kept.copy_(x * t[0]) if float(t[0]) < 0.6 else x * t[0]


@pytest.mark.parametrize("method", ["heun2", "rk4"])
@pytest.mark.parametrize(
    "write",
    [
        lambda x, kept, t: kept.copy_(x * t[0]),
        lambda x, kept, t: kept.copy_(x * t[0])[:],
        lambda x, kept, t: torch.mul(x, t[0], out=kept).detach(),
        _array,
        _alternating,
    ],
)
def test_one_tensor_that_is_written_again_is_refused(write, method, backend):
    kept = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="model returned the memory of an earlier output"):
        fm.sample(lambda x, t: write(x, kept, t), noise64(3, 4), method=method, steps=2, backend=backend)


def test_outputs_that_interleave_in_one_tensor_are_taken(backend):
    buffer, numbers = torch.zeros(3, 9, 4, dtype=torch.float64), iter(range(9))
    found = fm.sample(lambda x, t: buffer[:, next(numbers)].copy_(torch.sin(x)), noise64(3, 4), method="rk4", steps=2, backend=backend)
    assert torch.equal(found.x, fm.sample(lambda x, t: torch.sin(x), noise64(3, 4), method="rk4", steps=2, backend=backend).x)


@pytest.mark.parametrize("later", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2"])
def test_the_dtype_of_every_output_is_checked(later, method, backend):
    calls = iter(range(100))
    with pytest.raises(TypeError, match=f"model must return float64, float32, bfloat16 or float16, got {later}"):
        fm.sample(lambda x, t: x if next(calls) == 0 else x.to(later), noise64(3, 4), method=method, steps=2, backend=backend)


def test_a_sparse_output_is_refused(backend):
    with pytest.raises(TypeError, match=r"model must return a dense tensor, got torch.sparse_coo"):
        fm.sample(lambda x, t: x.to_sparse(), noise64(3, 4), method="rk4", steps=2, backend=backend)


def test_a_constant_that_is_written_after_it_was_returned_is_refused(backend):
    kept = torch.ones(3, 4, dtype=torch.float64)

    def model(x, t):
        if float(t[0]) == 1.0:
            kept.mul_(2.0)
            return x.clone()
        return kept

    with pytest.raises(RuntimeError, match="model returned the memory of an earlier output"):
        fm.sample(model, noise64(3, 4), method="rk4", steps=1, backend=backend)


@pytest.mark.parametrize("arguments", [{"method": m, "steps": 2} for m in ("euler", "midpoint", "rk4", "ab2")] + [
    {"method": "dopri5"}, {"method": "dopri5", "per_sample": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("grad", ["none", "direct"])
@pytest.mark.parametrize("since", [0.0, 0.4])
def test_a_model_that_writes_into_its_input_is_told(since, grad, arguments):
    """From the first evaluation on, or late in the solve."""

    def model(x, t):
        return x.mul_(2) if float(t[0]) >= since else x * 2

    with pytest.raises(RuntimeError, match=r"model must leave its input x as it is, .* give it x\.clone\(\)"):
        fm.sample(model, torch.ones(2, 3), grad=grad, **arguments)
    with torch.inference_mode():
        fm.sample(lambda x, t: x * 2, torch.ones(2, 3), **arguments)
