"""Two processes over gloo: different noise without a seed, and with one, the same gradient as one process with the whole batch."""

import warnings

import pytest
import torch
from copies import two_processes
from torch.nn.parallel import DistributedDataParallel

import fm_fast as fm

BATCH = 4


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64)


def gradient(model, x1, first_id):
    fm.flow_matching_loss(lambda x, t: model(x), x1, seed=1, step=2, sample_ids=first_id).backward()
    return next(model.parameters()).grad


def data():
    return torch.randn(2 * BATCH, 64, generator=torch.Generator().manual_seed(1))


def told_of_equal_noise(ids):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fm.sample_path(torch.zeros(BATCH, 64), seed=1, step=2, sample_ids=ids)
    return ["process group of 2 ranks, which all draw the same noise" in str(warning.message) for warning in told]


def work(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    unseeded = fm.sample_path(torch.zeros(BATCH, 64)).x0
    warned = [told_of_equal_noise(ids) for ids in (None, 0, rank * BATCH)]
    shared = gradient(DistributedDataParallel(network()), data()[rank * BATCH : (rank + 1) * BATCH], rank * BATCH)
    results[rank] = (unseeded.tolist(), shared.tolist(), warned)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes drew and computed."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        two_processes(work, (store, results))
        return [(torch.tensor(unseeded), torch.tensor(shared), warned) for unseeded, shared, warned in (results[0], results[1])]


def test_ranks_seeded_alike_draw_different_noise(ranks):
    (first, *_), (second, *_) = ranks
    assert not bool((first == second).any())
    torch.manual_seed(0)
    assert torch.equal(first, fm.sample_path(torch.zeros(BATCH, 64)).x0)


def test_a_seed_without_ids_is_told_in_a_group_and_nowhere_else(ranks):
    assert [warned for *_, warned in ranks] == [[[True], [], []]] * 2 and told_of_equal_noise(None) == []


def test_data_parallel_training_equals_one_process_with_the_whole_batch(ranks):
    whole = gradient(network(), data(), 0)
    for _, shared, _ in ranks:
        torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-7)
