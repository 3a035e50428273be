"""The software GPU (tests/software_gpu) is as strict as CUDA: late, without waits that nobody asked for, and with captures that break."""

import pytest
import torch

import fm_fast as fm

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
    x, before = torch.ones(1, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(x)
    torch.cuda.set_stream(before)
