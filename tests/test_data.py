"""The shipped digits, IDX files against ones written here, the order of training, preparation and splits, and what is refused."""

import dataclasses
import errno
import os
from dataclasses import replace

import pytest
import torch
from image_files import idx_bytes, random_images, write_idx, write_images

from fm_fast.cli import main
from fm_fast.train.data import DataOrder, digits, epoch_order, load_dataset, make_dataset
from fm_fast.train.prepare import Preparation

np = pytest.importorskip("numpy")


@pytest.fixture
def idx_folder(tmp_path):
    return tmp_path, *write_idx(tmp_path)


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
        (torch.zeros(2, 3, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), "expected images uint8"),
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
    with pytest.raises(ValueError, match=r"deep\.png: expected 8 bits a channel, got more, in mode I"):
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


def test_images_in_one_channel_of_grey(tmp_path):
    """Grey images keep their numbers, whatever their file's mode; of others it is the luma of ITU-R 601."""
    grey, colours = random_images(4, 4), random_images(4, 4, 3)
    write_images(tmp_path / "grey", [grey, np.stack([grey] * 3, axis=-1)])
    assert torch.equal(load_dataset(tmp_path / "grey", "train", Preparation(grey=True)).images, torch.from_numpy(grey).expand(2, 1, 4, 4))
    write_images(tmp_path / "colours", [colours, colours])
    luma = colours.astype(np.float64) @ (0.299, 0.587, 0.114)
    found = load_dataset(tmp_path / "colours", "train", Preparation(grey=True)).images
    assert found.shape == (2, 1, 4, 4) and np.abs(found[0, 0].numpy() - luma).max() <= 0.51
    small = load_dataset(tmp_path / "colours", "train", Preparation(grey=True, resize=2)).images
    assert np.abs(small[0, 0].numpy() - luma.reshape(2, 2, 2, 2).mean(axis=(1, 3))).max() <= 1.5


def test_grey_and_coloured_images_lie_in_files_of_their_own(tmp_path):
    write_images(tmp_path / "images", random_images(4, 4, 4, 3))
    mapped = Preparation(memory_limit=0.0, cache=str(tmp_path / "cache"))
    channels = [
        load_dataset(tmp_path / "images", "train", dataclasses.replace(mapped, grey=grey)).images.shape[1] for grey in (False, True, False)
    ]
    assert channels == [3, 1, 3] and len(list((tmp_path / "cache").iterdir())) == 2


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
    with pytest.raises(ValueError, match=r"pool, pad: expected 1 and 0 for 0.00 GiB of images, above memory_limit .*, got 1 and 1"):
        load_dataset(tmp_path / "images", "train", replace(mapped, pad=1))
    written = cache.stat().st_mtime_ns
    assert torch.equal(load_dataset(tmp_path / "images", "train", mapped).images, plain.images)
    assert cache.stat().st_mtime_ns == written and capsys.readouterr().out == "", "not written again"
    write_images(tmp_path / "images", random_images(8, 5, 5, 3)[::-1])
    assert not torch.equal(load_dataset(tmp_path / "images", "train", mapped).images, plain.images), "other images"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_both_parts_of_mapped_images_stay_in_the_cache(tmp_path, capsys):
    write_images(tmp_path / "images", random_images(8, 5, 5, 3))
    settings = Preparation(memory_limit=0.0, cache=str(tmp_path / "cache"), test_share=0.3)
    first, second = ([load_dataset(tmp_path / "images", split, settings).images for split in ("train", "test")] for _ in range(2))
    assert all(map(torch.equal, first, second)) and sum(map(len, first)) == 8
    assert capsys.readouterr().out.count("writing") == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_fashion_is_found_where_debian_puts_it(idx_folder, monkeypatch, tmp_path):
    folder, images, _ = idx_folder
    monkeypatch.setattr("fm_fast.train.data.sources.FASHION_FOLDERS", (tmp_path / "nowhere", folder))
    data = load_dataset("fashion")
    assert data.name == "fashion" and np.array_equal(data.images[:, 0].numpy(), images)
    monkeypatch.setattr("fm_fast.train.data.sources.FASHION_FOLDERS", (tmp_path / "nowhere",))
    with pytest.raises(FileNotFoundError, match=r"fashion: expected Fashion-MNIST in .*nowhere; `apt-get install dataset-fashion-mnist`"):
        load_dataset("fashion")


def test_no_name_is_no_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data: expected 'digits', 'fashion' or a path to data, got ''"):
        load_dataset("")
    assert main(["train", "--data", ""]) == 1
    assert capsys.readouterr().err == "fm-fast: error: data: expected --data PATH, got ''\n"
