"""Readers of CIFAR-10, npz files and image folders against files written by independent means; a message for every kind of damage."""

import io
import pickle
import tarfile
import zipfile
import zlib

import pytest
from image_files import python_batch, random_images, write_cifar

from fm_fast.train.data import load_dataset
from fm_fast.train.data.readers.npz import read_npz
from fm_fast.train.prepare import Preparation

np = pytest.importorskip("numpy")


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
        (pickle.dumps([1]), "expected a dictionary with arrays b'data' and b'labels', got list"),
        (python_batch(random_images(2, 3072), [b"a", b"b"]), "data_batch_3: expected a dictionary with arrays .* got dict: .*bytes"),
        (python_batch(random_images(2, 3072), None), "data_batch_3: expected a dictionary with arrays .* got dict: .*NoneType"),
        (python_batch([[1, 2], [3]], [0, 1]), "data_batch_3: expected a dictionary with arrays .* got dict: "),
        (python_batch(random_images(2, 3072), [0.7, 1.2]), "data_batch_3: expected whole numbers as labels, got torch.float32"),
        (python_batch(random_images(2, 3072), [True, False]), "data_batch_3: expected whole numbers as labels, got torch.bool"),
        (b"\x80\x02cnumpy\nno_such_name\n.", "data_batch_3: expected a CIFAR-10 pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "data_batch_3: expected a CIFAR-10 pickle"),
        (b"\x80\x02cnumpy\ndtype\n(U\x02zzR.", "data_batch_3: expected a CIFAR-10 pickle"),
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
    save(tmp_path / "set.npz", images=images, labels=labels, extra=np.array([None]))  # which could not be read
    data = load_dataset(tmp_path / "set.npz")
    assert np.array_equal(data.images.numpy(), images if len(shape) == 4 else images[:, None])
    assert data.labels.tolist() == [0, 3, 1, 2] and data.classes == 4
    assert data.left_out == (f"note: {tmp_path / 'set.npz'}: 1 of the arrays (extra) left out",)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_npz_with_channels_last(tmp_path, channels):
    images = random_images(4, 8, 8, channels)
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(4, dtype=np.int64))
    assert np.array_equal(load_dataset(tmp_path / "set.npz").images.numpy(), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 3, 8, 8), (4, 8, 8, 5), (4, 8, 6, 3)])
def test_npz_that_is_not_certainly_channels_last_is_read_as_it_is(tmp_path, shape):
    images = random_images(*shape)
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(4, dtype=np.int64))
    assert np.array_equal(load_dataset(tmp_path / "set.npz").images.numpy(), images)


def test_npz_whose_arrays_numpy_named(tmp_path):
    """guided-diffusion's archives of samples, with and without labels."""
    images, labels = random_images(4, 8, 8, 3), np.array([0, 3, 1, 2])
    np.savez(tmp_path / "samples.npz", images, labels)
    np.savez(tmp_path / "alone.npz", images)
    data = load_dataset(tmp_path / "samples.npz", "test")
    assert np.array_equal(data.images.numpy(), images.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 3, 1, 2] and (data.division, data.left_out) == ("undivided", ())
    np.savez(tmp_path / "parts.npz", images, labels, images, labels)
    assert load_dataset(tmp_path / "parts.npz").left_out == (f"note: {tmp_path / 'parts.npz'}: 2 of the arrays (arr_2, arr_3) left out",)
    with pytest.raises(ValueError, match=r"alone.npz: expected labels beside images; .*, got arr_0"):
        load_dataset(tmp_path / "alone.npz")
    assert load_dataset(tmp_path / "alone.npz", preparation=Preparation(unlabelled=True)).labels.tolist() == [0] * 4


def test_damaged_npz(tmp_path):
    file = tmp_path / "set.npz"
    file.write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(ValueError, match=r"set.npz: expected a readable .npz archive"):
        load_dataset(file)
    np.savez(file, pictures=random_images(1, 2, 2))
    with pytest.raises(ValueError, match=r"expected arrays images, labels, found .*pictures"):
        load_dataset(file)
    np.savez(file, images=random_images(2, 2, 2), labels=np.zeros(2, dtype=np.float32))
    with pytest.raises(ValueError, match=r"set.npz\[labels\]: expected an array of integers .* got dtype float32"):
        load_dataset(file)
    np.savez(file, images=random_images(2, 3, 2), labels=np.array([None, "x"], dtype=object))
    with pytest.raises(ValueError, match=r"expected a readable .npz archive, got: Object arrays cannot be loaded"):
        load_dataset(file)


@pytest.mark.parametrize("damage", ["offset", "version"])
def test_npz_whose_directory_is_damaged(damage, tmp_path):
    """Beyond the checks of the archive's form: what the system and the format's versions have to say."""
    file = tmp_path / "set.npz"
    np.savez(file, images=random_images(2, 2, 2), labels=np.zeros(2, dtype=np.int64))
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    if damage == "offset":
        end = content.index(b"PK\x05\x06")
        content[end + 16 : end + 20] = (entry + 1000).to_bytes(4, "little")
    else:
        content[entry + 6 : entry + 8] = (191).to_bytes(2, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"set.npz: expected a readable .npz archive"):
        load_dataset(file)


