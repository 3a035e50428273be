"""Weights, moments and averages in shards, one a process (FSDP2): each keeps its part of the first dimension of every parameter.

Checkpoints hold whole tensors, the same as without shards: a run may go on with another number of processes, or without shards.
"""

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fm_fast.reference import NORM_EPSILON
from fm_fast.train.config import TrainConfig
from fm_fast.train.optimiser.adamw_ema import HALF_TYPES, AdamWEMA
from fm_fast.train.step import DTYPES, TrainState, averages_of, build_model

COUNTS = ("counts", "updates")  # the state that is no tensor of the parameter's shape, and the same in every process


class ShardedAdamWEMA(AdamWEMA):
    """AdamWEMA on this process's shards of the parameters; the norm that clips is that of all shards together."""

    def __init__(self, parameters: list[DTensor], *arguments: Any, max_norm: float, **settings: Any) -> None:
        self.whole, self._max_norm = parameters, max_norm
        self._norm = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        self.shards = [nn.Parameter(p.to_local().detach()) for p in parameters]
        super().__init__(self.shards, *arguments, **settings)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("optimiser: expected one without shards to copy or pickle; whole_state_dict() gives the state of this one")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One update from the gradients of the sharded parameters."""
        for whole, shard in zip(self.whole, self.shards, strict=True):
            shard.grad = None if whole.grad is None else whole.grad.to_local()  # type: ignore[union-attr]
        gradients = [shard.grad for shard in self.shards if shard.grad is not None]
        scale = self._scale(gradients)
        for gradient in gradients:
            gradient.mul_(scale)
        return super().step(closure)

    def _versions_now(self) -> list[int]:
        return [whole._version for whole in self.whole if whole.dtype in HALF_TYPES]

    def _scale(self, gradients: list[Tensor]) -> Tensor:
        """The factor that clips, float32 []; NaN where any process has a gradient that is not finite, so that all leave the step out."""
        squares = torch.stack([g.double().square().sum() for g in gradients]).sum()
        dist.all_reduce(squares)
        self._norm = squares.sqrt()
        scale = (self._max_norm / (self._norm + NORM_EPSILON)).clamp(max=1.0)
        return torch.where(self._norm.isfinite(), scale, math.nan).float()

    @property
    def gradient_norm(self) -> Tensor:
        """The norm of all shards' gradients of the last step before clipping, float64 [], on the device."""
        return self._norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        for whole in self.whole:
            whole.grad = None
        super().zero_grad(set_to_none)

    def whole_state_dict(self) -> dict[str, Any]:
        """`state_dict()` with whole tensors; every process must call it."""
        stored = self.state_dict()
        parts = {i: {name: self._gathered(i, name, value) for name, value in entry.items()} for i, entry in stored["state"].items()}
        groups = [{**group, "max_norm": self._max_norm} for group in stored["param_groups"]]
        return {"state": parts, "param_groups": groups}

    def load_whole_state_dict(self, stored: dict[str, Any]) -> None:
        """The inverse: each process takes its shards."""
        parts = {i: {name: self._own(i, name, value) for name, value in entry.items()} for i, entry in stored["state"].items()}
        groups = [{**group, "max_norm": math.inf} for group in stored["param_groups"]]
        self.load_state_dict({"state": parts, "param_groups": groups})

    def _gathered(self, index: int, name: str, value: Tensor) -> Tensor:
        whole = self.whole[index]
        if name in COUNTS:
            return value
        if name != "averages":
            return _like(whole, value).full_tensor()
        return torch.stack([_like(whole, average).full_tensor() for average in value]) if len(value) else value.new_empty(0, *whole.shape)

    def _own(self, index: int, name: str, value: Tensor) -> Tensor:
        whole = self.whole[index]
        if name in COUNTS:
            return value
        if name != "averages":
            return _shard(whole, value)
        return torch.stack([_shard(whole, average) for average in value]) if len(value) else value.new_empty(0, *whole.to_local().shape)


def _like(whole: DTensor, shard: Tensor) -> DTensor:
    return DTensor.from_local(shard.contiguous(), whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride())


def _shard(whole: DTensor, value: Tensor) -> Tensor:
    """This process's part of a whole tensor that every process has."""
    return distribute_tensor(value.to(whole.device), whole.device_mesh, whole.placements, src_data_rank=None).to_local()


class ShardedState(TrainState):
    """TrainState whose `state_dict` and `average` are whole; every process must take part in making either."""

    optimiser: ShardedAdamWEMA  # type: ignore[reportIncompatibleVariableOverride]

    @torch.no_grad()
    def averaged(self) -> nn.Module:
        """`average`, gathered anew; every process must ask for it."""
        for p, whole, shard in zip(self.average.parameters(), self.optimiser.whole, self.optimiser.shards, strict=True):
            p.copy_(_like(whole, self.optimiser.state[shard]["averages"][0]).full_tensor())
        return self.average

    def state_dict(self) -> dict[str, Any]:
        optimiser = self.optimiser.whole_state_dict()
        weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in self.model.state_dict().items()}
        return {"model": weights, "average": self.averaged().state_dict(), "optimiser": optimiser, "step": self.step}

    @torch.no_grad()
    def load_state_dict(self, stored: dict[str, Any]) -> None:
        for name, value in self.model.state_dict().items():
            whole = stored["model"][name]
            if isinstance(value, DTensor):
                value.to_local().copy_(_shard(value, whole))
            else:
                value.copy_(whole)
        self.optimiser.load_whole_state_dict(stored["optimiser"])
        self.step = stored["step"]


def shard_modules(model: nn.Module) -> None:
    """Each block of the U-Net is gathered when its turn comes, and let go of afterwards."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model)


def sharded_state(config: TrainConfig, device: torch.device, weights: dict[str, Tensor] | None = None) -> ShardedState:
    """The state before the first step, the same as without shards."""
    model = build_model(config, weights).to(device, DTYPES[config.precision])
    plain = copy.deepcopy(model).float().requires_grad_(False).eval()
    shard_modules(model)
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in model.parameters())
    optimiser = ShardedAdamWEMA(
        list(model.parameters()), config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay,  # type: ignore[arg-type]
        max_norm=config.clip if config.clip > 0.0 else math.inf, averages=averages_of(config),
    )  # fmt: skip
    return ShardedState(model, plain, optimiser)
