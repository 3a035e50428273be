"""``create_transport``, ``Transport`` and ``Sampler``. What differs on purpose is listed in :mod:`fm_fast.compat.transport`."""

import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks, reference
from fm_fast.compat._methods import MAX_STEPS, method_named
from fm_fast.compat.transport.path import FORMS, GVPCPlan, ICPlan, VPCPlan, own_diffusion
from fm_fast.conversions import convert, prediction_factors
from fm_fast.likelihood import log_likelihood
from fm_fast.loss import sample_path
from fm_fast.objectives import as_objective, conversion_range, schedule
from fm_fast.sampling import encode, sample
from fm_fast.solvers import EmbeddedRungeKutta

__all__ = ["ModelType", "PathType", "Sampler", "Transport", "WeightType", "create_transport"]

Model = Callable[..., Tensor]


class ModelType(enum.Enum):
    """What the model predicts."""

    NOISE = "noise"
    SCORE = "score"
    VELOCITY = "velocity"


class PathType(enum.Enum):
    """How x_t is made of noise and data."""

    LINEAR = "Linear"
    GVP = "GVP"
    VP = "VP"


class WeightType(enum.Enum):
    """By what the squared error of a noise or a score is multiplied."""

    NONE = None
    VELOCITY = "velocity"
    LIKELIHOOD = "likelihood"


PLANS = {PathType.LINEAR: ICPlan, PathType.GVP: GVPCPlan, PathType.VP: VPCPlan}


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
) -> "Transport":
    """The transport of these names.

    Args:
        path_type: "Linear", "GVP" or "VP".
        prediction: "velocity", "noise" or "score".
        loss_weight: None, "velocity" or "likelihood", of a noise or a score.
        train_eps, sample_eps: how far times stay away from the ends in training, in sampling. By default 1e-5 and 1e-3 on VP, 1e-3 for a
            noise or a score, and 0 for a velocity.

    Raises: ValueError for a name that there is not, and where they do not go together.
    """
    _checks.one_of("path_type", path_type, [member.value for member in PathType])
    _checks.one_of("prediction", prediction, [member.value for member in ModelType])
    _checks.one_of("loss_weight", loss_weight, [member.value for member in WeightType])
    model_type, path = ModelType(prediction), PathType(path_type)
    defaults = (1e-5, 1e-3) if path is PathType.VP else (0.0, 0.0) if model_type is ModelType.VELOCITY else (1e-3, 1e-3)
    return Transport(
        model_type=model_type,
        path_type=path,
        loss_type=WeightType(loss_weight),
        train_eps=defaults[0] if train_eps is None else train_eps,
        sample_eps=defaults[1] if sample_eps is None else sample_eps,
    )


