"""One call of the network, with what its vector-Jacobian products need: a graph of autograd, or the pullback of ``torch.func``."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fm_fast import _modes, _ops

Network = Callable[[Tensor], Tensor]


class Recorded(Protocol):
    """The output [B, ...] of the network for some x, and its products J^T z.

    ``products(z, keep, create_graph)`` takes z [k, B, ...]; ``keep``: there are more to come, ``create_graph``: they are differentiable.
    """

    output: Tensor

    def products(self, z: Tensor, keep: bool, create_graph: bool) -> Tensor: ...


def record(network: Network, x: Tensor) -> Recorded:
    """Calls the network; under transforms by ``torch.func.vjp``, which nests with them.

    Raises RuntimeError if autograd does not see that the output depends on x.
    """
    return _Pullback(network, x) if _modes.transforms_active() else _Graph(network, x)


class _Graph:
    def __init__(self, network: Network, x: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._x = _leaf(x)
            self.output = _recorded(_called(network, self._x))

    def products(self, z: Tensor, keep: bool, create_graph: bool) -> Tensor:
        product = self._product(z if len(z) > 1 else z[0], len(z) > 1, keep or create_graph, create_graph)
        if product is None:
            raise RuntimeError("the model's output does not depend on x (a velocity that is constant in x: add 0 * x)")
        if len(z) == 1:
            return _ops.native_layout(product).unsqueeze(0)
        return product if product.dim() <= 4 or product.is_contiguous() else product.contiguous()

    def _product(self, z: Tensor, batched: bool, keep: bool, create_graph: bool) -> Tensor | None:
        try:
            return torch.autograd.grad(
                self.output, self._x, z, retain_graph=keep, create_graph=create_graph, is_grads_batched=batched, allow_unused=True
            )[0]
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            raise RuntimeError(
                "model is compiled, and its backward pass gives its memory away, which more than one product an evaluation needs: set "
                "torch._functorch.config.donated_buffer = False before it is compiled, give the model that is not compiled, or ask for one "
                'product (kind="rademacher", probes=1)'
            ) from error


class _Pullback:
    def __init__(self, network: Network, x: Tensor) -> None:
        self.output, self._pull = torch.func.vjp(lambda y: _recorded(network(y)), x)  # type: ignore[misc]

    def products(self, z: Tensor, keep: bool, create_graph: bool) -> Tensor:
        if len(z) == 1:
            return self._pull(z[0])[0].unsqueeze(0)
        return torch.func.vmap(lambda row: self._pull(row)[0])(z)


def _leaf(x: Tensor) -> Tensor:
    """x where it belongs to a graph already, else the same values as a new leaf."""
    if x.requires_grad:
        return x
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _called(network: Network, x: Tensor) -> Tensor:
    try:
        return network(x)
    except RuntimeError as error:
        if "Inference tensors cannot be saved" not in str(error):
            raise
        raise RuntimeError(
            "model must hold no tensors that were made in inference mode, through which no gradient goes, as a divergence needs it: make "
            "or load it outside, or under torch.no_grad()"
        ) from error


def _recorded(output: Tensor) -> Tensor:
    if not output.requires_grad:
        raise RuntimeError(
            "the divergence needs the gradient of the model's output in x, which this model does not record: it must not run under "
            "no_grad or detach x (a velocity that is constant in x: add 0 * x)"
        )
    return output


@contextlib.contextmanager
def measured_graph() -> Iterator[dict[int, int]]:
    """Bytes of the tensors that autograd keeps meanwhile, by their memory."""
    sizes: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        sizes[_modes.memory_reader(kept)(kept)] = kept.untyped_storage().nbytes()
        # Not itself: an op's own output, kept with its graph, would keep the op that keeps it. Autograd puts the graph back on.
        return kept.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        yield sizes


def check_gradient(create_graph: bool) -> None:
    """ValueError where a ``torch.func`` transform asks for the gradient that is not recorded, which would be zero in silence.

    And where a program is exported, which cannot hold the gradients of the network that a divergence is made of.
    """
    if not isinstance(create_graph, bool):
        raise TypeError(f"create_graph must be True or False, got {create_graph!r}")
    if _modes.is_exporting():
        raise ValueError("model must not be exported together with its divergence: torch.export keeps no gradients within a program")
    if not create_graph and _modes.gradient_transform_active():
        raise ValueError(
            "create_graph must be True under torch.func.grad, vjp, jacrev and hessian, or the derivative would be zero, got False"
        )


def warn_unless_recorded(recorded: bool, name: str, start: Tensor, setting: str) -> None:
    """UserWarning where a gradient of the start could be wanted and is not recorded: a sum of losses would lack it in silence."""
    silent = _modes.is_compiling() or _modes.transforms_active()
    if not recorded and start.requires_grad and torch.is_grad_enabled() and not silent:
        warnings.warn(
            f"{name} requires a gradient, which is not recorded: give {setting} if it is wanted, else {name}.detach()", stacklevel=3
        )


@contextlib.contextmanager
def solving(model: object, create_graph: bool) -> Iterator[None]:
    """Gradients beyond single evaluations only where asked for; tensors made here can be differentiated whatever the caller's mode."""
    with torch.inference_mode(False), torch.set_grad_enabled(create_graph), _frozen(model, not create_graph):
        yield


def _is_of_inference(parameter: Tensor) -> bool:
    """Which torch does not let change."""
    return not _modes.is_compiling() and parameter.is_inference()


@contextlib.contextmanager
def _frozen(model: object, freeze: bool) -> Iterator[None]:
    """The parameters of a module do not require gradients meanwhile: without it, autograd keeps activations that only they need."""
    module = getattr(model, "__self__", model)
    freeze = freeze and not _modes.transforms_active()  # which forbid to change what requires a gradient
    # Computed ones, as torch.func.functional_call puts in, cannot be frozen.
    parameters = module.parameters() if freeze and isinstance(module, torch.nn.Module) else ()
    wanted = [p for p in parameters if p.requires_grad and p.is_leaf and not _is_of_inference(p)]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
