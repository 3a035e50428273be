"""Sample quality in the course of a run: its numbers against samples drawn by hand, its files, and that training does not notice."""

import json

import numpy as np
import pytest
import torch
from trainer_helpers import assert_same_state, tiny

import fm_fast as fm
from fm_fast.train import train
from fm_fast.train.data import digits
from fm_fast.train.evaluation import judge as judge_module
from fm_fast.train.evaluation.classifier import agreement
from fm_fast.train.evaluation.judge import MEASURED, judge_of
from fm_fast.train.reporting.curve import draw_curves, draw_quality

SETTINGS = {"steps": 4, "sample_steps": 2, "samples_per_class": 1, "evaluate": False, "sample_every": 0}


@pytest.fixture(autouse=True)
def few_and_fast(monkeypatch):
    monkeypatch.setattr(judge_module, "JUDGED", 30)
    monkeypatch.setattr(judge_module, "BATCH", 8)
    monkeypatch.setattr("fm_fast.train.evaluation.classifier.MOST_STEPS", 3)


def records(folder):
    return [json.loads(line) for line in (folder / "quality.jsonl").read_text().splitlines()]


def test_numbers_are_those_of_samples_drawn_by_hand(tmp_path):
    config = tiny(**SETTINGS, quality_every=3, out=str(tmp_path))
    result = train(config)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [3, 4] and all(set(record) == {"step", *MEASURED} for record in found)
    judge, labels = judge_of(config, digits()), digits("test").labels[:30]
    x0 = fm.noise((30, 1, 8, 8), seed=0, step=0, index=3)
    x = fm.sample(result.state.averaged(), x0, cond={"y": labels}, method="midpoint", steps=2).x
    images = ((x + 1) * 8.5).floor().clamp(0, 16).to(torch.uint8)
    assert found[-1]["agreement"] == agreement(judge.classifier, images, labels)
    assert found[-1]["real_agreement"] == agreement(judge.classifier, digits("test").images[:30], labels)
    assert found[-1]["frechet"] > 0 and found[-1]["novelty"] > 0 and 0 <= found[-1]["nearest_neighbour"] <= 1


def test_training_does_not_notice_and_a_resumed_run_measures_on(tmp_path):
    plain = train(tiny(**SETTINGS, out=str(tmp_path / "plain")))
    judged = {**SETTINGS, "quality_every": 1, "checkpoint_every": 2, "keep_checkpoints": 0, "out": str(tmp_path / "judged")}
    assert_same_state(plain.state, train(tiny(**judged)).state)
    before = records(tmp_path / "judged")
    (tmp_path / "judged" / "checkpoint-00000004.pt").unlink()
    assert_same_state(plain.state, train(tiny(**judged), resuming=True).state)
    assert records(tmp_path / "judged") == before and [record["step"] for record in before] == [1, 2, 3, 4]
    assert not (tmp_path / "plain" / "quality.jsonl").exists()
    train(tiny(**{**judged, "quality_every": 0}), overwriting=True)
    assert not (tmp_path / "judged" / "quality.jsonl").exists() and not (tmp_path / "judged" / "quality.png").exists()


def test_a_network_without_classes_has_no_agreement(tmp_path):
    train(tiny(**SETTINGS, quality_every=4, conditional=False, label_drop=0.0, out=str(tmp_path)))
    (record,) = records(tmp_path)
    assert record["agreement"] is None and record["frechet"] > 0


def test_too_few_images_are_told_before_the_work(tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.savez(tmp_path / "one.npz", images=numpy.zeros((1, 8, 8), numpy.uint8), labels=numpy.zeros(1, numpy.int64))
    with pytest.raises(ValueError, match="quality_every: expected at least 2 training and 2 held-out images, got 1 and 1"):
        train(tiny(**SETTINGS, quality_every=1, data=str(tmp_path / "one.npz"), out=str(tmp_path / "run")))


def test_the_picture_shows_samples_and_real_images(tmp_path):
    """Shares from 0 at the bottom, y = 450, to 1 at the top, y = 20; the level of real images is dashed in the same colour."""
    image = pytest.importorskip("PIL.Image")
    real = {"real_agreement": 0.9, "real_frechet": 0.1, "real_nearest_neighbour": 0.5}
    rows = [{"step": step, "agreement": 0.2, "frechet": 3.0, "nearest_neighbour": None, "novelty": 1.5, **real} for step in range(1, 21)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_quality(tmp_path / "q.jsonl", tmp_path / "q.png")
    with image.open(tmp_path / "q.png") as found:
        column = [found.getpixel((71, y)) for y in range(500)]
        middle = [found.getpixel((206, y)) for y in range(60, 450)]
    blue = (31, 119, 180)
    assert [y for y, pixel in enumerate(column) if pixel == blue] == [450 - round(0.9 * 430)]
    assert all(abs(60 + y - (450 - 0.2 * 430)) <= 1 for y, pixel in enumerate(middle) if pixel == blue) and blue in middle


def test_data_without_a_test_part(tmp_path):
    """The real images are then compared with themselves: a distance of 0, which a logarithmic scale does not reach."""
    images = digits().images[:60].numpy()
    np.savez(tmp_path / "set.npz", images=images, labels=digits().labels[:60].numpy())
    train(tiny(**SETTINGS, data=str(tmp_path / "set.npz"), quality_every=2, out=str(tmp_path / "run")))
    assert [record["real_frechet"] for record in records(tmp_path / "run")] == [pytest.approx(0.0, abs=1e-9)] * 2
    assert (tmp_path / "run" / "quality.png").is_file()


@pytest.mark.parametrize("setting", [{"quality_every": 1}, {"super_resolution": 2}], ids=str)
@pytest.mark.parametrize(
    ("test_images", "test_labels", "message"),
    [
        (np.zeros((9, 6, 6), np.uint8), np.zeros(9, np.int64), r"data: expected images of \(1, 8, 8\) for this network, got \(1, 6, 6\)"),
        (np.zeros((9, 8, 8), np.uint8), np.full(9, 12), "data: expected at most 3 classes for this network, got 13"),
    ],
)
def test_a_test_part_that_does_not_fit_is_told_before_the_first_step(setting, test_images, test_labels, message, tmp_path):
    images, labels = np.zeros((30, 8, 8), np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "set.npz", images=images, labels=labels, test_images=test_images, test_labels=test_labels)
    with pytest.raises(ValueError, match=message):
        train(tiny(**SETTINGS, **setting, data=str(tmp_path / "set.npz"), out=str(tmp_path / "run")))
    assert not list((tmp_path / "run").glob("log.jsonl"))


def test_a_curve_of_one_point_is_a_dot_at_its_step(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 7, "loss": 0.7}) + "\n")
    draw_curves(tmp_path / "log.jsonl", tmp_path / "loss.png")
    pixels = np.array(image.open(tmp_path / "loss.png"))
    right = pixels.shape[1] - 20
    assert (pixels[100:400, right - 3 : right - 1].sum(2) == 0).any(), "black, at the last step"
