"""group_norm_silu in training: second derivatives, transforms, compilation, memory, threads, modes."""

import pytest
import torch
import torch.nn.functional as F
from norm_cases import LAYER, Case, expected, inputs, key, ours, replaced, with_gradients
from thread_counts import on_thread_counts
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

from fm_fast import _backends
from fm_fast.nn.norm import GroupNormSiLU

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("group_norm_silu", "cpu", "cpp") is not None, reason="the C++ library is not built")


# --- derivatives and transforms ---


def small_case(**changes):
    return replaced(Case(1, 3, 1, groups=2, size=(3, 1), dtype=torch.float64, dropout=0.2), **changes)


@pytest.mark.parametrize("case", [small_case(), small_case(channels=2, second=0, activation=False, dropout=0.0)], ids=str)
def test_gradcheck_of_every_input(case, backend):
    tensors, _ = inputs(case)
    leaves = [t.clone().requires_grad_() for t in tensors if t is not None]

    def run(*present):
        rest = iter(present)
        return ours(case, backend)(*[None if t is None else next(rest) for t in tensors])

    assert gradcheck(run, leaves, check_batched_grad=backend == "cpp")


def test_gradgradcheck(backend):
    case = small_case(size=(2, 1))
    tensors, _ = inputs(case)
    assert gradgradcheck(ours(case, backend), [t.clone().requires_grad_() for t in tensors])


def test_jvp_equals_the_gradient(backend):
    case = small_case()
    tensors, grad_y = inputs(case)
    directions = tuple(torch.randn_like(t) for t in tensors)
    _, tangent = jvp(ours(case, backend), tensors, directions)
    exact = expected(case, tensors, grad_y)
    inner = sum((exact[name] * d).sum() for name, d in zip(list(exact)[1:], directions, strict=True))
    torch.testing.assert_close((tangent * grad_y).sum(), inner, rtol=1e-9, atol=0)


def test_vmap_over_samples_equals_the_batch(backend):
    case = small_case(dropout=0.0)
    tensors, _ = inputs(case)
    whole = ours(case, backend)(*tensors)
    dims = tuple(None if t.dim() == 1 else 0 for t in tensors)
    one = vmap(
        lambda *t: ours(case, backend)(*[a if a.dim() == 1 and d is None else a[None] for a, d in zip(t, dims, strict=True)])[0], dims
    )
    torch.testing.assert_close(one(*tensors), whole)


@pytest.mark.parametrize(
    "case", [Case(2, 8, 4, groups=3, size=(4, 5), dropout=0.3), Case(2, 8, groups=2, size=(4, 4), layouts="lcl", modulated=False)], ids=str
)
def test_compiled_without_a_break(case, backend):
    torch._dynamo.reset()
    tensors, grad_y = inputs(case)
    run = ours(case, backend)
    eager = with_gradients(run, tensors, grad_y)
    compiled = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors, grad_y)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6)


@needs_cpp
def test_opcheck():
    for case in (
        Case(2, 8, 4, groups=3, size=(4, 5), dropout=0.3),
        Case(2, 8, groups=2, size=(4, 4), dtype=torch.bfloat16, modulated=False),
    ):
        tensors, grad_y = inputs(case)
        nothing = torch.empty(0)
        present = [nothing.clone() if t is None else t for t in tensors]
        y, statistics = torch.zeros(case.shape, dtype=case.dtype), torch.zeros(2, case.batch, case.groups)
        tail = (key(case), case.groups, 1e-5, True, case.dropout, LAYER)
        torch.library.opcheck(torch.ops.fm_fast.group_norm_silu.default, (y, *statistics, *present, *tail))
        torch.ops.fm_fast.group_norm_silu(y, *statistics, *present, *tail)
        gradients = [torch.zeros_like(t) for t in present]
        arguments = (*gradients, grad_y, *present, *statistics, key(case), case.groups, True, case.dropout, LAYER)
        torch.library.opcheck(torch.ops.fm_fast.group_norm_silu_backward.default, arguments)


# --- what training needs ---


