"""The comparisons of whole training steps with torchcfm: the same losses on the same triples, and where the time goes."""

import dataclasses
import json
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import loss_curves, peers, step_parts
from benchmarks import run as benchmark
from benchmarks.op import Setting
from benchmarks.ops import train_step, training
from fm_fast.nn import UNet
from fm_fast.nn.presets import PRESETS as NETWORKS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not peers.available("torchcfm"), reason="no torchcfm"),
]


def run(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", ["x", "--threads", "1", *map(str, words)])
    module.main()


def test_both_learn_alike(monkeypatch, tmp_path, capsys):
    run(monkeypatch, loss_curves, "--size", "tiny", "--steps", 4, "--seeds", 5, "--out", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["provider"], row["metric"]) for row in rows] == [
        (name, metric) for name in ("fm_fast", "torchcfm", "torchcfm, disturbed") for metric in ("late_loss", "ratio")
    ]  # fmt: skip
    assert rows[3]["median"] == pytest.approx(1.0, abs=1e-5) and 1.0 < rows[0]["median"] < 2.0
    assert rows[0]["mode"] == "4 steps, warm-up 5000, 1 seeds" and f"{rows[0]['median']:.5f}" in capsys.readouterr().out


def test_bfloat16_is_held_against_autocast_and_against_float32(monkeypatch, tmp_path):
    run(monkeypatch, loss_curves, "--size", "tiny", "--steps", 2, "--seeds", 0, "--dtype", "bfloat16", "--out", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["provider"] for row in rows[::2]] == ["fm_fast", "torchcfm", "torchcfm, autocast"]
    assert {row["dtype"] for row in rows} == {"bfloat16"} and rows[0]["median"] != rows[2]["median"]
    assert loss_curves.apart({"fm_fast": [1.0, 3.0], "torchcfm": [1.0, 2.0], "torchcfm, autocast": [2.0, 3.0]}) == [0.0, 0.5, -0.5, 0.0]
    assert loss_curves.apart({"fm_fast": [1.0], "torchcfm": [2.0], "torchcfm, disturbed": [3.0]}) == [-0.5]


