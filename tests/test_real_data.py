"""Real-valued data, such as an autoencoder's latents: standardised, trained on, drawn, and their density in their own units."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainer_helpers import CPU, assert_same_state, decode_png, tiny

import fm_fast as fm
from fm_fast.cli import main
from fm_fast.train.config import fit_to_data
from fm_fast.train.data import digits, load_dataset
from fm_fast.train.evaluation.likelihood import dataset_bits
from fm_fast.train.evaluation.quality import median_distance
from fm_fast.train.evaluation.sample import sample, starting_noise
from fm_fast.train.loop import train
from fm_fast.train.prepare import Preparation
from fm_fast.train.reporting.picture import to_8_bit
from fm_fast.train.standardisation import Standardisation, measured
from fm_fast.train.step import Batch, new_state, sample_losses
from fm_fast.train.storage.checkpoint import read_checkpoint, restore
from fm_fast.train.storage.weights import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
SHIFT, SCALE = np.array([100.0, 0.0, -3.0, 7.0]), np.array([10.0, 0.4, 2.0, 60.0])
SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "2", "--samples-per-class", "2"]
SHORT = ["--steps", "4", "--batch-size", "8", "--learning-rate", "0.02", "--warmup", "1", "--checkpoint-every", "2", *SMALL]


def latents(count, seed=0, side=8):
    """[N, 4, S, S] of channels in units of their own, float64, and labels of three classes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    classes = np.random.default_rng(9).normal(size=(3, 4, side, side))
    values = 0.8 * classes[labels] + 0.6 * generator.normal(size=(count, 4, side, side))
    return values * SCALE[:, None, None] + SHIFT[:, None, None], labels


def archive(folder, count=40, dtype=np.float16, name="latents.npz", **more):
    (images, labels), (test_images, test_labels) = latents(count), latents(12, seed=1)
    arrays = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels} | more
    np.savez(folder / name, **{name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in arrays.items()})
    return folder / name


# What the network sees


def test_each_channel_is_measured():
    values = torch.from_numpy(latents(5000, side=4)[0]).float()
    found = measured(values.split(1000))
    wide = values.double().numpy()
    deviation = wide.std((0, 2, 3))
    assert (np.abs(np.array(found.shift) - wide.mean((0, 2, 3))) <= 1e-3 * deviation).all()
    np.testing.assert_allclose(found.scale, 1.0 / deviation, rtol=1e-3)


def test_numbers_far_from_zero_are_measured_to_their_spread():
    values = 1e5 + torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = values.double()
    assert abs(measured([values]).shift[0] - float(wide.mean())) < 1e-3
    assert measured([values]).scale[0] == pytest.approx(1.0 / float(wide.std()), rel=1e-3)


def test_a_measurement_has_few_digits_so_that_it_is_the_same_again():
    found = measured([torch.from_numpy(latents(100)[0]).float()])
    assert all(float(f"{number:.3e}") == number for number in found.scale)
    assert all(abs(shift * 10**digits - round(shift * 10**digits)) < 1e-6 for shift, digits in zip(found.shift, (2, 4, 3, 2), strict=True))


def test_a_channel_that_never_changes_is_not_stretched():
    """Nor one that changes by rounding alone."""
    values = torch.cat([torch.full((5, 2, 7, 7), 0.1), torch.randn(5, 1, 7, 7)], dim=1)
    values[0, 1, 0, 0] += 1e-8
    found = measured([values])
    assert float(values[0, 1, 0, 0]) != 0.1 and found.shift[:2] == pytest.approx((0.1, 0.1)) and found.scale[:2] == (1.0, 1.0)


