"""AdamW with clipping, moving averages and 16-bit weights in one pass over memory, which never waits for the device."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast import _backends, _ops
from fm_fast._ops.adamw_ema import APPLIED, OWN, SKIPPED
from fm_fast.train.optimiser.averaging import Averaging
from fm_fast.train.optimiser.checks import HALF_TYPES, averagings, check_group, check_parameters
from fm_fast.train.optimiser.state import from_adamw, in_order, is_adamw, known_settings, load

ALIGNMENT = 16  # elements: every parameter's state begins at a cache line
OF_A_PARAMETER = {"exp_avg", "exp_avg_sq", "averages", "master"}  # tensors of its state, its counts aside
UNKNOWN = -1  # in place of the version of a weight that is not known to be its master rounded
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class _Memory:
    """The tensors that are kept from step to step.

    flat: [2 + K, N], the moments m and v and the averages. masters: [N], or [0] where no weight has 16 bits. counts: int64 (updates
    applied, steps skipped, the own updates of each parameter). total: float64 [1], the sum of squares of the last step's gradients.
    """

    flat: Tensor
    masters: Tensor
    counts: Tensor
    total: Tensor


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ and moving averages of the weights as one optimiser.

    A step is what these do one after the other, in two passes: the norm of all gradients, then everything else. Where a gradient is not
    finite, the step changes nothing and is counted in :attr:`skipped`; the host does not look at the gradients, so it need not wait.
    Weights in bfloat16 or float16 are the rounded copies of float32 masters, which the optimiser keeps and averages. Where others write
    such weights, as loading does, the masters follow at the next step (not what is written through ``weight.data``, which torch hides).

    Copies and pickles have parameters of their own unless the model is copied with it: ``copy.deepcopy((model, optimiser))``.

    Args:
        parameters: tensors or parameter groups, all on one device; float32, float64 or, with float32 masters, bfloat16 and float16.
        lr, betas, eps, weight_decay, max_norm: of every group that has none of its own. Groups may be changed between steps
            (``optimiser.param_groups[0]["lr"] = ...``, or any torch scheduler). max_norm: largest norm of all gradients together.
        averages: how each average forgets, see :mod:`fm_fast.train.optimiser.averaging`; it starts with the initial weights.
        backend: of op ``adamw_ema``.

    Raises ValueError for parameters that cannot be updated together, TypeError for averages that are none, RuntimeError where a step
    finds the parameters in other memory than before.
    """

    def __init__(
        self,
        parameters: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float = math.inf,
        averages: Sequence[Averaging] = (),
        backend: str | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        self.averages = averagings(averages)
        self._parameters: list[Tensor] = []
        super().__init__(parameters, defaults)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._check()
        self._use(self._allocated(), backend)
        self._begin()

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Further parameters, as of layers that are no longer frozen. Their moments are zero, their averages begin with them as they are.

        All state moves to new memory: averages that :meth:`average` gave out stay as they are, and a step that was recorded as a CUDA
        graph must be recorded again. Where a ValueError or TypeError is raised, nothing has changed.
        """
        super().add_param_group(param_group)
        if not self._parameters:
            return  # the constructor adds groups one by one, and makes the state of all of them
        try:
            self._check()
        except BaseException:
            self.param_groups.pop()
            raise
        self._grow()

    def _check(self) -> None:
        check_parameters([p for group in self.param_groups for p in group["params"]])
        for group in self.param_groups:
            check_group(group)

    def _grow(self) -> None:
        """Make the state anew for all groups, the last of them new."""
        self._follow_weights()
        states, memory, keeps_gradients = {p: self.state[p] for p in self._parameters}, self._memory, bool(self._kept)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._use(self._allocated(), self._requested_backend)
        self._begin()
        for p, state in states.items():
            for name in OF_A_PARAMETER & state.keys():
                self.state[p][name].copy_(state[name])
        self._memory.counts[: len(memory.counts)].copy_(memory.counts)
        self._memory.total.copy_(memory.total)
        if keeps_gradients:
            self.keep_gradients()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle."""
        self._follow_weights()
        names = ("defaults", "param_groups", "averages", "_memory", "_requested_backend")
        return {name: getattr(self, name) for name in names} | {"keeps_gradients": bool(self._kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = ("defaults", "param_groups", "averages")
        super().__setstate__({name: state[name] for name in names} | {"state": defaultdict(dict)})
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._use(state["_memory"], state["_requested_backend"])
        if state["keeps_gradients"]:
            self.keep_gradients()

    def _allocated(self) -> _Memory:
        parameters, device = self._parameters, self._parameters[0].device
        dtype = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
        length = _layout(self.param_groups)[1]
        flat = torch.zeros(2 + len(self.averages), length, dtype=dtype, device=device)
        masters = torch.zeros(length if any(p.dtype != dtype for p in parameters) else 0, dtype=dtype, device=device)
        counts = torch.zeros(OWN + len(parameters), dtype=torch.int64, device=device)
        return _Memory(flat, masters, counts, torch.zeros(1, dtype=torch.float64, device=device))

    def _use(self, memory: _Memory, backend: str | None) -> None:
        parameters, device = self._parameters, memory.flat.device
        self._requested_backend, self._backend = backend, _backends.resolve("adamw_ema", device, backend)
        self._memory, flat, layout = memory, memory.flat, _layout(self.param_groups)[0]
        self._flat, self._total = _ops.AdamwState(flat[0], flat[1], flat[2:], memory.counts, layout), memory.total
        self._nothing = torch.empty(0, device=device)
        self._settings = torch.full((len(self.param_groups), 6), math.nan, dtype=torch.float64, device=device)
        self._written = [[math.nan] * 6 for _ in self.param_groups]
        self._decays = torch.tensor([average.row for average in self.averages], dtype=torch.float64).reshape(-1, 4).to(device)
        self._addresses = [p.data_ptr() for p in parameters]
        self._kept: list[Tensor] = []
        self._make_views()

    def _make_views(self) -> None:
        """What the op updates of each parameter: the master (or the parameter itself) and its 16-bit copy; and the state by name."""
        self._weights, self._copies = list(self._parameters), []
        for i, p in enumerate(self._parameters):
            parts = {"exp_avg": self._flat.m, "exp_avg_sq": self._flat.v, "averages": self._flat.averages}
            views = {name: self._flat.part(flat, i, p) for name, flat in parts.items()}
            if p.dtype in HALF_TYPES:
                views["master"] = self._weights[i] = self._flat.part(self._memory.masters, i, p)
            self.state[p] = {**views, "counts": self._flat.counts[:OWN], "updates": self._flat.counts[OWN + i]}
        if self._memory.masters.numel():
            self._copies = [p if p.dtype in HALF_TYPES else self._nothing for p in self._parameters]
        self._halves = [(p, self.state[p]["master"]) for p in self._parameters if p.dtype in HALF_TYPES]
        self._versions = [UNKNOWN] * len(self._halves)

    @torch.no_grad()
    def _begin(self) -> None:
        """Masters and averages start with the weights."""
        for p, master in self._halves:
            master.copy_(p)
        for p, weight in zip(self._parameters, self._weights, strict=True):
            self.state[p]["averages"].copy_(weight)
        self._versions = self._versions_now()

    @torch.no_grad()
    def _follow_weights(self) -> None:
        """Give masters the 16-bit weights that others have written; where a weight still is its master rounded, the master stays."""
        for (p, master), noted, version in zip(self._halves, self._versions, self._versions_now(), strict=True):
            if version != noted:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
        self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        """How often torch has seen each 16-bit weight written."""
        return [p._version for p, _ in self._halves]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the parameters' gradients; ``closure``, if any, computes them, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            raise RuntimeError("parameters: expected the memory that they had when the optimiser was made; make it after model.to(...)")
        gradients = self._gradients()
        self.write_settings()
        _ops.adamw_ema_norm(self._total, [g for g in gradients if g.numel()], self._backend)
        _ops.adamw_ema(
            self._weights, self._copies, gradients, self._flat, self._total, self._settings, self._decays, self._backend
        )  # fmt: skip
        torch.autograd.graph.increment_version(self._parameters)  # a graph made before must not be walked backward with these weights
        self._versions = self._versions_now()
        return loss

    def keep_gradients(self) -> None:
        """From now on, copy gradients into memory of the optimiser's own before they are used: as the graph of a step must be recorded.

        The kernels get addresses of gradients from a table that is made on the host, and the memory of a graph is new to it.
        """
        self._kept = self._kept or [torch.empty_like(p) for p in self._parameters]

    def _gradients(self) -> list[Tensor]:
        found = [self._nothing if p.grad is None else _alike(p.grad, p) for p in self._parameters]
        if not self._kept:
            return found
        pairs = [(kept, gradient) for kept, gradient in zip(self._kept, found, strict=True) if gradient.numel()]
        torch._foreach_copy_([kept for kept, _ in pairs], [gradient for _, gradient in pairs])  # type: ignore[reportPrivateImportUsage]
        return [kept if gradient.numel() else gradient for kept, gradient in zip(self._kept, found, strict=True)]

    def write_settings(self) -> None:
        """Bring the numbers of `param_groups` to the device, as every step does and the replay of a recorded one does not.

        Those that changed go as arguments of a fill, which is no copy from the host to wait for. 16-bit weights that others have written
        go to their masters.
        """
        self._follow_weights()
        for i, group in enumerate(self.param_groups):
            check_group(group)
            row = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["max_norm"])
            for j, value in enumerate(row):
                if isinstance(value, Tensor) or value != self._written[i][j]:
                    self._settings[i, j].fill_(value.reshape(()) if isinstance(value, Tensor) else value)
                    self._written[i][j] = math.nan if isinstance(value, Tensor) else value

    @property
    def gradient_norm(self) -> Tensor:
        """The norm of all gradients of the last step before clipping, float64 [], on the device."""
        return self._total[0].sqrt()

    @property
    def updates(self) -> Tensor:
        """The number of steps that updated the weights, int64 [], on the device."""
        return self._flat.counts[APPLIED]

    @property
    def skipped(self) -> Tensor:
        """The number of steps left out because a gradient was not finite, int64 [], on the device."""
        return self._flat.counts[SKIPPED]

    def average(self, model: nn.Module, i: int = 0) -> nn.Module:
        """A copy of ``model`` with the averaged weights of ``averages[i]``, in the dtype of the masters and without gradients.

        Its weights are those averages themselves: later steps move them, also in its ``state_dict()``; ``copy.deepcopy`` of it stays. It
        is in the mode of ``model``: ``.eval()`` comes before samples. Frozen parameters that are not the optimiser's are copied as they
        are. Raises ValueError for another model than the optimiser's.
        """
        if not -len(self.averages) <= i < len(self.averages):
            raise ValueError(f"i: expected the index of one of {len(self.averages)} averages, got {i}")
        self._check_model(model)
        copied = copy.deepcopy(model).to(self._flat.m.dtype).requires_grad_(False)
        for p, q in zip(model.parameters(), copied.parameters(), strict=True):
            if p in self.state:
                q.data = self.state[p]["averages"][i]
        return copied

    def _check_model(self, model: nn.Module) -> None:
        others = [name for name, p in model.named_parameters() if p.requires_grad and p not in self.state]
        if others:
            raise ValueError(f"model: expected the one whose parameters the optimiser has, got one with others: {', '.join(others[:3])}")
        if not any(p in self.state for p in model.parameters()):
            raise ValueError("model: expected the one whose parameters the optimiser has, got one with none of them")

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, on the device and not copied, as torch's optimisers give it."""
        self._follow_weights()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit by bit where :meth:`state_dict` was taken; or where torch.optim.AdamW was, which leaves averages as they are.

        Raises ValueError for the state of other parameters or averages, and for what this optimiser does not do (amsgrad, maximize).
        """
        state_dict = dict(state_dict)  # which hooks may change
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = [known_settings(group) for group in state_dict["param_groups"]]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("state_dict: expected as many parameters in each group as the optimiser has")
        states = [self.state[p] for p in self._parameters]
        stored = in_order(state_dict)
        if is_adamw(state_dict):
            stored = from_adamw(stored, states)
        for i, state in enumerate(states):
            load(i, stored.get(i, {}), state)
        self._versions = [UNKNOWN] * len(self._halves)
        for group, stored in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _layout(groups: Sequence[dict[str, Any]]) -> tuple[Tensor, int]:
    """(where each parameter begins and its group, positions in all)."""
    rows, length = [], 0
    for i, group in enumerate(groups):
        for p in group["params"]:
            rows.append((length, i))
            length += -(-p.numel() // ALIGNMENT) * ALIGNMENT
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), length


def _alike(gradient: Tensor, p: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter, as autograd leaves it."""
    if gradient.stride() == p.stride():
        return gradient
    if gradient.layout != torch.strided:
        raise TypeError(
            f"gradients: expected dense ones, got {gradient.layout} for a parameter of {tuple(p.shape)}; sparse=False makes them"
        )
    if all(a == b for size, a, b in zip(p.shape, gradient.stride(), p.stride(), strict=True) if size != 1):
        return gradient
    return torch.empty_like(p, dtype=gradient.dtype).copy_(gradient)
