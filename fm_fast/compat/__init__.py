"""The call surfaces of other libraries, so that a loop can be tried with one import changed.

``fm_fast.compat.torchcfm``, ``fm_fast.compat.flow_matching`` and ``fm_fast.compat.torchdiffeq`` answer to the names that programs written
for those packages use. They are written anew, under this package's licence, and need none of the three. Their docstrings say where they
differ on purpose.
"""
