"""Guidance: one doubled batch gives what two separate calls give, at the times that it applies to and nowhere else."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sampling_helpers import FIXED, Counted, network, noise64, solve, velocity_of

import fm_fast as fm

X0 = noise64(3, 2, 4)
Y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
IMAGES = noise64(2, 3, 4, 4)
LABELS = torch.tensor([1, 4, 2])


def conditional(x, t, y=None, **others):
    shift = y.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return network(x, t) + torch.sin(shift * x)


def mixed(x, t, scale, labels=LABELS, null=-1):
    one, other = conditional(x, t, labels), conditional(x, t, torch.full_like(labels, null))
    return other + scale * (one - other)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("method", FIXED)
def test_a_doubled_batch_equals_two_calls(method, scale, backend):
    model = Counted(conditional)
    guidance = fm.Guidance(scale, {"y": -1})
    found = fm.sample(model, X0, cond={"y": LABELS}, guidance=guidance, method=method, steps=4, backend=backend)
    expected = solve(method, lambda x, t: mixed(x, t, scale), X0, np.arange(5) / 4)
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=1e-13)
    assert found.nfe == len(model.times) and set(model.batches) == {6}


@pytest.mark.parametrize("method", ["euler", "midpoint", "ab2", "rk4"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_samples_without_elements(method, scale, backend):
    guidance = fm.Guidance(scale, {"y": -1})
    empty = torch.empty(3, 0, dtype=torch.float64)
    found = fm.sample(conditional, empty, cond={"y": LABELS}, guidance=guidance, method=method, steps=2, backend=backend)
    assert found.x.shape == (3, 0)


@pytest.mark.parametrize(
    ("labels", "null"),
    [
        (LABELS.to(torch.uint8), -1),
        (LABELS.to(torch.uint8), 300),
        (LABELS > 1, -1),
        (LABELS, torch.tensor(0.5)),
        (LABELS, float("nan")),
        (LABELS, float("inf")),
        (LABELS, 0.5),
    ],
)
def test_a_null_value_that_the_condition_cannot_hold_is_refused(labels, null):
    message = rf"guidance.null\['y'\] must be a value that the condition, {labels.dtype}, can hold, got "
    with pytest.raises(ValueError, match=message):
        fm.sample(conditional, X0, cond={"y": labels}, guidance=fm.Guidance(2.0, {"y": null}), method="euler", steps=1)


def test_arrays_of_numpy_in_conditions():
    array = np.arange(3)
    assert fm.Guidance(1.0, {"y": array}) == fm.Guidance(1.0, {"y": array.copy()}) != fm.Guidance(1.0, {"y": array + 1})
    with pytest.raises(ValueError, match=r"guidance.null\['y'\]: only conditions that are tensors"):
        fm.sample(conditional, X0, cond={"y": array}, guidance=fm.Guidance(2.0, {"y": -1}), method="euler", steps=1)


def test_a_null_class_may_be_a_number_of_numpy():
    options = {"cond": {"y": LABELS}, "method": "euler", "steps": 2}
    found, expected = (fm.sample(conditional, X0, guidance=fm.Guidance(2.0, {"y": null}), **options) for null in (np.int64(-1), -1))
    assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("objective", ["noise", "data"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "ab2"])
def test_mixing_outputs_mixes_velocities(objective, method, backend):
    found = fm.sample(
        conditional, X0, cond={"y": LABELS}, guidance=fm.Guidance(2.0, {"y": -1}), path="cosine", objective=objective, method=method,
        steps=4, t0=0.2, t1=0.8, backend=backend,
    )  # fmt: skip

    def velocity(x, t):
        one, other = (velocity_of("cosine", objective, conditional(x, t, y), x, t) for y in (LABELS, torch.full_like(LABELS, -1)))
        return other + 2.0 * (one - other)

    torch.testing.assert_close(found.x, solve(method, velocity, X0, np.linspace(0.2, 0.8, 5)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2"])
@pytest.mark.parametrize("interval", [(0.25, 0.6), (0.0, 0.5), (0.9, 1.0), (0.26, 0.27)], ids=str)
def test_outside_its_interval_the_conditional_model_runs_alone(interval, method, backend):
    """A fixed step is guided, all of its stages, where its middle lies in the interval; a multistep method starts anew there."""
    model = Counted(conditional)
    guidance = fm.Guidance(3.0, {"y": -1}, interval)
    found = fm.sample(model, X0, cond={"y": LABELS}, guidance=guidance, method=method, steps=4, backend=backend)
    guided = [interval[0] <= middle <= interval[1] for middle in (0.125, 0.375, 0.625, 0.875)]
    begins, expected, times = [step for step in range(4) if step == 0 or guided[step] != guided[step - 1]], X0, np.arange(5) / 4
    for begin, end in itertools.pairwise((*begins, 4)):
        scale = 3.0 if guided[begin] else 1.0
        expected = solve(method, lambda x, t, scale=scale: mixed(x, t, scale), expected, times[begin : end + 1])
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=1e-13)
    stages = {"euler": 1, "midpoint": 2, "rk4": 4, "ab2": 1}[method]
    asked = [step for step in range(4) for _ in range(stages + (method == "ab2" and step in begins))]  # ab2's first step has two stages
    assert model.batches == [6 if guided[step] else 3 for step in asked]


def test_an_interval_of_other_numbers_is_one_of_floats():
    interval = torch.tensor(0.25), np.float32(0.5)
    guidance = fm.Guidance(2.0, {"y": -1}, interval)
    assert guidance.interval == (0.25, 0.5) and all(type(time) is float for time in guidance.interval)
    plain = fm.Guidance(2.0, {"y": -1}, (0.25, 0.5))
    options = {"cond": {"y": LABELS}, "steps": 4}
    assert torch.equal(fm.sample(conditional, X0, guidance=guidance, **options).x, fm.sample(conditional, X0, guidance=plain, **options).x)


def test_guidance_backwards(backend):
    found = fm.encode(conditional, X0, cond={"y": LABELS}, guidance=fm.Guidance(2.0, {"y": -1}), method="rk4", steps=4, backend=backend)
    expected = solve("rk4", lambda x, t: mixed(x, t, 2.0), X0, np.arange(4, -1, -1) / 4)
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("method", ["euler", "midpoint", "ab2"])
def test_dtypes_and_layouts(dtype, layout, method, backend):
    seen = set()

    def model(x, t, y):
        seen.add((x.dtype, len(x), x.is_contiguous(memory_format=layout)))
        return conditional(x, t.to(x.dtype), y)

    noise, labels = IMAGES.float().to(memory_format=layout), LABELS[:2]
    guidance = fm.Guidance(2.0, {"y": -1})
    arguments = {"cond": {"y": labels}, "guidance": guidance, "method": method, "steps": 4, "dtype": dtype, "save": [0.3]}
    found = fm.sample(model, noise, backend=backend, **arguments)
    assert seen == {(dtype, 4, True)}
    nodes = [0.0, 0.25, 0.3, 0.5, 0.75, 1.0]
    expected = solve(method, lambda x, t: mixed(x, t, 2.0, labels), IMAGES, nodes)
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.x.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        found.saved[0].double(), solve(method, lambda x, t: mixed(x, t, 2.0, labels), IMAGES, nodes[:3]), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab3"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (2, 3, 4, 4)], ids=str)
def test_models_that_return_their_doubled_input(shape, method, backend):
    """dx/dt = x in both halves, through a view of the solver's own buffer."""
    noise, labels = noise64(*shape).float(), torch.arange(shape[0])
    for model in (lambda x, t, y: x, lambda x, t, y: x.view(x.shape)):
        found = fm.sample(model, noise, cond={"y": labels}, guidance=fm.Guidance(2.0, {"y": -1}), method=method, steps=4, backend=backend)
        expected = solve(method, lambda x, t: x, noise.double(), np.arange(5) / 4)
        torch.testing.assert_close(found.x.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "null",
    [-1, torch.tensor(-1), torch.tensor([-1]), torch.full((3,), -1), torch.full((3,), -1.0)],
    ids=["number", "scalar", "one", "batch", "other dtype"],
)
def test_forms_of_the_null_condition(null):
    seen = []

    def model(x, t, y):
        seen.append(y)
        return x

    fm.sample(model, X0, cond={"y": LABELS}, guidance=fm.Guidance(2.0, {"y": null}), method="euler", steps=1)
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [1, 4, 2, -1, -1, -1]


