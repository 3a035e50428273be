"""Derivatives of every kind: first, second, forward mode, vmap, checkpointing, autocast, threads and processes."""

import multiprocessing
import threading
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fm_fast as fm

SEED, STEP = 21, 4
ARGUMENTS = {"seed": SEED, "step": STEP}


def tensor(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_model():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("path", "objective"), [("ot", "velocity"), ("vp", "scoreflow"), ("cosine", "score")])
def test_gradcheck_of_the_prediction(reduction, path, objective, backend):
    s = fm.sample_path(tensor(3, 2, 3), path=path, objective=objective, backend=backend, **ARGUMENTS)
    o = tensor(3, 2, 3, seed=2).requires_grad_()
    assert gradcheck(lambda o: s.loss(o, reduction=reduction), o)
    assert gradgradcheck(lambda o: s.loss(o, reduction=reduction), o)


@pytest.mark.parametrize("weight_shape", [(3,), (3, 1, 3)])
@pytest.mark.parametrize(("path", "objective"), [("ot", "velocity"), ("vp", "score"), ("ve", "data"), ("cosine", "noise")])
def test_gradcheck_of_every_other_input(path, objective, weight_shape, backend):
    o, x1, x0 = (tensor(3, 2, 3, seed=i).requires_grad_() for i in range(3))
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    weight = tensor(*weight_shape).abs().requires_grad_()

    def loss(o, x1, x0, t, weight):
        s = fm.sample_path(x1, x0=x0, t=t, path=path, objective=objective, backend=backend)
        return s.loss(o, weight), s.x_t

    assert gradcheck(loss, (o, x1, x0, t, weight))
    for i in range(5):
        inputs = [x if i == j else x.detach() for j, x in enumerate((o, x1, x0, t, weight))]
        assert gradcheck(loss, inputs)


def test_data_that_wants_its_gradient_gets_it_through_a_model(backend):
    """x1 may be an encoder's output: the exact gradient flows through x_t and through the target."""
    model, x1 = linear_model(), tensor(4, 6, dtype=torch.float32).requires_grad_()
    loss = fm.flow_matching_loss(lambda x, t: model(x), x1, backend=backend, **ARGUMENTS)
    got = torch.autograd.grad(loss, x1)[0]
    s = fm.sample_path(x1.detach(), **ARGUMENTS)
    free, t = x1.detach().requires_grad_(), s.t[:, None]
    naive = (model(t * free + (1 - t) * s.x0) - (free - s.x0)).square().mean()
    torch.testing.assert_close(got, torch.autograd.grad(naive, free)[0], rtol=1e-4, atol=1e-7)


class LearnedPath:
    """alpha = t, sigma = (1 - t) exp(scale t) with a trainable scale."""

    def __init__(self):
        self.scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def alpha(self, t):
        return t

    def sigma(self, t):
        return (1 - t) * torch.exp(self.scale * t)

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return (self.scale * (1 - t) - 1) * torch.exp(self.scale * t)


def test_a_path_with_parameters_trains(backend):
    path, x1, o = LearnedPath(), tensor(4, 6), tensor(4, 6, seed=2)

    def loss(scale):
        path.scale = scale
        return fm.sample_path(x1, path=path, backend=backend, **ARGUMENTS).loss(o)

    assert gradcheck(loss, path.scale)


def test_double_backward_equals_the_reference(backend):
    s, plain = (fm.sample_path(tensor(3, 6), backend=name, **ARGUMENTS) for name in (backend, "reference"))
    o = tensor(3, 6, seed=2).requires_grad_()

    def penalty(sample):
        gradient = torch.autograd.grad(sample.loss(o), o, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), o)[0]

    torch.testing.assert_close(penalty(s), penalty(plain))
    assert bool(penalty(s).abs().sum() > 0)


