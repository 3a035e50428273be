"""The registered ops: schemas, fake kernels, the autograd Function and the transform guard.

The only file that knows ``torch.library``. Ops write into tensors that the caller allocates and return nothing; their implementations
live in csrc/ and kernels/. They have no autograd formula of their own: the Function here calls them. Wherever a ``torch.func``
transform or forward-mode differentiation is active, or a gradient other than the prediction's is wanted, plain PyTorch
(``reference.py``) runs.
"""

import array
import contextlib
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fm_fast import _backends, reference
from fm_fast._philox import Kind, Stream
from fm_fast._spec import PathSpec

SCHEMAS = {
    "noise": "(Tensor(a!) out, Tensor key, int kind, int stream, int index) -> ()",
    "path_sample": (
        "(Tensor(a!) x_t, Tensor(b!) t, Tensor(c!) coef, Tensor x1, Tensor x0, Tensor key, int path, float path_a, float path_b, "
        "int objective, int t_sampler, float t_mean, float t_std, float t_min, float t_max, float flip, float levels, "
        "bool dequantise) -> ()"
    ),
    "path_loss": (
        "(Tensor(a!) loss, Tensor(b!) grad, Tensor o, Tensor x1, Tensor x0, Tensor key, Tensor coef, Tensor weight, int reduction, "
        "float flip, float levels, bool dequantise, Tensor? x_t=None) -> ()"
    ),
    "path_loss_backward": (
        "(Tensor(a!) grad, Tensor o, Tensor x1, Tensor x0, Tensor key, Tensor coef, Tensor weight, Tensor grad_output, int reduction, "
        "float flip, float levels, bool dequantise) -> ()"
    ),
    "linear_step": "(Tensor(a!) out, Tensor(b!) copy, Tensor x, Tensor[] k, Tensor table, int row, float guidance) -> ()",
    "probe": "(Tensor(a!) out, Tensor key, Tensor codes, Tensor rows, int index, int first, int share) -> ()",
    "divergence_step": (
        "(Tensor(a!) sums, Tensor(b!) dots, Tensor g, Tensor key, Tensor codes, Tensor rows, int kind, int index, int first, int share, "
        "int groups, float bias, float factor) -> ()"
    ),
}
GIVEN_TIME = -1
PROBE_KINDS = {Kind.sign: 0, Kind.normal: 1}

_library = torch.library.Library("fm_fast", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    torch.library.register_fake(f"fm_fast::{_name}", lambda *arguments: None, lib=_library)
_backends.load_native()
# The name is imported late because type checkers do not see that the folder kernels/ is installed as fm_fast.kernels.
_triton_library = importlib.import_module("fm_fast.kernels").register()  # registrations live as long as this value

_noise = torch.ops.fm_fast.noise.default
_path_sample = torch.ops.fm_fast.path_sample.default
_path_loss = torch.ops.fm_fast.path_loss.default
_path_loss_backward = torch.ops.fm_fast.path_loss_backward.default
_linear_step = torch.ops.fm_fast.linear_step.default
_probe = torch.ops.fm_fast.probe.default
_divergence_step = torch.ops.fm_fast.divergence_step.default


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is running, which only plain PyTorch supports."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Where the host computes numbers of its own, which a running ``torch.func`` transform would wrap."""
    return temporarily_clear_interpreter_stack() if torch._C._are_functorch_transforms_active() else contextlib.nullcontext()


def _plainly_eager() -> bool:
    """Whether torch runs without a compiler or a mode that looks at every op: then tensors may be made or shared behind its back."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


_NOTHING = torch.empty(0, device="cpu")


def _absent(like: Tensor) -> Tensor:
    """A tensor without elements. Where torch.compile may look, one of its own a call, because it refuses the same tensor twice."""
    return _NOTHING if like.device.type == "cpu" and _plainly_eager() else like.new_empty(0)


def host_words(words: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU; from a buffer where nothing watches, which takes a quarter of torch.tensor's time."""
    if not _plainly_eager():
        return torch.tensor(words, dtype=torch.int64, device="cpu")
    return torch.frombuffer(array.array("q", words), dtype=torch.int64)


def _run(op: Any, *arguments: Any) -> None:
    """Call a raw op whose inputs want no gradient, as the guard has found: with recording off it need not look for any, which is slow."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return op(*arguments)
    torch._C._set_grad_enabled(False)
    try:
        op(*arguments)
    finally:
        torch._C._set_grad_enabled(True)


def needs_reference(backend: str, *tensors: Tensor | None) -> bool:
    """Whether plain PyTorch must run: asked for, a transform is active, or one of ``tensors`` wants its gradient."""
    if backend == "reference" or transforms_active():
        return True
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def noise(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Numbers of the noise contract, [B, ...] of ``dtype``, contiguous."""
    if needs_reference(backend):
        return reference.noise(key, shape, kind, stream, index).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=key.device)
    _noise(out, key, int(kind), int(stream), index)
    return out


