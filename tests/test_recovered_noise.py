"""Noise that the C++ kernel of path_loss divides out of x_t instead of drawing it again."""

import dataclasses
import weakref

import oracle
import pytest
import torch
from path_loss_cases import OBJECTIVES, SEED, STEP, loss_and_gradient, tensor

import fm_fast as fm
from fm_fast import _backends

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("path_loss", "cpu", "cpp") is not None, reason="only the C++ kernel recovers noise")


def cpp_sample(x1, **arguments):
    return fm.sample_path(x1, seed=SEED, step=STEP, backend="cpp", **arguments)


def drawn_again(s):
    """The same draw, but without the x_t from which the kernel may recover the noise."""
    return dataclasses.replace(s, _point=None)


def gradient_of_sum(s, o):
    return loss_and_gradient(s, o, reduction="sum")[1]


@needs_cpp
@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", [1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recovered_noise_is_off_by_a_few_roundings_of_the_target(path, objective, scale, dtype):
    """loss.h's bound, whatever the scale of the data; the target's own three roundings come on top."""
    x1, o = scale * tensor((64, 3, 5, 5), dtype), torch.zeros(64, 3, 5, 5, dtype=dtype)
    s = cpp_sample(x1, path=path, objective=objective)
    c1, c0, k, w = (oracle.column(s.coef[:, i].double(), x1) for i in range(2, 6))
    data, noise = c1 * x1.double(), c0 * s.x0.double()
    error = gradient_of_sum(s, o).double() + 2 * w * k * (data + noise)
    roundings = 2 * w.abs() * k.abs() * (7 * data.abs() + 5 * noise.abs()) + 3 * (2 * w * k * (data + noise)).abs()
    assert bool((error.abs() <= roundings * torch.finfo(dtype).eps / 2).all())


@needs_cpp
def test_noise_is_recovered_only_where_the_bound_holds():
    t = torch.linspace(0.025, 1, 40)
    x1, o = tensor((40, 3, 5, 5)), tensor((40, 3, 5, 5), seed=2)
    s = cpp_sample(x1, t=t)
    same = (gradient_of_sum(s, o) == gradient_of_sum(drawn_again(s), o)).flatten(1).all(1)
    assert torch.equal(same, t > 0.875)


@needs_cpp
def test_recovered_noise_does_not_depend_on_layout_batch_or_threads():
    x1, o = tensor((16, 3, 8, 8)), tensor((16, 3, 8, 8), seed=2)
    whole = gradient_of_sum(cpp_sample(x1), o)
    parts = [gradient_of_sum(cpp_sample(x1[i : i + 3], sample_ids=i), o[i : i + 3]) for i in range(0, 16, 3)]
    assert not torch.equal(whole, gradient_of_sum(drawn_again(cpp_sample(x1)), o))
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, gradient_of_sum(cpp_sample(x1.to(memory_format=torch.channels_last)), o))


@needs_cpp
@pytest.mark.parametrize("change", ["in place", "replaced", "rounded", "in inference mode"])
def test_noise_is_not_recovered_from_anything_but_the_drawn_point(change):
    x1, o = tensor((16, 3, 5, 5)), tensor((16, 3, 5, 5), seed=2)
    expected = gradient_of_sum(drawn_again(cpp_sample(x1)), o)
    if change == "in inference mode":  # where torch does not count writes
        with torch.inference_mode():
            s = cpp_sample(x1)
            s.x_t.zero_()
    else:
        s = cpp_sample(x1, dtype=torch.bfloat16 if change == "rounded" else None)
    if change == "in place":
        s.x_t.zero_()
    if change == "replaced":
        s = dataclasses.replace(s, x_t=torch.zeros_like(s.x_t))
        expected = gradient_of_sum(cpp_sample(x1), o)
    assert torch.equal(gradient_of_sum(s, o), expected)


@needs_cpp
def test_the_point_is_not_kept_for_the_backward_pass():
    s = cpp_sample(tensor((4, 3, 8, 8)))
    point, o = weakref.ref(s.x_t), tensor((4, 3, 8, 8), seed=2).requires_grad_()
    loss = s.loss(o)
    del s
    assert point() is None
    loss.backward()


@needs_cpp
def test_a_point_that_wants_its_gradient_is_as_good():
    x1, o = tensor((4, 3, 8, 8)), tensor((4, 3, 8, 8), seed=2)
    s = cpp_sample(x1)
    s.x_t.requires_grad_()
    loss, gradient = loss_and_gradient(s, o)
    assert torch.equal(gradient, loss_and_gradient(cpp_sample(x1), o)[1])
    assert torch.equal(loss, s.loss(o))
