"""fm.divergence against the trace of the Jacobian by forward-mode differentiation, and what it does to the model and its memory."""

import flows
import pytest
import torch
from likelihood_cases import points, velocity
from torch import nn

import fm_fast as fm
from fm_fast.objectives import velocity_range

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
SHAPES = [(3, 5), (2, 3, 4), (2, 2, 3, 4), (2, 3, 2, 2, 2), (4, 1), (3,)]
KINDS = ("exact", "rademacher", "gaussian", "hadamard", "coloured")
PATHS = {"ot": fm.OT(), "vp": fm.VP(), "ve": fm.VE(), "cosine": fm.Cosine()}


class Mixing(nn.Module):
    """A smooth network that mixes all elements of a sample."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(size)
        self.first = nn.Parameter(torch.randn(size, 7, generator=generator, dtype=torch.float64).to(dtype) / size**0.5)
        self.second = nn.Parameter(torch.randn(7, size, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x, t, shift=0.0):
        scale = (1 + t).to(x.dtype).reshape(-1, 1)
        return (torch.tanh(x.reshape(len(x), len(self.first)) @ self.first * scale + shift) @ self.second).reshape(x.shape)


def inputs(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, Mixing(x[0].numel(), dtype)


def jacobian_trace(velocity, x, t):
    """tr dv/dx [B] of each sample, from the full Jacobian."""
    traces = []
    for i in range(len(x)):
        size = x[i].numel()
        jacobian = torch.func.jacfwd(lambda y, i=i: velocity(y[None], t[i : i + 1])[0])(x[i])
        traces.append(jacobian.reshape(size, size).diagonal().sum())
    return torch.stack(traces)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["loop", "batched", "auto"])
def test_exact_is_the_trace_of_the_jacobian_for_any_shape(shape, mode, backend):
    x, model = inputs(shape)
    t = torch.linspace(0.1, 0.9, len(x), dtype=torch.float64)
    d = fm.divergence(model, x, t, kind="exact", mode=mode, backend=backend)
    torch.testing.assert_close(d.div, jacobian_trace(model, x, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d.v, model(x, t).detach(), rtol=1e-14, atol=0)
    assert torch.equal(d.std_err, torch.zeros_like(d.div))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", ["noise", "score", "scoreflow", "data"])
def test_the_divergence_is_that_of_the_velocity_whatever_the_network_predicts(path, objective):
    x, model = inputs((3, 6))
    t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)

    def velocity(y, at):
        p, r = fm.objectives.velocity_coefficients(path, objective, at)
        return p[:, None] * y + r[:, None] * model(y, at)

    d = fm.divergence(model, x, t, path=path, objective=objective, kind="exact")
    torch.testing.assert_close(d.div, jacobian_trace(velocity, x, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d.v, velocity(x, t).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "scoreflow", "data"])
def test_at_an_end_the_model_is_asked_where_its_velocity_is_finite(path, objective, end):
    """As solves do: an output at t = 0 would be divided by the alpha of another time."""
    field = flows.mixture(path)
    x = inputs((3, 2))[0]
    inside = min(max(end, velocity_range(path, objective)[0]), velocity_range(path, objective)[1])
    d = fm.divergence(field.model(objective), x, end, path=path, objective=objective)
    torch.testing.assert_close(d.v, field.velocity(x, inside), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.div, field.divergence(x, inside), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "hadamard", "coloured", "gaussian"])
def test_the_estimate_is_z_J_z_of_the_probes_of_the_noise_contract(kind, backend):
    """The probes drawn by hand from fm.noise, with the published colours and rows where they are structured."""
    shape, ids = (2, 3, 4, 4), torch.tensor([5, 900])
    x, model = inputs(shape)
    d = fm.divergence(model, x, 0.4, kind=kind, probes=4, replicates=2, seed=9, step=7, sample_ids=ids, backend=backend)
    z = probes_by_hand(kind, shape, ids)
    products = torch.stack(
        [torch.autograd.functional.vjp(lambda y: model(y, torch.full((2,), 0.4, dtype=torch.float64)), x, row)[1] for row in z]
    )
    dots = (z * products).flatten(2).sum(2)
    groups = dots if kind in ("rademacher", "gaussian") else dots.reshape(2, 4, 2).mean(1)
    tolerance = 1e-5 if kind == "gaussian" else 1e-10  # normals are those of another backend, to a few units in the last place
    torch.testing.assert_close(d.div, groups.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d.std_err, groups.std(0) / len(groups) ** 0.5, rtol=tolerance, atol=tolerance)


def probes_by_hand(kind, shape, ids):
    """[8, B, ...]: 4 probes in 2 replicates."""
    draw = {"seed": 9, "step": 7, "stream": "probe", "sample_ids": ids, "dtype": torch.float64}
    if kind in ("rademacher", "gaussian"):
        name = "sign" if kind == "rademacher" else "normal"
        return torch.stack([fm.noise(shape, index=q, kind=name, **draw) for q in range(8)])
    rows, codes = [0, 1, 2, 3] * 2, colours_by_hand(shape)
    if kind == "hadamard":
        codes = range(48)
        words = [fm.noise((1, 64), seed=9, step=7, stream="probe_rows", index=g)[0].tolist() for g in range(2)]
        rows = [row for word in words for row in sorted(range(64), key=lambda i, word=word: -word[i])[:4]]
    z = []
    for q, row in enumerate(rows):
        hadamard = torch.tensor([(-1.0) ** bin(code & row).count("1") for code in codes], dtype=torch.float64)
        z.append(fm.noise(shape, index=q // 4, kind="sign", **draw) * hadamard.reshape(shape[1:]))
    return torch.stack(z)


def colours_by_hand(shape):
    """Two by two blocks, shifted by (1, 1) in channel 1 and by one coordinate in channel 2."""
    shifts = {0: (0, 0), 1: (1, 1), 2: (1, 0)}
    return [
        ((y + shifts[c][0]) % 2) + 2 * ((x + shifts[c][1]) % 2) for c in range(shape[1]) for y in range(shape[2]) for x in range(shape[3])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_loop_and_batches_give_the_same(kind):
    x, model = inputs((3, 2, 4, 4))
    results = [fm.divergence(model, x, 0.5, kind=kind, probes=4, replicates=2, mode=mode, seed=3) for mode in ("loop", "batched")]
    limited = fm.divergence(model, x, 0.5, kind=kind, probes=4, replicates=2, memory_budget=20_000, seed=3)
    for other in (results[1], limited):
        torch.testing.assert_close(results[0].div, other.div, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(results[0].std_err, other.std_err, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["hadamard", "coloured", "auto"])
def test_as_many_probes_as_elements_are_exact(kind):
    x, model = inputs((3, 2, 2, 2))
    d = fm.divergence(model, x, 0.5, kind=kind, probes=8, seed=0)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(d.div, jacobian_trace(model, x, t), rtol=1e-12, atol=1e-12)
    assert torch.equal(d.std_err, torch.zeros_like(d.div))


@pytest.mark.parametrize(
    ("kind", "probes", "replicates", "known"),
    [
        ("rademacher", 1, 1, False),
        ("rademacher", 2, 1, True),
        ("rademacher", 1, 2, True),
        ("hadamard", 4, 1, False),
        ("hadamard", 4, 2, True),
        ("coloured", 4, 1, False),
        ("coloured", 4, 3, True),
    ],
)
def test_a_standard_error_needs_two_independent_groups(kind, probes, replicates, known):
    x, model = inputs((2, 3, 4, 4))
    d = fm.divergence(model, x, 0.5, kind=kind, probes=probes, replicates=replicates, seed=0)
    assert (d.std_err is not None) == known


def test_small_samples_are_exact_by_default():
    x, model = inputs((5, 4))
    assert torch.equal(fm.divergence(model, x, 0.5).std_err, torch.zeros(5, dtype=torch.float64))
    x, model = inputs((5, 5))
    assert fm.divergence(model, x, 0.5, seed=0).std_err is None


def test_a_sample_does_not_depend_on_its_batch(backend):
    x, model = inputs((6, 3, 4, 4))
    whole = fm.divergence(model, x, 0.5, probes=3, seed=4, step=2, sample_ids=10, backend=backend)
    parts = [fm.divergence(model, x[i : i + 2], 0.5, probes=3, seed=4, step=2, sample_ids=10 + i, backend=backend) for i in (0, 2, 4)]
    torch.testing.assert_close(whole.div, torch.cat([part.div for part in parts]), rtol=1e-12, atol=1e-12)


def test_the_same_seed_repeats_bit_for_bit_and_another_step_does_not():
    x, model = inputs((4, 3, 4, 4), torch.float32)
    first, again, other = (fm.divergence(model, x, 0.5, seed=4, step=step).div for step in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    """bfloat16 keeps 8 bits: the trace of a network of a few dozen terms is right to a few percent of the terms' sum."""
    x, model = inputs((3, 2, 3, 3), dtype)
    d = fm.divergence(model, x, 0.5, kind="exact")
    wide = Mixing(18)
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    expected = jacobian_trace(wide, x.double(), torch.full((3,), 0.5, dtype=torch.float64))
    assert d.div.dtype == torch.float32 and d.v.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    assert float((d.div - expected).detach().abs().max()) < tolerance


