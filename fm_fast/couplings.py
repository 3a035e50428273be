"""Minibatch optimal transport: which noise of a batch goes with which data (Pooladian et al. 2023, Tong et al. 2023).

Optimal pairs cross less than random ones, so the velocity varies less around its mean and its flow is straighter. The optimal pairing has
the least sum of squared distances

    sum_i |x1_i - x0_order(i)|^2 = sum_i |x1_i|^2 + sum_i |x0_i|^2 - 2 sum_i <x1_i, x0_order(i)>,

of which only the last sum depends on the order: one matrix of products, whatever the data map's scale and the width of the path's noise.
What is left is an assignment problem, which op ``assignment`` solves on the host.

Noise is a function of (seed, step, sample id), so a pairing is an order of the sample ids. A training step that is given these ids draws
its noise in the kernels as ever, and the pairing can be found anywhere: on another device, in a worker of the DataLoader, steps ahead.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks, _modes, _ops, random
from fm_fast.random import Whole

__all__ = ["optimal_ids", "optimal_order"]

LARGEST = 1e300  # products whose sums are finite


def optimal_ids(
    x1: Tensor,
    *,
    seed: Whole,
    step: Whole,
    sample_ids: Whole | None = None,
    labels: Tensor | None = None,
    flip: float = 0.0,
) -> Tensor:
    """The sample ids with whose noise a batch of data is paired optimally: ``sample_ids`` for the loss of the same seed and step.

    ::

        ids = fm.couplings.optimal_ids(x1, seed=0, step=step)
        loss = fm.flow_matching_loss(model, x1, seed=0, step=step, sample_ids=ids)

    Pairs of a larger batch can be trained in parts: give each part of x1 the same part of the ids. The numbers of another device differ in
    their last digits: where two pairings cost the same up to those, it may choose the other one.

    Args:
        x1: data [B, ...], floating, or uint8 of any number of levels.
        seed, step: those of the loss.
        sample_ids: those of the batch: None (0..B-1), the first id, or int64 [B].
        labels: whole numbers [B]; pairs are made within a class alone. Without them the noise of a class is no longer Gaussian, and
            sampling the class from Gaussian noise does not give its distribution (Cheng and Schwing 2025).
        flip: that of the loss; the noise that goes with a mirrored sample is paired as such.

    Returns:
        int64 [B] on the device of x1, an order of the ids. The assignment is solved on the host: a GPU is waited for.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape, dtype or device, and for data that are not finite.
        RuntimeError: in compiled functions, under ``torch.func`` transforms, and while a CUDA graph is recorded.

    Naive equivalent, for sample ids from 0::

        x0 = fm.noise(x1.shape, seed=seed, step=step)
        rows, ids = scipy.optimize.linear_sum_assignment(torch.cdist(x1.flatten(1), x0.flatten(1)) ** 2)
    """
    _checks.data(x1)
    _checks.probability("flip", flip)
    _checks.data_map(x1, flip, 256, False)
    ids = _all_ids(sample_ids, x1)
    dtype = x1.dtype if x1.dtype == torch.float64 else torch.float32
    drawn: dict[str, Any] = {"seed": seed, "step": step, "sample_ids": ids, "device": x1.device}
    x0 = random.noise(tuple(x1.shape), **drawn, dtype=dtype)
    if flip > 0.0:  # mirroring either of a pair gives the same product
        mirrored = random.noise((x1.shape[0], 1), **drawn, stream="flip", dtype=torch.float32)[:, 0] < flip
        x0[mirrored] = x0[mirrored].flip(-1)
    return ids[optimal_order(x0, x1, labels=labels)]


def optimal_order(x0: Tensor, x1: Tensor, *, labels: Tensor | None = None) -> Tensor:
    """The order of given noise, or of any other source samples, that is the optimal one for a batch of data: ``x0=x0[order]`` for the loss.

    Args:
        x0: source samples [B, ...], of the shape of x1.
        x1, labels: as those of :func:`optimal_ids`.

    Returns:
        int64 [B] on the device of x1: x0[order[i]] goes with x1[i].

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`optimal_ids`.

    Naive equivalent::

        rows, order = scipy.optimize.linear_sum_assignment(torch.cdist(x1.flatten(1), x0.flatten(1)) ** 2)
    """
    _checks.data(x1)
    _checks.like("x0", x0, x1)
    if not _modes.worth_a_wait(x1):
        raise RuntimeError("a coupling looks at values: find it outside torch.compile, torch.func transforms and CUDA graphs")
    costs, guess = _costs(x0.detach(), x1.detach())
    if labels is None:
        return _ops.assignment(costs, guess).to(x1.device)
    classes = _classes(labels, x1)
    order = torch.empty_like(classes)
    for label in classes.unique():
        members = (classes == label).nonzero().squeeze(1)
        order[members] = members[_ops.assignment(costs[members][:, members], guess[members])]
    return order.to(x1.device)


def _all_ids(sample_ids: Whole | None, x1: Tensor) -> Tensor:
    """int64 [B]."""
    batch = x1.shape[0]
    _checks.sample_ids(sample_ids, batch, x1.device)
    if isinstance(sample_ids, Tensor) and sample_ids.dim() == 1:
        return sample_ids
    return torch.arange(batch, device=x1.device) + (0 if sample_ids is None else sample_ids)


def _costs(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """-<x1_i, x0_j> [B, B] and a guess of what x0_j is worth [B], on the host.

    The mean of the data is the same in every pairing, and would take digits from the rest.
    """
    dtype = torch.promote_types(torch.promote_types(x0.dtype, x1.dtype), torch.float32)
    data, source = (_rows(x).to(dtype) for x in (x1, x0))
    negated = data.mean(0) - data
    with torch.autocast(x1.device.type, enabled=False):
        costs = negated @ source.T
        guess = _guess(negated, source)
    costs, guess = torch.cat([costs, guess[None]]).cpu().split([len(guess), 1])
    if costs.numel() and not float(torch.linalg.vector_norm(costs, math.inf)) < LARGEST:
        raise ValueError(f"x0 and x1 must be finite, and their products below {LARGEST:g}, got values that are not")
    return costs, guess[0].to(torch.float64)


def _guess(data: Tensor, source: Tensor) -> Tensor:
    """Between Gaussians of widths s1 and s0 the optimal map is x0 -> (s1 / s0) x0, whose potential is (s1 / s0) |x0|^2 / 2.

    Nothing where a batch is thin in the space of its samples, and such prices worth little. data: about their mean.
    """
    batch, size = source.shape
    if size >= batch:
        return source.new_zeros(batch)
    mean = source.mean(0)
    # About the mean, but for what all have in common.
    squares = torch.linalg.vecdot(source, source) - 2.0 * (source @ mean)
    width = (squares.sum() + batch * torch.dot(mean, mean)).sqrt()
    return (squares * (-0.5 * torch.linalg.vector_norm(data) / width)).nan_to_num(0.0, 0.0, 0.0)


def _rows(x: Tensor) -> Tensor:
    """[B, elements of a sample]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _classes(labels: Tensor, x1: Tensor) -> Tensor:
    _checks.tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}")
    if labels.shape != x1.shape[:1]:
        raise ValueError(f"labels must have shape [{len(x1)}], got {tuple(labels.shape)}")
    return labels.to("cpu", torch.int64)
