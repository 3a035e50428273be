"""What a step may cost beyond the model: ops, passes over state-sized memory, and waits for the device. Counted, not timed."""

import pytest
import torch
from sampling_helpers import FIXED
from torch.utils._python_dispatch import TorchDispatchMode

import fm_fast as fm
from fm_fast import _backends

NATIVE = _backends.why_not("linear_step", "cpu", "cpp")
pytestmark = pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")

SHAPE = (16, 3, 8, 8)
SIZE = 16 * 3 * 8 * 8
VIEWS = ("aten.slice", "aten.select", "aten.expand", "aten.view", "aten.unbind", "aten.detach", "aten.alias", "aten._unsafe_view")
# One op a stage: PyTorch's add where the update is x + c o in one dtype, linear_step otherwise.
UPDATES = ("fm_fast.linear_step.default", "aten.add.out")
WAITS = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")


class Counter(TorchDispatchMode):
    """The ops of a solve by name, and the bytes of state-sized memory that they read and write; the model's own are left out."""

    def __init__(self):
        super().__init__()
        self.ops, self.bytes, self.outside = [], 0, False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not self.outside and not str(op).startswith(VIEWS):
            self.ops.append(str(op))
            written = [] if op.namespace == "fm_fast" else [result]
            self.bytes += sum(self._bytes(x) for x in self._tensors([*args, *written]))
        return result

    def model(self, x, t, **cond):
        """The field 2 x, as if it cost nothing."""
        self.outside = True
        try:
            return x * 2
        finally:
            self.outside = False

    @staticmethod
    def _tensors(values):
        for value in values:
            yield from Counter._tensors(value) if isinstance(value, (list, tuple)) else [value]

    @staticmethod
    def _bytes(value):
        """Of op linear_step, each tensor argument is read or written once: out, copy, x and every k."""
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) and value.numel() >= SIZE else 0


def solve(steps, **arguments):
    noise = torch.ones(SHAPE)
    with Counter() as counter:
        fm.sample(counter.model, noise, steps=steps, backend="cpp", **arguments)
    return counter


def four_steps(**arguments):
    """(ops, float32 passes) of four steps: the difference of two solves, in which the start of every method cancels."""
    long, short = solve(12, **arguments), solve(8, **arguments)
    ops = list(long.ops)
    for op in short.ops:
        ops.remove(op)
    return ops, (long.bytes - short.bytes) / (4 * SIZE)


def guided(scale=2.0, **interval):
    return {"cond": {"y": torch.zeros(16, dtype=torch.int64)}, "guidance": fm.Guidance(scale, {"y": -1}, **interval)}


BUDGETS = [
    ("euler", {}, 1, 3),
    ("midpoint", {}, 2, 6),
    ("heun2", {}, 2, 7),
    ("ralston", {}, 2, 7),
    ("rk4", {}, 4, 15),
    ("rk4_38", {}, 4, 18),
    ("ab2", {}, 1, 4),
    ("ab3", {}, 1, 5),
    # bfloat16 outputs and copies count half
    ("euler", {"dtype": torch.bfloat16}, 1, 3),
    ("midpoint", {"dtype": torch.bfloat16}, 2, 5),
    ("rk4", {"dtype": torch.bfloat16}, 4, 10.5),
    # guided: x, both halves of the output -> x, and its copy in the other half of the doubled batch
    ("euler", guided(), 1, 4 + 1),
    ("midpoint", guided(), 2, 8 + 2),
    ("ab2", guided(), 1, 6 + 1),
]


@pytest.mark.parametrize(("method", "arguments", "ops", "passes"), BUDGETS, ids=lambda v: v if isinstance(v, str) else "")
def test_ops_and_passes_of_a_step(method, arguments, ops, passes):
    found, memory = four_steps(method=method, **arguments)
    addition = method in ("euler", "midpoint") and not arguments
    assert found == [UPDATES[addition]] * (4 * ops)
    assert memory == pytest.approx(4 * passes, abs=1e-9)


@pytest.mark.parametrize("objective", ["noise", "data", "score"])
@pytest.mark.parametrize(("method", "ops", "passes"), [("euler", 1, 3), ("midpoint", 2, 7)])
def test_other_objectives_cost_no_op_more(objective, method, ops, passes):
    """Midpoint's last update reads both outputs there: x enters the velocity, and the first stage has moved it."""
    found, memory = four_steps(method=method, objective=objective, t0=0.1, t1=0.9)
    assert found == ["fm_fast.linear_step.default"] * (4 * ops) and memory == pytest.approx(4 * passes)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, guided(interval=(0.3, 0.6)), {"path": "vp", "objective": "noise"}])
def test_the_loop_never_waits_for_the_device(method, arguments):
    """The host's tables are made before the first step, and the one look at values, whether all are finite, follows the last."""
    ops = solve(6, method=method, **arguments).ops
    steps = [number for number, op in enumerate(ops) if op in UPDATES]
    loop, after = ops[steps[0] : steps[-1]], ops[steps[-1] :]
    assert len(steps) >= 6 and not [op for op in loop if op.startswith(WAITS)]
    assert len([op for op in after if op.startswith(WAITS)]) == 1
    marked = solve(6, method=method, on_nonfinite="mark", **arguments).ops
    assert not [op for op in marked[min(marked.index(op) for op in UPDATES if op in marked) :] if op.startswith(WAITS)]


def test_times_and_tables_are_views_of_tensors_made_once():
    """However many steps: the same number of aten ops."""
    counts = [len([op for op in solve(steps, method="rk4").ops if op.startswith("aten")]) for steps in (2, 50)]
    assert counts[0] == counts[1]


def test_saving_costs_one_copy_a_state():
    plain, saving = solve(8, method="euler"), solve(8, method="euler", save="steps")
    copies = [op for op in saving.ops if op == "aten.clone.default"]
    assert len(copies) == 8 and len(saving.ops) - len(plain.ops) <= 8 + 2, "one copy a state and one stack"


def test_the_count_sees_what_it_counts():
    """The same count of the naive loop x = x + h v: two ops and five passes a step."""
    with Counter() as counter:
        x = torch.ones(SHAPE)
        before = len(counter.ops), counter.bytes
        for _ in range(4):
            x = x + 0.25 * counter.model(x, 0)
    assert len(counter.ops) - before[0] == 8 and (counter.bytes - before[1]) / (4 * SIZE) == 4 * 5
    with Counter() as counter:
        float(torch.ones(()))
    assert any(op.startswith(WAITS) for op in counter.ops)
