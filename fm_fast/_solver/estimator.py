"""Divergence of the network's output from vector-Jacobian products, summed over the evaluations of a solve."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fm_fast import _checks, _modes, _ops, reference
from fm_fast._philox import INDEX_LIMIT
from fm_fast._solver.probes import Probes
from fm_fast._solver.recording import Network, Recorded, measured_graph, record

Number = float | Tensor  # a tensor where it has a gradient

MODES = ("auto", "loop", "batched")
# Batched products pay where launches dominate, as long as all of them stay in the cache (CPU) or the memory (GPU).
DEFAULT_BUDGET = {"cpu": 2 << 20, "cuda": 1 << 30}


class Estimator:
    """Sums bias + factor div o over calls of :meth:`add`, with the variance that the probes cause.

    Attributes:
        sums: float64 [2, B]: the sum, and its variance over independent groups of probes.
        products: vector-Jacobian products so far.
        dots: float64 [total, B], z^T J z of each probe in the last call (not if exact).
    """

    def __init__(
        self, probes: Probes, key: Tensor, batch: int, mode: str, memory_budget: int | None, create_graph: bool, backend: str
    ) -> None:
        _checks.one_of("mode", mode, MODES)
        if memory_budget is not None:
            _checks.count("memory_budget", memory_budget)
        self.probes, self.key, self.create_graph = probes, key, create_graph
        self.backend = "reference" if create_graph else backend
        self.sums = torch.zeros(2, batch, dtype=torch.float64, device=key.device)
        self.dots = self.sums.new_empty(probes.total, 0 if probes.exact else batch)
        self.products = 0
        self._mode, self._budget = mode, memory_budget or DEFAULT_BUDGET.get(key.device.type, DEFAULT_BUDGET["cpu"])
        self._batches = False  # whether a batch of products has worked
        self._chunk: int | None = {"loop": 1, "batched": max(probes.total, 1), "auto": None}[mode]

    def record(self, network: Network, x: Tensor) -> Recorded:
        """The network's output for x, to :meth:`add`; the first one tells how much memory its graph takes."""
        if self._chunk is not None:
            return record(network, x)
        if _modes.transforms_active():  # which hide that memory
            self._chunk = 1
            return record(network, x)
        with measured_graph() as sizes:
            recorded = record(network, x)
        self._chunk = max(1, min(max(self.probes.total, 1), self._budget // max(sum(sizes.values()), 1)))
        return recorded

    def add(self, recorded: Recorded, index: int, bias: Number, factor: Number, last: bool = True) -> None:
        """One evaluation, by the estimator itself or by another; its draws begin at ``index``.

        last: the graph of the output is not needed any more.
        """
        if index + self.probes.groups > INDEX_LIMIT:
            raise ValueError(f"probes x evaluations must stay below {INDEX_LIMIT}, got draw number {index + self.probes.groups}")
        if self.probes.exact:
            self.dots = self._trace(recorded, last)[None]
            self._accumulate(self.dots, bias, factor)
        elif isinstance(bias, Tensor) or isinstance(factor, Tensor) or self.create_graph or _modes.transforms_active():
            self._add_plain(recorded, index, bias, factor)
        else:
            self._add_fused(recorded, index, bias, factor, last)

    def group_means(self) -> Tensor:
        """div o of the last call by each independent group of probes, float64 [groups, B]; one group if exact."""
        return reference.group_means(self.dots, self.probes.groups)

    def _accumulate(self, dots: Tensor, bias: Number, factor: Number) -> None:
        mean, variance = reference.group_statistics(dots, self.probes.groups)
        self.sums = self.sums + torch.stack([bias + factor * mean, factor * factor * variance])

    def _add_fused(self, recorded: Recorded, index: int, bias: float, factor: float, last: bool) -> None:
        probes = self.probes.at(self.key, index, self.backend)
        with torch.no_grad():
            for first, count in self._chunks():
                z = _ops.probe(recorded.output, probes, first, count, self.backend)
                products = self._products(recorded, z, last and first + count == probes.total)
                _ops.divergence_step(self.sums, self.dots, products, probes, first, bias, factor, self.backend)

    def _add_plain(self, recorded: Recorded, index: int, bias: Number, factor: Number) -> None:
        """The same by plain PyTorch, differentiable."""
        probes, dots = self.probes.at(self.key, index, self.backend), []
        for first, count in self._chunks():
            z = _ops.probe(recorded.output.detach(), probes, first, count, self.backend)
            dots.append(reference.probe_products(z, self._products(recorded, z, last=False)))
        self.dots = torch.cat(dots)
        self._accumulate(self.dots, bias, factor)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(first probe, number of probes) of each batch of products."""
        chunk = self._chunk or 1
        return ((first, min(chunk, self.probes.total - first)) for first in range(0, self.probes.total, chunk))

    def _trace(self, recorded: Recorded, last: bool) -> Tensor:
        """The trace of the Jacobian, float64 [B]: the diagonal entries from unit vectors."""
        trace, output = torch.zeros_like(self.sums[0]), recorded.output
        for first, count in self._chunks():
            z = output.new_zeros(count, output.shape[0], self.probes.size)
            z.diagonal(offset=first, dim1=0, dim2=2).fill_(1.0)
            products = self._products(recorded, z.reshape(count, *output.shape), last and first + count == self.probes.total)
            trace = trace + products.reshape(z.shape).diagonal(offset=first, dim1=0, dim2=2).to(torch.float64).sum(-1)
        return trace

    def _products(self, recorded: Recorded, z: Tensor, last: bool) -> Tensor:
        """J^T z for each of z [k, B, ...]; frees the graph with the ``last``."""
        count = z.shape[0]
        self.products += count
        if count > 1 and self._mode == "auto" and not self._batches:
            return self._first_batch(recorded, z)
        return recorded.products(z, not last, self.create_graph)

    def _first_batch(self, recorded: Recorded, z: Tensor) -> Tensor:
        """Not every function of a model can be batched: "auto" then goes one by one. The graph stays, since the first try may fail."""
        try:
            products = recorded.products(z, True, self.create_graph)
        except RuntimeError:
            self._chunk = 1
            return torch.cat([recorded.products(row[None], True, self.create_graph) for row in z])
        self._batches = True
        return products
