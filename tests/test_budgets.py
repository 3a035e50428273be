"""What a fused step may cost: ops, passes over full-size memory, and full-size tensors that ever exist."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fm_fast as fm
from fm_fast import _backends, _spec
from fm_fast._ops import guard

NATIVE = _backends.why_not("path_sample", "cpu", "cpp")
pytestmark = pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")

SHAPE = (16, 3, 8, 8)
ALLOCATIONS = ("aten.empty", "aten.new_empty")


class Recorder(TorchDispatchMode):
    """Names the ops that touch a full-size tensor and collects the full-size memory they allocate."""

    def __init__(self, size):
        super().__init__()
        self.size, self.ops, self.memory = size, [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        full = [x for x in (*args, result) if isinstance(x, torch.Tensor) and x.numel() >= self.size]
        if full and not str(op).startswith((*ALLOCATIONS, "aten.detach", "aten.view")):
            self.ops.append(str(op))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            # the tensor itself is kept, so that no address is used twice
            self.memory.setdefault(result.untyped_storage().data_ptr(), result)
        return result


def record(dtype=torch.float32, x1=None, **arguments):
    x1 = torch.zeros(SHAPE) if x1 is None else x1
    o = torch.zeros(SHAPE, dtype=dtype).requires_grad_()
    inputs = {x1.untyped_storage().data_ptr(), o.untyped_storage().data_ptr()}
    with Recorder(o.numel()) as recorder:
        s = fm.sample_path(x1, seed=1, step=2, **arguments)
        s.loss(o).backward()
    expected = {s.x_t.untyped_storage().data_ptr(), o.grad.untyped_storage().data_ptr()}
    return recorder.ops, set(recorder.memory) - inputs, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["ot", "vp"])
def test_a_step_is_two_ops_of_five_passes_and_stores_only_its_results(dtype, path):
    """path_sample reads x1, writes x_t; path_loss reads o, x1 and mostly x_t, writes the gradient. Noise and target are never in memory."""
    ops, memory, expected = record(dtype, path=path)
    assert ops == ["fm_fast.path_sample.default", "fm_fast.path_loss.default"]
    assert memory == expected


def test_float16_adds_the_op_that_computes_its_gradient_late():
    ops, memory, expected = record(torch.float16)
    assert ops == ["fm_fast.path_sample.default", "fm_fast.path_loss.default", "fm_fast.path_loss_backward.default"]
    assert memory == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_adds_an_op_that_may_end_at_once_and_no_memory(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["fm_fast._ops.path_loss"], "_is_on_device", lambda number: True)
    ops, memory, expected = record(dtype)
    assert ops == ["fm_fast.path_sample.default", "fm_fast.path_loss.default", "fm_fast.path_loss_backward.default"]
    assert memory == expected


def test_bytes_are_read_as_they_are():
    ops, memory, expected = record(x1=torch.zeros(SHAPE, dtype=torch.uint8), flip=0.5, dequantise=True)
    assert ops == ["fm_fast.path_sample.default", "fm_fast.path_loss.default"]
    assert memory == expected


def test_channels_last_needs_no_copy():
    ops, memory, expected = record(x1=torch.zeros(SHAPE).to(memory_format=torch.channels_last))
    assert ops == ["fm_fast.path_sample.default", "fm_fast.path_loss.default"]
    assert memory == expected


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_raw_ops_run_with_gradient_recording_off(wants_gradient, monkeypatch):
    """With it on, each would ask torch twice about every input: a third of its time for a small batch."""
    recording = {}
    for name in ("_path_sample", "_path_loss"):
        note = lambda *arguments, name=name: recording.update({name: torch.is_grad_enabled()})  # noqa: E731
        monkeypatch.setitem(getattr(sys.modules[f"fm_fast._ops.{name[1:]}"], name), "cpp", note)
    o = torch.zeros(SHAPE).requires_grad_(wants_gradient)
    fm.sample_path(torch.zeros(SHAPE), seed=1, step=2).loss(o)
    assert recording == {"_path_sample": False, "_path_loss": False}
    assert torch.is_grad_enabled()


def test_what_names_stand_for_is_made_once():
    names = ("vp", "noise", "stratified")
    assert _spec.path_spec(*names, *_spec.DATA_AS_IS) is _spec.path_spec(*names, *_spec.DATA_AS_IS)
    assert _spec.path_spec(*names, *_spec.DATA_AS_IS) == _spec.path_spec(fm.VP(), "noise", "stratified", *_spec.DATA_AS_IS)
    assert _spec.path_spec(*names, 0.5, 256, False).flip == 0.5


def test_an_op_that_fails_leaves_gradients_on():
    def broken():
        assert not torch.is_grad_enabled()
        raise RuntimeError("no memory")

    try:
        with pytest.raises(RuntimeError, match="no memory"):
            guard.run(broken)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
