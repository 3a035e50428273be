"""Paths that are nearly built-in ones, and tensors of unusual kinds and layouts."""

import math

import pytest
import torch

import fm_fast as fm
from fm_fast import _ops, reference
from fm_fast._ops import convolutions

X1 = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class SteepCosine(fm.Cosine):
    """alpha = sin^2, sigma = cos^2."""

    def alpha(self, t):
        return torch.sin(0.5 * math.pi * t) ** 2

    def sigma(self, t):
        return torch.cos(0.5 * math.pi * t) ** 2


class Halved(fm.OT):
    def alpha(self, t):
        return 0.5 * t


class HalvedVP(fm.VP):
    def alpha(self, t):
        return 0.5 * super().alpha(t)


class HalvedVE(fm.VE):
    def alpha(self, t):
        return 0.5 * super().alpha(t)


@pytest.mark.parametrize("path", [SteepCosine(), Halved(), HalvedVP(), HalvedVE()], ids=lambda path: type(path).__name__)
def test_kernels_take_no_subclass_for_the_built_in_path(path, backend):
    """Its schedules are its own, which the kernels do not know."""
    x1, x0, t = X1.double(), X1.double().flip(0), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    found = fm.sample_path(x1, x0=x0, t=t, path=path, backend=backend)
    expected = path.alpha(t)[:, None] * x1 + path.sigma(t)[:, None] * x0
    torch.testing.assert_close(found.x_t, expected, rtol=1e-12, atol=1e-12)


LAYOUTS = {
    "permuted": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "strided": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "transposed rows": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_noise_may_lie_in_any_layout(layout, backend):
    """Beside contiguous data, in the draw and in the loss."""
    x1, x0, o = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3))
    given = LAYOUTS[layout](x0)
    assert torch.equal(given, x0) and given.stride() != x0.stride()
    found = fm.sample_path(x1, x0=given, t=0.25, backend=backend)
    torch.testing.assert_close(found.x_t, 0.25 * x1 + 0.75 * x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss(o), ((o - (x1 - x0)) ** 2).mean(), rtol=1e-12, atol=0)


class InShards(torch.Tensor):
    """A tensor whose memory is not all of it, as a DTensor's."""


def test_weights_of_another_kind_are_not_read_by_the_kernels_of_convolutions(monkeypatch):
    monkeypatch.setattr(convolutions, "_ISA", "avx2")
    x = torch.zeros(4, 16, 8, 8).to(memory_format=torch.channels_last)
    weight = torch.zeros(16, 16, 3, 3)
    assert convolutions.is_convolved_here(x, weight) and convolutions.is_convolved_here(x, torch.nn.Parameter(weight))
    assert not convolutions.is_convolved_here(x, weight.as_subclass(InShards))
    for backend in (_ops.conv3x3_backend, _ops.conv_weight_grad_backend):
        assert backend(x, weight.as_subclass(InShards)) == "reference"


def test_volumes_keep_their_layout(backend):
    """Joined ones too: the norm's result is channels_last_3d where x is."""
    x, second = (torch.randn(2, 4, 3, 2, 5).to(memory_format=torch.channels_last_3d) for _ in range(2))
    settings = _ops.NormSettings(groups=2, eps=1e-5, activation=True, dropout=0.0, index=0)
    inputs = (x, second, None, torch.ones(8), torch.zeros(8), None, None)
    found = _ops.group_norm_silu(inputs, None, settings, backend)
    torch.testing.assert_close(found, reference.group_norm_silu(*inputs, 2, 1e-5, True, None))
    assert _ops.memory_format(x) == torch.channels_last_3d
    if backend != "reference":
        assert found.is_contiguous(memory_format=torch.channels_last_3d)
