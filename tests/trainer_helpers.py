"""What the tests of the trainer share: a tiny run, comparison of states, and a decoder of PNG."""

import struct
import zlib

import torch

from fm_fast.nn import UNetConfig
from fm_fast.train import TrainConfig
from fm_fast.train.data import DataOrder
from fm_fast.train.step import training_step
from fm_fast.train.storage.checkpoint import read_checkpoint, restore

CPU = torch.device("cpu")
TINY_NET = UNetConfig(8, 1, 10, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(4,), head_channels=8, groups=4)


def tiny(**changes):
    return TrainConfig(**{"steps": 20, "batch_size": 16, "warmup": 4, "model": TINY_NET} | changes)


def advance(state, config, dataset, steps):
    """Training steps without log or files; their losses."""
    order = DataOrder(len(dataset), config.seed)
    return [training_step(state, config, dataset, order).mean for _ in range(steps)]


def resume(path, state, config):
    """A checkpoint loaded into a fresh state."""
    restore(path, read_checkpoint(path), state, config)


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def moments(state):
    return {f"{number}.{name}": value for number, entry in enumerate(state.optimiser.state.values()) for name, value in entry.items()}


def assert_same_state(one, two):
    assert one.step == two.step
    assert torch.equal(flat(one.model), flat(two.model)) and torch.equal(flat(one.average), flat(two.average))
    stored = [state.optimiser.state_dict()["state"] for state in (one, two)]
    for number, entry in stored[0].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(stored[1][number][name])), (number, name)


def decode_png(content):
    """An independent decoder of unfiltered 8-bit PNG: (width, height, bytes a pixel, rows)."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kind, body = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        assert struct.unpack(">I", content[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], position = body, position + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8 and b"IEND" in chunks
    pixel = {0: 1, 2: 3}[colour]
    raw, stride = zlib.decompress(chunks[b"IDAT"]), 1 + width * pixel
    assert len(raw) == height * stride and all(raw[row * stride] == 0 for row in range(height))
    return width, height, pixel, [list(raw[row * stride + 1 : (row + 1) * stride]) for row in range(height)]


def cut(file):
    """Leave half of the file, as a full disk or a broken transfer does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
