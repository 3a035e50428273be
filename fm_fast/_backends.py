"""Which backend runs each op, and why the others don't. The only file that loads native code.

The backends, in the order in which an automatic choice prefers them on the devices that they serve:

| name      | device | what it is                                                        |
|-----------|--------|-------------------------------------------------------------------|
| cpp       | cpu    | the C++ library in fm_fast/_native                                |
| cuda      | cuda   | the CUDA library in fm_fast/_native                               |
| triton    | cuda   | fm_fast.kernels                                                   |
| reference | any    | plain PyTorch (fm_fast.reference): the specification and fallback |

Everything is decided once, when fm_fast is imported, and kept in constants: `resolve` only looks up tables, so it costs little and
torch.compile can trace it. The environment variables FM_FAST_BACKEND and FM_FAST_CPU are read here, at import, and nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm_fast import __path__ as _package_path
from fm_fast import _schemas
from fm_fast._version import __version__

BACKENDS = ("reference", "cpp", "cuda", "triton")
OPS = (
    "noise",
    "path_sample",
    "path_loss",
    "linear_step",
    "step_error",
    "step_control",
    "probe",
    "divergence_step",
    "adamw_ema",
    "group_norm_silu",
    "conv3x3",
    "conv_weight_grad",
    "attention",
    "assignment",
)
# Those with a kernel in csrc/cuda.
CUDA_OPS = ("noise", "path_sample", "path_loss", "linear_step", "step_error", "step_control", "probe", "divergence_step")
HOST_OPS = ("assignment",)  # the host's work, wherever the data are
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_SERVES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


class _Unavailable(Exception):
    """A backend that can't run here, and why."""


def _checked(variable: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value and value not in choices:
        raise ValueError(f"{variable} must be one of {', '.join(choices)}, got {value!r}")
    return value or None


ENVIRONMENT_BACKEND = _checked("FM_FAST_BACKEND", os.environ.get("FM_FAST_BACKEND"), BACKENDS)
ENVIRONMENT_CPU = _checked("FM_FAST_CPU", os.environ.get("FM_FAST_CPU"), INSTRUCTION_SETS)


# The native libraries


@functools.cache
def _native_folder() -> Path | None:
    folders = [Path(folder, "_native") for folder in _package_path]
    return next((folder for folder in folders if (folder / "build_info.json").is_file()), None)


@functools.cache
def build_info() -> Mapping[str, Any]:
    """What the installation built and what it left out: build_info.json, written by setup.py."""
    folder = _native_folder()
    if folder is None:
        missing = "fm_fast is not installed, so nothing was compiled (pip install .)"
        return {"version": __version__, "requested": None, "built": {}, "skipped": {"cpu": missing, "cuda": missing}}
    return json.loads((folder / "build_info.json").read_text(encoding="utf-8"))


def _library(name: str) -> Path:
    info, folder = build_info(), _native_folder()
    if folder is None or name not in info["built"]:
        raise _Unavailable(f"not built: {info['skipped'].get(name, 'no reason recorded')}")
    if info["version"] != __version__:
        raise _Unavailable(f"the native library is of version {info['version']}, fm_fast is {__version__}: install it again")
    if info.get("schemas") != _schemas.digest():  # as after an update of an editable installation
        raise _Unavailable("the native library was built from other sources, whose ops take other arguments: install it again")
    return folder / info["built"][name]["library"]


def _load(name: str) -> Path:
    path = _library(name)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _Unavailable(f"{path.name} does not load: {error}") from error
    return path


@functools.cache
def load_native() -> str | None:
    """Load the C++ library once, with the instruction set that FM_FAST_CPU asks for.

    Returns None, or the reason why it can't run. Raises RuntimeError if FM_FAST_CPU names an instruction set that can't be had.
    """
    try:
        path = _load("cpu")
    except _Unavailable as reason:
        if ENVIRONMENT_CPU:
            raise RuntimeError(f"FM_FAST_CPU={ENVIRONMENT_CPU}, but the cpp backend can't run: {reason}") from None
        return str(reason)
    if ENVIRONMENT_CPU and ctypes.CDLL(str(path)).fm_fast_cpu_select(ENVIRONMENT_CPU.encode()) != 0:
        raise RuntimeError(f"FM_FAST_CPU={ENVIRONMENT_CPU}: this processor or this build has no {ENVIRONMENT_CPU}, it runs {cpu_isa()}")
    return None


def _driver_version() -> int:
    """The newest CUDA version that the driver supports, 13000 for 13.0, or 0 without a driver.

    Asked of the driver itself: the runtime's function starts the driver, after which a forked process could not use a GPU and
    CUDA_VISIBLE_DEVICES would no longer count.
    """
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value


def _check_driver(path: Path) -> None:
    """A driver older than the toolkit's major version can't run its binaries."""
    driver, runtime = _driver_version(), ctypes.CDLL(str(path)).fm_fast_cuda_runtime_version()
    if 0 < driver < runtime // 1000 * 1000:
        shown = [f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime)]
        raise _Unavailable(f"the driver supports CUDA {shown[0]}, the library was built with CUDA {shown[1]}")


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA library once, where torch has CUDA. Returns None, or the reason why it can't run.

    Loading reads a file and registers the ops; the kernels go to a GPU when they are first launched.
    """
    try:
        _library("cuda")
        if torch.version.cuda is None:
            raise _Unavailable("this torch was built without CUDA")
        _check_driver(_load("cuda"))
    except _Unavailable as reason:
        return str(reason)
    return None


def cpu_isa() -> str | None:
    """The instruction set that the C++ kernels use (avx512, avx2 or portable), None without the library."""
    try:
        library = ctypes.CDLL(str(_library("cpu")))
    except (_Unavailable, OSError):
        return None
    library.fm_fast_cpu_isa.restype = ctypes.c_char_p
    return library.fm_fast_cpu_isa().decode()


# Triton


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _triton_reason(op: str) -> str | None:
    """Why Triton can't run this op, found without importing Triton (which would slow down every import of fm_fast)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fm_fast[triton]')"
    if not any(Path(folder, "kernels", f"{op}.py").is_file() for folder in _package_path):
        return f"there is no Triton kernel for {op}"
    return None


