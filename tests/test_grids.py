"""Time grids against their formulas typed in again, and what every grid must be."""

import math

import numpy as np
import pytest
import torch

import fm_fast as fm
from fm_fast.grids import NAMED, CosineGrid, KarrasGrid, ShiftGrid, UniformGrid, with_times
from fm_fast.paths import NAMED as PATHS

GRIDS = [UniformGrid(), CosineGrid(), ShiftGrid(), ShiftGrid(0.5), KarrasGrid(), KarrasGrid(0.01, 10.0, 3.0)]
EDGE = 1e-5
ZERO = torch.zeros(2, 3, dtype=torch.float64)


def nodes_of(grid, steps, **arguments):
    return np.array(fm.sample(lambda x, t: x, torch.zeros(1, 1), grid=grid, steps=steps, method="euler", save="steps", **arguments).saved_t)


def nfe(**options):
    return fm.sample(lambda x, t: x, ZERO, method="euler", **options).nfe


def test_uniform_times_are_quotients():
    assert nodes_of("uniform", 10).tolist() == [n / 10 for n in range(11)]
    np.testing.assert_array_equal(nodes_of("uniform", 1000), np.arange(1001) / 1000)


def test_cosine():
    expected = [math.sin(math.pi * n / 14) ** 2 for n in range(8)]
    np.testing.assert_allclose(nodes_of("cosine", 7), expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("shift", [3.0, 1.0, 0.4])
def test_the_shift_of_stable_diffusion_3(shift):
    """Its time is the noise level s = 1 - t: s -> shift s / (1 + (shift - 1) s)."""
    level = np.linspace(1, 0, 9)
    expected = 1 - shift * level / (1 + (shift - 1) * level)
    np.testing.assert_allclose(nodes_of(ShiftGrid(shift), 8), expected, rtol=1e-13, atol=1e-15)


def test_the_named_shift_is_that_of_stable_diffusion_3():
    """Its shift is 3: the noise level 1/2 becomes 3/4."""
    np.testing.assert_allclose(NAMED["shift"].nodes(2, fm.OT()), [0.0, 0.25, 1.0], rtol=1e-15)


def test_karras_noise_levels():
    """The sigmas of Karras et al. as samplers compute them; on the straight path sigma / alpha = (1 - t) / t."""
    ramp = np.linspace(0, 1, 11)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigmas = (high + ramp * (low - high)) ** 7
    expected = 1 / (1 + sigmas)
    found = nodes_of("karras", 10)
    np.testing.assert_allclose(found[1:-1], expected[1:-1], rtol=1e-12)
    assert (found[0], found[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("path", ["vp", "cosine"])
def test_karras_levels_on_other_paths(path):
    found = nodes_of(KarrasGrid(0.01, 10.0, 3.0), 6, path=path)
    scaled = torch.from_numpy(found[1:-1] / found[-1])
    ratios = (PATHS[path].sigma(scaled) / PATHS[path].alpha(scaled)).numpy()
    expected = np.linspace(10 ** (1 / 3), 0.01 ** (1 / 3), 7)[1:-1] ** 3
    np.testing.assert_allclose(ratios, expected, rtol=1e-9)


@pytest.mark.parametrize("path", [fm.VE(), fm.OT(sigma_min=0.1), fm.VP(beta_max=2.0)], ids=["ve", "ot with sigma_min", "short vp"])
def test_karras_levels_stay_among_those_of_the_path(path):
    """80 and 0.002 are not reached here; the levels run between those that are."""
    found = nodes_of("karras", 8, path=path)
    ends = torch.tensor([found[0], found[-1]])
    first, last = (path.sigma(ends) / path.alpha(ends)).tolist()
    inner = torch.from_numpy(found[1:-1])
    ratios = (path.sigma(inner) / path.alpha(inner)).numpy()
    expected = np.linspace(min(first, 80.0) ** (1 / 7), max(last, 0.002) ** (1 / 7), 9) ** 7
    np.testing.assert_allclose(ratios, expected[1:-1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 1000])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
def test_every_grid_increases_between_exact_ends(grid, path, steps):
    nodes = nodes_of(grid, steps, path=path)
    assert len(nodes) == steps + 1 and (np.diff(nodes) > 0).all()
    assert (nodes[0], nodes[-1]) == (0.0, 1 - EDGE if path == "vp" else 1.0)
    part = nodes_of(grid, steps, path=path, t0=0.25, t1=0.75)
    assert (part[0], part[-1]) == (0.25, 0.75)
    np.testing.assert_allclose(part, 0.25 + 0.5 * nodes / nodes[-1], rtol=1e-9)


@pytest.mark.parametrize(
    ("path", "objective", "ends"),
    [
        ("ot", "noise", (EDGE, 1.0)),
        ("ot", "data", (0.0, 1 - EDGE)),
        ("vp", "velocity", (0.0, 1 - EDGE)),
        ("cosine", "score", (EDGE, 1 - EDGE)),
    ],
)
def test_the_ends_at_which_a_velocity_is_infinite_are_left_out(path, objective, ends):
    nodes = nodes_of("uniform", 4, path=path, objective=objective)
    assert (nodes[0], nodes[-1]) == ends
    np.testing.assert_allclose(nodes, ends[0] + (ends[1] - ends[0]) * np.arange(5) / 4, rtol=1e-12)
    assert nodes_of([0.0, 0.5, 1.0], None, path=path, objective=objective).tolist() == [ends[0], 0.5, ends[1]]


@pytest.mark.parametrize("number", [np.float16(0.1), np.float32(0.1), np.float64(0.1)])
def test_ends_given_by_numpy_are_as_exact_as_their_value(number):
    nodes = nodes_of("uniform", 3, t0=number)
    assert (nodes.dtype, nodes[0], nodes[-1]) == (np.float64, float(number), 1.0)
    assert nodes_of("cosine", 3, t1=number)[-1] == float(number)


def test_ratios_that_the_path_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"must meet the path's ratios, 0.01 to 50, got 60 and 80"):
        nodes_of(KarrasGrid(60, 80), 2, path="ve")
    with pytest.raises(ValueError, match=r"rho must be large enough for finite roots of ratios up to 80, got 0.001"):
        nodes_of(KarrasGrid(rho=1e-3), 2)


def test_a_grid_object_without_times_is_refused():
    class Empty:
        def nodes(self, steps, path):
            return []

    with pytest.raises(ValueError, match=r"grid.nodes must return 3 times from 0 to 1, got none"):
        nodes_of(Empty(), 2)


def test_times_of_ones_own():
    for times in ([0.0, 0.1, 0.7, 1.0], (0.2, 0.3), np.array([0.0, 0.5]), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)):
        assert nodes_of(times, None).tolist() == list(map(float, times))
    assert nodes_of([0.1, 0.2], 1, t0=0.1, t1=0.2).tolist() == [0.1, 0.2]


def test_a_grid_of_ones_own():
    class Squares:
        def nodes(self, steps, path):
            return (np.arange(steps + 1) / steps) ** 2

    assert nodes_of(Squares(), 4).tolist() == [0.0, 1 / 16, 1 / 4, 9 / 16, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShiftGrid(0.0), r"shift must be positive, got 0.0"),
        (lambda: ShiftGrid(float("nan")), r"shift must be finite, got nan"),
        (lambda: KarrasGrid(sigma_min=2.0, sigma_max=1.0), r"0 < sigma_min < sigma_max, got 2.0 and 1.0"),
        (lambda: KarrasGrid(sigma_max=float("inf")), r"sigma_max must be finite, got inf"),
        (lambda: KarrasGrid(rho=0.0), r"rho must be positive, got 0.0"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShiftGrid("3"), r"shift must be a number, got str"),
        (lambda: ShiftGrid(torch.tensor(3.0)), r"shift must be a number, got Tensor"),
        (lambda: KarrasGrid(sigma_min="small"), r"sigma_min must be a number, got str"),
        (lambda: KarrasGrid(sigma_max=None), r"sigma_max must be a number, got NoneType"),
        (lambda: KarrasGrid(rho=True), r"rho must be a number, got bool"),
    ],
)
def test_parameters_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_of_numpy_are_parameters():
    assert nodes_of(ShiftGrid(np.float32(3.0)), 4).tolist() == nodes_of(ShiftGrid(3.0), 4).tolist()