def test_null_embeddings_and_what_keeps_its_value():
    """A text embedding with a null row; a mask that both halves share; values that are no tensors."""
    text, null, mask, flag = noise64(3, 5, 2), noise64(5, 2) + 9, noise64(3, 4), object()
    seen = []

    def model(x, t, **cond):
        seen.append(cond)
        return x

    cond = {"text": text, "mask": mask, "scale": torch.tensor(2.0), "flag": flag, "name": "a"}
    fm.sample(model, X0, cond=cond, guidance=fm.Guidance(2.0, {"text": null, "name": "a"}), method="euler", steps=1)
    assert torch.equal(seen[0]["text"], torch.cat([text, null.expand(3, 5, 2)]))
    assert torch.equal(seen[0]["mask"], torch.cat([mask, mask]))
    assert seen[0]["flag"] is flag and seen[0]["name"] == "a" and float(seen[0]["scale"]) == 2.0


def test_gradients_through_guidance():
    noise, embedding = X0[:2].clone().requires_grad_(), noise64(2, 4).requires_grad_()

    def model(x, t, e):
        return torch.sin(x * e[:, None]) + network(x, t)

    for grad in ("direct", "checkpoint"):

        def end(x, e, grad=grad):
            guidance = fm.Guidance(1.5, {"e": 0.0}, (0.2, 1.0))
            return fm.sample(model, x, cond={"e": e}, guidance=guidance, steps=2, grad=grad).x

        assert torch.autograd.gradcheck(end, (noise, embedding))


