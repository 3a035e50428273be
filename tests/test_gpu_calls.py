"""Every public function with its data on a GPU gives what it gives on the CPU, by the backend that is chosen there."""

import pytest
import torch

import fm_fast as fm
from fm_fast import nn as networks
from fm_fast.compat import flow_matching, torchcfm, torchdiffeq, transport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPE = (4, 2, 8, 8)
NOISE = {"seed": 5, "step": 3}
ADAPTIVE = {"method": "dopri5", "rtol": 1e-7, "atol": 1e-7}


def normals(device, seed=1, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def network(x, t, shift=0.0):
    return torch.sin(2 * x + shift) - x.roll(1, -1) * t.reshape(-1, *[1] * (x.dim() - 1))


def conditional(x, t, y):
    return network(x, t) * (1 + 0.1 * y.reshape(-1, *[1] * (x.dim() - 1)))


def labels(device, shift=0):
    return torch.arange(SHAPE[0], device=device) + shift


def sampled(**settings):
    return lambda device: fm.sample(network, normals(device), **settings).x


def likelihood(**settings):
    def call(device):
        found = fm.log_likelihood(network, normals(device), **{"steps": 4, "seed": 1} | settings)
        return found.logp, found.x0

    return call


def guided(device):
    guidance = fm.Guidance(2.0, {"y": labels(device, 5)}, interval=(0.25, 0.75))
    return fm.sample(conditional, normals(device), cond={"y": labels(device)}, guidance=guidance, steps=4).x


def saved(device):
    found = fm.sample(network, normals(device), save=[0.1, 0.5, 0.9], **ADAPTIVE)
    return found.x, found.saved


def with_gradients(grad, **settings):
    def call(device):
        x, scale = normals(device).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
        found = fm.sample(lambda x, t: scale * network(x, t), x, grad=grad, **settings).x
        return torch.autograd.grad(found.square().sum(), (x, scale))

    return call


def loss(**settings):
    def call(device):
        x1, scale = normals(device), torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
        value = fm.flow_matching_loss(lambda x, t: scale * network(x, t), x1, **NOISE, **settings)
        return value, *torch.autograd.grad(value.sum(), scale)

    return call


def masked(device):
    weight = (torch.arange(8, device=device) < 5).to(torch.float64).expand(1, 1, 8, 8)
    return loss(weight=weight, reduction="weighted_mean")(device)


def of_bytes(device):
    whole = torch.arange(SHAPE[0] * 128, dtype=torch.uint8).reshape(SHAPE).to(device)
    s = fm.sample_path(whole, flip=0.5, dequantise=True, dtype=torch.float64, **NOISE)
    return s.x_t, s.t, s.x0, s.target


def bits(device):
    whole = torch.arange(SHAPE[0] * 8, dtype=torch.uint8).reshape(SHAPE[0], 8).to(device)
    found = fm.bits_per_dim(network, whole, steps=3, seed=1, draws=2, dtype=torch.float64)
    return found.bpd, found.logp


def paired(device):
    x1 = normals(device, 2, (16, 3))
    return fm.couplings.optimal_ids(x1, seed=3, step=1), fm.couplings.optimal_order(normals(device, 3, (16, 3)), x1)


def unet(device):
    config = networks.UNetConfig(8, 1, 3, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(4,), head_channels=8, groups=4)
    torch.manual_seed(0)
    net = networks.UNet(config).double()
    with torch.no_grad():
        for parameter in net.parameters():  # the last layers begin as zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    net, times = net.to(device), torch.linspace(0.1, 0.9, 4, dtype=torch.float64, device=device)
    value = net(normals(device, 4, (4, 1, 8, 8)), times, labels(device) % 3)
    return value, *torch.autograd.grad(value.square().sum(), list(net.parameters()))


def by_torchcfm(device):
    matcher = torchcfm.conditional_flow_matching.ConditionalFlowMatcher(sigma=0.1)
    return matcher.compute_mu_t(normals(device), normals(device, 2), torch.linspace(0, 1, 4, dtype=torch.float64, device=device))


def by_flow_matching(device):
    path = flow_matching.path.CondOTProbPath()
    found = path.sample(x_0=normals(device), x_1=normals(device, 2), t=torch.linspace(0, 1, 4, dtype=torch.float64, device=device))
    solver = flow_matching.solver.ODESolver(velocity_model=lambda x, t: network(x, t.expand(len(x))))
    solved = solver.sample(x_init=normals(device), step_size=0.25, method="midpoint")
    return found.x_t, found.dx_t, solved


def by_torchdiffeq(**settings):
    def call(device):
        times = torch.linspace(0, 1, 4, dtype=torch.float64, device=device)
        return torchdiffeq.odeint(lambda t, y: torch.sin(y) * torch.cos(t), normals(device), times, **settings)

    return call


def by_transport(device):
    made = transport.create_transport()
    sample_fn = transport.Sampler(made).sample_ode(sampling_method="euler", num_steps=5)
    return sample_fn(normals(device), network)[-1]


CALLS = {
    **{f"sample, {method}": sampled(method=method, steps=4) for method in ("euler", "midpoint", "heun2", "rk4", "ab2", "ab3")},
    **{f"sample, {path}": sampled(steps=4, path=path, objective="noise", t1=0.9) for path in ("ot", "vp", "ve", "cosine")},
    "sample, dopri5": sampled(**ADAPTIVE),
    "sample, each its own steps": sampled(per_sample=True, **ADAPTIVE),
    "sample, those at work": sampled(per_sample="shrink", **ADAPTIVE),
    "sample, churn": sampled(steps=4, churn=2.0, **NOISE),
    "sample, guided": guided,
    "sample, saved": saved,
    "encode": lambda device: fm.encode(network, normals(device), steps=4).x,
    **{f"gradients, {grad}": with_gradients(grad, steps=4) for grad in ("direct", "checkpoint")},
    "divergence": lambda device: fm.divergence(network, normals(device), 0.3, kind="rademacher", probes=3, seed=1).div,
    **{f"likelihood, {kind}": likelihood(kind=kind, probes=4) for kind in ("rademacher", "gaussian", "hadamard", "coloured")},
    "likelihood, exact": lambda device: fm.log_likelihood(network, normals(device, shape=(4, 3)), steps=4, kind="exact").logp,
    "likelihood, batched": likelihood(kind="rademacher", probes=4, mode="batched"),
    "likelihood, dopri5": likelihood(kind="rademacher", steps=None, **ADAPTIVE),
    "likelihood, each its own steps": likelihood(kind="rademacher", steps=None, per_sample=True, **ADAPTIVE),
    "likelihood, error estimate": likelihood(kind="rademacher", error_estimate=True),
    "sample_with_log_prob": lambda device: fm.sample_with_log_prob(network, normals(device), steps=3, seed=1).logp,
    "bits_per_dim": bits,
    **{f"loss, {path}": loss(path=path, objective="noise") for path in ("ot", "vp", "ve", "cosine")},
    **{f"loss, {sampler}": loss(t_sampler=sampler) for sampler in ("stratified", "logit-normal")},
    "loss, of each": loss(reduction="none"),
    "loss, masked": masked,
    "sample_path, of bytes": of_bytes,
    "noise": lambda device: fm.noise((5, 7), seed=1, step=2, dtype=torch.float64, device=device),
    "couplings": paired,
    "convert": lambda device: fm.convert(normals(device), normals(device, 2), 0.3, to="noise"),
    "unet": unet,
    "torchcfm": by_torchcfm,
    "flow_matching": by_flow_matching,
    "torchdiffeq, dopri5": by_torchdiffeq(method="dopri5"),
    "torchdiffeq, rk4": by_torchdiffeq(method="rk4"),
    "transport": by_transport,
}
# Normal numbers are those of the CPU up to roundings of float32; all else is float64.
WITH_NORMALS = {
    name for name in CALLS if name.startswith("loss") or name in ("sample, churn", "likelihood, gaussian", "sample_path, of bytes", "noise")
}


@pytest.fixture(params=["cuda:0", "cuda:1", "another stream"])
def device(request):
    """Where the data are: on the current device, on another, or on the current one with another current stream."""
    if request.param == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if request.param != "another stream":
        yield request.param
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield "cuda:0"


@pytest.mark.filterwarnings("ignore:the finite number of steps", "ignore:objective 'noise' does not determine")
@pytest.mark.parametrize("name", CALLS)
def test_the_device_gives_what_the_cpu_gives(name, device):
    call, error = CALLS[name], 1e-5 if name in WITH_NORMALS else 1e-10
    for found, wanted in zip(tensors(call(device)), tensors(call("cpu")), strict=True):
        assert str(found.device) == device
        torch.testing.assert_close(found.cpu(), wanted, rtol=error, atol=error)


def tensors(found):
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)
