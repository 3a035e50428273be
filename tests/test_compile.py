"""torch.compile without graph breaks or recompilations, opcheck of the raw ops, and torch.export."""

import pytest
import torch
from conftest import CPU_BACKENDS
from torch.func import grad, jvp
from unet_helpers import shaken

import fm_fast as fm
from fm_fast import _backends
from fm_fast.nn import UNet, UNetConfig
from fm_fast.random import make_key

SEED = 21
NATIVE = _backends.why_not("path_sample", "cpu", "cpp")
needs_native = pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")


def tensor(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name != CPU_BACKENDS[-1])) for name in CPU_BACKENDS])
def backend(request):
    """Each backend of the CPU, all but the one that users get among the slow tests: the reference traces into hundreds of small ops."""
    return request.param


class Counting:
    """A compiler backend that counts how often it is asked to compile."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize(("path", "objective"), [("ot", "velocity"), ("vp", "scoreflow")])
def test_fullgraph_forward_and_backward(path, objective, backend):
    model = torch.nn.Linear(6, 6)

    def loss(x1, step):
        settings = {"path": path, "objective": objective, "t_sampler": "stratified", "backend": backend}
        return fm.flow_matching_loss(lambda x, t: model(x), x1, seed=SEED, step=step, **settings)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(2):
        expected, got = loss(tensor(4, 6), step), compiled(tensor(4, 6), step)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(got, model.weight), torch.autograd.grad(expected, model.weight), rtol=1e-4, atol=1e-6
        )


def test_noise_compiles_with_and_without_a_device():
    def drawn(step, device):
        return fm.noise((3, 4), seed=SEED, step=step, device=device)

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    for device in (None, "cpu"):
        assert torch.equal(compiled(2, device), drawn(2, device))
    with torch.device("meta"):
        assert drawn(2, None).device.type == "meta"


def test_the_key_is_no_constant_that_inductor_copies_into_every_word():
    """torch.tensor of three numbers is a chain of selections to inductor: ten rounds of Philox of it took ten minutes to compile."""
    called = set()

    def looking(graph, inputs):
        called.update(node.target for node in graph.graph.nodes if node.op in ("call_function", "get_attr"))
        return graph

    x1 = tensor(4, 6)
    compiled = torch.compile(lambda x1: fm.sample_path(x1, seed=SEED, step=1, backend="reference").x_t, fullgraph=True, backend=looking)
    assert torch.equal(compiled(x1), fm.sample_path(x1, seed=SEED, step=1, backend="reference").x_t)
    assert torch.cat in called and torch.tensor not in called and not any(isinstance(target, str) for target in called), called


def test_ten_steps_compile_at_most_twice(backend):
    counting = Counting()
    compiled = torch.compile(
        lambda x1, step: fm.sample_path(x1, seed=SEED, step=step, backend=backend).x_t, fullgraph=True, backend=counting
    )
    for step in range(10):
        assert torch.equal(compiled(tensor(4, 6), step), fm.sample_path(tensor(4, 6), seed=SEED, step=step, backend=backend).x_t)
    assert counting.count <= 2


def test_a_dynamic_batch_compiles_at_most_twice(backend):
    counting = Counting()
    model = torch.nn.Linear(6, 6)

    def loss(x1):
        return fm.flow_matching_loss(lambda x, t: model(x), x1, seed=SEED, step=1, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    for batch in (4, 5, 9):
        torch.testing.assert_close(compiled(tensor(batch, 6)), loss(tensor(batch, 6)), rtol=1e-5, atol=1e-6)
    assert counting.count <= 2


def test_channels_last_data_compile_without_a_break(backend):
    x1, o = (tensor(2, 3, 4, 5, seed=i).to(memory_format=torch.channels_last) for i in (1, 2))
    compiled = torch.compile(
        lambda x1, o: fm.sample_path(x1, seed=SEED, step=1, backend=backend).loss(o), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x1, o), fm.sample_path(x1, seed=SEED, step=1, backend=backend).loss(o), rtol=1e-5, atol=1e-6)


def test_drawing_the_seed_inside_the_graph(backend):
    compiled = torch.compile(lambda x1: fm.sample_path(x1, backend=backend).x_t, fullgraph=True, backend="aot_eager")
    a, b = compiled(tensor(4, 6)), compiled(tensor(4, 6))
    assert not torch.equal(a, b)


def test_compiled_func_grad_and_jvp(backend):
    s = fm.sample_path(tensor(3, 6), seed=SEED, step=1, backend=backend)
    o, direction = tensor(3, 6, seed=2), tensor(3, 6, seed=3)

    def derivative(o):
        return fm.sample_path(tensor_x1, seed=SEED, step=1, backend=backend).loss(o)

    tensor_x1 = tensor(3, 6)
    leaf = o.clone().requires_grad_()
    exact = torch.autograd.grad(s.loss(leaf), leaf)[0]
    got = torch.compile(lambda o: grad(derivative)(o), fullgraph=True, backend="aot_eager")(o)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-7)
    tangent = torch.compile(lambda o: jvp(derivative, (o,), (direction,))[1], fullgraph=True, backend="aot_eager")(o)
    torch.testing.assert_close(tangent, (exact * direction).sum(), rtol=1e-5, atol=1e-6)


def test_export_with_a_dynamic_batch(backend):
    class Loss(torch.nn.Module):
        def forward(self, x1, o, seed):
            return fm.sample_path(x1, seed=seed, step=2, backend=backend).loss(o)

    x1, o, seed = tensor(4, 3, 8), tensor(4, 3, 8, seed=2), torch.tensor(SEED)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Loss(), (x1, o, seed), dynamic_shapes=({0: batch}, {0: batch}, None))
    for size in (4, 7):
        x1, o = tensor(size, 3, 8), tensor(size, 3, 8, seed=2)
        torch.testing.assert_close(program.module()(x1, o, seed), Loss()(x1, o, seed), rtol=1e-5, atol=1e-6)


def test_an_exported_loss_can_be_trained(backend):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)

        def forward(self, x1, step):
            return fm.flow_matching_loss(lambda x, t: self.layer(x) + t[:, None], x1, seed=SEED, step=step, backend=backend)

    module, x1 = Loss(), tensor(4, 6)
    exported = torch.export.export(module, (x1, torch.tensor(3))).module()
    for step in (torch.tensor(3), torch.tensor(8)):
        gradients = [torch.autograd.grad(each(x1, step), list(each.parameters())) for each in (exported, module)]
        for found, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def raw_arguments(shape, dtype=torch.float32, x1_dtype=torch.float32, given=False, layout=lambda x: x):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x1 = layout((tensor(*shape) * 50).to(x1_dtype))
    x0 = layout(tensor(*shape, seed=3)) if given else torch.empty(0)
    key = make_key(SEED, 1, None, shape[0], torch.device("cpu"))
    s = fm.sample_path(x1, x0=x0 if given else None, dtype=dtype, seed=SEED, step=1, backend="reference")
    return x1, x0, key, s.coef.to(wide), layout(tensor(*shape, seed=2).to(dtype)), wide


CASES = {
    "contiguous": {"shape": (4, 3, 6, 5)},
    "two dimensions, noise given": {"shape": (5, 7), "given": True},
    "channels_last": {"shape": (2, 3, 4, 4), "layout": lambda x: x.to(memory_format=torch.channels_last)},
    "permuted dense": {"shape": (4, 6), "layout": lambda x: x.t().contiguous().t()},
    "bytes to bf16": {"shape": (2, 3, 4, 4), "x1_dtype": torch.uint8, "dtype": torch.bfloat16},
    "float64": {"shape": (2, 9), "dtype": torch.float64, "x1_dtype": torch.float64},
    "empty batch": {"shape": (0, 3)},
}


@needs_native
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_opcheck(case):
    x1, x0, key, rows, o, wide = raw_arguments(**case)
    batch = x1.shape[0]
    path = (0, 0.0, 0.0, 0, 0, 0.0, 1.0, 0.0, 1.0)
    data_map = (0.5 if x1.dim() == 4 else 0.0, 17, x1.dtype == torch.uint8)
    weight, ops = torch.ones(batch, dtype=wide), torch.ops.fm_fast
    check = torch.library.opcheck
    check(ops.noise.default, (torch.zeros(x1.shape), key, 0, 0, 0))
    check(ops.path_sample.default, (torch.zeros_like(o), torch.zeros(batch, dtype=wide), rows.clone(), x1, x0, key, *path, *data_map))
    check(ops.path_loss.default, (torch.zeros((), dtype=wide), torch.zeros_like(o), o, x1, x0, key, rows, weight, 0, *data_map))
    grad_output = torch.ones((), dtype=wide).expand(batch)
    check(ops.path_loss_backward.default, (torch.zeros_like(o), o, x1, x0, key, rows, weight, grad_output, 2, *data_map))
    x, table = o.to(wide), torch.ones(1, 3, dtype=torch.float64)
    check(ops.linear_step.default, (torch.zeros_like(x), torch.zeros_like(o), x, [o, o], table, 0, 1.0, torch.zeros_like(o)))


@needs_native
def test_a_raw_op_refuses_an_input_that_requires_a_gradient():
    x1, x0, key, rows, o, _ = raw_arguments((4, 6))
    arguments = (torch.zeros(()), torch.zeros_like(o), o.requires_grad_(), x1, x0, key, rows, torch.empty(0), 0, 0.0, 256, False)
    with pytest.raises(RuntimeError, match="requires grad"):
        torch.ops.fm_fast.path_loss.default(*arguments)


@pytest.mark.slow
def test_inductor_forward_and_backward(backend):
    model = torch.nn.Linear(6, 6)

    def loss(x1, step):
        return fm.flow_matching_loss(lambda x, t: model(x), x1, seed=SEED, step=step, backend=backend)

    compiled = torch.compile(loss, fullgraph=True)
    for step in range(3):
        expected, got = loss(tensor(4, 6), step), compiled(tensor(4, 6), step)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(got, model.weight), torch.autograd.grad(expected, model.weight), rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_network_of_several_sizes(training):
    """The second size makes the compiler compile for any: it failed at the projection of the attention."""
    torch._dynamo.reset()
    config = UNetConfig(16, 3, 0, channels=32, multipliers=(1, 2), blocks=1, attention_sizes=(), head_channels=32)
    model = shaken(UNet(config), 0.02).train(training)
    compiled, t = torch.compile(model), torch.tensor([0.2, 0.7])
    with torch.set_grad_enabled(training):
        for height, width in ((16, 16), (24, 20)):
            x = torch.randn(2, 3, height, width)
            torch.testing.assert_close(compiled(x, t), model(x, t), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rk4", "ab3"])
def test_methods_that_keep_outputs_within_a_compiled_function(method):
    """torch.compile puts a bounded deque together again with the wrong end."""

    def solve(x):
        return fm.sample(lambda x, t: -x * t[:, None], x, method=method, steps=3).x

    torch._dynamo.reset()
    x = torch.ones(2, 1)
    torch.testing.assert_close(torch.compile(solve, backend="eager")(x), solve(x))


@pytest.mark.parametrize(
    "arguments", [{"method": "heun2", "steps": 3}, pytest.param({"method": "dopri5"}, marks=pytest.mark.slow)], ids=str
)
def test_a_solve_within_a_compiled_function_runs_beside_the_graph(arguments):
    layer, x = torch.nn.Linear(3, 3), tensor(4, 3)

    def solve(x):
        return fm.sample(lambda x, t: layer(x) * t[:, None], 2 * x, save=[0.5], **arguments).saved + 1

    torch.testing.assert_close(torch.compile(solve, backend="eager")(x), solve(x))


def test_a_likelihood_of_a_compiled_network():
    """Its backward pass gives memory away, and can run once only, unless it was compiled not to."""
    torch.manual_seed(0)
    network, x = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)), torch.randn(16, 2)

    def likelihood(of, **arguments):
        return fm.log_likelihood(lambda x, t: of(x) * (1 + t[:, None]), x, steps=3, seed=0, **arguments).logp

    one = {"kind": "rademacher", "probes": 1}
    compiled = torch.compile(network, backend="aot_eager")
    torch.testing.assert_close(likelihood(compiled, **one), likelihood(network, **one))
    for arguments in ({}, {"kind": "rademacher", "probes": 2}):
        with pytest.raises(RuntimeError, match=r"model is compiled, .*set torch._functorch.config.donated_buffer = False before"):
            likelihood(compiled, **arguments)
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # monkeypatch would leave it without any value
        torch.testing.assert_close(likelihood(torch.compile(network, backend="aot_eager")), likelihood(network))
