"""The C++ layer below torch: compiles the kernels for every instruction set with sanitizers and runs the test programs of this folder."""

import itertools
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
COMMON = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", f"-I{SOURCES}")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
X86 = platform.machine() in ("x86_64", "AMD64")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
VARIANTS: dict[str, tuple[str, ...]] = {"portable": ()} | ({"avx2": ("-mavx2", "-mfma", "-mf16c"), "avx512": AVX512} if X86 else {})
# What only some kernels are compiled for, and only where the compiler knows it, as setup.py asks.
PROBE = [str(COMPILER), "-mavx512bf16", "-x", "c++", "-fsyntax-only", "-"]
if (
    X86
    and COMPILER
    and subprocess.run(PROBE, input=b'bool f() { return __builtin_cpu_supports("avx512bf16"); }', capture_output=True).returncode == 0
):
    VARIANTS["avx512_bf16"] = (*AVX512, "-mavx512bf16")
    COMMON = (*COMMON, "-DFM_AVX512_BF16")

VARIED = [path.name for path in sorted(SOURCES.glob("cpu/*.cpp")) if not path.name.startswith(("register", "dispatch"))]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_object(source: Path, output: Path, *flags: str) -> Path:
    run([str(COMPILER), *COMMON, *flags, "-c", str(source), "-o", str(output)])
    return output


def run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr.decode()[-4000:]}"
    return done.stdout


MAINS = (
    "kernels_test",
    "sampling_test",
    "training_test",
    "assignment_test",
    "conv_test",
    "conv3x3_test",
    "attention_test",
    "formats_test",
    "print_normals",
)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test programs, each linked with the sanitized kernels of all instruction sets."""
    folder = tmp_path_factory.mktemp("native")
    with ThreadPoolExecutor(2) as pool:
        kernels = [
            pool.submit(compile_object, HERE / "units.cpp", folder / f"{isa}.o", *SANITIZERS, *flags, f"-DFM_ISA={isa}")
            for isa, flags in VARIANTS.items()
        ]
        entries = [pool.submit(compile_object, HERE / f"{name}.cpp", folder / f"{name}.o", *SANITIZERS) for name in MAINS]
    objects = [str(job.result()) for job in kernels]
    for name, entry in zip(MAINS, entries, strict=True):
        run([str(COMPILER), *SANITIZERS, str(entry.result()), *objects, "-o", str(folder / name)])
    return {name: folder / name for name in MAINS}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAINS if name.endswith("_test")])
def test_program(programs: dict[str, Path], name: str) -> None:
    printed = run([str(programs[name])]).decode().split()
    assert printed[0] == "portable"


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 [..., 4] written down from the paper, in 64-bit NumPy."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    low = np.uint64(0xFFFFFFFF)
    for i in range(10):
        key0 = np.uint64(((seed & 0xFFFFFFFF) + i * 0x9E3779B9) & 0xFFFFFFFF)
        key1 = np.uint64(((seed >> 32) + i * 0xBB67AE85) & 0xFFFFFFFF)
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ key0, p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ key1, p0 & low]
    return np.stack(c, axis=-1)


def exact_normals(seed: int, step: int, first_id: int, samples: int, positions: int) -> np.ndarray:
    """Box-Muller in float64 with the library's logarithm and cosine."""
    blocks = -(-positions // 4)
    counter = np.zeros((samples, blocks, 4), dtype=np.int64)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = (first_id + np.arange(samples))[:, None] & 0xFFFFFFFF
    counter[..., 2] = step
    words = philox(counter, seed)
    uniform = (words[..., 0::2].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    radius, angle = np.sqrt(-2.0 * np.log(uniform)), 2.0 * np.pi * words[..., 1::2].astype(np.float64) / 2.0**32
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(samples, blocks * 4)[:, :positions]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "step", "first_id", "samples", "positions"), [(0, 0, 0, 3, 4099), (2**63 - 1, 2**32 - 1, 2**32 - 5, 500, 7)]
)
def test_normals_equal_float64(programs: dict[str, Path], seed: int, step: int, first_id: int, samples: int, positions: int) -> None:
    expected = exact_normals(seed, step, first_id, samples, positions)
    arguments = [str(x) for x in (seed, step, first_id, samples, positions)]
    printed = np.frombuffer(run([str(programs["print_normals"]), *arguments]), dtype=np.float32).reshape(-1, samples, positions)
    for normals in printed:
        np.testing.assert_allclose(normals, expected, rtol=1e-6, atol=1.5e-6)


@pytest.mark.slow
def test_normals_distribution(programs: dict[str, Path]) -> None:
    """Moments of 2^24 normals, each within five standard errors."""
    printed = np.frombuffer(run([str(programs["print_normals"]), "1", "2", "3", "4096", "4096"]), dtype=np.float32)
    for z in printed.reshape(-1, 2**24).astype(np.float64):
        for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
            assert abs((z**power).mean() - moment) < 5.0 * (variance / z.size) ** 0.5
        assert np.abs(z).max() > 5.0


def test_declarations_equal_torch(tmp_path: Path) -> None:
    """torch_abi.h next to torch's own headers: a signature that changed is a compile error."""
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch/csrc/stable/c/shim.h").is_file():
        pytest.skip("this torch ships no headers")
    compile_object(HERE / "abi_check.cpp", tmp_path / "abi_check.o", f"-I{include}")


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="instruction sets of x86-64")
@pytest.mark.parametrize(
    "source", [path.name for path in sorted(SOURCES.glob("cpu/*.cpp")) if not path.name.startswith(("register", "dispatch"))]
)
def test_kernels_of_instruction_sets_share_no_symbol(source: str, tmp_path: Path) -> None:
    """Nothing compiled for AVX-512 may replace a function of the portable kernels at link time."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    defined = []
    for isa, flags in VARIANTS.items():
        unit = compile_object(SOURCES / "cpu" / source, tmp_path / f"{isa}.o", *flags, f"-DFM_ISA={isa}")
        lines = run([nm, "--defined-only", "--extern-only", str(unit)]).decode().splitlines()
        names = {line.split()[-1] for line in lines}
        # GCC's pointer to the handler of exceptions, which is the same wherever it is.
        defined.append({name for name in names if not name.startswith("DW.ref.")})
    assert all(defined), defined
    shared = [one & other for one, other in itertools.combinations(defined, 2)]
    assert not any(shared), shared