def saved_bytes(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
        result = function()
    return sum(sizes), result


@needs_cpp
def test_one_full_size_tensor_is_saved():
    """torch keeps the input of the norm and that of silu; ours keeps the first and two numbers a group."""
    layer, x = GroupNormSiLU(8, 32), torch.randn(4, 32, 16, 16, requires_grad=True)
    ours, _ = saved_bytes(lambda: layer(x))
    torchs, _ = saved_bytes(lambda: F.silu(F.group_norm(x, 8, layer.weight, layer.bias)))
    size = x.numel() * 4
    assert size <= ours <= size + 1024
    assert torchs >= 2 * size


@needs_cpp
@pytest.mark.parametrize("layout", ["c", "l"])
def test_bitwise_repeatable_for_any_thread_count(layout):
    case = Case(5, 24, 40, groups=8, size=(17, 19), dropout=0.1, layouts=3 * layout)
    tensors, grad_y = inputs(case)
    results = on_thread_counts(lambda: with_gradients(ours(case, "cpp"), tensors, grad_y))
    assert all(torch.equal(value, results[0][name]) for result in results[1:] for name, value in result.items())


def test_an_empty_batch(backend):
    case = Case(0, 4, 2, groups=2, size=(3, 3), dropout=0.2)
    tensors, grad_y = inputs(case)
    got = with_gradients(ours(case, backend), tensors, grad_y)
    assert got["y"].shape == case.shape
    assert torch.equal(got["weight"], torch.zeros(6))
    assert torch.equal(got["bias"], torch.zeros(6))


def test_a_single_number_a_group_becomes_the_bias(backend):
    bias = torch.randn(4)
    run = ours(Case(1, 4, groups=4, activation=False), backend)
    torch.testing.assert_close(run(torch.randn(1, 4, 1, 1), None, None, torch.ones(4), bias, None, None)[0, :, 0, 0], bias)


@needs_cpp
def test_inputs_made_under_inference_mode_train():
    case = Case(2, 8, groups=2, size=(3, 3))
    with torch.inference_mode():
        x = inputs(case)[0][0]
    weight = torch.ones(8, requires_grad=True)
    ours(case, "cpp")(x, None, None, weight, torch.zeros(8), None, None).sum().backward()
    assert bool(weight.grad.isfinite().all())


def test_a_second_backward_gives_the_same(backend):
    tensors, grad_y = inputs(Case(2, 8, groups=2, size=(3, 3)))
    x = tensors[0].requires_grad_()
    y = ours(Case(2, 8, groups=2, size=(3, 3)), backend)(x, *tensors[1:])
    first, again = (torch.autograd.grad(y, x, grad_y, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_state_dicts_of_group_norm_load():
    norm, layer = torch.nn.GroupNorm(4, 8), GroupNormSiLU(4, 8, activation=False)
    torch.nn.init.normal_(norm.weight)
    layer.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["batched", "create_graph"])
def test_an_input_computed_from_another_gets_its_own_gradient_only(how):
    """As in a U-Net, whose decoder reads a skip connection beside what was computed from it."""
    source = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    layer = GroupNormSiLU(2, 8).double()
    y = layer(torch.sin(3.0 * source), second=source)
    layer.fused = False
    plain = layer(torch.sin(3.0 * source), second=source)
    z = torch.randn(2, *y.shape, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(plain, source, row, retain_graph=True)[0] for row in z])
    if how == "batched":
        (found,) = torch.autograd.grad(y, source, z, is_grads_batched=True)
    else:
        found = torch.stack([torch.autograd.grad(y, source, row, create_graph=True)[0] for row in z])
    torch.testing.assert_close(found, expected)


@needs_cpp
@pytest.mark.parametrize("positions", [16, 25])
def test_numbers_near_the_largest_do_not_spoil_the_gradients_of_rows_that_end_within_a_vector(positions):
    """What lies beyond a row is infinite where its mean is divided by almost nothing."""
    x, layer = torch.full((1, 16, 1, positions), 2.0**119, requires_grad=True), GroupNormSiLU(4, 16)
    torch.nn.init.constant_(layer.weight, 100.0)
    layer(x).sum().backward()
    for gradient in (x.grad, layer.weight.grad, layer.bias.grad):
        assert bool(gradient.isfinite().all())
