"""fm-fast evaluate: NFE against a counter, sample quality of known samples, and the command's numbers."""

import json
import math
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from trainer_helpers import tiny

import fm_fast as fm
from fm_fast.cli import main
from fm_fast.train.data import Dataset, digits
from fm_fast.train.evaluation.classifier import train_classifier
from fm_fast.train.evaluation.evaluate import Samples, draw_samples, evaluate_network, sample_quality
from fm_fast.train.evaluation.likelihood import _merged, dataset_bits

SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "2", "--samples-per-class", "2"]
TRAIN = ["train", "--steps", "2", "--batch-size", "16", "--no-evaluate", *SMALL]
SOLVER = "method steps grid rtol atol max-steps per-sample t0 t1"
OPTIONS = f"weights seed batch-size device data limit unconditional draws probes tolerance {SOLVER} no-bits fid json"


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(digits())


@pytest.fixture
def trained_classifier(classifier, monkeypatch):
    """Training it once is enough for all tests of what is done with it."""
    monkeypatch.setattr("fm_fast.train.evaluation.evaluate.train_classifier", lambda data: classifier)


class Counting(torch.nn.Module):
    """A field that pulls towards a grey level by label; counts its calls and keeps the labels it was told."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.calls, self.labels = [], []

    def forward(self, x, t, y):
        self.calls.append(len(x))
        self.labels.append(y)
        return self.scale * ((y.float() / 10 - 0.5).reshape(-1, 1, 1, 1) - x)


def dopri5(tolerance):
    return {"method": "dopri5", "rtol": tolerance, "atol": tolerance}


def first(data, count):
    return Dataset(data.name, data.images[:count], data.labels[:count], data.classes, data.levels)


def test_nfe_is_the_number_of_calls_and_labels_are_those_of_the_images():
    model, like = Counting(), first(digits("test"), 10)
    samples = draw_samples(model, tiny(), like, seed=0, batch_size=4, **dopri5(1e-5))
    assert [model.calls.count(4), model.calls.count(2)] == [sum(samples.nfe_of_batches[:2]), samples.nfe_of_batches[2]]
    assert samples.nfe == (4 * samples.nfe_of_batches[0] + 4 * samples.nfe_of_batches[1] + 2 * samples.nfe_of_batches[2]) / 10
    assert torch.equal(model.labels[0], like.labels[:4]) and torch.equal(samples.labels, like.labels)
    assert samples.images.shape == like.images.shape and samples.images.dtype == torch.uint8
    draw_samples(model, tiny(), like, seed=0, batch_size=4, unconditional=True, **dopri5(1e-5))
    assert set(model.labels[-1].tolist()) == {-1}


def test_samples_are_the_exact_flow():
    """dx/dt = 2 (m - x) from noise: x(1) = m + (x0 - m) e^-2."""
    like = first(digits("test"), 6)
    samples = draw_samples(Counting(), tiny(), like, seed=3, batch_size=4, **dopri5(1e-7))
    x0 = fm.noise((6, 1, 8, 8), seed=3, step=0, index=3)
    mean = (like.labels.float() / 10 - 0.5).reshape(-1, 1, 1, 1)
    expected = ((mean + (x0 - mean) * torch.exp(torch.tensor(-2.0)) + 1) * 8.5).floor().clamp(0, 16)
    assert float((samples.images == expected).float().mean()) > 0.999


def test_a_smaller_tolerance_costs_more_evaluations():
    like = first(digits("test"), 4)
    counts = [draw_samples(Counting(), tiny(), like, 0, 4, **dopri5(tolerance)).nfe for tolerance in (1e-3, 1e-5, 1e-7)]
    assert counts[0] < counts[1] < counts[2] and all((count - 2) % 6 == 0 for count in counts)


def test_real_images_pass_as_samples_and_copies_and_noise_do_not(classifier):
    train, held_out = digits(), digits("test")
    count = len(held_out)

    def quality(images, labels=held_out.labels):
        return sample_quality(Samples(images, labels, (0, 0), 256), classifier, train, held_out)

    real = quality(held_out.images)
    assert real.agreement == real.real_agreement >= 0.97 and real.frechet == pytest.approx(0.0, abs=1e-9)
    assert real.novelty == 1.0 and real.fid is None
    copies = quality(train.images[:count], train.labels[:count])
    assert copies.novelty == 0.0 and copies.frechet == copies.real_frechet and copies.nearest_neighbour == copies.real_nearest_neighbour
    noise = quality(torch.randint(0, 17, held_out.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    assert noise.agreement is not None and noise.agreement < 0.3 and noise.nearest_neighbour > 0.9
    assert noise.frechet > 10 * noise.real_frechet and noise.novelty > 1.5
    assert quality(held_out.images, torch.full_like(held_out.labels, -1)).agreement is None


def test_bits_are_those_of_the_likelihood_by_dopri5(trained_classifier):
    model, held_out = Counting().eval(), first(digits("test"), 5)
    result = evaluate_network(model, tiny(), digits(), held_out, seed=2, batch_size=3, tolerance=1e-4, draws=2)
    expected = dataset_bits(model, tiny(), held_out, 3, 2, method="dopri5", rtol=1e-4, atol=1e-4, draws=2)
    torch.testing.assert_close(result.bits.bpd, expected.bpd)
    ended = evaluate_network(model, tiny(), digits(), held_out, seed=2, batch_size=3, tolerance=1e-4, ends=(0.02, 0.75))
    part = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "t0": 0.02, "t1": 0.75}
    torch.testing.assert_close(ended.bits.bpd, dataset_bits(model, tiny(), held_out, 3, 2, **part).bpd)
    x0 = fm.noise((3, 1, 8, 8), seed=2, step=0, index=3)
    drawn = fm.sample(model, x0, cond={"y": held_out.labels[:3]}, **part | {"t1": 1.0}).x  # no noise is left in samples
    assert torch.equal(ended.samples.images[:3], ((drawn + 1) * 8.5).floor().clamp(0, 16).to(torch.uint8))
    fixed = evaluate_network(model, tiny(), digits(), held_out, seed=2, batch_size=3, method="midpoint", steps=4)
    assert fixed.bits.nfe == 8, "a fixed-step method takes dopri5's place"


def test_another_solver_takes_the_place_of_dopri5_for_the_samples_alone(trained_classifier):
    held_out, settings = first(digits("test"), 5), {"seed": 2, "batch_size": 3, "tolerance": 1e-2}
    usual = evaluate_network(Counting().eval(), tiny(), digits(), held_out, **settings)
    model = Counting().eval()
    midpoint = evaluate_network(model, tiny(), digits(), held_out, **settings, solver={"method": "midpoint", "steps": 4})
    torch.testing.assert_close(midpoint.bits.bpd, usual.bits.bpd, rtol=0.0, atol=0.0)
    assert midpoint.samples.nfe_of_batches == (8, 8) and midpoint.samples.nfe == 8.0
    x0 = fm.noise((5, 1, 8, 8), seed=2, step=0, index=3)
    drawn = fm.sample(model, x0, cond={"y": held_out.labels}, method="midpoint", steps=4).x
    assert torch.equal(midpoint.samples.images, ((drawn + 1) * 8.5).floor().clamp(0, 16).to(torch.uint8))


def test_nfe_of_steps_of_each_samples_own():
    like, solver = first(digits("test"), 5), {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4, "per_sample": "shrink"}
    samples = draw_samples(Counting(), tiny(), like, 0, 2, **solver)
    alone = draw_samples(Counting(), tiny(), like, 0, 1, method="bosh3", rtol=1e-4, atol=1e-4).nfe_of_batches
    assert samples.nfe_of_each is not None and tuple(samples.nfe_of_each.tolist()) == alone
    assert samples.nfe == pytest.approx(sum(alone) / 5)


class OnTheHost(torch.Tensor):
    """Images in a mapped file while all else is on a GPU: they meet no other tensor before `to`; rows of them may be picked."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        result = super().__torch_function__(function, types, arguments, keywords or {})
        if function is torch.Tensor.to:
            return result.as_subclass(torch.Tensor)
        others = [value for value in arguments[1:] if isinstance(value, torch.Tensor) and not isinstance(value, cls)]
        assert not others or function is torch.Tensor.__getitem__, f"{function.__name__}: tensors on two devices"
        return result