@pytest.mark.parametrize("damage", ["bracket", "far too large", "keys", "no array", "password", "lzma"])
def test_npz_whose_array_is_damaged(damage, tmp_path):
    """What Python and its archives say of it, which are not all errors of archives."""
    file, array = tmp_path / "set.npz", io.BytesIO()
    np.save(array, random_images(2, 2, 2))
    content = array.getvalue()
    changes = {
        "bracket": (b"}", b" "),
        "far too large": (b"(2, 2, 2), }" + b" " * 12, b"(2, 100000000000000), } "),
        "keys": (b"'shape'", b"b'shap'"),
        "no array": (b"NUMPY", b"numpy"),
    }
    content = content.replace(*changes.get(damage, (b"", b"")))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA if damage == "lzma" else zipfile.ZIP_STORED) as archive:
        archive.writestr("images.npy", content)
    raw = bytearray(file.read_bytes())
    if damage == "password":
        raw[6] |= 1
        raw[raw.index(b"PK\x01\x02") + 8] |= 1
    if damage == "lzma":
        begin = raw.index(b"images.npy") + len("images.npy")
        raw[begin + 9 : begin + 30] = bytes(21)
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"set.npz.*: expected"):
        read_npz(file, ("images",))


def test_npz_in_fortran_order(tmp_path):
    images = random_images(2, 3, 2)
    np.savez(tmp_path / "set.npz", images=np.asfortranarray(images), labels=np.zeros(2, dtype=np.int32))
    assert np.array_equal(load_dataset(tmp_path / "set.npz").images[:, 0].numpy(), images)


def test_a_png_with_a_short_header(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "cat").mkdir()
    header = b"IHDR" + bytes(5)
    (tmp_path / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + (5).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big"))
    with pytest.raises(ValueError, match=r"1.png: expected a readable image, got: "):
        load_dataset(tmp_path)


@pytest.mark.parametrize("limit", [float("inf"), 0.0])
def test_memory_without_a_limit_and_none_at_all(limit, tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    image.fromarray(random_images(4, 4, 3)).save(tmp_path / "set" / "cat" / "1.png")
    data = load_dataset(tmp_path / "set", preparation=Preparation(memory_limit=limit, cache=str(tmp_path / "cache")))
    assert data.images.shape == (1, 3, 4, 4) and data.mapped == (limit == 0.0)


@pytest.mark.parametrize("share", [0.99, 0.001])
@pytest.mark.parametrize("form", ["npz", "folder"])
def test_a_share_that_leaves_a_side_empty(form, share, tmp_path):
    image = pytest.importorskip("PIL.Image")
    images = random_images(10, 4, 4)
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(10, dtype=np.int64))
    (tmp_path / "set" / "cat").mkdir(parents=True)
    for number, pixels in enumerate(images):
        image.fromarray(pixels).save(tmp_path / "set" / "cat" / f"{number}.png")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=f"test_share: expected one that leaves images on both sides of 10, got {share}"):
            load_dataset(tmp_path / ("set.npz" if form == "npz" else "set"), split, Preparation(test_share=share))


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_one_image_cannot_be_shared_out(share, tmp_path):
    np.savez(tmp_path / "one.npz", images=random_images(1, 4, 4), labels=np.zeros(1, dtype=np.int64))
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=f"test_share: expected one that leaves images on both sides of 1, got {share}"):
            load_dataset(tmp_path / "one.npz", split, Preparation(test_share=share))


@pytest.mark.parametrize("label", [50_000_000, 2**40, 2**63 - 1])
def test_labels_that_are_no_numbers_of_classes(label, tmp_path):
    """Each class has a row of weights: such labels would end in the system's words for memory that is not there, or without any."""
    np.savez(tmp_path / "set.npz", images=random_images(2, 4, 4), labels=np.array([0, label]))
    with pytest.raises(ValueError, match=rf"set.npz: expected labels 0, 1, 2, ..., at most 1000000 classes, got a label {label}$"):
        load_dataset(tmp_path / "set.npz")


def test_an_image_that_claims_to_be_huge(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / "1.bmp"
    image.fromarray(random_images(4, 4, 3)).save(file)
    content = bytearray(file.read_bytes())
    content[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"1.bmp: expected a readable image, got: Image size .* exceeds limit"):
        load_dataset(tmp_path)


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
    with pytest.raises(FileNotFoundError, match=r"expected IDX files, CIFAR-10 batches, \.npz archives, or a subfolder"):
        load_dataset(tmp_path)
    (tmp_path / "a").mkdir()
    image.fromarray(random_images(4, 4, 3)).save(tmp_path / "a" / "1.png")
    image.fromarray(random_images(4, 5, 3)).save(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match=r"2.png: expected 4x4 pixels like 1.png, got 4x5"):
        load_dataset(tmp_path)
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2.png: expected a readable image"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("damage", ["checksum", "end", "xz"])
def test_a_damaged_archive_is_refused_though_its_members_can_be_read(damage, tmp_path):
    folder, archive = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar.tar.gz"
    folder.mkdir()
    write_cifar(folder, "binary")
    with tarfile.open(archive, "w:xz" if damage == "xz" else "w:gz") as opened:
        opened.add(folder, arcname=folder.name)
    content = bytearray(archive.read_bytes())
    if damage == "end":
        del content[-6:]
    else:
        content[-8 if damage == "checksum" else len(content) // 2] ^= 0xFF  # the first byte of gzip's CRC-32
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz: expected a complete tar archive of CIFAR-10"):
        load_dataset(archive)