def test_channels_last_images_give_the_same_estimate(backend):
    convolution = nn.Conv2d(3, 3, 3, padding=1).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    arguments = {"kind": "coloured", "probes": 4, "seed": 1, "backend": backend}
    plain = fm.divergence(lambda y, t: convolution(y), x, 0.5, **arguments)
    last = convolution.to(memory_format=torch.channels_last)
    other = fm.divergence(lambda y, t: last(y), x.to(memory_format=torch.channels_last), 0.5, **arguments)
    torch.testing.assert_close(plain.div, other.div, rtol=1e-12, atol=1e-12)


def test_guidance_at_times_of_each_sample():
    x, shift = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[0.5], [1.0], [-1.0]], dtype=torch.float64)
    times, guidance = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), fm.Guidance(2.5, {"shift": 0.0}, interval=(0.3, 0.7))

    def model(y, t, shift):
        return torch.sin(y + shift) * t[:, None]

    together = fm.divergence(model, x, times, cond={"shift": shift}, guidance=guidance, kind="exact")
    for i, t in enumerate(times.tolist()):
        row = slice(i, i + 1)
        alone = fm.divergence(model, x[row], t, cond={"shift": shift[row]}, guidance=guidance, kind="exact")
        torch.testing.assert_close((alone.v[0], alone.div[0]), (together.v[i], together.div[i]), rtol=1e-12, atol=1e-12)


