"""Readers against files written here by independent means, a message for every kind of damage, and the order of training."""

import errno
import gzip
import io
import os
import pickle
import struct
import tarfile
from dataclasses import replace

import pytest
import torch

from fm_fast.train.data import DataOrder, digits, epoch_order, load_dataset, make_dataset
from fm_fast.train.prepare import Preparation

np = pytest.importorskip("numpy")


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array):
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    images, labels = random_images(5, 4, 3), np.array([0, 1, 2, 1, 0], dtype=np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images[:2])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels[:2])))
    return tmp_path, images, labels


def test_digits_are_split_into_1500_and_297_with_17_levels():
    train, held_out = digits("train"), digits("test")
    assert train.images.shape == (1500, 1, 8, 8) and held_out.images.shape == (297, 1, 8, 8)
    assert (train.images.dtype, train.labels.dtype, train.levels, train.classes) == (torch.uint8, torch.int64, 17, 10)
    assert train.images.max() == 16 and train.images.min() == 0
    assert train.labels.bincount().min() >= 130 and held_out.labels.bincount().min() >= 20
    together = torch.cat([train.images, held_out.images]).flatten(1)
    assert together.unique(dim=0).shape[0] == 1797, "no image is in both splits"


def test_digits_are_the_uci_test_set():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    order = np.random.default_rng(0).permutation(1797)
    together = torch.cat([digits("train").images, digits("test").images])[:, 0]
    assert np.array_equal(together.numpy(), original.images[order])
    assert np.array_equal(torch.cat([digits("train").labels, digits("test").labels]).numpy(), original.target[order])


def test_idx_folder(idx_folder):
    folder, images, labels = idx_folder
    train, held_out = load_dataset(folder), load_dataset(folder, "test")
    assert np.array_equal(train.images[:, 0].numpy(), images) and train.labels.tolist() == labels.tolist()
    assert np.array_equal(held_out.images[:, 0].numpy(), images[:2]) and train.classes == 3
    assert torch.equal(load_dataset(folder / "train-images-idx3-ubyte").images, train.images)


def damage_truncated(folder):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    return ValueError, r"train-images-idx3-ubyte: expected 60 bytes of data for shape \[5, 4, 3\], got 59"


def damage_magic(folder):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(b"\x00\x00\x0d\x03" + file.read_bytes()[4:])
    return ValueError, "expected IDX magic number 0x00000803 .*got 0x00000d03"


def damage_header(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08")
    return ValueError, "expected an IDX header of 16 bytes, got a file of 3 bytes"


def damage_count(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4, dtype=np.uint8)))
    return ValueError, r"expected one label an image, 5, got \[4\]"


def damage_labels_missing(folder):
    (folder / "train-labels-idx1-ubyte").unlink()
    return FileNotFoundError, "train-labels-idx1-ubyte: no such IDX file"


def damage_images_missing(folder):
    (folder / "train-images-idx3-ubyte").unlink()
    return FileNotFoundError, "expected train-images-idx3-ubyte"


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_magic, damage_header, damage_count, damage_labels_missing, damage_images_missing]
)
def test_damaged_idx(idx_folder, damage):
    error, message = damage(idx_folder[0])
    with pytest.raises(error, match=message):
        load_dataset(idx_folder[0])


def test_truncated_gzip(idx_folder):
    file = idx_folder[0] / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz: expected a complete gzip file"):
        load_dataset(idx_folder[0], "test")


def cifar_parts():
    images = random_images(10, 3072)
    labels = [number % 10 for number in range(10)]
    return [(images[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]) for i in range(5)], images, labels


def python_batch(pixels, labels):
    # As in the official files: protocol 2, keys that are byte strings.
    return pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x"}, protocol=2)


def binary_batch(pixels, labels):
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


def write_cifar(folder, form):
    parts, images, labels = cifar_parts()
    write, suffix = (python_batch, "") if form == "python" else (binary_batch, ".bin")
    for number, part in enumerate(parts, start=1):
        (folder / f"data_batch_{number}{suffix}").write_bytes(write(*part))
    (folder / f"test_batch{suffix}").write_bytes(write(*parts[3]))
    return images.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10(tmp_path, form, packed):
    folder = tmp_path / "cifar-10-batches"
    folder.mkdir()
    images, labels = write_cifar(folder, form)
    source = folder
    if packed:
        source = tmp_path / "cifar-10.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(folder, arcname=folder.name)
    train, held_out = load_dataset(source), load_dataset(source, "test")
    assert np.array_equal(train.images.numpy(), images) and train.labels.tolist() == labels
    assert np.array_equal(held_out.images.numpy(), images[6:8]) and (train.classes, train.levels) == (10, 256)


