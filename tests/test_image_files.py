"""How one image file is read: orientation, transparency, palettes, CMYK, and what is refused."""

import struct
import zlib

import pytest
from image_files import random_images

from fm_fast.train.data import load_dataset
from fm_fast.train.data.readers.image_file import read_image
from fm_fast.train.data.readers.image_folder import read_images
from fm_fast.train.prepare import Preparation

np = pytest.importorskip("numpy")
image = pytest.importorskip("PIL.Image")

PIXELS = random_images(4, 6, 3)
MASK = np.array([[0, 255, 128, 255, 255, 0]] * 4, dtype=np.uint8)
# What brings an image of each orientation of EXIF upright, in NumPy's words.
UPRIGHT = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
}  # fmt: skip


def read(file, resize=0):
    return read_image(file, resize).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("orientation", list(UPRIGHT))
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_image_is_turned_as_the_camera_noted(orientation, suffix, tmp_path):
    note = image.Exif()
    note[0x0112] = orientation
    image.fromarray(PIXELS).save(tmp_path / f"x{suffix}", exif=note, lossless=True)
    assert np.array_equal(read(tmp_path / f"x{suffix}"), UPRIGHT[orientation](PIXELS))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_note_does_not_matter(tmp_path):
    image.fromarray(PIXELS).save(tmp_path / "x.png", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12")
    assert np.array_equal(read(tmp_path / "x.png"), PIXELS)
    image.fromarray(PIXELS).save(tmp_path / "y.png", exif=b"Exif\x00\x00nothing")
    assert np.array_equal(read(tmp_path / "y.png"), PIXELS)


def on_white(pixels, mask):
    share = mask[..., None] / 255.0
    return pixels * share + 255.0 * (1.0 - share)


def test_what_is_transparent_shows_white(tmp_path):
    image.fromarray(np.concatenate([PIXELS, MASK[..., None]], 2)).save(tmp_path / "rgba.png")
    assert np.abs(read(tmp_path / "rgba.png") - on_white(PIXELS, MASK)).max() <= 1.0
    grey = PIXELS[..., :1]
    image.fromarray(np.concatenate([grey, MASK[..., None]], 2), "LA").save(tmp_path / "la.png")
    assert np.abs(read(tmp_path / "la.png") - on_white(grey.repeat(3, 2), MASK)).max() <= 1.0
    assert (read(tmp_path / "la.png")[:, 0] == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_transparent_colour_shows_white(suffix, tmp_path):
    palette = image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / f"p{suffix}", transparency=1)
    assert read(tmp_path / f"p{suffix}").tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [70, 80, 90]]]
    palette.save(tmp_path / f"q{suffix}")
    assert read(tmp_path / f"q{suffix}").tolist() == [[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [70, 80, 90]]]


def test_transparent_colours_of_grey_and_rgb(tmp_path):
    image.fromarray(np.array([[3, 7]], np.uint8)).save(tmp_path / "l.png", transparency=7)
    assert read(tmp_path / "l.png").tolist() == [[[3] * 3, [255] * 3]]
    image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "rgb.png", transparency=(4, 5, 6))
    assert read(tmp_path / "rgb.png").tolist() == [[[1, 2, 3], [255] * 3]]


def test_cmyk_is_converted(tmp_path):
    image.fromarray(np.full((4, 4, 4), (255, 0, 0, 0), np.uint8), "CMYK").save(tmp_path / "x.jpg", quality=100)
    assert np.abs(read(tmp_path / "x.jpg").astype(int) - (0, 255, 255)).max() <= 2


def test_wide_channels_are_refused_by_name(tmp_path):
    image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png: expected 8 bits a channel, got more, in mode I"):
        read_image(tmp_path / "wide.png", 0)


@pytest.mark.parametrize("damage", ["pixels", "cut off", "no pixels"])
def test_damaged_png_files_are_refused_by_name(damage, tmp_path):
    """A changed byte is decoded as another colour, and only the checksum of the pixels tells."""
    file = tmp_path / "x.png"
    image.fromarray(PIXELS).save(file, compress_level=0)
    content = file.read_bytes()
    pixels = content.index(b"IDAT")
    damaged = {
        "pixels": content[: pixels + 20] + bytes([content[pixels + 20] ^ 1]) + content[pixels + 21 :],
        "cut off": content[:-13],
        "no pixels": content[: pixels - 4] + content[-12:],
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"x.png: expected a readable image, got: "):
        read_image(file, 0)


def test_files_in_the_cache_that_were_read_otherwise_are_not_used(tmp_path, monkeypatch):
    image.fromarray(PIXELS).save(tmp_path / "x.png")
    for reading, files in (("in one way", 1), ("in one way", 1), ("in another way", 2)):
        monkeypatch.setattr("fm_fast.train.data.readers.image_folder.READING", reading)
        read_images([tmp_path / "x.png"], Preparation(memory_limit=0.0, cache=str(tmp_path / "cache")))
        assert len(list((tmp_path / "cache").iterdir())) == files


def png(depth):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = (b"\x00" + bytes(2 * 3 * depth // 8)) * 2
    header = struct.pack(">IIBBBBB", 2, 2, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [8, 16])
def test_colours_of_sixteen_bits_are_refused(depth, tmp_path):
    """Pillow would keep the upper half of each without a word."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "image.png").write_bytes(png(depth))
    if depth == 8:
        assert load_dataset(tmp_path).images.shape == (1, 3, 2, 2)
    else:
        with pytest.raises(ValueError, match=r"image\.png: expected 8 bits a channel, got more, in mode RGB"):
            load_dataset(tmp_path)
