"""Figures of benchmark rows: what they show is what the rows say, and a file of anything else is refused."""

import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import plot

SURROUNDINGS = {"device": "Some CPU", "threads": "2", "cpu_isa": "avx2", "torch": "2.13", "fm_fast": "0.1.0", "commit": "abc1234"}


def row(provider, size, mode, metric, median, date="2026-01-02"):
    numbers = {"median": median, "p20": 0.9 * median, "p80": 1.25 * median}
    return {
        "op": "loss", "provider": provider, "mode": mode, "size": size, "dtype": "float32", "metric": metric, **numbers, **SURROUNDINGS,
        "date": date,
    }  # fmt: skip


def rows(date="2026-01-02", factor=1.0):
    """Two providers beside ours, of which one runs in one mode only."""
    found = []
    for size in ("small", "large"):
        for mode, ratios in {"drawn": {"ours": 1.0, "naive": 4.0, "best": 2.0}, "given": {"ours": 1.0, "naive": 0.5}}.items():
            for provider, ratio in ratios.items():
                found += [row(provider, size, mode, "ms", 7.0, date), row(provider, size, mode, "ratio", factor * ratio, date)]
    return found


def written(path, records):
    path.write_text(json.dumps(records))
    return path


def points(axes):
    """{provider: [(ratio, lowest, highest)]} as drawn."""
    found = {}
    for container in axes.containers:
        (line, _, (bar,)) = container.lines
        (low, _), (high, _) = bar.get_segments()[0]
        found.setdefault(container.get_label(), []).append((line.get_xdata()[0], low, high))
    return found


def test_the_figure_shows_the_rows():
    pytest.importorskip("matplotlib")
    figure = plot.figure_of(rows())
    drawn, given = figure.axes
    assert (drawn.get_title(), given.get_title()) == ("drawn", "given")
    assert points(drawn) == {"naive": [pytest.approx((4.0, 3.6, 5.0))] * 2, "best": [pytest.approx((2.0, 1.8, 2.5))] * 2}
    assert points(given) == {"naive": [pytest.approx((0.5, 0.45, 0.625))] * 2}
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["small", "large"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["naive", "best"]
    assert "ms over those of ours" in figure.get_suptitle()
    assert figure.get_supxlabel() == "Some CPU, avx2, 2 threads, fm_fast 0.1.0, torch 2.13, commit abc1234, 2026-01-02"


def test_a_folder_gives_one_figure_an_op_of_its_latest_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    written(tmp_path / "old.json", rows("2025-12-31", factor=3.0))
    written(tmp_path / "new.json", rows())
    (tmp_path / "new-stages.json").write_text("{}")
    plot.main([str(tmp_path), "--out", str(tmp_path / "images")])
    (image,) = (tmp_path / "images").iterdir()
    assert image.name == "benchmark-loss-Some_CPU-avx2.png" and image.read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.split() == [str(image)]
    latest = plot.runs(record for file in plot.files_in([tmp_path]) for record in plot.read(file))
    assert latest == {"loss-Some_CPU-avx2": rows()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "x.json is not a JSON file of benchmarks.run: Expecting value"),
        ("{}", "expected a list of rows, got dict"),
        ("[]", "expected a list of rows, got list"),
        ("[1]", "row 0 has no op, provider"),
        (json.dumps([{**rows()[0], "median": "fast"}]), "row 0 has no numbers in median, p20, p80"),
        (json.dumps([{name: value for name, value in rows()[0].items() if name != "commit"}]), "row 0 has no commit$"),
        (json.dumps([record for record in rows() if record["provider"] == "ours"]), "no ratio of another provider to ours"),
    ],
    ids=["text", "object", "nothing", "numbers", "words", "column", "alone"],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        plot.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "images")])
    assert not (tmp_path / "images").exists()


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"missing.json: no such file or folder"):
        plot.main([str(tmp_path / "missing.json")])
    with pytest.raises(SystemExit, match=f"no JSON file of rows in {tmp_path}"):
        plot.main([str(tmp_path)])


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"pip install 'fm_fast\[plot\]'"):
        plot.main([str(written(tmp_path / "x.json", rows())), "--out", str(tmp_path / "images")])
