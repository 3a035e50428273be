"""The call surfaces of other libraries, so that a loop can be tried with nothing but its imports changed.

``fm_fast.compat.torchcfm``, ``fm_fast.compat.flow_matching``, ``fm_fast.compat.transport`` (of SiT) and ``fm_fast.compat.torchdiffeq``
answer to the names that programs written for those packages use, in the modules where those programs look for them. They are written anew,
under this package's licence, and need none of the four. Their docstrings say where they differ on purpose.
"""

from fm_fast.compat import flow_matching, torchcfm, torchdiffeq, transport

__all__ = ["flow_matching", "torchcfm", "torchdiffeq", "transport"]
