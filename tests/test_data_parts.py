"""What is found where: hidden files, names with a dot, missing labels and parts, and whether images are held out at all."""

import pytest
import torch
from image_files import random_images, write_cifar, write_idx, write_images

from fm_fast.cli import main
from fm_fast.train.data import SHARE, TEST_PART, UNDIVIDED, load_dataset
from fm_fast.train.prepare import Preparation

np = pytest.importorskip("numpy")


@pytest.fixture
def idx_folder(tmp_path):
    return tmp_path, *write_idx(tmp_path)


@pytest.mark.parametrize("labels_too", [True, False])
def test_idx_names_with_a_dot(labels_too, idx_folder):
    folder, images, labels = idx_folder
    for file in list(folder.iterdir()):
        if labels_too or "idx3" in file.name:
            file.rename(folder / file.name.replace("-idx", ".idx"))
    train, held_out = load_dataset(folder), load_dataset(folder, "test")
    assert np.array_equal(train.images[:, 0].numpy(), images) and train.labels.tolist() == labels.tolist()
    assert np.array_equal(held_out.images[:, 0].numpy(), images[:2])
    assert torch.equal(load_dataset(folder / "train-images.idx3-ubyte").images, train.images)


def test_cifar10_in_the_folder_above(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = write_cifar(folder, "python")
    assert np.array_equal(load_dataset(tmp_path).images.numpy(), images) and load_dataset(tmp_path, "test").labels.tolist() == labels[6:8]


def test_hidden_folders_and_images_are_no_data(tmp_path):
    write_images(tmp_path, random_images(4, 4, 4, 3))
    plain = load_dataset(tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for place in (tmp_path / ".ipynb_checkpoints" / "0.png", tmp_path / "a" / "._0.png"):
        place.write_bytes((tmp_path / "a" / "0.png").read_bytes())
    data = load_dataset(tmp_path)
    assert data.classes == 2 and torch.equal(data.images, plain.images) and torch.equal(data.labels, plain.labels)


def test_a_class_without_images_is_named(tmp_path):
    write_images(tmp_path, random_images(4, 4, 4, 3))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"expected images \(\.png, .* in every subfolder, found none in models"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "unlabelled", "message"),
    [
        ("images labels test_images", False, "expected test_images and test_labels where there are images and labels, or neither, got"),
        ("images labels test_labels", False, "expected test_images and test_labels"),
        ("images labels test_images", True, "expected test_images and test_labels"),
        ("images test_images test_labels", True, "expected test_images and test_labels"),
        ("images", False, "expected labels beside images; --no-conditional .*--classes none enlarges without, got images"),
        ("images test_images", False, "expected labels beside images; --no-conditional"),
        ("pictures", True, "expected arrays images, labels, found pictures"),
    ],
)
def test_npz_that_lacks_arrays(names, unlabelled, message, tmp_path):
    np.savez(tmp_path / "set.npz", **{name: np.zeros((4, 2, 2) if "images" in name else 4, np.uint8) for name in names.split()})
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"set\.npz: {message}"):
            load_dataset(tmp_path / "set.npz", split, Preparation(unlabelled=unlabelled))


def test_npz_without_labels(tmp_path):
    images = random_images(6, 3, 2)
    np.savez(tmp_path / "set.npz", images=images[:4], test_images=images[4:])
    train, held_out = (load_dataset(tmp_path / "set.npz", split, Preparation(unlabelled=True)) for split in ("train", "test"))
    assert np.array_equal(train.images[:, 0].numpy(), images[:4]) and np.array_equal(held_out.images[:, 0].numpy(), images[4:])
    assert (train.labels.tolist(), held_out.labels.tolist(), train.classes) == ([0] * 4, [0] * 2, 1)


def test_folder_without_classes(tmp_path):
    pixels = random_images(10, 4, 4, 3)
    write_images(tmp_path / "mixed", pixels)
    (tmp_path / "flat").mkdir()
    for file in sorted((tmp_path / "mixed").rglob("*.png")):
        file.rename(tmp_path / "flat" / file.name)
    with pytest.raises(ValueError, match=r"flat: expected a subfolder of images for each class; --no-conditional .* got 10 images"):
        load_dataset(tmp_path / "flat")
    data = load_dataset(tmp_path / "flat", "train", Preparation(unlabelled=True))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels) and data.labels.tolist() == [0] * 10 and data.classes == 1
    part = load_dataset(tmp_path / "flat", "test", Preparation(unlabelled=True, test_share=0.3))
    assert len(part) == 3 and part.division == SHARE


def names_of(data):
    """What the images are, by their constant values."""
    assert bool((data.images == data.images[:, :1, :1, :1]).all())
    return data.images[:, 0, 0, 0].tolist()


def write_constant(folder, **values):
    """A file a value: a__b__x=3 is a/b/x.png."""
    image = pytest.importorskip("PIL.Image")
    for name, value in values.items():
        file = folder / f"{name.replace('__', '/')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (4, 4), (value,) * 3).save(file)


