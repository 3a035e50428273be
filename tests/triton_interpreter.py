"""Triton kernels without a GPU: their checks run in Triton's interpreter, in a process of its own.

The interpreter is chosen when a kernel's module is imported (TRITON_INTERPRET=1), so one process cannot both interpret and compile.
A test file calls :func:`run_checks` on itself; its functions named ``check_*`` are then collected there, with the fixtures of this file.
"""

import sys
from pathlib import Path

import interpreter_repairs
import numpy as np
import pytest
import torch
from copies import run_python

POISON = float("nan")
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "triton_interpreter", "-o", "python_functions=check_*")


def run_checks(file):
    """Run the ``check_*`` functions of a test file in the interpreter, and show their report if one fails."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = run_python(code, *OPTIONS, file, folder=Path(file).parent, path=sys.path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True, scope="session")
def repaired_interpreter():
    interpreter_repairs.round_to_bfloat16()
    interpreter_repairs.replace_language_once()


@pytest.fixture
def launch_plan():
    """The module whose constants shape a launch."""
    from fm_fast.kernels import _launch

    return _launch


def key(seed, step, ids):
    """The key tensor of a first id, or of a list of ids."""
    return torch.tensor([seed, step, *np.atleast_1d(ids)])


def poisoned(x, dtype=None):
    """A tensor of x's shape and layout that is NaN throughout."""
    return torch.full_like(x, POISON, dtype=dtype)


def wide_dtype(*tensors):
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors if x is not None) else torch.float32


def array(x):
    return x.numpy() if x.dtype == torch.uint8 else x.double().numpy()


def data(shape, dtype=torch.float32, levels=256, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(levels, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def layouts(shape):
    """The same shape in every layout that the kernels address without a copy, by name."""
    x = data(shape)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "batch slice": torch.stack([x, x], 1).flatten(0, 1)[::2],
        "channel slice": torch.cat([x, x], 1)[:, : shape[1]],
        "misaligned": torch.cat([torch.zeros(1), x.flatten()])[1:].view(shape),
        "expanded": x[:1, :, :1, :1].expand(shape),
    }