EVEN = torch.linspace(0, 1, 5)


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        (EVEN.clone().requires_grad_(), ValueError, r"must not require a gradient, .*; use (grid|save)\.detach\(\)"),
        (EVEN.bfloat16(), TypeError, r"must be float64, float32 or float16, got torch.bfloat16, which holds times to three digits only"),
        (EVEN.to("meta"), ValueError, r"must be on the CPU, where a solve's times are numbers, got a tensor on meta"),
    ],
)
def test_tensors_that_are_no_times(times, error, message):
    with pytest.raises(error, match=f"grid {message}"):
        fm.sample(lambda x, t: x, torch.zeros(2, 3), grid=times)
    with pytest.raises(error, match=f"save {message}"):
        fm.sample(lambda x, t: x, torch.zeros(2, 3), steps=2, save=times)


@pytest.mark.parametrize("method", ["midpoint", "ab2", "ab3"])
def test_times_to_save_that_rounding_moved_off_a_node_are_that_node(method):
    """linspace's 0.30000000000000004 is the node 0.3; a step of 5e-17 between them once made AB2 return 1e18."""
    x = torch.linspace(-1, 1, 6).reshape(3, 2)

    def velocity(x, t):
        return torch.sin(3 * x) + t[:, None] * x

    plain = fm.sample(velocity, x, method=method, steps=10, save="steps")
    saved = fm.sample(velocity, x, method=method, steps=10, save=np.linspace(0, 1, 11))
    assert saved.nfe == plain.nfe and torch.equal(saved.saved, plain.saved)
    twice = fm.sample(velocity, x, method="midpoint", steps=4, save=[0.3, 0.3 + 1e-16, 0.1 + 0.2])
    assert twice.nfe == 10 and torch.equal(twice.saved[0], twice.saved[2])


class Given:
    def __init__(self, *times):
        self.times = times

    def nodes(self, steps, path):
        return self.times


