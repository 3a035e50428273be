"""The trainer's sampler against exact networks, and its pictures against an independent decoder."""

import pytest
import torch
from trainer_helpers import CPU, decode_png, tiny

import fm_fast as fm
from fm_fast.solvers import METHODS
from fm_fast.train.config import RECIPES, Recipe
from fm_fast.train.evaluation.sample import sample, sample_classes, starting_noise, to_integers
from fm_fast.train.reporting.picture import image_grid, to_8_bit, write_png
from fm_fast.train.step import build_model

DATA_SD = 0.5
EXACT = {
    "velocity": lambda a, s, da, ds, v: (a * da * DATA_SD**2 + s * ds) / v,
    "noise": lambda a, s, da, ds, v: s / v,
    "score": lambda a, s, da, ds, v: -1 / v,
    "scoreflow": lambda a, s, da, ds, v: -1 / v,
    "data": lambda a, s, da, ds, v: a * DATA_SD**2 / v,
}


def exact_model(recipe):
    """The optimal network for data N(0, DATA_SD^2): its output is a known multiple of x."""

    def model(x, t, y=None):
        time = t.double().clamp(recipe.path.t_min, recipe.path.t_max)
        schedule = [getattr(recipe.path, name)(time) for name in ("alpha", "sigma", "d_alpha", "d_sigma")]
        factor = EXACT[recipe.objective](*schedule, schedule[0] ** 2 * DATA_SD**2 + schedule[1] ** 2)
        return factor.reshape(-1, 1, 1, 1).to(x.dtype) * x

    return model


@pytest.mark.parametrize("recipe", [*RECIPES.values(), Recipe(fm.OT(), "noise"), Recipe(fm.Cosine(), "data"), Recipe(fm.VE(), "score")])
def test_exact_network_carries_noise_to_data(recipe):
    x0 = starting_noise((2, 1, 4, 4), recipe, seed=0, index=1, device=CPU)
    x1 = sample(exact_model(recipe), x0, torch.zeros(2, dtype=torch.int64), recipe, steps=400)
    scale = x0.std() if recipe.path.prior_scale != 1.0 else torch.tensor(1.0)
    expected = DATA_SD * x0 / (x0 / x0 * recipe.path.prior_scale)
    torch.testing.assert_close(x1, expected, rtol=0.03, atol=1e-3 * float(scale))


def test_orders_of_the_solvers():
    recipe = RECIPES["fm-ot"]
    x0, labels = fm.noise((1, 1, 4, 4), seed=0, step=0), torch.zeros(1, dtype=torch.int64)
    exact = DATA_SD * x0

    def error(method, steps):
        return float((sample(exact_model(recipe), x0, labels, recipe, steps, method) - exact).abs().max())

    assert 1.8 < error("euler", 40) / error("euler", 80) < 2.2
    assert error("midpoint", 20) / error("midpoint", 40) > 3.4, "at least second order"


def by_hand(model, x, labels, steps, method, guidance):
    """Euler or midpoint steps on a uniform grid, guided by two separate calls."""

    def velocity(x, t):
        times = torch.full((len(x),), t)
        one, other = model(x, times, y=labels), model(x, times, y=torch.full_like(labels, -1))
        return other + guidance * (one - other)

    for step in range(steps):
        t, h = step / steps, 1 / steps
        slope = velocity(x, t)
        if method == "midpoint":
            slope = velocity(x + 0.5 * h * slope, t + 0.5 * h)
        x = x + h * slope
    return x


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("guidance", [1.0, 2.0, 0.0])
def test_pictures_are_those_of_a_loop_by_hand(method, guidance):
    network, labels = build_model(tiny()).eval(), torch.tensor([3, 0, 7])
    with torch.no_grad():
        for weight in network.parameters():  # the last layer starts at zero
            weight.add_(torch.sin(torch.arange(weight.numel(), dtype=torch.float32)).reshape(weight.shape), alpha=0.1)
        x0 = starting_noise((3, 1, 8, 8), RECIPES["fm-ot"], seed=5, index=1, device=CPU)
        expected = by_hand(network, x0, labels, 4, method, guidance)
    assert float((expected - x0).abs().max()) > 0.1
    torch.testing.assert_close(sample(network, x0, labels, RECIPES["fm-ot"], 4, method, guidance), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [*METHODS, "dopri5"])
