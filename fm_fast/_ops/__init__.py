"""The ops as the modules above see them: tensors in, tensors out, plain PyTorch wherever the guard says so. A file an op."""

from fm_fast._ops.adamw_ema import AdamwState, adamw_ema, adamw_ema_norm
from fm_fast._ops.conv_weight_grad import conv_weight_grad, conv_weight_grad_backend
from fm_fast._ops.group_norm_silu import NormSettings, group_norm_silu
from fm_fast._ops.guard import (
    function_transforms_active,
    gradient_transform_active,
    host_words,
    is_batched,
    needs_reference,
    outside_transforms,
    plainly_eager,
    transforms_active,
)
from fm_fast._ops.layout import memory_format, native_layout
from fm_fast._ops.noise import drawer, noise
from fm_fast._ops.path import path_loss, path_sample
from fm_fast._ops.schemas import SCHEMAS
from fm_fast._ops.solver import ProbeSet, divergence_step, linear_step, probe

__all__ = [
    "SCHEMAS",
    "AdamwState",
    "NormSettings",
    "ProbeSet",
    "adamw_ema",
    "adamw_ema_norm",
    "conv_weight_grad",
    "conv_weight_grad_backend",
    "divergence_step",
    "drawer",
    "function_transforms_active",
    "gradient_transform_active",
    "group_norm_silu",
    "host_words",
    "is_batched",
    "linear_step",
    "memory_format",
    "native_layout",
    "needs_reference",
    "noise",
    "outside_transforms",
    "path_loss",
    "path_sample",
    "plainly_eager",
    "probe",
    "transforms_active",
]
