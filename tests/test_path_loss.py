"""path_loss against the independent float64 model: value, gradient, reductions, weights, dtypes, layouts, repeatability."""

import sys

import device_parity as parity
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from path_loss_cases import OBJECTIVES, SEED, STEP, loss_and_gradient, tensor
from thread_counts import on_thread_counts

import fm_fast as fm
from fm_fast import _backends

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
SHAPES = [(3,), (5, 1), (4, 2), (3, 7), (2, 3, 5), (2, 3, 17, 16), (2, 3, 2, 3, 5), (3, 4099), (130, 2)]


def expected(s, o, x1, weight=None, reduction="mean", x0=None):
    x0 = oracle.normal(x1.shape, SEED, STEP) if x0 is None else x0.double().numpy()
    data = oracle.data(x1.numpy() if x1.dtype == torch.uint8 else x1.double().numpy(), SEED, STEP)
    rows = s.coef.double().numpy()
    weight = None if weight is None else weight.double().numpy()
    return oracle.loss(o.detach().double().numpy(), data, x0, rows, weight, reduction)


def assert_gradient(got, exact, dtype):
    """Within the rounding of one value, and without bias: relative L2 and cosine."""
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-5}.get(dtype, 1e-5)
    got, exact = got.double().numpy(), np.asarray(exact)
    scale = np.abs(exact).max() + 1e-300
    np.testing.assert_allclose(got, exact, rtol=rtol, atol=scale * (2e-6 if dtype != torch.float16 else 1e-3))
    cosine = (got * exact).sum() / np.sqrt((got**2).sum() * (exact**2).sum() + 1e-300)
    assert cosine > 1 - 1e-5


@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_path_and_objective(path, objective, backend):
    x1, o = tensor((16, 3, 5, 5)), tensor((16, 3, 5, 5), seed=2)
    s = fm.sample_path(x1, path=path, objective=objective, seed=SEED, step=STEP, backend=backend)
    loss, gradient = loss_and_gradient(s, o)
    value, exact = expected(s, o, x1)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    assert_gradient(gradient, exact, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", ["", "sample", "element"])
def test_shapes_reductions_and_weights(shape, reduction, weighted, backend):
    x1, o = tensor(shape), tensor(shape, seed=2)
    weight = {"": None, "sample": tensor(shape[:1], seed=3).abs(), "element": (tensor(shape, seed=3) > 0).float()}[weighted]
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend)
    grad_output = torch.linspace(1, 2, shape[0]) if reduction == "none" else None
    loss, gradient = loss_and_gradient(s, o, weight, reduction, grad_output)
    value, exact = expected(s, o, x1, weight, reduction)
    np.testing.assert_allclose(loss.numpy(), value, rtol=1e-5)
    assert_gradient(gradient, exact if grad_output is None else exact * oracle.column(grad_output.double().numpy(), exact), torch.float32)
    assert loss.dtype == torch.float32
    assert loss.shape == (shape[:1] if reduction == "none" else ())


@pytest.mark.parametrize("kind", ["sample", "mask", "bool", "float64"])
def test_a_weighted_mean_is_the_mean_over_what_a_mask_leaves(kind, backend):
    x1, o = tensor((4, 3, 6, 5)), tensor((4, 3, 6, 5), seed=2)
    mask = tensor((4, 1, 6, 1), seed=3) > 0
    weight = {"sample": tensor((4,), seed=3).abs(), "mask": mask.float(), "bool": mask, "float64": mask.double()}[kind]
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend)
    whole = weight.double().reshape(4, *weight.shape[1:] or (1, 1, 1)).expand(o.shape)
    value, exact = expected(s, o, x1, whole, "sum")
    loss, gradient = loss_and_gradient(s, o, weight, "weighted_mean")
    assert float(loss) == pytest.approx(float(value.sum() / whole.sum()), rel=1e-5)
    assert_gradient(gradient, exact / float(whole.sum()), torch.float32)


def test_a_weighted_mean_of_nothing_is_nan_and_one_without_weights_refused(backend):
    s = fm.sample_path(tensor((4, 6)), seed=SEED, step=STEP, backend=backend)
    assert s.loss(tensor((4, 6), seed=2), torch.zeros(4), "weighted_mean").isnan()
    with pytest.raises(ValueError, match=r"weight must be given with reduction='weighted_mean', got None"):
        s.loss(tensor((4, 6), seed=2), reduction="weighted_mean")


