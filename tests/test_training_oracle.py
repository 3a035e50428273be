"""Whole steps against a trainer written here from torch's own parts, golden losses, and a network that learns a batch by heart."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from trainer_helpers import CPU, TINY_NET, advance, flat, tiny

import fm_fast as fm
from fm_fast.nn import UNet
from fm_fast.train.data import DataOrder, digits
from fm_fast.train.step import new_state

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LESSONS = 10, 120
SETTINGS = {"steps": STEPS, "batch_size": 16, "warmup": 4, "label_drop": 0.3, "clip": 1.0, "learning_rate": 2e-3, "weight_decay": 0.1}
# Of the run below, in float32 on a CPU; they change only if the noise, the order of the data, the initial weights or the step do.
GOLDEN = [
    1.5047152042, 1.6596930027, 1.4987770318, 1.5875263214, 1.5780029297, 1.5484665632, 1.5388450623, 1.4328715801, 1.4092245102,
    1.5313730240,
]  # fmt: skip


def lattice_times(step, count):
    """Stratified times by the noise contract: u = (w + id GOLDEN mod 2^32) 2^-32 + 2^-33 for the step's word w."""
    word = int(fm.noise((1,), seed=0, step=step, stream="t", sample_ids=0, kind="word"))
    return torch.tensor([((word + i * 0x9E3779B9) % 2**32 + 0.5) * 2.0**-32 for i in range(count)], dtype=torch.float64)


def oracle_losses(config, data):
    """(losses, weights, averages) of STEPS steps in float64, with everything between the noise and the average done by torch."""
    model = copy.deepcopy(new_state(config, CPU).model).double()
    average = flat(model).clone()
    optimiser = torch.optim.AdamW(model.parameters(), 1.0, (config.beta1, config.beta2), 1e-8, config.weight_decay)
    order, losses = DataOrder(len(data), 0), []
    for step in range(STEPS):
        rows = order.indices(step * 16, 16)
        x1 = 2 * (data.images[rows].double() + 0.5) / 17 - 1
        x0 = fm.noise(x1.shape, seed=0, step=step, dtype=torch.float64)
        t = lattice_times(step, 16)
        x_t = t.reshape(-1, 1, 1, 1) * x1 + (1 - t.reshape(-1, 1, 1, 1)) * x0
        drops = fm.noise((16,), seed=0, step=step, stream="label_drop")
        y = torch.where(drops < config.label_drop, -1, data.labels[rows])
        loss = F.mse_loss(model(x_t, t, y=y), x1 - x0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.param_groups[0]["lr"] = 1e-8 + (config.learning_rate - 1e-8) * min((step + 1) / 4, 1 - max(step - 4, 0) / 6)
        optimiser.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * flat(model)
        losses.append(float(loss.detach()))
    return losses, flat(model), average


def test_ten_steps_are_those_of_the_oracle():
    config, data = tiny(**SETTINGS), digits()
    state = new_state(config, CPU)
    found = [float(loss) for loss in advance(state, config, data, STEPS)]
    losses, weights, average = oracle_losses(config, data)
    assert found == pytest.approx(losses, rel=2e-6)
    assert found == pytest.approx(GOLDEN, rel=1e-5)
    torch.testing.assert_close(flat(state.model).double(), weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(flat(state.average).double(), average, rtol=0, atol=1e-5)


def test_a_network_learns_a_batch_by_heart():
    """With the noise and the times held fixed there is no floor below which the loss cannot fall."""
    data = digits()
    torch.manual_seed(0)
    model = UNet(TINY_NET)
    x1 = 2 * (data.images[:8].float() + 0.5) / 17 - 1
    x0, t = fm.noise(x1.shape, seed=0, step=0), torch.linspace(0.1, 0.9, 8)
    optimiser, losses = torch.optim.Adam(model.parameters()), []
    for step in range(LESSONS):
        optimiser.param_groups[0]["lr"] = 2e-2 * 0.5 * (1 + math.cos(math.pi * step / LESSONS))
        optimiser.zero_grad()
        loss = fm.flow_matching_loss(model, x1, x0=x0, t=t, cond={"y": data.labels[:8]})
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(float((x1 - x0).square().mean()), rel=1e-5)
    assert losses[-1] < 0.01 * losses[0]
