"""How results print: the kind and the shape of their tensors instead of the numbers."""

from dataclasses import fields
from typing import Any

from torch import Tensor


class Result:
    """For frozen dataclasses (of repr=False) whose fields hold tensors."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{field.name}={_shown(getattr(self, field.name))}" for field in fields(self) if field.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({shown})"


def _shown(value: Any) -> str:
    """float32[16, 3, 32, 32]"""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
