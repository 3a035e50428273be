"""Every way to install: sdist and wheel, with and without isolation, editable, without a compiler; and what the native library needs."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fm_fast import _backends

ROOT = Path(__file__).resolve().parents[1]
NO_COMPILER = {"CXX": "/nonexistent/g++"}
# Keeps a build in mode auto from minutes with nvcc, where that is installed: there is no such architecture.
NO_CUDA = {"TORCH_CUDA_ARCH_LIST": "none"}
# torch's C interface; test_symbols_exist_in_other_torch_versions asks the oldest and the newest torch for all that we use of it.
TORCH_SYMBOLS = re.compile(r"(aoti_torch_|torch_)\w+")
HARMLESS = re.compile(r"_ITM_\w+|__gmon_start__|[\w.]+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
REPORT = """
import fm_fast, torch
info = fm_fast.info()
print(fm_fast.__file__)
print(sorted(info.build["built"]), info.build["skipped"].get("cpu"))
print(fm_fast._backends.resolve("path_loss", torch.device("cpu")))
"""
# A loss and its gradient by both backends, and a sample with its log-density: all ops but the trainer's.
USE = """
import fm_fast as fm, torch
model, x1 = torch.nn.Linear(4, 4), torch.arange(32.0).reshape(8, 4) / 32
def gradients(backend):
    model.zero_grad()
    fm.flow_matching_loss(lambda x, t: model(x), x1, seed=0, step=0, backend=backend).backward()
    return [p.grad.clone() for p in model.parameters()]
for ours, plain in zip(gradients("cpp"), gradients("reference")):
    torch.testing.assert_close(ours, plain)
