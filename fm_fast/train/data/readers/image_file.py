"""Read one image file as RGB or grey of 8 bits a channel: upright, on white, perhaps its middle square at another size."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDE_MODES = ("I", "F")  # of more than 8 bits, which Pillow cuts off at 255
DAMAGE = (OSError, SyntaxError, ValueError, LookupError)
ORIENTATION = 0x0112
DEPTH = 24  # where a PNG file says how many bits a channel has


def read_image(file: Path, resize: int, grey: bool = False) -> Tensor:
    """uint8 [3, H, W], or [1, H, W] for grey; resize: height and width to bring the middle square to, 0 for the image as it is.

    The orientation that a camera noted is applied, what is transparent shows white, and of several pictures in a file the first is taken.
    Raises ValueError, naming the file, for one that cannot be read or has more than 8 bits a channel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: pip install pillow, or 'fm_fast[train]'") from error
    try:
        with Image.open(file) as image:
            if image.format == "PNG":
                _compare_checksums(file)
            wide = image.mode.startswith(WIDE_MODES) or _is_wide_png(file, image)
            rgb = image if wide else _on_white(_upright(image))
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: expected a readable image, got: {error}") from error
    if wide:
        raise ValueError(f"{file}: expected 8 bits a channel, got more, in mode {rgb.mode}")
    image = _middle_square(rgb, resize) if resize else rgb
    image = image.convert("L") if grey else image  # luma as in ITU-R 601, which leaves a grey image's numbers as they were
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1)


def _compare_checksums(file: Path) -> None:
    """Of a whole PNG file: Pillow looks at those before the pixels alone when it reads it, and decodes what has changed."""
    from PIL import Image

    with Image.open(file) as image:
        image.verify()


def _is_wide_png(file: Path, image: Any) -> bool:
    """Whether Pillow keeps the upper half of 16 bits alone, without a word: the header has the number."""
    if image.format != "PNG":
        return False
    with file.open("rb") as opened:
        return opened.read(DEPTH + 1)[DEPTH:] == bytes([16])


def _upright(image: Any) -> Any:
    from PIL import Image

    turns = Image.Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE, 6: turns.ROTATE_270,
        7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }.get(_orientation(image))  # fmt: skip
    return image if turn is None else image.transpose(turn)


def _orientation(image: Any) -> Any:
    """As in EXIF; None where there is none, or the note is damaged, which harms no pixel."""
    try:
        return image.getexif().get(ORIENTATION)
    except (*DAMAGE, struct.error):
        return None


def _on_white(image: Any) -> Any:
    """As RGB."""
    from PIL import Image

    if not image.mode.upper().endswith("A") and "transparency" not in image.info:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _middle_square(image: Any, size: int) -> Any:
    """Each pixel of the result is the mean of those it covers when the image shrinks (Pillow's box filter), as for ImageNet 32 and 64."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side))