def test_guidances_are_compared_by_value():
    guidance = fm.Guidance(2.0, {"y": -1, "text": noise64(2, 3)})
    assert guidance == fm.Guidance(2.0, {"text": noise64(2, 3), "y": -1})
    others = [
        fm.Guidance(1.5, {"y": -1, "text": noise64(2, 3)}),
        fm.Guidance(2.0, {"y": -1, "text": noise64(2, 3)}, (0.0, 0.5)),
        fm.Guidance(2.0, {"y": -2, "text": noise64(2, 3)}),
        fm.Guidance(2.0, {"y": -1, "text": noise64(2, 3) + 1}),
        fm.Guidance(2.0, {"y": -1, "text": noise64(3, 2)}),
        fm.Guidance(2.0, {"y": -1, "text": noise64(2, 3).float()}),
        fm.Guidance(2.0, {"y": -1, "text": 0.0}),
        fm.Guidance(2.0, {"y": -1}),
        "guidance",
    ]
    assert all(guidance != other for other in others)


def test_an_empty_batch(backend):
    found = fm.sample(
        conditional, X0[:0], cond={"y": LABELS[:0]}, guidance=fm.Guidance(2.0, {"y": -1}), method="ab2", steps=3, backend=backend
    )
    assert found.x.shape == (0, 2, 4)


def test_adaptive_methods_are_guided_too():
    arguments = {"cond": {"y": LABELS}, "guidance": fm.Guidance(2.0, {"y": -1})}
    found = fm.sample(conditional, X0, method="dopri5", rtol=1e-9, atol=1e-9, **arguments)
    torch.testing.assert_close(found.x, solve("rk4", lambda x, t: mixed(x, t, 2.0), X0, np.arange(401) / 400), rtol=1e-6, atol=1e-7)


class Pose(NamedTuple):
    angle: torch.Tensor
    name: str


def test_conditions_within_conditions_are_doubled():
    """As a robot's observations are: nulls by their names, the rest the same in both halves."""

    def model(x, t, obs, history, pose, y):
        return x * 0 + obs["state"] + obs["camera"]["gain"][:, None] + sum(history) + pose.angle[:, None] + y[:, None]

    state, gain, y = torch.randn(4, 3), torch.rand(4), torch.arange(4.0)
    history, pose = [torch.randn(4, 3), torch.randn(4, 3)], Pose(torch.rand(4), "gripper")
    cond = {"obs": {"state": state, "camera": {"gain": gain}}, "history": history, "pose": pose, "y": y}
    guidance = fm.Guidance(3.0, {"y": -1, "obs": {"state": torch.zeros(3), "camera": {"gain": 0}}})
    found = fm.sample(model, torch.zeros(4, 3), cond=cond, guidance=guidance, method="euler", steps=1).x
    same = sum(history) + pose.angle[:, None]
    conditional, unconditional = state + gain[:, None] + y[:, None], torch.full((4, 3), -1.0)
    torch.testing.assert_close(found, same + unconditional + 3.0 * (conditional - unconditional))


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_what_all_samples_share_is_not_doubled(batch):
    y, features = torch.ones(batch), torch.ones(4, 2)
    guidance = fm.Guidance(2.0, {"y": -1.0}, shared=("features",))
    found = fm.sample(
        lambda x, t, y, features: x * 0 + features.sum(0), torch.zeros(batch, 2), cond={"y": y, "features": features}, guidance=guidance,
        method="euler", steps=1,
    ).x  # fmt: skip
    assert torch.equal(found, torch.full((batch, 2), 4.0))


