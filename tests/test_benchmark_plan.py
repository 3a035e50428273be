"""The plan of ``--op all``: what it names exists, what it runs is what it lists, and nothing else may be asked of it."""

import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import plan, registry, run

THREADS = ["--threads", str(torch.get_num_threads())]


def test_every_entry_names_what_its_op_has():
    assert len({entry.op for entry in plan.PLAN}) == len(plan.PLAN)  # an op's rows are one file
    for entry in plan.PLAN:
        op = registry.find(entry.op)
        settings = list(run.settings(op, entry.options(run.parse(["--op", "all"]))))
        assert {setting.size for setting in settings} == set(entry.sizes)
        assert {setting.mode for setting in settings} == {mode for mode in op.modes if not entry.modes or mode in entry.modes}
        names = [provider.name for provider in op.providers(settings[0])]
        assert all(any(text in name for name in names) for text in entry.only or ())


def test_every_entry_for_a_gpu_names_what_its_op_has_there():
    for entry in plan.GPU_PLAN:
        op = registry.find(entry.op)
        settings = list(run.settings(op, entry.options(run.parse(["--device", "cuda"]))))
        assert {setting.size for setting in settings} == set(entry.sizes) and settings[0].device.type == "cuda"
        assert {setting.mode for setting in settings} >= set(entry.modes or op.modes)
        assert "cuda" in op.devices and (op.bytes_moved or op.observe)


def test_all_entries_run_in_turn(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(run, "run_op", seen.append)
    run.main(["--op", "all", *THREADS])
    chosen = [(options.op, options.size, options.mode, options.rounds, options.device) for options in seen]
    assert chosen == [(entry.op, list(entry.sizes), entry.modes and list(entry.modes), entry.rounds, "cpu") for entry in plan.PLAN]
    assert capsys.readouterr().out.count(" took ") == len(plan.PLAN)


@pytest.mark.parametrize(
    "words",
    ["--size small", "--mode drawn", "--part forward", "--rounds 3", "--only eager", "--out x.json", "--against HEAD", "--device cuda"],
)
def test_all_takes_no_other_choice(words):
    with pytest.raises(SystemExit, match=f"--op all runs what benchmarks/plan.py lists, on the CPU: leave out {words.split()[0]}$"):
        run.main(["--op", "all", *words.split(), *THREADS])


def test_wrong_names_are_named():
    with pytest.raises(SystemExit, match=r"--op must be all or one of noise, path_sample, .*, got 'loss'"):
        run.main(["--op", "loss", *THREADS])
    with pytest.raises(SystemExit, match=r"--size must be all or some of 'small', 'large', .* for op path_loss, got 'tiny'"):
        run.main(["--size", "small", "tiny", *THREADS])
