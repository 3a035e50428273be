"""noise: random numbers alone, as many as a batch has elements.

PyTorch's and NumPy's generators are sequential: their numbers depend on what was drawn before. fm_fast's depend on the seed, the step, the
sample and the place of an element alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import fm_fast as fm
from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import GPU_SIZES, SIZES, Counter, our_backends

MODES = ("normal", "uniform", "sign")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
COUNTED = 1 << 16  # elements that the distribution is looked at of
KNOWN = 32  # elements of a sample that are computed again

Draw = Callable[[], Tensor]


class Ours:
    """fm_fast's numbers of one step after the other."""

    def __init__(self, setting: Setting) -> None:
        self.counter = Counter(setting.device)
        self.settings = {"kind": setting.mode, "dtype": setting.dtype, "device": setting.device}
        self.shape = setting.shape

    def __call__(self) -> Tensor:
        return fm.noise(self.shape, seed=self.counter.seed, step=self.counter.next(), **self.settings)


def _eager(out: Tensor, kind: str) -> Draw:
    """A new tensor, as ours is."""
    return {
        "normal": lambda: torch.randn_like(out),
        "uniform": lambda: torch.rand_like(out),
        "sign": lambda: torch.randint_like(out, 2) * 2.0 - 1.0,
    }[kind]


def _in_place(out: Tensor, kind: str) -> Draw:
    """Into memory that is there, where there is a way with fewer passes than the plain one."""
    return {
        "normal": lambda: out.normal_(),
        "uniform": lambda: out.uniform_(),
        "sign": lambda: out.bernoulli_(0.5).mul_(2.0).sub_(1.0),
    }[kind]


def _compiled(out: Tensor, kind: str) -> Draw:
    return torch.compile(_eager(out, kind), dynamic=False)


def _numpy(out: Tensor, kind: str) -> Draw:
    """NumPy's counter-based generator, in float32."""
    import numpy as np

    generator, shape = np.random.Generator(np.random.Philox(0)), tuple(out.shape)
    if kind == "normal":
        return lambda: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return lambda: torch.from_numpy(generator.random(shape, dtype=np.float32))


def _memory_floor(given: Tensor, setting: Setting) -> Callable[[], object]:
    """One pass, written."""
    out = torch.empty_like(given)
    return lambda: out.fill_(1.0)


def providers(setting: Setting) -> list[Provider]:
    others = {"torch, new tensor": _eager, "torch, in place": _in_place, "torch.compile": _compiled}
    if setting.device.type == "cpu" and setting.dtype == torch.float32 and setting.mode != "sign":
        others["NumPy's Philox"] = _numpy
    return [
        Provider(f"fm_fast {our_backends(setting, 'noise')[0]}", lambda given, setting: Ours(setting)),
        *(Provider(name, lambda given, setting, make=make: make(given, setting.mode)) for name, make in others.items()),
        Provider("memory floor", _memory_floor, gated=False),
    ]


def inputs(setting: Setting) -> Tensor:
    return torch.empty(setting.shape, dtype=setting.dtype, device=setting.device)


# Correctness


def check(given: Tensor, setting: Setting, step: Draw) -> None:
    """The distribution, that the next numbers are others, and of ours the first numbers of the last sample."""
    found = step().clone()
    assert found.shape == given.shape and found.dtype == given.dtype, f"{found.dtype} {tuple(found.shape)}"
    if isinstance(step, Ours):
        _check_numbers(found, setting, int(step.counter.step))
    values = found.double().flatten()[:COUNTED].cpu()
    assert DISTRIBUTION[setting.mode](values), f"the numbers are not distributed as {setting.mode} ones are"
    assert not torch.equal(found, step()), "the numbers repeat"


def _normal(values: Tensor) -> bool:
    return _distance(values, 0.5 * torch.special.erfc(-values / 2.0**0.5))


def _uniform(values: Tensor) -> bool:
    return _distance(values, values) and float(values.min()) >= 0.0 and float(values.max()) <= 1.0


def _sign(values: Tensor) -> bool:
    return bool((values.abs() == 1.0).all()) and abs(float(values.mean())) < 5.0 / len(values) ** 0.5


def _distance(values: Tensor, expected: Tensor) -> bool:
    """Kolmogorov's distance between the sample and its distribution function, against what one in 10^7 samples exceeds, and rounding."""
    empirical = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return float((expected[values.argsort()] - empirical).abs().max()) < 2.9 / len(values) ** 0.5 + 4e-3


DISTRIBUTION = {"normal": _normal, "uniform": _uniform, "sign": _sign}


def _check_numbers(found: Tensor, setting: Setting, step: int) -> None:
    """The first numbers of the last sample's first channel against the specification in ``fm_fast/random.py``, by Python's own numbers."""
    channel = found[-1, 0] if found.dim() > 2 else found[-1]
    numbers = channel.flatten()[:KNOWN].double().cpu()
    expected = torch.tensor(_specified(setting.mode, len(found) - 1, step)[: len(numbers)], dtype=torch.float64)
    error = float((numbers - expected).abs().max())
    assert error <= 8 * TOLERANCE[setting.dtype], f"the numbers are off by {error:.1e}, more than {8 * TOLERANCE[setting.dtype]:.0e}"


def _specified(kind: str, sample: int, step: int) -> list[float]:
    """KNOWN numbers of seed 0, stream x0."""
    words = [word for block in range(KNOWN // 4) for word in _philox(block, sample, step)]
    if kind == "sign":
        return [-1.0 if words[0] >> bit & 1 else 1.0 for bit in range(KNOWN)]
    if kind == "uniform":
        return [(word + 0.5) / 2.0**32 for word in words]
    draws = [(word + 0.5) / 2.0**32 for word in words[::2]]
    pairs = [(math.sqrt(-2.0 * math.log(u)), 2.0 * math.pi * w / 2.0**32) for u, w in zip(draws, words[1::2], strict=True)]
    return [radius * turn(angle) for radius, angle in pairs for turn in (math.cos, math.sin)]


def _philox(block: int, sample: int, step: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011) of key 0."""
    c, mask, k0, k1 = (block, sample, step, 0), 0xFFFFFFFF, 0, 0
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (p1 >> 32 ^ c[1] ^ k0, p1 & mask, p0 >> 32 ^ c[3] ^ k1, p0 & mask)
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c


OP = Op("noise", SIZES, MODES, inputs, providers, check, bytes_of_shape, tensor_bytes=bytes_of_shape, gpu_sizes=GPU_SIZES)
