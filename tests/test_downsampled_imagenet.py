"""ImageNet of few pixels, in both forms in which it is downloaded, in memory and mapped; a message for every kind of damage."""

import pickle

import pytest
from image_files import random_images

from fm_fast.train.data import load_dataset
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


@pytest.mark.parametrize("limit", [4.0, 0.0])
@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize(("train", "test"), [("", ""), ("Imagenet8_train", "Imagenet8_val")])
def test_both_forms(tmp_path, suffix, train, test, limit):
    data = tmp_path / "imagenet"
    data.mkdir()
    pixels = write_parts(data, suffix, train, test)
    preparation = Preparation(memory_limit=limit, cache=str(tmp_path / "cache"))
    for _ in range(2):  # the second time from the cache
        whole, held_out = (load_dataset(data, split, preparation) for split in ("train", "test"))
        assert np.array_equal(whole.images.numpy(), pixels) and whole.labels.tolist() == [label - 1 for label in LABELS]
        assert np.array_equal(held_out.images.numpy(), pixels[3:]) and held_out.labels.tolist() == [6, 499]
        assert (whole.classes, whole.levels, whole.division, whole.mapped) == (1000, 256, "test part", limit == 0.0)
    assert limit or len(list((tmp_path / "cache").iterdir())) == 2


def test_a_batch_that_changed_is_read_again(tmp_path):
    write_parts(tmp_path, "")
    preparation = Preparation(memory_limit=0.0, cache=str(tmp_path / "cache"))
    load_dataset(tmp_path, "train", preparation)
    write(tmp_path / "train_data_batch_2", np.full((4, 3 * SIDE * SIDE), 9, np.uint8), [1] * 4)
    found = load_dataset(tmp_path, "train", preparation)
    assert len(found) == 7 and (found.images[3:] == 9).all()


def test_numbers_are_counted_and_archives_come_first(tmp_path):
    for number in range(1, 12):
        write(tmp_path / f"train_data_batch_{number}", np.full((1, 3), 100 + number, np.uint8), [number])
    write(tmp_path / "train_data_batch_2.npz", np.full((1, 3), 42, np.uint8), [1])
    found = load_dataset(tmp_path)
    assert found.images[:, 0, 0, 0].tolist() == [101, 42, *range(103, 112)] and found.division == "undivided"


def test_without_a_test_part_images_in_memory_are_divided(tmp_path):
    write(tmp_path / "train_data_batch_1.npz", random_images(10, 12), [1] * 10)
    assert [len(load_dataset(tmp_path, split, Preparation(test_share=0.2))) for split in ("train", "test")] == [8, 2]
    mapped = Preparation(test_share=0.2, memory_limit=0.0, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="above memory_limit, expected test_share 0 for data without a test part, or a higher limit"):
        load_dataset(tmp_path, "train", mapped)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_data_batch_2", b"", "train_data_batch_2: expected a downsampled ImageNet pickle"),
        ("train_data_batch_2", b"cos\nsystem\n(S'true'\ntR.", "got: os.system is not allowed in a data set"),
        ("train_data_batch_2", pickle.dumps([1]), "train_data_batch_2: expected a dictionary with arrays data and labels, got list"),
        ("train_data_batch_2", pickle.dumps({"data": 1}), "expected a dictionary with arrays data and labels, got dict: 'labels'"),
        ("train_data_batch_2.npz", b"", "train_data_batch_2.npz: expected a readable .npz archive"),
        ("train_data_batch_2", (random_images(2, 192), [0, 3]), r"train_data_batch_2: expected labels 1..1000, one an image, got .*\[2\]"),
        ("train_data_batch_2", (random_images(2, 192), [1, 1001]), r"expected labels 1..1000, one an image"),
        ("train_data_batch_2", (random_images(2, 192), [0.5, 1.0]), r"expected labels 1..1000, one an image, got torch.float64"),
        ("train_data_batch_2", (random_images(2, 192), []), r"expected labels 1..1000, one an image"),
        (
            "train_data_batch_2",
            (random_images(2, 192), [1]),
            r"expected uint8 pixels \[1, 3 S S\], .*, got torch.uint8 \[2, 192\]",
        ),
        ("train_data_batch_2", (random_images(2, 191), [1, 2]), r"expected uint8 pixels \[2, 3 S S\], .* \[2, 191\]"),
        ("train_data_batch_2", (random_images(2, 192) / 255.0, [1, 2]), r"expected uint8 pixels .*, got torch.float64"),
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


def test_a_missing_batch_is_named(tmp_path):
    write_parts(tmp_path, "")
    (tmp_path / "train_data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected train_data_batch_1, found train_data_batch_2$"):
        load_dataset(tmp_path)
