"""The ops as the modules above see them: tensors in, tensors out, plain PyTorch wherever the guard says so. A file an op."""

from fm_fast._ops.adamw_ema import AdamwState, adamw_ema, adamw_ema_norm
from fm_fast._ops.assignment import assignment
from fm_fast._ops.attention import attention, attention_backend
from fm_fast._ops.conv3x3 import conv3x3, conv3x3_backend
from fm_fast._ops.conv_weight_grad import conv_weight_grad, conv_weight_grad_backend
from fm_fast._ops.divergence_step import divergence_step
from fm_fast._ops.group_norm_silu import NormSettings, group_norm_silu
from fm_fast._ops.guard import exports_gradient, is_batched, needs_reference
from fm_fast._ops.layout import memory_format, native_layout
from fm_fast._ops.linear_step import linear_step
from fm_fast._ops.noise import drawer, noise
from fm_fast._ops.path_loss import path_loss, recovers_noise
from fm_fast._ops.path_sample import path_sample
from fm_fast._ops.probe import ProbeSet, probe
from fm_fast._ops.step_control import step_control
from fm_fast._ops.step_error import step_error

__all__ = [
    "AdamwState",
    "NormSettings",
    "ProbeSet",
    "adamw_ema",
    "adamw_ema_norm",
    "assignment",
    "attention",
    "attention_backend",
    "conv3x3",
    "conv3x3_backend",
    "conv_weight_grad",
    "conv_weight_grad_backend",
    "divergence_step",
    "drawer",
    "exports_gradient",
    "group_norm_silu",
    "is_batched",
    "linear_step",
    "memory_format",
    "native_layout",
    "needs_reference",
    "noise",
    "path_loss",
    "path_sample",
    "probe",
    "recovers_noise",
    "step_control",
    "step_error",
]