def test_cifar_pickle_cannot_run_code(tmp_path):
    write_cifar(tmp_path, "python")
    (tmp_path / "data_batch_2").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_2: expected a CIFAR-10 pickle, got: os.system is not allowed"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_batch_3: expected a CIFAR-10 pickle"),
        (b"not a pickle", "data_batch_3: expected a CIFAR-10 pickle"),
        (pickle.dumps([1]), "expected a dictionary with b'data' and b'labels', got list"),
        (python_batch(random_images(2, 3071), [0, 1]), r"expected uint8 images \[N, 3072\], got .*3071"),
        (python_batch(random_images(2, 3072), [0]), "expected 2 labels, one an image, got 1"),
        (python_batch(random_images(2, 3072), [0, 11]), r"expected labels in 0..9, got 0..11"),
    ],
)
def test_damaged_cifar_pickle(tmp_path, content, message):
    write_cifar(tmp_path, "python")
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path)


def test_damaged_cifar_binary(tmp_path):
    write_cifar(tmp_path, "binary")
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x00" * 3072)
    with pytest.raises(ValueError, match=r"data_batch_1.bin: expected a multiple of 3073 bytes, got 3072"):
        load_dataset(tmp_path)
    (tmp_path / "data_batch_5.bin").unlink()
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x00" * 3073)
    with pytest.raises(FileNotFoundError, match="expected a CIFAR-10 batch data_batch_5"):
        load_dataset(tmp_path)


def test_truncated_archive(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("cifar/data_batch_1.bin")
        member.size = 30730
        archive.addfile(member, io.BytesIO(random_images(30730).tobytes()))
    (tmp_path / "cifar.tar.gz").write_bytes(buffer.getvalue()[:5000])
    with pytest.raises(ValueError, match=r"cifar.tar.gz: expected a complete tar archive"):
        load_dataset(tmp_path / "cifar.tar.gz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 3, 6, 5)])
def test_npz(tmp_path, save, shape):
    images, labels = random_images(*shape), np.array([0, 3, 1, 2])
    save(tmp_path / "set.npz", images=images, labels=labels, extra=np.zeros(2))
    data = load_dataset(tmp_path / "set.npz")
    assert np.array_equal(data.images.numpy(), images if len(shape) == 4 else images[:, None])
    assert data.labels.tolist() == [0, 3, 1, 2] and data.classes == 4


def test_damaged_npz(tmp_path):
    file = tmp_path / "set.npz"
    file.write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(ValueError, match=r"set.npz: expected a readable .npz archive"):
        load_dataset(file)
    np.savez(file, pictures=random_images(1, 2, 2))
    with pytest.raises(ValueError, match=r"expected arrays images, labels, found .*pictures"):
        load_dataset(file)
    np.savez(file, images=random_images(2, 2, 2).astype(np.float32), labels=np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match=r"set.npz\[images\]: expected an array of integers .* got dtype float32"):
        load_dataset(file)
    np.savez(file, images=random_images(2, 3, 2), labels=np.array([None, "x"], dtype=object))
    with pytest.raises(ValueError, match=r"expected a readable .npz archive, got: Object arrays cannot be loaded"):
        load_dataset(file)


def test_npz_in_fortran_order(tmp_path):
    images = random_images(2, 3, 2)
    np.savez(tmp_path / "set.npz", images=np.asfortranarray(images), labels=np.zeros(2, dtype=np.int32))
    assert np.array_equal(load_dataset(tmp_path / "set.npz").images[:, 0].numpy(), images)


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = random_images(3, 4, 5, 3)
    for number, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.fromarray(pixels[number]).save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    data = load_dataset(tmp_path)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert data.labels.tolist() == [0, 0, 1] and data.classes == 2


def test_damaged_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(FileNotFoundError, match="expected IDX files, CIFAR-10 batches, or a subfolder"):
        load_dataset(tmp_path)
    (tmp_path / "a").mkdir()
    image.fromarray(random_images(4, 4, 3)).save(tmp_path / "a" / "1.png")
    image.fromarray(random_images(4, 5, 3)).save(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match=r"2.png: expected 4x4 pixels like 1.png, got 4x5"):
        load_dataset(tmp_path)
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2.png: expected a readable image"):
        load_dataset(tmp_path)


def test_unknown_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected 'digits', 'fashion' or a path"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"data.csv: expected a .npz"):
        load_dataset(tmp_path / "data.csv")
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        load_dataset("digits", "val")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(2, dtype=torch.int64), "expected images uint8"),
        (torch.zeros(0, 3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "not empty"),
        (torch.full((1, 3, 3), 17, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), "expected pixel values below 17, got 17"),
        (torch.zeros(1, 3, 3, dtype=torch.uint8), torch.full((1,), -1), "expected labels in"),
    ],
)
def test_wrong_tensors(images, labels, message):
    with pytest.raises(ValueError, match=message):
        make_dataset("set", images, labels, levels=17)


