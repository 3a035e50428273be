"""What Triton's interpreter does otherwise than a GPU, or slowly, put right; for the whole process."""

from types import SimpleNamespace

import numpy as np


def round_to_bfloat16():
    """Replace the interpreter's float conversion, which truncates to bfloat16, by a GPU's rounding to the nearest even."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, from_dtype, to_dtype, mode):
        if to_dtype.primitive_bitwidth != 16 or to_dtype.fp_mantissa_width != 7:
            return convert(values, from_dtype, to_dtype, mode)
        bits = values.astype(np.float32).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values.astype(np.float32)), np.uint32(0x7FC0), nearest).astype(np.uint16)

    interpreter._convert_float = rounded


def replace_language_once():
    """Replace Triton's functions by the interpreter's for good, not at every call of a device function, which takes a fifth of the time."""
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()

    def replace_once(function):
        if function.__module__ not in replaced:  # modules see Triton's functions by different names
            replace(function)
            replaced.add(function.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once