def drawer(backend: str) -> reference.Draw:
    """A function (key, shape, kind, stream, index=0) that draws float32 numbers or words with the backend of op ``noise``."""

    def draw(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int = 0) -> Tensor:
        return noise(key, shape, kind, stream, index, torch.int64 if kind is Kind.word else torch.float32, backend)

    return draw


def path_sample(
    x1: Tensor, x0: Tensor | None, t: Tensor | None, coefficients: Tensor | None, key: Tensor, spec: PathSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t [B], coefficients [B, 6]) in one pass over x1; with ``coefficients`` given, t is too and both are used as they are."""
    wide = reference.accumulation_dtype(x1, x0, coefficients) if dtype != torch.float64 else torch.float64
    x1 = native_layout(x1)
    x_t = torch.empty_like(x1, dtype=dtype)
    sampler = spec.t_sampler.code if t is None else GIVEN_TIME
    times = x1.new_empty(x1.shape[0], dtype=wide) if t is None else t
    rows = x1.new_empty(x1.shape[0], 6, dtype=wide) if coefficients is None else coefficients
    path = spec.kernel_path if coefficients is None else (GIVEN_TIME, 0.0, 0.0)
    times_drawn = (sampler, spec.t_sampler.mean, spec.t_sampler.std, *spec.t_range)
    x0 = _absent(rows) if x0 is None else native_layout(x0)
    _run(_path_sample, x_t, times, rows, x1, x0, key, *path, spec.objective.code, *times_drawn, *_data_map(spec))
    return x_t, times, rows


def path_loss(
    o: Tensor,
    x1: Tensor,
    x0: Tensor | None,
    x_t: Tensor | None,
    key: Tensor,
    coefficients: Tensor,
    weight: Tensor | None,
    reduction: str,
    spec: PathSpec,
) -> Tensor:
    """The reduced loss, differentiable in ``o`` (twice); float32, or float64 for float64 data.

    ``x_t`` is what :func:`path_sample` made of x1 and drawn noise, from which a kernel may recover that noise; None: it is drawn again.
    """
    # The copy of an unusual layout happens here, where autograd sees it, and not inside the Function.
    x0 = _absent(coefficients) if x0 is None else native_layout(x0)
    mask = _absent(coefficients) if weight is None else _kernel_weight(weight, o, coefficients.dtype)
    inputs = (native_layout(o), native_layout(x1), x0, key, coefficients, mask)
    tail = (reference.REDUCTIONS.index(reduction), *_data_map(spec))
    if torch.is_grad_enabled() and o.requires_grad:
        o, *others = _savable(inputs)
        return _PathLoss.apply(o, tuple(others), x_t, tail)
    with torch.no_grad():  # the raw op would otherwise look for gradients to refuse
        return _fused_loss(inputs, x_t, tail, with_gradient=False)[0]


def _savable(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, or copies of those made under inference mode, which autograd refuses to keep for the backward pass."""
    if torch.compiler.is_compiling() or not any([x.is_inference() for x in tensors]):
        return tensors
    return tuple(x.clone() if x.is_inference() else x for x in tensors)