def test_each_epoch_is_another_permutation():
    orders = [epoch_order(1500, seed=3, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1500))
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[0], epoch_order(1500, seed=4, epoch=0))
    assert torch.equal(orders[1], epoch_order(1500, seed=3, epoch=1))


def test_permutations_are_uniform():
    # First element of 400 epochs of 8 images: chi-squared with 7 degrees of freedom, below its 0.9999 quantile.
    first = torch.stack([epoch_order(8, seed=0, epoch=epoch)[0] for epoch in range(400)])
    chi_squared = ((first.bincount(minlength=8) - 50.0) ** 2 / 50.0).sum()
    assert chi_squared < 29.9


def test_order_does_not_depend_on_the_batch_size():
    whole = DataOrder(10, seed=1).indices(0, 35)
    for size in (1, 4, 7, 10, 12):
        order = DataOrder(10, seed=1)
        parts = [order.indices(first, min(size, 35 - first)) for first in range(0, 35, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(whole[e * 10 : e * 10 + 10].sort().values, torch.arange(10)) for e in range(3))


# Preparation and splits


def test_pooling_and_padding(idx_folder):
    folder, _, _ = idx_folder
    images = random_images(3, 6, 4)
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, dtype=np.uint8)))
    found = load_dataset(folder, "train", Preparation(pool=2, pad=1)).images[:, 0].numpy()
    means = images.astype(np.float64).reshape(3, 3, 2, 2, 2).mean(axis=(2, 4))
    assert found.shape == (3, 5, 4) and found.dtype == np.uint8
    assert np.abs(found[:, 1:-1, 1:-1] - means).max() <= 0.5
    assert found.sum() == found[:, 1:-1, 1:-1].sum(), "the frame is 0"
    with pytest.raises(ValueError, match=r"pool: expected a divisor of the height and width of .*6x4, got 4"):
        load_dataset(folder, "train", Preparation(pool=4))


def test_a_share_is_held_out(tmp_path):
    images = np.arange(50, dtype=np.uint8).repeat(4).reshape(50, 2, 2)
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(50, dtype=np.int64))
    parts = [load_dataset(tmp_path / "set.npz", split, Preparation(test_share=0.2)).images[:, 0, 0, 0] for split in ("train", "test")]
    assert [len(part) for part in parts] == [40, 10]
    assert torch.cat(parts).sort().values.tolist() == list(range(50)) and parts[1].tolist() != list(range(40, 50))
    assert len(load_dataset(tmp_path / "set.npz", "test")) == 50
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(50), test_images=images[:3], test_labels=np.zeros(3, dtype=np.int64))
    assert len(load_dataset(tmp_path / "set.npz", "test", Preparation(test_share=0.2))) == 3


def write_images(folder, pixels):
    image = pytest.importorskip("PIL.Image")
    for number, values in enumerate(pixels):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(values).save(file)


def test_a_folder_in_parts(tmp_path):
    pixels = random_images(6, 4, 4, 3)
    write_images(tmp_path / "train", pixels[:4])
    write_images(tmp_path / "val", pixels[4:])
    train, held_out = load_dataset(tmp_path), load_dataset(tmp_path, "test")
    assert train.labels.tolist() == [0, 0, 1, 1] and held_out.labels.tolist() == [0, 1]
    assert np.array_equal(held_out.images.permute(0, 2, 3, 1).numpy(), pixels[4:])


def test_a_share_of_a_folder_is_held_out(tmp_path):
    pixels = random_images(10, 4, 4, 3)
    write_images(tmp_path, pixels)
    parts = [load_dataset(tmp_path, split, Preparation(test_share=0.3)) for split in ("train", "test")]
    assert [len(part) for part in parts] == [7, 3]
    whole = load_dataset(tmp_path)
    found = {(image.numpy().tobytes(), int(label)) for part in parts for image, label in zip(part.images, part.labels, strict=True)}
    assert found == {(image.numpy().tobytes(), int(label)) for image, label in zip(whole.images, whole.labels, strict=True)}


