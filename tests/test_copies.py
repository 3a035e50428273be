"""Copies of a PathSample, as workers and checkpoints make them, and what was changed since it was drawn."""

import copy
import pickle

import pytest
import torch

import fm_fast as fm

X1 = torch.linspace(-2.0, 2.0, 24).reshape(4, 6)
SEEDED = {"seed": 3, "step": 2}


def pickled(sample):
    return pickle.loads(pickle.dumps(sample))


def sent_to_a_worker(sample):
    loader = torch.utils.data.DataLoader([0], collate_fn=lambda rows: sample, num_workers=1)
    return next(iter(loader))


COPIES = [copy.copy, copy.deepcopy, pickled, sent_to_a_worker]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("settings", [{}, {"x0": X1.flip(0)}, {"backend": "reference"}], ids=["drawn", "given", "reference"])
def test_a_copy_has_the_same_loss(copied, settings):
    sample = fm.sample_path(X1.clone().mul_(1.0), **SEEDED, **settings)  # written to before: the copy's tensors begin to count anew
    other = copied(sample)
    assert torch.equal(other.loss(X1), sample.loss(X1)) and torch.equal(other.target, sample.target)


@pytest.mark.parametrize("copied", COPIES)
def test_what_was_changed_before_the_copy_is_refused_by_it_too(copied):
    x1 = X1.clone()
    sample = fm.sample_path(x1, **SEEDED)
    x1.add_(1.0)
    other = copied(sample)
    with pytest.raises(RuntimeError, match="x1 or x0 was changed in place since sample_path"):
        other.loss(X1)


def test_what_was_changed_has_no_target_and_no_noise():
    for changed in ("x1", "x0"):
        given = {"x1": X1.clone(), "x0": X1.flip(0).clone()}
        sample = fm.sample_path(given["x1"], x0=given["x0"], **SEEDED)
        given[changed].add_(1.0)
        for read in ("target", "x0"):
            with pytest.raises(RuntimeError, match="changed in place since sample_path, and is read again"):
                getattr(sample, read)
