"""Pictures of samples: a grid of images, written as PNG with nothing but zlib."""

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fm_fast.train.files import replaced_whole

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2}
BACKGROUND = 96
# Images are enlarged to about this many pixels.
PICTURE_SIZE = 96
WHITE = 3.0  # real numbers have deviation 1, as networks see them


def image_grid(images: Tensor, columns: int, scale: int, padding: int = 6) -> Tensor:
    """Images uint8 [N, C, H, W] in rows of `columns`, each pixel `scale` pixels wide: uint8 [C, height, width]."""
    large = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, channels, height, width = large.shape
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + padding) + padding, columns * (width + padding) + padding), BACKGROUND, dtype=torch.uint8)
    for number, image in enumerate(large):
        top, left = padding + number // columns * (height + padding), padding + number % columns * (width + padding)
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_8_bit(images: Tensor, levels: int | None) -> Tensor:
    """Stretch integer images with values 0..levels-1 to 0..255, real numbers (None) from -WHITE..WHITE: uint8 of the same shape."""
    if levels is None:
        return ((images.float() / WHITE).clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8)
    return (images.float() * (255.0 / (levels - 1))).round().to(torch.uint8)


def write_images(path: Path, images: Tensor, levels: int | None, columns: int) -> None:
    """Images [N, C, H, W] as `to_8_bit` takes them in rows of `columns`, enlarged to about PICTURE_SIZE pixels, as a PNG.

    Of images that are neither grey nor in three colours, the first three channels are shown, or the first of two. `path` is never half a
    file.
    """
    images = images[:, : 3 if images.shape[1] >= 3 else 1]
    grid = image_grid(to_8_bit(images, levels).cpu(), columns, scale=max(PICTURE_SIZE // images.shape[-1], 1))
    with replaced_whole(path) as temporary:
        write_png(temporary, grid)


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [C, H, W], C = 1 (grey) or 3 (RGB). Raises ValueError for another shape or dtype."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in COLOUR_TYPES:
        raise ValueError(f"image: expected uint8 [1 or 3, H, W], got {image.dtype} {list(image.shape)}")
    channels, height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    lines = image.permute(1, 2, 0).reshape(height, width * channels).cpu()
    # Each line starts with its filter type; 0 stands for "none".
    filtered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), lines], dim=1)
    pixels = zlib.compress(bytes(filtered.flatten().tolist()), 9)
    path.write_bytes(SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b""))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
