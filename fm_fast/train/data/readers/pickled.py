"""Unpickle dictionaries of arrays, as data sets are distributed, without running what a file asks for."""

import pickle
from typing import IO, Any

# A pickle may name any function to be called; these are the only ones that dictionaries of arrays need.
ALLOWED_GLOBALS = {
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}

# What a damaged pickle makes Python raise.
DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError)


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data set")
        return super().find_class(module, name)


def unpickled(file: IO[bytes], name: str, kind: str) -> Any:
    """The pickled object; Python 2's strings become bytes. ValueError, with the name, where it is damaged or more than arrays."""
    try:
        return _RestrictedUnpickler(file, encoding="bytes").load()
    except DAMAGE as error:
        raise ValueError(f"{name}: expected a {kind} pickle, got: {error}") from error
