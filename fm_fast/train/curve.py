"""The loss curve of a run as a picture, drawn from its log."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SIZE = (800, 500)
FRAME = (70, 20, 780, 450)  # left, top, right, bottom
GREY, BLACK = (200, 200, 200), (0, 0, 0)
COLOURS = {"loss": BLACK, "t in 0..1/4": (31, 119, 180), "1/4..1/2": (44, 160, 44), "1/2..3/4": (255, 127, 14), "3/4..1": (214, 39, 40)}
Points = list[tuple[float, float]]


def can_draw() -> bool:
    """Whether Pillow is installed."""
    return find_spec("PIL") is not None


def read_curves(log: Path) -> dict[str, Points]:
    """(step, loss) by name: the mean loss and those of the quartiles of t. Losses that are not positive numbers are left out."""
    curves: dict[str, Points] = {name: [] for name in COLOURS}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        values = [record["loss"], *record.get("loss_by_quartile", [])]
        for name, value in zip(COLOURS, values, strict=False):
            if value is not None and math.isfinite(value) and value > 0:
                curves[name].append((record["step"], value))
    return curves


def draw_curves(log: Path, picture: Path) -> None:
    """The losses against the step, on a logarithmic scale, as a PNG. Needs Pillow; without any loss there is no picture."""
    from PIL import Image, ImageDraw

    curves = read_curves(log)
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    axes = _Axes(max(step for step, _ in points), min(loss for _, loss in points), max(loss for _, loss in points))
    _draw_axes(draw, axes)
    for number, (name, curve) in enumerate(curves.items()):
        pixels = [axes.pixel(step, loss) for step, loss in curve]
        if len(pixels) > 1:
            draw.line(pixels, fill=COLOURS[name], width=2 if name == "loss" else 1)
        if curve:
            draw.text((FRAME[2] - 90, FRAME[1] + 8 + 16 * number), name, fill=COLOURS[name])
    image.save(picture)


class _Axes:
    """Steps from 0 to the last; losses from a tick below the smallest to a tick above the largest, logarithmic."""

    def __init__(self, last_step: float, low: float, high: float) -> None:
        self.last_step = max(last_step, 1)
        ticks = [mantissa * 10.0**power for power in range(-12, 13) for mantissa in (1, 2, 5)]
        self.low = max((tick for tick in ticks if tick <= low), default=ticks[0])
        self.high = min((tick for tick in ticks if tick > high), default=ticks[-1])
        self.losses = [tick for tick in ticks if self.low <= tick <= self.high]
        self.steps = [self.last_step * i / 5 for i in range(6)]

    def pixel(self, step: float, loss: float) -> tuple[float, float]:
        left, top, right, bottom = FRAME
        height = math.log(loss / self.low) / math.log(self.high / self.low)
        return left + (right - left) * step / self.last_step, bottom - (bottom - top) * height


def _draw_axes(draw: Any, axes: _Axes) -> None:
    left, _, right, bottom = FRAME
    for loss in axes.losses:
        _, y = axes.pixel(0, loss)
        draw.line([(left, y), (right, y)], fill=GREY)
        draw.text((left - 8, y), f"{loss:g}", fill=BLACK, anchor="rm")
    for step in axes.steps:
        x, _ = axes.pixel(step, axes.low)
        draw.text((x, bottom + 6), f"{step:.0f}", fill=BLACK, anchor="ma")
    draw.rectangle(FRAME, outline=BLACK)
    draw.text(((left + right) / 2, bottom + 24), "step", fill=BLACK, anchor="ma")
