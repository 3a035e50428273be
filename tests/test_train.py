"""The trainer: a step against closed forms and independent formulas, settings, log, report, and quality after 500 steps."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from trainer_helpers import CPU, advance, assert_same_state, decode_png, tiny

from fm_fast import objectives
from fm_fast.nn import Preconditioned
from fm_fast.train import train
from fm_fast.train.condition import drop_labels
from fm_fast.train.config import RECIPES, fit_to_data, from_dict, to_dict
from fm_fast.train.data import digits
from fm_fast.train.evaluation.evaluate import agreement, evaluate, median_distance, train_classifier
from fm_fast.train.execution.devices import autotuning, pick_device
from fm_fast.train.execution.distributed import Team
from fm_fast.train.presets import PRESETS
from fm_fast.train.reporting.log import Logger
from fm_fast.train.step import Batch, build_model, new_state, sample_losses
from fm_fast.train.storage.run_folder import RunFolder
from fm_fast.train.times import importance_times

# One step


def test_label_drop_has_the_right_rate_and_is_independent_of_the_batch_split():
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, 0.1, seed=5, step=7)
    kept = dropped >= 0
    assert torch.equal(dropped[kept], labels[kept]) and set(dropped[~kept].tolist()) == {-1}
    assert abs(int((~kept).sum()) - 2000) < 4 * math.sqrt(20_000 * 0.1 * 0.9)
    parts = [drop_labels(labels[first : first + 5000], 0.1, 5, 7, first) for first in range(0, 20_000, 5000)]
    assert torch.equal(torch.cat(parts), dropped)
    assert not torch.equal(drop_labels(labels, 0.1, seed=5, step=8), dropped)
    assert torch.equal(drop_labels(labels, 0.0, 5, 7), labels) and (drop_labels(labels, 1.0, 5, 7) == -1).mean(dtype=torch.float32) > 0.999


@pytest.mark.parametrize("objective", ["fm-ot", "scoreflow"])
def test_losses_are_those_of_the_parts_of_the_batch(objective):
    config, data = tiny(label_drop=0.3, objective=objective), digits()
    state = new_state(config, CPU)
    advance(state, config, data, 2)
    batch = Batch(data.images[:16], data.labels[:16], data.levels, state.step)
    whole, t = sample_losses(state, config, batch)
    parts = [sample_losses(state, config, part) for part, _ in batch.parts(4)]
    torch.testing.assert_close(torch.cat([losses for losses, _ in parts]), whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.cat([times for _, times in parts]), t)


def test_a_run_ignores_the_state_of_torchs_generator():
    config, states = tiny(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(new_state(config, CPU))
        before = torch.get_rng_state()
        advance(states[-1], config, digits(), 3)
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(*states)


def test_first_loss_is_the_second_moment_of_the_target():
    # The network starts at zero, so the loss is the mean of (x1 - x0)^2 = 1 + E[x1^2].
    config, data = tiny(batch_size=1500), digits()
    (loss,) = advance(new_state(config, CPU), config, data, 1)
    second_moment = ((2 * (data.images.double() + 0.5) / 17 - 1) ** 2).mean()
    assert float(loss) == pytest.approx(1 + float(second_moment), rel=0.02)


@pytest.mark.parametrize("objective", list(RECIPES))
def test_loss_falls_for_every_objective(objective):
    # Close to the data the noise cannot be predicted, and ScoreFlow's weight dwells there: its loss has a high floor.
    steps, rate, floor = (60, 4e-3, 0.95) if objective == "scoreflow" else (30, 8e-3, 0.85)
    config = tiny(objective=objective, steps=steps, batch_size=32, learning_rate=rate)
    losses = torch.stack(advance(new_state(config, CPU), config, digits(), steps))
    assert torch.isfinite(losses).all()
    assert losses[-steps // 3 :].mean() < floor * losses[:5].mean()


def test_recipes_are_the_rows_of_table_1_and_three_more():
    rows = {name: (type(recipe.path).__name__, recipe.objective) for name, recipe in RECIPES.items()}
    assert rows["fm-ot"] == ("OT", "velocity") and rows["fm-vp"] == ("VP", "velocity") and rows["ddpm"] == ("VP", "noise")
    assert rows["score"] == ("VP", "score") and rows["scoreflow"] == ("VP", "scoreflow")
    assert rows["fm-cosine"] == ("Cosine", "velocity") and rows["fm-ve"] == ("VE", "velocity") and rows["data-ot"] == ("OT", "data")
    assert len(rows) == 8
    for name, recipe in RECIPES.items():
        assert isinstance(build_model(tiny(objective=name)), Preconditioned) == recipe.preconditioned


def test_importance_times_have_the_density_of_the_weight():
    recipe = RECIPES["scoreflow"]
    path, (t, factor) = recipe.path, importance_times(recipe, 4096, seed=0, step=3, first_id=0, device=CPU)
    weight = objectives.loss_coefficients(path, objectives.as_objective("scoreflow"), t)[:, 5]
    torch.testing.assert_close(weight * factor, (weight * factor).mean().expand(4096), rtol=0.01, atol=0)
    # Any integral over uniform times is kept: of 1 (the factor alone), and of w t (1 - t) by the trapezium rule.
    assert float(factor.mean()) == pytest.approx(1.0, rel=0.01)
    grid = torch.linspace(path.t_min, path.t_max, 200_001, dtype=torch.float64)
    on_grid = objectives.loss_coefficients(path, objectives.as_objective("scoreflow"), grid)[:, 5] * grid * (1 - grid)
    assert float((factor * weight * t * (1 - t)).mean()) == pytest.approx(float(torch.trapezoid(on_grid, grid)), rel=0.01)


def test_importance_times_are_independent_of_the_batch_split():
    whole = importance_times(RECIPES["scoreflow"], 12, 1, 2, 0, CPU)[0]
    parts = [importance_times(RECIPES["scoreflow"], 4, 1, 2, first, CPU)[0] for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(importance_times(RECIPES["scoreflow"], 12, 1, 3, 0, CPU)[0], whole)


# Configuration


def test_configuration_survives_storage():
    for preset in PRESETS.values():
        assert from_dict(to_dict(preset)) == preset
        assert from_dict(json.loads(json.dumps(to_dict(preset)))) == preset
    with pytest.raises(TypeError, match="colour"):
        from_dict({**to_dict(tiny()), "colour": "red"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "fm"}, "objective: expected one of fm-ot, fm-vp, ddpm, score, scoreflow, fm-cosine, fm-ve, data-ot, got 'fm'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"clip": -1.0}, "clip: expected 0 or more"),
        ({"label_drop": 1.5}, r"label_drop: expected a share in \[0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\)"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"sample_method": "heun"}, "sample_method: expected one of euler, midpoint"),
        ({"seed": 2**63}, r"seed: expected less than 2\^63, got 9223372036854775808"),
        ({"guidance": math.nan}, "guidance: expected a finite number, got nan"),
        ({"learning_rate": math.inf}, "learning_rate: expected a finite number, got inf"),
        ({"memory_limit": math.nan}, "memory_limit: expected a finite number, got nan"),
        ({"ema_widths": (0.1, math.inf)}, "ema_widths: expected finite numbers"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size: expected a whole number, got True"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
        ({"flip": False}, "flip: expected a number, got False"),
        ({"compile": 1}, "compile: expected True or False, got 1"),
        ({"out": None}, "out: expected text, got None"),
        ({"ema_widths": {0.1}}, r"ema_widths: expected a tuple of numbers, got {0.1}"),
        ({"model": {}}, "model: expected a UNetConfig, got {}"),
    ],
)
def test_settings_of_other_types(change, message):
    with pytest.raises(TypeError, match=message):
        tiny(**change)


def test_settings_that_a_checkpoint_could_not_hold(tmp_path):
    """Reading one runs no code, which numpy's numbers and paths would need."""
    numpy = pytest.importorskip("numpy")
    for change in ({"learning_rate": numpy.float64(0.1)}, {"steps": numpy.int64(3)}, {"out": tmp_path}):
        with pytest.raises(TypeError, match=f"{next(iter(change))}: expected"):
            tiny(**change)