def test_what_can_be_read_once_names_what_is_shared():
    guidance = fm.Guidance(2.0, {"y": -1.0}, iter((0.25, 0.5)), (name for name in ("features",)))
    assert guidance == fm.Guidance(2.0, {"y": -1.0}, (0.25, 0.5), ("features",))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"null": {"obs": {"speed": 0}}}, ValueError, r"guidance.null\['obs'\] must name conditions of cond \(state\), got speed"),
        ({"null": {"obs": 0}}, TypeError, r"guidance.null\['obs'\] must be a mapping, as the condition is, got int"),
        ({"null": {"obs": {"state": "none"}}}, TypeError, r"guidance.null\['obs.state'\] must be a tensor or a number, got str"),
        ({"null": {"y": -1}, "shared": ("z",)}, ValueError, r"guidance.shared must name conditions of cond \(obs, y\), got z"),
        ({"null": {"y": -1}, "shared": ("y",)}, ValueError, "shared must not name what has a null value, got y"),
        ({"null": {"y": -1}, "shared": "obs"}, TypeError, "shared must be names of conditions, got 'obs'"),
        ({"null": {"y": -1}, "shared": None}, TypeError, "shared must be names of conditions, got None"),
    ],
)
def test_errors_of_nested_and_shared_conditions(arguments, error, message):
    cond = {"obs": {"state": torch.zeros(4, 3)}, "y": torch.zeros(4)}
    with pytest.raises(error, match=message):
        fm.sample(lambda x, t, obs, y: x, torch.zeros(4, 3), cond=cond, guidance=fm.Guidance(scale=2.0, **arguments), steps=1)


def test_guidance_with_nested_nulls_can_be_compared():
    one, other = (fm.Guidance(2.0, {"obs": {"state": torch.zeros(3)}}) for _ in range(2))
    assert one == other and one != fm.Guidance(2.0, {"obs": {"state": torch.ones(3)}})
    assert one != fm.Guidance(2.0, {"obs": {"state": torch.zeros(3)}}, shared=("y",))


# A scale for each sample

SCALES = torch.tensor([0.0, 2.5, 1.0], dtype=torch.float64)
INTERVAL = (0.2, 0.7)


@pytest.mark.parametrize("interval", [(0.0, 1.0), INTERVAL])
@pytest.mark.parametrize(
    ("solver", "arguments"), [(fm.sample, {"steps": 4}), (fm.encode, {"steps": 4, "method": "ab2"}), (fm.sample, {"method": "dopri5"})]
)
def test_a_scale_for_each_sample(solver, arguments, interval, backend):
    """As samples that are solved one by one; the adaptive method takes the steps of the whole batch."""
    options = {**arguments, "backend": backend}
    found = solver(conditional, X0, cond={"y": LABELS}, guidance=fm.Guidance(SCALES, {"y": -1}, interval), **options).x
    for i, scale in enumerate(SCALES.tolist()):
        one = solver(
            conditional, X0[i : i + 1], cond={"y": LABELS[i : i + 1]}, guidance=fm.Guidance(scale, {"y": -1}, interval), **options
        ).x
        error = 1e-12 if "steps" in arguments else 1e-4
        torch.testing.assert_close(found[i : i + 1], one, rtol=error, atol=error)