def test_a_weight_that_broadcasts_is_a_mask(backend):
    x1, o = tensor((4, 3, 6, 5)), tensor((4, 3, 6, 5), seed=2)
    mask = (tensor((4, 1, 6, 1), seed=3) > 0).float()
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend)
    value, exact = expected(s, o, x1, mask.expand(4, 3, 6, 5))
    loss, gradient = loss_and_gradient(s, o, mask)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    assert_gradient(gradient, exact, torch.float32)


@pytest.mark.parametrize("o_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x1_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_mixed_dtypes(o_dtype, x1_dtype, given, backend):
    x1, o = tensor((4, 3, 6, 7), x1_dtype), tensor((4, 3, 6, 7), o_dtype, seed=2)
    x0 = tensor((4, 3, 6, 7), torch.bfloat16, seed=3) if given else None
    s = fm.sample_path(x1, x0=x0, seed=SEED, step=STEP, backend=backend)
    loss, gradient = loss_and_gradient(s, o)
    value, exact = expected(s, o, x1, x0=x0)
    assert gradient.dtype == o_dtype
    assert loss.dtype == (torch.float64 if torch.float64 in (o_dtype, x1_dtype) else torch.float32)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    assert_gradient(gradient, exact, o_dtype)


def in_layout(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "batch slice":
        return torch.stack([x, x], 1).flatten(0, 1)[::2]
    return x.clone()


@pytest.mark.parametrize("o_layout", ["contiguous", "channels_last", "transposed", "batch slice"])
@pytest.mark.parametrize("x1_layout", ["contiguous", "channels_last", "transposed", "batch slice"])
@pytest.mark.parametrize("given", [False, True])
def test_mixed_layouts_give_the_same_bits(o_layout, x1_layout, given, backend):
    x1, o, x0 = (tensor((3, 3, 9, 7), seed=i) for i in range(3))
    noise = x0 if given else None
    plain = loss_and_gradient(fm.sample_path(x1, x0=noise, t=0.4, seed=SEED, step=STEP, backend=backend), o)
    s = fm.sample_path(
        in_layout(x1, x1_layout), x0=None if not given else in_layout(x0, "channels_last"), t=0.4, seed=SEED, step=STEP, backend=backend
    )
    moved = loss_and_gradient(s, in_layout(o, o_layout))
    torch.testing.assert_close(moved[0], plain[0], rtol=1e-6, atol=0)
    assert torch.equal(moved[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", [1, 64, 67, 5000])
def test_few_numbers_a_sample_give_the_same_bits_with_gaps_between_the_samples(batch, points, given, dtype, backend):
    """Without gaps the C++ kernels take such samples side by side."""
    padded = [tensor((batch, points + 3), dtype, seed)[:, :points] for seed in (1, 2, 3)]

    def results(inputs):
        x1, x0, o = inputs
        s = fm.sample_path(x1, x0=x0 if given else None, path="vp", objective="score", seed=SEED, step=STEP, backend=backend)
        return s.x_t, *loss_and_gradient(s, o, reduction="none"), *loss_and_gradient(s, o)

    for got, expected in zip(results([x.contiguous() for x in padded]), results(padded), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_equals_mse_loss_on_the_same_noise(backend):
    x1 = tensor((8, 3, 8, 8))
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend)
    o = tensor((8, 3, 8, 8), seed=2).requires_grad_()
    naive = F.mse_loss(o, x1 - s.x0)
    torch.testing.assert_close(s.loss(o), naive, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(s.loss(o), o)[0], torch.autograd.grad(naive, o)[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_output", [1.0, 3.0])
def test_a_second_backward_gives_the_same_gradient(dtype, grad_output, backend):
    s = fm.sample_path(tensor((4, 3, 8, 8)), seed=SEED, step=STEP, backend=backend)
    o = tensor((4, 3, 8, 8), dtype, seed=2).requires_grad_()
    loss = s.loss(o)
    scale = torch.tensor(grad_output)
    loss.backward(scale, retain_graph=True)
    first = o.grad.clone()
    o.grad = None
    loss.backward(scale, retain_graph=True)
    assert torch.equal(o.grad, first)
    loss.backward(scale)
    assert torch.equal(o.grad, 2 * first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(_backends.why_not("path_loss", "cpu", "cpp") is not None, reason="no C++ kernels")
def test_the_op_may_look_at_grad_output_itself(dtype, monkeypatch):
    """As on a GPU, where the host would have to wait."""
    monkeypatch.setattr(sys.modules["fm_fast._ops.path_loss"], "_is_on_device", lambda number: True)
    parity.check_finished_gradient(parity.Place("cpu", "cpp"), dtype)
    parity.check_early_exit(parity.Place("cpu", "cpp"), torch.ops.fm_fast.path_loss_backward.default, (4, 3, 8, 8))


def test_the_gradient_that_can_be_differentiated_is_that_of_the_loss(backend):
    """In float64 it shows that both are of the same noise."""
    s = fm.sample_path(tensor((4, 3, 8, 8), torch.float64), seed=SEED, step=STEP, backend=backend)
    o = tensor((4, 3, 8, 8), torch.float64, seed=2).requires_grad_()
    loss = s.loss(o)
    (plain,) = torch.autograd.grad(loss, o, retain_graph=True)
    (other,) = torch.autograd.grad(loss, o, create_graph=True)
    torch.testing.assert_close(other, plain, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(plain, 2 * (o.detach() - s.target) / o.numel(), rtol=1e-13, atol=1e-16)


def test_where_nothing_is_drawn_torchs_generator_stays(backend):
    x = tensor((4, 2))
    before = torch.get_rng_state()
    s = fm.sample_path(x, x0=x, t=0.5, backend=backend)
    s.loss(x)
    fm.divergence(lambda x, t: x, x, 0.5, kind="exact")
    fm.log_likelihood(lambda x, t: x, x, steps=2, kind="exact")
    assert torch.equal(torch.get_rng_state(), before)
    found = torch.vmap(lambda x: fm.sample_path(x, x0=x, t=0.5).x_t)(tensor((3, 4, 2)))
    torch.testing.assert_close(found, tensor((3, 4, 2)))
    fm.sample_path(x, t=0.5, backend=backend)
    assert not torch.equal(torch.get_rng_state(), before)


def test_changing_the_gradient_in_place_does_not_change_the_next_one(backend):
    s = fm.sample_path(tensor((4, 8)), seed=SEED, step=STEP, backend=backend)
    o = tensor((4, 8), seed=2).requires_grad_()
    loss = s.loss(o)
    loss.backward(retain_graph=True)
    first = o.grad.clone()
    o.grad.mul_(100)
    o.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(o.grad, first)
    torch.autograd.grad(loss, o, retain_graph=True)[0].mul_(100)  # which is nobody's .grad
    assert torch.equal(torch.autograd.grad(loss, o)[0], first)


def test_half_precision_gradients_survive_a_large_mean_under_a_scaler(backend):
    """2 / N at N = 2.5e7 is below float16's smallest number; scaled by 2^16 it is not. The loss neither overflows nor saturates."""
    shape = (25, 1_000_000)
    if backend == "reference":
        shape = (25, 10_000)
    x1, o = torch.zeros(shape, dtype=torch.float16), torch.full(shape, 1.0, dtype=torch.float16, requires_grad=True)
    s = fm.sample_path(x1, x0=torch.zeros(shape, dtype=torch.float16), t=0.5, backend=backend)
    loss = s.loss(o)
    (loss * 65536.0).backward()
    assert float(loss.detach()) == pytest.approx(1.0, rel=1e-6)
    exact = 65536.0 * 2.0 / o.numel()
    assert float(o.grad.min()) == float(o.grad.max()) == pytest.approx(exact, rel=2**-10)


def test_bitwise_repeatable_for_any_thread_count(backend):
    x1, o = tensor((37, 3, 19, 19)), tensor((37, 3, 19, 19), seed=2)

    def run():
        return loss_and_gradient(fm.sample_path(x1, seed=SEED, step=STEP, backend=backend), o)

    (value, gradient), *others = [*on_thread_counts(run), run()]
    assert all(torch.equal(gradient, other) for _, other in others)
    if backend != "reference":
        assert all(torch.equal(value, other) for other, _ in others)


def test_accumulation_equals_the_whole_batch(backend):
    x1, o = tensor((64, 3, 5, 5)), tensor((64, 3, 5, 5), seed=2)
    whole = loss_and_gradient(fm.sample_path(x1, seed=SEED, step=STEP, backend=backend), o)
    parts = [
        loss_and_gradient(fm.sample_path(x1[i : i + 16], seed=SEED, step=STEP, sample_ids=i, backend=backend), o[i : i + 16])
        for i in range(0, 64, 16)
    ]
    torch.testing.assert_close(torch.stack([p[0] for p in parts]).mean(), whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]) / 4, whole[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_behaves_as_mse_loss(reduction, backend):
    s = fm.sample_path(tensor((0, 3, 4, 4)), seed=SEED, step=STEP, backend=backend)
    o = tensor((0, 3, 4, 4)).requires_grad_()
    loss = s.loss(o, reduction=reduction)
    loss.sum().backward()
    assert o.grad.shape == (0, 3, 4, 4)
    if reduction == "none":
        assert loss.shape == (0,)
    else:
        assert torch.equal(loss.detach().isnan(), torch.tensor(reduction == "mean"))


def test_nan_propagates_to_the_loss_and_its_own_gradient(backend):
    s = fm.sample_path(tensor((3, 3, 5, 5)), seed=SEED, step=STEP, backend=backend)
    o = tensor((3, 3, 5, 5), seed=2)
    o[1, 2, 3, 4] = float("nan")
    loss, gradient = loss_and_gradient(s, o)
    assert bool(loss.isnan())
    assert torch.equal(gradient.isnan(), o.isnan())


def test_an_expanded_gradient_from_a_sum_is_handled(backend):
    s = fm.sample_path(tensor((5, 8)), seed=SEED, step=STEP, backend=backend)
    for dtype in (torch.float32, torch.float16):
        o = tensor((5, 8), dtype, seed=2).requires_grad_()
        s.loss(o, reduction="none").sum().backward()
        _, exact = expected(s, o, tensor((5, 8)), reduction="none")
        assert_gradient(o.grad, exact, dtype)


def test_an_expanded_prediction_gets_its_summed_gradient(backend):
    s = fm.sample_path(tensor((5, 3, 4, 4)), seed=SEED, step=STEP, backend=backend)
    bias = torch.zeros(1, 3, 1, 1, requires_grad=True)
    s.loss(bias.expand(5, 3, 4, 4)).backward()
    _, exact = expected(s, torch.zeros(5, 3, 4, 4), tensor((5, 3, 4, 4)))
    np.testing.assert_allclose(bias.grad.numpy(), exact.sum((0, 2, 3), keepdims=True), rtol=1e-4, atol=1e-7)


def test_condition_and_time_reach_the_model_unchanged(backend):
    seen = {}

    def model(x, t, y, extra=None):
        seen.update(t=t, y=y, extra=extra, x=x)
        return x

    labels, extra = torch.arange(4), object()
    fm.flow_matching_loss(model, tensor((4, 8)), cond={"y": labels, "extra": extra}, seed=1, step=2, backend=backend)
    assert seen["y"] is labels
    assert seen["extra"] is extra
    assert seen["t"].shape == (4,)


def test_the_numbers_of_the_bf16_defect_of_dividing_targets(backend):
    """Peers that divide by 1 - t get non-finite targets when t rounds to 1 in bf16; ours are finite at every t."""
    x1 = tensor((16, 8), torch.bfloat16)
    s = fm.sample_path(x1, t=1.0, seed=SEED, step=STEP, backend=backend)
    o = torch.zeros(16, 8, dtype=torch.bfloat16)
    loss, gradient = loss_and_gradient(s, o)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert float(loss) == pytest.approx(float(expected(s, o, x1)[0]), rel=1e-5)


def test_data_made_under_inference_mode_trains(backend):
    """Latents of a frozen encoder, say."""
    with torch.inference_mode():
        x1, x0 = tensor((4, 6)), tensor((4, 6), seed=3)
    o = tensor((4, 6), seed=2)
    for noise in (None, x0):
        s = fm.sample_path(x1, x0=noise, seed=SEED, step=STEP, backend=backend)
        plain = fm.sample_path(x1.clone(), x0=None if noise is None else noise.clone(), seed=SEED, step=STEP, backend=backend)
        assert torch.equal(loss_and_gradient(s, o)[1], loss_and_gradient(plain, o)[1])


def test_data_overwritten_before_the_loss_are_noticed(backend):
    x1 = tensor((4, 6))
    s = fm.sample_path(x1, x0=tensor((4, 6), seed=3), seed=SEED, step=STEP, backend=backend)
    x1.zero_()
    with pytest.raises(RuntimeError, match="changed in place since sample_path, and is read again"):
        s.loss(tensor((4, 6)))


def test_wide_noise_widens_the_loss_and_not_the_times(backend):
    """Noise from NumPy is float64; the network is float32."""
    x1, x0 = tensor((4, 6)), tensor((4, 6), torch.float64, seed=3)
    s = fm.sample_path(x1, x0=x0, seed=SEED, step=STEP, backend=backend)
    loss = s.loss(tensor((4, 6)))
    assert (s.x_t.dtype, s.t.dtype, loss.dtype) == (torch.float32, torch.float32, torch.float64)
    assert fm.sample_path(x1.double(), x0=x0, seed=SEED, step=STEP, backend=backend).t.dtype == torch.float64


def test_an_objective_of_ones_own_may_give_numbers_and_is_told_what_it_must(backend):
    def objective(target):
        return fm.objectives.Objective("mine", target, fm.objectives.OBJECTIVES["velocity"].velocity)

    x1, o = tensor((4, 6)), tensor((4, 6), seed=2)
    mine = objective(lambda p: fm.objectives.Target(p.da, p.ds, 1, 1.0))
    found, wanted = (fm.sample_path(x1, objective=each, seed=SEED, step=STEP, backend=backend).loss(o) for each in (mine, "velocity"))
    torch.testing.assert_close(found, wanted)
    for target, error, message in (
        (lambda p: (p.da, p.ds), TypeError, r"the target of objective 'mine' must return \(c1, c0, k, w\), got 2 values"),
        (lambda p: p.da, TypeError, r"the target of objective 'mine' must return \(c1, c0, k, w\), got Tensor"),
        (lambda p: (p.da, "0", 1, 1), TypeError, "c0 of the target of objective 'mine' must return a tensor or a number, got str"),
        (
            lambda p: (p.da, p.ds[:2], 1, 1),
            ValueError,
            "c0 of the target of objective 'mine' must return a number or the shape",
        ),
    ):
        with pytest.raises(error, match=message):
            fm.sample_path(x1, objective=objective(target), seed=SEED, step=STEP, backend=backend)


def test_data_overwritten_beside_noise_of_inference_mode_is_told(backend):
    x1 = tensor((3, 5))
    with torch.inference_mode():
        x0 = tensor((3, 5), seed=2)
    s = fm.sample_path(x1, x0=x0, seed=SEED, step=STEP, backend=backend)
    x1.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place since sample_path"):
        s.loss(torch.zeros(3, 5))


@pytest.mark.parametrize("wanted", ["x1", "x0"])
def test_a_gradient_wanted_only_after_the_draw_is_there(wanted, backend):
    given, o = {"x1": tensor((4, 6)), "x0": tensor((4, 6), seed=2)}, tensor((4, 6), seed=3)
    s = fm.sample_path(given["x1"], x0=given["x0"], t=0.5, backend=backend)
    given[wanted].requires_grad_()
    error = o - (given["x1"] - given["x0"]).detach()
    found = torch.autograd.grad(s.loss(o), given[wanted])[0]
    torch.testing.assert_close(found, (-2.0 if wanted == "x1" else 2.0) * error / error.numel())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 1, 4, 4), (1, 3, 1, 1)], ids=str)
def test_weights_may_be_of_any_dtype(dtype, shape, backend):
    s = fm.sample_path(tensor((3, 3, 4, 4)), seed=SEED, step=STEP, backend=backend)
    o, weight = tensor((3, 3, 4, 4), seed=2), (tensor(shape, seed=5) > 0).to(dtype)
    spread = weight.reshape(-1, 1, 1, 1) if weight.dim() == 1 else weight
    expected = (spread.float() * (o - s.target).square()).mean()
    torch.testing.assert_close(s.loss(o, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_is_that_of_a_multiple_of_the_loss(dtype, reduction, backend):
    s = fm.sample_path(tensor((4, 3, 8, 8), dtype), seed=SEED, step=STEP, backend=backend)
    o = tensor((4, 3, 8, 8), dtype, seed=2).requires_grad_()
    loss = s.loss(o, reduction=reduction)
    (one,), (four,) = (torch.autograd.grad(factor * loss, o, retain_graph=True) for factor in (1.0, 4.0))
    assert torch.equal(four, 4.0 * one) or dtype == torch.float16
    torch.testing.assert_close(four, 4.0 * one)