def test_jvp_is_right_and_not_silently_zero(backend):
    s = fm.sample_path(tensor(3, 6), backend=backend, **ARGUMENTS)
    o, direction = tensor(3, 6, seed=2), tensor(3, 6, seed=3)
    value, tangent = jvp(s.loss, (o,), (direction,))
    leaf = o.clone().requires_grad_()
    exact = (torch.autograd.grad(s.loss(leaf), leaf)[0] * direction).sum()
    torch.testing.assert_close(tangent, exact)
    torch.testing.assert_close(value, s.loss(o))
    with torch.autograd.forward_ad.dual_level():
        dual = s.loss(torch.autograd.forward_ad.make_dual(o, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, exact)


def test_jvp_through_the_whole_loss(backend):
    model, x1, direction = linear_model().double(), tensor(3, 6), tensor(3, 6, seed=3)

    def loss(x):
        return fm.flow_matching_loss(lambda x, t: model(x), x, backend=backend, **ARGUMENTS)

    tangent = jvp(loss, (x1,), (direction,))[1]
    torch.testing.assert_close(tangent, (vjp(loss, x1)[1](torch.ones((), dtype=torch.float64))[0] * direction).sum())
    assert abs(float(tangent.detach())) > 1e-3


@pytest.mark.parametrize("transform", [lambda loss: loss, grad], ids=["loss", "gradient"])
def test_a_map_over_data_without_sample_ids_tells_that_all_have_the_noise_of_the_first(transform):
    x1 = torch.zeros(4, 3)

    def loss(x, **given):
        return fm.flow_matching_loss(lambda x, t: x, x[None], **{"seed": 1, "step": 2, **given})

    def told(function, *mapped):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vmap(transform(function))(*mapped)
        return ["under vmap, where all of them draw the same noise then: give sample_ids" in str(one.message) for one in caught]

    steps = torch.arange(4)
    assert told(loss, x1) == [True]
    assert told(lambda x, i: loss(x, sample_ids=i), x1, steps) == [] == told(lambda x: loss(x, sample_ids=0), x1)
    assert told(lambda x, n: loss(x, step=n), x1, steps) == [] == told(lambda x, n: loss(x, seed=n), x1, steps)
    assert told(lambda scale: loss(x1[0] * 2.0) * scale.sum(), x1) == []


def test_per_sample_gradients_by_vmap_equal_the_loop(backend):
    """vmap over sample ids must give each sample the noise that it has in the batch."""
    model, x1 = linear_model().double(), tensor(5, 6)
    parameters = dict(model.named_parameters())

    def loss(parameters, x, sample_id):
        def network(x_t, t):
            return functional_call(model, parameters, (x_t,))

        return fm.flow_matching_loss(network, x[None], sample_ids=sample_id[None], backend=backend, **ARGUMENTS)

    batched = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x1, torch.arange(5))
    for i in range(5):
        alone = grad(loss)(parameters, x1[i], torch.tensor(i))
        torch.testing.assert_close({name: g[i] for name, g in batched.items()}, alone)
    mean = fm.flow_matching_loss(lambda x, t: model(x), x1, backend=backend, **ARGUMENTS)
    mean.backward()
    torch.testing.assert_close(batched["weight"].mean(0), model.weight.grad)


def test_func_grad_of_a_sample_drawn_outside(backend):
    s = fm.sample_path(tensor(3, 6), backend=backend, **ARGUMENTS)
    o = tensor(3, 6, seed=2)
    leaf = o.clone().requires_grad_()
    torch.testing.assert_close(grad(s.loss)(o), torch.autograd.grad(s.loss(leaf), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batched_grad_outputs(dtype, backend):
    s = fm.sample_path(tensor(3, 6, dtype=torch.float32), backend=backend, **ARGUMENTS)
    o = tensor(3, 6, seed=2).to(dtype).requires_grad_()
    rows = torch.autograd.grad(s.loss(o, reduction="none"), o, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    whole = torch.autograd.grad(s.loss(o, reduction="none"), o, torch.ones(3))[0]
    assert torch.equal(rows, torch.diag_embed(whole.T).permute(1, 2, 0))
    loss = s.loss(o, reduction="none")
    mapped = torch.vmap(lambda v: torch.autograd.grad(loss, o, v, retain_graph=True)[0])(torch.eye(3))
    assert torch.equal(mapped, rows)
    multiples = torch.autograd.grad(s.loss(o), o, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    assert torch.equal(multiples[1], 2 * multiples[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_reentrant_checkpointing(dtype, backend):
    x1, o = tensor(4, 6, dtype=torch.float32), tensor(4, 6, seed=2).to(dtype).requires_grad_()

    def loss(o):
        return fm.sample_path(x1, backend=backend, **ARGUMENTS).loss(o * 2)

    checkpointed = torch.autograd.grad(checkpoint(loss, o, use_reentrant=False), o)[0]
    assert torch.equal(checkpointed, torch.autograd.grad(loss(o), o)[0])


def test_bf16_autocast(backend):
    model, x1 = linear_model(), tensor(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fm.flow_matching_loss(lambda x, t: model(x), x1, backend=backend, **ARGUMENTS)
    loss.backward()
    exact = fm.flow_matching_loss(lambda x, t: model(x), x1, backend=backend, **ARGUMENTS)
    assert loss.dtype == torch.float32
    assert model.weight.grad.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-2)


def test_the_transform_guard_finds_the_names_it_relies_on():
    assert fm._modes.transforms_active() is False
    inside = []
    grad(lambda x: (inside.append(fm._modes.transforms_active()), x.sum())[1])(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        inside.append(fm._modes.transforms_active())
    assert inside == [True, True]


def test_threads_get_the_same_numbers(backend):
    x1, o = tensor(8, 3, 9, 9, dtype=torch.float32), tensor(8, 3, 9, 9, seed=2, dtype=torch.float32)
    expected = [fm.sample_path(x1, seed=SEED, step=i, backend=backend).loss(o) for i in range(8)]
    results = [None] * 8

    def work(i):
        results[i] = [fm.sample_path(x1, seed=SEED, step=i, backend=backend).loss(o) for _ in range(20)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(loss, expected[i]) for i in range(8) for loss in results[i])


class Points(torch.utils.data.Dataset):
    """Draws its noise inside the loader's worker processes."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return fm.sample_path(torch.ones(2, 3, 8, 8), seed=SEED, step=i).x_t


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    # threads of this process are running when the workers are forked
    expected = [Points()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(Points(), batch_size=None, num_workers=1, multiprocessing_context=method)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


def test_fake_tensors_pass_through(backend):
    with torch._subclasses.FakeTensorMode():
        o = torch.empty(4, 6, requires_grad=True)
        s = fm.sample_path(torch.empty(4, 6), t=torch.empty(4), backend=backend, **ARGUMENTS)
        s.loss(o).backward()
        assert o.grad.shape == (4, 6)
