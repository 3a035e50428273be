"""Other libraries: which are installed. They are used as installed packages only, and a missing one is said to be missing."""

import importlib.metadata
from collections.abc import Sequence

PINNED = {"torchdiffeq": "0.2.5", "flow_matching": "1.0.10", "torchcfm": "1.0.7"}
# torchcfm asks for much that a U-Net and a loss do not need.
DEFAULT_INSTALLATION = "pip install -e '.[bench]'"
INSTALLATION = {"torchcfm": f"{DEFAULT_INSTALLATION} && pip install --no-deps torchcfm==1.0.7"}


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def remarks(names: Sequence[str]) -> list[str]:
    """A line for each peer that is left out because it is missing, or that is not the version which the benchmarks were written for."""
    return [_remark(name, version(name)) for name in names if version(name) != PINNED[name]]


def _remark(name: str, found: str | None) -> str:
    if found is None:
        return f"{name} is not installed and left out: {INSTALLATION.get(name, DEFAULT_INSTALLATION)}"
    return f"{name} {found} is not the version that was meant: {PINNED[name]}"
