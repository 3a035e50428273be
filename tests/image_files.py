"""Images, and the files that hold them, written by independent means: what the tests of datasets share."""

import gzip
import pickle
import struct

import pytest

np = pytest.importorskip("numpy")


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array):
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder):
    """(images, labels) of the train part; the first two are the test part, compressed."""
    images, labels = random_images(5, 4, 3), np.array([0, 1, 2, 1, 0], dtype=np.uint8)
    for prefix, suffix, pack, count in (("train", "", bytes, 5), ("t10k", ".gz", gzip.compress, 2)):
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images[:count])))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels[:count])))
    return images, labels


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


def write_images(folder, pixels):
    image = pytest.importorskip("PIL.Image")
    for number, values in enumerate(pixels):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(values).save(file)
