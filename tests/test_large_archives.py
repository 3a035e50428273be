"""An .npz archive above the memory's limit is read piece by piece into a mapped file, and is otherwise the same data."""

import json
import zipfile

import numpy as np
import pytest
import torch
from test_real_data import SHORT, latents
from trainer_helpers import assert_same_state, tiny

from fm_fast.cli import main
from fm_fast.train.data import Dataset, load_dataset
from fm_fast.train.data.readers import large_npz, npz
from fm_fast.train.loop import train
from fm_fast.train.prepare import Preparation
from fm_fast.train.storage.weights import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 23
LABELS = np.arange(COUNT) % 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Of three or six images of 4x8x8."""
    monkeypatch.setattr(large_npz, "PART", 4 * 8 * 8 * 4 * 3)


def numbers(dtype):
    if dtype == np.uint8:
        return np.random.default_rng(0).integers(0, 256, (COUNT, 4, 8, 8), dtype=np.uint8)
    return latents(COUNT)[0].astype(dtype)


def saved(folder, images, save=np.savez, **more):
    save(folder / "x.npz", **({"images": images, "labels": LABELS} | more))
    return folder / "x.npz"


def mapped(folder, **settings):
    return Preparation(memory_limit=0.0, cache=str(folder / "cache"), **settings)


def assert_same_data(one: Dataset, other: Dataset):
    assert one.images.dtype == other.images.dtype and torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    for name in ("name", "classes", "levels", "division", "left_out", "standardisation"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, ">f4"], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"test_share": 0.3}, {"scale": (0.5, 1.0, 2.0, 4.0), "shift": (1.0,)}], ids=["whole", "share", "given units"]
)
def test_the_same_data_as_in_memory(tmp_path, dtype, save, settings):
    if dtype == np.uint8 and "scale" in settings:
        settings = {}
    file = saved(tmp_path, numbers(dtype), save)
    for split in ("train", "test"):
        plain, found = load_dataset(file, split, Preparation(**settings)), load_dataset(file, split, mapped(tmp_path, **settings))
        assert found.mapped and not plain.mapped
        assert_same_data(found, plain)


@pytest.mark.parametrize("shape", [(COUNT, 8, 8), (COUNT, 8, 8, 3)], ids=str)
def test_other_orders_of_the_dimensions(tmp_path, shape):
    file = saved(tmp_path, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert_same_data(load_dataset(file, preparation=mapped(tmp_path)), load_dataset(file))


def test_without_labels_and_with_a_test_part(tmp_path):
    np.savez(tmp_path / "x.npz", images=numbers(np.float16), test_images=numbers(np.float16)[:5] + np.float16(1.0), more=LABELS)
    for split in ("train", "test"):
        plain = load_dataset(tmp_path / "x.npz", split, Preparation(unlabelled=True))
        assert_same_data(load_dataset(tmp_path / "x.npz", split, mapped(tmp_path, unlabelled=True)), plain)


def test_only_what_is_above_the_limit_is_mapped(tmp_path):
    """By the size that the numbers have in memory: float64 are held as float32."""
    file = saved(tmp_path, numbers(np.float64), test_images=numbers(np.float64)[:3], test_labels=LABELS[:3])
    size = COUNT * 4 * 8 * 8 * 4
    for limit, expected in ((size, False), (size - 1, True)):
        preparation = Preparation(memory_limit=limit / 2**30, cache=str(tmp_path / "cache"))
        assert load_dataset(file, "train", preparation).mapped == expected and not load_dataset(file, "test", preparation).mapped


def test_the_cache_is_used_again(tmp_path, monkeypatch, capsys):
    """Measured and written once; changes that a process makes to its images are its own."""
    file = saved(tmp_path, numbers(np.float32))
    first = load_dataset(file, preparation=mapped(tmp_path))
    assert "above memory_limit 0: writing " in capsys.readouterr().out
    before = first.images.clone()
    first.images.zero_()
    read = []
    monkeypatch.setattr(large_npz.StoredImages, "_read", lambda self, *rest: read.append(rest) or torch.full((1, *self.shape[1:]), 0.5))
    again = load_dataset(file, preparation=mapped(tmp_path))
    assert torch.equal(again.images, before) and again.standardisation == first.standardisation
    assert len(read) <= 1, "the first part shows that the numbers are no whole ones"
    assert sorted(kept.suffix for kept in (tmp_path / "cache").iterdir()) == [".f32", ".json"]


def test_an_archive_that_changed_is_read_again(tmp_path):
    load_dataset(saved(tmp_path, numbers(np.float32)), preparation=mapped(tmp_path))
    file = saved(tmp_path, 3.0 * numbers(np.float32), labels=LABELS[::-1].copy())
    assert_same_data(load_dataset(file, preparation=mapped(tmp_path)), load_dataset(file))


def test_batches_of_a_mapped_archive(tmp_path):
    file = saved(tmp_path, numbers(np.float16))
    rows = torch.tensor([7, 0, 22, 7])
    for there, here in zip(*(load_dataset(file, preparation=p).batch(rows) for p in (mapped(tmp_path), Preparation())), strict=True):
        assert torch.equal(there, here)


def test_a_run_on_a_mapped_archive_is_the_same(tmp_path):
    """Trained, resumed and evaluated."""
    file = saved(tmp_path, numbers(np.float32))
    settings = {
        "data": str(file),
        "steps": 4,
        "checkpoint_every": 2,
        "sample_steps": 1,
        "samples_per_class": 1,
        "cache": str(tmp_path / "cache"),
    }
    whole, found = (train(tiny(out=str(tmp_path / name), memory_limit=limit, **settings)) for name, limit in (("a", 4.0), ("b", 0.0)))
    assert_same_state(whole.state, found.state)
    (tmp_path / "b" / "checkpoint-00000004.pt").unlink()
    assert main(["train", "--resume", "--out", str(tmp_path / "b")]) == 0
    for name, value in load_model(tmp_path / "a")[0].state_dict().items():
        assert torch.equal(value, load_model(tmp_path / "b")[0].state_dict()[name])
    results = [tmp_path / f"{name}.json" for name in "ab"]
    for name, result in zip("ab", results, strict=True):
        assert main(["evaluate", str(tmp_path / name), "--json", str(result), "--limit", "6", "--tolerance", "0.1"]) == 0
    one, other = (json.loads(result.read_text()) for result in results)
    for name in ("bits_per_dim", "novelty", "nearest_neighbour"):
        assert one[name] == other[name], name


# What cannot be read


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (np.full((COUNT, 4, 8, 8), np.nan), {}, "x.npz: expected finite numbers that float32 can hold"),
        (np.full((COUNT, 4, 8, 8), 1e300), {"scale": (1.0,)}, "x.npz: expected finite numbers that float32 can hold"),
        (np.ones((COUNT, 4, 8, 8), np.float16), {"scale": (1e5,)}, "data_scale: expected numbers with which torch.float16 holds the data"),
        (np.ones((COUNT, 4, 8, 8), np.uint8), {"scale": (1.0,)}, "data_scale: expected none for x.npz of integers"),
        (np.ones((COUNT, 4, 8, 8), np.uint8), {"pad": 1}, "pool, pad: expected 1 and 0 for 0.00 GiB of images, above memory_limit 0"),
        (np.ones((COUNT, 4, 8, 8), np.uint8), {"resize": 4}, "resize: expected 0 for x.npz of 8x8 pixels"),
        (np.ones((COUNT - 1, 4, 8, 8), np.uint8), {}, "x.npz: expected one label an image, 22, got"),
        (np.asfortranarray(numbers(np.float32)), {}, r"\[images\]: expected an array in C's order above memory_limit 0, got Fortran's"),
        (np.ones((COUNT, 8), np.float32), {}, "expected images uint8, or real numbers"),
        (np.ones((COUNT, 4, 8, 8), int), {}, "expected images uint8, or real numbers"),
        (np.ones((0, 4, 8, 8), np.uint8), {}, "not empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, images, settings, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(saved(tmp_path, images), preparation=mapped(tmp_path, **settings))
    left = list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else []
    assert [file for file in left if file.suffix != ".json"] == [], "no half of a file"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_told_with_the_archive(tmp_path, save):
    """In the middle of the numbers; their check sum is that of the whole array, at its end, so that numbers may be strange before."""
    file = saved(tmp_path, numbers(np.float32), save)
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("images.npy")
    content = bytearray(file.read_bytes())
    middle = member.header_offset + member.compress_size // 2
    content[middle : middle + 8] = b"\0" * 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz: expected (a readable \.npz archive, got: |finite numbers)"):
        load_dataset(file, preparation=mapped(tmp_path))
    assert list((tmp_path / "cache").glob("*.f32")) == []


def test_an_array_that_is_shorter_than_it_says(tmp_path):
    file = saved(tmp_path, numbers(np.float32))
    shorter = tmp_path / "shorter" / "x.npz"
    shorter.parent.mkdir()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(shorter, "w") as cut:
        for name in archive.namelist():
            cut.writestr(name, archive.read(name)[: -1000 if name == "images.npy" else None])
    with pytest.raises(ValueError, match=r"x\.npz: expected a readable \.npz archive, got: "):
        load_dataset(shorter, preparation=mapped(tmp_path))


def test_a_header_that_asks_for_more_than_there_is(tmp_path):
    """Of memory, too: 10^15 images would not fit."""
    file, wrong = saved(tmp_path, numbers(np.float32)), tmp_path / "wrong.npz"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(wrong, "w") as written:
        content = archive.read("images.npy").replace(b"(23, 4, 8, 8), }" + b" " * 14, b"(1" + b"0" * 15 + b", 4, 8, 8), }")
        assert len(content) == archive.getinfo("images.npy").file_size
        written.writestr("images.npy", content)
        written.writestr("labels.npy", archive.read("labels.npy"))
    with pytest.raises(ValueError, match=r"wrong\.npz: expected a readable \.npz archive, got: "):
        load_dataset(wrong, preparation=mapped(tmp_path))


def test_the_archive_is_not_read_whole(tmp_path, monkeypatch):
    """The images come by parts, never through the reader of whole arrays."""
    asked = []
    whole = npz._load
    monkeypatch.setattr(npz, "_load", lambda path, names: asked.extend(names) or whole(path, names))
    load_dataset(saved(tmp_path, numbers(np.float32)), preparation=mapped(tmp_path))
    assert asked == ["labels"]


def test_a_command_says_where_the_images_lie(tmp_path, capsys):
    file = saved(tmp_path, numbers(np.float32))
    command = [
        "train",
        "--data",
        str(file),
        "--out",
        str(tmp_path / "run"),
        "--cache",
        str(tmp_path / "cache"),
        "--memory-limit",
        "0",
        *SHORT,
    ]
    assert main(command) == 0
    assert f"0.00 GiB of images, above memory_limit 0: writing {tmp_path / 'cache'}" in capsys.readouterr().out


# Folders of archives


def shards(folder, dtype=np.float32, sizes=(9, 1, 13), **changes):
    """In the order of their names."""
    folder.mkdir(parents=True)
    first, whole = 0, numbers(dtype)
    for number, size in enumerate(sizes):
        rows = slice(first, first + size)
        np.savez(folder / f"part-{number}.npz", **({"images": whole[rows], "labels": LABELS[rows]} | changes.get(f"of_{number}", {})))
        first += size
    return folder


def assert_images_of(found, expected):
    for name in ("images", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("classes", "levels", "division", "left_out", "standardisation"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("limit", [4.0, 0.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64], ids=str)
@pytest.mark.parametrize("settings", [{}, {"test_share": 0.3}], ids=["whole", "share"])
def test_a_folder_of_archives_is_one_after_the_other(tmp_path, dtype, settings, limit):
    file, folder = saved(tmp_path, numbers(dtype)), shards(tmp_path / "data", dtype)
    preparation = Preparation(memory_limit=limit, cache=str(tmp_path / "cache"), **settings)
    for split in ("train", "test"):
        found = load_dataset(folder, split, preparation)
        assert found.mapped == (limit == 0.0) and found.name == "data"
        assert_images_of(found, load_dataset(file, split, Preparation(**settings)))


@pytest.mark.parametrize("limit", [4.0, 0.0])
def test_a_folder_of_archives_in_two_parts(tmp_path, limit):
    shards(tmp_path / "data" / "train"), shards(tmp_path / "data" / "val", sizes=(4, 3))
    preparation = Preparation(memory_limit=limit, cache=str(tmp_path / "cache"), test_share=0.5, scale=(1.0,))
    train_part, test_part = (load_dataset(tmp_path / "data", split, preparation) for split in ("train", "test"))
    assert (train_part.division, test_part.division) == ("test part", "test part")
    assert np.array_equal(train_part.images.numpy(), numbers(np.float32)) and np.array_equal(
        test_part.images.numpy(), numbers(np.float32)[:7]
    )
    assert test_part.labels.tolist() == LABELS[:7].tolist()


def test_a_folder_of_archives_without_labels_and_with_other_things(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        np.savez(folder / f"{number}.npz", arr_0=numbers(np.float32), codes=LABELS)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").mkdir()
    found = load_dataset(folder, preparation=Preparation(unlabelled=True, scale=(1.0,)))
    assert np.array_equal(found.images.numpy(), np.concatenate([numbers(np.float32)] * 2)) and found.classes == 1
    assert found.left_out == (
        f"note: {folder}: 1 of the arrays (codes) left out",
        f"note: {folder}: 1 of the files (notes.txt) left out: no .npz",
    )


@pytest.mark.parametrize("limit", [4.0, 0.0])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of_1": {"labels": LABELS[:2]}}, r"part-1\.npz: expected one label an image, 1, got \[2\]"),
        ({"of_1": {"images": np.zeros((1, 4, 6, 6), np.float32)}}, r"part-1\.npz: expected images like those of part-0\.npz, .*6, 6"),
        ({"of_2": {"images": np.zeros((13, 4, 8, 8), np.uint8)}}, r"part-2\.npz: expected images like those of part-0\.npz, .*uint8"),
        ({"of_2": {"images": np.full((13, 4, 8, 8), np.inf)}}, "expected finite numbers"),
        ({"of_1": {"more": LABELS}}, r"part-1\.npz: expected arrays images, labels as in part-0\.npz, got images, labels, more"),
    ],
)  # fmt: skip
def test_archives_that_do_not_belong_together(tmp_path, changes, message, limit):
    folder = shards(tmp_path / "data", **changes)
    with pytest.raises(ValueError, match=message):
        load_dataset(folder, preparation=Preparation(memory_limit=limit, cache=str(tmp_path / "cache")))


def test_a_damaged_archive_of_a_folder_is_named(tmp_path):
    folder = shards(tmp_path / "data")
    (folder / "part-1.npz").write_bytes((folder / "part-1.npz").read_bytes()[:100])
    for limit in (4.0, 0.0):
        with pytest.raises(ValueError, match=r"part-1\.npz: expected a readable \.npz archive"):
            load_dataset(folder, preparation=Preparation(memory_limit=limit, cache=str(tmp_path / "cache")))


def test_archives_beside_images_are_left_out(tmp_path):
    """As ever: a folder of images is one."""
    folder = shards(tmp_path / "data")
    (folder / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.png"):
        load_dataset(folder, preparation=Preparation(unlabelled=True))
