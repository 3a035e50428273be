"""A run goes on with the data it was trained on, wherever these lie, and with no others."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_helpers import assert_same_state, tiny

from fm_fast.cli import main
from fm_fast.train import train
from fm_fast.train.data import make_dataset
from fm_fast.train.data.identity import LOOKED_AT, identity_of, same_source
from fm_fast.train.storage.checkpoint import read_checkpoint
from fm_fast.train.storage.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "batch_size": 4, "steps": 2}


def write(file, count=20, size=8, seed=0, shift=0):
    generator = np.random.default_rng(seed)
    file.parent.mkdir(exist_ok=True)
    images = generator.integers(0, 256, (count, size, size), dtype=np.uint8)
    np.savez(file, images=images, labels=(np.arange(count) + shift) % 4)
    return str(file)


def run(folder, data, resuming=False, **changes):
    return train(tiny(**{**QUICK, "out": str(folder / "run"), "data": data, **changes}), resuming)


def test_moved_data_are_the_same_data_and_their_new_place_is_stored(tmp_path, monkeypatch):
    old = write(tmp_path / "d" / "set.npz")
    straight = run(tmp_path / "straight", old, steps=4)
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "d/set.npz", steps=4, checkpoint_every=2, keep_checkpoints=0)
    RunFolder(tmp_path / "run").checkpoint(4).unlink()
    (tmp_path / "elsewhere").mkdir()
    new = str(shutil.move(old, tmp_path / "elsewhere" / "renamed.npz"))
    resumed = run(tmp_path, new, resuming=True, steps=4)
    assert_same_state(straight.state, resumed.state)
    assert read_checkpoint(RunFolder(tmp_path / "run").checkpoint(4))["config"]["data"] == new
    shutil.move(new, tmp_path / "again.npz")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--data", "again.npz", "--steps", "5"]) == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"count": 24}, r"\(images: 20 -> 24, other labels, other pixels\)"),
        ({"size": 4}, r"\(shape: \[1, 8, 8\] -> \[1, 4, 4\], other pixels\); model.image_size: 8 -> 4$"),
        ({"shift": 1}, r"\(other labels\)$"),
        ({"seed": 1}, r"\(other pixels\)$"),
    ],
)
@pytest.mark.parametrize("same_name", [True, False])
def test_other_data_are_refused(other, message, same_name, tmp_path):
    run(tmp_path, write(tmp_path / "set.npz"))
    new = write(tmp_path / ("set.npz" if same_name else "other.npz"), **other)
    with pytest.raises(ValueError, match=rf"cannot resume with other settings: data: .*set\.npz -> {new} {message}"):
        run(tmp_path, new, resuming=True)


def test_checkpoints_from_before_go_on_by_the_place_of_their_data(tmp_path, monkeypatch):
    first, second = write(tmp_path / "d" / "set.npz"), write(tmp_path / "d" / "copy.npz")
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "d/set.npz")
    file = RunFolder(tmp_path / "run").checkpoint(2)
    content = read_checkpoint(file)
    assert content.pop("data")["images"] == 20
    torch.save(content, file)
    with pytest.raises(ValueError, match=rf"data: d/set.npz -> {second}$"):
        run(tmp_path, second, resuming=True, steps=3)
    assert run(tmp_path, first, resuming=True, steps=3).state.step == 3


def test_settings_that_prepare_the_data_are_named_themselves(tmp_path):
    data = write(tmp_path / "set.npz")
    run(tmp_path, data)
    with pytest.raises(ValueError, match=r"cannot resume with other settings: pool: 1 -> 2; model\.image_size: 8 -> 4$"):
        run(tmp_path, data, resuming=True, pool=2)


def test_settings_of_the_network_are_named_one_by_one(tmp_path):
    data = write(tmp_path / "set.npz")
    run(tmp_path, data)
    with pytest.raises(ValueError, match=r"cannot resume with other settings: model\.channels: 8 -> 16; model\.blocks: 1 -> 2$"):
        run(tmp_path, data, resuming=True, model=replace(tiny().model, channels=16, blocks=2))


def test_an_identity_is_small_and_plain():
    images = torch.arange(1000 * 4, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(1000, 2, 2)
    data = make_dataset("set", images, torch.arange(1000) % 7)
    found = identity_of(data)
    assert (found["images"], found["shape"], found["classes"], found["levels"]) == (1000, [1, 2, 2], 7, 256)
    assert len(found["labels"]) == len(found["pixels"]) == 64 and LOOKED_AT == 16
    assert identity_of(replace(data, name="other")) == found


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_source("digits", "digits") and same_source("a/../b", str(tmp_path / "b"))
    assert not same_source("digits", str(tmp_path / "digits")) and not same_source("a", "b")


def moved(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    np.savez(old, images=images, labels=np.arange(24) % 3, test_images=images[:8], test_labels=np.arange(8) % 3)
    run(tmp_path, str(old))
    shutil.move(old, new)
    return str(old), str(new)


def test_a_finished_run_is_evaluated_with_its_data_at_their_new_place(tmp_path, capsys):
    old, new = moved(tmp_path)
    arguments = ["evaluate", str(tmp_path / "run"), "--no-bits", "--method", "euler", "--steps", "1"]
    assert main(arguments) == 1 and "old.npz: no such file" in capsys.readouterr().err
    assert main([*arguments, "--data", new]) == 0
    assert f"warning: the run's data, {old}, are not there: training images are those of " in capsys.readouterr().err


def test_a_finished_run_remembers_the_new_place_of_its_data(tmp_path, capsys):
    _, new = moved(tmp_path)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--data", new]) == 0
    told = capsys.readouterr().out
    assert "no step was left to take; there are " in told and "trained in" not in told
    assert read_checkpoint(RunFolder(tmp_path / "run").checkpoint(2))["config"]["data"] == new
    assert main(["evaluate", str(tmp_path / "run"), "--no-bits", "--method", "euler", "--steps", "1"]) == 0
