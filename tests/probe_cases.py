"""What the tests of probe and divergence_step share: sizes on both sides of a block of 128 signs, dtypes, and structured probes."""

import numpy as np
import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (3,),
    (1, 1),
    (5, 3),
    (70, 2),
    (4, 127),
    (3, 128),
    (2, 129),
    (1, 1025),
    (2, 3072),
    (2, 3, 5, 7),
    (2, 3, 9),
    (2, 3, 16, 16),
    (1, 5, 33, 31),
    (2, 70, 3, 3),
    (1, 20, 15, 17),
    (2, 3, 2, 3, 5),
]


def random_words(count, seed=3):
    """Codes or rows of all 64 bits, negative ones among them."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, count, dtype=np.int64))


def tables(shape, total, structured):
    """(codes, rows) of probes of this shape, empty unless they are structured."""
    return random_words(int(np.prod(shape[1:])) if structured else 0), random_words(total if structured else 0, 4)
