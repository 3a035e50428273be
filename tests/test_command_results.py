"""Results of the commands: where they go and in which letters, and those of data that the run was not trained on."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from copies import run_python
from trainer_helpers import tiny

from fm_fast.cli import main
from fm_fast.train import train
from fm_fast.train.data import digits

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "batch_size": 4, "steps": 4}


def run(folder, **changes):
    return train(tiny(**{**QUICK, "out": str(folder), **changes}))


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have no names here")
def test_results_to_standard_output_follow_the_report(of_digits, tmp_path):
    """By a link of the test's own, to what cannot be replaced: /dev/stdout itself could be, by a test that fails."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = f"""
import sys
from fm_fast.cli import main
sys.exit(main(["likelihood", {str(of_digits)!r}, "--limit", "2", "--steps", "1", "--json", {str(tmp_path / "stdout")!r}]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    report, record = result.stdout.rsplit("\n", 2)[0], json.loads(result.stdout.splitlines()[-1])
    assert "bits/dim: " in report and record["images"] == 2 and (tmp_path / "stdout").is_symlink()


@pytest.mark.parametrize("where", ["circle", "nowhere"])
def test_links_that_lead_to_no_file_are_told_before_the_work(where, tmp_path, capsys):
    link = tmp_path / "link.json"
    link.symlink_to(link if where == "circle" else tmp_path / "none" / "target.json")
    assert main(["likelihood", str(tmp_path), "--json", str(link)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fm-fast: error: json: expected a file") and ("there is no folder" in error) == (where == "nowhere")


@pytest.mark.parametrize("encoding", ["cp1251", "ascii"])
def test_letters_that_the_output_has_not_cost_no_result(encoding, of_digits, tmp_path):
    arguments = ["evaluate", str(of_digits), "--limit", "4", "--no-bits", "--method", "euler", "--steps", "1"]
    code = f"""
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding={encoding!r})
from fm_fast.cli import main
from fm_fast.train.reporting.log import tell
tell("out-\u00e9")
sys.exit(main({[*arguments, "--json", str(tmp_path / "result.json")]!r}))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "out-\\xe9" in result.stdout and "Fr\\xe9chet" in result.stdout and (tmp_path / "result.json").exists()


def test_one_image_has_no_standard_error(of_digits, capsys):
    assert main(["likelihood", str(of_digits), "--limit", "1", "--steps", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bits/dim: ")]
    assert "+-" not in line and "nan" not in line


# Other data


def held_out(tmp_path, **changes):
    """The held-out digits as a file, which does not tell that they have 17 levels."""
    data = digits("test")
    images = (data.images + changes.get("shift", 0)).numpy()
    np.savez(tmp_path / "mine.npz", images=images, labels=data.labels.numpy())
    return str(tmp_path / "mine.npz")


def record_of(command, folder, tmp_path, *arguments):
    out = tmp_path / "result.json"
    assert main([command, str(folder), "--limit", "4", *arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_files_have_the_grey_levels_of_the_run(of_digits, tmp_path):
    data, settings = held_out(tmp_path), ("--steps", "2", "--seed", "3")
    found, expected = (record_of("likelihood", of_digits, tmp_path, *settings, "--data", name) for name in (data, "digits:test"))
    assert found["bits_per_dim_of_images"] == expected["bits_per_dim_of_images"] and found["levels"] == 17
    settings = ("--method", "euler", "--steps", "1", "--no-bits")
    found, expected = (record_of("evaluate", of_digits, tmp_path, *settings, "--data", name) for name in (data, "digits:test"))
    assert {name for name in found if found[name] != expected[name]} <= {"data", "seconds"}


def test_images_of_more_grey_levels_than_the_run_are_refused(of_digits, tmp_path, capsys):
    assert main(["likelihood", str(of_digits), "--data", held_out(tmp_path, shift=1), "--steps", "1"]) == 1
    assert "data: expected values below 17, the grey levels that the run was trained on, got 17" in capsys.readouterr().err
    run(tmp_path / "run", data=held_out(tmp_path))
    assert main(["likelihood", str(tmp_path / "run"), "--data", "digits:test", "--steps", "1"]) == 1
    error = capsys.readouterr().err
    assert "data: expected images of 256 grey levels, as the run was trained on, got images of 17 grey levels in digits:test" in error


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 16, 16), np.uint8), np.arange(4), r"data: expected images of \(1, 8, 8\) for this network, got \(1, 16, 16\)"),
        (np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 14]), "data: expected at most 10 classes for this network, got 15"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_samples_are_drawn(images, labels, message, of_digits, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", images=images, labels=labels)
    arguments = ["--no-bits", "--method", "euler", "--steps", "1", "--data", str(tmp_path / "other.npz")]
    assert main(["evaluate", str(of_digits), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
