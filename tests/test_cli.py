"""The command line: every setting is an option, wrong ones are refused, a short run writes its files."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from copies import run_python

import fm_fast
from fm_fast.cli import main, parser
from fm_fast.cli.train import FROM_DATA, config_from
from fm_fast.nn import UNetConfig
from fm_fast.train.config import TrainConfig
from fm_fast.train.loop import train
from fm_fast.train.presets import PRESETS

SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "2", "--samples-per-class", "2"]


def parsed(*arguments):
    return config_from(parser().parse_args(["train", *arguments]))


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    names = [entry.name for entry in fields(TrainConfig) if entry.name != "model"]
    names += [f"model.{entry.name}" for entry in fields(UNetConfig) if entry.name not in FROM_DATA]
    assert len(names) > 25
    for name in names:
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text), name


def test_options_replace_the_values_of_the_preset():
    assert parsed("digits") == PRESETS["digits"]
    config = parsed("digits", "--steps", "7", "--objective", "ddpm", "--model.multipliers", "1,1,2", "--dequantise", "--seed", "3")
    assert (config.steps, config.objective, config.model.multipliers, config.dequantise, config.seed) == (7, "ddpm", (1, 1, 2), True, 3)
    assert config.batch_size == PRESETS["digits"].batch_size
    other = parsed("--data", "folder", "--out", "elsewhere")
    assert (other.data, other.out, other.steps) == ("folder", "elsewhere", PRESETS["images"].steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--stepz", "3"], "fm-fast train: error: unrecognized arguments: --stepz (did you mean --steps?)\n"),
        (["train", "digits", "--step=3"], "unrecognized arguments: --step=3 (did you mean --steps?)\n"),
        (
            ["train", "--batchsize", "8", "--blocks", "1"],
            "unrecognized arguments: --batchsize --blocks (did you mean --batch-size and --model.blocks?)\n",
        ),
        (["train", "--zzz"], "unrecognized arguments: --zzz\ntry fm-fast train --help\n"),
        (
            ["reproduce", "table1", "--job", "1"],
            "fm-fast reproduce table1: error: unrecognized arguments: --job (did you mean --jobs?)\n",
        ),
        (["info", "more"], "fm-fast info: error: unrecognized arguments: more\n"),
        (["train", "digits", "--steps", "three"], "argument --steps: invalid int value: 'three'"),
        (["train", "letters"], "invalid choice: 'letters'"),
        (["train", "digits", "--model.multipliers", "1,x"], "argument --model.multipliers: invalid list of whole numbers: '1,x'"),
        (["train", "digits", "--model.multipliers", "1,1.5"], "argument --model.multipliers: invalid list of whole numbers: '1,1.5'"),
        (["train", "digits", "--ema-widths", "a"], "argument --ema-widths: invalid list of numbers: 'a'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: command"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "train: expected a preset (digits, fashion, "),
        (["train", "images"], "data: expected --data PATH"),
        (["train", "digits", "--objective", "fm"], "objective: expected one of fm-ot, fm-vp"),
        (["train", "--data", "no/such/folder"], "no/such/folder: no such file or folder"),
        (["train", "digits", "--model.groups", "7"], "groups: expected a divisor"),
        (["train", "digits", "--model.groups", "0"], "fm-fast: error: model.groups: expected at least 1"),
        (["train", "digits", "--device", "abacus"], "device: expected auto, cpu"),
        (["train", "digits", "--sample-method", "dopri5"], "sample_method: expected one of euler, midpoint"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fm-fast: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", ""], "out: expected a folder, got ''"),
        (["--out", "FILE"], "out: expected a folder, FILE is a file"),
        (["--out", "FILE/run"], "out: expected a folder, FILE is a file"),
        (["--cache", "FILE"], "cache: expected a folder, FILE is a file"),
        (["--cache", ""], "cache: expected a folder, got ''"),
        (["--device", "meta"], "device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--resize", "16"], "resize: expected 0 for digits of 8x8 pixels, because only image files are resized"),
        (["--model.attention-sizes", "16,4"], "model.attention_sizes: expected heights of the network's levels, 8, 4, got (16, 4)"),
        (["--coupling", "optimal", "--batch-size", "1"], "coupling: expected independent where a process has one image a step, which"),
        (["--label-drop", "1"], "label_drop: expected less than 1, or --no-conditional: the network would never be told a label, got 1.0"),
        (["--no-conditional", "--guidance", "3"], "guidance: expected 1 for a network that is told no labels or always a label, got 3.0"),
        (["--no-conditional", "--evaluate"], "evaluate: expected only for the shipped digits with their classes; the command evaluate"),
        (["--label-drop", "0.2", "--no-conditional"], "label_drop: expected 0 for a network that is told no labels, got 0.2"),
    ],
)
def test_a_run_that_would_not_be_what_was_asked_for_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    assert main(["train", "digits", "--steps", "1", *SMALL, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["FILE"]


def test_what_has_no_effect_is_said(tmp_path, capsys):
    words = ["--steps", "1", "--batch-size", "4", "--no-evaluate", *SMALL]
    assert main(["train", "digits", "--test-share", "0.2", "--autotune", "--out", str(tmp_path / "a"), *words]) == 0
    said = capsys.readouterr().out
    assert "note: test_share 0.2 has no effect, because digits has a test part\n" in said
    assert "note: autotune has no effect on a CPU\n" in said
    assert main(["train", "--data", own_data(tmp_path), "--out", str(tmp_path / "b"), *words]) == 0
    said = capsys.readouterr().out
    assert "note: attention in the middle only: no level is as high as model.attention_sizes (16,) (8, 4, 2)" in said
    assert "note: the run ends within its warmup of 1000 steps, at a learning rate of 5.1e-07\n" in said
    assert "no image is of class" not in said


def test_what_has_no_effect_is_said_where_nobody_named_it(tmp_path, capsys):
    """As by a script, or by a run that was begun before it was refused."""
    config = replace(parsed("digits", *SMALL), steps=1, batch_size=1, coupling="optimal", label_drop=1.0, evaluate=False, out=str(tmp_path))
    train(replace(config, parallel="fsdp", micro_batch=4))
    said = capsys.readouterr().out
    assert "note: parallel fsdp has no effect in one process\n" in said
    assert "note: micro_batch 4 has no effect, because a process has 1 images a step\n" in said
    assert "note: coupling optimal has no effect, because a process has one image a step\n" in said
    assert "warning: label_drop 1: the network is never told a label, so it learns nothing about the classes\n" in said


def test_labels_that_leave_out_classes_are_told(tmp_path, capsys):
    """They may count from 1, or be those of a part."""
    images = np.zeros((20, 8, 8), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.resize([1, 2, 5], 20))
    words = ["--steps", "1", "--batch-size", "4", "--no-evaluate", *SMALL]
    assert main(["train", "--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "a"), *words]) == 0
    assert "warning: no image is of class 0, 3, 4, of 6; labels are to be 0, 1, 2, ...\n" in capsys.readouterr().out


def test_data_without_labels(tmp_path, capsys):
    numpy = pytest.importorskip("numpy")
    with numpy.load(own_data(tmp_path)) as archive:
        numpy.savez(tmp_path / "plain.npz", images=archive["images"])
    run = ["train", "--data", str(tmp_path / "plain.npz"), "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "4", *SMALL]
    assert main(run) == 1
    assert "plain.npz: expected labels beside images; --no-conditional trains a network without" in capsys.readouterr().err
    assert main([*run, "--no-conditional", "--test-share", "0.4", "--quality-every", "1"]) == 0
    assert main(["sample", str(tmp_path / "run"), "--count", "2", "--out", str(tmp_path / "x.npz")]) == 0
    assert numpy.load(tmp_path / "x.npz")["labels"].tolist() == [-1, -1]
    assert main(["likelihood", str(tmp_path / "run"), "--steps", "1"]) == 0


def test_short_run_and_resume(tmp_path, capsys):
    arguments = ["train", "digits", "--batch-size", "8", "--log-every", "1", "--no-evaluate", "--out", str(tmp_path), *SMALL]
    assert main([*arguments, "--steps", "3"]) == 0
    names = {"checkpoint-00000003.pt", "weights.safetensors", "samples.png", "loss.png", "log.jsonl"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert "step 3/3" in capsys.readouterr().out
    assert main([*arguments, "--steps", "5", "--resume"]) == 0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert main([*arguments, "--steps", "5", "--resume", "--seed", "9"]) == 1
    assert "cannot resume with other settings: seed: 0 -> 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.multipliers", "1,2,2,2,2"], "model.multipliers: expected at most 4 levels"),
        (["--seed", str(2**63)], "seed: expected less"),
    ],
)
def test_a_refused_run_overwrites_nothing(arguments, message, tmp_path, capsys):
    run = ["train", "digits", "--steps", "1", "--batch-size", "8", "--no-evaluate", "--out", str(tmp_path), *SMALL]
    assert main(run) == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert main([*run, "--overwrite", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_not_given_stays_as_it_was(tmp_path, capsys):
    """A run of settings unlike its preset's goes on without naming them again."""
    arguments = ["--batch-size", "8", "--seed", "3", "--log-every", "1", "--no-evaluate", "--out", str(tmp_path)]
    assert main(["train", "digits", "--steps", "2", *arguments, *SMALL]) == 0
    stored = parsed("--resume", "--out", str(tmp_path))
    assert (stored.batch_size, stored.seed, stored.steps, stored.evaluate, stored.sample_steps) == (8, 3, 2, False, 2)
    assert stored.model.channels == 8 and parsed("digits", "--resume", "--out", str(tmp_path)) == stored
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path), "--steps", "3"]) == 0
    assert "warning: the run was to take 2 steps and now takes 3" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_resume_needs_a_folder_and_refuses_a_preset_of_other_data(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected --out FOLDER, or a preset"):
        parsed("--resume")
    run = ["--data", own_data(tmp_path), "--out", str(tmp_path / "run")]
    assert main(["train", *run, "--steps", "1", "--batch-size", "4", *SMALL]) == 0
    assert main(["train", "digits", "--resume", "--out", str(tmp_path / "run")]) == 1
    assert "cannot resume with other settings: data: " in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_hide_the_settings(tmp_path):
    run = ["train", "digits", "--steps", "2", "--checkpoint-every", "1", "--batch-size", "8", "--no-evaluate", "--out", str(tmp_path)]
    assert main([*run, *SMALL]) == 0
    newest = tmp_path / "checkpoint-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert parsed("--resume", "--out", str(tmp_path)).batch_size == 8


def test_resume_without_a_checkpoint(tmp_path, capsys):
    assert main(["train", "digits", "--resume", "--out", str(tmp_path), *SMALL]) == 1
    assert "no checkpoint-NUMBER.pt in this folder" in capsys.readouterr().err


def own_data(folder):
    numpy = pytest.importorskip("numpy")
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=numpy.uint8)
    numpy.savez(folder / "set.npz", images=pixels, labels=numpy.arange(20) % 4)
    return str(folder / "set.npz")


