"""The CUDA kernels on the CPU: csrc/cuda compiled against tests/native/cuda_emulation.h and registered as ops of a name of their own."""

import importlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which("g++")
NAMESPACE = "fm_fast_emulated"
FLAGS = (
    "-std=c++17", "-O0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno", f"-I{SOURCES}",
    f"-I{HERE / 'native'}", "-DFM_EMULATE_CUDA", f'-DFM_NAMESPACE="{NAMESPACE}"', '-DFM_DISPATCH_KEY="CPU"',
)  # fmt: skip
EMULATED = (
    "noise",
    "path_sample",
    "path_loss",
    "path_loss_backward",
    "linear_step",
    "step_error",
    "step_control",
    "probe",
    "divergence_step",
)
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build(folder: Path, *extra: str) -> Path:
    """The library of all CUDA sources, for torch's CPU."""
    hosts = [*sorted((SOURCES / "cuda").glob("*.cpp")), *sorted(SOURCES.glob("*.cpp")), HERE / "native" / "cuda_emulation.cpp"]
    sources = [*sorted((SOURCES / "cuda").glob("*.cu")), _joined(hosts, folder)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder, extra), sources))
    library, torch_libraries = folder / "libfm_fast_emulated.so", Path(torch.__file__).parent / "lib"
    # -Bsymbolic: calls of torch's CUDA functions find the stand-ins in this library.
    _run(
        COMPILER, "-shared", "-Wl,-Bsymbolic", *extra, *objects, f"-L{torch_libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-o", library
    )
    return library


def _joined(sources: list[Path], folder: Path) -> Path:
    """One source that includes the others, so that the headers they share, which take most of the time, are read once."""
    joined = folder / "joined.cpp"
    joined.write_text("".join(f'#include "{source}"\n' for source in sources))
    return joined


def _compile(source: Path, folder: Path, extra: tuple[str, ...]) -> Path:
    output = folder / f"{source.name}.o"
    _run(COMPILER, "-x", "c++", *FLAGS, *extra, "-c", source, "-o", output)
    return output


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def load(library: Path) -> torch.library.Library:
    """Define the ops and give them the kernels; both live as long as the result."""
    from fm_fast._ops import schemas

    definitions = schemas.define(NAMESPACE)
    torch.ops.load_library(library)
    return definitions


def install(monkeypatch) -> None:
    """Let backend "cuda" run on the CPU, through the emulated ops."""
    from fm_fast import _backends

    for op in _backends.OPS:
        monkeypatch.setitem(_backends._REASONS, (op, "cpu", "cuda"), None)
    for name in EMULATED:
        wiring = importlib.import_module(f"fm_fast._ops.{name.removesuffix('_backward')}")
        monkeypatch.setitem(getattr(wiring, f"_{name}"), "cuda", getattr(getattr(torch.ops, NAMESPACE), name).default)
