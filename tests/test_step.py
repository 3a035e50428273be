"""The training step: parts of a batch, non-finite gradients, 16-bit weights, dropout keys, resuming, and no waiting for a device."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_helpers import CPU, TINY_NET, advance, assert_same_state, flat, tiny

import fm_fast as fm
from fm_fast import sample_path
from fm_fast.nn import Preconditioned, UNet
from fm_fast.train.config import from_dict, to_dict
from fm_fast.train.data import DataOrder, digits
from fm_fast.train.step import Batch, Share, by_quartile, network_of, new_state, sample_losses, training_step

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"label_drop": 0.3, "flip": 0.5, "dequantise": True, "clip": 0.0}


def first_moments(state):
    """A tenth of the gradients of the first step, if they were not clipped."""
    return torch.cat([state.optimiser.state[p]["exp_avg"].flatten() for p in state.model.parameters()])


def one_step(config, **arguments):
    """(state, loss) after one step from weights that are not zero anywhere."""
    state, data = new_state(config, CPU), digits()
    with torch.no_grad():
        for i, p in enumerate(state.model.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype))
    return state, training_step(state, config, data, DataOrder(len(data), config.seed), **arguments)


@pytest.mark.parametrize("objective", ["fm-ot", "scoreflow"])
@pytest.mark.parametrize("size", [4, 5, 1])
def test_micro_batches_add_up_to_the_batch(size, objective):
    whole, loss = one_step(tiny(objective=objective, **SETTINGS))
    parts, sum_of_parts = one_step(tiny(objective=objective, micro_batch=size, **SETTINGS))
    torch.testing.assert_close(sum_of_parts.mean, loss.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum_of_parts.by_quartile, loss.by_quartile, rtol=1e-5, atol=1e-6)
    scale = float(first_moments(whole).abs().max())
    torch.testing.assert_close(first_moments(parts), first_moments(whole), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("model", [TINY_NET, dataclasses.replace(TINY_NET, classes=0)], ids=["classes", "no classes"])
def test_noise_is_paired_within_the_classes_of_a_share(model, monkeypatch):
    points, draw = [], sample_path
    monkeypatch.setattr("fm_fast.train.step.sample_path", lambda *inputs, **named: (points.append(draw(*inputs, **named)), points[-1])[1])
    config = tiny(coupling="optimal", batch_size=64, micro_batch=11, model=model, conditional=model.classes > 0, **SETTINGS)
    state, data = new_state(config, CPU), digits()
    order = DataOrder(len(data), 0)
    training_step(state, config, data, order, share=Share(1, 2))
    images, labels = data.batch(order.indices(32, 32))
    noise = torch.cat([point.x0 for point in points])
    drawn = fm.noise((32, 1, 8, 8), seed=0, step=0, sample_ids=32)
    ids = [int((drawn == row).flatten(1).all(1).nonzero()) for row in noise]
    assert sorted(ids) == list(range(32)) != ids
    if model.classes:
        assert torch.equal(labels[ids], labels)
    expected = fm.couplings.optimal_ids(images, seed=0, step=0, sample_ids=32, labels=labels if model.classes else None, flip=0.5)
    assert torch.equal(torch.tensor(ids) + 32, expected)


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_a_batch_average_to_the_whole(world):
    whole, loss = one_step(tiny(**SETTINGS))
    parts = [one_step(tiny(micro_batch=3, **SETTINGS), share=Share(rank, world)) for rank in range(world)]
    torch.testing.assert_close(torch.stack([part.mean for _, part in parts]).mean(), loss.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack([part.by_quartile for _, part in parts]).sum(0), loss.by_quartile, rtol=1e-5, atol=1e-6)
    averaged = torch.stack([first_moments(state) for state, _ in parts]).mean(0)
    torch.testing.assert_close(averaged, first_moments(whole), rtol=1e-4, atol=1e-5 * float(averaged.abs().max()))


def test_a_batch_that_cannot_be_shared():
    assert [list(Share(rank, 3).samples(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the number of processes, 3, got 16"):
        Share(0, 3).samples(16)


class Network(nn.Module):
    """Calls another one, and says so; `no_sync` as DistributedDataParallel has it."""

    def __init__(self, model, factor=1.0):
        super().__init__()
        self.model, self.factor, self.events = model, factor, []

    def forward(self, *arguments, **conditions):
        self.events.append("forward")
        return self.factor * self.model(*arguments, **conditions)

    def no_sync(self):
        self.events.append("no_sync")
        return torch.autograd.profiler.record_function("no_sync")


def test_gradients_are_sent_with_the_last_micro_batch_only():
    config, data = tiny(micro_batch=6), digits()
    state = new_state(config, CPU)
    network = Network(state.model)
    training_step(state, config, data, DataOrder(len(data), 0), network=network)
    assert network.events == ["no_sync", "forward", "no_sync", "forward", "forward"]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(factor):
    config, data = tiny(), digits()
    order = DataOrder(len(data), config.seed)
    state = new_state(config, CPU)
    advance(state, config, data, 2)
    before = copy.deepcopy((flat(state.model), flat(state.average)))
    with torch.no_grad():
        state.model.head.bias.fill_(1.0)  # so that the output is not zero
    bias = state.model.head.bias.detach().clone()
    loss = training_step(state, config, data, order, network=Network(state.model, factor))
    assert not torch.isfinite(loss.mean) and torch.equal(loss.by_quartile, torch.zeros(2, 4))
    assert (int(state.optimiser.updates), int(state.optimiser.skipped), state.step) == (2, 1, 3)
    assert torch.equal(state.model.head.bias, bias) and torch.equal(flat(state.average), before[1])
    assert torch.equal(flat(state.model)[: -bias.numel()], before[0][: -bias.numel()])
    assert bool(torch.isfinite(training_step(state, config, data, order).mean)) and int(state.optimiser.updates) == 3


class Syncs(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers read from tensors, and sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.ops, self.found = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += 1
        if any(str(op).startswith(f"aten.{name}") for name in self.NAMES):
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("changes", [{}, {"objective": "scoreflow"}, {"precision": "bfloat16", "micro_batch": 5}], ids=str)
def test_a_step_never_waits_for_the_device(changes, backend, monkeypatch):
    monkeypatch.setattr("fm_fast._backends.ENVIRONMENT_BACKEND", backend)
    monkeypatch.setattr("fm_fast._modes.values_readable", lambda x: False)  # as on a GPU: only values on the CPU are checked
    config, data = tiny(ema_widths=(0.1,), **SETTINGS, **changes), digits()
    state, order = new_state(config, CPU), DataOrder(len(data), 0)
    training_step(state, config, data, order)
    with Syncs() as syncs:
        for _ in range(2):
            training_step(state, config, data, order)
        assert syncs.found == [] and syncs.ops > 100
        float(torch.ones(()))
    assert syncs.found == ["aten._local_scalar_dense.default"]


class Dropping(nn.Module):
    """A U-Net within a network; notes the key of its dropout noise at every call."""

    def __init__(self):
        super().__init__()
        self.inner = UNet(dataclasses.replace(TINY_NET, dropout=0.5))
        self.seen = []

    def forward(self, x, t, y):
        self.seen.append(self.inner.dropout_key.tolist())
        return self.inner(x, t, y=y)


def test_the_key_of_the_dropout_noise_is_filled_in_place(monkeypatch):
    monkeypatch.setattr("fm_fast.train.step.build_model", lambda config, weights=None: Dropping())
    config, data = tiny(micro_batch=6, seed=7), digits()
    state, order = new_state(config, CPU), DataOrder(len(data), 7)
    place = state.model.inner.dropout_key.data_ptr()
    for _ in range(2):
        training_step(state, config, data, order)
    assert state.model.seen == [[7, step, first] for step in (0, 1) for first in (0, 6, 12)]
    assert state.model.inner.dropout_key.data_ptr() == place
    training_step(state, config, data, order, share=Share(1, 2))
    assert state.model.seen[-2:] == [[7, 2, 8], [7, 2, 14]]


def test_losses_by_quartile_of_t():
    t = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.9, 1.0, 0.99])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.nan])
    assert by_quartile(losses, t).tolist() == [[3.0, 4.0, 8.0, 48.0], [2.0, 1.0, 1.0, 2.0]]
    config = tiny(batch_size=64)
    _, loss = one_step(config)
    sums, counts = loss.by_quartile
    assert counts.sum() == 64 and counts.min() >= 15  # stratified
    torch.testing.assert_close(sums.sum() / 64, loss.mean)


@pytest.mark.parametrize("t_sampler", ["uniform", "logit-normal", "stratified"])
@pytest.mark.parametrize("objective", ["fm-ot", "scoreflow"])
def test_times_are_drawn_as_asked_for(objective, t_sampler):
    """Also by an objective that has another way of its own; the times are those of the noise contract."""
    config = tiny(objective=objective, t_sampler=t_sampler, batch_size=32, seed=5)
    batch = Batch(torch.zeros(32, 1, 8, 8, dtype=torch.uint8), torch.arange(32) % 10, levels=17, step=3)
    _, t = sample_losses(new_state(config, CPU), config, batch)
    low, high = fm.objectives.time_range(config.recipe.path, config.recipe.objective)
    raw = fm.noise((32,), seed=5, step=3, stream="t", kind="normal" if t_sampler == "logit-normal" else "uniform")
    if t_sampler == "stratified":
        words = fm.noise((1,), seed=5, step=3, stream="t", kind="word") + torch.arange(32) * 0x9E3779B9
        raw = (words % 2**32).float() * 2**-32 + 2**-33
    expected = low + (high - low) * (raw.sigmoid() if t_sampler == "logit-normal" else raw)
    torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("objective", "prediction"), [("fm-ot", "velocity"), ("data-ot", "data")])
def test_noise_may_be_left_at_the_data(objective, prediction, monkeypatch):
    """x_t = t x1 + (1 - (1 - sigma_min) t) x0 and u = x1 - (1 - sigma_min) x0 (equations 22 and 23)."""
    config = tiny(objective=objective, sigma_min=0.25, batch_size=16)
    assert config.recipe.path == fm.OT(0.25) and config.recipe.objective == prediction
    points, draw = [], sample_path
    monkeypatch.setattr("fm_fast.train.step.sample_path", lambda *inputs, **named: (points.append(draw(*inputs, **named)), points[-1])[1])
    batch = Batch(torch.full((16, 1, 8, 8), 8, dtype=torch.uint8), torch.arange(16) % 10, levels=17, step=3)  # x1 = 0 everywhere
    sample_losses(new_state(config, CPU), config, batch)
    (point,) = points
    t = point.t[:, None, None, None]
    torch.testing.assert_close(point.x_t, (1 - 0.75 * t) * point.x0)
    torch.testing.assert_close(point.target, -0.75 * point.x0 if prediction == "velocity" else torch.zeros_like(point.x0))


def test_preconditioning_is_as_asked_for():
    ways = {(name, way): False for name in ("fm-ot", "ddpm", "score", "scoreflow", "data-ot") for way in ("auto", "off")}
    ways |= {(name, way): True for name in ("ddpm", "score", "scoreflow", "fm-vp", "fm-ve") for way in ("on",)}
    ways |= {("ddpm", "auto"): True, ("score", "auto"): True, ("scoreflow", "auto"): True}
    for (objective, way), expected in ways.items():
        state = new_state(tiny(objective=objective, preconditioned=way), CPU)
        assert isinstance(state.model, Preconditioned) is expected, (objective, way)
    config = tiny(objective="fm-vp", preconditioned="on", steps=30, batch_size=32, learning_rate=4e-3)
    losses = torch.stack(advance(new_state(config, CPU), config, digits(), 30))
    assert losses[-10:].mean() < 0.9 * losses[:5].mean()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_resumes_bit_by_bit(precision, tmp_path):
    config, data = tiny(precision=precision, ema_widths=(0.05, 0.1), micro_batch=7, coupling="optimal", **SETTINGS), digits()
    straight, broken = new_state(config, CPU), new_state(config, CPU)
    advance(straight, config, data, 8)
    advance(broken, config, data, 5)
    torch.save(broken.state_dict(), tmp_path / "state.pt")
    resumed = new_state(config, CPU)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    advance(resumed, config, data, 3)
    assert_same_state(straight, resumed)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["copied", "pickled"])
def test_a_duplicate_of_the_state_goes_on_by_itself(duplicate):
    config, data = tiny(precision="bfloat16", model=dataclasses.replace(TINY_NET, dropout=0.5)), digits()
    state = new_state(config, CPU)
    advance(state, config, data, 3)
    other = duplicate(state)
    assert_same_state(state, other)
    before = flat(state.average).clone()
    advance(other, config, data, 2)
    assert torch.equal(flat(state.average), before) and not torch.equal(flat(other.average), before)
    advance(state, config, data, 2)
    assert_same_state(state, other)


def test_sixteen_bit_weights_learn_as_well():
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = tiny(precision=precision, steps=30, batch_size=32, learning_rate=4e-3)
        state = new_state(config, CPU)
        losses[precision] = torch.stack(advance(state, config, digits(), 30))
        assert {p.dtype for p in state.average.parameters()} == {torch.float32}
    assert {p.dtype for p in state.model.parameters()} == {torch.bfloat16} and losses["bfloat16"].dtype == torch.float32
    assert float(losses["bfloat16"][-10:].mean()) == pytest.approx(float(losses["float32"][-10:].mean()), rel=0.03)
    assert losses["bfloat16"][-10:].mean() < 0.9 * losses["bfloat16"][:5].mean()


def test_several_averages():
    config = tiny(ema_widths=(0.05, 0.25), ema_decay=0.5)
    state = new_state(config, CPU)
    advance(state, config, digits(), 3)
    assert [average.decay(10**9) for average in state.optimiser.averages] == pytest.approx([0.5, 1.0, 1.0])
    found = [flat(state.optimiser.average(state.model, i)) for i in range(3)]
    assert torch.equal(found[0], flat(state.average)) and not torch.equal(found[1], found[2])


def test_settings_of_the_step():
    config = tiny(schedule="cosine", precision="bfloat16", micro_batch=4, ema_widths=(0.1,), compile=True)
    assert from_dict(to_dict(config)) == config
    for change, message in (
        ({"t_sampler": "beta"}, "t_sampler: expected one of auto, uniform, stratified, logit-normal, got 'beta'"),
        ({"preconditioned": "yes"}, "preconditioned: expected one of auto, on, off, got 'yes'"),
        ({"preconditioned": "on"}, "preconditioned: expected auto or off for fm-ot, got 'on'"),
        ({"preconditioned": "on", "objective": "data-ot"}, "preconditioned: expected auto or off for data-ot, got 'on'"),
        ({"sigma_min": 1.0}, r"sigma_min: expected a number in \[0, 1\), got 1.0"),
        ({"sigma_min": 0.1, "objective": "ddpm"}, "sigma_min: expected 0 for ddpm, which has another path, got 0.1"),
        ({"coupling": "sinkhorn"}, "coupling: expected one of independent, optimal, got 'sinkhorn'"),
        ({"coupling": "optimal", "super_resolution": 2}, "coupling: expected independent, for super-resolution, got 'optimal'"),
        ({"precision": "float16"}, "precision: expected one of float32, bfloat16, got 'float16'"),
        ({"micro_batch": -1}, "micro_batch: expected 0 or more, got -1"),
        ({"ema_widths": (0.1, 0.3)}, "ema_widths: expected shares of the run, at most 0.2887, got 0.3"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**change)


def test_a_network_is_not_asked_whether_it_is_true():
    """What torch.compile returns has a length, which most networks do not: asking for it is an error."""

    class Compiled:
        def __init__(self, network):
            self.network = network

        def __len__(self):
            raise TypeError("does not support len()")

        def __call__(self, *inputs, **condition):
            return self.network(*inputs, **condition)

    config, data = tiny(), digits()
    state = new_state(config, CPU)
    assert training_step(state, config, data, DataOrder(len(data), 0), network=Compiled(state.model)).mean > 0.0


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_losses():
    data, losses = digits(), []
    for compiled in (False, True):
        config = tiny(compile=compiled)
        state = new_state(config, CPU)
        order, network = DataOrder(len(data), 0), network_of(state, config)
        losses.append(torch.stack([training_step(state, config, data, order, network=network).mean for _ in range(10)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


def test_the_data_map_is_the_configurations(monkeypatch):
    points, draw = [], sample_path
    monkeypatch.setattr("fm_fast.train.step.sample_path", lambda *inputs, **named: (points.append(draw(*inputs, **named)), points[-1])[1])
    config = tiny(flip=0.5, dequantise=True, seed=5)
    images = torch.randint(17, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.arange(16) % 10, levels=17, step=3, first_id=40)
    sample_losses(new_state(config, CPU), config, batch)
    expected = fm.sample_path(
        images,
        t_sampler="stratified",
        flip=0.5,
        levels=17,
        dequantise=True,
        seed=5,
        step=3,
        sample_ids=40,
        path=config.recipe.path,
        objective=config.recipe.objective,
    )
    assert torch.equal(points[0].target, expected.target)


@pytest.mark.parametrize("duplicate", ["copied", "pickled"])
def test_the_average_of_a_duplicate_evaluates(duplicate):

    state = new_state(tiny(), CPU)
    other = copy.deepcopy(state) if duplicate == "copied" else pickle.loads(pickle.dumps(state))
    assert not state.average.training and not other.average.training and other.model.training


def test_making_a_state_leaves_torchs_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    new_state(tiny(), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_network_is_compiled_where_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: ("compiled", model))
    state = new_state(tiny(), CPU)
    assert network_of(state, tiny(compile=True)) == ("compiled", state.model) and network_of(state, tiny()) is state.model
