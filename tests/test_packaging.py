"""The installed package: its files, its version, its record of the build, what importing it does, and how it chooses a backend."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import copies
import pytest
import torch

import fm_fast
from fm_fast import _backends, _schemas

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT_VARIABLES = {
    "FM_FAST_BUILD",
    "FM_FAST_BACKEND",
    "FM_FAST_CPU",
    "MAX_JOBS",
    "TORCH_CUDA_ARCH_LIST",
    # glibc's
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
    # where the usual tools are
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "PATH",
    # what torchrun tells its processes
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
}
CPU = torch.device("cpu")
native_reason = _backends.load_native()
needs_native = pytest.mark.skipif(native_reason is not None, reason=f"no C++ library: {native_reason}")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return copies.run_python(code, folder=sys.prefix, **environment)


def installed_files() -> list[Path]:
    try:
        distribution = importlib.metadata.distribution("fm_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fm_fast is not installed")
    return [Path(str(file)) for file in distribution.files or []]


def test_version_is_the_same_everywhere() -> None:
    version = fm_fast.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert _backends.build_info()["version"] == version


def test_metadata() -> None:
    installed_files()
    metadata = importlib.metadata.metadata("fm_fast")
    assert metadata["Version"] == fm_fast.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"torch>=2.10", "numpy", "torchdiffeq"}


def test_installed_files() -> None:
    files = installed_files()
    tops = {file.parts[0] for file in files if not file.parts[0].startswith("..")}
    assert "kernels" not in tops, "kernels/ must be installed as fm_fast.kernels only"
    assert all(top == "fm_fast" or top.startswith(("fm_fast-", "__editable__")) or top == "__pycache__" for top in tops)


def test_installed_size() -> None:
    package = Path(fm_fast.__file__).parent
    files = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files if file.name != "libfm_fast_cuda.so") < 5e6


def test_types_and_data_are_shipped() -> None:
    package = Path(fm_fast.__file__).parent
    assert (package / "py.typed").is_file()
    assert list((package / "datasets").glob("*.npz"))


def test_build_info_accounts_for_every_library() -> None:
    info = _backends.build_info()
    assert set(info["built"]) | set(info["skipped"]) == {"cpu", "cuda"}
    assert not set(info["built"]) & set(info["skipped"])
    assert all(reason and "\n" not in reason for reason in info["skipped"].values())
    assert all({"library", "compiler", "flags"} <= set(record) for record in info["built"].values())


@needs_native
@pytest.mark.parametrize("record", ["other", None])
def test_a_library_of_other_sources_is_not_called(record: str | None, tmp_path: Path) -> None:
    """An editable installation whose sources were updated: the old library would take its new arguments for others."""
    copy = tmp_path / "fm_fast"
    shutil.copytree(Path(fm_fast.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not (copy / "kernels").is_dir():
        shutil.copytree(ROOT / "kernels", copy / "kernels")
    native = Path(str(_backends._native_folder()))
    shutil.copytree(native, copy / "_native", dirs_exist_ok=True)
    info = json.loads((copy / "_native" / "build_info.json").read_text())
    assert info.pop("schemas") == _schemas.digest()
    (copy / "_native" / "build_info.json").write_text(json.dumps(info if record is None else {**info, "schemas": record}))
    code = """
import torch, fm_fast
from fm_fast import _backends
print(fm_fast.__path__[0])
print(_backends.resolve("path_loss", torch.device("cpu")))
try:
    fm_fast.flow_matching_loss(lambda x, t: x, torch.ones(2, 2), seed=0, step=0, backend="cpp")
except RuntimeError as error:
    print(error)
"""
    result = copies.run_python(code, path=[str(tmp_path)], folder=sys.prefix, FM_FAST_BACKEND="", FM_FAST_CPU="")
    location, chosen, error = result.stdout.splitlines()
    assert (location, chosen) == (str(copy), "reference"), result.stderr
    assert error.endswith("the native library was built from other sources, whose ops take other arguments: install it again")


def test_importing_is_silent_and_starts_nothing() -> None:
    code = """
import subprocess, sys
def refuse(*arguments, **keywords):
    raise AssertionError(f"importing fm_fast started a process: {arguments}")
import torch
subprocess.Popen = refuse
import fm_fast.cli
assert not torch.cuda.is_initialized()
assert not {"triton", "scipy", "torchdiffeq", "torch._dynamo", "matplotlib", "PIL"} & set(sys.modules), "slow to import"
"""
    result = run_python(code, FM_FAST_BACKEND="", FM_FAST_CPU="")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_networks_and_trainer_are_imported_where_they_are_used() -> None:
    code = """
import sys
import fm_fast as fm
assert not {"fm_fast.nn", "fm_fast.train"} & set(sys.modules)
assert fm.nn.UNet and fm.train.AdamWEMA
try:
    fm.nm
