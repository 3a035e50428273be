"""adamw_ema against torch's AdamW, clip_grad_norm_ and lerp: dtypes, memory, skipped steps, repeatability, and what it refuses."""

import math

import pytest
import torch
from adamw_cases import (
    DECAYS,
    SETTINGS,
    TorchSteps,
    assert_a_mean_without_memory_is_the_gradient,
    data,
    gradients,
    parameters,
    state_of,
    step,
    table,
)
from thread_counts import on_thread_counts

from fm_fast import _backends

needs_cpp = pytest.mark.skipif(_backends.why_not("adamw_ema", "cpu", "cpp") is not None, reason="the C++ library is not built")
STEPS = 30


def run(backend, dtype=torch.float32, steps=STEPS, settings=SETTINGS, grad_dtype=None):
    """(parameters, state) after a few steps."""
    tensors = parameters(dtype)
    state = state_of(tensors)
    for n in range(steps):
        step(tensors, gradients(tensors, n, grad_dtype), state, backend, (settings,))
    return tensors, state


def run_torch(dtype, start=torch.float32, settings=SETTINGS):
    tensors = parameters(start)
    model = TorchSteps(tensors, dtype, settings)
    for n in range(STEPS):
        model.step(gradients(tensors, n))
    return model


def pairs(tensors, state, model):
    """Everything that both keep: (ours, torch's)."""
    moments = zip(model.moments("exp_avg"), model.moments("exp_avg_sq"), strict=True)
    for i, (p, q, (m, v)) in enumerate(zip(tensors, model.parameters, moments, strict=True)):
        yield p, q.detach()
        yield state.part(state.m, i, p), m
        yield state.part(state.v, i, p), v
        for k, average in enumerate(model.averages):
            yield state.part(state.averages, i, p)[k], average[i]


@pytest.mark.parametrize("settings", [SETTINGS, (1e-3, 0.8, 0.999, 1e-4, 0.0, math.inf)], ids=["decay and clip", "neither"])
def test_many_steps_equal_torch_in_float64(settings, backend):
    tensors, state = run(backend, torch.float64, settings=settings)
    model = run_torch(torch.float64, torch.float64, settings)
    for ours, theirs in pairs(tensors, state, model):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_mean_without_memory_is_the_gradient(backend):
    assert_a_mean_without_memory_is_the_gradient(lambda tensors, grads, state, rows: step(tensors, grads, state, backend, rows))


def test_float32_is_as_close_to_float64_as_torch_is(backend):
    tensors, state = run(backend)
    exact, theirs = run_torch(torch.float64), run_torch(torch.float32)
    for (ours, true), (found, _) in zip(pairs(tensors, state, exact), pairs(*_as_state(theirs), exact), strict=True):
        if ours.numel():
            error, allowed = (float((x.double() - true).abs().max()) for x in (ours, found))
            assert error <= 1.5 * allowed + 2**-23 * float(true.abs().max())