def test_whole_numbers_where_any_are_expected_and_no_limit():
    config = tiny(learning_rate=1, ema_widths=(), clip=math.inf, memory_limit=math.inf)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(("size", "levels"), [(8, 4), (12, 3), (7, 1)])
def test_a_network_halves_its_images(size, levels):
    fitting = tiny(model=replace(tiny().model, multipliers=(1,) * levels))
    assert fit_to_data(fitting, (1, size, size), 10).model.image_size == size
    deeper = tiny(model=replace(tiny().model, multipliers=(1,) * (levels + 1)))
    with pytest.raises(ValueError, match=rf"model\.multipliers: expected at most {levels} levels, .*{size}x{size} .* got \(1, 1"):
        fit_to_data(deeper, (1, size, size), 10)


def test_devices():
    assert pick_device("cpu") == CPU
    for name in ("abacus", "meta", "mps", "cpu:0", "CPU", "cuda:-1", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"device: expected auto, cpu, cuda or cuda:N, got '{name}'"):
            pick_device(name)
    if not torch.cuda.is_available():
        assert pick_device("auto") == CPU
        for name in ("cuda", "cuda:1"):
            with pytest.raises(ValueError, match=f"device: '{name}' was asked for, but torch finds no CUDA device"):
                pick_device(name)


