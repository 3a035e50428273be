"""``OTPlanSampler`` and ``wasserstein``: optimal pairs of two batches, by an assignment (:mod:`fm_fast.couplings`), and how far apart."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_fast import _checks, _ops
from fm_fast.compat._own import are_its_own
from fm_fast.compat.torchcfm._arguments import check_labels, check_pair
from fm_fast.couplings import optimal_order

__all__ = ["OTPlanSampler", "wasserstein"]

Plan = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


class OTPlanSampler:
    """Pairs of least squared distance of two batches of one shape (Tong et al. 2023, Pooladian et al. 2023).

    There are no plans between batches of different sizes and no trajectories. A subclass may put its own in place of ``get_map`` and
    ``sample_map``, for other costs: pairs are then draws from its plan.

    Args:
        method: "exact".
        reg, reg_m, normalize_cost, num_threads, warn: not looked at. They are settings of entropic plans, a factor of all costs, and what
            torchcfm's solver runs on and says: no exact assignment depends on them. Kept for subclasses.
    """

    def __init__(
        self,
        method: str = "exact",
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
    ) -> None:
        _checks.one_of("method", method, ("exact",))
        self.reg, self.reg_m, self.normalize_cost, self.warn = reg, reg_m, normalize_cost, warn

    def ot_fn(self, a: Plan, b: Plan, M: Plan) -> Plan:
        """The plan [B, B] of least cost for costs M [B, B] between equal weights a, b [B], which a ``get_map`` of one's own may call."""
        costs = np.ascontiguousarray(M, dtype=np.float64)
        size = len(costs)
        if costs.shape != (size, size) or not all(np.shape(w) == (size,) and np.allclose(w, 1.0 / max(size, 1)) for w in (a, b)):
            raise ValueError(
                f"a and b must be B equal weights of sum 1 and M costs [B, B], got {np.shape(a)}, {np.shape(b)}, {costs.shape}"
            )
        if not np.isfinite(costs).all():
            raise ValueError("M must be finite, got costs that are not")
        order = _ops.assignment(torch.from_numpy(costs), torch.zeros(size, dtype=torch.float64, device="cpu"))
        return _plan(np.arange(size), order.numpy())

    def get_map(self, x0: Tensor, x1: Tensor) -> Plan:
        """The plan [B, B]: 1 / B for x0_i and x1_j that are a pair, else 0."""
        order = self._order(x0, x1).cpu().numpy()
        return _plan(order, np.arange(len(order)))

    def sample_map(self, pi: Plan | Tensor, batch_size: int, replace: bool = True) -> tuple[Indices, Indices]:
        """(i, j), the pairs of ``batch_size`` draws from a plan [N, M] of any total, as from :meth:`get_map`.

        torch's generator draws them, with replacement or without, which the plan must then have pairs enough for.
        """
        rows, columns, weights = _pairs_of(pi)
        _checks.count("batch_size", batch_size)
        if not replace and batch_size > len(weights):
            raise ValueError(f"batch_size must be at most {len(weights)} with replace=False, the pairs of pi, got {batch_size}")
        drawn = torch.multinomial(torch.from_numpy(weights), batch_size, replace).numpy()
        return rows[drawn], columns[drawn]

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool | None = None) -> tuple[Tensor, Tensor]:
        """x0 and x1 in an order in which they are pairs: every pair once, in the order of x1, or as many drawn with replacement.

        replace: None is False, but with a plan of a subclass's own True.
        """
        i, j = self._drawn(x0, x1, replace)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self, x0: Tensor, x1: Tensor, y0: Tensor | None = None, y1: Tensor | None = None, replace: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As :meth:`sample_plan`, and the labels y0 [B, ...] and y1 [B, ...] that go with them."""
        i, j = self._drawn(x0, x1, replace)
        check_labels(x0, y0=y0)
        check_labels(x1, y1=y1)
        return x0[i], x1[j], None if y0 is None else y0[i.to(y0.device)], None if y1 is None else y1[j.to(y1.device)]

    def _drawn(self, x0: Tensor, x1: Tensor, replace: bool | None) -> tuple[Tensor, Tensor]:
        """(i, j): x0[i] goes with x1[j]."""
        if not are_its_own(self, OTPlanSampler, "get_map", "sample_map"):
            rows, columns = self.sample_map(self.get_map(x0, x1), len(x0), replace=replace is None or replace)
            return torch.as_tensor(rows, device=x0.device), torch.as_tensor(columns, device=x1.device)
        i, j = self._order(x0, x1), torch.arange(len(x1), device=x1.device)
        if replace:
            j = torch.randint(max(len(x1), 1), (len(x1),), device=x1.device)
            i = i[j]
        return i, j

    def _order(self, x0: Tensor, x1: Tensor) -> Tensor:
        check_pair(x0, x1)
        return optimal_order(x0, x1)


def wasserstein(x0: Tensor, x1: Tensor, method: str | None = None, reg: float = 0.05, power: int = 2) -> float:
    """The Wasserstein distance of two batches of one shape.

    Args:
        x0, x1: samples [B >= 1, ...], floating.
        method: "exact" or None, which is the same.
        reg: not looked at: a setting of entropic distances.
        power: 1 for the mean distance of the pairs for which it is least, 2 for the root of the mean squared one.
    """
    _checks.one_of("method", method, (None, "exact"))
    _checks.one_of("power", power, (1, 2))
    check_pair(x0, x1)
    if not len(x0):
        raise ValueError("x0 and x1 must hold at least one sample, got none")
    one, other = (x.detach().reshape(len(x), -1).double() for x in (x0, x1))
    order = optimal_order(one, other) if power == 2 else _nearest(one, other)
    apart = torch.linalg.vector_norm(other - one[order], dim=1)
    return float((apart**power).mean() ** (1.0 / power))


def _nearest(x0: Tensor, x1: Tensor) -> Tensor:
    """x0[order] goes with x1 for the least sum of distances."""
    costs = torch.cdist(x1, x0).cpu()
    if not bool(costs.isfinite().all()):
        raise ValueError("x0 and x1 must be finite, got values that are not")
    return _ops.assignment(costs, torch.zeros(len(costs), dtype=torch.float64, device="cpu")).to(x1.device)


def _plan(rows: Indices, columns: Indices) -> Plan:
    """Of these pairs, all of one weight."""
    plan = np.zeros((len(rows), len(rows)))
    plan[rows, columns] = 1.0 / max(len(rows), 1)
    return plan


def _pairs_of(pi: object) -> tuple[Indices, Indices, Plan]:
    """(i, j, weight) of all pairs in a plan."""
    plan = np.asarray(pi.detach().cpu() if isinstance(pi, Tensor) else pi, dtype=np.float64)
    if plan.ndim != 2:
        raise ValueError(f"pi must be a plan [N, M], got shape {plan.shape}")
    rows, columns = plan.nonzero()
    weights = plan[rows, columns]
    if not len(weights) or not (np.isfinite(weights).all() and (weights > 0.0).all()):
        raise ValueError("pi must be finite, not negative, and positive somewhere")
    return rows, columns, weights
