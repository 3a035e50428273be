"""The Triton kernels compiled for AMD's GPUs, without one: they compile, and no register goes to memory."""

import os
import re

import pytest
import torch

pytest.importorskip("triton.backends.amd", reason="triton is not installed, or without a compiler for AMD")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

import test_triton_compile as kernels
import test_triton_compile_adamw as adamw
import test_triton_compile_norm as norms
from triton.backends.compiler import GPUTarget
from triton_binaries import intermediate

# MI300, whose wavefronts have 64 threads, and RDNA 3
TARGETS = {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
PLAIN = next(case for case in norms.CASES if case.plain)  # on NVIDIA's with a limit of registers
CASES = {
    "path_loss": lambda patch: [kernels.record(kernels.CASES[0], patch)],
    "path_loss bfloat16": lambda patch: [kernels.record(kernels.CASES[1], patch)],
    "path_sample": lambda patch: [kernels.record(kernels.CASES[5], patch)],
    "path_sample vp": lambda patch: [kernels.record(kernels.CASES[8], patch)],
    "linear_step": lambda patch: [kernels.record_step(kernels.STEP_CASES[1], patch)],
    "step_error": lambda patch: [kernels.record_error(kernels.ERROR_CASES[0], patch)],
    "group_norm_silu": lambda patch: norms.record(PLAIN, patch),
    "group_norm_silu NCHW": lambda patch: norms.record(norms.CASES[1], patch),
    "group_norm_silu dropout": lambda patch: norms.record(norms.DROPOUTS[0], patch),
    **{case.kernel: lambda patch, case=case: [adamw.record(case, patch)] for case in adamw.CASES},
    **{str(case): lambda patch, case=case: [kernels.record_probe(case, patch)] for case in kernels.PROBE_CASES[::3]},
}


@pytest.mark.parametrize("target", ["gfx942", pytest.param("gfx1100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_without_spills(name, target, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for recorder in CASES[name](monkeypatch):
        listing = intermediate(recorder, target=TARGETS[target]).asm["amdgcn"]
        for what in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            assert int(re.search(rf"\.{what}:\s+(\d+)", listing)[1]) == 0, (recorder.kernel, what)
