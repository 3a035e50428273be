"""Several processes train one network: `torchrun --nproc-per-node N --no-python fm-fast train ...`; gloo on CPUs, NCCL on GPUs.

A sample's noise, time and label depend on its place in the whole batch, so any number of processes computes the same losses, up to the
order of summation. Process 0 alone writes files and prints.
"""

import atexit
import contextlib
import functools
import gc
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fm_fast.train.config import TrainConfig
from fm_fast.train.execution.devices import pick_device
from fm_fast.train.step import WHOLE, Model, Share, TrainState, network_of, new_state

Value = TypeVar("Value")
_teams = itertools.count()  # all processes train equally often
# The others wait while the first process reads a million images for the first time; torchrun notices when a process dies.
PATIENCE = timedelta(hours=12)
# The option by which buffers are not sent around before each step, whose name torch has changed.
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters else "broadcast_buffers"


@dataclass(frozen=True)
class Team:
    """This process's device and share of every batch, and what the processes tell one another. One process is a team, too."""

    device: torch.device
    share: Share = WHOLE

    @property
    def first(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.share.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.share.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def agreed(self, value: Value) -> Value:
        """Process 0's value."""
        box: list[Any] = [value]
        if self.share.world > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 goes through the block, then the others: what it leaves on the disk is there for them."""
        if not self.first:
            self._wait()
        yield
        if self.first:
            self._wait()

    def _wait(self) -> None:
        if self.share.world > 1:
            dist.monitored_barrier() if self.device.type == "cpu" else dist.barrier()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun started this process for, or this process alone. Raises ValueError for a device that is not there."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(os.environ):
        yield Team(pick_device(device))
        return
    place = pick_device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # Messages between the hosts go through gloo also where gradients go through NCCL.
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    store, rank, world = _met()
    # What an earlier team of these processes left in the store would send this one to addresses where nobody listens any more.
    own = dist.PrefixStore(f"team-{next(_teams)}", store)  # type: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Team(place, Share(dist.get_rank(), dist.get_world_size()))
    finally:
        dist.destroy_process_group()
        # Networks in shards are cycles that own the group, whose threads must end before the interpreter begins to.
        atexit.register(gc.collect)


@functools.cache
def _met() -> tuple[Any, int, int]:
    """The store of the processes that torchrun started, this one's number, and how many there are."""
    from torch.distributed.rendezvous import rendezvous  # which not every build of torch has

    return next(rendezvous("env://", timeout=PATIENCE))


class StopVote:
    """Lets all processes stop after the same step when one of them is asked to.

    The votes of a step are counted at the next one, so that no process waits for another's.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._votes = torch.zeros(1, dtype=torch.int64)
        self._pending: Any = None

    def __call__(self, asked: int) -> int:
        """The largest number that a process was asked with at the step before this one; alone, `asked` itself."""
        if self._team.share.world == 1:
            return asked
        decided = self._count()
        self._votes.fill_(asked)
        self._pending = dist.all_reduce(self._votes, dist.ReduceOp.MAX, async_op=True)
        return decided

    def _count(self) -> int:
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._votes)

    def close(self) -> None:
        """Count the last votes, which nobody needs any more."""
        self._count()


def state_of(config: TrainConfig, team: Team, weights: dict[str, Tensor] | None = None) -> TrainState:
    """The state before the first step, in shards where the configuration asks for them."""
    if team.share.world > 1 and config.parallel == "fsdp":
        from fm_fast.train.execution.sharded import sharded_state  # which takes torch longer to import than everything else

        return sharded_state(config, team.device, weights)
    return new_state(config, team.device, weights)


@contextlib.contextmanager
def team_network(state: TrainState, config: TrainConfig, team: Team) -> Iterator[Model]:
    """What steps call: the state's model, which with several processes also averages their gradients."""
    if team.share.world == 1 or config.parallel == "fsdp":
        yield network_of(state, config)
        return
    options: dict[str, Any] = {BUFFERS: False}  # each process's dropout key is its own
    hooks = [p.register_hook(functools.partial(torch.as_strided, size=p.shape, stride=p.stride())) for p in _of_one_channel(state.model)]
    parallel: nn.Module = DistributedDataParallel(state.model, **options)
    try:
        yield torch.compile(parallel) if config.compile else parallel  # type: ignore[misc]
    finally:
        for hook in hooks:
            hook.remove()
        # Were it the last owner of the process group, the reducer would join its threads with Python's lock in hand, which they may need.
        del parallel.logger, parallel.reducer


def _of_one_channel(model: nn.Module) -> list[nn.Parameter]:
    """Weights whose gradients come with other strides for the dimension of size 1, of which the reducer warns as if they mattered."""
    return [p for p in model.parameters() if p.dim() == 4 and p.shape[1] == 1 and p.requires_grad]
