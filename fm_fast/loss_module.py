"""The loss as a module whose settings are fixed once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fm_fast import _backends, _checks
from fm_fast._spec import path_spec
from fm_fast.loss import REDUCTIONS, flow_matching_loss

DEFAULTS = flow_matching_loss.__kwdefaults__ or {}
SETTINGS = set(DEFAULTS)


class FlowMatchingLoss(torch.nn.Module):
    """:func:`flow_matching_loss` with its settings fixed once: ``FlowMatchingLoss(path="vp")(model, x1, seed=0, step=n)``.

    Args:
        settings: keyword arguments of :func:`flow_matching_loss`; those given to the call take precedence.

    Raises:
        ValueError, TypeError: when it is made, for unknown settings, and for a path, objective, t_sampler, flip, levels, dtype, reduction
            or backend that there is not; when it is called, for all else, as the function.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        unknown = set(settings) - SETTINGS
        if unknown:
            raise TypeError(f"FlowMatchingLoss got unknown settings {', '.join(sorted(unknown))}; known are {', '.join(sorted(SETTINGS))}")
        _check_settings(settings)
        self.settings = settings
        for name, value in settings.items():
            if isinstance(value, torch.nn.Module):  # a path with trainable parameters
                self.add_module(name, value)
            elif isinstance(value, torch.nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):  # a weight, which moves with the module
                self.register_buffer(name, value, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings that are modules and tensors may be replaced. Of others, which an attribute does not change, AttributeError."""
        if name in SETTINGS and not (name in self._registered() and isinstance(value, (torch.nn.Module, Tensor))):
            raise AttributeError(f"{name} is a setting of FlowMatchingLoss: give it when the module is made, or to the call")
        super().__setattr__(name, value)

    def forward(self, model: Callable[..., Tensor], x1: Tensor, **arguments: Any) -> Tensor:
        return flow_matching_loss(model, x1, **{**self.settings, **self._registered(), **arguments})

    def _registered(self) -> dict[str, Any]:
        """Settings that are modules and tensors as they are now: they may have been moved or replaced."""
        return {
            name: value for kind in (self._modules, self._parameters, self._buffers) for name, value in kind.items() if name in SETTINGS
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Names are checked when the module is made, not at its first call."""
    chosen = {name: settings.get(name, DEFAULTS[name]) for name in ("path", "objective", "t_sampler", "flip", "levels", "dequantise")}
    _checks.probability("flip", chosen["flip"])
    _checks.grey_levels(chosen["levels"])
    path_spec(**chosen)
    _checks.one_of("backend", settings.get("backend"), (None, *_backends.BACKENDS))
    _checks.one_of("dtype", settings.get("dtype"), (None, *_checks.FLOATING))
    _checks.one_of("reduction", settings.get("reduction", "mean"), REDUCTIONS)