def test_guidance_mixes_the_divergences():
    x, model = inputs((3, 6))
    shift = torch.tensor([[0.3], [0.5], [0.7]], dtype=torch.float64)
    guidance = fm.Guidance(2.5, {"shift": 0.0})
    d = fm.divergence(model, x, 0.5, cond={"shift": shift}, guidance=guidance, kind="exact")
    with_shift = fm.divergence(model, x, 0.5, cond={"shift": shift}, kind="exact").div
    without = fm.divergence(model, x, 0.5, kind="exact").div
    torch.testing.assert_close(d.div, without + 2.5 * (with_shift - without), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "rademacher", "coloured"])
def test_create_graph_gives_the_derivatives_of_the_estimate(kind):
    x, model = inputs((2, 2, 2, 3))
    x = x[:, :, :, :2].clone().requires_grad_() if kind == "exact" else x.requires_grad_()
    model = Mixing(x[0].numel())

    def estimate(y):
        return fm.divergence(model, y, 0.5, kind=kind, probes=2, seed=3, create_graph=True).div

    assert torch.autograd.gradcheck(estimate, (x,))
    estimate(x).sum().backward()
    assert model.first.grad is not None and bool((model.first.grad != 0).any())
    step = 1e-6
    with torch.no_grad():
        slope = model.first.grad[0, 0].clone()
        model.first[0, 0] += step
        above = estimate(x.detach()).sum()
        model.first[0, 0] -= 2 * step
        below = estimate(x.detach()).sum()
    assert float(slope) == pytest.approx(float((above - below) / (2 * step)), rel=1e-5)


def test_parameters_are_frozen_meanwhile_and_restored():
    x, model = inputs((2, 6))
    model.second.requires_grad_(False)
    seen = []
    model.register_forward_hook(lambda *_: seen.append([p.requires_grad for p in model.parameters()]))
    d = fm.divergence(model, x, 0.5, seed=0)
    assert seen == [[False, False]]
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert model.first.grad is None and not d.div.requires_grad and not d.v.requires_grad

    def broken(module, arguments):
        raise KeyError("broken")

    model.register_forward_pre_hook(broken)
    with pytest.raises(KeyError):
        fm.divergence(model, x, 0.5, seed=0)
    assert model.first.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode_will_do(context):
    x, model = inputs((2, 6))
    expected = fm.divergence(model, x, 0.5, kind="exact").div
    with context():
        assert torch.equal(fm.divergence(model, x, 0.5, kind="exact").div, expected)


