"""Solves in programs of torch.export: the same numbers for any batch, by torch's own ops alone."""

import pytest
import torch
from conftest import CPU_BACKENDS

import fm_fast as fm
from fm_fast.nn import UNet, UNetConfig

NULL = fm.Guidance(2.0, {"y": torch.tensor(4)})
IN_PART = fm.Guidance(2.0, {"y": torch.tensor(4)}, interval=(0.2, 0.7))
SOLVES = {
    "euler": {"method": "euler", "steps": 4},
    "midpoint": {"method": "midpoint", "steps": 3},
    "ab3": {"method": "ab3", "steps": 5},
    "another path and grid": {"method": "euler", "steps": 4, "path": "ve", "objective": "score", "grid": "karras"},
    "saved": {"method": "midpoint", "steps": 3, "save": [0.3, 0.7]},
    "bfloat16": {"method": "ab2", "steps": 4, "dtype": torch.bfloat16, "objective": "noise", "t0": 0.1},
    "guided": {"method": "midpoint", "steps": 3, "guidance": NULL},
    "guided in part": {"method": "ab2", "steps": 6, "guidance": IN_PART},
    "noise on the way": {"method": "euler", "steps": 2, "churn": 0.3, "seed": 1, "step": 2},
}


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3))
        self.classes = torch.nn.Embedding(5, 3)

    def forward(self, x, t, y):
        return self.layers(torch.cat([x, t[:, None].to(x.dtype)], 1)) + self.classes(y)


class Solve(torch.nn.Module):
    """What is exported: a solve with a network that is part of the program."""

    def __init__(self, solve, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.solve, self.settings = Network(), solve, settings

    def forward(self, x, y):
        return self.solve(self.network, x, cond={"y": y}, **self.settings)


def inputs(batch):
    return fm.noise((batch, 3), seed=batch, step=0), torch.arange(batch) % 4


def exported(module):
    batch = torch.export.Dim("batch", min=2, max=1024)
    return torch.export.export(module, inputs(5), dynamic_shapes=({0: batch}, {0: batch}))


def ops_of_ours(program):
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if "fm_fast" in str(node.target)}


def ends(model, x, **settings):
    sample = fm.sample(model, x, **settings)
    return sample.x if sample.saved is None else torch.cat([sample.x[None], sample.saved])


@pytest.mark.parametrize("settings", SOLVES.values(), ids=SOLVES.keys())
def test_a_program_solves_for_any_batch(settings):
    module = Solve(ends, **settings)
    module.network.to(settings.get("dtype"))
    program = exported(module)
    for batch in (2, 5, 7):
        torch.testing.assert_close(program.module()(*inputs(batch)), module(*inputs(batch)), rtol=2e-5, atol=2e-5)


def test_a_program_holds_the_network_and_no_op_of_ours(tmp_path):
    """It runs where fm_fast is not installed, and takes other weights."""
    program = exported(Solve(ends, method="midpoint", steps=3))
    assert not ops_of_ours(program)
    torch.export.save(program, tmp_path / "solve.pt2")
    loaded = torch.export.load(tmp_path / "solve.pt2").module()
    other = Solve(ends, method="midpoint", steps=3)
    torch.nn.init.ones_(other.network.classes.weight)
    loaded.load_state_dict(other.state_dict())
    torch.testing.assert_close(loaded(*inputs(3)), other(*inputs(3)))


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="the C++ library is not built")
def test_a_backend_that_was_asked_for_is_in_the_program():
    module = Solve(ends, method="ab2", steps=4, backend="cpp")
    program = exported(module)
    assert any("fm_fast.linear_step" in op for op in ops_of_ours(program))
    torch.testing.assert_close(program.module()(*inputs(3)), module(*inputs(3)))


def test_encoding():
    module = Solve(lambda model, x, **settings: fm.encode(model, x, **settings).x, method="rk4", steps=2)
    torch.testing.assert_close(exported(module).module()(*inputs(4)), module(*inputs(4)))


def test_a_program_with_gradients():
    module = Solve(ends, method="midpoint", steps=3, grad="direct")
    program, (x, y) = exported(module).module(), inputs(4)
    gradients = [torch.autograd.grad(each(x, y).square().sum(), list(each.parameters())) for each in (program, module)]
    torch.testing.assert_close(*gradients)


def test_a_program_compiles_to_one_graph():
    module = Solve(ends, method="midpoint", steps=3)
    compiled = torch.compile(exported(module).module(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(4)), module(*inputs(4)))


@pytest.mark.parametrize("solve", [fm.log_likelihood, fm.sample_with_log_prob])
def test_a_divergence_is_refused(solve):
    with pytest.raises(ValueError, match="model must not be exported together with its divergence"):
        exported(Solve(lambda *arguments, **settings: solve(*arguments, **settings).x0, method="euler", steps=2, seed=0))


def test_a_plain_unet_leaves_nothing_of_ours():
    torch.manual_seed(0)
    config = UNetConfig(4, 1, classes=3, channels=8, multipliers=(1,), blocks=1, groups=4, head_channels=8)
    module = Solve(ends, method="euler", steps=2)
    module.network = UNet(config, fused=False).eval()
    batch, (x, y) = torch.export.Dim("batch", min=2, max=1024), (fm.noise((3, 1, 4, 4), seed=0, step=0), torch.arange(3))
    program = torch.export.export(module, (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    assert not ops_of_ours(program)
    torch.testing.assert_close(program.module()(x[:2], y[:2]), module(x[:2], y[:2]))


def test_an_adaptive_solve_is_refused():
    with pytest.raises(ValueError, match="method must be a fixed-step one"):
        exported(Solve(ends, method="dopri5"))