def test_a_grid_object_whose_times_fall_is_refused():
    with pytest.raises(ValueError, match=r"grid must be strictly increasing, got 0.3 after 0.7"):
        nodes_of(Given(0.0, 0.7, 0.3, 1.0), 3)


def test_a_grid_object_must_end_at_one():
    with pytest.raises(ValueError, match=r"grid.nodes must return 3 times from 0 to 1, got 3 from 0.0 to 0.9"):
        nodes_of(Given(0.0, 0.5, 0.9), 2)


def test_the_ends_of_a_part_are_exact():
    for t0, t1 in ((0.1, 0.7), (0.05, 0.95), (0.3, 0.9), (0.2, 0.7)):
        nodes = nodes_of("cosine", 3, t0=t0, t1=t1)
        assert (nodes[0], nodes[-1]) == (t0, t1)


def test_equal_noise_levels_are_no_grid():
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max, got 2.0 and 2.0"):
        KarrasGrid(2.0, 2.0)


def test_a_solve_needs_room_inside_the_path():
    with pytest.raises(ValueError, match="t0 and t1 must leave room inside"):
        nodes_of("uniform", 2, path="vp", t0=1 - 1e-5)


def test_times_to_save_before_the_start_are_refused():
    with pytest.raises(ValueError, match="save must lie inside the solve"):
        fm.sample(lambda x, t: x, torch.zeros(1, 1), steps=2, t0=0.005, save=[0.0, 1.0])


def test_times_with_a_gradient_are_no_grid():
    with pytest.raises(TypeError, match="grid must be a sequence of times"):
        nodes_of([torch.tensor(0.0, requires_grad=True), 1.0], None)


GIVEN = {
    "float32": lambda times: times,
    "numpy": lambda times: times.numpy(),
    "numbers": lambda times: times.tolist(),
    "float16": lambda times: times.half(),
}


@pytest.mark.parametrize("form", GIVEN)
@pytest.mark.parametrize("method", ["euler", "midpoint", "ab2"])
def test_times_to_save_that_their_dtype_has_rounded_are_the_nodes(method, form):
    times = GIVEN[form](torch.linspace(0.0, 1.0, 11))
    arguments = {"method": method, "steps": 10}
    whole, asked = (fm.sample(lambda x, t: x.sin() + t[:, None], torch.ones(2, 3), **arguments, save=save) for save in ("steps", times))
    assert asked.nfe == whole.nfe and torch.equal(asked.saved, whole.saved)


def test_noise_on_the_way_does_not_depend_on_how_the_times_to_save_are_given():
    arguments = {"method": "euler", "steps": 10, "churn": 0.5, "seed": 0}
    whole, asked = (
        fm.sample(lambda x, t: x.sin(), torch.ones(2, 3), **arguments, save=save) for save in ("steps", torch.linspace(0.0, 1.0, 11))
    )
    assert torch.equal(asked.saved, whole.saved)


@pytest.mark.parametrize("time", [0.1 + 1e-6, 0.5 - 1e-6])
def test_times_to_save_beside_a_node_are_times_of_their_own(time):
    nodes, (position,) = with_times(nodes_of("uniform", 10), [time])
    assert len(nodes) == 12 and nodes[position] == time


def test_a_time_is_no_node_where_steps_are_as_short_as_its_rounding():
    nodes, (position,) = with_times(np.array([0.0, 1e-8, 1.0]), [4e-9])
    assert len(nodes) == 4 and nodes[position] == 4e-9


@pytest.mark.parametrize("grid", [UniformGrid(), CosineGrid(), ShiftGrid()], ids=repr)
def test_times_are_as_exact_in_a_compiled_function(grid):
    """torch.compile would divide whole numbers in float32."""
    compiled = torch.compile(lambda: torch.from_numpy(grid.nodes(7, fm.OT())), backend="eager")
    torch.testing.assert_close(compiled(), torch.from_numpy(grid.nodes(7, fm.OT())), rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("off", [-1e-10, 1e-10])
def test_a_float64_time_that_is_nearly_a_node_is_that_node(off):
    """No dtype's rounding explains 1e-10 there; a step of that length would still be none."""
    assert nfe(steps=2, save=np.array([0.5 + off])) == 2
    assert nfe(steps=2, save=np.array([0.5 + 1e3 * off])) == 3


def test_a_time_a_little_outside_of_the_solve_is_refused():
    for outside in (0.5001, 0.50003, 0.1999):
        with pytest.raises(ValueError, match="save must lie inside the solve"):
            nfe(steps=2, t0=0.2, t1=0.5, save=[outside])


def test_short_steps_may_follow_long_ones_and_not_the_other_way_round():
    """A multistep method multiplies rounding errors by how much longer a step is than the one before."""
    options = {"method": "ab2", "noise": ZERO}
    fm.sample(lambda x, t: x, grid=[0.0, 0.5, 1.0 - 1e-6, 1.0], **options)
    with pytest.raises(ValueError, match="must not lengthen a step more than 100000 times"):
        fm.sample(lambda x, t: x, grid=[0.0, 1e-6, 0.5, 1.0], **options)
