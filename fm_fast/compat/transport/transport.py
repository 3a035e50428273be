"""``create_transport``, ``Transport`` and ``Sampler``. What differs on purpose is listed in :mod:`fm_fast.compat.transport`."""

import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast._solver.field import check_output
from fm_fast.compat._methods import MAX_STEPS, accuracy_of, method_named
from fm_fast.compat._options import number
from fm_fast.compat._own import are_its_own
from fm_fast.compat.transport._sde import Sde
from fm_fast.compat.transport.path import FORMS, OWN, GVPCPlan, ICPlan, VPCPlan
from fm_fast.conversions import convert
from fm_fast.likelihood import log_likelihood
from fm_fast.loss import sample_path
from fm_fast.objectives import as_objective
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
    train_eps: float | Tensor | None = None,
    sample_eps: float | Tensor | None = None,
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
    """A path and what the model predicts on it. A subclass may put its own in place of ``sample``, for times and noise of its own."""

    def __init__(
        self, *, model_type: ModelType, path_type: PathType, loss_type: WeightType, train_eps: float | Tensor, sample_eps: float | Tensor
    ) -> None:
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
        _checks.condition(model_kwargs, "model_kwargs")
        t, x0, x1 = (self._training_times(x1), None, x1) if are_its_own(self, Transport, "sample") else self.sample(x1)
        drawn = sample_path(x1, x0=x0, t=t.to(torch.promote_types(t.dtype, torch.float32)), **self.path_and_objective)
        output = model(drawn.x_t, drawn.t, **(model_kwargs or {}))
        check_output(output, drawn.x_t)
        return {"pred": output, "loss": drawn.loss(output, self._weight(drawn.t), reduction="none")}

    def _weight(self, t: Tensor) -> Tensor | None:
        """[B]: the squared error of the velocity that the output amounts to, or the rate at which it costs likelihood."""
        if self.loss_type is WeightType.NONE:
            return None
        w, (sigma, _) = self.path_sampler.own_diffusion(t.double()), self.path_sampler.compute_sigma_t(t.double())
        return (w / sigma) ** 2 if self.loss_type is WeightType.VELOCITY else w / sigma**2

    def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t [B], noise, x1), for losses of one's own: ``path_sampler.plan`` makes a point and a velocity of them."""
        _checks.state("x1", x1)
        x0 = torch.randn_like(x1)
        return self._training_times(x1).to(x1.dtype), x0, x1

    def check_interval(
        self, train_eps: float, sample_eps: float, *, diffusion_form: str = OWN, sde: bool = False, reverse: bool = False,
        eval: bool = False, last_step_size: float = 0.0,
    ) -> tuple[float, float]:  # fmt: skip
        """(t0, t1) of times that stay ``sample_eps`` (``eval``) or ``train_eps`` away from the ends where a value is infinite."""
        eps, predicts_velocity = sample_eps if eval else train_eps, self.model_type is ModelType.VELOCITY
        t0, t1 = 0.0, 1.0
        if isinstance(self.path_sampler, VPCPlan) or sde or not predicts_velocity:
            t1 -= last_step_size if sde and last_step_size > 0.0 else eps
        if not isinstance(self.path_sampler, VPCPlan) and (not predicts_velocity or (sde and diffusion_form == OWN)):
            t0 = eps
        return (1.0 - t0, 1.0 - t1) if reverse else (t0, t1)

    def _training_times(self, x1: Tensor) -> Tensor:
        """[B], float32: 16 bits would hold too few of them."""
        low, high = self.check_interval(self.train_eps, self.sample_eps)
        return low + (high - low) * torch.rand(len(x1), device=x1.device, dtype=torch.float32)

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, 1) of each sample [B]."""
        return -0.5 * (z.unsqueeze(-1).flatten(1) ** 2 + math.log(2.0 * math.pi)).sum(1)

    def get_drift(self) -> Model:
        """(x, t, model, **model_kwargs) -> the velocity."""
        return self._converted("velocity")

    def get_score(self) -> Model:
        """(x, t, model, **model_kwargs) -> grad log p."""
        return self._converted("score")

    def _converted(self, to: str) -> Model:
        def converted(x: Tensor, t: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            output = model(x, t, **model_kwargs)
            check_output(output, x)
            if to == self.model_type.value:
                return output
            # Rounding, and solvers that step beyond the end, ask for times a little outside.
            return convert(output, x, t.clamp(0.0, 1.0), to=to, **self.path_and_objective)

        return converted


class Sampler:
    """What draws samples of a transport's model, and finds their likelihoods."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.drift, self.score = transport, transport.get_drift(), transport.get_score()

    def _interval(self, **of_solve: Any) -> tuple[float, float]:
        return self.transport.check_interval(self.transport.train_eps, self.transport.sample_eps, eval=True, **of_solve)

    def sample_ode(
        self, *, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3, reverse: bool = False
    ) -> Callable[..., Tensor]:
        """A function (x, model, **model_kwargs) -> states [num_steps, B, ...] from noise x to data, both included; ``reverse``: back.

        Args:
            sampling_method: as of :func:`fm_fast.compat.torchdiffeq.odeint`.
            num_steps: how many states: an adaptive method's steps are its own, of others there is one less.
        """
        settings = self._solver(sampling_method, num_steps, atol, rtol, reverse)

        def solve(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            grad = "direct" if torch.is_grad_enabled() else "none"
            found = (encode if reverse else sample)(model, x, cond=model_kwargs, grad=grad, **settings)
            assert found.saved is not None
            return found.saved.to(x.dtype)

        return solve

    def sample_ode_likelihood(
        self, *, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """A function (x, model, **model_kwargs) -> (log p(x) [B] in nats, the noise that x comes from), by one Rademacher probe."""
        settings = self._solver(sampling_method, num_steps, atol, rtol, reverse=True)
        settings.pop("save")

        def solve(x: Tensor, model: Model, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
            prior = self.transport.prior_logp
            found = log_likelihood(model, x, cond=model_kwargs, kind="rademacher", prior=prior, **settings)
            return found.logp, found.x0.to(x.dtype)

        return solve

    def _solver(self, sampling_method: str, num_steps: int, atol: float, rtol: float, reverse: bool) -> dict[str, Any]:
        """Of :func:`fm_fast.sample`, with ``reverse`` of :func:`fm_fast.encode`."""
        method, (begin, end) = method_named(sampling_method), self._interval(reverse=reverse)
        _check_count(num_steps)
        low, high = min(begin, end), max(begin, end)
        times = torch.linspace(low, high, num_steps, dtype=torch.float64, device="cpu").tolist()
        settings = {"method": method, "t0": low, "t1": high, **self.transport.path_and_objective}
        if not isinstance(method, EmbeddedRungeKutta):
            return {**settings, "save": "steps", "grid": times}
        accuracy = accuracy_of(method, number(rtol), number(atol))
        tolerances = {"rtol": accuracy.tolerance.rtol, "atol": accuracy.tolerance.atol, "max_steps": MAX_STEPS}
        return {**settings, "save": times[::-1] if reverse else times, **tolerances}

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = OWN,
        diffusion_norm: float | Tensor = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float | Tensor = 0.04,
        num_steps: int = 250,
    ) -> Callable[..., list[Tensor]]:
        """A function (noise, model, **model_kwargs) -> the ``num_steps`` states after each step, of dx = (v + w score) dt + sqrt(2 w) dW.

        Args:
            sampling_method: "Euler" (Euler-Maruyama) or "Heun" (noise, then a step of Heun's method).
            diffusion_form: of w: "constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing".
            diffusion_norm: what w is multiplied by.
            last_step: the last step, of ``last_step_size`` and without noise: "Mean" (with the SDE's drift), "Euler" (with the ODE's),
                "Tweedie" (to the data that is expected) or None.
            num_steps: all steps, the last one included.

        Numbers may come as tensors that hold one.
        """
        _checks.one_of("sampling_method", sampling_method, ("Euler", "Heun"))
        _checks.one_of("diffusion_form", diffusion_form, (OWN, *FORMS))
        norm = _checks.finite_number("diffusion_norm", number(diffusion_norm))
        if norm < 0.0 and diffusion_form != "decreasing":
            raise ValueError(f"diffusion_norm must not be negative for diffusion_form={diffusion_form!r}, got {norm}")
        _checks.one_of("last_step", last_step, (None, "Mean", "Tweedie", "Euler"))
        size = 0.0 if last_step is None else _margin("last_step_size", last_step_size)
        _check_count(num_steps)
        low, high = self._interval(sde=True, diffusion_form=diffusion_form, last_step_size=size)
        if diffusion_form == OWN and low == 0.0 and not isinstance(self.transport.path_sampler, VPCPlan):
            raise ValueError("sample_eps must be above 0 for diffusion_form='SBDM', which is infinite at t = 0, got 0")
        objective = as_objective(self.transport.model_type.value)
        sde = Sde(self.transport.path_sampler, objective, diffusion_form, norm, low, high, num_steps)

        def solve(x: Tensor, model: Model, **model_kwargs: Any) -> list[Tensor]:
            _checks.state("x", x)
            with torch.no_grad():
                return sde.solve(x, model, model_kwargs, sampling_method, last_step, size)

        return solve


def _check_count(num_steps: object) -> None:
    if not _checks.is_whole(num_steps) or num_steps < 2:
        raise ValueError(f"num_steps must be a whole number of at least 2, got {num_steps!r}")


def _margin(name: str, value: float | Tensor) -> float:
    value = number(value)
    if not (_checks.is_number(value) and 0.0 <= value < 0.5):
        raise ValueError(f"{name} must be a number in [0, 0.5), got {value!r}")
    return float(value)
