"""The matchers: how a batch of ends becomes times, points and velocities."""

import math
import warnings

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast.compat._own import are_its_own
from fm_fast.compat.torchcfm._arguments import check_pair, width
from fm_fast.compat.torchcfm.optimal_transport import OTPlanSampler

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "OTPlanSampler",
    "SchrodingerBridgeConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "pad_t_like_x",
]

Draw = tuple[Tensor, Tensor, Tensor]
DrawWithNoise = tuple[Tensor, Tensor, Tensor, Tensor]
PARTS = ("compute_mu_t", "compute_sigma_t", "sample_xt", "compute_conditional_flow")
TINY = 1e-8  # keeps quotients finite where a width is 0


def pad_t_like_x(t: float | Tensor, x: Tensor) -> float | Tensor:
    """t [B] with the dimensions of x [B, ...] to broadcast; a number as it is."""
    return t.reshape(-1, *[1] * (x.dim() - 1)) if isinstance(t, Tensor) else t


class ConditionalFlowMatcher:
    """x_t = t x1 + (1 - t) x0 + sigma epsilon, u_t = x1 - x0 (Tong et al. 2023, independent coupling).

    A subclass may put its own in place of any method.
    """

    def __init__(self, sigma: float | Tensor = 0.0) -> None:
        self.sigma = width(sigma)

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        """The mean of x_t given both ends."""
        if not isinstance(t, Tensor) or t.dtype == x0.dtype:
            return torch.lerp(x0, x1, pad_t_like_x(t, x0))
        wide = torch.promote_types(t.dtype, x0.dtype)
        return torch.lerp(x0.to(wide), x1.to(wide), pad_t_like_x(t.to(wide), x0))

    def compute_sigma_t(self, t: float | Tensor) -> float | Tensor:
        """The width of x_t around its mean."""
        return self.sigma

    def compute_lambda(self, t: Tensor) -> float | Tensor:
        """The weight 2 sigma_t / sigma^2 of a score network's loss (Tong et al. 2023)."""
        return 2.0 * self.compute_sigma_t(t) / (self.sigma**2 + TINY)

    def sample_noise_like(self, x: Tensor) -> Tensor:
        """epsilon."""
        return torch.randn_like(x)

    def sample_xt(self, x0: Tensor, x1: Tensor, t: Tensor, epsilon: Tensor | None) -> Tensor:
        """The point with the noise epsilon; None stands for none."""
        mean = self.compute_mu_t(x0, x1, t)
        return mean if epsilon is None else mean + pad_t_like_x(self.compute_sigma_t(t), x0) * epsilon

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> Tensor:
        """The velocity at xt."""
        return x1 - x0

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> Draw | DrawWithNoise:
        """(t [B], x_t, u_t), and the noise epsilon if ``return_noise``.

        Args:
            x0, x1: source and data [B, ...], floating, of one shape, dtype and device, which x_t and u_t have too.
            t: [B] in [0, 1], of any floating dtype; drawn uniformly in that of x0 if None.
        """
        check_pair(x0, x1)
        times = _times(t, x0)
        epsilon = self.sample_noise_like(x0) if return_noise or self._is_wide() else None
        wide = times.to(torch.promote_types(times.dtype, x0.dtype))  # sines and roots of t are not to be rounded to its dtype
        xt = self.sample_xt(x0, x1, wide, epsilon).to(x0.dtype)
        ut = self._flow(x0, x1, wide, xt, epsilon).to(x0.dtype)
        return (times, xt, ut) if not return_noise or epsilon is None else (times, xt, ut, epsilon)

    def _is_wide(self) -> bool:
        """Whether x_t depends on the noise, as far as the width that it was made with tells."""
        return self.sigma != 0.0 or not are_its_own(self, ConditionalFlowMatcher, "compute_sigma_t", "sample_xt")

    def _flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor, epsilon: Tensor | None) -> Tensor:
        """The velocity at the point that was drawn with this noise; of a subclass, what its own methods make of the point."""
        return self.compute_conditional_flow(x0, x1, t, xt)


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """The paper's path: x_t = t x1 + (1 - (1 - sigma) t) epsilon (equations 20 to 23). x0 gives shape and dtype alone.

    Its source is always N(0, 1).
    """

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        return pad_t_like_x(t, x1) * x1

    def compute_sigma_t(self, t: float | Tensor) -> float | Tensor:
        return 1.0 - (1.0 - self.sigma) * t

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> Tensor:
        """By a quotient, as equation 21 has it: not finite at t = 1 where sigma = 0."""
        return (x1 - (1.0 - self.sigma) * xt) / pad_t_like_x(self.compute_sigma_t(t), x1)

    def _flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor, epsilon: Tensor | None) -> Tensor:
        if epsilon is None or not are_its_own(self, TargetConditionalFlowMatcher, *PARTS):
            return super()._flow(x0, x1, t, xt, epsilon)
        return torch.sub(x1, epsilon, alpha=1.0 - self.sigma)


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0 + sigma epsilon (Albergo and Vanden-Eijnden 2023)."""

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        angle = 0.5 * math.pi * torch.as_tensor(pad_t_like_x(t, x0))
        return torch.cos(angle) * x0 + torch.sin(angle) * x1

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> Tensor:
        angle = 0.5 * math.pi * torch.as_tensor(pad_t_like_x(t, x0))
        return 0.5 * math.pi * (torch.cos(angle) * x1 - torch.sin(angle) * x0)


class _OfOptimalPairs(ConditionalFlowMatcher):
    """On the pairs of least squared distance.

    ``ot_sampler`` makes them: any object with the methods ``sample_plan`` and ``sample_plan_with_labels`` may be put in its place.
    """

    def __init__(self, sigma: float | Tensor = 0.0) -> None:
        super().__init__(sigma)
        self.ot_sampler = OTPlanSampler("exact")

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> Draw | DrawWithNoise:
        """As :meth:`ConditionalFlowMatcher.sample_location_and_conditional_flow`, x0 in the order of its pairs."""
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return super().sample_location_and_conditional_flow(x0, x1, t, return_noise)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        t: Tensor | None = None,
        return_noise: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """(t, x_t, u_t, y0, y1), and the noise: the labels y0 [B, ...] in the order of x0, y1 in that of x1."""
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        draw = super().sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return (*draw[:3], y0, y1, *draw[3:])


class ExactOptimalTransportConditionalFlowMatcher(_OfOptimalPairs):
    """:class:`ConditionalFlowMatcher` on the pairs of least squared distance.

    ``ot_sampler`` makes them: any object with the methods ``sample_plan`` and ``sample_plan_with_labels`` may be put in its place.
    """


class SchrodingerBridgeConditionalFlowMatcher(_OfOptimalPairs):
    """A Brownian bridge of width sigma sqrt(t (1 - t)) between optimal pairs (Tong et al. 2023)."""

    def __init__(self, sigma: float | Tensor = 1.0, ot_method: str = "exact") -> None:
        super().__init__(sigma)
        _checks.positive_number("sigma", self.sigma)
        _checks.one_of("ot_method", ot_method, ("exact",))
        self.ot_method = ot_method
        if self.sigma < 1e-3:
            warnings.warn(f"sigma = {self.sigma} makes the bridge's velocity very large beside its width", stacklevel=2)

    def compute_sigma_t(self, t: float | Tensor) -> float | Tensor:
        return self.sigma * torch.sqrt(torch.as_tensor(t * (1.0 - t)))

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> Tensor:
        """By a quotient: the drift of the bridge towards its mean, and the mean's own."""
        return _pull(t, xt - self.compute_mu_t(x0, x1, t)) + (x1 - x0)

    def _flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor, epsilon: Tensor | None) -> Tensor:
        if epsilon is None or not are_its_own(self, SchrodingerBridgeConditionalFlowMatcher, *PARTS):
            return super()._flow(x0, x1, t, xt, epsilon)
        return _pull(t, pad_t_like_x(self.compute_sigma_t(t), x0) * epsilon) + (x1 - x0)


def _pull(t: Tensor, offset: Tensor) -> Tensor:
    """The part of a bridge's velocity that is due to the offset from its mean; in float32 at least, for the quotient."""
    wide = torch.promote_types(offset.dtype, torch.float32)
    times = torch.as_tensor(pad_t_like_x(t, offset)).to(wide)
    return ((1.0 - 2.0 * times) / (2.0 * times * (1.0 - times) + TINY) * offset).to(offset.dtype)


def _times(t: Tensor | None, x0: Tensor) -> Tensor:
    if t is None:
        return torch.rand(x0.shape[0], device=x0.device).to(x0.dtype)
    _checks.tensor("t", t)
    if t.dim() > 0 and t.shape != x0.shape[:1]:
        raise ValueError(f"t must have shape [{x0.shape[0]}], got {tuple(t.shape)}")
    _checks.time(t, x0, "x0")
    return t.expand(x0.shape[0])
