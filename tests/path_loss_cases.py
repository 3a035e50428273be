"""Numbers of any dtype, and the loss and gradient of a sample: what the tests of path_loss share."""

import torch

SEED, STEP = 21, 4
OBJECTIVES = ["velocity", "noise", "score", "scoreflow", "data"]


def tensor(shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def loss_and_gradient(s, o, weight=None, reduction="mean", grad_output=None):
    o = o.detach().requires_grad_()
    loss = s.loss(o, weight, reduction)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
    return loss.detach(), o.grad