def test_images_in_folders_within_a_class_are_of_the_class(tmp_path):
    write_constant(tmp_path, a__1=1, a__x__2=2, a__x__deep__3=3, b__x__4=4)
    (tmp_path / "a" / "x" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    write_constant(tmp_path, a__x__HIDDEN__5=5)
    (tmp_path / "a" / "x" / "HIDDEN").rename(tmp_path / "a" / "x" / ".hidden")
    data = load_dataset(tmp_path)
    assert names_of(data) == [1, 2, 3, 4] and data.labels.tolist() == [0, 0, 0, 1] and data.left_out == ()


def test_images_beside_the_classes_are_told_or_used(tmp_path):
    write_constant(tmp_path, a__1=1, b__2=2, b__x__3=3, y=4, z=5)
    (tmp_path / "labels.csv").touch()
    (tmp_path / "b" / "x" / "3.txt").touch()
    data = load_dataset(tmp_path)
    others = f"note: {tmp_path}: 2 of the files (3.txt, labels.csv) left out: no .png, .jpg, .jpeg, .bmp, .gif, .webp"
    beside = "2 of the images (y.png, z.png) left out: beside the subfolders, of no class (--no-conditional takes them)"
    assert names_of(data) == [1, 2, 3] and data.left_out == (f"warning: {tmp_path}: {beside}", others)
    data = load_dataset(tmp_path, preparation=Preparation(unlabelled=True))
    assert names_of(data) == [1, 2, 3, 4, 5] and (data.labels.tolist(), data.classes, data.left_out) == ([0] * 5, 1, (others,))


def test_what_lies_beside_the_parts_is_told(tmp_path):
    write_constant(tmp_path, train__a__1=1, val__a__2=2, test__a__3=3, more__4=4, x=5)
    (data,) = {load_dataset(tmp_path, split).left_out for split in ("train", "test")}
    assert data == (f"note: {tmp_path}: 3 of the entries (more, val, x.png) left out: beside the parts",)


def test_commands_tell_what_is_left_out(tmp_path, capsys):
    write_constant(tmp_path / "set", a__1=1, b__2=2, z=5)
    size = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--model.multipliers", "1", "--sample-steps", "1"]
    run = ["train", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "2", *size]
    assert main(run) == 0
    line = f"warning: {tmp_path / 'set'}: 1 of the images (z.png) left out: beside the subfolders, of no class"
    assert line in capsys.readouterr().out
    assert main(["likelihood", str(tmp_path / "run"), "--steps", "1"]) == 0
    assert f"fm-fast: {line}" in capsys.readouterr().err


def test_data_tell_how_they_are_divided(tmp_path, idx_folder):
    def division(source, share):
        parts = {load_dataset(source, split, Preparation(test_share=share)).division for split in ("train", "test")}
        assert len(parts) == 1
        return parts.pop()

    np.savez(tmp_path / "whole.npz", images=random_images(10, 4, 4), labels=np.zeros(10, np.int64))
    write_images(tmp_path / "pictures", random_images(10, 4, 4, 3))
    for source in (tmp_path / "whole.npz", tmp_path / "pictures", tmp_path / "train-images-idx3-ubyte"):
        assert (division(source, 0.0), division(source, 0.4)) == (UNDIVIDED, SHARE)
    write_images(tmp_path / "parts" / "train", random_images(4, 4, 4, 3))
    write_images(tmp_path / "parts" / "val", random_images(4, 4, 4, 3))
    for source in ("digits", tmp_path, tmp_path / "parts"):
        assert (division(source, 0.0), division(source, 0.4)) == (TEST_PART, TEST_PART)
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    assert (division(tmp_path, 0.0), division(tmp_path, 0.4)) == (UNDIVIDED, SHARE)


def test_other_than_folders_of_images_are_not_resized(tmp_path, idx_folder):
    np.savez(tmp_path / "set.npz", images=random_images(4, 6, 6), labels=np.zeros(4, np.int64))
    for source, size in (("digits", "8x8"), (tmp_path / "set.npz", "6x6"), (tmp_path, "4x3")):
        with pytest.raises(
            ValueError, match=rf"resize: expected 0 for .* of {size} pixels, because only image files are resized .*, got 4"
        ):
            load_dataset(source, "train", Preparation(resize=4))
    assert load_dataset("digits", "train", Preparation(resize=8)).images.shape[-1] == 8, "nothing to do"


def test_other_than_folders_of_images_are_not_converted(tmp_path):
    np.savez(tmp_path / "set.npz", images=random_images(4, 6, 6, 3), labels=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"grey: expected off for set\.npz of 3 channels, because only image files are converted"):
        load_dataset(tmp_path / "set.npz", "train", Preparation(grey=True))
    assert load_dataset("digits", "train", Preparation(grey=True)).images.shape[1] == 1, "nothing to do"


def test_data_of_one_size_can_be_exempt_from_preparation(tmp_path):
    images, labels = np.arange(96, dtype=np.uint8).reshape(6, 1, 4, 4), np.arange(6)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    exempt = load_dataset(tmp_path / "set.npz", "test", Preparation(pool=2, pad=1, test_share=0.5, as_is=4))
    assert np.array_equal(exempt.images.numpy(), images) and exempt.labels.tolist() == labels.tolist()
    other = load_dataset(tmp_path / "set.npz", "test", Preparation(pool=2, pad=1, test_share=0.5, as_is=2))
    assert other.images.shape == (3, 1, 4, 4) and int(other.images[:, :, 0].max()) == 0
