"""The paper's comparisons: what section 6 claims and a small machine can show, on exact flows and trained; and the machinery around."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from trainer_helpers import TINY_NET, tiny

import fm_fast as fm
from fm_fast.cli import main
from fm_fast.reproduce import checkerboard, drawing, figures, table1
from fm_fast.reproduce.mixture import FastMixture, blob_images, image_mixture
from fm_fast.reproduce.results import Parts, rounded
from fm_fast.testing import GaussianMixture
from fm_fast.train.config import fit_to_data
from fm_fast.train.data import digits, load_dataset
from fm_fast.train.evaluation.classifier import train_classifier
from fm_fast.train.step import build_model
from fm_fast.train.storage.run_folder import RunFolder

WIDE = torch.float64


def numbers(result):
    return dataclasses.asdict(result)


# Exact flows of small images


@pytest.mark.parametrize("path", ["ot", "vp", "cosine"])
def test_fast_mixture_is_the_mixture(path):
    means, x = (torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=WIDE) for shape in ((5, 7), (6, 7)))
    arguments = (torch.arange(1.0, 6.0), means, torch.linspace(0.02, 0.8, 5), path)
    fast, slow = FastMixture(*arguments), GaussianMixture(*arguments)
    for t in (0.0, 0.3, 0.9, 0.999):
        for objective in ("velocity", "noise", "score", "data"):
            torch.testing.assert_close(fast.output(objective, x, t), slow.output(objective, x, t), rtol=1e-8, atol=1e-8)


def test_images_are_smooth_and_a_function_of_the_draw():
    images = blob_images(50, 1)
    assert images.shape == (50, 64) and torch.equal(images, blob_images(50, 1)) and not torch.equal(images, blob_images(50, 2))
    torch.testing.assert_close(images.abs().amax(1), torch.ones(50, dtype=WIDE))
    square = images.reshape(50, 8, 8)
    assert float((square[:, 1:] - square[:, :-1]).square().mean()) < 0.3 * float(images.var()), "neighbours are alike"


def test_the_flow_ends_at_the_images():
    field = image_mixture(1, "ot")
    x = fm.sample(field, fm.noise((8, 64), seed=0, step=0, dtype=WIDE), steps=200).x
    nearest = torch.cdist(x, field.centres).min(dim=1).values
    assert float(nearest.max()) < 0.02 * math.sqrt(64) * 1.5


@pytest.fixture(scope="module")
def exact():
    """{(draw, path): result} with 32 samples and no midpoint solves."""
    return {(draw, path): figures.path_result(draw, path, 0, 50, 32, counts=()) for draw in (1, 2, 3) for path in ("ot", "vp")}


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_optimal_transport_needs_fewer_adaptive_evaluations(exact, draw):
    ot, vp = exact[draw, "ot"], exact[draw, "vp"]
    assert figures.TOLERANCES[0] == 1e-3 and ot.adaptive_nfe[0] < vp.adaptive_nfe[0]


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_optimal_transport_needs_fewer_adaptive_evaluations_on_the_checkerboard(tolerance):
    """On the exact flow of a mixture with a component in each of its cells."""
    cells = [[column - 1.5, row - 1.5] for row in range(4) for column in range(4) if (row + column) % 2 == 0]
    x0, evaluations = fm.noise((256, 2), seed=0, step=0, dtype=WIDE), []
    for path in ("ot", "vp"):
        field = GaussianMixture(torch.ones(8, dtype=WIDE), torch.tensor(cells, dtype=WIDE), torch.full((8,), 0.25, dtype=WIDE), path)
        evaluations.append(fm.sample(field, x0, path=path, method="dopri5", rtol=tolerance, atol=tolerance).nfe)
    assert evaluations[0] < evaluations[1]


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_optimal_transport_removes_noise_early_along_nearly_straight_lines(exact, draw):
    """Figure 6; a straight line at constant speed leaves (1 - 1/2)^2 at t = 1/2."""
    ot, vp = exact[draw, "ot"], exact[draw, "vp"]
    middle = ot.times.index(0.5)
    assert 0.25 < ot.residual[middle] < 0.35 and vp.residual[middle] > 0.6
    assert vp.straightness > 10 * ot.straightness
    assert ot.residual[0] == vp.residual[0] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("draw", [1, 2, 3])
def test_optimal_transport_needs_fewer_midpoint_evaluations(draw):
    """Figure 7, left, at an error of 1e-3. Below, one sample of 256 that ends at another image decides: not asserted."""
    ot, vp = (figures.path_result(draw, path, 0) for path in ("ot", "vp"))
    assert ot.nfe_for(1e-3) < vp.nfe_for(1e-3)


def test_fewest_evaluations_by_hand():
    template = figures.path_result(1, "ot", 0, reference_steps=2, samples=4, counts=(4,))
    result = dataclasses.replace(template, nfe=(4, 6, 8, 10), mse=(1.0, 0.1, 0.2, 0.01))
    assert [result.nfe_for(error) for error in (2.0, 0.25, 0.1, 0.05, 1e-3)] == [4, 6, 10, 10, None]


def test_midpoint_errors_fall_at_second_order():
    result = figures.path_result(1, "vp", 0, reference_steps=400, samples=4, counts=(80, 160))
    assert result.median_mse[0] / result.median_mse[1] == pytest.approx(16.0, rel=0.5), "squared errors"
    assert len(result.pictures) == 3 and len(result.pictures[0]) == 7 and len(result.pictures[0][0]) == 64


# Tables 1 and 4


def test_bits_against_draws_are_those_of_bits_per_dim():
    images = torch.arange(12, dtype=torch.uint8).reshape(2, 6) % 4
    oracle = GaussianMixture(torch.ones(1), torch.zeros(1, 6), torch.tensor([0.5]))
    whole = fm.bits_per_dim(oracle, images, levels=4, draws=10, steps=20, kind="exact", seed=0)
    one, five, ten = table1.bits_for_draws(whole.logp, (1, 5, 10), 6, 4)
    assert ten == pytest.approx(whole.mean, abs=1e-12)
    singles = math.log2(2.0) - whole.logp / (6 * math.log(2.0))
    assert one == pytest.approx(float(singles.mean()), abs=1e-12)
    assert one > five > ten, "more draws tighten the bound (equation 47)"


def test_fashion_is_averaged_to_14_pixels(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=numpy.uint8)
    head = bytes([0, 0, 8, 3, 0, 0, 0, 12, 0, 0, 0, 28, 0, 0, 0, 28])
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 12]) + bytes(range(10)) + bytes(2))
    config = table1.settings("fashion", tmp_path)
    images = load_dataset(config.data, "test", config.preparation).images
    assert images.shape == (12, 1, 14, 14) and config.dequantise and table1.settings("fashion").data == "fashion"
    assert int(images[3, 0, 2, 5]) == round(float(pixels[3, 4:6, 10:12].mean()))
    build_model(fit_to_data(config, (1, 14, 14), 10))(torch.zeros(1, 1, 14, 14), torch.zeros(1), y=torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("alike", [False, True])
def test_objectives_that_are_alike_have_no_help_of_their_own(alike):
    recipes = {name: dataclasses.replace(table1.settings("digits", alike=alike), objective=name).recipe for name in checkerboard.NAMES}
    helped = [name for name, recipe in recipes.items() if recipe.preconditioned or recipe.t_sampler != recipes["fm-ot"].t_sampler]
    assert helped == ([] if alike else ["ddpm", "score", "scoreflow"])
    assert recipes["fm-ot"].t_sampler == ("uniform" if alike else "stratified")


def test_data_that_are_missing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["reproduce", "table1", "--data", "fashion", "--source", str(tmp_path / "none"), "--jobs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "none: no such file or folder" in capsys.readouterr().err


@pytest.fixture
def tiny_table(monkeypatch):
    classifier = train_classifier(dataclasses.replace(digits(), images=digits().images[:300], labels=digits().labels[:300]))
    monkeypatch.setattr(table1, "train_classifier", lambda data: classifier)
    for name, value in {
        "SAMPLES": 6,
        "BITS_IMAGES": 4,
        "DRAW_IMAGES": 2,
        "DRAWS": (1, 2),
        "TOLERANCE": 1e-2,
        "DRAWS_TOLERANCE": 1e-1,
    }.items():
        monkeypatch.setattr(table1, name, value)
    config = tiny(dequantise=True, evaluate=False, model=TINY_NET, sample_steps=2, samples_per_class=1)
    alone = {"preconditioned": "off", "t_sampler": "uniform"}
    monkeypatch.setattr(
        table1, "settings", lambda data, source=None, alike=False: dataclasses.replace(config, **alone) if alike else config
    )


@pytest.mark.slow
def test_table1_command_and_its_restart(tiny_table, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["reproduce", "table1", "--steps", "2", "--jobs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    text, record = capsys.readouterr().out, json.loads((tmp_path / "table1-digits.json").read_text())
    assert record["command"] == "fm-fast reproduce table1 --data digits --seed 0 --steps 2"
    assert [entry["objective"] for entry in record["results"]] == list(checkerboard.NAMES)
    for entry in record["results"]:
        assert f"| {entry['bits_per_dim']:.3f} ± {entry['std_err']:.3f} | {entry['nfe']:.0f} |" in text
        assert len(entry["bits_by_draws"]) == 2 and RunFolder(tmp_path / f"digits-{entry['objective']}-2-steps-seed-0").checkpoints()
    assert (tmp_path / "table1-digits.md").read_text().strip() in text and "not FID" in text
    before = (tmp_path / "table1-digits.json").read_text()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("found in") == 5 and (tmp_path / "table1-digits.json").read_text() == before
    assert (tmp_path / "table1-digits.png").stat().st_size > 10_000


def test_runs_that_are_alike_have_names_of_their_own(tiny_table, tmp_path, monkeypatch):
    asked = {}

    def get_all(self, kind, compute, arguments, jobs):
        asked.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "get_all", get_all)
    for alike in (False, True):
        with pytest.raises(KeyboardInterrupt):
            table1.reproduce_table1(tmp_path, "digits", 0, 2, alike=alike)
    assert len(asked) == len({run.out for _, run in asked.values()}) == 10
    for name, (objective, run) in asked.items():
        alike = "alike" in name
        assert (run.objective, run.preconditioned, run.t_sampler) == (objective, *(("off", "uniform") if alike else ("auto", "auto")))
        assert Path(run.out).name.startswith("digits-alike-") == alike


# Parts, drawing, command line


@dataclasses.dataclass(frozen=True)
class Numbers:
    value: float
    table: tuple[tuple[float, ...], ...]


def test_a_part_is_computed_once_for_its_settings(tmp_path, capsys, monkeypatch):
    calls = []

    def compute(value):
        calls.append(value)
        return Numbers(value, ((1.0, 2.0), (3.0,)))

    def get(seed):
        return Parts(tmp_path / "parts", {"seed": seed}).get_all(Numbers, compute, {"a": (1 / 3,)})

    file = tmp_path / "parts" / "a.json"
    assert get(0) == get(0) == [Numbers(1 / 3, ((1.0, 2.0), (3.0,)))] and len(calls) == 1
    assert f"a: found in {file}" in capsys.readouterr().out
    get(1)
    assert len(calls) == 2, "other settings: computed again"
    file.write_text('{"settings": {"seed": 1')
    get(1)
    assert len(calls) == 3, "half a file: computed again"
    file.write_text(file.read_text().replace('"table"', '"chart"'))
    get(1)
    assert len(calls) == 4, "a part of another version, with other fields: computed again"
    monkeypatch.setattr("fm_fast.reproduce.results.__version__", "0.0")
    get(1)
    assert len(calls) == 5, "of another version: computed again"
    assert [entry.name for entry in (tmp_path / "parts").iterdir()] == ["a.json"]
    assert Parts(tmp_path / "parts", {}).seconds(["a", "missing"]) >= 0.0


def test_an_interrupted_command_keeps_what_was_done(tmp_path):
    def compute(value):
        if value > 1:
            raise KeyboardInterrupt
        return Numbers(value, ())

    parts = Parts(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        parts.get_all(Numbers, compute, {"a": (1.0,), "b": (2.0,)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.slow
def test_processes_give_the_same_numbers(tmp_path):
    arguments = {f"draw{draw}": (draw, "ot", 0, 2, 4, (4, 6)) for draw in (1, 2)}
    alone, together = (Parts(tmp_path / str(jobs), {}).get_all(figures.PathResult, figures.path_result, arguments, jobs) for jobs in (1, 2))
    assert [numbers(result) for result in alone] == [numbers(result) for result in together]


def test_rounded_tensors_are_tuples():
    assert rounded(torch.tensor([[0.12345, 2.0]]), 3) == ((0.123, 2.0),)


def test_missing_matplotlib_names_the_extra_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for comparison in ("figures", "checkerboard", "table1"):
        assert main(["reproduce", comparison, "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err == "fm-fast: error: figures need matplotlib: pip install 'fm_fast[plot]'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_the_digits_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"source: expected none for the digits, which are part of fm_fast, got "):
        table1.settings("digits", tmp_path)


@pytest.mark.parametrize(
    ("comparison", "options"), [("figures", "draws jobs"), ("checkerboard", "jobs"), ("table1", "data source alike jobs")]
)
def test_help_lists_every_option(comparison, options, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["reproduce", comparison, "--help"])
    assert set(re.findall(r" --([a-z-]+)", capsys.readouterr().out)) == {"help", "out", "seed", "steps", *options.split()}


def test_figures_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "path_result", lambda draw, path, seed, steps: original(draw, path, seed, steps, 8, (4, 8, 16)))
    assert main(["reproduce", "figures", "--steps", "100", "--draws", "2", "--jobs", "1", "--out", str(tmp_path)]) == 0
    text, record = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert [(entry["draw"], entry["path"]) for entry in record["results"]] == [(1, "ot"), (1, "vp"), (2, "ot"), (2, "vp")]
    for name in ("figures.json", "figure6.png", "figure7-left.png"):
        assert str(tmp_path / name) in text and 1000 < (tmp_path / name).stat().st_size < 150_000


original = figures.path_result


@pytest.mark.parametrize(
    ("comparison", "steps", "message"),
    [
        ("figures", 99, "steps: expected at least 100 for a reference that others are judged by, got 99"),
        ("checkerboard", 7, "steps: expected at least 8, one for each measurement of NFE on the way, got 7"),
    ],
)
def test_steps_that_are_too_few_are_refused_before_the_work(comparison, steps, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["reproduce", comparison, "--steps", str(steps), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"fm-fast: error: {message}\n" and not (tmp_path / "out").exists()


def test_pictures_do_not_depend_on_a_display_or_on_pyplot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # which another test may have imported
    result = figures.path_result(1, "ot", 0, 8, 4, counts=(4, 6))
    drawing.draw_midpoint_error([result], tmp_path / "sub" / "p.png")
    assert (tmp_path / "sub" / "p.png").read_bytes()[:4] == b"\x89PNG" and "matplotlib.pyplot" not in sys.modules
