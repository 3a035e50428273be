"""What a run tells: speed, floating-point operations against a count by hand, TensorBoard, and the loss curve."""

import dataclasses
import json
import math
import subprocess
import sys
import time
import types

import pytest
import torch
from trainer_helpers import CPU, tiny

from fm_fast.nn import UNetConfig
from fm_fast.train.data import DataOrder, digits
from fm_fast.train.execution import devices
from fm_fast.train.execution.devices import flops_per_image, peak_memory, peak_tflops
from fm_fast.train.execution.distributed import Team
from fm_fast.train.loop import train
from fm_fast.train.presets import PRESETS
from fm_fast.train.reporting.curve import draw_curves, read_curves
from fm_fast.train.reporting.log import Logger, Speed
from fm_fast.train.step import Share, new_state, next_batch, sample_losses
from fm_fast.train.storage.run_folder import RunFolder

MILLION = 10**6
LARGE_NETWORKS = [("cifar10-paper", 168.4), ("imagenet32-paper", 219.2), ("imagenet64-paper", 657.9), ("imagenet128-paper", 2394.0)]


def log_lines(path, **changes):
    logger = Logger(RunFolder(path.parent), tiny(log_every=1, steps=3, **changes), 0, Team(CPU), 3 * MILLION)
    for step in (1, 2, 3):
        logger.step(step, torch.tensor(2.0 / step), 0.1, torch.tensor([[4.0, 0.0, 1.0, 2.0], [2.0, 0.0, 1.0, 4.0]]))
    logger.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_of_the_log(tmp_path):
    first, *later = log_lines(tmp_path / "log.jsonl")
    assert [line["images"] for line in later] == [32, 48]
    assert (first["step"], first["loss"], first["images"], first["not_finite"]) == (1, 2.0, 16, 0)
    assert first["loss_by_quartile"] == [2.0, None, 1.0, 0.5]
    assert first["tflops"] == pytest.approx(first["images_per_second"] * 3e-6, abs=1e-4) and first["share_of_peak"] is None
    assert 0.05 < first["peak_memory_gib"] < 100


def test_norms_of_gradients_are_averaged_and_skipped_steps_counted(tmp_path):
    skipped = torch.zeros((), dtype=torch.int64)
    logger = Logger(RunFolder(tmp_path), tiny(log_every=3, steps=7), 0, Team(CPU), skipped=skipped)
    for step, norm in enumerate([3.0, math.nan, 5.0, math.inf, math.nan, math.inf, 2.0], start=1):
        skipped += not math.isfinite(norm)
        logger.step(step, torch.tensor(1.0), 0.1, gradient_norm=torch.tensor(norm, dtype=torch.float64))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["gradient_norm"], record["skipped_steps"]) for record in records] == [(4.0, 1), (None, 4), (2.0, 4)]


def test_numbers_that_json_has_not_are_null(tmp_path):
    logger = Logger(RunFolder(tmp_path), tiny(log_every=1), 0, Team(CPU))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        logger.step(1, torch.tensor(math.nan), 0.1, torch.tensor([[math.inf] * 4, [1.0] * 4]))
    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None and record["loss_by_quartile"] == [None] * 4 and record["not_finite"] == 1


@pytest.mark.parametrize("output", ["closed", "full"])
def test_without_an_output_a_run_goes_on_in_silence(output, tmp_path):
    network = "--model.channels 8 --model.groups 4 --model.head-channels 8"
    words = f"train digits --steps 2 --batch-size 4 {network} --no-evaluate --sample-steps 1 --samples-per-class 1 --out {tmp_path / 'run'}"
    command = f"{sys.executable} -m fm_fast {words} {'>&-' if output == 'closed' else '> /dev/full'}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "checkpoint-00000002.pt").is_file()


def test_the_log_of_a_run_has_norms_before_clipping(tmp_path):
    """Also without a limit, and as the counts of a run that goes on."""
    records = {}
    for clip in (0.0, 1e-3):
        config = tiny(steps=2, log_every=1, clip=clip, evaluate=False, sample_steps=1, out=str(tmp_path / str(clip)))
        train(config)
        train(dataclasses.replace(config, steps=3), resuming=True)
        records[clip] = [json.loads(line) for line in RunFolder(tmp_path / str(clip)).log.read_text().splitlines()]
    data = digits()
    state, config = new_state(config, CPU), tiny(clip=1e-3)
    losses, _ = sample_losses(state, config, next_batch(state, config, data, DataOrder(len(data), config.seed)))
    losses.mean().backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()]))
    assert norm > 1e-2
    for found in records.values():
        assert found[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert [record["skipped_steps"] for record in found] == [0, 0, 0] and len({record["gradient_norm"] for record in found}) == 3


def test_speed(monkeypatch):
    monkeypatch.setattr("fm_fast.train.reporting.log.peak_tflops", lambda device, precision: 100.0)
    speed = Speed.of(64, 2.0, 5 * 10**11, tiny(), Team(CPU, Share(0, 2)))
    assert (speed.images, speed.tflops, speed.share_of_peak) == (32.0, 16.0, 0.08)
    assert str(speed) == "32 images/s, 16 TFLOP/s (8% of peak)"


@pytest.mark.parametrize(
    ("name", "gflops"), [("cifar10-torchcfm", 37.32), *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE_NETWORKS)]
)
def test_operations_of_known_networks(name, gflops):
    """The counts of the published networks, which torchcfm's and guided-diffusion's own modules have as well."""
    assert flops_per_image(PRESETS[name].model) * 1e-9 == pytest.approx(gflops, rel=1e-3)


