"""fm-fast sample and fm-fast likelihood: every option listed, wrong ones refused, and numbers that a loop by hand reproduces."""

import json
import math
import re

import numpy as np
import oracle
import pytest
import torch
from trainer_helpers import decode_png

import fm_fast as fm
from fm_fast.cli import main, sample
from fm_fast.train.data import digits
from fm_fast.train.data.readers.npz import read_npz
from fm_fast.train.storage.checkpoint import read_checkpoint
from fm_fast.train.storage.weights import load_model

SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "2", "--samples-per-class", "3"]
# A few large steps: the network's output must matter to what is compared.
RUN = ["train", "digits", "--steps", "8", "--batch-size", "32", "--learning-rate", "0.02", "--warmup", "1", "--ema-decay", "0"]
RUN += ["--no-evaluate", *SMALL]
SOLVER = "method steps grid rtol atol max-steps per-sample t0 t1"
OPTIONS = {
    "sample": f"weights seed batch-size device classes data count out images guidance churn {SOLVER}",
    "likelihood": f"weights seed batch-size device data limit unconditional {SOLVER} probes kind replicates draws json progress",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, trained dequantised."""
    folder = tmp_path_factory.mktemp("run")
    assert main([*RUN, "--dequantise", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("command", ["sample", "likelihood"])
def test_help_lists_every_option(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert set(re.findall(r" --([a-z][a-z0-9-]+)", text)) - {"help", "dequantise"} == set(OPTIONS[command].split())


# Samples


def picture(path):
    width, height, _, rows = decode_png(path.read_bytes())
    return width, height, rows


def test_the_picture_of_the_run_again(run, tmp_path):
    """The same seed, classes and solver as the trainer's picture: the same pixels."""
    out = tmp_path / "again.png"
    assert main(["sample", str(run), "--count", "3", "--out", str(out)]) == 0
    assert picture(out) == picture(run / "samples.png")
    assert main(["sample", str(run / "checkpoint-00000008.pt"), "--count", "3", "--out", str(out), "--seed", "1"]) == 0
    assert picture(out) != picture(run / "samples.png")


def test_an_archive_that_can_be_read_as_data(run, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    assert main(["sample", str(run), "--classes", "7", "3", "--count", "4", "--out", str(out), "--batch-size", "3"]) == 0
    assert "8 samples by midpoint, guidance 2, in " in capsys.readouterr().out
    images, labels = read_npz(out, ("images", "labels"))
    assert images.shape == (8, 1, 8, 8) and images.dtype == torch.uint8 and int(images.max()) <= 16
    assert labels.tolist() == [7, 7, 7, 7, 3, 3, 3, 3]


def archive(run, tmp_path, *arguments):
    out = tmp_path / "samples.npz"
    assert main(["sample", str(run), "--classes", "1", "2", "--count", "2", "--out", str(out), *arguments]) == 0
    return np.load(out)["images"]


def test_settings_of_the_solve_reach_it(run, tmp_path):
    plain = archive(run, tmp_path, "--steps", "2")
    assert np.array_equal(plain, archive(run, tmp_path))
    for arguments in (["--seed", "3"], ["--guidance", "-60"], ["--steps", "1", "--method", "euler"], ["--grid", "karras"]):
        assert not np.array_equal(plain, archive(run, tmp_path, *arguments)), arguments
    adaptive, fine = (
        archive(run, tmp_path, "--method", "dopri5", "--rtol", "1e-4"),
        archive(run, tmp_path, "--method", "rk4", "--steps", "12"),
    )
    assert np.abs(adaptive.astype(float) - fine).max() <= 1 and (adaptive == fine).mean() > 0.9


def test_without_a_class(run, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    assert main(["sample", str(run), "--classes", "none", "--count", "2", "--out", str(out)]) == 0
    assert np.load(out)["labels"].tolist() == [-1, -1] and "guidance 1" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "columns"), [(3, 3), (20, 20), (21, 21), (23, 23), (30, 15), (39, 13), (40, 20)])
def test_each_row_of_a_picture_belongs_to_one_class(count, columns):
    assert sample._columns(count) == columns and count % columns == 0


def test_no_guidance_by_a_class_that_was_never_learnt(tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "samples.npz")
    assert main([*RUN, "--label-drop", "0", "--guidance", "3", "--out", run]) == 1
    assert "guidance: expected 1 for a network that is told no labels or always a label, got 3.0" in capsys.readouterr().err
    assert main([*RUN, "--label-drop", "0", "--out", run]) == 0
    assert main(["sample", run, "--count", "2", "--out", out]) == 0
    assert "guidance 1" in capsys.readouterr().out
    assert main(["sample", run, "--count", "2", "--guidance", "2", "--out", out]) == 1
    assert "guidance: expected 1 for a run with label_drop 0" in capsys.readouterr().err
    assert main(["sample", run, "--count", "2", "--classes", "none", "--out", out]) == 1
    assert "classes: expected numbers or all for a run with label_drop 0" in capsys.readouterr().err


# Likelihoods


def exact_trace(velocity, x):
    return torch.stack([
        torch.autograd.functional.jacobian(lambda row: velocity(row[None])[0].flatten(), row).reshape(64, 64).trace() for row in x
    ])  # fmt: skip


def bits_by_hand(model, images, labels, seed, steps):
    """Midpoint steps from t = 1 to 0 with the exact divergence at the midpoints; dequantised by the noise contract, typed in again."""
    u = torch.from_numpy(oracle.uniform(tuple(images.shape), seed, 0, "dequantise"))
    x, integral, h = (2 * (images + u) / 17 - 1).float(), 0.0, 1 / steps

    def velocity(x, t, y):
        return model(x, torch.full((len(x),), t), y=y)

    for t in (1 - n * h for n in range(steps)):
        middle = x - h / 2 * velocity(x, t, labels)
        pairs = zip(middle.split(1), labels.split(1), strict=True)
        traces = [exact_trace(lambda row, t=t, y=y: velocity(row, t - h / 2, y), one) for one, y in pairs]
        integral = integral + h * torch.cat(traces)
        x = x - h * velocity(middle, t - h / 2, labels)
    assert float(integral.abs().min()) > 1.0, "the divergence matters"
    log_prior = -0.5 * (x.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return math.log2(17 / 2) - (log_prior - integral.double()) / (64 * math.log(2))


@pytest.mark.parametrize(("unconditional", "steps"), [(False, 2), (True, 1)])
def test_bits_per_dim_are_those_of_a_loop_by_hand(unconditional, steps, run, tmp_path, capsys):
    out = tmp_path / "bits.json"
    arguments = ["--limit", "2", "--steps", str(steps), "--kind", "exact", "--seed", "5", "--batch-size", "1", "--json", str(out)]
    assert main(["likelihood", str(run), *arguments, *(["--unconditional"] if unconditional else [])]) == 0
    (model, _), data = load_model(run), digits("test")
    labels = torch.full((2,), -1) if unconditional else data.labels[:2]
    expected = bits_by_hand(model, data.images[:2], labels, 5, steps)
    record = json.loads(out.read_text())
    assert record["bits_per_dim_of_images"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert record["bits_per_dim"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert record["std_err"] == pytest.approx(float(expected.std() / 2**0.5), rel=1e-3)
    assert (record["levels"], record["images"], record["nfe"], record["nvjp"]) == (17, 2, 2 * steps, steps * 64)
    text = capsys.readouterr().out
    assert f"bits/dim: {record['bits_per_dim']:.4f} +- {record['std_err']:.4f} (standard error of the mean" in text
    assert (
        "digits:test: 2 images 1x8x8 with 17 levels" in text
        and f"{2 * steps} evaluations and {64 * steps} vector-Jacobian products an image" in text
    )


def record_of(run, tmp_path, *arguments):
    out = tmp_path / "bits.json"
    assert main(["likelihood", str(run), "--limit", "6", "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_options_of_the_estimate_reach_it(run, tmp_path, capsys):
    fast = ["--steps", "3", "--method", "euler"]
    plain = record_of(run, tmp_path, *fast)
    again = record_of(run, tmp_path, *fast, "--batch-size", "4")
    assert plain["bits_per_dim_of_images"] == pytest.approx(again["bits_per_dim_of_images"], abs=1e-4)
    assert plain["probe_std_err"] is None and (plain["nfe"], plain["nvjp"]) == (3, 3)
    more = record_of(run, tmp_path, *fast, "--probes", "2", "--kind", "hadamard", "--replicates", "2", "--draws", "3")
    assert (more["nfe"], more["nvjp"]) == (9, 36) and 0 < more["probe_std_err"] < more["std_err"]
    assert f"{more['probe_std_err']:.2g} of it by the probes" in capsys.readouterr().out
    assert record_of(run, tmp_path, *fast, "--seed", "1")["bits_per_dim"] != plain["bits_per_dim"]
    assert record_of(run, tmp_path, *fast, "--data", "digits:train")["bits_per_dim"] != plain["bits_per_dim"]


def test_the_ends_of_the_solve_reach_it(run, tmp_path):
    assert not np.array_equal(archive(run, tmp_path, "--t1", "0.5"), archive(run, tmp_path))
    assert not np.array_equal(archive(run, tmp_path, "--t0", "0.5"), archive(run, tmp_path))
    model, images, labels = load_model(run)[0], digits("test").images[:6], digits("test").labels[:6]
    for ends in ({"t1": 0.75}, {"t0": 0.25}):
        words = [word for name, value in ends.items() for word in (f"--{name}", str(value))]
        record = record_of(run, tmp_path, "--steps", "2", *words)
        expected = fm.bits_per_dim(model, images, levels=17, cond={"y": labels}, steps=2, seed=0, sample_ids=0, **ends)
        assert record["bits_per_dim_of_images"] == pytest.approx(expected.bpd.tolist(), abs=1e-4)
        assert {name: record[name] for name in ends} == ends


def test_a_run_of_undivided_data_is_told_so(tmp_path, capsys):
    for name in ("set", "other"):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((20, 1, 8, 8), np.uint8), labels=np.arange(20) % 10)
    data, warning = str(tmp_path / "set.npz"), "warning: the held-out images are training images; name others with --data, or train with"
    for share, warned in ((0.0, True), (0.2, False)):
        run = str(tmp_path / f"run{share}")
        assert main([*RUN, "--data", data, "--steps", "1", "--test-share", str(share), "--out", run]) == 0
        for source in ([], ["--data", f"{tmp_path}/./set.npz"]):
            assert main(["likelihood", run, "--steps", "1", *source]) == 0
            assert (warning in capsys.readouterr().err) == warned
        for source in (f"{data}:train", str(tmp_path / "other.npz")):
            assert main(["likelihood", run, "--steps", "1", "--data", source]) == 0
            assert warning not in capsys.readouterr().err, "asked for, and never trained on"


def test_classes_of_a_run_without(tmp_path, capsys):
    assert main([*RUN, "--steps", "1", "--no-conditional", "--out", str(tmp_path)]) == 0
    assert main(["sample", str(tmp_path), "--classes", "3"]) == 1
    assert "classes: expected none; the run has no classes, got 3" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fm_fast.cli.options.os.access", lambda place, mode: False)
    for file in (tmp_path / "new.json", tmp_path / "old.json"):
        (tmp_path / "old.json").touch()
        assert main(["likelihood", str(run), "--json", str(file)]) == 1
        assert capsys.readouterr() == ("", f"fm-fast: error: json: expected a file that can be written, got {file}\n")


def test_adaptive_and_fixed_steps_agree(run, tmp_path):
    exact = ["--kind", "exact", "--limit", "1", "--t0", "0.5"]
    adaptive = record_of(run, tmp_path, "--method", "bosh3", "--rtol", "0.1", "--atol", "0.1", *exact)
    fixed = record_of(run, tmp_path, "--method", "midpoint", "--steps", "4", *exact)
    assert adaptive["bits_per_dim"] == pytest.approx(fixed["bits_per_dim"], abs=0.02)
    assert adaptive["steps"] is None and 3 < adaptive["nfe"] < 100


def test_stochastic_samples_are_a_function_of_the_seed_in_any_batch(run, tmp_path):
    def drawn(*options):
        assert (
            main(["sample", str(run), "--count", "3", "--classes", "1", "2", "--steps", "4", "--out", str(tmp_path / "x.npz"), *options])
            == 0
        )
        with np.load(tmp_path / "x.npz") as found:
            return found["images"]

    whole = drawn("--churn", "0.5")
    assert np.array_equal(drawn("--churn", "0.5", "--batch-size", "4"), whole)
    assert not np.array_equal(drawn(), whole) and not np.array_equal(drawn("--churn", "0.5", "--seed", "9"), whole)


def test_steps_of_each_images_own(run, tmp_path):
    options = ["--method", "bosh3", "--rtol", "0.1", "--atol", "0.1", "--limit", "3"]
    each, together = record_of(run, tmp_path, "--per-sample", *options), record_of(run, tmp_path, *options)
    assert (each["per_sample"], together["per_sample"]) == ("shrink", False)
    assert each["bits_per_dim_of_images"] == pytest.approx(together["bits_per_dim_of_images"], abs=0.01)
    assert each["bits_per_dim_of_images"] != together["bits_per_dim_of_images"]


class Still(torch.nn.Module):
    """A network that takes no time, for solves of many steps."""

    def forward(self, x, t, y):
        return 0.0 * x


def test_defaults_need_no_option(run, tmp_path, monkeypatch):
    config = load_model(run)[1]
    monkeypatch.setattr("fm_fast.cli.likelihood.load_model", lambda checkpoint, weights: (Still(), config))
    record = record_of(run, tmp_path, "--limit", "2")
    assert (record["method"], record["steps"], record["probes"], record["nfe"], record["nvjp"]) == ("midpoint", 100, 1, 200, 100)


def test_a_network_that_was_not_trained_dequantised(tmp_path, capsys):
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert main(["likelihood", str(tmp_path), "--limit", "2", "--steps", "1"]) == 0
    assert "fm-fast: warning: the network was not trained with --dequantise" in capsys.readouterr().err


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "the following arguments are required: RUN"),
        (["likelihood"], "the following arguments are required: RUN"),
        (["sample", "r", "--step", "3"], "unrecognized arguments: --step (did you mean --steps?)"),
        (["likelihood", "r", "--probe", "3"], "unrecognized arguments: --probe (did you mean --probes?)"),
        (["sample", "r", "--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        (["sample", "r", "--steps", "2.5"], "argument --steps: expected a whole number of at least 1, got '2.5'"),
        (["sample", "r", "--count", "x"], "argument --count: expected a whole number of at least 1, got 'x'"),
        (["sample", "r", "--method", "rk5"], "argument --method: invalid choice: 'rk5'"),
        (["sample", "r", "--grid", "linear"], "argument --grid: invalid choice: 'linear'"),
        (["sample", "r", "--out", "x.jpg"], "argument --out: expected a name that ends in .png or .npz, got 'x.jpg'"),
        (["likelihood", "r", "--probes", "0"], "argument --probes: expected a whole number of at least 1, got '0'"),
        (["likelihood", "r", "--kind", "signs"], "argument --kind: invalid choice: 'signs'"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--classes", "10"], "classes: expected numbers in 0..9, all, or none, got 10"),
        (["sample", "RUN", "--classes", "all", "3"], "classes: expected numbers in 0..9, all, or none, got all 3"),
        (["sample", "RUN", "--classes", "-1"], "classes: expected numbers in 0..9"),
        (["sample", "RUN", "--guidance", "nan"], "guidance: expected a finite number, got nan"),
        (["sample", "RUN", "--classes", "none", "--guidance", "2"], "guidance: expected 1 without a class, got 2.0"),
        (
            ["sample", "RUN", "--method", "dopri5", "--steps", "3"],
            "steps: expected none for the adaptive method dopri5, which places its own steps, got 3",
        ),
        (["sample", "RUN", "--method", "dopri5", "--grid", "karras"], "grid: expected none for the adaptive method dopri5, which places"),
        (["sample", "RUN", "--rtol", "1e-3"], "rtol: expected none for the fixed-step method midpoint, which has no tolerance, got 0.001"),
        (["sample", "RUN", "--method", "rk4", "--atol", "1e-5"], "atol: expected none for the fixed-step method rk4"),
        (
            ["sample", "RUN", "--method", "ab2", "--churn", "0.5"],
            "churn must be 0 for methods other than fixed-step Runge-Kutta ones, got 0.5",
        ),
        (["sample", "RUN", "--max-steps", "9"], "max_steps: expected none for the fixed-step method midpoint, which takes as many"),
        (["sample", "RUN", "--per-sample"], "per_sample: expected none for the fixed-step method midpoint, which takes the same"),
        (["likelihood", "RUN", "--atol", "1e-5"], "atol: expected none for the fixed-step method midpoint"),
        (["likelihood", "RUN", "--method", "dopri5", "--grid", "shift"], "grid: expected none for the adaptive method dopri5"),
        (["sample", "RUN", "--t1", "1.5"], "<= t0 < t1 <= 1, got 0.0 and 1.5; t0 is the noise's end of every solve"),
        (["likelihood", "RUN", "--t0", "0.5", "--t1", "0.25"], "t0"),
        (["sample", "RUN", "--out", "no/such.png"], "no/such.png: there is no folder no"),
        (["sample", "RUN", "--out", "FOLDER.png"], "out: expected a file, FOLDER.png is a folder"),
        (["likelihood", "RUN", "--json", "FOLDER.png"], "json: expected a file, FOLDER.png is a folder"),
        (["likelihood", "RUN", "--device", "meta"], "device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (["sample", "RUN", "--device", "abacus"], "device: expected auto, cpu"),
        (["sample", "RUN", "--seed", "-1"], "seed must lie in [0, "),
        (
            ["likelihood", "RUN", "--method", "dopri5", "--steps", "3"],
            "steps: expected none for the adaptive method dopri5, which places its own steps, got 3",
        ),
        (["likelihood", "RUN", "--data", "no/such"], "no/such: no such file or folder"),
        (["likelihood", "RUN", "--data", "digits:valid"], "digits:valid: no such file or folder"),
        (["likelihood", "RUN", "--kind", "coloured", "--probes", "3"], 'kind="coloured"'),
        (["likelihood", "RUN", "--kind", "exact", "--probes", "3"], "probes: expected none with --kind exact, which computes the"),
        (["likelihood", "RUN", "--kind", "exact", "--replicates", "2"], "replicates: expected none with --kind exact"),
        (["likelihood", "RUN", "--json", "no/such.json"], "no/such.json: there is no folder no"),
        (["sample", "RUN", "--method", "dopri5", "--max-steps", "1"], "did not reach the end of the solve in max_steps=1 steps"),
        (["likelihood", "RUN", "--rtol", "0", "--method", "dopri5"], "rtol must be positive, got 0.0"),
        (["sample", "no/such/run"], "no/such/run: no such checkpoint"),
        (["likelihood", "no/such/run"], "no/such/run: no such checkpoint"),
        (["sample", "."], "no checkpoint-NUMBER.pt in this folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER.png").mkdir()
    assert main([str(run) if argument == "RUN" else argument for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fm-fast: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["sample", "likelihood"])
@pytest.mark.parametrize("damage", ["cut", "text", "other", "settings", "weights"])
def test_damaged_checkpoints(damage, command, run, tmp_path, capsys):
    file = tmp_path / "checkpoint-00000008.pt"
    content = read_checkpoint(run / "checkpoint-00000008.pt")
    if damage == "cut":
        file.write_bytes((run / "checkpoint-00000008.pt").read_bytes()[:1000])
    elif damage == "text":
        file.write_text("not a checkpoint")
    elif damage == "other":
        torch.save({"model": {}}, file)
    elif damage == "settings":
        torch.save({**content, "config": {**content["config"], "colour": "red"}}, file)
    else:
        torch.save({**content, "state": {**content["state"], "average": {}}}, file)
    assert main([command, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fm-fast: error: {file}: expected ") and error.count("\n") == 1


def test_the_checkpoint_before_a_damaged_one_is_told_in_a_line(run, tmp_path, capsys):
    whole = (run / "checkpoint-00000008.pt").read_bytes()
    (tmp_path / "checkpoint-00000007.pt").write_bytes(whole)
    (tmp_path / "checkpoint-00000008.pt").write_bytes(whole[:20_000])
    assert main(["sample", str(tmp_path), "--count", "1", "--out", str(tmp_path / "x.png")]) == 0
    error = capsys.readouterr().err
    assert (
        error.startswith(f"fm-fast: warning: {tmp_path}/checkpoint-00000008.pt: expected a complete checkpoint") and error.count("\n") == 1
    )
    assert error.endswith("; checkpoint-00000007.pt is used instead\n")


def test_data_that_the_network_was_not_made_for(run, tmp_path, capsys):
    for images, labels, message in [
        (np.zeros((4, 1, 4, 4), np.uint8), np.zeros(4, np.int64), "data: expected images of (1, 8, 8) for this network, got (1, 4, 4)"),
        (np.zeros((4, 1, 8, 8), np.uint8), np.full(4, 12), "data: expected at most 10 classes for this network, got 13"),
    ]:
        np.savez(tmp_path / "set.npz", images=images, labels=labels)
        assert main(["likelihood", str(run), "--data", str(tmp_path / "set.npz")]) == 1
        assert message in capsys.readouterr().err
