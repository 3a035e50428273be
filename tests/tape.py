"""What a CUDA graph does, on the CPU: the operations of some work, recorded with their tensors, and run again on the same memory.

Whatever the work took from the host is repeated as it was, and what lies in a tensor that the work did not make is read anew. Reading a
number from a tensor, or making a tensor of numbers, for which a device would wait, is an error. So a replay is right where that of a graph
would be.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh")  # the last: torch.tensor


def tensors_of(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Tape(TorchDispatchMode):
    """A recorder of train/execution/graph.py."""

    def __init__(self):
        super().__init__()
        self.calls, self.warmed, self.replays = [], 0, 0

    def warm_up(self, work):
        self.warmed += 1
        work()

    def record(self, work):
        """Unlike a graph's, these operations run while they are recorded: what they wrote is put back."""
        self.before = {}
        with self:
            work()
        for storage, content in self.before.values():
            storage.copy_(content)
        return self.replay

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(str(op).startswith(f"aten.{name}.") for name in SYNCS):
            raise RuntimeError(f"{op} would wait for the device")
        self._keep_what_is_written(op, args, kwargs)
        result = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, tensors_of(result)))
        return result

    def _keep_what_is_written(self, op, args, kwargs):
        given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
        for argument in op._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of(given.get(argument.name)):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in self.before:
                        self.before[storage.data_ptr()] = storage, storage.clone()

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors_of(op(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
