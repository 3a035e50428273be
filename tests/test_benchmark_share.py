"""The shares of wholes: every part passes its check and sees the shapes of its whole, and a wrong one stops the run."""

import json
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import fm_fast as fm
from benchmarks import plot, run
from benchmarks.op import Setting
from benchmarks.ops import share
from fm_fast import _backends

NATIVE = _backends.why_not("path_sample", "cpu", "cpp")
pytestmark = pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")
PARTS = {
    "training": [
        "fm_fast whole step", "fm_fast path_sample, path_loss", "fm_fast adamw_ema", "fm_fast group_norm_silu",
        "plain whole step", "plain loss", "plain clip, AdamW, EMA", "plain norm, SiLU",
    ],
    "sampling": ["fm_fast whole solve", "fm_fast solver", "plain whole solve", "plain solver"],
    "likelihood": ["fm_fast whole likelihood", "fm_fast probe, divergence_step", "plain whole likelihood"],
}  # fmt: skip


def setting(mode, size="U-Net, digits", batch=4):
    return Setting(torch.device("cpu"), size, (batch, *share.SIZES[size][1:]), torch.float32, mode)


@pytest.mark.parametrize("mode", share.MODES)
def test_every_part_passes_its_check(mode):
    assert list(run.gate(share.OP, setting(mode), None).steps) == PARTS[mode]
    assert list(run.gate(share.OP, setting(mode, "MLP, robotics"), None).steps) == [name for name in PARTS[mode] if "norm" not in name]


def test_layers_are_those_of_the_network():
    given = share.inputs(setting("training"))
    calls = share._recorded_layers(share._with_layers(given.network, True), given)
    assert [call.layer.channels for call in calls] == [layer.channels for layer in share._layers(given.network)]
    assert all(call.grad_y.shape[0] == 4 for call in calls) and any(call.others.get("second") is not None for call in calls)


def test_a_wrong_whole_stops_the_run(monkeypatch):
    right = fm.flow_matching_loss
    monkeypatch.setattr(fm, "flow_matching_loss", lambda *arguments, **settings: 1.001 * right(*arguments, **settings))
    with pytest.raises(SystemExit, match=r"fm_fast whole step is wrong, so nothing is timed: the loss is off by 1.0e-03"):
        run.gate(share.OP, setting("training"), [])


def test_a_wrong_part_stops_the_run(monkeypatch):
    right = share.GroupNormSiLU.forward
    monkeypatch.setattr(share, "_check_loss", lambda *arguments: None)
    monkeypatch.setattr(share.GroupNormSiLU, "forward", lambda self, x, **rest: right(self, x, **rest) * (1.001 if self.fused else 1.0))
    with pytest.raises(SystemExit, match=r"fm_fast group_norm_silu is wrong, so nothing is timed: a normalisation is off by 1.0e-03"):
        run.gate(share.OP, setting("training"), ["group_norm"])


def test_rows_are_shares_of_the_whole_and_are_drawn(tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["--op", "share", "--size", "MLP, 2-D", "--mode", "likelihood", "--rounds", "2", "--out", str(file)]
    run.main([*words, "--threads", str(torch.get_num_threads())])
    rows = json.loads(file.read_text())
    shares = {row["provider"]: row["median"] for row in rows if row["metric"] == "share"}
    assert shares["fm_fast whole likelihood"] == 1.0 and 0.0 < shares["fm_fast probe, divergence_step"] < 1.0
    assert not any(row["metric"] == "ratio" for row in rows)
    out = capsys.readouterr().out
    assert "share of fm_fast whole likelihood" in out and "100.000% [100.000, 100.000]" in out
    assert [row["provider"] for row in plot.compared(rows)[1]] == PARTS["likelihood"][1:]


def test_another_dtype_is_refused():
    with pytest.raises(SystemExit, match="--dtype must be float32 for op share, got bfloat16"):
        share.inputs(Setting(torch.device("cpu"), "MLP, 2-D", (4, 2), torch.bfloat16, "training"))