def test_every_solver_by_name(method):
    recipe, x0 = RECIPES["fm-ot"], starting_noise((2, 1, 4, 4), RECIPES["fm-ot"], seed=0, index=1, device=CPU)
    x1 = sample(exact_model(recipe), x0, torch.zeros(2, dtype=torch.int64), recipe, 200, method)
    torch.testing.assert_close(x1, DATA_SD * x0, rtol=0.02, atol=1e-3)
    if method != "dopri5":
        assert tiny(sample_method=method).sample_method == method
    else:
        with pytest.raises(ValueError, match=r"sample_method: expected one of euler, midpoint, .*, ab3, got 'dopri5'"):
            tiny(sample_method=method)


def test_samples_of_classes_do_not_depend_on_the_batches():
    network, config = build_model(tiny()).eval(), tiny()
    arguments = {"steps": 2, "method": "euler", "guidance": 2.0}
    images, labels = sample_classes(network, config, [4, 1], 3, seed=7, batch_size=100, levels=17, **arguments)
    assert labels.tolist() == [4, 4, 4, 1, 1, 1] and images.dtype == torch.uint8 and images.shape == (6, 1, 8, 8)
    assert int(images.max()) <= 16 and len(images.unique(dim=0)) == 6
    again, _ = sample_classes(network, config, [4, 1], 3, seed=7, batch_size=4, levels=17, **arguments)
    assert (images.float() - again.float()).abs().max() <= 1 and float((images == again).float().mean()) > 0.99


def test_guidance_mixes_the_velocities_and_one_means_none():
    calls = []

    def model(x, t, y):
        calls.append(y.tolist())
        return torch.where(y < 0, 1.0, 3.0).reshape(-1, 1, 1, 1).expand_as(x)

    x0, labels, recipe = torch.zeros(2, 1, 1, 1), torch.tensor([4, 5]), RECIPES["fm-ot"]
    assert float(sample(model, x0, labels, recipe, steps=4, method="euler")[0]) == pytest.approx(3.0)
    assert calls == [[4, 5]] * 4
    assert float(sample(model, x0, labels, recipe, steps=4, method="euler", guidance=2.0)[0]) == pytest.approx(1 + 2 * (3 - 1))
    assert calls[-1] == [4, 5, -1, -1]


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_integers_are_the_inverse_of_the_data_map(levels):
    values = torch.arange(levels)
    y = 2 * (values + 0.5) / levels - 1
    assert torch.equal(to_integers(y, levels).long(), values)
    assert to_integers(torch.tensor([-9.0, 9.0]), levels).tolist() == [0, levels - 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_png(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    write_png(tmp_path / "p.png", image)
    width, height, pixel, rows = decode_png((tmp_path / "p.png").read_bytes())
    assert (width, height, pixel) == (7, 5, channels)
    assert rows == image.permute(1, 2, 0).reshape(5, -1).tolist()
    with pytest.raises(ValueError, match="image: expected uint8"):
        write_png(tmp_path / "p.png", image.float())


def test_grid_places_and_enlarges():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1) + 200
    grid = image_grid(images, columns=2, scale=2, padding=1)
    assert grid.shape == (1, 7, 7)
    assert grid[0, 1, 1] == grid[0, 2, 2] == 200 and grid[0, 1, 4] == 201 and grid[0, 4, 1] == 202
    assert len(grid.unique()) == 4, "three images and the background"
    assert to_8_bit(torch.tensor([0, 8, 16]), 17).tolist() == [0, 128, 255]