def test_mapped_images_go_to_the_device_of_the_rest(monkeypatch):
    """What runs on the device gets them by `to`, part by part; the result is that of images that are there."""
    monkeypatch.setattr("fm_fast.train.evaluation.classifier.MOST_STEPS", 2)
    train, held_out = first(digits(), 40), first(digits("test"), 12)
    mapped = [replace(data, images=data.images.as_subclass(OnTheHost), mapped=True) for data in (train, held_out)]
    for there, here in (mapped, (train, held_out)), ((mapped[0], held_out), (train, held_out)):
        results = [evaluate_network(Counting().eval(), tiny(), *pair, batch_size=8, tolerance=1e-2) for pair in (there, here)]
        assert results[0].quality == results[1].quality and torch.equal(results[0].samples.images, results[1].samples.images)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert (
        main(["train", "digits", "--steps", "2", "--batch-size", "16", "--dequantise", "--no-evaluate", "--out", str(folder), *SMALL]) == 0
    )
    return folder


def test_help_lists_every_option_and_says_what_is_not_fid(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert set(re.findall(r" --([a-z][a-z0-9-]+)", text)) - {"help"} == set(OPTIONS.split())
    assert "(not FID)" in text


def test_command(run, tmp_path, capsys, trained_classifier):
    out = tmp_path / "result.json"
    arguments = ["evaluate", str(run), "--limit", "6", "--batch-size", "4", "--tolerance", "1e-3", "--json", str(out)]
    assert main(arguments) == 0
    answer, record = capsys.readouterr(), json.loads(out.read_text())
    assert answer.err == "" and "it is not FID" in answer.out and "digits:test: 6 held-out images" in answer.out
    assert f"bits/dim: {record['bits_per_dim']:.4f} +- {record['std_err']:.4f}" in answer.out
    assert f"NFE: {record['nfe']:.1f} (mean over 6 samples" in answer.out and len(record["nfe_of_batches"]) == 2
    assert record["objective"] == "fm-ot" and record["fid"] is None and "not FID" in record["frechet_is"]
    assert record["restoration"] is None and "PSNR" not in answer.out
    assert 0 <= record["agreement"] <= 1 and 0 <= record["nearest_neighbour"] <= 1 and record["novelty"] > 0


def record_of(run, tmp_path, *arguments):
    out = tmp_path / "result.json"
    assert main(["evaluate", str(run), "--limit", "4", "--tolerance", "1e-2", "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_the_samples_solver_is_the_commands(run, tmp_path, capsys, trained_classifier):
    usual = record_of(run, tmp_path)
    assert (usual["method"], usual["steps"], usual["rtol"], usual["atol"]) == ("dopri5", None, 1e-2, 1e-2)
    assert "bits/dim by dopri5, tolerance 0.01; samples by dopri5, rtol 0.01, atol 0.01" in capsys.readouterr().out
    fixed = record_of(run, tmp_path, "--method", "rk4", "--steps", "3")
    assert (fixed["nfe"], fixed["method"], fixed["steps"], fixed["rtol"]) == (12.0, "rk4", 3, None)
    assert (fixed["bits_per_dim"], fixed["likelihood_nfe"]) == (usual["bits_per_dim"], usual["likelihood_nfe"])
    answer = capsys.readouterr().out
    assert "bits/dim by dopri5, tolerance 0.01; samples by rk4, 3 steps" in answer and "NFE: 12.0 (mean over 4 samples of their" in answer
    assert record_of(run, tmp_path, "--method", "euler")["nfe"] == 2.0, "the steps of the run's pictures"
    capsys.readouterr()
    each = record_of(run, tmp_path, "--method", "bosh3", "--atol", "0.1", "--per-sample")
    assert (each["rtol"], each["atol"], each["per_sample"]) == (1e-2, 0.1, "shrink") and each["nfe"] > 0.0
    answer = capsys.readouterr().out
    assert "samples by bosh3, rtol 0.01, atol 0.1" in answer and "(mean over 4 samples with steps of their own)" in answer


def test_samples_alone(run, tmp_path, capsys, monkeypatch, trained_classifier):
    usual = record_of(run, tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("fm_fast.train.evaluation.evaluate.dataset_bits", None)
    alone = record_of(run, tmp_path, "--no-bits")
    assert {name for name in usual if usual[name] != alone[name]} <= {"bits_per_dim", "std_err", "likelihood_nfe", "seconds"}
    assert alone["bits_per_dim"] is alone["std_err"] is alone["likelihood_nfe"] is None
    answer = capsys.readouterr()
    assert "bits" not in answer.out and "NFE: " in answer.out and answer.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-bits", "--draws", "2"], "draws: expected none with --no-bits, which asks for no likelihoods, got 2"),
        (["--no-bits", "--t1", "0.5"], "t1: expected none with --no-bits, which asks for no likelihoods, got 0.5"),
        (["--no-bits", "--method", "euler", "--tolerance", "7"], "tolerance: expected none with --no-bits, which asks for no likelihoods"),
        (["--no-bits", "--rtol", "1e-4", "--atol", "1e-4", "--tolerance", "7"], "tolerance: expected none with --no-bits"),
        (["--steps", "3"], "steps: expected none for the adaptive method dopri5, which places its own steps, got 3"),
        (["--method", "bosh3", "--grid", "karras"], "grid: expected none for the adaptive method bosh3, which places its own steps"),
        (
            ["--method", "midpoint", "--rtol", "0.1"],
            "rtol: expected none for the fixed-step method midpoint, which has no tolerance, got 0.1",
        ),
        (["--method", "midpoint", "--per-sample"], "per_sample: expected none for the fixed-step method midpoint"),
        (["--method", "midpoint", "--max-steps", "9"], "max_steps: expected none for the fixed-step method midpoint"),
    ],
)
def test_options_that_the_method_has_not_are_refused(arguments, message, run, capsys):
    assert main(["evaluate", str(run), "--limit", "4", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fm-fast: error: {message}") and error.count("\n") == 1


def test_the_inception_network_judges_as_well(run, tmp_path, capsys, monkeypatch, trained_classifier):
    measured = {"frechet_inception_distance": 12.5, "inception_score_mean": 3.25, "inception_score_std": 0.5}
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=lambda **arguments: measured))
    out = tmp_path / "result.json"
    assert main(["evaluate", str(run), "--limit", "4", "--tolerance", "1e-2", "--fid", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert (record["fid"], record["inception_score"]) == (12.5, 3.25)
    assert "FID: 12.50\ninception score: 3.25\n" in capsys.readouterr().out


def test_training_images_as_held_out_ones_are_noticed(run, capsys, trained_classifier):
    assert main(["evaluate", str(run), "--data", "digits:train", "--limit", "4", "--tolerance", "1e-2", "--unconditional"]) == 0
    answer = capsys.readouterr()
    assert "the held-out images are training images; name others with --data" in answer.err
    assert "digits:train: 4 training images" in answer.out
    assert "unknown without classes" in answer.out and "unknown, they are training images" in answer.out


def test_errors_are_told_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert main(["evaluate", str(run), "--fid"]) == 1
    assert "FID needs torch-fidelity: pip install 'fm_fast[fid]'" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--json", str(tmp_path / "no" / "r.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--json", str(tmp_path)]) == 1
    assert f"json: expected a file, {tmp_path} is a folder" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "no checkpoint-NUMBER.pt in this folder" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--limit", "1"]) == 1
    assert "data, limit: expected at least 2 training and 2 held-out images, got 1500 and 1" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--limit", "4", "--tolerance", "0"]) == 1
    assert capsys.readouterr().err.splitlines(keepends=True)[-1] == "fm-fast: error: tolerance must be positive, got 0.0\n"


@pytest.mark.parametrize("command", ["likelihood", "evaluate"])
def test_a_run_that_never_went_without_labels_is_not_asked_to(command, tmp_path, capsys):
    run = ["train", "digits", "--steps", "1", "--batch-size", "8", "--label-drop", "0", "--no-evaluate", "--out", str(tmp_path)]
    assert main([*run, *SMALL]) == 0
    assert main([command, str(tmp_path), "--unconditional", "--limit", "2"]) == 1
    assert "unconditional: expected False for a run with label_drop 0" in capsys.readouterr().err


def test_fewer_training_images_than_held_out_ones_will_do(classifier):
    train, held_out = first(digits(), 20), first(digits("test"), 50)
    quality = sample_quality(Samples(held_out.images, held_out.labels, (0, 0), 256), classifier, train, held_out)
    assert all(math.isfinite(value) for value in (quality.frechet, quality.real_frechet, quality.novelty, quality.real_nearest_neighbour))


def test_counts_of_batches_are_weighted_by_their_images():
    def bits(count, nfe):
        zeros = torch.zeros(count, dtype=torch.float64)
        return fm.BitsPerDim(bpd=zeros, std_err=None, logp=zeros[None], nfe=nfe, nvjp=2 * nfe)

    merged = _merged([bits(4, 10), bits(1, 20)], seconds=0.0)
    assert (merged.nfe, merged.nvjp) == (12.0, 24.0)
