"""What matchers and the sampler of pairs ask of their arguments."""

from torch import Tensor

from fm_fast import _checks


def width(sigma: object) -> float:
    """A number that is not negative, or of a tensor that holds one, the number."""
    if isinstance(sigma, Tensor) and sigma.requires_grad:
        raise ValueError("sigma must not require a gradient, which a matcher does not give it; use sigma.detach()")
    value = _checks.finite_number("sigma", sigma.item() if isinstance(sigma, Tensor) and sigma.dim() == 0 else sigma)
    if value < 0.0:
        raise ValueError(f"sigma must not be negative, got {value}")
    return value


def check_labels(x1: Tensor, **labels: Tensor | None) -> None:
    """A label [B, ...] for each sample of x1 [B, ...]."""
    for name, y in labels.items():
        if y is not None:
            _checks.tensor(name, y)
            if y.shape[:1] != x1.shape[:1]:
                raise ValueError(f"{name} must have a label for each of the {len(x1)} samples, got shape {tuple(y.shape)}")


def check_pair(x0: object, x1: object) -> None:
    """Floating tensors [B, ...] of one shape, dtype and device."""
    for name, x in (("x0", x0), ("x1", x1)):
        _checks.state(name, x)
    assert isinstance(x0, Tensor) and isinstance(x1, Tensor)
    _checks.like("x0", x0, x1)
    if x0.dtype != x1.dtype:
        raise TypeError(f"x0 must have the dtype of x1, {x1.dtype}, got {x0.dtype}")
