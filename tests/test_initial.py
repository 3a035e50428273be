"""Runs that begin with the weights of another: fine-tuning."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_helpers import assert_same_state, flat, tiny

from fm_fast.cli import main
from fm_fast.nn import UNetConfig
from fm_fast.train import load_model, train
from fm_fast.train.storage.initial import initial_weights
from fm_fast.train.storage.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "batch_size": 4}
STILL = 1e-30  # a learning rate that changes no weight


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    train(tiny(**QUICK, steps=3, out=str(folder), learning_rate=0.01))
    return folder


@pytest.fixture
def other_data(tmp_path):
    """Images of three classes."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(256, size=(24, 8, 8), dtype=np.uint8), np.arange(24) % 3
    np.savez(tmp_path / "other.npz", images=images, labels=labels, test_images=images, test_labels=labels)
    return tmp_path / "other.npz"


def weights_of(path, kind="last"):
    return load_model(path, kind)[0].state_dict()


def test_a_run_begins_with_the_average_of_another(source, tmp_path, capsys):
    train(tiny(**QUICK, steps=1, out=str(tmp_path), learning_rate=STILL, init_from=str(source), seed=5))
    assert f"begins with the average of {source}\n" in capsys.readouterr().out
    expected = flat(load_model(source)[0])
    assert torch.equal(flat(load_model(tmp_path, "last")[0]), expected)
    torch.testing.assert_close(flat(load_model(tmp_path, "average")[0]), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(expected, flat(load_model(source, "last")[0])), "the source has two kinds of weights"


def test_the_command_takes_the_network_too_and_other_classes_begin_anew(source, other_data, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--data", str(other_data), "--init-from", str(source), "--out", str(out), "--device", "cpu"]
    quick = ["--steps", "1", "--warmup", "0", "--batch-size", "4", "--sample-steps", "1", "--learning-rate", str(STILL)]
    assert main([*command, *quick]) == 0
    assert "but for the embedding of the classes: 10 there, 3 here" in capsys.readouterr().out
    found, expected, source_config = weights_of(out), weights_of(source, "average"), load_model(source)[1]
    assert {name for name, value in found.items() if name not in expected or value.shape != expected[name].shape} == {"label.table.weight"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items() if name != "label.table.weight")
    stored = load_model(out)[1]
    assert (stored.model.channels, stored.model.multipliers, stored.model.classes) == (
        source_config.model.channels,
        source_config.model.multipliers,
        3,
    )


def test_a_network_without_classes_has_no_use_for_their_embedding(source):
    shape = UNetConfig(**{**vars(tiny().model), "image_size": 8, "image_channels": 1, "classes": 0})
    weights, text = initial_weights(tiny(init_from=str(source), conditional=False, model=shape))
    assert "label.table.weight" not in weights and "but for" not in text
    assert set(weights) == set(weights_of(source)) - {"label.table.weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ddpm"}, r"objective: expected fm-ot, as of init_from .*, got ddpm"),
        (
            {"model": UNetConfig(channels=16, multipliers=(1,), groups=4, head_channels=8)},
            r"init_from: expected a run with the same .* has model.channels 8, not",
        ),
        ({"model": replace(tiny().model, time_scale=1.0)}, r"init_from: .* has model.time_scale 1000.0, not 1.0"),
        ({"pad": 4}, r"init_from: .*images of 8 pixels, not 16"),
    ],
    ids=["objective", "network", "time", "size"],
)
def test_another_network_or_objective_is_refused(changes, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny(**{**QUICK, "steps": 1, "out": str(tmp_path), "init_from": str(source), **changes}))


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(tiny(**QUICK, steps=1, out=str(tmp_path / "a"), init_from=str(tmp_path)))
    assert main(["train", "digits", "--resume", "--init-from", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "resume, init_from: expected one of them, got both" in capsys.readouterr().err


def test_a_resumed_run_does_not_ask_for_the_source_again(source, tmp_path):
    """It is the uninterrupted run, bit for bit, although the source is gone."""
    copied = shutil.copytree(source, tmp_path / "copied")
    settings = {**QUICK, "steps": 4, "checkpoint_every": 2, "keep_checkpoints": 0, "init_from": str(copied)}
    whole = train(tiny(**settings, out=str(tmp_path / "whole"))).state
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint-00000004.pt").unlink()
    shutil.rmtree(copied)
    assert_same_state(train(tiny(**settings, out=str(tmp_path / "cut")), resuming=True).state, whole)


SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "1", "--samples-per-class", "1"]
BRIEF = ["train", "digits", "--steps", "2", "--batch-size", "4", "--no-evaluate", *SMALL]


@pytest.mark.parametrize(
    ("settings", "name", "other"), [(["--objective", "ddpm", "--preconditioned", "off"], "preconditioned", "on"),
                                    (["--sigma-min", "0.3"], "sigma_min", "0.1")],
)  # fmt: skip
def test_a_run_takes_the_task_of_the_one_that_it_begins_with(settings, name, other, tmp_path, capsys):
    """By which the same weights mean something else."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main([*BRIEF, *settings, "--out", first]) == 0
    assert main([*BRIEF, "--init-from", first, "--out", second]) == 0
    stored = [RunFolder(Path(folder)).settings() for folder in (first, second)]
    assert stored[0].recipe == stored[1].recipe and getattr(stored[1], name) != getattr(tiny(), name)
    capsys.readouterr()
    option = f"--{name.replace('_', '-')}"
    assert main([*BRIEF, "--init-from", first, option, other, "--out", str(tmp_path / "third")]) == 1
    expected = f"{name}: expected {getattr(stored[0], name)}, as of init_from {first}, got {other}"
    assert expected in capsys.readouterr().err


def test_another_objective_than_that_of_the_run_to_begin_with_is_named(tmp_path, capsys):
    first = str(tmp_path / "first")
    assert main([*BRIEF, "--sigma-min", "0.3", "--out", first]) == 0
    capsys.readouterr()
    assert main([*BRIEF, "--init-from", first, "--objective", "ddpm", "--out", str(tmp_path / "second")]) == 1
    assert capsys.readouterr().err == f"fm-fast: error: objective: expected fm-ot, as of init_from {first}, got ddpm\n"
    assert main([*BRIEF, "--init-from", first, "--preconditioned", "off", "--sigma-min", "0.1", "--out", str(tmp_path / "second")]) == 1
    assert "sigma_min: expected 0.3, as of init_from" in capsys.readouterr().err
