"""A training step recorded once as a CUDA graph and replayed: one launch by the host instead of hundreds. Not yet run on a GPU.

A graph repeats the same kernels on the same memory. So what differs from step to step is written there before each replay: the images
and labels, the ids of paired noise, the number of the step, of which all noise is a function, and the learning rate.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from fm_fast.train.config import TrainConfig
from fm_fast.train.data import DataOrder, Dataset
from fm_fast.train.step import QUARTILES, Batch, Model, StepLoss, TrainState, learn, next_batch, set_learning_rate

WARM_UP_STEPS = 3  # taken one kernel at a time: the first call of a kernel may compile it, choose an algorithm or take memory
Work = Callable[[], None]


class Recorder(Protocol):
    """Runs work on the device as a recording needs it: first some times without, then recorded."""

    def warm_up(self, work: Work) -> None: ...
    def record(self, work: Work) -> Work:
        """What replays the work, which itself does not run; RuntimeError if it cannot be recorded."""
        ...


class CudaRecorder:
    """CUDA graphs, on a stream of their own: the default stream cannot be captured, and gradients remember the stream of the first call."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, work: Work) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        graph, current, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                work()
        except RuntimeError:
            leave_failed_capture(current, pool)
            raise
        return graph.replay


def leave_failed_capture(current: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """Make ``current`` the current stream, and memory and random numbers what they were, after a capture into this pool of memory.

    A capture that fails leaves its own stream as the current one. CUDAGraph::capture_end throws before it tells the allocator, which would
    free nothing that several streams use for as long as it takes a capture to be under way, and torch's generator, which would go on
    counting for it, so that every later draw is an error, until the next capture ends well.
    """
    torch.cuda.set_stream(current)
    with contextlib.suppress(RuntimeError):  # the allocator may have been told, and the pool is then the graph's to release
        torch._C._cuda_endAllocateToPool(current.device.index, pool)
        torch._C._cuda_releasePool(current.device.index, pool)
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(current.device)):
        torch.zeros(1, device=current.device)
    torch.cuda.set_stream(current)


def why_not(config: TrainConfig, device: torch.device, world: int) -> str | None:
    """Why steps of this run cannot be replayed, or None."""
    if device.type != "cuda":
        return f"the run is on {device.type}"
    if world > 1:
        return f"{world} processes share a batch"
    if config.compile:
        return "the network runs through torch.compile"
    return None


def is_wanted(config: TrainConfig, device: torch.device, world: int) -> bool:
    """Whether to replay steps. Raises ValueError where the configuration insists on it and it cannot be done."""
    reason = why_not(config, device, world)
    if config.cuda_graph == "on" and reason is not None:
        raise ValueError(f"cuda_graph: 'on' was asked for, but {reason}")
    return config.cuda_graph != "off" and reason is None


class GraphedStep:
    """`training_step` of one process, by replays: the same numbers.

    The first WARM_UP_STEPS calls take their steps one kernel at a time; the next one records the work and from then on it is replayed. If
    it cannot be recorded, that is an error where the configuration says "on"; with "auto" it is said, and steps go on one kernel at a time.
    """

    def __init__(
        self, state: TrainState, config: TrainConfig, dataset: Dataset, order: DataOrder, network: Model | None = None,
        recorder: Recorder | None = None, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self._state, self._config, self._dataset, self._order, self._network = state, config, dataset, order, network
        device, size = dataset.device, config.batch_size
        self._recorder, self._say = recorder or CudaRecorder(device), say
        images = torch.zeros(size, *dataset.images.shape[1:], dtype=dataset.images.dtype, device=device)
        labels, step = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((size,), ()))
        paired = torch.zeros_like(labels) if config.coupling == "optimal" else None
        self._batch = Batch(images, labels, dataset.levels, step, paired_ids=paired)
        zeros = partial(torch.zeros, device=device)
        self._loss = StepLoss(zeros(()), zeros(2, QUARTILES), zeros((), dtype=torch.float64))
        self._warm_ups, self._replay = WARM_UP_STEPS, None
        state.optimiser.keep_gradients()

    def __call__(self) -> StepLoss:
        self._feed()
        if self._warm_ups > 0:
            self._warm_ups -= 1
            self._recorder.warm_up(self._work)
        else:
            self._replay = self._replay or self._recorded()
            self._replay()
        self._state.step += 1
        return StepLoss(self._loss.mean.clone(), self._loss.by_quartile.clone(), self._loss.gradient_norm.clone())

    def _feed(self) -> None:
        """Write what this step reads to where the recorded kernels look for it."""
        batch = next_batch(self._state, self._config, self._dataset, self._order)
        self._batch.images.copy_(batch.images)
        self._batch.labels.copy_(batch.labels)
        if self._batch.paired_ids is not None:
            self._batch.paired_ids.copy_(batch.paired_ids)  # type: ignore[arg-type]
        self._batch.step.fill_(batch.step)  # type: ignore[union-attr]
        set_learning_rate(self._state, self._config)
        self._state.optimiser.write_settings()

    def _work(self) -> None:
        loss = learn(self._state, self._config, self._batch, self._network)
        self._loss.mean.copy_(loss.mean)
        self._loss.by_quartile.copy_(loss.by_quartile)
        self._loss.gradient_norm.copy_(loss.gradient_norm)

    def _recorded(self) -> Work:
        try:
            return self._recorder.record(self._work)
        except RuntimeError as error:
            if self._config.cuda_graph == "on":
                raise RuntimeError(f"cuda_graph: 'on' was asked for, but the step could not be recorded: {error}") from error
            self._say(f"cuda_graph: the step could not be recorded and goes on without: {error}")
            self._state.optimiser.zero_grad(set_to_none=True)
            return self._work