except AttributeError as error:
    print(error)
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "module 'fm_fast' has no attribute 'nm'\n"), result.stderr


FAKE_DRIVER = """
#include <stdlib.h>
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { abort(); }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_asking_for_the_drivers_version_does_not_start_it(tmp_path: Path) -> None:
    """A driver that was started before a fork is lost to the child."""
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "driver.so", tmp_path / "driver.c"], check=True)
    library = tmp_path / "libcuda.so.1"
    library.write_text("no library")
    code = f"""
import os
from fm_fast import _backends
print(_backends._driver_version())
os.replace({str(tmp_path / "driver.so")!r}, {str(library)!r})
print(_backends._driver_version())
"""
    variables = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=Path(sys.prefix))
    assert done.stdout == "0\n12080\n", done.stderr
    in_runtime = [file for file in (ROOT / "csrc").rglob("*.c*") if "cudaDriverGetVersion" in file.read_text()]
    assert in_runtime == [], "it starts the driver"


def test_an_old_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.SimpleNamespace(fm_fast_cuda_runtime_version=lambda: 13000)
    monkeypatch.setattr(_backends.ctypes, "CDLL", lambda name: library)
    for version, refused in ((12080, True), (13000, False), (14000, False), (0, False)):
        monkeypatch.setattr(_backends, "_driver_version", lambda version=version: version)
        with pytest.raises(_backends._Unavailable, match=r"driver supports CUDA 12\.8, .* with CUDA 13\.0") if refused else nullcontext():
            _backends._check_driver(Path("library"))


def load_setup(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """setup.py as a module, without setting anything up."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("fm_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_an_old_setuptools_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without build isolation nothing else looks at its version."""
    (needed,) = set(re.findall(r"setuptools>=\d+", (ROOT / "pyproject.toml").read_text()))
    monkeypatch.setattr("setuptools.__version__", "76.1.0")
    with pytest.raises(SystemExit, match=r"needs setuptools >= \d+ to build, got 76\.1\.0: pip install --upgrade setuptools") as told:
        load_setup(monkeypatch)
    assert needed in str(told.value).replace(" ", "")
    monkeypatch.setattr("setuptools.__version__", "77.0")
    load_setup(monkeypatch)


NEW_NVCC, OLD_NVCC = [75, 80, 86, 89, 90, 100, 103, 120], [70, 75, 80, 86, 89, 90]


@pytest.mark.parametrize(
    ("known", "gpus", "expected"),
    [
        (NEW_NVCC, [], "8.0 9.0 10.0 12.0+PTX"),
        (OLD_NVCC, [], "8.0 9.0+PTX"),
        (NEW_NVCC, ["9.0", "8.6"], "8.0 9.0 10.0 12.0+PTX"),
        (NEW_NVCC, ["7.5", "7.0", "[N/A]"], "7.5 8.0 9.0 10.0 12.0+PTX"),
        ([*NEW_NVCC, 87], ["8.7"], "8.0 8.7 9.0 10.0 12.0+PTX"),
        ([*NEW_NVCC, 110, 121], ["11.0", "12.1"], "8.0 9.0 10.0 11.0 12.0+PTX"),
        ([*NEW_NVCC, 130], ["13.0"], "8.0 9.0 10.0 12.0 13.0+PTX"),
    ],
)
def test_gpu_architectures(known: list[int], gpus: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default list as far as nvcc knows it, the newest also as PTX, and GPUs of the machine that run none of it."""
    module = load_setup(monkeypatch)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    answers = {"nvcc": [f"compute_{number}" for number in known], "nvidia-smi": gpus}
    monkeypatch.setattr(module, "output_lines", lambda command: answers[command[0]])
    assert module.cuda_architectures(Path("nvcc")) == expected.split()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0 9.0+PTX")
    assert module.cuda_architectures(Path("nvcc")) == ["7.5", "8.0", "9.0+PTX"]


def test_an_nvcc_that_knows_no_architecture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_setup(monkeypatch)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(module, "output_lines", lambda command: ["compute_50"] if command[0] == "nvcc" else [])
    with pytest.raises(module.NotBuilt, match=r"nvcc knows none of the GPU architectures 8\.0, 9\.0, 10\.0, 12\.0"):
        module.cuda_architectures(Path("nvcc"))


