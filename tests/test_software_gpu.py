"""The software GPU (tests/software_gpu) is late, does not wait where nobody asked for it, and refuses what CUDA refuses."""

import contextlib
import ctypes
import os

import pytest
import torch
from copies import run_python

import fm_fast as fm
from fm_fast.train.execution.graph import leave_failed_capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_name() != "software GPU", reason="not on tests/software_gpu"),
]


def test_its_kernels_are_those_of_this_package():
    x1 = torch.ones(4, 3, 8, 8)
    wanted = fm.sample_path(x1, seed=1, step=2, backend="reference").x_t
    for backend in ("cuda", "triton"):
        torch.testing.assert_close(fm.sample_path(x1.cuda(), seed=1, step=2, backend=backend).x_t.cpu(), wanted)


def test_a_copy_that_was_not_waited_for_is_not_there():
    there, here = torch.ones(8, device="cuda"), torch.zeros(8, pin_memory=True)
    torch.cuda.synchronize()
    here.copy_(there, non_blocking=True)
    assert torch.equal(here, torch.zeros(8))
    torch.cuda.synchronize()
    assert torch.equal(here, torch.ones(8))


def test_a_stream_does_not_wait_for_another_unless_told():
    late, x = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        x.fill_(1.0)
    assert x.cpu().tolist() == [0.0] * 8
    torch.cuda.current_stream().wait_stream(late)
    assert x.cpu().tolist() == [1.0] * 8


def test_memory_is_used_again_while_another_stream_reads_it():
    other, x = torch.cuda.Stream(), torch.ones(1024, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        found = x * 2
    del x  # without record_stream
    again = torch.full((1024,), 5.0, device="cuda")
    assert again.cpu()[0] == 5.0
    other.synchronize()
    assert found.cpu()[0] == 10.0


def test_a_capture_computes_nothing_and_a_replay_reads_memory_anew():
    x, graph = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    assert not bool((y == 2).all())
    x.fill_(3.0)
    graph.replay()
    assert y.cpu().tolist() == [6.0] * 8


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: torch.cuda.synchronize()])
def test_what_waits_breaks_a_capture(wait):
    with broken_capture("captur") as x:
        wait(x)


def test_a_capture_ends_with_all_its_streams_joined():
    """And the default stream takes no part in it."""
    side = torch.cuda.Stream()
    with broken_capture("does not wait for") as x:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
    with broken_capture("captur"):
        torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())


@contextlib.contextmanager
def broken_capture(message):
    x, before, pool = torch.ones(1, device="cuda"), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
            yield x
    finally:
        leave_failed_capture(before, pool)


def test_numbers_of_the_host_are_those_of_the_call():
    x, scale, graph = torch.ones(2, device="cuda"), torch.tensor(2.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * scale
    scale.fill_(7.0)
    graph.replay()
    assert y.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("mix", [lambda x, y: x + y, lambda x, y: torch.cat([x, y]), lambda x, y: torch.add(x, x, out=y)])
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_mix(mix, other):
    with pytest.raises(RuntimeError, match="on the same device"):
        mix(torch.ones(3, device="cuda"), torch.ones(3, device=other))


def test_others_may_go_first():
    """What forks from a stream without waiting for it may also run before that stream's own work."""
    side, x = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    runtime = ctypes.CDLL("libcudart.so.13")
    runtime.software_gpu_others_first(1)
    try:
        x.fill_(1.0)
        with torch.cuda.stream(side):
            y = x * 2  # without side.wait_stream
        torch.cuda.current_stream().wait_stream(side)
        assert y.tolist() == [0.0] * 8
    finally:
        runtime.software_gpu_others_first(int(os.environ.get("SOFTWARE_GPU_ORDER") == "others-first"))


def test_a_kernel_that_fails_leaves_a_device_of_no_use():
    code = """
import torch
x = torch.arange(3, device="cuda").index_select(0, torch.tensor([100], device="cuda"))
for wait in (torch.cuda.synchronize, torch.cuda.synchronize, x.item):
    try:
        wait()
    except RuntimeError as error:
        print("failed")
"""
    done = run_python(code)
    assert done.stdout.split() == ["failed"] * 3, done.stdout + done.stderr[-2000:]
