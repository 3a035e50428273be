"""Parameters in awkward memory, their flat state, and the same steps by torch: what the tests of adamw_ema share."""

import torch

from fm_fast import _ops

NORM = 3.0
SETTINGS = (1e-2, 0.9, 0.99, 1e-8, 0.1, NORM)  # learning rate, beta1, beta2, epsilon, weight decay, largest norm
WITHOUT_MEMORY = (1e-3, 0.0, 0.0, 1e-8, 0.0, float("inf"))
DECAYS = ((0.9, 1.0, 10.0, 1.0), (1.0, 0.0, 1.0, 7.94))  # min(0.9, (1 + n) / (10 + n)); the power function with gamma = 6.94
PADDING = 16


def misaligned(x):
    """The same numbers one element behind the start of their memory, which is NaN on both sides."""
    return torch.nn.functional.pad(x.flatten(), (1, 1), value=torch.nan)[1:-1].view(x.shape)


def data(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype=torch.float32, seed=0):
    """Odd sizes, no elements, no dimensions, several units, channels_last, transposed, misaligned."""
    shapes = [(5,), (3, 4), (0,), (), (1,), (37, 83), (2, 3, 5, 5), (4, 0, 3), (6, 7), (16,), (17,), (1025,), (9, 3, 3, 3)]
    tensors = [data(shape, seed + i, dtype) for i, shape in enumerate(shapes)]
    tensors[6] = tensors[6].contiguous(memory_format=torch.channels_last)
    tensors[8] = tensors[8].t().contiguous().t()
    tensors[11], tensors[12] = misaligned(tensors[11]), misaligned(tensors[12])
    return tensors


def gradients(tensors, step, dtype=None):
    """One a parameter, alike in memory; their norm is below and above the largest norm by turns."""
    drawn = [data(p.shape, 1000 * (step + 1) + i, p.dtype) for i, p in enumerate(tensors)]
    size = 0.01 if step % 2 else 1.0
    return [torch.empty_like(p, dtype=dtype).copy_(size * g) for p, g in zip(tensors, drawn, strict=True)]


def state_of(tensors, averages=2, groups=None):
    """Zero moments and averages of the initial weights; NaN between the parameters."""
    offsets, length = [], 3
    for p in tensors:
        offsets.append(length)
        length += p.numel() + (-p.numel()) % PADDING
    flat = torch.full((2 + averages, length), torch.nan, dtype=tensors[0].dtype)
    layout = torch.tensor([[offset, group] for offset, group in zip(offsets, groups or [0] * len(tensors), strict=True)])
    state = _ops.AdamwState(flat[0], flat[1], flat[2:], torch.zeros(2 + len(tensors), dtype=torch.int64), layout.reshape(-1, 2))
    for i, p in enumerate(tensors):
        for moment in (state.m, state.v):
            state.part(moment, i, p).zero_()
        state.part(state.averages, i, p).copy_(p)
    return state


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def step(tensors, grads, state, backend, settings=(SETTINGS,), decays=DECAYS, copies=()):
    """One step of ours, in place."""
    total = torch.full((1,), torch.nan, dtype=torch.float64)
    present = [g for g in grads if g.numel()]
    _ops.adamw_ema_norm(total, present, backend)
    decay_rows = torch.tensor(decays, dtype=torch.float64).reshape(-1, 4)
    with torch.no_grad():
        _ops.adamw_ema(tensors, list(copies), grads, state, total, table(*settings), decay_rows, backend)
    return total


class TorchSteps:
    """The same by torch.nn.utils.clip_grad_norm_, torch.optim.AdamW and lerp, on copies in their dtype."""

    def __init__(self, tensors, dtype, settings=SETTINGS):
        rate, beta1, beta2, epsilon, weight_decay, self.norm = settings
        self.parameters = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in tensors]
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in DECAYS]
        self.optimiser = torch.optim.AdamW(self.parameters, rate, (beta1, beta2), epsilon, weight_decay, foreach=False)
        self.updates = 0

    def step(self, grads):
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.norm)
        self.optimiser.step()
        decays = (min(0.9, (1 + self.updates) / (10 + self.updates)), (1 - 1 / (self.updates + 1)) ** 7.94)
        for average, decay in zip(self.averages, decays, strict=True):
            for a, p in zip(average, self.parameters, strict=True):
                a.lerp_(p.detach(), 1 - decay)
        self.updates += 1

    def moments(self, name):
        return [self.optimiser.state[p][name] for p in self.parameters]


def assert_a_mean_without_memory_is_the_gradient(take_step):
    """beta1 = 0 after a gradient a million times as large, beside which a small one would lose its digits. take_step: as :func:`step`."""
    tensors = parameters()
    state, large = state_of(tensors), [torch.full_like(p, 1e4) for p in tensors]
    small = [torch.empty_like(p).copy_(1e-2 * data(p.shape, i)) for i, p in enumerate(tensors)]
    for grads in (large, small):
        take_step(tensors, grads, state, (WITHOUT_MEMORY,))
    for i, (p, g) in enumerate(zip(tensors, small, strict=True)):
        assert torch.equal(state.part(state.m, i, p), g)
        torch.testing.assert_close(state.part(state.v, i, p), g * g, rtol=1e-6, atol=0.0)
