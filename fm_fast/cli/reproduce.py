"""fm-fast reproduce: the paper's comparisons at a small size, as JSON, Markdown and PNG."""

import argparse
import os
from pathlib import Path
from typing import Any

from fm_fast.cli.options import positive
from fm_fast.reproduce import checkerboard, drawing, figures, table1

SOURCES = ("digits", "fashion")


def add_reproduce(commands: Any) -> None:
    """The command and its comparisons."""
    parser = commands.add_parser(
        "reproduce", help="the paper's comparisons at a small size, as tables and figures",
        description="The paper's comparisons at a size that two CPU cores compute in minutes. Finished parts are kept in the folder and not"
        " computed again. Figures need matplotlib: pip install 'fm_fast[plot]'.",
    )  # fmt: skip
    comparisons = parser.add_subparsers(required=True, metavar="comparison")
    _add_table1(comparisons)
    _add_checkerboard(comparisons)
    _add_figures(comparisons)


def _add(comparisons: Any, name: str, text: str, steps: int, steps_text: str) -> argparse.ArgumentParser:
    parser = comparisons.add_parser(name, help=text, description=text)
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"), metavar="FOLDER", help="where everything goes [out/reproduce]")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="the numbers are a function of it and the settings [0]")
    parser.add_argument("--steps", type=positive, default=steps, metavar="INT", help=f"{steps_text} [{steps}]")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=positive, default=cores, metavar="INT", help=f"processes; the numbers are the same [{cores}]")
    return parser


def _add_table1(comparisons: Any) -> None:
    parser = _add(comparisons, "table1", "Tables 1 and 4: five objectives on small images", 300, "training steps of each objective")
    parser.add_argument("--data", choices=SOURCES, default="digits", help="digits (shipped) or fashion (Fashion-MNIST, 14x14) [digits]")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of Fashion-MNIST's IDX files [that of Debian's package]")
    parser.add_argument(
        "--alike", action="store_true", help="uniform times and no preconditioning for any objective, as in the paper [what suits each]"
    )
    parser.set_defaults(run=_table1)


def _table1(options: argparse.Namespace) -> None:
    drawing.require_matplotlib()
    rows = table1.reproduce_table1(options.out, options.data, options.seed, options.steps, options.source, options.jobs, options.alike)
    name = table1.table_name(options.data, options.alike)
    picture = drawing.draw_table1(rows, options.out / f"{name}.png")
    _tell(table1.as_text(rows), options.out / f"{name}.json", options.out / f"{name}.md", picture)


def _add_checkerboard(comparisons: Any) -> None:
    parser = _add(
        comparisons, "checkerboard", "Figures 4, 9 and 10: five objectives in two dimensions", 4000, "training steps of each, at least 8"
    )
    parser.set_defaults(run=_checkerboard)


def _checkerboard(options: argparse.Namespace) -> None:
    drawing.require_matplotlib()
    results = checkerboard.reproduce_checkerboard(options.out, options.seed, options.steps, options.jobs)
    pictures = (
        drawing.draw_trajectories(results, options.out / "checkerboard-trajectories.png"),
        drawing.draw_costs(results, options.out / "checkerboard-costs.png"),
    )
    _tell(checkerboard.as_text(results), options.out / "checkerboard.json", *pictures)


def _add_figures(comparisons: Any) -> None:
    parser = _add(
        comparisons, "figures", "Figures 6 and 7 (left) on exact flows, no training", 500, "steps of the reference solution, at least 100"
    )
    parser.add_argument("--draws", type=positive, default=3, metavar="INT", help="data sets [3]")
    parser.set_defaults(run=_figures)


def _figures(options: argparse.Namespace) -> None:
    drawing.require_matplotlib()
    results = figures.reproduce_figures(options.out, options.seed, options.steps, options.draws, options.jobs)
    pictures = (
        drawing.draw_noise_removal(results, options.out / "figure6.png"),
        drawing.draw_midpoint_error(results, options.out / "figure7-left.png"),
    )
    _tell(figures.as_text(results), options.out / "figures.json", *pictures)


def _tell(table: str, *files: Path) -> None:
    print(f"\n{table}\n\nwrote {', '.join(map(str, files))}")
