"""Schedulers: alpha_t and sigma_t of an affine path, and a model's change from one to another."""

from fm_fast.compat.flow_matching.path.scheduler.schedule_transform import ScheduleTransformedModel
from fm_fast.compat.flow_matching.path.scheduler.scheduler import (
    CondOTScheduler,
    ConvexScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    Scheduler,
    SchedulerOutput,
    VPScheduler,
)

__all__ = [
    "CondOTScheduler",
    "ConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "PolynomialConvexScheduler",
    "ScheduleTransformedModel",
    "Scheduler",
    "SchedulerOutput",
    "VPScheduler",
]
