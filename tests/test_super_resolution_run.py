"""Super-resolution by the command: what the network is told in training, and a run that is trained, drawn from and judged."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainer_helpers import CPU, TINY_NET, advance, assert_same_state, decode_png, tiny

import fm_fast as fm
from fm_fast.cli import main
from fm_fast.train.condition import reduced
from fm_fast.train.config import fit_to_data
from fm_fast.train.data import DataOrder, digits
from fm_fast.train.evaluation.restoration import signal_to_noise, similarity
from fm_fast.train.evaluation.sample import sample, sample_enlarged, to_integers
from fm_fast.train.loop import train
from fm_fast.train.reporting.picture import write_png
from fm_fast.train.step import Batch, new_state, sample_losses
from fm_fast.train.storage.weights import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "2", "--samples-per-class", "2"]


def config_of(**changes):
    return fit_to_data(tiny(super_resolution=2, **changes), (1, 8, 8), 10)


def test_reduced_images_are_means_in_the_scale_of_the_data():
    images = torch.randint(0, 17, (3, 2, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    means = images.numpy().astype(np.float64).reshape(3, 2, 4, 2, 3, 2).mean((3, 5))
    np.testing.assert_allclose(reduced(images, 17, 2).numpy(), 2.0 * (means + 0.5) / 17 - 1.0, rtol=1e-6, atol=1e-6)
    assert torch.equal(to_integers(reduced(images, 17, 1), 17), images)


def heard(config, batch):
    """What the network is told."""
    seen = {}

    def spy(x, t, **condition):
        seen.update(condition)
        return torch.zeros_like(x)

    sample_losses(new_state(config, CPU), config, batch, spy)
    return seen


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_the_condition_is_the_reduced_image_of_the_data_as_they_are_mirrored(flip):
    """Op path_sample mirrors inside its kernel: at t = 1 it gives the data, whose means the network must have been told."""
    config, data = config_of(flip=flip), digits()
    batch = Batch(data.images[:32], data.labels[:32], data.levels, 3, first_id=5)
    told = heard(config, batch)
    x1 = fm.sample_path(batch.images, t=1.0, flip=flip, levels=17, seed=config.seed, step=3, sample_ids=5).x_t
    torch.testing.assert_close(told["low_resolution"], F.avg_pool2d(x1, 2), rtol=1e-5, atol=1e-5)
    mirrored = (told["low_resolution"] != reduced(batch.images, 17, 2)).flatten(1).any(1)
    assert bool(mirrored.any()) == (flip > 0.0) and bool(mirrored.all()) == (flip == 1.0)


def test_a_run_without_the_task_is_told_of_labels_alone():
    data = digits()
    assert set(heard(fit_to_data(tiny(), (1, 8, 8), 10), Batch(data.images[:8], data.labels[:8], 17, 0))) == {"y"}


def test_a_run_that_was_interrupted_goes_on_bit_for_bit():
    config, data = config_of(flip=0.5, micro_batch=4), digits()
    whole, first, rest = (new_state(config, CPU) for _ in range(3))
    advance(whole, config, data, 6)
    advance(first, config, data, 3)
    rest.load_state_dict(first.state_dict())
    advance(rest, config, data, 3)
    assert_same_state(whole, rest)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(0, "super_resolution: expected at least 1, got 0"), (3, "super_resolution: expected a divisor of the images' size, 8x8, got 3")],
)
def test_wrong_factors(factor, message):
    with pytest.raises(ValueError, match=message):
        fit_to_data(tiny(super_resolution=factor), (1, 8, 8), 10)


def test_the_ratio_is_that_of_its_definition():
    one = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    images = torch.cat([one + 10, one])
    by_hand = [10.0 * math.log10(255**2 / 100.0)] * 2 + [20.0 * math.log10(255 / 0.5)] * 2
    assert signal_to_noise(images, torch.cat([one, one]), 256).tolist() == pytest.approx(by_hand)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("super-resolution")
    words = ["--super-resolution", "2", "--steps", "8", "--batch-size", "16", "--dequantise", "--log-every", "4", *SMALL]
    assert main(["train", "digits", *words, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_picture_shows_what_the_network_sees_its_samples_and_the_original(run):
    width, height, _, rows = decode_png((run / "samples.png").read_bytes())
    side, gap = 96, 6
    assert (width, height) == (4 * (side + gap) + gap, 10 * (side + gap) + gap)
    held_out = digits("test").images
    first = [row[gap : gap + side] for row in rows[gap : gap + side]]
    last = [row[gap + 3 * (side + gap) :][:side] for row in rows[gap : gap + side]]
    assert [row[:: side // 8] for row in last[:: side // 8]] == (held_out[0, 0].float() * 255 / 16).round().int().tolist()
    coarse = to_integers(reduced(held_out[:1], 17, 2), 17)[0, 0].float() * 255 / 16
    assert [row[:: side // 4] for row in first[:: side // 4]] == coarse.round().int().tolist()


def test_the_run_can_be_drawn_from(run, tmp_path, capsys):
    archive, picture = tmp_path / "enlarged.npz", tmp_path / "enlarged.png"
    assert main(["sample", str(run), "--count", "3", "--steps", "2", "--out", str(archive), "--batch-size", "2"]) == 0
    found, held_out = np.load(archive), digits("test")
    assert found["images"].shape == (3, 1, 8, 8) and found["labels"].tolist() == held_out.labels[:3].tolist()
    model, config = load_model(run)
    assert config.super_resolution == 2 and config.model.low_resolution_channels == 1
    few = replace(held_out, images=held_out.images[:3], labels=held_out.labels[:3])
    again = sample_enlarged(model, config, few, 0, 3, steps=2, method="midpoint", guidance=config.guidance)
    assert torch.equal(torch.from_numpy(found["images"]), again)
    assert main(["sample", str(run), "--count", "2", "--classes", "none", "--data", "digits:train", "--out", str(picture)]) == 0
    assert decode_png(picture.read_bytes())[0] == 3 * 102 + 6
    assert main(["sample", str(run), "--classes", "3", "--out", str(picture)]) == 1
    assert "classes: expected all or none, because an image brings its own, got 3" in capsys.readouterr().err


def test_the_run_can_be_judged(run, tmp_path, capsys):
    assert main(["likelihood", str(run), "--limit", "4", "--steps", "2", "--json", str(tmp_path / "bits.json")]) == 0
    assert json.loads((tmp_path / "bits.json").read_text())["images"] == 4
    arguments = ["--limit", "20", "--tolerance", "0.1", "--json", str(tmp_path / "quality.json")]
    assert main(["evaluate", str(run), *arguments]) == 0
    record, text = json.loads((tmp_path / "quality.json").read_text()), capsys.readouterr().out
    held_out = digits("test").images[:20]
    interpolated = to_integers(F.interpolate(reduced(held_out, 17, 2), size=(8, 8), mode="bicubic"), 17)
    expected = {
        "psnr": float(signal_to_noise(interpolated, held_out, 17).mean()),
        "ssim": float(similarity(interpolated, held_out, 17).mean()),
    }
    found = record["restoration"]
    assert record["samples"] == 20 and found["bicubic"] == pytest.approx(expected) and found["window"] == 7
    assert 0.0 < found["samples"]["psnr"] < found["bicubic"]["psnr"] and found["samples"]["ssim"] < found["bicubic"]["ssim"]
    for name, unit, digit in (("psnr", " dB", 2), ("ssim", "", 3)):
        values = [f"{found[kind][name]:.{digit}f}{unit}" for kind in ("samples", "bicubic")]
        assert f"{name.upper()}: {values[0]} (bicubic interpolation: {values[1]}" in text
    assert "windows of 7x7 pixels, because 11x11 do not fit the images" in text


def small_digits(count):
    """uint8 [N, 1, 4, 4], as somebody without the originals has them, and their labels."""
    held_out = digits("test")
    return F.avg_pool2d(held_out.images[:count].float(), 2).round().to(torch.uint8), held_out.labels[:count]


def test_images_of_the_reduced_size_are_what_the_network_is_told(run, tmp_path):
    small, labels = small_digits(3)
    np.savez(tmp_path / "small.npz", images=small.numpy(), labels=labels.numpy())
    words = ["sample", str(run), "--data", str(tmp_path / "small.npz"), "--steps", "2", "--out"]
    assert main([*words, str(tmp_path / "large.npz"), "--images", str(tmp_path / "each")]) == 0
    found = np.load(tmp_path / "large.npz")
    model, config = load_model(run)
    x0, told = fm.noise((3, 1, 8, 8), seed=0, step=0, index=1), 2 * (small.float() + 0.5) / 17 - 1
    by_hand = sample(model, x0, labels, config.recipe, 2, guidance=config.guidance, low_resolution=told)
    assert torch.equal(torch.from_numpy(found["images"]), to_integers(by_hand, 17)) and found["labels"].tolist() == labels.tolist()
    assert len(list((tmp_path / "each").glob("*.png"))) == 3
    assert main([*words, str(tmp_path / "large.png")]) == 0
    width, height, _, rows = decode_png((tmp_path / "large.png").read_bytes())
    assert (width, height) == (2 * 102 + 6, 3 * 102 + 6), "what was given and the sample: there is no original"
    first = [row[6 : 6 + 96 : 24] for row in rows[6 : 6 + 96 : 24]]
    assert first == (small[0, 0].float() * 255 / 16).round().int().tolist()


def test_images_of_the_reduced_size_need_no_labels(run, tmp_path, capsys):
    np.savez(tmp_path / "small.npz", images=small_digits(2)[0].numpy())
    words = ["sample", str(run), "--data", str(tmp_path / "small.npz"), "--out", str(tmp_path / "large.npz")]
    assert main(words) == 1
    assert "small.npz: expected labels beside images; --no-conditional" in capsys.readouterr().err
    assert main([*words, "--classes", "none"]) == 0
    assert np.load(tmp_path / "large.npz")["labels"].tolist() == [-1, -1]


def test_images_of_the_reduced_size_are_neither_resized_nor_held_out(tmp_path):
    """What the run does to photographs before it reduces them is not done to images that are small already."""
    write_folder(tmp_path / "large", side=12, count=10)
    small = write_folder(tmp_path / "small", side=4, count=3)
    words = ["train", "images", "--data", str(tmp_path / "large"), "--resize", "8", "--test-share", "0.2", "--super-resolution", "2"]
    words += ["--steps", "1", "--batch-size", "4", "--no-conditional", "--no-evaluate", "--out", str(tmp_path / "run"), *SMALL]
    assert main([*words, "--model.multipliers", "1,2", "--model.attention-sizes", "4", "--model.blocks", "1"]) == 0
    model, config = load_model(tmp_path / "run")
    words = ["sample", str(tmp_path / "run"), "--steps", "2", "--out", str(tmp_path / "x.npz"), "--data"]
    assert main([*words, str(tmp_path / "small")]) == 0
    x0, told = fm.noise((3, 3, 8, 8), seed=0, step=0, index=1), 2 * (small.float() + 0.5) / 256 - 1
    by_hand = to_integers(sample(model, x0, None, config.recipe, 2, low_resolution=told), 256)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "x.npz")["images"]), by_hand)
    assert main([*words, str(tmp_path / "large")]) == 0
    assert len(np.load(tmp_path / "x.npz")["images"]) == 2, "the run's own data: the held-out ones"


def write_folder(folder, side, count):
    """PNG files, and their pixels uint8 [N, 3, H, W]."""
    folder.mkdir()
    images = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)
    for number, image in enumerate(images):
        write_png(folder / f"{number}.png", image)
    return images


def test_images_that_do_not_fit_the_network(run, tmp_path, capsys):
    sizes = "data: expected images of (1, 8, 8) for this network, or of (1, 4, 4) to enlarge as they are, got"
    for shape, value, label, message in [
        ((4, 1, 6, 6), 0, 0, f"{sizes} (1, 6, 6)"),
        ((4, 3, 8, 8), 0, 0, f"{sizes} (3, 8, 8)"),
        ((4, 3, 4, 4), 0, 0, f"{sizes} (3, 4, 4)"),
        ((4, 1, 8, 8), 0, 12, "data: expected at most 10 classes for this network, got 13"),
        ((4, 1, 4, 4), 0, 12, "data: expected at most 10 classes for this network, got 13"),
        ((4, 1, 4, 4), 17, 0, "data: expected values below 17, the grey levels that the run was trained on, got 17"),
    ]:
        np.savez(tmp_path / "set.npz", images=np.full(shape, value, np.uint8), labels=np.full(4, label))
        assert main(["sample", str(run), "--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "x.png")]) == 1
        assert message in capsys.readouterr().err


def test_training_images_are_not_called_held_out(tmp_path, capsys):
    np.savez(tmp_path / "set.npz", images=np.zeros((12, 1, 8, 8), np.uint8), labels=np.arange(12) % 10)
    words = ["train", "digits", "--data", str(tmp_path / "set.npz"), "--super-resolution", "2", "--steps", "1", "--batch-size", "4", *SMALL]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "warning: set.npz has no test part: held-out images are training images; test_share holds some out" in shown
    assert "enlarged training images: " in shown and "enlarged held-out" not in shown
    assert main(["sample", str(tmp_path / "a"), "--count", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert "warning: the held-out images are training images" in capsys.readouterr().err
    assert main([*words, "--test-share", "0.4", "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "enlarged held-out images: " in shown and "no test part" not in shown
    assert main(["sample", str(tmp_path / "b"), "--count", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_of_another_task_takes_no_images(tmp_path, capsys):
    words = ["--steps", "1", "--batch-size", "8", "--no-evaluate", *SMALL]
    assert main(["train", "digits", *words, "--out", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--data", "digits:test", "--out", str(tmp_path / "x.png")]) == 1
    assert "is no super-resolution run, got digits:test" in capsys.readouterr().err


def test_a_run_is_resumed_with_the_same_factor_alone(run, capsys):
    assert main(["train", "digits", "--resume", "--super-resolution", "4", "--out", str(run), "--steps", "9", *SMALL]) == 1
    assert "super_resolution: 2 -> 4" in capsys.readouterr().err


@pytest.mark.slow
def test_it_learns_to_enlarge(tmp_path):
    """Samples are of the images that were asked for: their reduced images are the given ones, which a network without them cannot know."""
    config = tiny(super_resolution=2, steps=400, batch_size=64, out=str(tmp_path), warmup=20, sample_every=0, checkpoint_every=0)
    config = replace(config, learning_rate=3e-3, guidance=1.0, model=replace(TINY_NET, channels=16))
    result = train(config)
    held_out = digits("test")
    few = replace(held_out, images=held_out.images[:50], labels=held_out.labels[:50])
    drawn = sample_enlarged(result.state.average, result.config, few, 0, 50, steps=20)
    low = reduced(few.images, 17, 2)
    assert float((reduced(drawn, 17, 2) - low).square().mean()) < 0.1 * float(low.var())
    assert result.quality.samples > 10.0


def test_the_order_of_the_data_is_that_of_every_run():
    """The task changes what the network is told, and nothing else."""
    config, data = config_of(), digits()
    plain = fit_to_data(tiny(), (1, 8, 8), 10)
    rows = DataOrder(len(data), config.seed).indices(0, 16)
    batch = Batch(*data.batch(rows), data.levels, 0)
    assert torch.equal(heard(config, batch)["y"], heard(plain, batch)["y"])