probes = {"kind": "rademacher", "probes": 2, "seed": 0}
s = fm.sample_with_log_prob(lambda x, t: model(x), fm.noise((8, 4), seed=0, step=0), steps=4, backend="cpp", **probes)
assert s.x.shape == (8, 4) and bool(s.logp.isfinite().all()) and float(s.std_err.max()) > 0
print(torch.__version__)
"""

pytestmark = pytest.mark.slow
has_compiler = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")
offline = re.compile(r"No matching distribution|Could not fetch|Failed to establish a new connection|Temporary failure in name resolution")


def run(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FM_FAST_")}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env={**variables, **NO_CUDA, **environment}
    )


def succeed(*command: object, cwd: Path | None = None, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    if result.returncode and offline.search(result.stdout + result.stderr):
        pytest.skip("no package index")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_wheel(checkout: Path, folder: Path, **environment: str) -> Path:
    succeed(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, checkout, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def report_of(wheel: Path, folder: Path) -> list[str]:
    """What an installation of `wheel` says about itself, asked from outside the checkout."""
    zipfile.ZipFile(wheel).extractall(folder)
    output = succeed(sys.executable, "-c", REPORT, cwd=folder.parent, PYTHONPATH=str(folder))
    location, *report = output.splitlines()
    assert Path(location).is_relative_to(folder)
    return report


def is_installed(name: str) -> bool:
    """By its metadata: where the module pip is looked for, setuptools fails to load in this process afterwards, and inductor needs it."""
    return any(importlib.metadata.distributions(name=name))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources without anything that was built; in a folder with a space."""
    missing = [name for name in ("pip", "setuptools", "ninja") if not is_installed(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    anywhere = shutil.ignore_patterns("_native", "__pycache__", "*.egg-info")
    outputs = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "out", "runs", "data")  # names that folders further down may have

    def built(folder, names):
        return anywhere(folder, names) | (outputs(folder, names) if Path(folder) == ROOT else set())

    return Path(shutil.copytree(ROOT, tmp_path / "the checkout", ignore=built))


@has_compiler
def test_wheel_from_sdist(checkout: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs build")
    succeed(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.fullmatch(r"fm_fast-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 5e6
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"fm_fast"}
    assert {"fm_fast/_native/libfm_fast_cpu.so", "fm_fast/_native/build_info.json", "fm_fast/py.typed"} <= set(names)
    assert {f"fm_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")} <= set(names)
    assert report_of(wheel, tmp_path / "site") == ["['cpu'] None", "cpp"]


@has_compiler
def test_wheel_without_isolation_and_without_leftovers(checkout: Path, tmp_path: Path) -> None:
    for leftover in ("build/lib/fm_fast/stale.py", "fm_fast/_native/stale.so", f"build/bdist.{sys.platform}-x86_64/wheel/fm_fast/stale.py"):
        (checkout / leftover).parent.mkdir(parents=True, exist_ok=True)
        (checkout / leftover).touch()
    wheel = make_wheel(checkout, tmp_path / "dist", FM_FAST_BUILD="cpu", MAX_JOBS="1")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "stale" in name]
    assert report_of(wheel, tmp_path / "site") == ["['cpu'] None", "cpp"]


@has_compiler
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(checkout: Path, tmp_path: Path, mode: str) -> None:
    environment = tmp_path / "environment"
    succeed(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for package in Path(torch.__file__).parents[1].iterdir():
        if not package.name.startswith(("fm_fast", "__editable__")):
            (site / package.name).symlink_to(package)
    install = ["install", "--no-deps", "--no-build-isolation", "--config-settings", f"editable_mode={mode}", "--editable", checkout]
    succeed(sys.executable, "-m", "pip", "--python", python, *install)
    for folder in (tmp_path, checkout):
        location, *report = succeed(python, "-c", REPORT, cwd=folder).splitlines()
        assert Path(location).is_relative_to(checkout)
        assert report == ["['cpu'] None", "cpp"]
        assert succeed(python, "-c", "import fm_fast.kernels as k; print(*k.__path__)", cwd=folder)


def test_checkout_that_is_not_installed(checkout: Path) -> None:
    location, *report = succeed(
        sys.executable, "-S", "-c", f"import sys; sys.path[1:1] = {sys.path!r}\n{REPORT}", cwd=checkout
    ).splitlines()
    assert Path(location).is_relative_to(checkout)
    assert report[1] in ("cpp", "reference")


@has_compiler
def test_checkout_that_shadows_the_installed_package(checkout: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(make_wheel(checkout, tmp_path / "dist")).extractall(tmp_path / "site")
    location, *report = succeed(sys.executable, "-c", REPORT, cwd=checkout, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert Path(location).is_relative_to(checkout)
    assert report == ["['cpu'] None", "cpp"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FM_FAST_BUILD": "none"}, "FM_FAST_BUILD=none"),
        (NO_COMPILER, "no C++ compiler was found (looked for /nonexistent/g++)"),
        ({"CXX": "false"}, "false does not run"),
        ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler was found (looked for g++ c++ clang++)"),
    ],
)
def test_pure_python_fallback(checkout: Path, tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    wheel = make_wheel(checkout, tmp_path / "dist", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    built, backend = report_of(wheel, tmp_path / "site")
    assert built.startswith(f"[] {reason}")
    assert backend == "reference"


@has_compiler
def test_broken_source_is_a_fallback_with_the_compilers_words(checkout: Path, tmp_path: Path) -> None:
    source = next(iter(sorted((checkout / "csrc" / "cpu").glob("*.cpp"))))
    source.write_text("#error deliberately broken\n")
    built, _ = report_of(make_wheel(checkout, tmp_path / "dist"), tmp_path / "site")
    assert "the compilation failed" in built
    assert "deliberately broken" in built


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FM_FAST_BUILD": "gpu"}, "fm_fast: FM_FAST_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"),
        ({"FM_FAST_BUILD": "cpu", **NO_COMPILER}, "fm_fast: FM_FAST_BUILD=cpu can't build the cpu library: no C++ compiler was found"),
        ({"FM_FAST_BUILD": "cuda"}, "fm_fast: FM_FAST_BUILD=cuda can't build the cuda library: "),
        ({"MAX_JOBS": "many"}, "fm_fast: MAX_JOBS must be a positive integer, got 'many'"),
    ],
)
def test_impossible_requests_stop_with_one_line(checkout: Path, tmp_path: Path, environment: dict[str, str], message: str) -> None:
    result = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout, **environment)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert message in output
    assert "Traceback" not in output


@has_compiler
@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists(), reason="a machine without a GPU")
def test_an_automatic_build_takes_no_minutes_for_kernels_that_cannot_run_here(checkout: Path, tmp_path: Path) -> None:
    wheel = make_wheel(checkout, tmp_path / "dist", FM_FAST_BUILD="auto")
    info = json.loads(zipfile.ZipFile(wheel).read("fm_fast/_native/build_info.json"))
    assert list(info["built"]) == ["cpu"]
    assert info["skipped"]["cuda"] == "this machine has no NVIDIA driver (FM_FAST_BUILD=cuda builds the library all the same)"


has_nvcc = pytest.mark.skipif(shutil.which("nvcc", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin") is None, reason="needs nvcc")


@has_compiler
@has_nvcc
def test_cuda_library_needs_nothing_but_torch(checkout: Path, tmp_path: Path) -> None:
    """For one architecture; torch's own functions are all that the library leaves open, and it brings the CUDA runtime along."""
    wheel = make_wheel(checkout, tmp_path / "dist", FM_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    built = tmp_path / "site" / "fm_fast" / "_native" / "libfm_fast_cuda.so"
    assert {name for name in symbols(built, "undefined") - torch_symbols(built) if not HARMLESS.fullmatch(name)} == set()
    assert all(name.startswith("fm_fast_") for name in symbols(built, "defined"))
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", succeed("readelf", "-d", built)))
    allowed = {"libtorch_cpu.so", "libtorch_cuda.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed <= allowed
    installed = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    in_libtorch_cuda = {"aoti_torch_create_cuda_guard", "aoti_torch_delete_cuda_guard", "aoti_torch_get_current_cuda_stream"}
    assert torch_symbols(built) - in_libtorch_cuda <= symbols(installed, "defined")


# The wheel on a package index, and with other versions of torch


def repair_command(folder: Path, wheel: Path) -> list[str]:
    """cibuildwheel's, as pyproject.toml has it, run by this Python."""
    (command,) = re.findall(r'^repair-wheel-command = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return [sys.executable, "-m", *(part.format(dest_dir=folder, wheel=wheel) for part in shlex.split(command))]


@has_compiler
def test_repair_for_a_package_index_changes_the_platform_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if importlib.util.find_spec("auditwheel") is None or shutil.which("patchelf", path=tools) is None:
        pytest.skip("needs auditwheel and patchelf")
    wheel = make_wheel(checkout, tmp_path / "dist", FM_FAST_BUILD="cpu")
    command = repair_command(tmp_path / "repaired", wheel)
    succeed(*command, PATH=tools)
    (repaired,) = (tmp_path / "repaired").glob("*.whl")
    assert re.fullmatch(r"fm_fast-[\d.]+-py3-none-manylinux_\w+\.whl", repaired.name)
    assert contents(repaired) == contents(wheel)
    assert report_of(repaired, tmp_path / "site") == ["['cpu'] None", "cpp"]

    exclusion = command.index("--exclude")
    refused = run(*command[:exclusion], *command[exclusion + 2 :], PATH=tools)
    assert refused.returncode != 0
    assert "libtorch_cpu.so" in refused.stderr


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel but for its metadata, which name the platform."""
    archive = zipfile.ZipFile(wheel)
    return {entry: archive.read(entry) for entry in archive.namelist() if ".dist-info/" not in entry and not entry.endswith("/")}


@has_compiler
@pytest.mark.download
@pytest.mark.parametrize("requirement", ["torch==2.10.0", "torch"], ids=["oldest", "newest"])
def test_wheel_runs_on_other_torch_versions(requirement: str, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One and the same wheel on the oldest and the newest torch, each installed with all that it asks for."""
    if "download" not in (request.config.option.markexpr or ""):
        pytest.skip("downloads gigabytes: ask for it by -m download")
    wheel, environment = make_wheel(checkout, tmp_path / "dist", FM_FAST_BUILD="cpu"), tmp_path / "environment"
    succeed(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    succeed(python, "-m", "pip", "install", "-q", "--no-cache-dir", requirement, wheel)
    version = succeed(python, "-c", USE, cwd=tmp_path).strip()
    print(f"fm_fast ran on torch {version}")
    assert version.startswith("2.10.0") == (requirement == "torch==2.10.0")


# What the library needs from the machine


def library() -> Path:
    reason = _backends.load_native()
    if reason is not None or shutil.which("nm") is None:
        pytest.skip(f"no C++ library or no nm: {reason}")
    return _backends._library("cpu")


def symbols(file: Path, kind: str) -> set[str]:
    return {line.split()[-1] for line in succeed("nm", "-D", f"--{kind}-only", file).splitlines()}


def torch_symbols(file: Path) -> set[str]:
    return {name for name in symbols(file, "undefined") if TORCH_SYMBOLS.fullmatch(name)}


def test_undefined_symbols() -> None:
    others = symbols(library(), "undefined") - torch_symbols(library())
    assert {name for name in others if not HARMLESS.fullmatch(name)} == set()


def test_exported_symbols() -> None:
    assert all(name.startswith("fm_fast_") for name in symbols(library(), "defined"))


def test_needed_libraries(record_property: Callable[[str, object], None]) -> None:
    dynamic = succeed("readelf", "-d", library())
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"RPATH|RUNPATH", dynamic)
    versions = re.findall(r"@(GLIBC|GLIBCXX)_([\d.]+)", "\n".join(symbols(library(), "undefined")))
    for name in ("GLIBC", "GLIBCXX"):
        newest = max((tuple(map(int, version.split("."))) for kind, version in versions if kind == name), default=())
        record_property(name, ".".join(map(str, newest)))
        print(f"{name} needed: {'.'.join(map(str, newest))}")


def test_symbols_exist_in_this_torch() -> None:
    installed = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert torch_symbols(library()) <= symbols(installed, "defined")


@pytest.mark.parametrize("requirement", ["torch==2.10.0", "torch"], ids=["oldest", "newest"])
def test_symbols_exist_in_other_torch_versions(requirement: str, tmp_path: Path) -> None:
    """The library's needs against the C interface of another torch: not an import, which would install gigabytes of CUDA libraries."""
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 6 GB of disk")
    succeed(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", tmp_path, requirement)
    (wheel,) = tmp_path.glob("torch-*.whl")
    print(f"checked against {wheel.name}, here: {importlib.metadata.version('torch')}")
    other = Path(zipfile.ZipFile(wheel).extract("torch/lib/libtorch_cpu.so", tmp_path))
    wheel.unlink()
    missing = torch_symbols(library()) - symbols(other, "defined")
    other.unlink()
    assert missing == set()
