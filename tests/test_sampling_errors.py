"""Every wrong argument of a solve is refused with a message that names it, before the model runs where that is possible."""

import functools

import pytest
import torch

import fm_fast as fm
from fm_fast.grids import UniformGrid
from fm_fast.solvers import METHODS, RungeKutta

X0 = torch.zeros(4, 3)
LABELS = torch.zeros(4, dtype=torch.int64)
GUIDED = {"cond": {"y": LABELS}}
NAN = float("nan")


def model(x, t, y=None):
    return x


def called(x, t, **cond):
    pytest.fail("the model was called before the arguments were checked")


ADAPTIVE = {"method": "dopri5", "steps": None}
BAD_ARGUMENTS = [
    ({"start": [1.0]}, TypeError, r"(noise|x1) must be a torch.Tensor, got list"),
    ({"start": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, r"(noise|x1) must be float64, .*, got torch.int64"),
    ({"start": torch.zeros(4, dtype=torch.complex64)}, TypeError, r"(noise|x1) must be float64, .*, got torch.complex64"),
    ({"start": torch.tensor(1.0)}, ValueError, r"(noise|x1) must have a batch dimension \[B, ...\], got a scalar"),
    ({"model": "unet"}, TypeError, r"model must be callable as model\(x, t, \*\*cond\), got str"),
    ({"cond": LABELS}, TypeError, r"cond must be a mapping of keyword arguments of the model, got Tensor"),
    ({"path": "linear"}, ValueError, r"path must be one of ot, vp, ve, cosine or an object .*, got 'linear'"),
    ({"objective": "eps"}, ValueError, r"objective must be one of velocity, .*, got 'eps'"),
    # steps
    ({"steps": None}, ValueError, r"steps must be given for a fixed-step method: the number of steps, a whole number of at least 1"),
    ({"steps": 0}, ValueError, r"steps must be at least 1, got 0"),
    ({"steps": -3}, ValueError, r"steps must be at least 1, got -3"),
    ({"steps": 2.5}, TypeError, r"steps must be a whole number, got float"),
    ({"steps": 2.0}, TypeError, r"steps must be a whole number, got float"),
    ({"steps": True}, TypeError, r"steps must be a whole number, got bool"),
    ({"steps": "10"}, TypeError, r"steps must be a whole number, got str"),
    ({"method": "dopri5"}, ValueError, r"steps must be None for the adaptive method 'dopri5', which chooses its own .*, got 4"),
    # method
    ({"method": "rk5"}, ValueError, r"method must be one of euler, midpoint, .*, dopri5, .*, or a solver table, got 'rk5'"),
    ({"method": None}, ValueError, r"method must be one of .* got None"),
    ({"method": RungeKutta}, ValueError, r"method must be one of .* got <class"),
    # grid
    ({"grid": "linear"}, ValueError, r"grid must be one of uniform, cosine, shift, karras, a grid object or a sequence .*, got 'linear'"),
    ({"grid": UniformGrid}, ValueError, r"grid must be one of .*, got <class"),
    ({"grid": None}, ValueError, r"grid must be a sequence of times in \[0, 1\], got None"),
    ({"grid": 0.5}, ValueError, r"grid must be a sequence of times in \[0, 1\], got 0.5"),
    ({"grid": ["a", "b"], "steps": None}, TypeError, r"grid must be a sequence of times, got \['a', 'b'\]"),
    ({"grid": [0.0, 0.6, 0.5, 1.0], "steps": None}, ValueError, r"grid.* must be strictly increasing, got 0.5 after 0.6"),
    ({"grid": [0.0, 0.5, 0.5, 1.0], "steps": None}, ValueError, r"grid.* must be strictly increasing, got 0.5 after 0.5"),
    ({"grid": [1.0, 0.5, 0.0], "steps": None}, ValueError, r"grid.* must be strictly increasing"),
    ({"grid": [0.0, 1.5], "steps": None}, ValueError, r"grid must be a sequence of times in \[0, 1\], got \[0.0, 1.5\]"),
    ({"grid": [0.0, NAN, 1.0], "steps": None}, ValueError, r"grid must be a sequence of times in \[0, 1\]"),
    ({"grid": [0.5], "steps": None}, ValueError, r"grid must hold at least two times, got 1"),
    ({"grid": [0.0, 0.5, 1.0], "steps": 3}, ValueError, r"steps must be left out or equal the 2 steps of grid, got 3"),
    ({"grid": [0.0, 1.0], "steps": True}, TypeError, r"steps must be a whole number, got bool"),
    ({"grid": [0.0, 0.5], "steps": None, "t1": 0.7}, ValueError, r"t0 and t1 must be left out or equal the ends of grid, 0.0 and 0.5"),
    ({"grid": [0.0, 0.999995, 1.0], "steps": None, "path": "vp"}, ValueError, r"grid, kept inside \[0.0, 0.99999\], must be strictly"),
    ({"grid": "cosine", "method": "bosh3", "steps": None}, ValueError, r"grid must be left out for the adaptive method 'bosh3'"),
    # times
    ({"t0": 0.5, "t1": 0.5}, ValueError, r"t0 and t1 must satisfy 0 <= t0 < t1 <= 1, got 0.5 and 0.5"),
    ({"t0": 1.0, "t1": 0.0}, ValueError, r"t0 and t1 must satisfy .*, got 1.0 and 0.0; t0 is the noise's end of every solve"),
    ({"t0": -0.1}, ValueError, r"t0 and t1 must satisfy 0 <= t0"),
    ({"t1": 1.1}, ValueError, r"t0 and t1 must satisfy .* got 0.0 and 1.1"),
    ({"t0": NAN}, ValueError, r"t0 must be finite, got nan"),
    ({"t1": "end"}, TypeError, r"t1 must be a number, got str"),
    ({"t1": torch.tensor(0.5)}, TypeError, r"t1 must be a number, got Tensor"),
    ({"t0": 0.999995, "path": "vp"}, ValueError, r"t0 and t1 must leave room inside \[0.0, 0.99999\]"),
    # guidance
    ({"guidance": 2.0, **GUIDED}, TypeError, r"guidance must be a fm_fast.Guidance \(scale and null condition\) or None, got float"),
    ({"guidance": fm.Guidance(2.0, {"y": -1})}, ValueError, r"guidance.null must name conditions of cond \(none\), got y"),
    ({"guidance": fm.Guidance(2.0, {"label": -1}), **GUIDED}, ValueError, r"guidance.null must name conditions of cond \(y\), got label"),
    (
        {"guidance": fm.Guidance(2.0, {"y": torch.zeros(3)}), **GUIDED},
        ValueError,
        r"guidance.null\['y'\] must broadcast to the condition's shape \(4,\), got \(3,\); for others, give a model",
    ),
    (
        {"guidance": fm.Guidance(2.0, {"y": -1}), "cond": {"y": 3}},
        ValueError,
        r"guidance.null\['y'\]: only conditions that are tensors with one entry a sample \(\[4, ...\]\) can be replaced",
    ),
    ({"guidance": fm.Guidance(2.0, {"y": NAN}), **GUIDED}, ValueError, r"guidance.null\['y'\] must be a value that .* can hold, got nan"),
    ({"guidance": fm.Guidance(2.0, {"y": "none"}), **GUIDED}, TypeError, r"guidance.null\['y'\] must be a tensor or a number, got str"),
    # save, callback, progress
    ({"save": "all"}, ValueError, r'save must be None, "steps" or a sequence of times, got \'all\''),
    ({"save": True}, ValueError, r"save must be a sequence of times in \[0, 1\], got True"),
    ({"save": 0.5}, ValueError, r"save must be a sequence of times in \[0, 1\], got 0.5"),
    ({"save": [0.5, 2.0]}, ValueError, r"save must be a sequence of times in \[0, 1\], got \[0.5, 2.0\]"),
    ({"save": [0.2, 0.8], "t1": 0.5}, ValueError, r"save must lie inside the solve, \[0.0, 0.5\], got \[0.8\]"),
    ({"save": "steps", "method": "dopri5", "steps": None, "per_sample": True}, ValueError, 'save="steps" needs steps that are the same'),
    ({"callback": 5}, TypeError, r"callback must be callable as callback\(step, t, x\), got int"),
    ({"progress": True, "method": "dopri5", "steps": None}, ValueError, r"progress needs a fixed-step method, got 'dopri5'"),
    # the rest
    ({"rtol": 0.0, **ADAPTIVE}, ValueError, r"rtol must be positive, got 0.0"),
    ({"atol": -1e-5, **ADAPTIVE}, ValueError, r"atol must be positive, got -1e-05"),
    ({"rtol": "1e-5", **ADAPTIVE}, TypeError, r"rtol must be a number, got str"),
    ({"max_steps": 0, **ADAPTIVE}, ValueError, r"max_steps must be at least 1, got 0"),
    ({"max_steps": 1e4, **ADAPTIVE}, TypeError, r"max_steps must be a whole number, got float"),
    ({"rtol": 1e-5}, ValueError, r"rtol must be None for the fixed-step method 'midpoint', whose accuracy is up to steps, got 1e-05"),
    ({"atol": 1e-3, "method": "ab2"}, ValueError, r"atol must be None for the fixed-step method 'ab2'"),
    ({"max_steps": 50, "method": "euler"}, ValueError, r"max_steps must be None for the fixed-step method 'euler', .*, got 50"),
    ({"dtype": torch.int8}, ValueError, r"dtype must be one of .*, got torch.int8"),
    ({"dtype": "bf16"}, ValueError, r"dtype must be one of .*, got 'bf16'"),
    ({"grad": "adjoint"}, ValueError, r"grad must be one of none, direct, checkpoint, got 'adjoint'"),
    ({"grad": True}, ValueError, r"grad must be one of none, direct, checkpoint, got True"),
    ({"on_nonfinite": "ignore"}, ValueError, r"on_nonfinite must be one of raise, mark, got 'ignore'"),
    ({"backend": "opencl"}, ValueError, r"backend must be one of reference, cpp, cuda, triton, got 'opencl'"),
    ({"backend": "cuda"}, RuntimeError, r"backend='cuda' can't run linear_step on cpu: it runs on cuda, not on cpu"),
]


def identifier(value):
    return ", ".join(f"{k}={v!r}"[:40] for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize("direction", [fm.sample, fm.encode])
@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS, ids=identifier)
def test_bad_arguments(change, error, message, direction):
    arguments = {"model": called, "start": X0, "steps": 4, **change}
    with pytest.raises(error, match=message):
        direction(arguments.pop("model"), arguments.pop("start"), **arguments)


@pytest.mark.parametrize("steps", [True, 1.0, [1], torch.tensor(1)])
def test_steps_that_equal_a_number_seen_before(steps):
    """Times that are kept from solve to solve are found by the number of steps."""
    fm.sample(model, X0, steps=1)
    with pytest.raises(TypeError, match="steps must be a whole number"):
        fm.sample(called, X0, steps=steps)


def test_a_misspelt_number_of_steps():
    with pytest.raises(ValueError, match=r"step needs churn > 0, .* \(the number of steps is steps\), got 4"):
        fm.sample(called, X0, method="dopri5", step=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        fm.encode(called, X0, method="dopri5", step=4)


@pytest.mark.parametrize("direction", [fm.sample, fm.encode])
@pytest.mark.parametrize("name", ["num_steps", "n_steps", "guidance_scale", "solver", "y"])
def test_misspelt_keywords(name, direction):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        direction(called, X0, **{"steps": 4, name: 2})


BAD_OUTPUTS = [
    (lambda x: None, TypeError, r"model must return a torch.Tensor, got NoneType"),
    (lambda x: (x, x), TypeError, r"model must return a torch.Tensor, got tuple"),
    (lambda x: x[:, :1], ValueError, r"model must return the shape of its input, \(4, 3\), got \(4, 1\)"),
    (lambda x: x.mean(), ValueError, r"model must return the shape of its input, \(4, 3\), got \(\)"),
    (lambda x: x[None], ValueError, r"model must return the shape of its input, \(4, 3\), got \(1, 4, 3\)"),
    (lambda x: torch.cat([x, x]), ValueError, r"model must return the shape of its input, \(4, 3\), got \(8, 3\)"),
    (lambda x: x.long(), TypeError, r"model must return float64, float32, bfloat16 or float16, got torch.int64"),
    (lambda x: torch.complex(x, x), TypeError, r"model must return float64, .*, got torch.complex64"),
    (lambda x: x.to("meta"), ValueError, r"model must return a tensor on the device of its input, cpu, got meta"),
]


@pytest.mark.parametrize("method", ["euler", "rk4", "ab2", "dopri5"])
@pytest.mark.parametrize("grad", ["none", "direct", "checkpoint"])
@pytest.mark.parametrize(("output", "error", "message"), BAD_OUTPUTS)
def test_bad_outputs(output, error, message, method, grad, backend):
    steps = None if method == "dopri5" else 3
    with pytest.raises(error, match=message):
        fm.sample(lambda x, t: output(x), X0, method=method, steps=steps, grad=grad, backend=backend)


LATER_OUTPUTS = [
    (lambda x: (x, x), TypeError, r"model must return a torch.Tensor, got tuple"),
    (lambda x: None, TypeError, r"model must return a torch.Tensor, got NoneType"),
    (lambda x: x[:, :1], ValueError, r"model must return the shape of its input, \(4, 3\), got \(4, 1\)"),
    (lambda x: x[:1], ValueError, r"got \(1, 3\)"),
    (lambda x: x.mean(), ValueError, r"got \(\)"),
    (lambda x: x[None], ValueError, r"got \(1, 4, 3\)"),
    (lambda x: torch.cat([x, x]), ValueError, r"got \(8, 3\)"),
]


@pytest.mark.parametrize("grad", ["none", "direct", "checkpoint"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2"])
@pytest.mark.parametrize(("output", "error", "message"), LATER_OUTPUTS)
def test_a_wrong_output_at_a_later_time(output, error, message, method, grad, backend):
    """Never broadcast in silence, nor taken for the two halves of a guided batch."""
    model = functools.partial(_after_the_first, output)
    with pytest.raises(error, match=message):
        fm.sample(model, X0, method=method, steps=3, grad=grad, backend=backend)
    with pytest.raises(error, match=message):
        fm.encode(lambda x, t: model(x, 1 - t), X0, method=method, steps=3, grad=grad, backend=backend)
    with pytest.raises(error, match=message):
        fm.sample_with_log_prob(model, X0, method=method, steps=3, create_graph=grad == "direct", backend=backend)


def _after_the_first(output, x, t):
    return x if float(t[0]) == 0 else output(x)


def test_a_wrong_output_of_images_at_a_later_time(backend):
    with pytest.raises(TypeError, match=r"model must return a torch\.Tensor, got tuple"):
        fm.sample(functools.partial(_after_the_first, lambda x: (x,)), torch.zeros(2, 3, 4, 4), steps=2, backend=backend)


def test_bad_outputs_of_a_guided_model(backend):
    guided = functools.partial(fm.sample, cond={"y": LABELS}, guidance=fm.Guidance(2.0, {"y": -1}), steps=3, backend=backend)
    with pytest.raises(ValueError, match=r"model must return the shape of its input, \(8, 3\), got \(4, 3\)"):
        guided(lambda x, t, y: x[:4], X0)
    with pytest.raises(TypeError, match=r"model must return a torch\.Tensor, got tuple"):
        guided(lambda x, t, y: (x,), X0)
    for solve in (functools.partial(guided, method="dopri5", steps=None), functools.partial(_guided_likelihood, backend)):
        with pytest.raises(TypeError, match=r"model must return a torch\.Tensor, got tuple"):
            solve(lambda x, t, y: (x,), X0)
        with pytest.raises(ValueError, match=r"model must return the shape of its input, \(8, 3\), got \(4, 3\)"):
            solve(lambda x, t, y: x[:4], X0)


def _guided_likelihood(backend, model, x):
    guidance = fm.Guidance(2.0, {"y": -1})
    return fm.log_likelihood(model, x, cond={"y": LABELS}, guidance=guidance, steps=3, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.0, {}), ValueError, r"null must name at least one condition"),
        ((2.0, None), TypeError, r"null must be a mapping of condition values, got NoneType"),
        ((2.0, [("y", -1)]), TypeError, r"null must be a mapping of condition values, got list"),
        (("2", {"y": -1}), TypeError, r"scale must be a number, got str"),
        ((NAN, {"y": -1}), ValueError, r"scale must be finite, got nan"),
        ((torch.tensor(2.0), {"y": -1}), ValueError, r"scale must be a number or have shape \[B\], got \(\)"),
        ((torch.tensor([2, 1, 3]), {"y": -1}), TypeError, r"scale must be float64, float32, bfloat16 or float16, got torch.int64"),
        ((torch.tensor([2.0, NAN]), {"y": -1}), ValueError, r"scale must be finite, got values that are not"),
        ((2.0, {"y": -1}, (0.6, 0.5)), ValueError, r"interval must be \(begin, end\) with 0 <= begin <= end <= 1, got \(0.6, 0.5\)"),
        ((2.0, {"y": -1}, (0.0, 1.5)), ValueError, r"interval must be \(begin, end\)"),
        ((2.0, {"y": -1}, (NAN, 1.0)), ValueError, r"interval must be \(begin, end\)"),
        ((2.0, {"y": -1}, 0.5), ValueError, r"interval must be \(begin, end\) with 0 <= begin <= end <= 1, got 0.5"),
        ((2.0, {"y": -1}, (0.0, 0.5, 1.0)), ValueError, r"interval must be \(begin, end\)"),
        ((2.0, {"y": -1}, ("a", "b")), ValueError, r"interval must be \(begin, end\)"),
    ],
)
def test_bad_guidance(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.Guidance(*arguments)


def test_guidance_without_null():
    with pytest.raises(TypeError, match="null"):
        fm.Guidance(2.0)


def test_an_explicit_grid_states_its_steps_once():
    assert fm.sample(model, X0, grid=[0.0, 0.5, 1.0], steps=2, method=METHODS["euler"]).nfe == 2


class Pattern:
    """A grid object that returns what it is told."""

    def __init__(self, times):
        self.times = times

    def nodes(self, steps, path):
        return self.times


@pytest.mark.parametrize("times", [[0.0, 0.5, 1.0], [-0.5, 0.0, 0.2, 0.8, 1.5], [0.1, 0.2, 0.3, 0.4, 1.0]], ids=str)
def test_what_a_grid_object_returns_is_checked(times):
    with pytest.raises(ValueError, match=r"grid\.nodes must"):
        fm.sample(lambda x, t: x, torch.zeros(2, 3), steps=4, grid=Pattern(times))


def test_multistep_methods_refuse_steps_that_would_magnify_rounding():
    times = [0.0, 0.3, 0.3 + 1e-12, 0.6, 1.0]
    with pytest.raises(ValueError, match="grid and save must not lengthen a step more than 100000 times"):
        fm.sample(lambda x, t: x, torch.zeros(2, 3), method="ab2", grid=times)
    fm.sample(lambda x, t: x, torch.zeros(2, 3), method="midpoint", grid=times)


def test_names_of_the_wrong_type_are_told():
    with pytest.raises(ValueError, match="objective must be one of"):
        fm.sample(lambda x, t: x, torch.zeros(2, 3), steps=1, objective=["velocity"])


def time_first(t, x, **cond):
    return torch.cat([x, t[:, None]], 1) + cond.get("shift", 0.0)


CALLS = {
    "a loss": lambda cond: fm.flow_matching_loss(time_first, torch.zeros(4, 2), cond=cond),
    "fixed steps": lambda cond: fm.sample(time_first, torch.zeros(4, 2), steps=2, cond=cond),
    "adaptive steps": lambda cond: fm.sample(time_first, torch.zeros(4, 2), method="dopri5", cond=cond),
    "a gradient through the solve": lambda cond: fm.sample(
        time_first, torch.zeros(4, 2, requires_grad=True), steps=2, grad="direct", cond=cond
    ),
    "a divergence": lambda cond: fm.divergence(time_first, torch.zeros(4, 2), 0.5, cond=cond),
    "a likelihood": lambda cond: fm.log_likelihood(time_first, torch.zeros(4, 2), steps=2, cond=cond),
}


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="exceptions have notes from Python 3.11 on")
@pytest.mark.parametrize("call", CALLS)
def test_the_error_of_a_network_that_takes_the_time_first_tells_how_it_was_called(call):
    with pytest.raises(IndexError) as raised:
        CALLS[call]({"shift": torch.zeros(4, 1)})
    (note,) = raised.value.__notes__
    assert note.startswith("fm_fast called model(x, t, shift) with x float32 [4, 2], t float32 [4], shift float32 [4, 1]; ")


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="exceptions have notes from Python 3.11 on")
@pytest.mark.parametrize(
    ("shift", "told"),
    [
        (torch.zeros(4, 5, dtype=torch.float64), "shift float64 [4, 5]; "),
        (torch.zeros(4, 5, device="meta"), "shift float32 [4, 5] on meta; "),
        ([1.0, 2.0], "shift list; "),
    ],
)
def test_the_error_of_a_network_tells_the_conditions_it_was_given(shift, told):
    def network(x, t, shift):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    with pytest.raises(RuntimeError) as raised:
        fm.sample(network, torch.zeros(4, 2), steps=2, cond={"shift": shift})
    assert f"t float32 [4], {told}" in raised.value.__notes__[0]


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="exceptions have notes from Python 3.11 on")
def test_a_guided_network_is_said_to_be_called_with_both_halves():
    guidance = fm.Guidance(2.0, {"shift": torch.zeros(1)})
    with pytest.raises(IndexError) as raised:
        fm.sample(time_first, torch.zeros(4, 2), steps=2, cond={"shift": torch.zeros(4, 1)}, guidance=guidance)
    assert "x float32 [8, 2], t float32 [8]" in raised.value.__notes__[0]
