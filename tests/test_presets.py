"""Presets against the paper's Table 3, and runs of every kind by the command line: without labels, with held-out images, by name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fm_fast.cli import main, parser
from fm_fast.cli.train import config_from
from fm_fast.nn.presets import PRESETS as NETWORKS
from fm_fast.paths import OT
from fm_fast.train.config import Recipe
from fm_fast.train.data import digits
from fm_fast.train.evaluation.evaluate import draw_samples
from fm_fast.train.presets import PRESETS, SUMMARIES
from fm_fast.train.storage.weights import load_model

# Lipman et al. 2023, appendix E: batch, iterations, learning rate, warm-up steps, schedule.
TABLE_3 = {
    "cifar10-paper": (256, 391_000, 5e-4, 45_000, "linear"),
    "imagenet32-paper": (1024, 250_000, 1e-4, 20_000, "linear"),
    "imagenet64-paper": (2048, 157_000, 1e-4, 0, "constant"),
    "imagenet128-paper": (1536, 500_000, 1e-4, 20_000, "linear"),
}
SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "2", "--samples-per-class", "2"]
SHORT = ["--steps", "2", "--batch-size", "8", "--log-every", "1", "--no-evaluate", *SMALL]


@pytest.mark.parametrize("name", list(TABLE_3))
def test_presets_of_the_paper(name):
    preset = PRESETS[name]
    found = (preset.batch_size, preset.steps, preset.learning_rate, preset.warmup, preset.schedule)
    assert found == TABLE_3[name] and (preset.beta1, preset.beta2, preset.weight_decay, preset.clip) == (0.9, 0.999, 0.0, 0.0)
    assert preset.ema_decay == 0.0 and preset.recipe == Recipe(OT(), "velocity", t_sampler="uniform")  # the paper names no average
    assert preset.model == NETWORKS[name] and preset.objective == "fm-ot" and preset.dequantise and not preset.conditional
    assert preset.precision == ("float32" if preset.model.image_size == 32 else "bfloat16")


def test_every_preset_has_a_name_a_summary_and_a_folder_of_its_own(capsys):
    assert len({preset.out for preset in PRESETS.values()}) == len(PRESETS)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name:20} {summary}" in shown for name, summary in SUMMARIES.items())
    for name in PRESETS:
        assert config_from(parser().parse_args(["train", name, "--data", "place"])).data == "place"


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"digits", "fashion"}))
def test_presets_without_data_ask_for_them(name, capsys):
    assert main(["train", name]) == 1
    assert f"data: expected --data PATH with preset {name}" in capsys.readouterr().err


def test_a_network_without_labels(tmp_path, capsys, one_thread):
    run, samples = tmp_path / "run", tmp_path / "samples.npz"
    assert main(["train", "digits", "--no-conditional", "--dequantise", "--out", str(run), *SHORT]) == 0
    model, config = load_model(run)
    assert config.model.classes == 0 and not any("label" in name for name, _ in model.named_parameters())
    assert main(["sample", str(run), "--count", "3", "--out", str(samples)]) == 0
    assert np.load(samples)["images"].shape == (3, 1, 8, 8) and np.load(samples)["labels"].tolist() == [-1] * 3
    assert main(["sample", str(run), "--classes", "1", "--out", str(samples)]) == 1
    assert "classes: expected " in capsys.readouterr().err
    few = replace(digits("test"), images=digits().images[:2], labels=digits().labels[:2])
    drawn = draw_samples(model, config, few, 0, 2, method="euler", steps=2)
    assert drawn.images.shape == (2, 1, 8, 8) and drawn.labels.tolist() == [-1, -1]
    assert main(["likelihood", str(run), "--limit", "2", "--steps", "2", "--json", str(tmp_path / "bits.json")]) == 0
    assert json.loads((tmp_path / "bits.json").read_text())["images"] == 2


def test_data_are_prepared_alike_for_training_and_likelihood(tmp_path, one_thread):
    data = digits()
    np.savez(tmp_path / "set.npz", images=data.images[:40].numpy() * 15, labels=data.labels[:40].numpy())
    arguments = ["--data", str(tmp_path / "set.npz"), "--pool", "2", "--pad", "2", "--test-share", "0.1", "--dequantise"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), *SHORT]) == 0
    assert main(["likelihood", str(tmp_path / "run"), "--steps", "2", "--json", str(tmp_path / "bits.json")]) == 0
    assert json.loads((tmp_path / "bits.json").read_text())["images"] == 4
