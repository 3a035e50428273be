"""Other libraries: which are installed. They are used as installed packages only, and a missing one is said to be missing."""

import functools
import importlib
import importlib.metadata
from collections.abc import Sequence

# Also in constraints.txt and, but for torchcfm, in the extra "bench".
PINNED = {"torchdiffeq": "0.2.5", "torchode": "1.0.1", "flow_matching": "1.0.10", "torchebm": "0.8.9", "torchcfm": "1.0.7"}
# torchcfm asks for much that a U-Net and a loss do not need.
DEFAULT_INSTALLATION = "pip install -e '.[bench]'"
# What of each is used; torchcfm asks for much more than that when it is imported.
MODULES = {
    "torchdiffeq": "torchdiffeq",
    "torchode": "torchode",
    "flow_matching": "flow_matching.path",
    "torchebm": "torchebm.samplers",
    "torchcfm": "torchcfm.conditional_flow_matching",
}
INSTALLATION = {"torchcfm": f"{DEFAULT_INSTALLATION} && pip install --no-deps torchcfm==1.0.7"}


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def import_error(name: str) -> str | None:
    """Why an installed package cannot be imported, or None."""
    try:
        importlib.import_module(MODULES[name])
    except Exception as error:  # whatever a foreign package raises when it is loaded
        return f"{type(error).__name__}: {error}"
    return None


def available(name: str) -> bool:
    """Whether the package is installed and can be imported."""
    return version(name) is not None and import_error(name) is None


def remarks(names: Sequence[str]) -> list[str]:
    """A line for each peer that is left out, or that is not the version which the benchmarks were written for."""
    return [_remark(name, version(name)) for name in names if version(name) != PINNED[name] or not available(name)]


def _remark(name: str, found: str | None) -> str:
    if found is None:
        return f"{name} is not installed and left out: {INSTALLATION.get(name, DEFAULT_INSTALLATION)}"
    if not available(name):
        return f"{name} {found} cannot be imported and is left out: {import_error(name)}"
    return f"{name} {found} is not the version that was meant: {PINNED[name]}"