def test_numbers_that_their_dtype_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data_scale: expected numbers with which torch.float16 holds the data, got \(10000.0,\)"):
        load_dataset(archive(tmp_path), preparation=Preparation(scale=(1e4,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("numbers", [((3.0,), (0.5,)), ((1.0, 2.0, 3.0, 4.0), (0.5, 2.0, 4.0, 0.25))], ids=["one", "a channel"])
def test_what_is_seen_overwrites_and_is_undone(dtype, numbers):
    values = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, units = values.clone(), Standardisation(*numbers)
    seen = units.seen(values)
    assert seen.data_ptr() == values.data_ptr() and seen.dtype == dtype
    shift, scale = (np.array(each).reshape(-1, 1, 1) for each in numbers)
    accuracy = 1e-6 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(seen.double().numpy(), (before.double().numpy() - shift) * scale, rtol=accuracy, atol=accuracy)
    restored = units.restored(seen)
    assert restored.dtype == torch.float32
    np.testing.assert_allclose(restored.numpy(), before.double().numpy(), rtol=accuracy, atol=accuracy)


def test_the_density_in_their_own_units():
    assert Standardisation((0.0,), (0.25,)).bits == -2.0
    assert Standardisation((0.0, 1.0), (4.0, -0.5)).bits == 0.5


# Reading


@pytest.mark.parametrize(("stored", "held"), [(np.float16, torch.float16), (np.float32, torch.float32), (np.float64, torch.float32)])
def test_an_archive_of_floats(tmp_path, stored, held):
    file = archive(tmp_path, dtype=stored)
    found = load_dataset(file)
    assert (found.images.dtype, found.levels, found.classes, found.division) == (held, None, 3, "test part")
    wide = latents(40)[0].astype(stored).astype(np.float64)
    shift, scale = (np.array(each)[:, None, None] for each in (found.standardisation.shift, found.standardisation.scale))
    np.testing.assert_allclose(found.images.double().numpy(), (wide - shift) * scale, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.images.double().mean((0, 2, 3)).numpy(), 0.0, atol=2e-3)
    np.testing.assert_allclose(found.images.double().std((0, 2, 3)).numpy(), 1.0, atol=2e-3)


def test_the_test_part_is_seen_as_the_training_part(tmp_path):
    file, kept = archive(tmp_path, dtype=np.float32), Preparation(shift=(100.0, 0.0, -3.0, 7.0), scale=(0.1, 2.5, 0.5, 0.02))
    found = load_dataset(file, "test", kept)
    expected = (latents(12, seed=1)[0] - np.array(kept.shift)[:, None, None]) * np.array(kept.scale)[:, None, None]
    np.testing.assert_allclose(found.images.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_big_endian_floats_channels_last_and_blocks_of_pixels(tmp_path):
    images, labels = latents(6)
    np.savez(tmp_path / "x.npz", images=np.moveaxis(images, 1, 3).astype(">f4"), labels=labels)
    found = load_dataset(tmp_path / "x.npz", preparation=Preparation(pool=2, pad=1, scale=(2.0,)))
    means = images.reshape(6, 4, 4, 2, 4, 2).mean((3, 5))
    np.testing.assert_allclose(found.images.numpy(), 2.0 * np.pad(means, ((0, 0), (0, 0), (1, 1), (1, 1))), rtol=1e-5, atol=1e-4)


def test_held_out_rows_are_not_measured(tmp_path):
    images, labels = latents(40)
    np.savez(tmp_path / "x.npz", images=images.astype(np.float32), labels=labels)
    found = load_dataset(tmp_path / "x.npz", "train", Preparation(test_share=0.25))
    raw = load_dataset(tmp_path / "x.npz", "train", Preparation(test_share=0.25, scale=(1.0,)))
    assert len(found) == 30 and found.standardisation == measured([raw.images])
    assert found.standardisation != load_dataset(tmp_path / "x.npz").standardisation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.full((4, 4, 8, 8), np.nan), "labels": np.zeros(4, int)}, "finite numbers that float32 can hold, got 1024 others"),
        ({"images": np.full((4, 4, 8, 8), 1e300), "labels": np.zeros(4, int)}, "expected finite numbers that float32 can hold, got 1024"),
        ({"images": np.zeros((4, 4, 8, 8), complex), "labels": np.zeros(4, int)}, r"\[images\]: expected an array of integers or floating"),
        ({"images": np.zeros((4, 4, 8, 8)), "labels": np.zeros(4)}, r"\[labels\]: expected an array of integers that torch can hold"),
        ({"images": np.zeros((4, 4, 8, 8), int), "labels": np.zeros(4, int)}, "expected images uint8, or real numbers"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "x.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "x.npz")


def test_whole_numbers_are_warned_of(tmp_path):
    np.savez(tmp_path / "x.npz", images=digits().images[:5].float().numpy(), labels=np.arange(5))
    assert "all numbers are whole" in load_dataset(tmp_path / "x.npz").left_out[0]
    assert load_dataset(archive(tmp_path)).left_out == ()


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_scale": (1.0, 0.0)}, "data_scale: expected numbers other than 0"),
        ({"data_shift": (1.0,)}, "data_shift: expected none without data_scale"),
        ({"data_scale": (1.0,), "dequantise": True}, "dequantise: expected off for real-valued data"),
        ({"data_scale": (1.0,), "super_resolution": 2}, "super_resolution: expected 1 for real-valued data"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_data_that_do_not_fit_the_settings_are_refused(tmp_path, capsys):
    command = ["train", "--data", archive(tmp_path), "--out", tmp_path / "run", *SHORT]
    assert "dequantise: expected off for real-valued data" in refused(capsys, *command, "--dequantise")
    assert "data_scale: expected one number, or 4, one a channel, got 2" in refused(capsys, *command, "--data-scale", "1,2")
    assert "data_shift: expected one number, or 4" in refused(capsys, *command, "--data-scale", "1", "--data-shift=-1,2")
    whole = ["train", "digits", "--out", tmp_path / "run", *SHORT, "--data-scale", "2"]
    assert "data_scale: expected none for digits of integers" in refused(capsys, *whole)
    assert not (tmp_path / "run").exists()


# Training


def real_dataset(folder, dtype=np.float32):
    return load_dataset(archive(folder, dtype=dtype))


def fitted(dataset, **changes):
    return fit_to_data(tiny(**changes), dataset.images.shape[1:], dataset.classes, dataset.standardisation)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_loss_is_that_of_the_standardised_numbers(tmp_path, dtype, flip):
    """Against the formulas: x_t = (1 - t) x0 + t x1, target x1 - x0, with the noise of the contract."""
    dataset = real_dataset(tmp_path, dtype)
    config = fitted(dataset, flip=flip)
    batch = Batch(dataset.images[:8], dataset.labels[:8], dataset.levels, step=3, first_id=5)
    seen = {}

    def network(x, t, **condition):
        seen.update(x=x, t=t)
        return 0.5 * x

    losses, t = sample_losses(new_state(config, CPU), config, batch, network)
    x0 = fm.noise((8, 4, 8, 8), seed=config.seed, step=3, stream="x0", sample_ids=5, dtype=torch.float64)
    x1 = dataset.images[:8].double()
    x1 = x1.flip(-1) if flip else x1
    there = t.double()[:, None, None, None]
    x_t = (1.0 - there) * x0 + there * x1
    torch.testing.assert_close(seen["x"].double(), x_t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.double(), (0.5 * x_t - (x1 - x0)).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(The folder of a run, its data)."""
    folder = tmp_path_factory.mktemp("real")
    data = archive(folder)
    assert main(["train", "--data", str(data), "--out", str(folder / "run"), "--quality-every", "4", "--flip", "0.5", *SHORT]) == 0
    return folder / "run", data


def test_a_run_knows_its_units(run, capsys):
    folder, data = run
    units = load_dataset(data).standardisation
    config = load_model(folder)[1]
    assert (config.data_shift, config.data_scale) == (units.shift, units.scale) and config.standardisation == units
    width, height, pixel, _ = decode_png((folder / "samples.png").read_bytes())
    assert pixel == 3 and width > 0 and height > 0
    quality = json.loads((folder / "quality.jsonl").read_text().splitlines()[0])
    assert math.isfinite(quality["frechet"]) and 0.0 <= quality["agreement"] <= 1.0


def test_an_interrupted_run_goes_on_with_its_units(run, tmp_path, capsys):
    """Resumed by the command, which has the measured numbers, and by a call with the settings that the run began with."""
    _, data = run
    config = tiny(data=str(data), out=str(tmp_path / "whole"), steps=4, checkpoint_every=2, sample_steps=1, samples_per_class=1)
    whole = train(config).state
    by_command, by_call = tmp_path / "command", tmp_path / "call"
    for out in (by_command, by_call):
        shutil.copytree(tmp_path / "whole", out)
        (out / "checkpoint-00000004.pt").unlink()
    assert main(["train", "--resume", "--out", str(by_command)]) == 0
    train(replace(config, out=str(by_call)), resuming=True)
    for out in (by_command, by_call):
        again = new_state(load_model(out)[1], CPU)
        restore(out, read_checkpoint(out / "checkpoint-00000004.pt"), again, load_model(out)[1])
        assert_same_state(whole, again)


def test_other_units_are_another_run(run, tmp_path, capsys):
    folder, _ = run
    assert "data_scale: " in refused(capsys, "train", "--resume", "--out", folder, "--data-scale", "1", "--steps", "5")


def test_a_run_that_begins_with_another_has_its_units(run, tmp_path):
    folder, _ = run
    other = archive(tmp_path, name="other.npz", images=2.0 * latents(40)[0])
    assert main(["train", "--data", str(other), "--out", str(tmp_path / "fine"), "--init-from", str(folder), *SHORT]) == 0
    assert load_model(tmp_path / "fine")[1].standardisation == load_model(folder)[1].standardisation


# Samples and likelihoods


def test_samples_are_in_the_units_of_the_data(run, tmp_path):
    folder, _ = run
    out = tmp_path / "samples.npz"
    assert main(["sample", str(folder), "--classes", "1", "--count", "3", "--out", str(out), "--guidance", "1", "--seed", "4"]) == 0
    found = np.load(out)
    model, config = load_model(folder)
    x0 = starting_noise((3, 4, 8, 8), config.recipe, 4, 1, CPU)
    seen = sample(model, x0, torch.tensor([1, 1, 1]), config.recipe, 2)
    shift, scale = (np.array(numbers)[:, None, None] for numbers in (config.data_shift, config.data_scale))
    assert found["images"].dtype == np.float32 and found["labels"].tolist() == [1, 1, 1]
    np.testing.assert_allclose(found["images"], seen.double().numpy() / scale + shift, rtol=1e-5, atol=1e-4)
    again = load_dataset(out)  # an archive of samples is data
    assert again.levels is None and len(again) == 3


def test_pictures_of_real_numbers(run, tmp_path, capsys):
    folder, _ = run
    assert main(["sample", str(folder), "--count", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert decode_png((tmp_path / "x.png").read_bytes())[2] == 3
    assert to_8_bit(torch.tensor([-9.0, -3.0, 0.0, 1.5, 3.0, 9.0]), None).tolist() == [0, 0, 128, 191, 255, 255]
    text = refused(capsys, "sample", folder, "--images", tmp_path / "files")
    assert "images: expected a network of grey levels, got one of real numbers" in text


class Gaussian(torch.nn.Module):
    """The velocity that carries N(0, 1) to N(0, 1) along the OT path."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, y=None):
        t = t.reshape(-1, 1, 1, 1)
        return (2.0 * t - 1.0) / (t * t + (1.0 - t) ** 2) * x


def test_bits_are_of_the_density_in_the_units_of_the_data(tmp_path):
    """Of a normal density in closed form, whose mean and deviation are the channels'."""
    images, labels = latents(6)
    np.savez(tmp_path / "x.npz", images=images.astype(np.float32), labels=labels)
    dataset = load_dataset(tmp_path / "x.npz", preparation=Preparation(shift=tuple(SHIFT.tolist()), scale=tuple((1.0 / SCALE).tolist())))
    config = fitted(dataset)
    found = dataset_bits(Gaussian(), config, dataset, batch_size=4, seed=0, method="rk4", steps=200, kind="exact")
    normal = torch.distributions.Normal(torch.from_numpy(SHIFT)[:, None, None], torch.from_numpy(SCALE)[:, None, None])
    expected = -normal.log_prob(torch.from_numpy(images)).mean((1, 2, 3)) / math.log(2.0)
    torch.testing.assert_close(found.bpd, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="draws: expected 1 for real numbers"):
        dataset_bits(Gaussian(), config, dataset, batch_size=4, seed=0, draws=2)


def test_the_commands_of_a_run(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    out = tmp_path / "bits.json"
    assert main(["likelihood", str(folder), "--steps", "2", "--limit", "5", "--json", str(out)]) == 0
    text = capsys.readouterr()
    assert "5 images 4x8x8 with real numbers" in text.out and "dequantise" not in text.err
    assert json.loads(out.read_text())["levels"] is None
    assert main(["evaluate", str(folder), "--limit", "8", "--method", "midpoint", "--steps", "2", "--tolerance", "0.1"]) == 0
    assert "bits/dim: " in capsys.readouterr().out
    monkeypatch.setattr("fm_fast.cli.evaluate.require_torch_fidelity", lambda: None)
    assert "fid: expected none for a run of real numbers" in refused(capsys, "evaluate", folder, "--fid")
    assert "draws: expected 1 for real numbers" in refused(capsys, "likelihood", folder, "--draws", "2")


def test_data_of_the_other_kind_are_refused(run, tmp_path, capsys):
    folder, data = run
    np.savez(tmp_path / "grey.npz", images=np.zeros((4, 4, 8, 8), np.uint8), labels=np.zeros(4, int))
    text = refused(capsys, "likelihood", folder, "--data", tmp_path / "grey.npz")
    assert "data: expected real numbers, as the run was trained on" in text or "data_scale: expected none" in text
    config = tiny(data=str(tmp_path / "grey.npz"), out=str(tmp_path / "run"), steps=1, sample_steps=1, samples_per_class=1)
    train(config)
    text = refused(capsys, "likelihood", tmp_path / "run", "--data", data)
    assert "data: expected images of 256 grey levels, as the run was trained on, got real numbers in" in text


def test_the_distance_to_a_copy_is_nothing():
    values = torch.randn(100, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 50.0
    assert median_distance(values[:40], values) == 0.0
    near = values[:40] + F.pad(torch.full((40, 4, 8, 7), 0.01), (0, 1))
    assert median_distance(near, values) == pytest.approx(0.01 * math.sqrt(4 * 8 * 7), rel=1e-3)