def test_likelihoods_with_a_scale_for_each_sample():
    options = {"steps": 4, "kind": "exact"}
    found = fm.log_likelihood(conditional, X0, cond={"y": LABELS}, guidance=fm.Guidance(SCALES, {"y": -1}), **options).logp
    for i, scale in enumerate(SCALES.tolist()):
        guidance = fm.Guidance(scale, {"y": -1})
        one = fm.log_likelihood(conditional, X0[i : i + 1], cond={"y": LABELS[i : i + 1]}, guidance=guidance, **options).logp
        torch.testing.assert_close(found[i : i + 1], one, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_scale():
    def end(scale):
        return fm.sample(conditional, X0, cond={"y": LABELS}, guidance=fm.Guidance(scale, {"y": -1}), steps=3, grad="direct").x

    assert torch.autograd.gradcheck(end, SCALES.clone().requires_grad_())


def test_sixteen_bit_outputs_are_mixed_in_float32():
    guidance, noise = [fm.Guidance(scale, {"y": -1}) for scale in (torch.full((3,), 3.3), 3.3)], X0.float()
    one, other = (
        fm.sample(
            lambda x, t, y: conditional(x.float(), t, y).bfloat16(), noise, cond={"y": LABELS}, guidance=g, steps=2, dtype=torch.bfloat16
        ).x
        for g in guidance
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_scales_must_be_one_a_sample_and_can_be_compared():
    with pytest.raises(ValueError, match=r"guidance.scale must be a number or have shape \[3\], got \(2,\)"):
        fm.sample(conditional, X0, cond={"y": LABELS}, guidance=fm.Guidance(SCALES[:2], {"y": -1}), steps=1)
    assert fm.Guidance(SCALES, {"y": -1}) == fm.Guidance(SCALES.clone(), {"y": -1}) != fm.Guidance(2.0, {"y": -1})


def test_a_null_value_may_be_rounded():
    guidance = fm.Guidance(3.0, {"y": 0.1})
    cond = {"y": Y.float()}
    found = fm.sample(lambda x, t, y: x * y[:, None, None], X0.float(), method="euler", steps=1, cond=cond, guidance=guidance).x
    torch.testing.assert_close(found, X0.float() * (1 + 0.1 + 3.0 * (Y.float() - 0.1))[:, None, None])


def test_both_ends_of_an_interval_are_guided():
    """One step, whose middle is the interval's end."""
    for interval in ((0.0, 0.5), (0.5, 1.0), (0.5, 0.5)):
        guidance = fm.Guidance(3.0, {"y": 0.0}, interval=interval)
        found = fm.sample(lambda x, t, y: x * y[:, None, None], X0, method="euler", steps=1, cond={"y": Y}, guidance=guidance).x
        torch.testing.assert_close(found, X0 * (1 + 3.0 * Y[:, None, None]))


def test_null_values_of_other_dtypes_differ():
    one = fm.Guidance(2.0, {"y": torch.tensor([1.0])})
    assert one != fm.Guidance(2.0, {"y": torch.tensor([1])}) and one == fm.Guidance(2.0, {"y": torch.tensor([1.0])})


def test_null_values_of_other_kinds_differ():
    assert fm.Guidance(2.0, {"y": np.array([1.0])}) != fm.Guidance(2.0, {"y": [1.0]})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_conditions_are_refused_where_they_would_be_taken_apart(layout):
    """And passed on where guidance shares them."""
    texts = torch.nested.nested_tensor([torch.ones(i + 1, 2) for i in range(3)], layout=layout)

    def growing(x, t, y, texts):
        assert texts.is_nested
        return 0.5 * x

    def apart(x, t, y, texts):
        """Samples need more steps than others, and end later."""
        return torch.sin(9.0 * conditional(x, t, 5.0 * y))

    def solve(network=growing, **settings):
        return fm.sample(network, X0, cond={"y": LABELS, "texts": texts}, **settings)

    with pytest.raises(TypeError, match=r"cond\['texts'\] must not be nested where guidance doubles it; pad it"):
        solve(method="euler", steps=1, guidance=fm.Guidance(2.0, {"y": -1}))
    with pytest.raises(TypeError, match='cond must hold no nested tensors with per_sample="shrink"'):
        solve(apart, method="dopri5", per_sample="shrink")
    shared = solve(method="euler", steps=1, guidance=fm.Guidance(2.0, {"y": -1}, shared=("texts",)))
    torch.testing.assert_close(shared.x, 1.5 * X0)
