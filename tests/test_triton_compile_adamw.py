"""The Triton kernels of adamw_ema compiled for real GPUs, without one: no spills, wide accesses, instructions an element."""

import os
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from adamw_cases import SETTINGS, table
from triton_binaries import ROOM, Recorder, compiled

KERNELS = ("norm_kernel", "numbers_kernel", "adamw_ema_kernel")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A launch and what it may cost: the loops over whole and over partial chunks are both in the count, each once."""

    kernel: str
    gradient: torch.dtype
    averages: int
    instructions: int  # in all, of a thread with 8 elements a tile
    registers: int
    wide_loads: int  # of 128 bits
    wide_stores: int
    half_copy: bool = False

    def __str__(self):
        return f"{self.kernel} {self.gradient} {self.averages} averages".replace("torch.", "")


CASES = [
    Case("norm_kernel", FLOAT32, 1, 430, 40, 8, 0),
    Case("numbers_kernel", FLOAT32, 3, 860, 56, 0, 0),
    Case("adamw_ema_kernel", FLOAT32, 1, 720, 72, 10, 8),
    Case("adamw_ema_kernel", FLOAT32, 3, 905, 72, 14, 12),
    Case("adamw_ema_kernel", BFLOAT16, 1, 815, 72, 8, 8, half_copy=True),
]


def record(case, monkeypatch):
    from fm_fast.kernels import _combine, adamw_ema

    recorders = {name: Recorder(getattr(adamw_ema, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(adamw_ema, name, recorder)
    monkeypatch.setattr(_combine, "combine_kernel", Recorder(_combine.combine_kernel))
    size, total = 4 * adamw_ema.CHUNK, torch.zeros(1, dtype=torch.float64)
    p, g, flat = torch.zeros(size), torch.zeros(size, dtype=case.gradient), torch.zeros(2 + case.averages, size)
    copies = [torch.zeros(size, dtype=BFLOAT16)] if case.half_copy else []
    counts, layout, decays = torch.zeros(3, dtype=torch.int64), torch.tensor([[0, 0]]), torch.zeros(case.averages, 4, dtype=torch.float64)
    adamw_ema.launch_norm(total, [g])
    adamw_ema.launch([p], copies, flat[0], flat[1], flat[2:], counts, [g], layout, total, table(SETTINGS), decays)
    return recorders[case.kernel]


def assert_cost(case, capability, monkeypatch, folder, room=1.0, register_room=0):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    built = compiled(record(case, monkeypatch), capability, folder)
    assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
    assert built.opcodes.total() - built.opcodes["NOP"] <= case.instructions * room
    assert built.registers <= case.registers + register_room
    assert (built.count("LDG.E.128"), built.count("STG.E.128")) == (case.wide_loads, case.wide_stores)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_sm_90(case, monkeypatch, tmp_path):
    assert_cost(case, 90, monkeypatch, tmp_path, *ROOM)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_other_architectures(case, capability, monkeypatch, tmp_path):
    assert_cost(case, capability, monkeypatch, tmp_path, 1.1, 16)


@pytest.mark.parametrize(("parameters", "rounds", "warps"), [(3, 1, 1), (200, 1, 8), (600, 1, 16), (1500, 2, 16)])
def test_the_numbers_of_a_network_take_one_round(parameters, rounds, warps, monkeypatch):
    """Each waits for memory, while the whole GPU has nothing else to do."""
    from fm_fast.kernels import adamw_ema

    recorders = {name: Recorder(getattr(adamw_ema, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(adamw_ema, name, recorder)
    p, flat = [torch.zeros(16) for _ in range(parameters)], torch.zeros(3, 16 * parameters)
    layout = torch.tensor([[16 * i, 0] for i in range(parameters)])
    counts, decays = torch.zeros(2 + parameters, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64)
    adamw_ema.launch(p, [], flat[0], flat[1], flat[2:], counts, p, layout, total, table(SETTINGS), decays)
    options = recorders["numbers_kernel"].launches[0][1]
    assert (-(-parameters // options["PARAMETERS"]), options["num_warps"]) == (rounds, warps)