def _as_state(model):
    """torch's own numbers in the place of ours."""
    state = state_of([p.detach() for p in model.parameters])
    for i, p in enumerate(model.parameters):
        state.part(state.m, i, p).copy_(model.moments("exp_avg")[i])
        state.part(state.v, i, p).copy_(model.moments("exp_avg_sq")[i])
        for k, average in enumerate(model.averages):
            state.part(state.averages, i, p)[k].copy_(average[i])
    return [p.detach() for p in model.parameters], state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_any_dtype(dtype, backend):
    """They are widened (or rounded once) to the dtype of the weights; the norm is that of the gradients as they are."""
    tensors, state = parameters(), state_of(parameters())
    expected, expected_state = parameters(), state_of(parameters())
    for n in range(3):
        grads = gradients(tensors, n, dtype)
        step(tensors, grads, state, backend)
        step(expected, [torch.empty_like(p).copy_(g) for p, g in zip(expected, grads, strict=True)], expected_state, backend)
    tolerance = 0.0 if dtype != torch.float64 else 1e-6
    for a, b in zip(tensors, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_weights_rounded_to_nearest(dtype, backend):
    tensors = parameters()
    copies = [torch.full_like(p, torch.nan, dtype=dtype) for p in tensors]
    copies[5] = torch.empty(0, dtype=dtype)
    state = state_of(tensors)
    step(tensors, gradients(tensors, 0), state, backend, copies=copies)
    for i, (p, copy) in enumerate(zip(tensors, copies, strict=True)):
        assert i == 5 or torch.equal(copy, p.to(dtype))


def test_nothing_but_parameters_and_their_state_is_written(backend):
    """The memory between them was NaN before."""
    tensors, state = run(backend, steps=2)
    elements = sum(p.numel() for p in tensors)
    for flat in (state.m, state.v, *state.averages):
        assert int((~flat.isnan()).sum()) == elements
    memory = tensors[-1].as_strided((tensors[-1].numel() + 2,), (1,), 0)
    assert memory.isnan().tolist() == [True, *[False] * tensors[-1].numel(), True]


@needs_cpp
def test_the_number_of_threads_changes_nothing():
    def three_steps():
        tensors = [data((300, 301), 1), *parameters(), data((7, 20_001), 2)]
        state = state_of(tensors)
        totals = [step(tensors, gradients(tensors, n), state, "cpp") for n in range(3)]
        return [*totals, *tensors, torch.nan_to_num(state.m), torch.nan_to_num(state.averages)]

    results = on_thread_counts(three_steps)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_only_counted(bad, backend):
    tensors, state = parameters(), state_of(parameters())
    expected, expected_state = parameters(), state_of(parameters())
    for n in range(4):
        grads = gradients(tensors, n)
        if n in (0, 2):  # the first step too: bias corrections count the updates that happened
            grads[(11 if n else 3)].view(-1)[-1] = bad
        else:
            step(expected, grads, expected_state, backend)
        step(tensors, grads, state, backend)
    assert state.counts[:2].tolist() == [2, 2] and expected_state.counts[:2].tolist() == [2, 0]
    for a, b in zip(tensors, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in ((state.m, expected_state.m), (state.v, expected_state.v), (state.averages, expected_state.averages)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_large_gradients_are_clipped_and_not_taken_for_infinite(backend):
    tensors, state = [torch.zeros(33)], state_of([torch.zeros(33)])
    total = step(tensors, [torch.full((33,), 1e30)], state, backend, ((0.1, 0.0, 0.0, 0.0, 0.0, 1.0),))
    assert float(total) == pytest.approx(33e60, rel=1e-6) and state.counts[:2].tolist() == [1, 0]
    torch.testing.assert_close(state.part(state.m, 0, tensors[0]), torch.full((33,), 33**-0.5))
    torch.testing.assert_close(tensors[0], torch.full((33,), -0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_of_squares(dtype, backend):
    grads = gradients(parameters(), 0, dtype)
    total = step(parameters(), [g.clone() for g in grads], state_of(parameters()), backend)
    exact = math.fsum(float(x) ** 2 for g in grads for x in g.flatten().tolist())
    assert float(total) == pytest.approx(exact, rel=1e-14)


def test_no_gradients_at_all(backend):
    tensors, state = [torch.ones(3)], state_of([torch.ones(3)])
    assert float(step(tensors, [torch.empty(0)], state, backend)) == 0.0
    assert torch.equal(tensors[0], torch.ones(3)) and state.counts[:2].tolist() == [1, 0]


def test_a_parameter_without_gradient_stays_and_its_averages_move_on(backend):
    tensors = [torch.ones(5), torch.ones(20)]
    state = state_of(tensors)
    state.part(state.averages, 0, tensors[0]).zero_()
    step(tensors, [torch.empty(0), torch.ones(20)], state, backend)
    assert torch.equal(tensors[0], torch.ones(5)) and not bool(state.part(state.m, 0, tensors[0]).any())
    torch.testing.assert_close(state.part(state.averages, 0, tensors[0]), torch.tensor([[0.9], [1.0]]).expand(2, 5))
    assert bool((tensors[1] < 1.0).all())


def test_groups_have_their_own_settings(backend):
    rows = (SETTINGS, (1e-3, 0.5, 0.9, 1e-4, 0.0, math.inf), (0.0, 0.9, 0.9, 1e-8, 0.5, 1.0))
    tensors = [data((50,), i) for i in range(3)]
    grads = [data((50,), 10 + i) for i in range(3)]
    state = state_of(tensors, groups=[2, 0, 1])
    alone = [p.clone() for p in tensors]
    step(tensors, grads, state, backend, rows)
    for i, group in enumerate((2, 0, 1)):
        # The others' gradients still count in the norm.
        others = [g if j == i else torch.empty(0) for j, g in enumerate(grads)]
        single = state_of(alone)
        total = step([p.clone() for p in alone], grads, state_of(alone), backend)
        settings = (*rows[group][:5], rows[group][5] * float(_norm_of(others) / total.sqrt()))
        step(alone, others, single, backend, (settings,))
        torch.testing.assert_close(alone[i], tensors[i], rtol=1e-5, atol=1e-7)


def _norm_of(grads):
    return torch.cat([g.double() for g in grads]).norm()


def test_averages_are_weighted_sums_of_all_weights(backend):
    """The power function gives the weights after step i the share that integrates t^gamma over the step (Karras et al. 2024)."""
    gamma, steps = 4.0, 40
    tensors = [torch.zeros(3, dtype=torch.float64)]
    state = state_of(tensors, averages=1)
    history = []
    for n in range(steps):
        step(tensors, [data((3,), n, torch.float64)], state, backend, decays=((1.0, 0.0, 1.0, gamma + 1.0),))
        history.append(tensors[0].clone())
    shares = [((n + 1) / steps) ** (gamma + 1) - (n / steps) ** (gamma + 1) for n in range(steps)]
    expected = sum(share * p for share, p in zip(shares, history, strict=True))
    torch.testing.assert_close(state.part(state.averages, 0, tensors[0])[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("averages", [0, 1, 5])
def test_any_number_of_averages(averages, backend):
    tensors = parameters()
    state = state_of(tensors, averages=averages)
    rows = [(0.1 * (k + 1), 0.0, 0.0001, 0.0) for k in range(averages)]
    before = [p.clone() for p in tensors]
    step(tensors, gradients(tensors, 0), state, backend, decays=rows)
    for k in range(averages):
        for i, (old, new) in enumerate(zip(before, tensors, strict=True)):
            expected = 0.1 * (k + 1) * old + (1 - 0.1 * (k + 1)) * new
            torch.testing.assert_close(state.part(state.averages, i, new)[k], expected)


def raw_arguments(averages=1):
    tensors = [torch.ones(2, 3), torch.ones(4)]
    state = state_of(tensors, averages=averages)
    flat = {"m": state.m, "v": state.v, "averages": state.averages, "counts": state.counts}
    arguments = {"p": tensors, "copies": [], **flat, "g": [torch.ones(2, 3), torch.ones(4)], "layout": state.layout}
    return arguments | {"total": torch.ones(1, dtype=torch.float64), "settings": table(SETTINGS), "decays": table(*DECAYS[:averages])}


@needs_cpp
def test_opcheck():
    arguments = raw_arguments()
    arguments["copies"] = [torch.zeros(2, 3, dtype=torch.bfloat16), torch.empty(0)]
    torch.library.opcheck(torch.ops.fm_fast.adamw_ema.default, (), arguments)
    torch.library.opcheck(torch.ops.fm_fast.adamw_ema_norm.default, (torch.zeros(1, dtype=torch.float64), arguments["g"]))


@needs_cpp
def test_handles_are_given_back():
    arguments = raw_arguments()
    tensors = [x for value in arguments.values() for x in (value if isinstance(value, list) else [value])]
    before = [x._use_count() for x in tensors]
    with torch.no_grad():
        for _ in range(5):
            torch.ops.fm_fast.adamw_ema(**arguments)
            torch.ops.fm_fast.adamw_ema_norm(arguments["total"], arguments["g"])
            with pytest.raises(RuntimeError, match="argument settings"):
                torch.ops.fm_fast.adamw_ema(**arguments | {"settings": torch.ones(1, 5, dtype=torch.float64)})
    assert [x._use_count() for x in tensors] == before


WRONG = {
    "argument g: expected one tensor a parameter": {"g": [torch.ones(2, 3)]},
    "argument g: expected the shape and strides of p": {"g": [torch.ones(3, 2).t(), torch.ones(4)]},
    "argument g: expected a floating-point": {"g": [torch.ones(2, 3), torch.ones(4, dtype=torch.int64)]},
    "argument p: expected memory without gaps": {"p": [torch.ones(2, 6)[:, ::2], torch.ones(4)]},
    "argument p: expected the dtype of m": {"p": [torch.ones(2, 3), torch.ones(4, dtype=torch.float64)]},
    "argument copies: expected one tensor a parameter": {"copies": [torch.ones(2, 3, dtype=torch.bfloat16)]},
    "argument copies: expected bfloat16 or float16": {"copies": [torch.ones(2, 3), torch.ones(4)]},
    "argument copies: expected the shape": {"copies": [torch.ones(6, dtype=torch.bfloat16), torch.empty(0)]},
    "argument v: expected a contiguous tensor": {"v": torch.zeros(5)},
    "argument v: expected the dtype of m": {"v": torch.zeros(35, dtype=torch.float64)},
    "argument averages: expected": {"averages": torch.zeros(1, 5)},
    "argument counts: expected two numbers and one a parameter": {"counts": torch.zeros(2, dtype=torch.int64)},
    "argument counts: expected a contiguous int64": {"counts": torch.zeros(2)},
    "argument layout: expected rising offsets": {"layout": torch.tensor([[0, 0], [5, 0]])},
    "argument layout: expected .2, 2.": {"layout": torch.tensor([[0, 0]])},
    "argument layout: expected rising offsets of parameters that fit": {"layout": torch.tensor([[0, 0], [34, 0]])},
    "argument layout: expected 0 to 0, got 1": {"layout": torch.tensor([[0, 0], [16, 1]])},
    "argument total: expected a contiguous tensor of 1": {"total": torch.ones(2, dtype=torch.float64)},
    "argument settings: expected .rows, 6.": {"settings": torch.ones(1, 5, dtype=torch.float64)},
    "argument settings: expected float64": {"settings": torch.ones(1, 6)},
    "argument decays: expected .1, 4.": {"decays": torch.ones(2, 4, dtype=torch.float64)},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.adamw_ema(**raw_arguments() | WRONG[message])


@needs_cpp
def test_gradients_with_gaps_are_refused():
    with pytest.raises(RuntimeError, match="argument g: expected memory without gaps"):
        torch.ops.fm_fast.adamw_ema_norm(torch.zeros(1, dtype=torch.float64), [torch.ones(4, 6)[:, ::2]])


@needs_cpp
@pytest.mark.parametrize("which", ["p", "g"])
def test_the_raw_op_refuses_gradients(which):
    arguments = raw_arguments()
    arguments[which][1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"argument {which}: requires grad"):
        torch.ops.fm_fast.adamw_ema(**arguments)