def _data_map(spec: PathSpec) -> tuple[float, int, bool]:
    return spec.flip, spec.levels, spec.dequantise


def _fused_loss(inputs: tuple[Tensor, ...], x_t: Tensor | None, tail: tuple[Any, ...], with_gradient: bool) -> tuple[Tensor, Tensor]:
    o, coefficients = inputs[0], inputs[4]
    shape = o.shape[:1] if tail[0] == reference.REDUCTIONS.index("none") else ()
    loss = o.new_empty(shape, dtype=reference.accumulation_dtype(o, coefficients))
    gradient = torch.empty_like(o) if with_gradient else o.new_empty(0)
    _path_loss(loss, gradient, *inputs, *tail, x_t)
    return loss, gradient


class _PathLoss(torch.autograd.Function):
    """Loss and finished gradient in one pass. Backward only scales the gradient, and never in place, so it can run again.

    float16 keeps no gradient: 2 / N underflows in it, so backward computes the gradient with grad_output / N applied in float32.
    Only ``o`` gets a gradient, so the others come in one tuple, which spares autograd a look at each of them.
    """

    @staticmethod
    def forward(ctx: Any, o: Tensor, others: tuple[Tensor, ...], x_t: Tensor | None, tail: tuple[Any, ...]) -> Tensor:  # type: ignore[override]
        loss, gradient = _fused_loss((o, *others), x_t, tail, with_gradient=o.dtype != torch.float16)
        ctx.tail = tail
        ctx.save_for_backward(o, *others, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, gradient = ctx.saved_tensors
        if torch.is_grad_enabled() or (gradient.dtype == torch.float16 and _is_batched(grad_output)):
            result = _differentiable_gradient(inputs, ctx.tail, grad_output)
        elif gradient.dtype == torch.float16:
            result = torch.empty_like(inputs[0])
            _path_loss_backward(result, *inputs, grad_output.contiguous(), *ctx.tail)
        else:
            result = _scaled(gradient, grad_output)
        return result, None, None, None


def _scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    if _is_one(grad_output):
        return gradient
    return (gradient * reference.per_sample(grad_output, gradient) if grad_output.dim() else gradient * grad_output).to(gradient.dtype)


def _is_one(grad_output: Tensor) -> bool:
    """Whether the usual loss.backward() runs, which needs no multiplication. Not asked where the answer would mean waiting for a device."""
    if torch.compiler.is_compiling() or type(grad_output) is not Tensor or _is_batched(grad_output):
        return False
    return grad_output.device.type == "cpu" and grad_output.dim() == 0 and grad_output.item() == 1


def _is_batched(grad_output: Tensor) -> bool:
    """Whether a vmap runs over several grad_outputs; the guard does not see it from inside a backward pass."""
    return not torch.compiler.is_compiling() and (is_legacy_batchedtensor(grad_output) or is_batchedtensor(grad_output))


def _differentiable_gradient(inputs: list[Tensor], tail: tuple[Any, ...], grad_output: Tensor) -> Tensor:
    """The gradient by the plain formula, itself differentiable: what create_graph=True asks for."""
    o, x1, x0, key, coefficients, weight = inputs
    reduction, flip, levels, dequantise = tail
    data, noise_x0 = reference.plain_inputs(x1, x0 if x0.numel() else None, key, flip, levels, dequantise, coefficients.dtype)
    mask = weight.reshape(o.shape) if weight.numel() == o.numel() else weight
    with torch.enable_grad():
        loss = reference.path_loss(o, data, noise_x0, coefficients, mask if weight.numel() else None, reference.REDUCTIONS[reduction])
        return torch.autograd.grad(loss, o, grad_output, create_graph=True)[0]


def _kernel_weight(weight: Tensor, o: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as kernels read it: contiguous, one value a sample or one an element."""
    return (weight if weight.dim() == 1 else weight.expand(o.shape)).to(dtype).contiguous()


def linear_step(backend: str) -> Callable[..., None]:
    """Op ``linear_step`` itself, for loops without gradients: (out, copy, x, outputs, table, row, guidance) -> None.

    Writes table[row, 0] x + sum_j table[row, 1 + j] m(outputs[j]) into out, which may be x, and once or twice into copy where it is not
    empty; see :func:`fm_fast.reference.linear_step`.
    """
    return _plain_linear_step if backend == "reference" else _linear_step


def _plain_linear_step(out: Tensor, copy: Tensor, x: Tensor, outputs: Sequence[Tensor], table: Tensor, row: int, guidance: float) -> None:
    wide = reference.accumulation_dtype(x, out)
    # Scalars on the device, so that nothing waits for it.
    first, *others = table[row].to(wide).unbind()
    result = x.to(wide) * first
    for output, coefficient in zip(outputs, others, strict=True):
        result = result + coefficient * reference.mixed(output.to(wide), x, guidance)
    out.copy_(result)
    for half in copy.split(x.shape[0]) if copy.numel() else ():
        half.copy_(result)


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Which probes one evaluation of a divergence uses; :func:`fm_fast.reference.probes` says how the numbers make signs.

    normal: normal vectors instead of signs. codes int64 [D] and rows int64 [total] may be empty. Probe q draws with index + q // share.
    """

    key: Tensor
    codes: Tensor
    rows: Tensor
    index: int
    total: int
    share: int
    normal: bool

    @property
    def groups(self) -> int:
        """Groups of consecutive probes that are independent of each other."""
        return self.total // self.share


def probe(like: Tensor, probes: ProbeSet, first: int, count: int, backend: str) -> Tensor:
    """Probes first .. first + count - 1 in the dtype and memory format of ``like`` [B, ...]: [count, B, ...]."""
    shape = tuple(like.shape)
    if probes.normal:
        indices = [probes.index + q // probes.share for q in range(first, first + count)]
        drawn = [noise(probes.key, shape, Kind.normal, Stream.probe, index, like.dtype, backend) for index in indices]
        return torch.stack(drawn)
    if needs_reference(backend):
        signs = reference.probes(probes.key, shape, probes.codes, probes.rows, probes.index, first, probes.share, count)
        return signs.to(like.dtype)
    out = torch.empty((count * shape[0], *shape[1:]), dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    out = out.unflatten(0, (count, shape[0])) if shape[0] else out.reshape(count, *shape)
    _probe(out, probes.key, probes.codes, probes.rows, probes.index, first, probes.share)
    return out


def divergence_step(
    sums: Tensor, dots: Tensor, products: Tensor, probes: ProbeSet, first: int, bias: float, factor: float, backend: str
) -> None:
    """sum_i z_i (J^T z)_i into dots [K, B] for probes first, first + 1, ... whose ``products`` J^T z are [k, B, ...].

    With the last probe, adds bias + factor mean to sums[0] and factor^2 times the variance of that mean to sums[1]; sums is [2, B].
    The probes are drawn again, not read.
    """
    if not needs_reference(backend):
        kind = Kind.normal if probes.normal else Kind.sign
        tail = (PROBE_KINDS[kind], probes.index, first, probes.share, probes.groups, bias, factor)
        _divergence_step(sums, dots, products, probes.key, probes.codes, probes.rows, *tail)
        return
    count = products.shape[0]
    z = probe(products[0], probes, first, count, "reference")
    dots[first : first + count] = reference.probe_products(z, products)
    if first + count == probes.total:
        mean, variance = reference.group_statistics(dots, probes.groups)
        sums += torch.stack([bias + factor * mean, factor * factor * variance])


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for images and volumes that lie so, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()]):
        return formats[x.dim()]
    return torch.contiguous_format


def native_layout(x: Tensor) -> Tensor:
    """x itself where its memory is (batch stride, channel stride, position stride), as contiguous and channels_last are; else a copy."""
    if x.dim() <= 3 or x.is_contiguous():
        return x
    dims = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    collapses = all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(dims))
    return x if collapses else x.contiguous()