class Transport:
    """A path and what the model predicts on it."""

    def __init__(self, *, model_type: ModelType, path_type: PathType, loss_type: WeightType, train_eps: float, sample_eps: float) -> None:
        if model_type is ModelType.VELOCITY and loss_type is not WeightType.NONE:
            raise ValueError(f"loss_weight must be None for prediction='velocity', which has none, got {loss_type.value!r}")
        self.model_type, self.loss_type = model_type, loss_type
        self.path_sampler = PLANS[path_type]()
        self.train_eps, self.sample_eps = _margin("train_eps", train_eps), _margin("sample_eps", sample_eps)

    @property
    def path_and_objective(self) -> dict[str, Any]:
        """As the functions of fm_fast take them."""
        return {"path": self.path_sampler.path, "objective": self.model_type.value}

    def training_losses(self, model: Model, x1: Tensor, model_kwargs: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """{"loss": the mean squared error of each sample [B], "pred": the model's output}, at noise and times that are drawn here.

        Args:
            model: called as ``model(x_t, t, **model_kwargs)``; returns a tensor of the shape of x1.
            x1: data [B, ...], as :func:`fm_fast.flow_matching_loss` takes it.

        Raises: ValueError, TypeError, as :func:`fm_fast.flow_matching_loss`.
        """
        _checks.data(x1)
        _check_conditions(model_kwargs)
        low, high = self.interval(self.train_eps)
        t = low + (high - low) * torch.rand(len(x1), device=x1.device)
        drawn = sample_path(x1, t=t, **self.path_and_objective)
        output = model(drawn.x_t, drawn.t, **(model_kwargs or {}))
        return {"pred": output, "loss": drawn.loss(output, self._weight(drawn.t), reduction="none")}

    def _weight(self, t: Tensor) -> Tensor | None:
        """[B]: the squared error of the velocity that the output amounts to, or the rate at which it costs likelihood."""
        if self.loss_type is WeightType.NONE:
            return None
        p = schedule(self.path_sampler.path, t.double())
        return (own_diffusion(p) / p.s) ** 2 if self.loss_type is WeightType.VELOCITY else own_diffusion(p) / p.s**2

    def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t [B], noise, x1), for losses of one's own: ``path_sampler.plan`` makes a point and a velocity of them."""
        _checks.state("x1", x1)
        low, high = self.interval(self.train_eps)
        x0 = torch.randn_like(x1)
        return low + (high - low) * torch.rand(len(x1), dtype=x1.dtype, device=x1.device), x0, x1

    def interval(self, eps: float, sde_form: str | None = None, last_step_size: float = 0.0) -> tuple[float, float]:
        """(t0, t1) of times that stay ``eps`` away from the ends where a value is infinite; ``sde_form``: of an SDE's diffusion."""
        predicts_velocity, end = self.model_type is ModelType.VELOCITY, 1.0 - (last_step_size or eps)
        if isinstance(self.path_sampler, VPCPlan):
            return 0.0, end
        if predicts_velocity and sde_form is None:
            return 0.0, 1.0
        return (0.0 if predicts_velocity and sde_form != "SBDM" else eps), end

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, 1) of each sample [B]."""
        return -0.5 * (z.flatten(1) ** 2 + math.log(2.0 * math.pi)).sum(1)

    def get_drift(self) -> Model:
        """(x, t, model, **model_kwargs) -> the velocity."""
        return self._converted("velocity")

    def get_score(self) -> Model:
        """(x, t, model, **model_kwargs) -> grad log p."""
        return self._converted("score")

    def _converted(self, to: str) -> Model:
        return lambda x, t, model, **model_kwargs: convert(model(x, t, **model_kwargs), x, t, to=to, **self.path_and_objective)


class Sampler:
    """What draws samples of a transport's model, and finds their likelihoods."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample_ode(
        self, *, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3, reverse: bool = False
    ) -> Callable[..., Tensor]:
        """A function (x, model, **model_kwargs) -> states [num_steps, B, ...] from noise x to data, both included; ``reverse``: back.

        Args:
            sampling_method: as of :func:`fm_fast.compat.torchdiffeq.odeint`.
            num_steps: how many states: an adaptive method's steps are its own, of others there is one less.
        """
        ends = self.transport.interval(self.transport.sample_eps)
        settings = self._solver(ends, sampling_method, num_steps, atol, rtol, reverse)

        def solve(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            found = (encode if reverse else sample)(model, x, cond=model_kwargs, **settings)
            assert found.saved is not None
            return found.saved.to(x.dtype)

        return solve

    def sample_ode_likelihood(
        self, *, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """A function (x, model, **model_kwargs) -> (log p(x) [B] in nats, the noise that x comes from), by one Rademacher probe."""
        ends = self.transport.interval(self.transport.sample_eps)
        settings = self._solver(ends, sampling_method, num_steps, atol, rtol, reverse=True)
        settings.pop("save")

        def solve(x: Tensor, model: Model, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
            prior = self.transport.prior_logp
            found = log_likelihood(model, x, cond=model_kwargs, kind="rademacher", prior=prior, **settings)
            return found.logp, found.x0.to(x.dtype)

        return solve

    def _solver(
        self, ends: tuple[float, float], sampling_method: str, num_steps: int, atol: float, rtol: float, reverse: bool
    ) -> dict[str, Any]:
        """Of :func:`fm_fast.sample`, with ``reverse`` of :func:`fm_fast.encode`."""
        method, low, high = method_named(sampling_method), *((1.0 - ends[1], 1.0 - ends[0]) if reverse else ends)
        times = _times(low, high, num_steps)
        settings = {"method": method, "t0": low, "t1": high, **self.transport.path_and_objective}
        if isinstance(method, EmbeddedRungeKutta):
            return {**settings, "save": times[::-1] if reverse else times, "rtol": rtol, "atol": atol, "max_steps": MAX_STEPS}
        return {**settings, "save": "steps", "grid": times}

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
    ) -> Callable[..., list[Tensor]]:
        """A function (noise, model, **model_kwargs) -> the ``num_steps`` states after each step, of dx = (v + w score) dt + sqrt(2 w) dW.

        Args:
            sampling_method: "Euler" (Euler-Maruyama) or "Heun" (noise, then a step of Heun's method).
            diffusion_form: of w: "constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing".
            diffusion_norm: what w is multiplied by.
            last_step: the last step, of ``last_step_size`` and without noise: "Mean" (with the SDE's drift), "Euler" (with the ODE's),
                "Tweedie" (to the data that is expected) or None.
            num_steps: all steps, the last one included.
        """
        _checks.one_of("sampling_method", sampling_method, ("Euler", "Heun"))
        _checks.one_of("diffusion_form", diffusion_form, tuple(FORMS))
        _checks.one_of("last_step", last_step, (None, "Mean", "Tweedie", "Euler"))
        size = 0.0 if last_step is None else _margin("last_step_size", last_step_size)
        low, high = self.transport.interval(self.transport.sample_eps, diffusion_form, size)
        if diffusion_form == "SBDM" and low == 0.0 and not isinstance(self.transport.path_sampler, VPCPlan):
            raise ValueError("sample_eps must be above 0 for diffusion_form='SBDM', which is infinite at t = 0, got 0")
        sde = _Sde(self.transport, diffusion_form, diffusion_norm, _times(low, high, num_steps))
        step = sde.euler if sampling_method == "Euler" else sde.heun

        @torch.no_grad()
        def solve(x: Tensor, model: Model, **model_kwargs: Any) -> list[Tensor]:
            _checks.state("x", x)
            dtype, states = x.dtype, list[Tensor]()

            def evaluate(number: int, x: Tensor) -> Tensor:
                return model(
                    x.to(dtype),
                    torch.full((len(x),), sde.times[number], dtype=reference.accumulation_dtype(x), device=x.device),
                    **model_kwargs,
                )

            x = x.to(reference.accumulation_dtype(x))
            for number in range(num_steps - 1):
                states.append(x := step(number, x, evaluate))
            return [state.to(dtype) for state in (*states, sde.last(x, evaluate, last_step, size))]

        return solve


# (number of a time, x) -> output
Evaluate = Callable[[int, Tensor], Tensor]


class _Sde:
    """Steps of dx = (v + w score) dt + sqrt(2 w) dW between equidistant times. With drift = f x + g o, o being the model's output, all
    factors are numbers that the host knows."""

    def __init__(self, transport: Transport, form: str, norm: float, times: list[float]) -> None:
        self.transport, self.times, self.dt = transport, times, times[1] - times[0]
        t, path = torch.tensor(times, dtype=torch.float64, device="cpu"), transport.path_sampler.path
        w = FORMS[form](t, schedule(path, t), norm)
        velocity, score = self._factors("velocity", t), self._factors("score", t)
        self.drift = [(v + w * s).tolist() for v, s in zip(velocity, score, strict=True)]
        self.kicks = (2.0 * self.dt * w).sqrt().tolist()

    def _factors(self, to: str, t: Tensor) -> tuple[Tensor, Tensor]:
        known = self.transport.path_and_objective
        path, objective = known["path"], as_objective(known["objective"])
        return prediction_factors(path, objective, to, t.clamp(*conversion_range(path, objective, to)))

    def euler(self, number: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        moved = self._moved(number, x, evaluate, self.dt)
        return moved.add_(torch.randn_like(x), alpha=self.kicks[number])

    def heun(self, number: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        x = x.add(torch.randn_like(x), alpha=self.kicks[number])
        predicted = self._moved(number, x, evaluate, self.dt)
        # The mean of the drifts at both ends: half of the first step, and half of one from the second.
        return 0.5 * (x + self._moved(number + 1, predicted, evaluate, self.dt))

    def last(self, x: Tensor, evaluate: Evaluate, kind: str | None, size: float) -> Tensor:
        """From the last time on, without noise."""
        if kind is None:
            return x
        if kind == "Mean":
            return self._moved(-1, x, evaluate, size)
        t = torch.tensor(self.times[-1], dtype=torch.float64, device="cpu")
        f, g = (float(factor) for factor in self._factors("data" if kind == "Tweedie" else "velocity", t))
        output = evaluate(-1, x)
        return f * x + g * output if kind == "Tweedie" else (1.0 + size * f) * x + size * g * output

    def _moved(self, number: int, x: Tensor, evaluate: Evaluate, size: float) -> Tensor:
        """x + size * drift."""
        f, g = self.drift[0][number], self.drift[1][number]
        return (1.0 + size * f) * x + size * g * evaluate(number, x)


def _times(low: float, high: float, num_steps: int) -> list[float]:
    if not _checks.is_whole(num_steps) or num_steps < 2:
        raise ValueError(f"num_steps must be a whole number of at least 2, got {num_steps!r}")
    return torch.linspace(low, high, int(num_steps), dtype=torch.float64, device="cpu").tolist()


def _margin(name: str, value: float) -> float:
    if not (_checks.is_number(value) and 0.0 <= value < 0.5):
        raise ValueError(f"{name} must be a number in [0, 0.5), got {value!r}")
    return float(value)


def _check_conditions(model_kwargs: object) -> None:
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a mapping of keyword arguments of the model, got {type(model_kwargs).__name__}")
