"""Small things about the loss, paths, objectives and conversions that users depend on and no other test looks at."""

import warnings

import pytest
import torch
from flows import Linear

import fm_fast as fm
from fm_fast import objectives, paths, random
from fm_fast.time_samplers import LogitNormal, as_time_sampler

X1 = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Late(Linear):
    """Between times of its own."""

    t_min, t_max = 0.2, 0.7


@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "scoreflow", "data"])
def test_ranges_stay_within_narrower_limits_of_a_path(objective):
    """An end that is singular is kept off only where the path's own limit does not keep off it already."""
    assert objectives.velocity_range(Late(), objective) == (0.2, 0.7)
    assert objectives.time_range(Late(), objective) == (0.2, 0.7)


@pytest.mark.parametrize("limits", [(-0.1, 1.0), (0.0, 1.5), (0.5, 0.5), (0.6, 0.5)])
def test_limits_of_a_path_lie_in_order_within_zero_and_one(limits):
    path = Late()
    path.t_min, path.t_max = limits
    with pytest.raises(ValueError, match="t_min and t_max of a path must satisfy 0 <= t_min < t_max <= 1"):
        paths.as_path(path)


@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.0), (0.0, 0.4), (-1.0, 2.0)])
def test_logit_normal_times_have_their_mean_and_deviation(mean, std, backend):
    """logit t = mean + std z: the z of the default sampler, scaled and moved."""
    times = [
        fm.sample_path(X1.double(), t_sampler=sampler, seed=3, step=1, backend=backend).t
        for sampler in ("logit-normal", LogitNormal(mean=mean, std=std))
    ]
    torch.testing.assert_close(times[1].logit(), mean + std * times[0].logit(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t_sampler", [["uniform"], 0.5, {}])
def test_what_is_no_sampler_is_told_the_names(t_sampler):
    with pytest.raises(ValueError, match="t_sampler must be one of uniform, stratified, logit-normal"):
        as_time_sampler(t_sampler)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_as_the_time_of_a_conversion_is_not_rounded_to_the_datas_dtype(dtype):
    """0.999 is 1 in bfloat16, where the score is another by a factor of 100."""
    x, output = X1.to(dtype), X1.flip(0).to(dtype)
    exact = -(x.double() - 0.999 * output.double()) / 0.001**2  # x0 = (x - t x1) / (1 - t), score = -x0 / (1 - t)
    found = fm.convert(output, x, 0.999, to="score", objective="data")
    finite = exact.abs() < torch.finfo(dtype).max / 2
    assert int(finite.sum()) > 0
    torch.testing.assert_close(found[finite].double(), exact[finite], rtol=torch.finfo(dtype).eps, atol=1.0)


def test_the_warning_of_a_conversion_points_to_its_caller():
    with pytest.warns(UserWarning, match="t is outside") as told:
        fm.convert(X1, X1, 1.0, to="velocity", objective="data")
    assert told[0].filename == __file__


@pytest.fixture
def two_ranks(monkeypatch):
    """As in a process group of two."""
    monkeypatch.setattr(random, "world_size", lambda: 2)


@pytest.mark.parametrize(
    "options", [{}, {"x0": X1, "t": 0.5, "seed": 1}, {"seed": 1, "step": 2, "sample_ids": 0}], ids=["unseeded", "given", "ids"]
)
def test_ranks_that_draw_no_equal_noise_are_not_told_so(two_ranks, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.sample_path(X1, **options)


def test_a_learned_weight_of_the_loss_module_may_be_replaced():
    module = fm.FlowMatchingLoss(weight=torch.nn.Parameter(torch.ones(4)))
    module.weight = torch.nn.Parameter(torch.zeros(4))
    assert module(lambda x, t: x, X1, seed=1, step=2).item() == 0.0


def test_given_noise_that_changed_is_noticed_beside_data_of_inference_mode(backend):
    """Writes to the data are not counted there, and those to x0 are."""
    with torch.inference_mode():
        x1 = torch.ones(4, 6)
    x0 = X1.clone()
    sample = fm.sample_path(x1, x0=x0, t=0.5, backend=backend)
    x0.mul_(2.0)
    with pytest.raises(RuntimeError, match="x1 or x0 was changed in place"):
        sample.loss(X1)


def test_times_are_drawn_anew_beside_given_noise(backend):
    """Without a seed: two draws have times in common only by chance."""
    first, second = (fm.sample_path(X1, x0=X1, backend=backend).t for _ in range(2))
    assert not bool((first == second).any())


class Scaled(Linear):
    """x_t = t x1 + scale (1 - t) x0, scale learned."""

    def __init__(self, scale):
        self.scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)

    def sigma(self, t):
        return self.scale * (1.0 - t)

    def d_sigma(self, t):
        return -self.scale * torch.ones_like(t)


def test_a_learned_path_gets_its_gradient_through_the_point_and_the_target(backend):
    """Model 3 x: the error is e = 3 x_t - (x1 - scale x0), whose derivative by the scale is (3 (1 - t) + 1) x0."""
    path, x1, x0 = Scaled(1.5), X1.double(), X1.double().flip(0)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    fm.flow_matching_loss(lambda x, t: 3.0 * x, x1, x0=x0, t=t, path=path, backend=backend).backward()
    column = t[:, None]
    error = 3.0 * (column * x1 + 1.5 * (1.0 - column) * x0) - (x1 - 1.5 * x0)
    expected = (2.0 * error * (3.0 * (1.0 - column) + 1.0) * x0).mean()
    torch.testing.assert_close(path.scale.grad, expected, rtol=1e-10, atol=0)


def test_ids_count_without_a_seed():
    """Equal ids have equal noise and times within a draw."""
    found = fm.sample_path(torch.zeros(3, 6), sample_ids=torch.tensor([5, 9, 5]))
    assert torch.equal(found.x_t[0], found.x_t[2]) and float(found.t[0]) == float(found.t[2])
    assert not torch.equal(found.x_t[0], found.x_t[1])


@pytest.mark.parametrize("wanted", ["x1", "x0"])
def test_the_loss_is_differentiable_in_its_data_and_in_its_noise(wanted, backend):
    """Model 3 x: the error is e = (3 t - 1) x1 + (3 (1 - t) + 1) x0."""
    ends = {"x1": X1.double(), "x0": X1.double().flip(0)}
    ends[wanted].requires_grad_()
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    fm.flow_matching_loss(lambda x, t: 3.0 * x, **ends, t=t, backend=backend).backward()
    column = t[:, None]
    factors = {"x1": 3.0 * column - 1.0, "x0": 3.0 * (1.0 - column) + 1.0}
    error = sum(factors[name] * ends[name].detach() for name in ends)
    torch.testing.assert_close(ends[wanted].grad, 2.0 * error * factors[wanted] / error.numel(), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_conversion_is_in_float64_where_either_input_is(dtypes):
    """Rounded once, to x's dtype."""
    (x, output), t = (X1.double() / 3.0, X1.double().flip(0) / 7.0), 0.3
    x, output = x.to(dtypes[0]), output.to(dtypes[1])
    exact = x.double() + (1.0 - t) * output.double()
    torch.testing.assert_close(
        fm.convert(output, x, t, to="data"), exact.to(dtypes[0]), rtol=0 if x.dtype == torch.float32 else 1e-14, atol=0
    )


@pytest.mark.parametrize("by", ["sample_path", "flow_matching_loss", "FlowMatchingLoss"])
def test_the_warning_of_ranks_that_draw_alike_is_shown_where_the_loss_is_called(by, monkeypatch):
    monkeypatch.setattr(fm.random, "world_size", lambda: 2)
    model = torch.nn.Linear(3, 3)
    calls = {
        "sample_path": lambda x: fm.sample_path(x, seed=0, step=0),
        "flow_matching_loss": lambda x: fm.flow_matching_loss(lambda x, t: model(x), x, seed=0, step=0),
        "FlowMatchingLoss": lambda x: fm.FlowMatchingLoss()(lambda x, t: model(x), x, seed=0, step=0),
    }
    with pytest.warns(UserWarning, match="which all draw the same noise") as told:
        calls[by](torch.zeros(2, 3))
    assert [warning.filename for warning in told] == [__file__]