def test_devices_by_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(name) for name in ("auto", "cuda", "cuda:1")] == [torch.device(name) for name in ("cuda", "cuda", "cuda:1")]
    with pytest.raises(ValueError, match="device: expected cuda:N with N at most 1, got 'cuda:2'"):
        pick_device("cuda:2")


def test_cudnn_times_its_convolutions_where_asked_for_and_no_longer():
    before, seen = torch.backends.cudnn.benchmark, []
    for wanted in (True, False):
        with pytest.raises(ZeroDivisionError), autotuning(wanted):
            seen.append(torch.backends.cudnn.benchmark)
            raise ZeroDivisionError
    assert seen == [True, False] and torch.backends.cudnn.benchmark == before


# Log and report


def test_log_reports_means_and_stops_at_a_loss_that_is_not_finite(tmp_path, capsys):
    config = tiny(log_every=2, steps=5)
    logger = Logger(RunFolder(tmp_path), config, 0, Team(CPU))
    for step, loss in enumerate([1.0, 3.0, 5.0, 7.0, 9.0], start=1):
        logger.step(step, torch.tensor(loss), rate=0.1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(2, 2.0), (4, 6.0), (5, 9.0)]
    assert "step 4/5  loss 6.0000" in capsys.readouterr().out
    logger.step(2, torch.tensor(1.0), rate=0.1)
    with pytest.raises(FloatingPointError, match="the loss is nan at or before step 4"):
        logger.step(4, torch.tensor(float("nan")), rate=0.1)


def test_log_leaves_out_losses_that_are_not_finite_and_shows_quartiles(tmp_path):
    logger = Logger(RunFolder(tmp_path), tiny(log_every=3, steps=6), 0, Team(CPU))
    nothing, two = torch.zeros(2, 4), torch.tensor([[1.0, 0.0, 4.0, 8.0], [2.0, 0.0, 1.0, 4.0]])
    for step, loss, quartiles in ((1, 1.0, two), (2, math.nan, nothing), (3, 2.0, two)):
        logger.step(step, torch.tensor(loss), 0.1, quartiles)
    (record,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (record["loss"], record["not_finite"]) == (1.5, 1) and record["loss_by_quartile"] == [0.5, None, 4.0, 2.0]


def test_log_shows_a_bar_to_a_terminal(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    logger = Logger(RunFolder(tmp_path), tiny(log_every=1, steps=2), 0, Team(CPU))
    logger.step(1, torch.tensor(0.5), rate=0.1)
    logger.say("a line")
    logger.close()
    shown = capsys.readouterr().out
    assert "1/2" in shown and "loss 0.5000" in shown and "a line" in shown


def test_judges_know_real_digits_and_copies():
    training, held_out = digits("train"), digits("test")
    before = torch.get_rng_state()
    classifier = train_classifier(training)
    assert torch.equal(torch.get_rng_state(), before)
    assert agreement(classifier, held_out.images, held_out.labels) >= 0.97
    assert median_distance(training.images[:50], training.images) == 0.0
    assert 10 < median_distance(held_out.images, training.images) < 30


def test_whole_run_writes_its_files_and_reports(tmp_path, capsys):
    result = train(tiny(steps=3, out=str(tmp_path / "run"), sample_steps=2, samples_per_class=2, log_every=1))
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "checkpoint-00000003.pt",
        "weights.safetensors",
        "samples.png",
        "log.jsonl",
        "loss.png",
    }
    width, height, pixel, _ = decode_png((tmp_path / "run" / "samples.png").read_bytes())
    assert (width, height, pixel) == (2 * 102 + 6, 10 * 102 + 6, 1)
    assert result.quality is not None and result.state.step == 3
    assert "held-out real images" in capsys.readouterr().out


# Quality after 500 steps: minutes each


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(RECIPES))
def test_quality_after_500_steps(objective):
    config = replace(PRESETS["digits"], objective=objective)
    state, data = new_state(config, CPU), digits()
    losses = torch.stack(advance(state, config, data, config.steps))
    quality = evaluate(state.average, config.recipe, data, digits("test"), config.seed, config.guidance, config.sample_steps)
    print(f"\n{objective}: loss {losses[-50:].mean():.4f}\n{quality}")
    assert torch.isfinite(losses).all() and math.isfinite(quality.novelty)
    assert quality.accuracy >= 0.97
    assert quality.unguided >= (0.95 if objective == "fm-ot" else 0.85)
    assert quality.guided >= (0.95 if objective == "fm-ot" else 0.85)
    assert quality.novelty >= 0.8
