"""What happens to the images of a data set before training sees them, and which of them are held out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fm_fast.random import noise

GIB = 2**30
CHANNELS = (1, 3, 4)  # of images
WITHOUT_LABELS = "--no-conditional trains a network without, sample --classes none enlarges without"  # why data may lack them


@dataclass(frozen=True)
class Preparation:
    """In this order: resize and grey (images of a folder only), pool, pad; then the share for tests is put aside.

    resize: cut out the middle square and bring it to this height and width, 0 to leave the images as they are. pool: replace blocks of
    this many pixels a side by their mean. pad: add a frame of this many pixels of value 0. test_share: share of the images, always the
    same ones, that is held out of data that come without a test set. memory_limit: GiB above which the images of a folder, of an archive
    or of ImageNet's batches lie in a file that is mapped into memory, in `cache`. unlabelled: data may come without labels. as_is: of
    data of this height and width nothing is resized, averaged, framed or held out; 0 for no such size. grey: one channel instead of three.
    shift, scale: of real-valued data the network sees (value - shift) scale; no scale: both are measured.
    """

    resize: int = 0
    pool: int = 1
    pad: int = 0
    test_share: float = 0.0
    memory_limit: float = 4.0
    cache: str = "~/.cache/fm_fast"
    unlabelled: bool = False
    as_is: int = 0
    grey: bool = False
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    @property
    def limit_in_bytes(self) -> float:
        return self.memory_limit * GIB

    def of_size(self, height: int, width: int) -> "Preparation":
        """What happens to images of that size."""
        return replace(self, resize=0, pool=1, pad=0, test_share=0.0) if height == width == self.as_is else self


def pooled_and_padded(name: str, images: Tensor, preparation: Preparation) -> Tensor:
    """[N, C, H, W]; means of uint8 are rounded to the nearest integer. Raises ValueError if the blocks do not fill the images."""
    pool, pad = preparation.pool, preparation.pad
    height, width = images.shape[-2:]
    if height % pool or width % pool:
        raise ValueError(f"pool: expected a divisor of the height and width of {name}, {height}x{width}, got {pool}")
    if pool > 1:
        images = torch.cat([_means(part, pool) for part in images.split(4096)])
    return F.pad(images, (pad, pad, pad, pad)) if pad else images


def _means(images: Tensor, pool: int) -> Tensor:
    means = F.avg_pool2d(images.float(), pool)
    return (means if images.is_floating_point() else means.round()).to(images.dtype)


def rows_of_split(size: int, share: float, split: str) -> Tensor:
    """The indices int64 [n] of "train" or "test", in ascending order: which images are held out depends on their number only."""
    held_out = round(size * share)
    if share > 0.0 and not 0 < held_out < size:
        raise ValueError(f"test_share: expected one that leaves images on both sides of {size}, got {share:g}")
    order = noise((size,), seed=0, step=0, stream="data_order", index=1, kind="word", device="cpu").argsort(stable=True)
    return (order[:held_out] if split == "test" else order[held_out:]).sort().values
