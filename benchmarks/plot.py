"""Draw committed rows, measuring nothing: how many times fm_fast's value every other provider's is.

    python -m benchmarks.plot [FILES or folders] [--out docs/images]

One figure an op and machine, with a panel a mode: medians of paired ratios, and bars from the 20th to the 80th percentile. Of several
runs of an op on a machine the latest is drawn. Needs matplotlib, the extra ``plot``.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import peers, results
from fm_fast.reproduce.drawing import require_matplotlib

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# Colours that stay apart in grey and for colour-blind eyes (Okabe & Ito 2008); with the markers no two of 35 providers look alike.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
PANEL_WIDTH, ROW_HEIGHT, DPI = 3.6, 0.17, 100
NUMBERS = ("median", "p20", "p80")
COLUMNS = (*(field.name for field in fields(results.Row)), "device", "threads", "cpu_isa", "torch", "fm_fast", "commit", "date")
VERSIONS = ("fm_fast", "torch", "triton", "python", "cuda", *peers.PINNED)

Record = Mapping[str, Any]


class NotRows(Exception):
    """A file that cannot be drawn, and why."""


def files_in(paths: Iterable[Path]) -> list[Path]:
    """The files named, and of the folders named every file of rows; NotRows if one is missing or there is none at all."""
    found = []
    for path in paths:
        if not path.exists():
            raise NotRows(f"{path}: no such file or folder")
        # The GPU report writes what came of its stages beside its rows.
        found += sorted(file for file in path.glob("*.json") if not file.stem.endswith("-stages")) if path.is_dir() else [path]
    if not found:
        raise NotRows(f"no JSON file of rows in {', '.join(map(str, paths))}")
    return found


def read(file: Path) -> list[Record]:
    """The rows of a file that ``benchmarks.run`` wrote; NotRows if it is another."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotRows(f"{file} is not a JSON file of benchmarks.run: {error}") from error
    if not isinstance(records, list) or not records:
        raise NotRows(f"{file} is not a JSON file of benchmarks.run: expected a list of rows, got {type(records).__name__}")
    for number, record in enumerate(records):
        missing = [name for name in COLUMNS if name not in record] if isinstance(record, dict) else list(COLUMNS)
        if missing:
            raise NotRows(f"{file} is not a JSON file of benchmarks.run: row {number} has no {', '.join(missing)}")
        if not all(isinstance(record[name], int | float) for name in NUMBERS):
            raise NotRows(f"{file}: row {number} has no numbers in {', '.join(NUMBERS)}")
    return records


def runs(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Rows by figure, <op>-<device>-<instruction set>: those of the latest date."""
    found: dict[str, list[Record]] = {}
    for record in records:
        parts = (record["op"], record["device"], record["cpu_isa"])
        found.setdefault("-".join("_".join(part.split()) for part in parts if part), []).append(record)
    return {name: [row for row in rows if row["date"] == max(r["date"] for r in rows)] for name, rows in found.items()}


def compared(rows: Sequence[Record]) -> tuple[str, list[Record]]:
    """The name of our provider, and the ratios of all others; NotRows if no ratio is positive, as a logarithmic axis needs."""
    ours = rows[0]["provider"]
    ratios = [row for row in rows if row["metric"] in ("ratio", "share") and row["provider"] != ours and row["median"] > 0.0]
    if not ratios:
        raise NotRows(f"{rows[0]['op']}: the rows hold no ratio of another provider to {ours}")
    return ours, ratios


def caption(rows: Sequence[Record]) -> str:
    """Where, with what and from which commit the rows are."""
    first = rows[0]
    threads = f"{first['threads']} threads" if first["threads"] else ""
    versions = [f"{name} {first[name]}" for name in VERSIONS if first.get(name)]
    commits = ", ".join(dict.fromkeys(row["commit"] or "unknown" for row in rows))
    return ", ".join(part for part in (first["device"], first["cpu_isa"], threads, *versions, f"commit {commits}", first["date"]) if part)


def figure_of(rows: Sequence[Record]) -> Any:
    """The figure of one op on one machine."""
    ours, ratios = compared(rows)
    modes, problems, providers = (_distinct(ratios, of) for of in (_mode, _problem, _provider))
    lines = len(problems) * (len(providers) + 1)
    figure = require_matplotlib().Figure(
        figsize=(2.6 + PANEL_WIDTH * len(modes), 1.6 + ROW_HEIGHT * (lines + len(providers))), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _draw_panel(axes, [row for row in ratios if _mode(row) == mode], problems, providers)
        axes.set_title(mode, fontsize=9)
    middles = [-(i * (len(providers) + 1) + (len(providers) - 1) / 2) for i in range(len(problems))]
    panels[0].set_yticks(middles, problems, fontsize=9)
    title = f"{rows[0]['op']}: {rows[0]['metric']} over those of {ours}, medians of paired ratios and their 20th to 80th percentile"
    figure.suptitle(_wrapped(title, figure, 10), fontsize=10)
    _label(figure, panels, providers, caption(rows))
    return figure


def _draw_panel(axes: Any, ratios: Sequence[Record], problems: Sequence[str], providers: Sequence[str]) -> None:
    """A point and its bar for every provider, in blocks a problem from the top."""
    axes.set_xscale("log", nonpositive="clip")
    axes.axvline(1.0, color="#7F7F7F", linewidth=1.0)
    axes.xaxis.set_major_locator(_ticker().LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.xaxis.set_minor_locator(_ticker().NullLocator())
    axes.grid(axis="x", linewidth=0.3)
    for row in ratios:
        index = providers.index(_provider(row))
        height = -(problems.index(_problem(row)) * (len(providers) + 1) + index)
        bar = [[row["median"] - row["p20"]], [row["p80"] - row["median"]]]
        marker, colour = MARKERS[index // len(COLOURS) % len(MARKERS)], COLOURS[index % len(COLOURS)]
        axes.errorbar(row["median"], height, xerr=bar, fmt=marker, color=colour, markersize=4, capsize=2, label=_provider(row))


def _ticker() -> Any:
    return import_module("matplotlib.ticker")


def _label(figure: Any, panels: Sequence[Any], providers: Sequence[str], text: str) -> None:
    """The legend once, in the order of the providers, and the caption below it."""
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([handles[name] for name in providers], providers, loc="outside right center", fontsize=8)
    figure.supxlabel(_wrapped(text, figure, 7), fontsize=7)


def _wrapped(text: str, figure: Any, points: int) -> str:
    """In lines that fit the figure: a letter is about half as wide as high, and an inch has 72 points."""
    return textwrap.fill(text, int(figure.get_figwidth() * 72 / (0.55 * points)))


def _mode(row: Record) -> str:
    return row["mode"]


def _provider(row: Record) -> str:
    return row["provider"]


def _problem(row: Record) -> str:
    return row["size"] if row["dtype"] == "float32" else f"{row['size']}, {row['dtype']}"


def _distinct(rows: Iterable[Record], of: Callable[[Record], str]) -> list[str]:
    return list(dict.fromkeys(map(of, rows)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[results.FOLDER], help="JSON files of rows, or folders of them")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the figures (default: docs/images)")
    options = parser.parse_args(arguments)
    try:
        records = [record for file in files_in(options.paths) for record in read(file)]
        for name, rows in runs(records).items():
            figure, file = figure_of(rows), options.out / f"benchmark-{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, metadata={"Software": None})
            print(file)
    except (NotRows, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
