"""ImageNet of few pixels, in both forms in which it is downloaded, in memory and mapped; a message for every kind of damage."""

import os
import pickle

import pytest
from image_files import random_images, write_idx

from fm_fast.train.data import load_dataset
from fm_fast.train.data.readers import downsampled_imagenet
from fm_fast.train.data.readers.mapped import _mapped
from fm_fast.train.prepare import Preparation

np = pytest.importorskip("numpy")
SIDE, COUNTS, LABELS = 8, (3, 2), [1, 1000, 7, 7, 500]


def write(file, pixels, labels):
    """As in the official files: str keys, labels in a list where pickled, and a mean beside."""
    batch = {"data": pixels, "labels": labels, "mean": np.zeros(pixels.shape[-1])}
    if file.suffix == ".npz":
        np.savez(file, **{name: np.asarray(value) for name, value in batch.items()})
    else:
        file.write_bytes(pickle.dumps(batch, protocol=3))


def write_parts(folder, suffix, train="", test=""):
    """Images [5, 3, 8, 8] of two training batches, of which the second is held out once more."""
    pixels = random_images(5, 3 * SIDE * SIDE)
    for number, rows in ((1, slice(0, 3)), (2, slice(3, 5))):
        (folder / train).mkdir(exist_ok=True)
        write(folder / train / f"train_data_batch_{number}{suffix}", pixels[rows], LABELS[rows])
    (folder / test).mkdir(exist_ok=True)
    write(folder / test / f"val_data{suffix}", pixels[3:], LABELS[3:])
    return pixels.reshape(5, 3, SIDE, SIDE)


def mapped(folder, **settings):
    return Preparation(memory_limit=0.0, cache=str(folder / "cache"), **settings)


@pytest.mark.parametrize("limit", [4.0, 0.0])
@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize(("train", "test"), [("", ""), ("Imagenet8_train", "Imagenet8_val")])
def test_both_forms(tmp_path, suffix, train, test, limit):
    data = tmp_path / "imagenet"
    data.mkdir()
    pixels = write_parts(data, suffix, train, test)
    preparation = Preparation(memory_limit=limit, cache=str(tmp_path / "cache"))
    whole, held_out = (load_dataset(data, split, preparation) for split in ("train", "test"))
    assert np.array_equal(whole.images.numpy(), pixels) and whole.labels.tolist() == [label - 1 for label in LABELS]
    assert np.array_equal(held_out.images.numpy(), pixels[3:]) and held_out.labels.tolist() == [6, 499]
    assert (whole.classes, whole.levels, whole.division, whole.mapped) == (1000, 256, "test part", limit == 0.0)
    assert whole.left_out == (f"note: {data}: 2 of ImageNet's 10 training batches",) and held_out.left_out == ()


def test_a_mapped_set_is_read_from_the_cache(tmp_path, monkeypatch):
    """Without its batches being opened again, and without changes that a process makes to its images."""
    pixels = write_parts(tmp_path, "")
    load_dataset(tmp_path, "train", mapped(tmp_path)).images.zero_()
    monkeypatch.setattr(downsampled_imagenet, "unpickled", None)
    found = load_dataset(tmp_path, "train", mapped(tmp_path))
    assert np.array_equal(found.images.numpy(), pixels) and found.labels.tolist() == [label - 1 for label in LABELS]
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".npz", ".u8"]


def test_a_batch_that_changed_is_read_again(tmp_path):
    write_parts(tmp_path, "")
    load_dataset(tmp_path, "train", mapped(tmp_path))
    file = tmp_path / "train_data_batch_2"
    write(file, np.full((2, 3 * SIDE * SIDE), 9, np.uint8), LABELS[3:])
    os.utime(file, ns=(1, 1))
    assert (load_dataset(tmp_path, "train", mapped(tmp_path)).images[3:] == 9).all()


def test_a_mapped_set_may_be_larger_than_the_memory(tmp_path):
    """Of which the system wants no share for it."""
    file, size = tmp_path / "pixels.u8", 1 << 43
    with file.open("wb") as opened:
        try:
            opened.truncate(size)
        except OSError:
            pytest.skip("this file system has no files of 8 TiB")
    images = _mapped(file, size)
    images[-1] = 7
    assert images[0] == 0 and images[-1] == 7 and file.stat().st_size == size


def test_numbers_are_counted(tmp_path):
    for number in range(1, 12):
        write(tmp_path / f"train_data_batch_{number}", np.full((1, 3), 100 + number, np.uint8), [number])
    found = load_dataset(tmp_path)
    assert found.images[:, 0, 0, 0].tolist() == list(range(101, 112)) and found.division == "undivided" and found.left_out == ()


def test_all_batches_are_of_one_form(tmp_path):
    """No size is mixed with another: here 8x8, pickled, lie beside the archives of 1x1."""
    write_parts(tmp_path, "", "Imagenet8_train", "Imagenet8_val")
    (tmp_path / "Imagenet1_train_npz").mkdir()
    write(tmp_path / "Imagenet1_train_npz" / "train_data_batch_1.npz", np.full((1, 3), 42, np.uint8), [1])
    assert load_dataset(tmp_path).images.flatten().tolist() == [42] * 3 and load_dataset(tmp_path, "test").division == "undivided"


