"""Group normalisation, modulation, SiLU and dropout as one layer: what stands before every convolution of the U-Net."""

import torch
from torch import Tensor, nn

from fm_fast import _backends, _checks, _ops
from fm_fast._philox import INDEX_LIMIT


class GroupNormSiLU(nn.Module):
    """dropout(silu(GroupNorm([x, second] + embedding) (1 + scale) + shift)) in one op, and one op back.

    Group normalisation after Wu & He (2018, "Group Normalization"), modulated as in the residual blocks of Dhariwal & Nichol (2021).
    Naive equivalent, with modulations shaped [B, C, 1, 1]::

        h = F.group_norm(torch.cat([x, second], 1) + embedding, groups, weight, bias, eps)
        y = F.dropout(F.silu(h * (1 + scale) + shift), dropout)

    Statistics and arithmetic are float32 (float64 for float64 x) whatever the dtype of x and of the parameters. Saved for the backward
    pass are x and second and two numbers a group, where torch's norm and silu keep two tensors of full size.
    ``weight`` and ``bias`` are those of nn.GroupNorm, so state dicts of either load into the other.

    Args:
        groups, channels, eps: as for nn.GroupNorm; channels are those of x and second together.
        activation: False leaves out the SiLU.
        dropout: probability in [0, 1) that an element of the result is set to zero; the others are multiplied by 1 / (1 - dropout),
            a float32 number also for float64 x.
        index: number of this layer in the dropout stream of the noise contract, in [0, 2^24). Layers of one network need different ones.
        fused: False runs the plain PyTorch formula, which gives the same numbers up to rounding, and the same dropout mask.

    Raises:
        ValueError, TypeError: for an argument that does not fit, naming it.
    """

    def __init__(
        self,
        groups: int,
        channels: int,
        *,
        eps: float = 1e-5,
        activation: bool = True,
        dropout: float = 0.0,
        index: int = 0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        _check_settings(groups, channels, eps, dropout, index)
        self.groups, self.channels, self.eps = groups, channels, eps
        self.activation, self.dropout, self.index, self.fused = activation, dropout, index, fused
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        *,
        second: Tensor | None = None,
        embedding: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Tensor:
        """The normalised, modulated and activated input, of x's dtype and memory format.

        Args:
            x: [B, C, ...] or, with ``second``, its first channels; any floating dtype, contiguous or channels_last without a copy.
            second: the remaining channels, instead of torch.cat, of x's dtype.
            embedding: [B, channels], added to every position before the norm.
            scale, shift: [B, channels], applied after the norm's own weight and bias.
            key: int64 key of the dropout noise, (seed, step, first sample id) or (seed, step, one id a sample).
                None, or a layer in evaluation mode: no dropout.
        """
        _check_inputs(self.channels, x, second, {"embedding": embedding, "scale": scale, "shift": shift}, key)
        dropout = self.dropout if self.training and key is not None else 0.0
        settings = _ops.NormSettings(self.groups, self.eps, self.activation, dropout, self.index)
        backend = _backends.resolve("group_norm_silu", x.device, None if self.fused else "reference")
        return _ops.group_norm_silu((x, second, embedding, self.weight, self.bias, scale, shift), key, settings, backend)

    def extra_repr(self) -> str:
        return (
            f"{self.groups}, {self.channels}, eps={self.eps}, activation={self.activation}, dropout={self.dropout}, "
            f"index={self.index}, fused={self.fused}"
        )


def _check_settings(groups: int, channels: int, eps: float, dropout: float, index: int) -> None:
    _checks.count("groups", groups)
    _checks.count("channels", channels)
    if channels % groups:
        raise ValueError(f"channels must be a multiple of groups, {groups}, got {channels}")
    _checks.positive_number("eps", eps)
    _checks.finite_number("dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    _checks.whole("index", index, INDEX_LIMIT)


def _check_inputs(channels: int, x: Tensor, second: Tensor | None, modulations: dict[str, Tensor | None], key: Tensor | None) -> None:
    _checks.state("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, C, ...], got {tuple(x.shape)}")
    if second is not None:
        _check_second(x, second)
    given = x.shape[1] + (0 if second is None else second.shape[1])
    if given != channels:
        where = "x" if second is None else "x and second"
        raise ValueError(f"{where} must have {channels} channels, got {given}")
    for name, value in modulations.items():
        if value is not None:
            _check_modulation(name, value, x, channels)
    if key is not None:
        _check_key(key, x)


def _check_second(x: Tensor, second: Tensor) -> None:
    _checks.tensor("second", second)
    if second.dtype != x.dtype:
        raise TypeError(f"second must have the dtype of x, {x.dtype}, got {second.dtype}")
    if second.dim() != x.dim() or second.shape[:1] != x.shape[:1] or second.shape[2:] != x.shape[2:]:
        raise ValueError(f"second must have the shape of x, {tuple(x.shape)}, but for the channels, got {tuple(second.shape)}")
    _checks.same_device("second", second, x, "x")


def _check_modulation(name: str, value: Tensor, x: Tensor, channels: int) -> None:
    _checks.tensor(name, value)
    _checks.floating(name, value)
    if value.shape != (x.shape[0], channels):
        raise ValueError(f"{name} must have shape {(x.shape[0], channels)}, got {tuple(value.shape)}")
    _checks.same_device(name, value, x, "x")


def _check_key(key: Tensor, x: Tensor) -> None:
    _checks.tensor("key", key)
    if key.dtype != torch.int64 or key.dim() != 1 or key.shape[0] not in (3, 2 + x.shape[0]):
        raise ValueError(f"key must be int64 of shape [3] or [{2 + x.shape[0]}], got {key.dtype} of shape {tuple(key.shape)}")
    _checks.same_device("key", key, x, "x")