def test_operations_counted_by_hand():
    """No attention but the middle's, one level, one block: convolutions 3x3 and 1x1, linear layers and two products of attention."""
    net = UNetConfig(4, 1, 0, channels=8, multipliers=(1,), blocks=1, attention_sizes=(), head_channels=8, groups=4)
    pixels, c, e = 16, 8, 32
    block = 2 * 9 * c * c * pixels + 2 * c * e
    decoder = 2 * (9 * 2 * c * c * pixels + 9 * c * c * pixels + 2 * c * c * pixels + 2 * c * e)
    attention = (3 + 1) * c * c * pixels + 2 * pixels * pixels * c
    forward = 9 * c * pixels + (c * e + e * e) + block + (2 * block + attention) + decoder + 9 * c * pixels
    # Backward: as many again for each operand's gradient, but none for those of the network's inputs, x and the sinusoids of t.
    expected = 2 * (3 * forward - 9 * c * pixels - c * e)
    assert flops_per_image(net) == expected


def test_known_devices(monkeypatch):
    assert peak_tflops(CPU, "float32") is None and peak_memory(CPU) > 10**7
    for name, peaks in (("NVIDIA H200", (989.0, 494.0)), ("NVIDIA H100 PCIe", (756.0, 378.0)), ("NVIDIA T0", (None, None))):
        monkeypatch.setattr(devices.torch.cuda, "get_device_name", lambda device, name=name: name)
        found = tuple(peak_tflops(torch.device("cuda", 0), precision) for precision in ("bfloat16", "float32"))
        assert found == peaks


class Board:
    def __init__(self, folder):
        self.folder, self.scalars = folder, []
        Board.latest = self

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.scalars.append("closed")


def test_tensorboard(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log_lines(tmp_path / "log.jsonl", tensorboard=True)
    assert Board.latest.folder == str(tmp_path / "tensorboard")
    assert {("loss", 1.0, 2), ("loss_by_quartile/0", 2.0, 1), ("loss_by_quartile/3", 0.5, 3)} <= set(Board.latest.scalars)
    assert Board.latest.scalars[-1] == "closed" and not any("quartile/1" in entry[0] for entry in Board.latest.scalars)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="--tensorboard needs it: pip install tensorboard"):
        log_lines(tmp_path / "log.jsonl", tensorboard=True)
    with pytest.raises(ImportError, match="--tensorboard needs it"):  # before the data are looked for
        train(tiny(tensorboard=True, data="nowhere", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_curve_is_where_the_losses_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    log, picture = tmp_path / "log.jsonl", tmp_path / "loss.png"
    log.write_text("".join(json.dumps({"step": step, "loss": 3.0}) + "\n" for step in range(1, 101)))
    draw_curves(log, picture)
    with image.open(picture) as found:
        assert found.size == (800, 500)
        column = [found.getpixel((425, y)) for y in range(21, 450)]
    # The scale reaches from 2 to 5, over 430 pixels: ln(3/2) / ln(5/2) = 0.4425 of them above the bottom, at 450.
    black = [21 + y for y, pixel in enumerate(column) if pixel == (0, 0, 0)]
    assert black and all(abs(y - (450 - 0.4425 * 430)) <= 2 for y in black)
    log.write_text(json.dumps({"step": 1, "loss": float("nan")}) + "\n")
    draw_curves(log, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_curves_of_a_log(tmp_path):
    curves = read_curves(log_file(tmp_path))
    assert curves["loss"] == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert curves["t in 0..1/4"] == [(1, 2.0), (2, 2.0), (3, 2.0)] and curves["1/4..1/2"] == []


def log_file(folder):
    log_lines(folder / "log.jsonl")
    return folder / "log.jsonl"


def test_pictures_do_not_count_as_training_time(tmp_path):
    logger = Logger(RunFolder(tmp_path), tiny(log_every=1, steps=1), 0, Team(CPU))
    assert logger.without_timing(lambda: time.sleep(0.5)) >= 0.5
    logger.step(1, torch.tensor(1.0), 0.1)
    (record,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert record["images_per_second"] > 16 / 0.5


def test_a_curve_of_equal_losses_on_a_tick(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in (1, 2)))
    draw_curves(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