def test_only_documented_environment_variables_are_read() -> None:
    folders = ("fm_fast", "kernels", "csrc")
    files = [ROOT / "setup.py", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    for file in files:
        if file.suffix not in (".py", ".cpp", ".h", ".cu", ".cuh"):
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.search(r"environ\b|getenv", line.split("#")[0]) and "**os.environ" not in line:
                names = set(re.findall(r"""["']([A-Z][A-Z0-9_]+)["']""", line))
                assert names, f"{file.name}: read environment variables by their literal name: {line.strip()}"
                assert names <= ENVIRONMENT_VARIABLES, f"{file.name}: undocumented environment variable: {line.strip()}"


def test_info_says_what_runs_and_why_the_rest_does_not() -> None:
    info = fm_fast.info()
    text = str(info)
    assert info.fm_fast == fm_fast.__version__
    assert info.torch == torch.__version__
    for op in _backends.OPS:
        assert f"{op} on cpu: " in text
        assert (f"{op} on cuda: " in text) == (op not in _backends.HOST_OPS)
    for choice in info.backends:
        assert set(choice.others) == {"cpp", "cuda", "triton"} - {choice.backend}
        assert all(choice.others.values())
    for reason in info.build["skipped"].values():
        assert reason in text


def test_automatic_choice() -> None:
    expected = ENVIRONMENT if (ENVIRONMENT := _backends.ENVIRONMENT_BACKEND) else ("reference" if native_reason else "cpp")
    assert all(_backends.resolve(op, CPU) == expected for op in _backends.OPS)


@pytest.mark.parametrize("op", _backends.OPS)
def test_other_devices_run_the_reference(op: str) -> None:
    if _backends.ENVIRONMENT_BACKEND is None:
        assert _backends.resolve(op, torch.device("mps")) == "reference"
    assert _backends.resolve(op, torch.device("mps"), "reference") == "reference"
    with pytest.raises(RuntimeError, match="not on mps"):
        _backends.resolve(op, torch.device("mps"), "cpp")


def test_impossible_and_unknown_requests() -> None:
    with pytest.raises(RuntimeError, match="backend='triton' can't run path_loss on cpu: it runs on cuda"):
        _backends.resolve("path_loss", CPU, "triton")
    with pytest.raises(ValueError, match="one of reference, cpp, cuda, triton, got 'fast'"):
        _backends.resolve("path_loss", CPU, "fast")


def test_resolve_is_traceable() -> None:
    def names_length(x: torch.Tensor) -> torch.Tensor:
        return x + len(_backends.resolve("path_loss", x.device)) + len(_backends.resolve("path_loss", x.device, "reference"))

    x = torch.zeros(2)
    compiled = torch.compile(names_length, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), names_length(x))


@pytest.mark.parametrize(
    ("variable", "choices"), [("FM_FAST_BACKEND", "reference, cpp, cuda, triton"), ("FM_FAST_CPU", "avx512, avx2, portable")]
)
def test_invalid_environment_is_refused_at_import(variable: str, choices: str) -> None:
    result = run_python("import fm_fast", **{variable: "fast"})
    assert result.returncode != 0
    assert result.stderr.strip().endswith(f"ValueError: {variable} must be one of {choices}, got 'fast'")


def test_environment_chooses_the_backend() -> None:
    code = "import torch, fm_fast; print(fm_fast._backends.resolve('path_loss', torch.device('cpu')))"
    assert run_python(code, FM_FAST_BACKEND="reference").stdout == "reference\n"
    refused = run_python(code, FM_FAST_BACKEND="triton")
    assert refused.stderr.strip().endswith("FM_FAST_BACKEND='triton' can't run path_loss on cpu: it runs on cuda, not on cpu")


@needs_native
def test_environment_chooses_the_instruction_set() -> None:
    code = "import fm_fast; print(fm_fast.info().cpu_isa)"
    assert run_python(code, FM_FAST_CPU="portable").stdout == "portable\n"


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_missing_instruction_set_is_an_error() -> None:
    if "avx512dq" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has AVX-512")
    result = run_python("import fm_fast", FM_FAST_CPU="avx512")
    assert "RuntimeError: FM_FAST_CPU=avx512: this processor or this build has no avx512" in result.stderr


def test_build_record_is_plain_json() -> None:
    assert json.loads(json.dumps(_backends.build_info())) == _backends.build_info()


LETTERS = {"Tensor?": "O", "Tensor[]": "L", "Tensor": "T", "int": "i", "float": "f", "bool": "b"}


def letters_of(schema):
    """One letter an argument, as the native ops write them."""
    plain = re.sub(r"\(\w!\)", "", schema[1 : schema.index(") ->")])
    return "".join(LETTERS[argument.split()[0]] for argument in plain.split(", "))


def test_native_ops_take_the_arguments_of_their_schemas():
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cpp")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in sources)
    named = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): found for name, found in re.findall(r'k(\w+)Arguments = "(\w+)"', text)}
    own = dict(re.findall(r'\nvoid (\w+)\(StableIValue\* stack[^{]*\{\s+(?:abi::)?Arguments in\(stack, "(\w+)"\)', text))
    assert {**named, **own} == {name: letters_of(schema) for name, schema in _schemas.SCHEMAS.items()}
