"""Builds the software GPU for the torch of this environment: its libcudart, and fm_fast's CUDA library from the emulated kernels."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno")
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"
UNSUPPORTED = """\
#include <stdio.h>
static int unsupported(const char* name) {
  fprintf(stderr, "software GPU: %s was called, which it does not have\\n", name);
  return 801;
}
"""
LIBRARY = "libfm_fast_cuda.so"


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"the software GPU needs the package {name}, which is not installed beside {sys.executable}")
    return Path(next(iter(found.submodule_search_locations)))


def real_runtime() -> Path:
    """NVIDIA's, as torch's wheel brings it."""
    library = package("nvidia") / "cu13" / "lib" / RUNTIME
    if not library.is_file():
        sys.exit(f"the software GPU needs a torch that was built with CUDA 13: {library} is not there")
    return library


def toolkit_headers() -> Path:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = next((Path(home, "include") for home in homes if home and Path(home, "include", "cuda.h").is_file()), None)
    return found or sys.exit(
        "the software GPU needs the headers of CUDA's toolkit: there is no include/cuda.h in CUDA_HOME or /usr/local/cuda"
    )


def exported(library: Path) -> set[str]:
    """Names without their versions."""
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.split()[-2] in "TW"}


def build_runtime(folder: Path) -> Path:
    """All that NVIDIA's exports: what runtime.cpp lacks says so when it is called."""
    names = exported(real_runtime())
    return build_stand_in(folder, [HERE / "runtime.cpp", HERE / "streams.cpp"], RUNTIME, names, ("cuda", "__cuda"), versioned=True)


def build_driver(folder: Path) -> Path:
    """What torch wants of libcuda, which comes with a GPU."""
    wanted = run("nm", "-D", "--undefined-only", package("torch") / "lib" / "libcaffe2_nvrtc.so").split()
    return build_stand_in(
        folder,
        [HERE.parent / "native" / "driver_stub.c"],
        DRIVER,
        {name for name in wanted if name.startswith("cu")},
        ("cu",),
        versioned=False,
    )


def build_stand_in(folder: Path, sources: list[Path], soname: str, wanted: set[str], prefixes: tuple[str, ...], versioned: bool) -> Path:
    """A library of these sources, and of a function that fails for everything else that is wanted of it."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, output in zip(sources, objects, strict=True):
        run("g++", *FLAGS, f"-I{toolkit_headers()}", "-c", source, "-o", output)
    defined = {line.split()[-1] for line in run("nm", "--defined-only", *objects).splitlines() if len(line.split()) == 3}
    missing = sorted(name for name in wanted - defined if name.startswith(prefixes))
    stubs, versions, library = folder / f"{soname}.stubs.c", folder / f"{soname}.map", folder / soname
    stubs.write_text(UNSUPPORTED + "".join(f'int {name}(void) {{ return unsupported("{name}"); }}\n' for name in missing))
    names = " ".join(f"{prefix}*;" for prefix in (*prefixes, "software_gpu_"))
    versions.write_text(f"{soname if versioned else ''} {{ global: {names} local: *; }};\n")
    run("gcc", "-fPIC", "-fno-builtin", "-c", stubs, "-o", stubs.with_suffix(".o"))
    run("g++", "-shared", *objects, stubs.with_suffix(".o"), f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}", "-o", library)
    return library


def build_kernels(folder: Path, runtime: Path) -> Path:
    """csrc/cuda as setup.py builds it for a GPU, registered for CUDA tensors, but compiled for the emulated device."""
    flags = (*FLAGS, f"-I{SOURCES}", f"-I{HERE.parent / 'native'}", f"-I{HERE}", "-DFM_EMULATE_CUDA", "-DFM_SOFTWARE_GPU")
    sources = [*sorted((SOURCES / "cuda").glob("*.cu")), *sorted((SOURCES / "cuda").glob("*.cpp")), *sorted(SOURCES.glob("*.cpp"))]

    def compiled(source: Path) -> Path:
        output = folder / f"{source.name}.o"
        run("g++", "-x", "c++", *flags, "-c", source, "-o", output)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library, torch_libraries = folder / LIBRARY, package("torch") / "lib"
    run("g++", "-shared", *objects, runtime, f"-L{torch_libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch_cuda",
        "-Wl,--allow-shlib-undefined", f"-Wl,-soname,{LIBRARY}", "-o", library)  # fmt: skip
    return library


def build_package(library: Path, packages: Path) -> None:
    """A copy of the installed fm_fast that has this library, as if setup.py had built it; the installed one remains as it is."""
    copied = packages / "fm_fast"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(package("fm_fast"), copied)
    shutil.copy2(library, copied / "_native" / LIBRARY)
    info = copied / "_native" / "build_info.json"
    record = json.loads(info.read_text(encoding="utf-8"))
    record["built"]["cuda"] = {"library": LIBRARY, "compiler": "software GPU", "flags": "", "architectures": []}
    record["skipped"].pop("cuda", None)
    info.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def build(folder: Path, packages: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runtime = build_runtime(folder)
    build_driver(folder)
    build_package(build_kernels(folder, runtime), packages)