def test_the_classes_of_a_test_folder_are_those_of_the_train_folder(tmp_path):
    pixels = random_images(6, 4, 4, 3)
    write_images(tmp_path / "train", pixels[:4])
    write_images(tmp_path / "test", pixels[4:])
    for image in (tmp_path / "test" / "a").iterdir():
        image.unlink()
    (tmp_path / "test" / "a").rmdir()
    held_out = load_dataset(tmp_path, "test")
    assert held_out.labels.tolist() == [1] and held_out.classes == 2
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(ValueError, match=r"expected the classes of .*train, a, b; got also c"):
        load_dataset(tmp_path, "test")


def test_a_share_is_held_out_of_a_train_part_alone(tmp_path, idx_folder):
    write_images(tmp_path / "pictures" / "train", random_images(10, 4, 4, 3))
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    for folder, size in ((tmp_path / "pictures", 10), (tmp_path, 5)):
        train, held_out = (load_dataset(folder, split, Preparation(test_share=0.4)) for split in ("train", "test"))
        assert (len(train), len(held_out)) == (size - 2 * size // 5, 2 * size // 5)
        assert len(load_dataset(folder)) == size


def test_images_that_would_be_cut_off_at_255_are_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(tmp_path / "a" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: expected 8 bits a channel, got an image of mode I"):
        load_dataset(tmp_path)


def test_a_full_disk_is_an_error_of_its_own(tmp_path, monkeypatch):
    """A process that writes to a mapped file on a full disk is killed."""

    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_images(tmp_path / "images", random_images(4, 4, 4, 3))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_dataset(tmp_path / "images", "train", Preparation(memory_limit=1e-9, cache=str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").iterdir())


def test_images_of_any_size_are_cropped_and_resized(tmp_path):
    wide, tall = random_images(4, 10, 3), random_images(8, 4, 3)
    write_images(tmp_path, [wide, tall])
    data = load_dataset(tmp_path, "train", Preparation(resize=2))
    for found, square in zip(data.images, (wide[:, 3:7], tall[2:6]), strict=True):
        means = square.astype(np.float64).reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
        assert np.abs(found.permute(1, 2, 0).numpy() - means).max() <= 1.0


def test_too_many_pixels_are_mapped(tmp_path, capsys):
    pixels = random_images(8, 5, 5, 3)
    write_images(tmp_path / "images", pixels)
    limit = (8 * 75 - 1) / 2**30
    mapped = Preparation(memory_limit=limit, cache=str(tmp_path / "cache"))
    plain, first = load_dataset(tmp_path / "images"), load_dataset(tmp_path / "images", "train", mapped)
    assert first.mapped and not plain.mapped and torch.equal(first.images, plain.images)
    (cache,) = (tmp_path / "cache").iterdir()
    assert cache.stat().st_size == 600 and f"writing {cache}" in capsys.readouterr().out
    rows = torch.tensor([5, 0, 5])
    for found, expected in zip(first.to(torch.device("cpu")).batch(rows), plain.batch(rows), strict=True):
        assert torch.equal(found, expected)
    # The images stay on the CPU, batches go to the labels' device.
    there = first.to(torch.device("meta"))
    assert there.images.device.type == "cpu" and there.batch(rows)[0].device.type == "meta"
    with pytest.raises(ValueError, match="images: above memory_limit, expected pool 1 and pad 0"):
        load_dataset(tmp_path / "images", "train", replace(mapped, pad=1))
    written = cache.stat().st_mtime_ns
    assert torch.equal(load_dataset(tmp_path / "images", "train", mapped).images, plain.images)
    assert cache.stat().st_mtime_ns == written and capsys.readouterr().out == "", "not written again"
    write_images(tmp_path / "images", random_images(8, 5, 5, 3)[::-1])
    assert not torch.equal(load_dataset(tmp_path / "images", "train", mapped).images, plain.images), "other images"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_fashion_is_found_where_debian_puts_it(idx_folder, monkeypatch, tmp_path):
    folder, images, _ = idx_folder
    monkeypatch.setattr("fm_fast.train.data.FASHION_FOLDERS", (tmp_path / "nowhere", folder))
    data = load_dataset("fashion")
    assert data.name == "fashion" and np.array_equal(data.images[:, 0].numpy(), images)
    monkeypatch.setattr("fm_fast.train.data.FASHION_FOLDERS", (tmp_path / "nowhere",))
    with pytest.raises(FileNotFoundError, match=r"fashion: expected Fashion-MNIST in .*nowhere; `apt-get install dataset-fashion-mnist`"):
        load_dataset("fashion")
