"""The registered ops: definitions and fake kernels, for the kernels of csrc/ and for those of kernels/, which register themselves here.

Ops write into tensors that the caller allocates and return nothing; their implementations live in csrc/ and kernels/. They have no
autograd formula of their own: an op's wiring, in the file of its name beside this one, calls them where the guard allows it.
"""

import importlib
from typing import Any

import torch

from fm_fast import _backends
from fm_fast._schemas import SCHEMAS

# One dispatch key has one implementation an op, so the two backends of a CUDA device are ops of two names.
NATIVE, TRITON = "fm_fast", "fm_fast_triton"


def define(namespace: str) -> torch.library.Library:
    """Define every op in a namespace, with a fake kernel. The definitions live as long as the returned library is kept."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"{namespace}::{name}", lambda *arguments: None, lib=library)
    return library


_libraries = [define(namespace) for namespace in (NATIVE, TRITON)]
_backends.load_native()
# The name is imported late because type checkers do not see that the folder kernels/ is installed as fm_fast.kernels.
_libraries.append(importlib.import_module("fm_fast.kernels").register(TRITON))  # registrations live as long as these values


def op(name: str) -> dict[str, Any]:
    """The callable op of each backend, looked up once by its wiring: the default overload skips a search at every call."""
    native, triton = (getattr(getattr(torch.ops, namespace), name).default for namespace in (NATIVE, TRITON))
    return {"cpp": native, "cuda": native, "triton": triton}