def test_the_learning_rate_rises_to_its_value():
    trainer = loss_curves.trainers((4, 3, 8, 8), 0, torch.float32)["fm_fast"]
    loss_curves.set_rate(trainer, 0.5)
    assert trainer.optimiser.param_groups[0]["lr"] == 0.5
    assert [loss_curves.warmed(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] and loss_curves.warmed(0, 0) == 1.0


def test_a_step_with_another_loss_ends_the_run(monkeypatch, tmp_path):
    def other(given, dtype):
        right = train_step.our_trainer(given, dtype)
        return dataclasses.replace(right, at=lambda x1, x0, t: right.at(x1, 1.05 * x0, t))

    monkeypatch.setattr(loss_curves, "our_trainer", other)
    with pytest.raises(SystemExit, match=r"the mean losses of the last fifth differ by \d.*, more than 1%"):
        run(monkeypatch, loss_curves, "--size", "tiny", "--steps", 2, "--seeds", 0, "--out", tmp_path / "rows.json")
    assert not (tmp_path / "rows.json").exists()


def test_triples_are_digits_noise_and_times():
    (x1, x0, t), (again, _, _) = next(loss_curves.triples((4, 3, 16, 16), 1, 0)), next(loss_curves.triples((4, 3, 16, 16), 1, 0))
    assert x1.shape == x0.shape == (4, 3, 16, 16) and t.shape == (4,) and torch.equal(x1, again)
    assert torch.equal(x1[:, 0], x1[:, 2]) and -1 < float(x1.min()) < float(x1.max()) < 1


def test_late_losses_are_the_last_fifth():
    assert loss_curves.late([9.0] * 8 + [1.0, 2.0]) == 1.5 and loss_curves.late([3.0]) == 3.0


def test_parts_of_a_step_are_the_step():
    setting = Setting(torch.device("cpu"), "tiny", train_step.SIZES["tiny"], torch.float32, "")
    given = train_step.inputs(setting)
    cut, whole = (train_step.our_trainer(given, torch.float32) for _ in range(2))
    times = step_parts.timed_step(cut)
    whole()
    for one, other in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert times[step_parts.WHOLE] == pytest.approx(sum(value for name, value in times.items() if name != step_parts.WHOLE))
    doubled = {name: 2 * value for name, value in times.items()}
    found = step_parts.rows(setting, {"fm_fast": [times] * 3, "other": [doubled] * 3})
    assert {row.median for row in found if row.provider == "other" and row.metric == "ratio"} == {2.0}
    assert step_parts.table(found).splitlines()[-1].split()[0] == "all"


@pytest.mark.slow
def test_the_parts_of_every_provider_are_written(monkeypatch, tmp_path):
    run(monkeypatch, step_parts, "--size", "tiny", "--rounds", 2, "--out", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 6 * 3 * 2 and {row["op"] for row in rows} == {"train_step_parts"}


@pytest.mark.slow
def test_both_learn_alike_at_a_size_that_matters(monkeypatch, tmp_path):
    run(monkeypatch, loss_curves, "--size", "16x16", "--steps", 120, "--warm-up", 300, "--seeds", 0, "--out", tmp_path / "rows.json")
    ours, _, theirs, ratio, *_ = json.loads((tmp_path / "rows.json").read_text())
    assert abs(ratio["median"] - 1.0) < 1e-5 and max(ours["median"], theirs["median"]) < 1.3


def test_the_networks_of_the_script_have_as_many_parameters():
    config = NETWORKS[training.PRESET]
    with torch.device("meta"):
        counts = [sum(p.numel() for p in network.parameters()) for network in (UNet(config), training.torchcfm_network(config))]
    assert counts == [35_746_307] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_steps_on_random_images(dtype, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "WARM_UP_SECONDS", 0.0)
    path = tmp_path / "rows.json"
    benchmark.main(["--op", "training", "--dtype", dtype, "--threads", "1", "--rounds", "1", "--out", str(path)])
    found = json.loads(path.read_text())
    rows = {metric: [row for row in found if row["metric"] == metric] for metric in ("ms", "ratio", "images_per_second", "tflops")}
    others = ["torchcfm, float32"] + ["torchcfm, autocast"] * (dtype == "bfloat16")
    for same in rows.values():
        assert [row["provider"] for row in same] == ["fm_fast", *others] and all(row["median"] > 0 for row in same)
    images = training.SIZES["tiny"][0]
    for time, rate in zip(rows["ms"], rows["images_per_second"], strict=True):
        assert rate["median"] == pytest.approx(images / (time["median"] * 1e-3))
    assert f"{rows['images_per_second'][0]['median']:,.0f} images/s" in capsys.readouterr().out


@pytest.mark.parametrize(("losses", "message"), [((1.2, 1.3), "the first loss is 1.2"), ((1.333, 9.0), "the second loss is 9")])
def test_steps_that_do_something_else_are_found(losses, message):
    setting = Setting(torch.device("cpu"), "tiny", training.SIZES["tiny"], torch.float32, "")
    found = iter(losses)
    with pytest.raises(AssertionError, match=message):
        training.check(training.inputs(setting), setting, lambda: torch.tensor(next(found)))


def test_the_share_of_peak_is_that_of_the_dtype(monkeypatch):
    """The network's 37.3 GFLOP an image, forward and backward; 989 and 494 TFLOP/s by the data sheet."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for dtype, peak in ((torch.bfloat16, 989.0), (torch.float32, 494.0)):
        setting = Setting(torch.device("cuda"), "CIFAR, 128", training.GPU_SIZES["CIFAR, 128"], dtype, "")
        rates = {metric: amount / 12.8 for metric, amount in training.work(setting).items()}  # of a step of 12.8 ms
        assert rates["images_per_second"] == pytest.approx(10_000)
        assert rates["tflops"] == pytest.approx(373, rel=0.01) and rates["share_of_peak"] == pytest.approx(rates["tflops"] / peak)


def test_on_a_gpu_steps_are_replayed_and_taken_kernel_by_kernel():
    setting = Setting(torch.device("cuda"), "CIFAR, 128", training.GPU_SIZES["CIFAR, 128"], torch.bfloat16, "")
    names = ["fm_fast", "fm_fast, kernel by kernel", "torchcfm, float32", "torchcfm, autocast"]
    assert [provider.name for provider in training.providers(setting)] == names
