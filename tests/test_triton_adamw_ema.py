"""The Triton kernels of adamw_ema, interpreted, against plain PyTorch and torch's own optimiser in float64."""

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
from triton_interpreter import run_checks


def test_adamw_ema_in_the_interpreter():
    run_checks(__file__)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that small tensors have several, whole ones and a rest."""
    from fm_fast.kernels import adamw_ema

    monkeypatch.setattr(adamw_ema, "ROWS", 64)
    monkeypatch.setattr(adamw_ema, "TILES", 2)
    monkeypatch.setattr(adamw_ema, "CHUNK", 512)


def triton_step(tensors, grads, state, settings=(SETTINGS,), decays=DECAYS, copies=()):
    """As adamw_cases.step."""
    from fm_fast.kernels.adamw_ema import launch, launch_norm

    total = torch.full((1,), torch.nan, dtype=torch.float64)
    launch_norm(total, [g for g in grads if g.numel()])
    decay_rows = torch.tensor(decays, dtype=torch.float64).reshape(-1, 4)
    flat = (state.m, state.v, state.averages, state.counts)
    launch(tensors, list(copies), *flat, grads, state.layout, total, table(*settings), decay_rows)
    return total


def assert_same(tensors, state, others, other_state, tolerance):
    for a, b in zip(tensors, others, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for name in ("m", "v", "averages"):
        a, b = getattr(state, name), getattr(other_state, name)
        assert torch.equal(a.isnan(), b.isnan()), "the memory between the parameters was written"
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=tolerance, atol=tolerance)
    assert torch.equal(state.counts, other_state.counts)


def check_steps_equal_torch_in_float64():
    tensors = parameters(torch.float64)
    state, model = state_of(tensors), TorchSteps(parameters(torch.float64), torch.float64)
    for n in range(3):
        grads = gradients(tensors, n)
        total = triton_step(tensors, grads, state)
        model.step(grads)
        assert float(total) == pytest.approx(math.fsum(x**2 for g in grads for x in g.flatten().tolist()), rel=1e-13)
    for i, (p, q) in enumerate(zip(tensors, model.parameters, strict=True)):
        torch.testing.assert_close(p, q.detach(), rtol=1e-12, atol=1e-14)
        for k, average in enumerate(model.averages):
            torch.testing.assert_close(state.part(state.averages, i, p)[k], average[i], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def check_float32_weights_and_gradients_of_any_dtype(dtype):
    tensors, others = parameters(), parameters()
    state, other_state = state_of(tensors), state_of(others)
    for n in range(2):
        grads = gradients(tensors, n, dtype)
        if n == 1:
            grads[5] = grads[5].float()  # two kinds of launches
        triton_step(tensors, grads, state)
        step(others, grads, other_state, "reference")
    assert_same(tensors, state, others, other_state, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def check_copies_are_the_weights_rounded(dtype):
    tensors = parameters()
    copies = [torch.full_like(p, torch.nan, dtype=dtype) for p in tensors]
    copies[5] = torch.empty(0, dtype=dtype)
    triton_step(tensors, gradients(tensors, 0), state_of(tensors), copies=copies)
    for i, (p, copy) in enumerate(zip(tensors, copies, strict=True)):
        assert i == 5 or torch.equal(copy, p.to(dtype))


@pytest.mark.parametrize("aligned", [True, False])
def check_aligned_memory(aligned, monkeypatch):
    """What lies on 16 bytes is addressed so, and nothing else is."""
    from fm_fast.kernels import _table

    seen, original = [], _table._are_aligned
    monkeypatch.setattr(_table, "_are_aligned", lambda rows: seen.append(original(rows)) or seen[-1])
    memory = torch.zeros(4096 + 16)
    start = (-memory.data_ptr() // 4) % 4 + (0 if aligned else 1)
    p, g = memory[start : start + 1000], memory[start + 1008 : start + 2008]
    state = state_of([p])
    layout = torch.tensor([[0 if aligned else 3, 0]])
    triton_step([p], [g.normal_()], type(state)(state.m, state.v, state.averages.nan_to_num(), state.counts, layout))
    assert seen == [aligned, aligned]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def check_steps_that_are_not_finite_are_only_counted(bad):
    tensors, others = parameters(), parameters()
    state, other_state = state_of(tensors), state_of(others)
    for n in range(3):
        grads = gradients(tensors, n)
        if n < 2:
            grads[11 if n else 3].view(-1)[-1] = bad
        triton_step(tensors, grads, state)
        step(others, grads, other_state, "reference")
    assert state.counts[:2].tolist() == [1, 2]
    assert_same(tensors, state, others, other_state, 2e-6)


def check_groups_missing_gradients_and_numbers_of_averages():
    rows = (SETTINGS, (1e-3, 0.0, 0.0, 1e-4, 0.0, math.inf), (0.0, 0.9, 0.9, 1e-8, 0.5, 1.0))
    for averages in (0, 1, 5):
        decays = [(0.1 * (k + 1), 0.0, 0.001, 0.0) for k in range(averages)]
        tensors, others = [data((200,), i) for i in range(4)], [data((200,), i) for i in range(4)]
        state, other_state = (state_of(x, averages=averages, groups=[2, 0, 1, 0]) for x in (tensors, others))
        for n in range(2):
            grads = [torch.empty(0) if i == 3 else data((200,), 10 * n + i) for i in range(4)]
            triton_step(tensors, grads, state, rows, decays)
            step(others, grads, other_state, "reference", rows, decays)
        assert_same(tensors, state, others, other_state, 2e-6)


def check_bias_is_corrected_by_a_parameters_own_updates(monkeypatch):
    """More parameters than numbers_kernel takes at once; gradients come late, stay away for a step, or are not finite."""
    from fm_fast.kernels import adamw_ema

    monkeypatch.setattr(adamw_ema, "MOST_PARAMETERS", 8)
    tensors, others = [data((5,), i) for i in range(18)], [data((5,), i) for i in range(18)]
    state, other_state = state_of(tensors), state_of(others)
    for n in range(4):
        grads = [torch.empty(0) if i % 4 > n or (i % 7 == 0 and n == 2) else data((5,), 10 * n + i) for i in range(18)]
        if n == 1:
            grads[0] = torch.full((5,), math.inf)
        triton_step(tensors, grads, state)
        step(others, grads, other_state, "reference")
    assert_same(tensors, state, others, other_state, 2e-6)
    assert state.counts[2:].unique().tolist() == [1, 2, 3] and state.counts[:2].tolist() == [3, 1]


def check_no_gradients_at_all():
    tensors = [torch.ones(3)]
    state = state_of(tensors)
    assert float(triton_step(tensors, [torch.empty(0)], state)) == 0.0 and state.counts[:2].tolist() == [1, 0]


WRONG = {
    "must have one entry a parameter, 2, got 1 and 0": {"g": [torch.ones(2, 3)]},
    r"g\[0\] must have the shape and strides": {"g": [torch.ones(3, 2).t(), torch.ones(4)]},
    r"copies\[0\] must have the shape": {"copies": [torch.ones(6), torch.empty(0)]},
    r"p\[0\] must have memory without gaps": {"p": [torch.ones(2, 6)[:, ::2], torch.ones(4)], "g": [torch.empty(0), torch.ones(4)]},
    r"layout and m must hold p\[1\], 4 of torch.float64": {"p": [torch.ones(2, 3), torch.ones(4, dtype=torch.float64)]},
    r"layout and m must hold p\[1\], 4 of torch.float32, behind 6, got 5, 0": {"layout": torch.tensor([[0, 0], [5, 0]])},
    "layout and m must hold .* got 34, 0": {"layout": torch.tensor([[0, 0], [34, 0]])},
    "layout and m must hold .* got 16, 1": {"layout": torch.tensor([[0, 0], [16, 1]])},
    "v must be contiguous torch.float32": {"v": torch.zeros(5)},
    "layout must be contiguous torch.int64": {"layout": torch.zeros(4, dtype=torch.int64)},
    "counts must be": {"counts": torch.zeros(2)},
    "settings must be": {"settings": torch.ones(1, 5, dtype=torch.float64)},
    "decays must be": {"decays": torch.ones(1, 4, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", WRONG)
def check_wrong_arguments(message):
    from fm_fast.kernels.adamw_ema import launch

    tensors = [torch.ones(2, 3), torch.ones(4)]
    state = state_of(tensors)
    flat = {"m": state.m, "v": state.v, "averages": state.averages, "counts": state.counts}
    arguments = {"p": tensors, "copies": [], **flat, "g": [torch.ones(2, 3), torch.ones(4)], "layout": state.layout}
    arguments |= {"total": torch.ones(1, dtype=torch.float64), "settings": table(SETTINGS), "decays": table(*DECAYS)}
    with pytest.raises(ValueError, match=message):
        launch(**arguments | WRONG[message])


def check_what_is_kept_is_found_by_everything_that_was_checked():
    """The plan of a step is that of later ones with the same memory; not where the same addresses hold something else."""
    tensors, gradient = [torch.ones(2, 3)], torch.ones(6)
    state = state_of(tensors)
    triton_step(tensors, [gradient.view(2, 3)], state)
    with pytest.raises(ValueError, match=r"g\[0\] must have the shape and strides"):
        triton_step(tensors, [gradient.as_strided((2, 3), (1, 2))], state)
    with pytest.raises(ValueError, match=r"p\[0\] must have memory without gaps"):
        triton_step([tensors[0].as_strided((2, 2), (3, 1))], [torch.empty(0)], state)
    triton_step(tensors, [gradient.view(2, 3).double()], state)
    assert state.counts.tolist() == [2, 0, 2]


def check_gradients_with_gaps_are_refused():
    from fm_fast.kernels.adamw_ema import launch_norm

    with pytest.raises(ValueError, match=r"g\[0\] must have memory without gaps"):
        launch_norm(torch.zeros(1, dtype=torch.float64), [torch.ones(4, 6)[:, ::2]])


def check_tables_while_a_graph_is_captured(monkeypatch):
    """Those of known addresses are kept for ever, and new ones, which would be copied from the host at every replay, are refused."""
    from fm_fast.kernels import _table

    capturing, there = [False], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(_table, "_to_device", lambda rows, device: torch.tensor(rows))
    known, new = (_table.Batch(_table.Kind(None, None), (_table.Row(16 * i, 32, 0, 0, 5, 0),), True) for i in (1, 2))
    made = _table.tables(known, 4, there)
    assert made[1].tolist() == [[0, 0], [0, 4]] and _table._read_by_graphs == []
    capturing[0] = True
    assert _table.tables(known, 4, there) is made and _table._read_by_graphs == [made]
    with pytest.raises(RuntimeError, match=r"gradients: expected memory that an earlier step had, as AdamWEMA\.keep_gradients\(\)"):
        _table.tables(new, 4, there)
    _table._read_by_graphs.clear()
    _table._made_tables.cache_clear()


def check_a_mean_without_memory_is_the_gradient():
    assert_a_mean_without_memory_is_the_gradient(triton_step)