def test_two_sets_in_one_folder_are_refused(tmp_path):
    for size in (32, 64):
        (tmp_path / f"Imagenet{size}_train").mkdir()
        write(tmp_path / f"Imagenet{size}_train" / "train_data_batch_1", random_images(2, 12), [1, 2])
    with pytest.raises(
        ValueError, match=r"expected one set of images, found .*Imagenet32_train.* and .*Imagenet64_train.*; name the folder"
    ):
        load_dataset(tmp_path)


def test_batches_within_a_folder_of_other_data_are_left_alone(tmp_path):
    images, _ = write_idx(tmp_path)
    (tmp_path / "imagenet").mkdir()
    write_parts(tmp_path / "imagenet", "")
    assert np.array_equal(load_dataset(tmp_path).images[:, 0].numpy(), images)


def test_the_test_part_alone(tmp_path):
    write(tmp_path / "val_data", random_images(2, 12), [1, 2])
    assert len(load_dataset(tmp_path, "test")) == 2
    with pytest.raises(FileNotFoundError, match="expected train_data_batch_1 and so on beside val_data"):
        load_dataset(tmp_path)


def test_without_a_test_part_images_in_memory_are_divided(tmp_path):
    write(tmp_path / "train_data_batch_1.npz", random_images(10, 12), [1] * 10)
    assert [len(load_dataset(tmp_path, split, Preparation(test_share=0.2))) for split in ("train", "test")] == [8, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_share": 0.2}, "test_share: expected 0 above memory_limit, where the test part is val_data, got 0.2"),
        ({"pool": 2}, "pool, pad: expected 1 and 0 for 0.00 GiB of images, above memory_limit 0, got 2 and 0"),
        ({"pad": 1}, "pool, pad: expected 1 and 0 for 0.00 GiB of images, above memory_limit 0, got 1 and 1"),
        ({"resize": 4}, "resize: expected 0 or 2 for images of that size, which only image files are brought to, got 4"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_cache_is_written(tmp_path, settings, message):
    write(tmp_path / "train_data_batch_1.npz", random_images(10, 12), [1] * 10)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path, "train", mapped(tmp_path, **settings))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_data_batch_2", b"", "train_data_batch_2: expected a downsampled ImageNet pickle"),
        ("train_data_batch_2", b"cos\nsystem\n(S'true'\ntR.", "got: os.system is not allowed in a data set"),
        ("train_data_batch_2", pickle.dumps([1]), "train_data_batch_2: expected a dictionary with arrays data and labels, got list"),
        ("train_data_batch_2", pickle.dumps({"data": 1}), "expected a dictionary with arrays data and labels, got dict: 'labels'"),
        ("train_data_batch_2", pickle.dumps(np.zeros(3)), "expected a dictionary with arrays data and labels, got ndarray"),
        ("train_data_batch_1.npz", b"", "train_data_batch_1.npz: expected a readable .npz archive"),
        ("train_data_batch_2", (random_images(2, 192), [True, True]), r"expected labels 1..1000, one an image, got bool"),
        ("train_data_batch_2", (random_images(2, 192), np.array([1j, 1])), r"expected labels 1..1000, one an image, got complex128"),
        ("train_data_batch_2", (random_images(2, 192), [0, 3]), r"train_data_batch_2: expected labels 1..1000, one an image, got .*\[2\]"),
        ("train_data_batch_2", (random_images(2, 192), [1, 1001]), r"expected labels 1..1000, one an image"),
        ("train_data_batch_2", (random_images(2, 192), [0.5, 1.0]), r"expected labels 1..1000, one an image, got float64"),
        ("train_data_batch_2", (random_images(2, 192), []), r"expected labels 1..1000, one an image"),
        (
            "train_data_batch_2",
            (random_images(2, 192), [1]),
            r"expected uint8 pixels \[1, 3 S S\], .*, got uint8 \[2, 192\]",
        ),
        ("train_data_batch_2", (random_images(2, 191), [1, 2]), r"expected uint8 pixels \[2, 3 S S\], .* \[2, 191\]"),
        ("train_data_batch_2", (random_images(2, 192) / 255.0, [1, 2]), r"expected uint8 pixels .*, got float64"),
        ("train_data_batch_2", (random_images(2, 3 * 16 * 16), [1, 2]), "expected 8x8 images like train_data_batch_1, got 16x16"),
    ],
)
def test_damage(tmp_path, name, content, message):
    write_parts(tmp_path, "")
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        write(tmp_path / name, *content)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
def test_labels_of_any_integers_in_pickles_of_any_protocol(tmp_path, kind, protocol):
    for number, labels in ((1, np.array([1, 999], dtype=kind)), (2, [kind(5), kind(7)])):
        batch = {"data": random_images(2, 12), "labels": labels}
        (tmp_path / f"train_data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=protocol))
    assert load_dataset(tmp_path).labels.tolist() == [0, 998, 4, 6]


def test_a_missing_batch_is_named(tmp_path):
    write_parts(tmp_path, "")
    (tmp_path / "train_data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected train_data_batch_1, found train_data_batch_2$"):
        load_dataset(tmp_path)