def test_own_data(tmp_path):
    run = ["train", "--data", own_data(tmp_path), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"]
    assert main([*run, *SMALL]) == 0
    assert (tmp_path / "run" / "samples.png").stat().st_size > 100


WITHOUT_UNIX = """
import os, signal, sys
sys.modules.update(fcntl=None, resource=None)
del signal.SIGHUP, os.posix_fallocate
opened = os.open
def open_file(path, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(path)
    return opened(path, *rest, **options)
os.open = open_file
from fm_fast.cli import main
main(sys.argv[1:])
main(["sample", "out"])
"""


def test_training_asks_for_nothing_that_windows_lacks(tmp_path):
    command = ["train", "digits", "--steps", "2", "--out", "out", "--no-evaluate", "--device", "cpu", *SMALL]
    run_python(WITHOUT_UNIX, *command, folder=tmp_path).check_returncode()
    assert {"checkpoint-00000002.pt", "log.jsonl", "samples.png"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "samples.png").is_file()


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fm-fast {fm_fast.__version__}\n"


def test_info_in_a_fresh_process():
    answer = run_python("import runpy; runpy.run_module('fm_fast', run_name='__main__')", "info")
    assert "fm_fast" in answer.stdout and "backends" in answer.stdout


def test_a_reader_that_has_gone_is_no_error():
    """As after `fm-fast info | head -1`."""
    command = f"{sys.executable} -c 'from fm_fast.cli import main; raise SystemExit(main([\"info\"]))' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 1)
