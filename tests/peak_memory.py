"""Peak memory by torch's profiler, which no other process disturbs."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step):
    """Most bytes alive at once that the step allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most
