"""FlowMatchingLoss: the function with its settings fixed, a module that holds what belongs to it."""

import pytest
import torch
from path_loss_cases import SEED, STEP, tensor

import fm_fast as fm


def test_the_module_equals_the_function(backend):
    x1, model = tensor((4, 8)), lambda x, t: x * t[:, None]
    module = fm.FlowMatchingLoss(path="vp", objective="noise", backend=backend)
    function = fm.flow_matching_loss(model, x1, path="vp", objective="noise", seed=1, step=2, backend=backend)
    assert torch.equal(module(model, x1, seed=1, step=2), function)
    assert "path='vp'" in repr(module)


class Widened(torch.nn.Module):
    """x_t = t x1 + scale (1 - t) x0."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.alpha, self.d_alpha = (lambda t: t), torch.ones_like

    def sigma(self, t):
        return (1 - t) * self.scale

    def d_sigma(self, t):
        return -self.scale * torch.ones_like(t)


def test_modules_hold_the_parameters_of_their_path(backend):
    path, x1 = Widened(1.0), tensor((4, 6))
    module = fm.FlowMatchingLoss(path=path, backend=backend)
    module(lambda x, t: x, x1, seed=SEED, step=STEP).backward()
    assert list(module.parameters()) == [path.scale]
    assert abs(float(path.scale.grad)) > 0
    module.path, module.something_else = Widened(3.0), torch.nn.Identity()
    found = module(lambda x, t: x, x1, seed=SEED, step=STEP)
    assert torch.equal(found, fm.FlowMatchingLoss(path=Widened(3.0), backend=backend)(lambda x, t: x, x1, seed=SEED, step=STEP))


@pytest.mark.parametrize(
    ("name", "value"),
    [("path", "vp"), ("path", Widened(3.0)), ("flip", 0.5), ("backend", "reference")],
    ids=["name", "module", "number", "backend"],
)
def test_settings_that_an_attribute_would_not_change_are_refused(name, value):
    module = fm.FlowMatchingLoss()
    with pytest.raises(AttributeError, match=f"{name} is a setting of FlowMatchingLoss: give it when the module is made, or to the call"):
        setattr(module, name, value)
    assert not list(module.parameters())


def test_tensors_among_the_settings_belong_to_the_module():
    """A weight moves with it, and a learned one is a parameter of it."""
    x1, weight = tensor((4, 6)), torch.tensor([1.0, 2.0, 0.0, 4.0])
    module = fm.FlowMatchingLoss(weight=torch.ones(4))
    assert module.to("meta").weight.is_meta and not module.state_dict()
    module.weight = weight
    expected = fm.flow_matching_loss(lambda x, t: x, x1, weight=weight, seed=SEED, step=STEP)
    assert torch.equal(module(lambda x, t: x, x1, seed=SEED, step=STEP), expected)
    learned = fm.FlowMatchingLoss(weight=torch.nn.Parameter(weight))
    learned(lambda x, t: x, x1, seed=SEED, step=STEP).backward()
    assert [name for name, _ in learned.named_parameters()] == ["weight"]
    # Three of the four samples weigh something, and the loss is linear in each weight.
    torch.testing.assert_close((learned.weight.grad * weight).sum(), expected)


def test_arguments_of_the_call_come_before_settings():
    x1, weight = tensor((4, 6)), torch.tensor([1.0, 2.0, 0.0, 4.0])
    module = fm.FlowMatchingLoss(weight=torch.ones(4))
    expected = fm.flow_matching_loss(lambda x, t: x, x1, weight=weight, seed=SEED, step=STEP)
    assert torch.equal(module(lambda x, t: x, x1, weight=weight, seed=SEED, step=STEP), expected)


def test_a_tensor_cannot_be_taken_away():
    module = fm.FlowMatchingLoss(weight=torch.ones(4))
    with pytest.raises(AttributeError, match="weight is a setting of FlowMatchingLoss"):
        module.weight = None