def test_the_callers_times_are_left_alone():
    def model(x, t):
        t *= 1000.0
        return x * t.reshape(-1, *[1] * (x.dim() - 1)) / 1000.0

    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64)
    found = fm.divergence(model, x, t)
    assert t.tolist() == [0.25, 0.5] and torch.equal(found.div, 3.0 * t)
    assert torch.equal(fm.divergence(model, x, 0.5).div, torch.full_like(t, 1.5))


def test_the_callers_tensors_are_left_alone():
    x, model = inputs((2, 6))
    before = x.clone()
    fm.divergence(model, x, 0.5, seed=0)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


def test_empty_batches_and_samples_without_elements():
    _, model = inputs((2, 6))
    for kind in ("exact", "rademacher"):
        assert fm.divergence(model, torch.empty(0, 6, dtype=torch.float64), 0.5, kind=kind, seed=0).div.shape == (0,)
    d = fm.divergence(lambda x, t: 2 * x, torch.empty(3, 0), 0.5)
    assert torch.equal(d.div, torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"probes": 2.5}, "probes must be a whole number, got float"),
        ({"replicates": 0}, "replicates must be at least 1"),
        ({"kind": "radmacher"}, "kind must be one of auto, exact, rademacher"),
        ({"mode": "fast"}, "mode must be one of auto, loop, batched"),
        ({"memory_budget": 0}, "memory_budget must be at least 1"),
        ({"kind": "coloured", "probes": 3}, "probes must be a power of two"),
        ({"seed": -1}, r"seed must lie in \[0"),
        ({"create_graph": 1}, "create_graph must be True or False, got 1"),
        ({"guidance": 2.0}, "guidance must be a fm_fast.Guidance"),
        ({"path": "vpp"}, "path must be one of"),
        ({"objective": "v"}, "objective must be one of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    x, model = inputs((2, 3, 4, 4))
    with pytest.raises((ValueError, TypeError), match=message):
        fm.divergence(model, x, 0.5, **arguments)


def test_bad_inputs_and_models():
    x, model = inputs((2, 6))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got 1.5"):
        fm.divergence(model, x, 1.5)
    with pytest.raises(ValueError, match=r"shape \[2\], got \(3,\)"):
        fm.divergence(model, x, torch.zeros(3))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        fm.divergence(model, [1.0], 0.5)
    with pytest.raises(TypeError, match=r"x must be float64, .* got torch\.int64"):
        fm.divergence(model, torch.zeros(2, 6, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match='kind="coloured" needs samples'):
        fm.divergence(model, x, 0.5, kind="coloured", probes=2)
    with pytest.raises(ValueError, match=r"model must return the shape of its input, \(2, 6\), got \(2, 5\)"):
        fm.divergence(lambda y, t: y[:, :5], x, 0.5)
    with pytest.raises(TypeError, match=r"model must return a torch\.Tensor, got tuple"):
        fm.divergence(lambda y, t: (y,), x, 0.5)
    with pytest.raises(RuntimeError, match="no_grad or detach"):
        fm.divergence(torch.no_grad()(model), x, 0.5)
    with pytest.raises(RuntimeError, match="does not depend on x"):
        fm.divergence(lambda y, t: torch.ones(2, 6, requires_grad=True) * 2, x, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'probe'"):
        fm.divergence(model, x, 0.5, probe=3)


def test_a_negative_factor_leaves_errors_positive():
    """The noise's factor in the velocity is negative."""
    d = fm.divergence(lambda x, t: torch.sin(3 * x), points(3, 6), 0.5, objective="noise", probes=4, kind="gaussian", seed=1)
    assert bool((d.std_err > 0.0).all())


@pytest.mark.parametrize(("memory_budget", "passes"), [(1, 4), (1 << 20, 1)])
def test_the_memory_budget_says_how_many_at_once(memory_budget, passes):
    seen = []

    def model(x, t):
        out = velocity(x, t)
        out.register_hook(lambda g: seen.append(1))
        return out

    d = fm.divergence(model, points(2, 6), 0.5, probes=4, kind="gaussian", seed=0, memory_budget=memory_budget)
    assert len(seen) == passes and d.div.shape == (2,)