# The choice


def _cuda_reason(op: str) -> str | None:
    return load_cuda() if op in CUDA_OPS else f"there is no CUDA C++ kernel for {op}"


def _find_reason(op: str, device_type: str, backend: str) -> str | None:
    if backend == "reference":
        return None
    if _SERVES[backend] != device_type:
        return f"it runs on {_SERVES[backend]}, not on {device_type}"
    return {"cpp": load_native, "cuda": functools.partial(_cuda_reason, op), "triton": functools.partial(_triton_reason, op)}[backend]()


_REASONS = {(op, device, backend): _find_reason(op, device, backend) for op in OPS for device in _PREFERENCE for backend in BACKENDS}
_AUTOMATIC = {
    (op, device): next(backend for backend in order if _REASONS[op, device, backend] is None)
    for op in OPS
    for device, order in _PREFERENCE.items()
}


def why_not(op: str, device_type: str, backend: str) -> str | None:
    """Why `backend` can't run `op` on this type of device; None if it can."""
    if device_type in _PREFERENCE:
        return _REASONS[op, device_type, backend]
    return None if backend == "reference" else f"it runs on {_SERVES[backend]}, not on {device_type}"


def resolve(op: str, device: torch.device, requested: str | None = None) -> str:
    """The backend that runs an op.

    Args:
        op: one of `OPS`.
        device: where the data is.
        requested: one of `BACKENDS`, or None for FM_FAST_BACKEND and, without that, the automatic choice: cpp on the CPU, the CUDA library
            or else Triton on CUDA devices, and the reference wherever these can't run.

    Raises:
        ValueError: `requested` is not a backend.
        RuntimeError: an explicitly chosen backend can't run; the text says why.
    """
    chosen = ENVIRONMENT_BACKEND if requested is None else requested
    if chosen is None:
        return _AUTOMATIC.get((op, device.type), "reference")
    if chosen not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {chosen!r}")
    reason = why_not(op, device.type, chosen)
    if reason is not None:
        source = "FM_FAST_BACKEND" if requested is None else "backend"
        raise RuntimeError(f"{source}={chosen!r} can't run {op} on {device.type}: {reason}")
    return chosen


def resolve_on_host(op: str) -> str:
    """The backend for the host's part of an op whose data may be anywhere: FM_FAST_BACKEND counts where it names one of the host's."""
    chosen = ENVIRONMENT_BACKEND
    serves_host = chosen is not None and _SERVES.get(chosen, "cpu") == "cpu"
    return resolve(op, torch.device("cpu"), chosen if serves_host else _AUTOMATIC[op, "cpu"])


# The report


@dataclass(frozen=True)
class OpBackend:
    """What runs one op on one type of device, and why each other backend doesn't."""

    op: str
    device: str
    backend: str
    others: Mapping[str, str]

    def __str__(self) -> str:
        others = "".join(f"\n      not {name}: {reason}" for name, reason in self.others.items())
        return f"  {self.op} on {self.device}: {self.backend}{others}"


@dataclass(frozen=True)
class Info:
    """What fm_fast runs on; `print(fm_fast.info())` shows all of it."""

    fm_fast: str
    python: str
    torch: str
    triton: str | None
    devices: tuple[str, ...]
    cpu_isa: str | None
    build: Mapping[str, Any]
    environment: Mapping[str, str | None]
    backends: tuple[OpBackend, ...]

    def __str__(self) -> str:
        lines = [
            f"fm_fast {self.fm_fast}, torch {self.torch}, triton {self.triton or 'not installed'}, python {self.python}",
            "devices: " + ", ".join(self.devices),
            f"CPU instruction set: {self.cpu_isa or 'none (no C++ library)'}",
            "environment: " + ", ".join(f"{name}={value or '(unset)'}" for name, value in self.environment.items()),
            "build:",
            *(f"  {name}: {record['compiler']}, {record['flags']}" for name, record in self.build["built"].items()),
            *(f"  {name}: not built: {reason}" for name, reason in self.build["skipped"].items()),
            "backends:",
            *map(str, self.backends),
        ]
        return "\n".join(lines)


def _devices() -> tuple[str, ...]:
    cpu = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return (cpu, *(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())))


def _op_backend(op: str, device: str) -> OpBackend:
    try:
        chosen = resolve_on_host(op) if op in HOST_OPS else resolve(op, torch.device(device))
    except RuntimeError as error:
        chosen = f"none: {error}"
    reasons = {name: why_not(op, device, name) for name in BACKENDS}
    unused = {name: reason or f"{chosen} is preferred" for name, reason in reasons.items() if name not in (chosen, "reference")}
    return OpBackend(op, device, chosen, unused)


def info() -> Info:
    """Versions, devices, what was built, and which backend runs each op; `fm-fast info` prints it."""
    return Info(
        fm_fast=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_triton_version(),
        devices=_devices(),
        cpu_isa=cpu_isa(),
        build=build_info(),
        environment={"FM_FAST_BACKEND": ENVIRONMENT_BACKEND, "FM_FAST_CPU": ENVIRONMENT_CPU},
        backends=tuple(_op_backend(op, device) for op in OPS for device in _PREFERENCE if device == "cpu" or op not in HOST_OPS),
    )
