"""The Triton kernel of step_control, interpreted, against the independent float64 model."""

import control_cases
import pytest
import torch
from control_cases import CASES, case
from test_step_control import arguments
from triton_interpreter import run_checks


def test_step_control_in_the_interpreter():
    run_checks(__file__)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def check_every_situation(name, dtype):
    from fm_fast.kernels.step_control import launch

    control_cases.check(launch, CASES[name], dtype)


def check_a_batch_of_whole_programs():
    from fm_fast.kernels.step_control import launch

    control_cases.check(launch, case(256), torch.float32)


DOUBLES = {"dtype": torch.float64}
WRONG = {
    r"numbers must be contiguous float64 \[3, 4\], got torch.float32 \(3, 4\)": {"numbers": torch.zeros(3, 4)},
    r"counts must be contiguous int64 \[3, 4\]": {"counts": torch.zeros(2, 4, dtype=torch.int64)},
    r"totals must be contiguous int64 \[3\]": {"totals": torch.zeros(3)},
    r"accepted must be contiguous uint8 \[4\]": {"accepted": torch.zeros(8, dtype=torch.uint8)[::2]},
    r"factors must be contiguous float32 or float64 \[2, 4\]": {"factors": torch.zeros(2, 4, dtype=torch.bfloat16)},
    r"means must be contiguous float64 \[1, 4\]": {"means": torch.zeros(1, 5, **DOUBLES)},
    "there must be 2 stops, a node and an order, got 1, 7 and 5": {"stops": torch.zeros(1, **DOUBLES)},
    "there must be 2 stops, a node and an order, got 3, 7 and 0": {"order": 0},
}


@pytest.mark.parametrize("message", WRONG)
def check_wrong_arguments(message):
    from fm_fast.kernels.step_control import launch

    with pytest.raises(ValueError, match=message):
        launch(**(arguments() | WRONG[message]))
