"""The figures as PNG, drawn from results and nothing else. Needs matplotlib, the extra `plot`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fm_fast.reproduce.checkerboard import DENSITY_TIMES, EXTENT, NAMES, ObjectiveResult
from fm_fast.reproduce.figures import PATHS, PICTURE_TIMES, PathResult
from fm_fast.reproduce.table1 import Row

# Colours that stay apart in grey and for colour-blind eyes (Okabe & Ito 2008).
COLOURS = {"fm-ot": "#0072B2", "fm-vp": "#D55E00", "ddpm": "#009E73", "score": "#CC79A7", "scoreflow": "#7F7F7F"}
PATH_COLOURS = {"ot": COLOURS["fm-ot"], "vp": COLOURS["fm-vp"]}
PATH_NAMES = {path: name for name, path in PATHS.items()}
DPI = 100


def require_matplotlib() -> Any:
    """matplotlib.figure, which draws without a display, or an ImportError that names the extra."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'fm_fast[plot]'") from error


def _figure(width: float, height: float) -> Any:
    return require_matplotlib().Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Any, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
    return file


# Figure 6 and the left of Figure 7


def draw_noise_removal(results: Sequence[PathResult], file: Path) -> Path:
    """Figure 6: the same noise on its way to images, for both paths, and how much of the way is left."""
    shown = [result for result in results if result.draw == results[0].draw]
    samples, frames = len(shown[0].pictures), len(shown[0].pictures[0])
    figure = _figure(9.4, 4.9)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.01, wspace=0.0, hspace=0.0)
    left, right = figure.subfigures(1, 2, width_ratios=[1.4, 1.0], wspace=0.06)
    axes = left.subplots(samples * len(shown), frames)
    titles = [f"t = {t:g}" for t in (*PICTURE_TIMES, 1.0)]
    for block, result in enumerate(shown):
        for row, pictures in enumerate(result.pictures):
            for column, picture in enumerate(pictures):
                _show_picture(axes[block * samples + row][column], picture)
        axes[block * samples + samples // 2][0].set_ylabel(PATH_NAMES[result.path], color=PATH_COLOURS[result.path], fontsize=11)
    for column, title in enumerate(titles):
        axes[0][column].set_title(title, fontsize=9)
    _draw_residuals(right.subplots(), results)
    return _save(figure, file)


def _show_picture(axis: Any, picture: Sequence[float]) -> None:
    side = round(len(picture) ** 0.5)
    rows = [picture[start : start + side] for start in range(0, len(picture), side)]
    axis.imshow(rows, cmap="gray", vmin=-1.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_residuals(axis: Any, results: Sequence[PathResult]) -> None:
    for result in results:
        label = PATH_NAMES[result.path] if result.draw == results[0].draw else None
        axis.plot((*result.times, 1.0), (*result.residual, 0.0), color=PATH_COLOURS[result.path], lw=1.3, label=label)
    times = results[0].times
    axis.plot((*times, 1.0), [(1.0 - t) ** 2 for t in (*times, 1.0)], "k:", lw=1.2, label="straight lines, (1 - t)²")
    axis.set(xlabel="time t", ylabel="E|x_t - x_1|² / E|x_0 - x_1|²", xlim=(0, 1), ylim=(0, 1.03))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=9)
    axis.grid(alpha=0.3)


def draw_midpoint_error(results: Sequence[PathResult], file: Path) -> Path:
    """Figure 7, left: error of the midpoint rule against the number of function evaluations."""
    figure = _figure(5.4, 4.0)
    axis = figure.subplots()
    for result in results:
        label = PATH_NAMES[result.path] if result.draw == results[0].draw else None
        axis.plot(result.nfe, result.mse, color=PATH_COLOURS[result.path], lw=1.4, label=label)
        median = "their median samples" if result is results[-1] else None
        axis.plot(result.nfe, result.median_mse, color=PATH_COLOURS[result.path], lw=0.9, ls=":", label=median)
    draws = len({result.draw for result in results})
    axis.set(yscale="log", xlabel="NFE (midpoint rule)", ylabel="mean squared error a pixel", xlim=(0, results[0].nfe[-1]))
    axis.set_title(f"exact flow of 8x8 images; {draws} data sets, one line each", fontsize=10)
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    return _save(figure, file)


# The checkerboard


def draw_trajectories(results: Sequence[ObjectiveResult], file: Path) -> Path:
    """Figures 4 (left) and 9: the density of samples at several times, one objective a row."""
    times = (*DENSITY_TIMES, 1.0)
    figure = _figure(1.1 * len(times) + 0.5, 1.1 * len(results) + 0.4)
    axes = figure.subplots(len(results), len(times))
    for row, result in enumerate(results):
        highest = max(max(line) for line in result.densities[-1])
        for column, density in enumerate(result.densities):
            axis = axes[row][column]
            extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
            axis.imshow(density, origin="lower", extent=extent, cmap="viridis", vmin=0, vmax=0.8 * highest, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"t = {times[column]:g}", fontsize=10)
        axes[row][0].set_ylabel(NAMES[result.objective], fontsize=9)
    return _save(figure, file)


def draw_costs(results: Sequence[ObjectiveResult], file: Path) -> Path:
    """Figure 4 (right) as curves, the midpoint rule's error against NFE, and as in Figure 10, of CIFAR-10, dopri5's NFE in training."""
    figure = _figure(9.0, 3.8)
    errors, training = figure.subplots(1, 2)
    for result in results:
        style = {"color": COLOURS[result.objective], "label": NAMES[result.objective], "lw": 1.5, "marker": ".", "ms": 6}
        errors.plot(result.counts, result.mse, **style)
        training.plot(result.snapshots, result.nfe_during, **style)
    errors.set(xscale="log", yscale="log", xlabel="NFE (midpoint rule)", ylabel="mean squared error a coordinate")
    errors.set_xticks([4, 8, 16, 32, 64], labels=["4", "8", "16", "32", "64"])
    errors.minorticks_off()
    training.set(xlabel="training step", ylabel="NFE of dopri5, tolerance 1e-5", ylim=(0, None))
    errors.legend(fontsize=9)
    for axis in (errors, training):
        axis.grid(alpha=0.3)
    return _save(figure, file)


# Table 1


def draw_table1(rows: Sequence[Row], file: Path) -> Path:
    """Table 1 and Table 4 as bars and curves: NFE, bits/dim against dequantisation draws, two-sample accuracy."""
    figure = _figure(10.0, 3.6)
    nfe, bits, quality = figure.subplots(1, 3)
    names, colours = [NAMES[row.objective] for row in rows], [COLOURS[row.objective] for row in rows]
    nfe.barh(names, [row.nfe for row in rows], color=colours)
    nfe.set(xlabel="NFE of dopri5, tolerance 1e-5")
    for row in rows:
        bits.plot(row.draws, row.bits_by_draws, color=COLOURS[row.objective], marker="o", ms=4)
    bits.set(xscale="log", xlabel="dequantisation draws K", ylabel="bits a dimension")
    bits.set_xticks(rows[0].draws, labels=[str(draw) for draw in rows[0].draws])
    bits.minorticks_off()
    quality.barh(names, [row.nearest_neighbour for row in rows], color=colours)
    quality.axvline(rows[0].real_nearest_neighbour, color="k", ls=":", lw=1.2, label="real images")
    quality.set(xlabel="1-NN two-sample accuracy (0.5 is best)", xlim=(0.4, 1.0), yticks=[])
    quality.legend(fontsize=8)
    for axis in (nfe, quality):
        axis.invert_yaxis()
    for axis in (nfe, bits, quality):
        axis.grid(alpha=0.3)
    return _save(figure, file)
