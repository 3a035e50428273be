"""Kinds of probe vectors, and what each needs: how many, which are independent, and the colours of structured ones.

A divergence is estimated by the mean of z^T J z over probes z with E z z^T = I (Hutchinson). With S the symmetric part of J:

* rademacher: independent random signs, variance 2 sum_{i != j} S_ij^2 a probe. Insensitive to a multiple of the identity, which the
  Jacobian of a flow-matching velocity mostly is late in the path.
* gaussian: 2 ||S||_F^2, never better here; for comparison.
* hadamard: one random sign vector times K distinct random rows of a Hadamard matrix: (D - K) / (D - 1) of rademacher's variance, with D
  the next power of two.
* coloured: one random sign vector times all K rows of a Hadamard matrix over K colours of the pixels: only pairs of the same colour
  are left, which lie far apart (hierarchical probing in lattice QCD: Stathopoulos, Laeuchli and Orginos, 2013).
* exact: the D unit vectors.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fm_fast import _checks, _ops
from fm_fast._constants import constant
from fm_fast._philox import Kind, Stream

KINDS = ("auto", "exact", "rademacher", "gaussian", "hadamard", "coloured")
ALWAYS_EXACT = 4


@dataclass(frozen=True, eq=False)
class Probes:
    """The probes of every evaluation: ``total`` of them, in groups of ``share`` that share a sign vector; D = ``size`` if exact."""

    kind: str
    total: int
    share: int
    size: int
    codes: Tensor
    rows: Tensor

    @property
    def exact(self) -> bool:
        return self.kind == "exact"

    @property
    def groups(self) -> int:
        """Independent groups; an exact trace is one."""
        return 1 if self.exact else self.total // self.share

    @property
    def known_variance(self) -> bool:
        """Whether the probes tell how uncertain their mean is: nothing if exact, else by two independent groups or more."""
        return self.exact or self.groups >= 2

    def at(self, key: Tensor, index: int, backend: str) -> _ops.ProbeSet:
        """The probes of the evaluation whose draws begin at ``index``."""
        rows = _random_rows(self, key, index, backend) if self.kind == "hadamard" else self.rows
        return _ops.ProbeSet(key, self.codes, rows, index, self.total, self.share, self.kind == "gaussian")


def make_probes(kind: str, probes: int, replicates: int, shape: tuple[int, ...], device: torch.device) -> Probes:
    """The probes for samples of [B, ...] = shape.

    Raises ValueError or TypeError for unknown kinds, numbers below 1, and coloured probes for which the shape or the number does not do.
    """
    _checks.one_of("kind", kind, KINDS)
    _checks.count("probes", probes)
    _checks.count("replicates", replicates)
    size, none = math.prod(shape[1:]), torch.empty(0, dtype=torch.int64, device=device)
    if kind == "coloured":
        _check_colours(probes, shape)
    if kind == "exact" or (kind == "auto" and size <= max(ALWAYS_EXACT, probes)) or (kind in ("hadamard", "coloured") and size <= probes):
        return Probes("exact", size, 1, size, none, none)
    if kind == "hadamard":
        return Probes(kind, probes * replicates, probes, size, torch.arange(size, device=device), none)
    if kind == "coloured":
        codes = constant(colours(shape, probes), torch.int64, device)
        return Probes(kind, probes * replicates, probes, size, codes, torch.arange(probes, device=device).repeat(replicates))
    return Probes("rademacher" if kind == "auto" else kind, probes * replicates, 1, size, none, none)


def single_probe(probes: Probes) -> Probes:
    """One Rademacher probe for samples of the same size."""
    none = probes.codes.new_empty(0)
    return Probes("rademacher", 1, 1, probes.size, none, none)


def _random_rows(probes: Probes, key: Tensor, index: int, backend: str) -> Tensor:
    """Distinct random rows for each group, the same for all samples: positions of the largest of D random words."""
    padded = 1 << max(probes.size - 1, 0).bit_length()
    shared = torch.cat([key[:2], torch.zeros_like(key[:1])])
    words = [
        _ops.noise(shared, (1, padded), Kind.word, Stream.probe_rows, index + group, torch.int64, backend) for group in range(probes.groups)
    ]
    return torch.cat(words).topk(probes.share, dim=1).indices.flatten()


# Colours


def _check_colours(count: int, shape: tuple[int, ...]) -> None:
    if len(shape) < 3:
        raise ValueError(f'kind="coloured" needs samples [B, C, ...] with at least one dimension of positions, got shape {tuple(shape)}')
    if count & (count - 1):
        raise ValueError(f'probes must be a power of two for kind="coloured", got {count}')


def colours(shape: tuple[int, ...], count: int) -> np.ndarray:
    """The colour 0 .. count - 1 of each element of a sample [C, ...] in its logical order, int64 [D]; shape is [B, C, ...].

    Positions of one colour form a lattice. In other channels the lattice is shifted as far as it goes.
    """
    channels, extents = shape[1], shape[2:]
    bits = count.bit_length() - 1
    code = _position_code(extents, bits)
    masks = np.array([_channel_mask(channel, len(extents), bits) for channel in range(channels)], dtype=np.int64)
    return (masks[:, None] ^ code.reshape(1, -1)).ravel()


def _position_code(extents: tuple[int, ...], bits: int) -> np.ndarray:
    """Low bits of the coordinates, finest level first; a level that cannot be afforded whole is a checkerboard."""
    coordinates = np.meshgrid(*(np.arange(extent) for extent in extents), indexing="ij")
    code, used, level = np.zeros(extents, dtype=np.int64), 0, 0
    while used < bits:
        level_bits = [(coordinate >> level) & 1 for coordinate in coordinates]
        if bits - used < len(extents):
            level_bits = _checkerboards(level_bits, bits - used)
        for bit in level_bits:
            code |= bit << used
            used += 1
        level += 1
    return code


def _checkerboards(level_bits: list[np.ndarray], count: int) -> list[np.ndarray]:
    """``count`` parities, of runs of coordinates that cover all of them."""
    return [np.bitwise_xor.reduce(part, axis=0) for part in np.array_split(np.stack(level_bits), count)]


def _channel_mask(channel: int, dimensions: int, bits: int) -> int:
    """What a channel's code is xor-ed with: the coarsest level first, all of its coordinates before single ones."""
    mask, level = 0, (bits - 1) // dimensions
    while channel and level >= 0:
        first, width = level * dimensions, min(dimensions, bits - level * dimensions)
        digit = channel % (1 << width)
        mask |= _shift_pattern(digit, width) << first
        channel, level = channel >> width, level - 1
    return mask


def _shift_pattern(digit: int, width: int) -> int:
    """0, then the patterns of ``width`` bits with the most set bits first: the longest shifts."""
    patterns = sorted(range(1 << width), key=lambda pattern: (pattern != 0, -pattern.bit_count(), pattern))
    return patterns[digit]
