"""The course of a run as pictures, drawn from its logs: losses, and the quality of samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fm_fast.train.files import read_records, replaced_whole

WIDTH, HEIGHT = 800, 500
LEFT, TOP, RIGHT, BOTTOM = 70, 20, 20, 50  # margins of a panel
GREY, BLACK = (200, 200, 200), (0, 0, 0)
BLUE, GREEN, ORANGE, RED = (31, 119, 180), (44, 160, 44), (255, 127, 14), (214, 39, 40)
LOSSES = {"loss": BLACK, "t in 0..1/4": BLUE, "1/4..1/2": GREEN, "1/2..3/4": ORANGE, "3/4..1": RED}
# Of the records of train/evaluation/judge.py; beside each the level of real images.
SHARES = {"agreement": BLUE, "nearest_neighbour": ORANGE}
DISTANCES = {"frechet": RED, "novelty": GREEN}
NAMES = {"agreement": "class agreement", "nearest_neighbour": "1-NN accuracy", "frechet": "feature distance", "novelty": "novelty"}
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """(step, value), and a level to compare with, dashed."""

    colour: Colour
    points: Points
    level: float | None = None


@dataclass(frozen=True)
class Panel:
    """Curves by name over the same steps; on a logarithmic scale, or from 0 to 1."""

    curves: Mapping[str, Curve]
    logarithmic: bool = True

    @property
    def values(self) -> list[float]:
        """All that the scale must reach; none without a point."""
        shown = [curve for curve in self.curves.values() if curve.points]
        levels = [curve.level for curve in shown if curve.level is not None]
        return [*levels, *(value for curve in shown for _, value in curve.points)]


def can_draw() -> bool:
    """Whether Pillow is installed."""
    return find_spec("PIL") is not None


def read_curves(log: Path) -> dict[str, Points]:
    """(step, loss) by name: the mean loss and those of the quartiles of t. Losses that are not positive numbers are left out."""
    curves: dict[str, Points] = {name: [] for name in LOSSES}
    for record in read_records(log):
        values = [record.get("loss"), *record.get("loss_by_quartile", [])]
        for name, value in zip(LOSSES, values, strict=False):
            if _is_positive(value):
                curves[name].append((record["step"], value))
    return curves


def draw_curves(log: Path, picture: Path) -> None:
    """The losses against the step, on a logarithmic scale, as a PNG. Needs Pillow; without any loss there is no picture."""
    curves = {name: Curve(LOSSES[name], points) for name, points in read_curves(log).items()}
    _draw([Panel(curves)], picture)


def draw_quality(log: Path, picture: Path) -> None:
    """Shares and distances of the samples against the step, beside those of real images, as a PNG. Needs Pillow."""
    records = read_records(log)
    shares, distances = (
        {NAMES[name]: Curve(colour, _points(records, name), _level(records, name)) for name, colour in names.items()}
        for names in (SHARES, DISTANCES)
    )
    _draw([Panel(shares, logarithmic=False), Panel(distances)], picture)


def _points(records: list[dict[str, Any]], name: str) -> Points:
    keep = _is_positive if name in DISTANCES else lambda value: value is not None
    return [(record["step"], record[name]) for record in records if keep(record.get(name))]


def _level(records: list[dict[str, Any]], name: str) -> float | None:
    """Of real images: 1 for the novelty, which is relative to theirs."""
    if name == "novelty" or not records:
        return 1.0
    level = records[-1].get(f"real_{name}")
    return level if name in SHARES or _is_positive(level) else None


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


# Drawing


def _draw(panels: Sequence[Panel], picture: Path) -> None:
    """The panels side by side; no picture without a point."""
    from PIL import Image, ImageDraw

    steps = [step for panel in panels for curve in panel.curves.values() for step, _ in curve.points]
    if not steps:
        return
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, width = ImageDraw.Draw(image), WIDTH // len(panels)
    for number, panel in enumerate(panels):
        if panel.values:
            _draw_panel(draw, panel, _Axes(panel, (number * width + LEFT, TOP, (number + 1) * width - RIGHT, HEIGHT - BOTTOM), max(steps)))
    with replaced_whole(picture) as temporary:
        image.save(temporary, "PNG")


class _Axes:
    """Steps from 0 to the last; values from a tick below the smallest to a tick above the largest, or from 0 to 1."""

    def __init__(self, panel: Panel, frame: tuple[int, int, int, int], last_step: float) -> None:
        self.frame, self.last_step, self.logarithmic = frame, max(last_step, 1), panel.logarithmic
        self.steps = sorted({round(self.last_step * i / 5) for i in range(6)})
        self.ticks = _decades(min(panel.values), max(panel.values)) if panel.logarithmic else [i / 5 for i in range(6)]

    def pixel(self, step: float, value: float) -> tuple[float, float]:
        left, top, right, bottom = self.frame
        scale = math.log if self.logarithmic else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return left + (right - left) * step / self.last_step, bottom - (bottom - top) * (scale(value) - low) / (high - low)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of 10 that enclose these."""
    ticks = [mantissa * 10.0**power for power in range(-12, 13) for mantissa in (1, 2, 5)]
    low = max((tick for tick in ticks if tick <= low), default=ticks[0])
    high = min((tick for tick in ticks if tick > high), default=ticks[-1])
    return [tick for tick in ticks if low <= tick <= high]


def _draw_panel(draw: Any, panel: Panel, axes: _Axes) -> None:
    _draw_axes(draw, axes)
    _, top, right, bottom = axes.frame
    first = top + 8 if panel.logarithmic else bottom - 8 - 16 * len(panel.curves)  # shares lie in the upper half
    for number, (name, curve) in enumerate(panel.curves.items()):
        pixels = [axes.pixel(step, value) for step, value in curve.points]
        if len(pixels) == 1:
            draw.ellipse([(pixels[0][0] - 2, pixels[0][1] - 2), (pixels[0][0] + 2, pixels[0][1] + 2)], fill=curve.colour)
        else:
            draw.line(pixels, fill=curve.colour, width=2 if number == 0 else 1)
        if curve.points:
            draw.text((right - 6, first + 16 * number), name, fill=curve.colour, anchor="ra")
            _draw_level(draw, axes, curve)


def _draw_level(draw: Any, axes: _Axes, curve: Curve) -> None:
    if curve.level is None:
        return
    left, _, right, _ = axes.frame
    _, y = axes.pixel(0, curve.level)
    for x in range(left, right, 10):
        draw.line([(x, y), (x + 4, y)], fill=curve.colour)


def _draw_axes(draw: Any, axes: _Axes) -> None:
    left, _, right, bottom = axes.frame
    for value in axes.ticks:
        _, y = axes.pixel(0, value)
        draw.line([(left, y), (right, y)], fill=GREY)
        draw.text((left - 8, y), f"{value:g}", fill=BLACK, anchor="rm")
    for step in axes.steps:
        x, _ = axes.pixel(step, axes.ticks[0])
        draw.text((x, bottom + 6), f"{step:.0f}", fill=BLACK, anchor="ma")
    draw.rectangle(axes.frame, outline=BLACK)
    draw.text(((left + right) / 2, bottom + 24), "step", fill=BLACK, anchor="ma")
