"""fm-fast sample --images: a PNG file a sample, whole files only, apart from those of others."""

import numpy as np
import pytest
import torch
from trainer_helpers import decode_png

from fm_fast.cli import main
from fm_fast.train.reporting import single_images
from fm_fast.train.reporting.picture import to_8_bit
from fm_fast.train.reporting.single_images import ImageFiles, require_empty

SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "1", "--no-evaluate"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "digits", "--steps", "2", "--batch-size", "8", *SMALL, "--out", str(folder)]) == 0
    return folder


def pixels(file):
    width, height, pixel, rows = decode_png(file.read_bytes())
    return np.array(rows, np.uint8).reshape(height, width, pixel).transpose(2, 0, 1)


def test_each_sample_has_a_file(run, tmp_path, capsys):
    folder, out = tmp_path / "new" / "images", tmp_path / "x.npz"
    asked = ["sample", str(run), "--classes", "7", "3", "--count", "3", "--batch-size", "2", "--images", str(folder)]
    assert main([*asked, "--out", str(out)]) == 0
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"00000{i}-class-{7 if i < 3 else 3}.png" for i in range(6)]
    expected = to_8_bit(torch.from_numpy(np.load(out)["images"]), 17).numpy()
    assert all(np.array_equal(pixels(file), image) for file, image in zip(files, expected, strict=True))
    assert f"{out}, {folder}: 6 samples by midpoint" in capsys.readouterr().out


def test_no_picture_is_drawn_unless_asked_for(run, tmp_path, monkeypatch):
    """One of 50000 samples would fill the memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert main(["sample", str(run), "--classes", "none", "--count", "2", "--images", "images"]) == 0
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["000000.png", "000001.png", "images"]


def test_samples_of_a_super_resolution_run(tmp_path):
    run, images = str(tmp_path / "run"), tmp_path / "images"
    assert main(["train", "digits", "--super-resolution", "2", "--steps", "1", "--batch-size", "8", *SMALL, "--out", run]) == 0
    assert main(["sample", run, "--count", "3", "--out", str(tmp_path / "x.npz"), "--images", str(images)]) == 0
    labels = np.load(tmp_path / "x.npz")["labels"].tolist()
    assert sorted(file.name for file in images.iterdir()) == [f"00000{i}-class-{label}.png" for i, label in enumerate(labels)]
    expected = to_8_bit(torch.from_numpy(np.load(tmp_path / "x.npz")["images"]), 17).numpy()
    assert all(np.array_equal(pixels(file), image) for file, image in zip(sorted(images.iterdir()), expected, strict=True))


def test_files_of_others_stay_apart(run, tmp_path, capsys):
    (tmp_path / "old.png").touch()
    assert main(["sample", str(run), "--images", str(tmp_path)]) == 1
    assert (
        f"images: expected a new or an empty folder, so that other images stay apart, got {tmp_path} with 1 in it"
        in capsys.readouterr().err
    )
    assert main(["sample", str(run), "--images", str(tmp_path / "old.png")]) == 1
    assert f"images: expected a folder, {tmp_path / 'old.png'} is a file" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["old.png"]


def test_a_folder_that_cannot_be_written_into_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(PermissionError, match=r"images: expected a folder that can be written into, got .*new"):
        require_empty("images", str(tmp_path / "new"))


def test_an_interruption_leaves_whole_files_only(tmp_path, monkeypatch):
    images, labels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2), torch.arange(5)
    files = ImageFiles(tmp_path, 1, 256)
    files.add(images[:2], labels[:2])

    def interrupted(file, image):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(single_images, "write_png", interrupted)
        files.add(images[2:], labels[2:])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000-class-0.png", "000001-class-1.png"]
    assert [int(pixels(file)[0, 0, 0]) for file in sorted(tmp_path.iterdir())] == [0, 1]


def test_files_are_there_before_the_next_batch_is_drawn(run, tmp_path, monkeypatch):
    add = ImageFiles.add

    def second_fails(self, images, labels):
        add(self, images, labels)
        if self._written == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ImageFiles, "add", second_fails)
    asked = ["sample", str(run), "--classes", "1", "--count", "6", "--batch-size", "2", "--images", str(tmp_path / "images")]
    assert main(asked) == 130 and len(list((tmp_path / "images").iterdir())) == 4


def test_images_that_png_does_not_hold(tmp_path):
    with pytest.raises(ValueError, match=r"images: expected a network of 1 or 3 channels, got 4; an .npz archive takes any"):
        ImageFiles(tmp_path, 4, 256)
