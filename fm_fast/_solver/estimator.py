"""Divergence of the network's output from vector-Jacobian products, summed over the evaluations of a solve."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fm_fast import _checks, _ops, reference
from fm_fast._solver.probes import LARGEST_INDEX, Probes

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

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Gradients on for the network's call; the first one tells how much memory its graph takes."""
        with torch.inference_mode(False), torch.enable_grad():
            if self._chunk is not None:
                yield
                return
            with _measured_graph() as sizes:
                yield
            self._chunk = max(1, min(max(self.probes.total, 1), self._budget // max(sum(sizes.values()), 1)))

    def add(self, output: Tensor, x: Tensor, index: int, bias: float, factor: float, last: bool = True) -> None:
        """One evaluation: ``output`` [B, ...] computed from x under :meth:`recording`; its draws begin at ``index``.

        last: the graph of ``output`` is not needed any more.
        """
        if not output.requires_grad:
            raise RuntimeError(
                "the divergence needs the gradient of the model's output in x, which this model does not record: it must not run under "
                "no_grad or detach x (a velocity that is constant in x: add 0 * x)"
            )
        if index + self.probes.groups > LARGEST_INDEX:
            raise ValueError(f"probes x evaluations must stay below {LARGEST_INDEX}, got draw number {index + self.probes.groups}")
        if self.probes.exact:
            self.dots = self._trace(output, x, last)[None]
            self._accumulate(self.dots, bias, factor)
        elif self.create_graph:
            self._add_plain(output, x, index, bias, factor)
        else:
            self._add_fused(output, x, index, bias, factor, last)

    @property
    def group_count(self) -> int:
        """Independent groups of probes; an exact trace is one."""
        return 1 if self.probes.exact else self.probes.groups

    def group_means(self) -> Tensor:
        """div o of the last call by each independent group of probes, float64 [groups, B]; one group if exact."""
        return reference.group_means(self.dots, self.group_count)

    def _accumulate(self, dots: Tensor, bias: float, factor: float) -> None:
        mean, variance = reference.group_statistics(dots, self.group_count)
        self.sums = self.sums + torch.stack([bias + factor * mean, factor * factor * variance])

    def _add_fused(self, output: Tensor, x: Tensor, index: int, bias: float, factor: float, last: bool) -> None:
        probes = self.probes.at(self.key, index, self.backend)
        with torch.no_grad():
            for first, count in self._chunks():
                z = _ops.probe(output, probes, first, count, self.backend)
                products = self._vjp(output, x, z, last and first + count == probes.total)
                _ops.divergence_step(self.sums, self.dots, products, probes, first, bias, factor, self.backend)

    def _add_plain(self, output: Tensor, x: Tensor, index: int, bias: float, factor: float) -> None:
        """The same by plain PyTorch, differentiable."""
        probes, dots = self.probes.at(self.key, index, self.backend), []
        for first, count in self._chunks():
            z = _ops.probe(output.detach(), probes, first, count, self.backend)
            dots.append(reference.probe_products(z, self._vjp(output, x, z, last=False)))
        self.dots = torch.cat(dots)
        self._accumulate(self.dots, bias, factor)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(first probe, number of probes) of each batch of products."""
        chunk = self._chunk or 1
        return ((first, min(chunk, self.probes.total - first)) for first in range(0, self.probes.total, chunk))

    def _trace(self, output: Tensor, x: Tensor, last: bool) -> Tensor:
        """The trace of the Jacobian, float64 [B]: the diagonal entries from unit vectors."""
        trace = torch.zeros_like(self.sums[0])
        for first, count in self._chunks():
            z = output.new_zeros(count, output.shape[0], self.probes.size)
            z.diagonal(offset=first, dim1=0, dim2=2).fill_(1.0)
            products = self._vjp(output, x, z.reshape(count, *output.shape), last and first + count == self.probes.total)
            trace = trace + products.reshape(z.shape).diagonal(offset=first, dim1=0, dim2=2).to(torch.float64).sum(-1)
        return trace

    def _vjp(self, output: Tensor, x: Tensor, z: Tensor, last: bool) -> Tensor:
        """J^T z for each of z [k, B, ...]; frees the graph with the ``last``."""
        count = z.shape[0]
        self.products += count
        if count > 1 and self._mode == "auto" and not self._batches:
            return self._first_batch(output, x, z, last)
        return self._products_of(output, x, z, last)

    def _first_batch(self, output: Tensor, x: Tensor, z: Tensor, last: bool) -> Tensor:
        """Not every function of a model can be batched: "auto" then goes one by one."""
        try:
            products = self._products_of(output, x, z, last=False)
        except RuntimeError:
            self._chunk = 1
            return torch.cat([self._products_of(output, x, row[None], last=False) for row in z])
        self._batches = True
        return products

    def _products_of(self, output: Tensor, x: Tensor, z: Tensor, last: bool) -> Tensor:
        count = z.shape[0]
        keep = self.create_graph or not last
        batched = count > 1
        (product,) = torch.autograd.grad(
            output,
            x,
            z if batched else z[0],
            retain_graph=keep,
            create_graph=self.create_graph,
            is_grads_batched=batched,
            allow_unused=True,
        )
        if product is None:
            raise RuntimeError("the model's output does not depend on x (a velocity that is constant in x: add 0 * x)")
        if not batched:
            return _ops.native_layout(product).unsqueeze(0)
        return product if product.dim() <= 4 or product.is_contiguous() else product.contiguous()


@contextlib.contextmanager
def _measured_graph() -> Iterator[dict[int, int]]:
    """Bytes of the tensors that autograd keeps meanwhile, by their memory."""
    sizes: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        yield sizes


@contextlib.contextmanager
def frozen(model: object, freeze: bool = True) -> Iterator[None]:
    """The parameters of a module do not require gradients meanwhile: without it, autograd keeps activations that only they need."""
    module = getattr(model, "__self__", model)
    wanted = [p for p in module.parameters() if p.requires_grad] if freeze and isinstance(module, torch.nn.Module) else []
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
