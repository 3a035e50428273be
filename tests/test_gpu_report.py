"""The control flow of the GPU report on a machine without a GPU: what it runs, records and returns."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import gpu_report, plan, results, run, timing
from benchmarks.costs import Costs
from benchmarks.op import Op, Provider, Setting

SURROUNDINGS = {"device": "Some GPU", "date": "2026-01-02", "triton": ""}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A make-believe GPU: commands are recorded instead of run; those that contain a text of ``fails`` fail."""
    commands, fails = [], []

    def succeeds(command, seconds=None):
        commands.append(" ".join(command))
        return not any(text in commands[-1] for text in fails)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("TORCH_CUDA_ARCH_LIST", "FM_FAST_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(results, "environment", lambda *arguments: SURROUNDINGS)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(gpu_report, "_succeeds", succeeds)
    monkeypatch.setattr(gpu_report, "_device_works", lambda: True)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: f"/tools/{name}")
    return commands, fails


def stages():
    return json.loads((results.FOLDER / "Some_GPU-2026-01-02-stages.json").read_text())["stages"]


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 2
    assert "nothing was run" in capsys.readouterr().out


def test_all_stages_run_in_processes_of_their_own(machine, capsys):
    commands, fails = machine
    fails.append("gpu_report test")
    assert gpu_report.main([]) == 1
    stage_of = [command.split("gpu_report ")[1] for command in commands]
    assert stage_of == [f"{stage} --out {results.FOLDER}" for stage in ("build", "test", "sanitize", "bench")]
    assert "test: FAILED" in capsys.readouterr().out


def test_stages_are_recorded_beside_each_other(machine):
    _, fails = machine
    assert gpu_report.main(["build"]) == 0
    fails.append("-m gpu")
    assert gpu_report.main(["test"]) == 1
    assert stages() == {
        "build": {"install": "ok", "info": "ok", "CUDA library": "ok"},
        "test": {"CUDA library": "ok", "tests": "FAILED"},
    }


def test_failed_tests_are_named(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\ndef test_worse(): missing()\n")
    report = tmp_path / "tests.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, f"--junitxml={report}"], check=False)
    assert gpu_report._failed_tests(report) == ["test_bad, test_worse"]
    assert gpu_report._failed_tests(tmp_path / "missing.xml") == []


def test_a_missing_cuda_library_is_a_failed_build(machine):
    machine[1].append("why_not")
    assert gpu_report.main(["build"]) == 1
    assert stages()["build"]["CUDA library"] == "FAILED"


def test_a_stage_that_is_killed_leaves_what_it_had(machine, monkeypatch):
    def killed(options):
        yield "first", "ok"
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_report.STAGES, "test", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu_report.main(["test"])
    assert stages()["test"] == {"first": "ok", "test": gpu_report.UNFINISHED}


def test_ops_are_measured_one_by_one(machine, monkeypatch):
    """The rows of the others stay."""
    row = results.Row("noise", "ours", "mode", "size", "float32", "ms", 1.0, 0.9, 1.1)
    results.write(results.FOLDER / "Some_GPU-2026-01-02.json", [row, dataclasses.replace(row, op="probe")], SURROUNDINGS)
    monkeypatch.setattr(gpu_report.run, "measure", lambda op, setting, options: [dataclasses.replace(row, op=op.name, median=2.0)])
    monkeypatch.setattr(gpu_report.run, "table", lambda rows, ours: "table")
    assert gpu_report.main(["bench", "--op", "probe"]) == 0
    rows = json.loads((results.FOLDER / "Some_GPU-2026-01-02.json").read_text())
    assert [(row["op"], row["median"]) for row in rows] == [("noise", 1.0), ("probe", 2.0), ("probe", 2.0)]
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main(["test", "--op", "probe"])


def test_both_sanitizers_run(machine):
    commands, _ = machine
    assert gpu_report.main(["sanitize"]) == 0
    assert stages()["sanitize"] == {"memcheck": "ok", "racecheck": "ok"}
    assert sum("--tool racecheck" in command and "pytest" in command for command in commands) == 1


def test_a_sanitizer_that_finds_something_fails(machine):
    machine[1].append("racecheck --error-exitcode 1 " + sys.executable + " -m pytest -v -m gpu tests/test_gpu.py -k ((reductions")
    assert gpu_report.main(["sanitize"]) == 1
    assert stages()["sanitize"] == {"memcheck": "ok", "racecheck": "FAILED"}


def test_a_refused_or_missing_sanitizer_is_recorded(machine, monkeypatch):
    machine[1].append("compute-sanitizer")
    assert gpu_report.main(["sanitize"]) == 0
    assert set(stages()["sanitize"].values()) == {"refused here, on a trivial program too: its output is above"}
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: None)
    assert gpu_report.main(["sanitize"]) == 0
    assert set(stages()["sanitize"].values()) == {"compute-sanitizer is not installed"}


def test_a_sanitizer_beside_nvcc_is_found(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: path and f"{path}/{name}")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    assert gpu_report.main(["sanitize"]) == 0
    assert all(f"{tmp_path}/bin/compute-sanitizer --tool" in command for command in machine[0]) and len(machine[0]) == 4


def test_a_sanitizer_that_takes_too_long_is_ended(machine, monkeypatch):
    monkeypatch.setattr(gpu_report, "TRIVIAL", ["true"])
    monkeypatch.setattr(gpu_report, "SANITIZER_SECONDS", 0.2)

    def succeeds(command, seconds=None):
        done = subprocess.run(["sleep", "10"] if "pytest" in command else ["true"], check=False, timeout=seconds)
        return done.returncode == 0

    monkeypatch.setattr(gpu_report, "_succeeds", succeeds)
    assert gpu_report.main(["sanitize"]) == 0
    assert stages()["sanitize"] == {"memcheck": "not at its end after 0.2 s", "racecheck": "not at its end after 0.2 s"}


def test_tests_and_tools_that_hang_are_ended(machine, monkeypatch):
    def hangs(command, seconds=None):
        raise subprocess.TimeoutExpired(command, seconds)

    monkeypatch.setattr(gpu_report, "_succeeds", hangs)
    assert gpu_report.main(["test"]) == 1 and gpu_report.main(["sanitize"]) == 0
    assert stages()["test"] == {
        "CUDA library": f"FAILED: not at its end after {gpu_report.TRIVIAL_SECONDS} s",
        "tests": f"FAILED: not at its end after {gpu_report.TEST_SECONDS} s",
    }
    refused = f"refused here, on a trivial program too: not at its end after {gpu_report.TRIVIAL_SECONDS} s"
    assert stages()["sanitize"] == {"memcheck": refused, "racecheck": refused}


def test_what_takes_too_long_is_ended_with_all_that_it_has_begun(tmp_path):
    """A sanitizer's tests, which it starts, would go on using the GPU under the benchmarks."""
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_report._succeeds(["sh", "-c", f"sleep 60 & echo $! > '{tmp_path}/begun'; wait"], 1.0)
    state = pathlib.Path("/proc", (tmp_path / "begun").read_text().strip(), "stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it is still running")


@pytest.mark.parametrize(
    ("chosen", "prefix"),
    [
        ({}, "env TORCH_CUDA_ARCH_LIST=9.0 FM_FAST_BUILD=cuda "),
        ({"TORCH_CUDA_ARCH_LIST": "8.0"}, "env FM_FAST_BUILD=cuda "),
        ({"FM_FAST_BUILD": "auto", "TORCH_CUDA_ARCH_LIST": "8.0"}, ""),
    ],
)
def test_the_build_is_for_the_gpu_that_is_here(chosen, prefix, machine, monkeypatch):
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert gpu_report.main(["build"]) == 0
    assert machine[0][0].startswith(f"{prefix}{sys.executable} -m pip install")


def test_without_nvcc_the_cuda_library_is_not_asked_for(machine, monkeypatch):
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: None)
    assert gpu_report.main(["build"]) == 0
    assert machine[0][0].startswith(f"env TORCH_CUDA_ARCH_LIST=9.0 {sys.executable} -m pip install")


def test_where_the_cuda_library_does_not_build_the_rest_is_installed(machine):
    commands, fails = machine
    fails.append("FM_FAST_BUILD=cuda")
    assert gpu_report.main(["build"]) == 1
    assert commands[1].startswith(f"{sys.executable} -m pip install")
    assert stages()["build"] == {"install with CUDA": "FAILED", "install": "ok", "info": "ok", "CUDA library": "ok"}


@pytest.mark.parametrize("stage", ["test", "bench"])
def test_a_missing_cuda_library_fails_what_would_do_without_it(stage, machine, monkeypatch):
    """Tests skip what is not there, and a benchmark takes the next backend for ours."""
    machine[1].append("why_not")
    monkeypatch.setattr(gpu_report.plan, "GPU_PLAN", ())
    assert gpu_report.main([stage]) == 1
    assert stages()[stage]["CUDA library"] == "FAILED"


@pytest.mark.parametrize("broken", ["fm_fast cuda", "fm_fast triton"])
def test_a_backend_of_ours_costs_the_others_no_rows(broken, machine, monkeypatch):
    """Not even where it is the first, to which ratios are."""
    providers = [Provider(name, lambda inputs, setting: None) for name in ("fm_fast cuda", "fm_fast triton", "peer")]
    setting = Setting(torch.device("cuda"), "size", (1,), torch.float32, "mode")
    op = Op("op", {}, (), lambda setting: None, lambda setting: providers, lambda *arguments: None, None)

    def measure(op, setting, options):
        given = op.providers(setting)
        kept = [each.name for i, each in enumerate(given) if not i or options.only is None or each.name in options.only]
        if broken in kept:
            raise RuntimeError(f"{broken} cannot run")
        return kept

    monkeypatch.setattr(gpu_report.run, "measure", measure)
    rows, outcome = gpu_report._measured(op, setting, run.parse(["--device", "cuda"]))
    assert rows == (["peer"] if broken == "fm_fast cuda" else ["fm_fast cuda", "peer"])
    assert outcome == f"FAILED: {broken} cannot run; rows without it"


def test_what_a_broken_device_leaves_is_measured_by_another_process(machine, monkeypatch):
    commands, _ = machine
    monkeypatch.setattr(gpu_report, "_device_works", lambda: False)
    monkeypatch.setattr(gpu_report, "_measured", lambda op, setting, options: ([], "FAILED: illegal access"))
    given, succeeds = [], gpu_report._succeeds
    monkeypatch.setattr(gpu_report, "_succeeds", lambda command, seconds=None: given.append(seconds) or succeeds(command, seconds))
    assert gpu_report.main(["bench"]) == 1
    names = list(dict.fromkeys(entry.op for entry in plan.GPU_PLAN))
    (command,) = [command for command in commands if "gpu_report bench" in command]
    assert command.endswith(f"bench --op {' '.join(names[1:])} --out {results.FOLDER}")
    assert 0.0 < given[-1] <= gpu_report.BENCH_SECONDS - gpu_report.SPARE_SECONDS  # and so ends before this one is ended
    assert stages()["bench"]["device"] == f"FAILED: {names[0]} has left it of no more use to its process"


def test_a_stage_that_waits_for_ever_is_ended():
    code = f"""
import sys, time
sys.path.append({str(pathlib.Path(__file__).parent.parent)!r})
from benchmarks import gpu_report
print("begun", flush=True)
with gpu_report._ended_after(0.2):
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and done.stdout.splitlines() == ["begun", "not at its end after 0.2 s"]


@pytest.mark.parametrize("skipped", [True, False])
def test_tests_that_are_all_skipped_are_none(skipped, machine, monkeypatch):
    body = "<skipped/>" if skipped else ""

    def succeeds(command, seconds=None):
        for argument in command:
            if argument.startswith("--junitxml="):
                pathlib.Path(argument.partition("=")[2]).write_text(f"<suite><testcase name='one'>{body}</testcase></suite>")
        return True

    monkeypatch.setattr(gpu_report, "_succeeds", succeeds)
    assert gpu_report.main(["test"]) == int(skipped) and gpu_report.main(["sanitize"]) == 0
    assert stages()["test"]["tests"] == ("FAILED: all tests were skipped" if skipped else "ok")
    assert set(stages()["sanitize"].values()) == {"nothing ran: all tests were skipped" if skipped else "ok"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_wrong_peer_costs_us_no_rows_on_a_gpu(device, capsys):
    def check(inputs, setting, step):
        assert step == "right", "it is off"

    def provider(name, step):
        return Provider(name, lambda inputs, setting: step)

    providers = [provider("fm_fast", "right"), provider("peer", "wrong"), provider("other", "right")]
    op = Op("op", {}, (), lambda setting: None, lambda setting: providers, check, None)
    setting = Setting(torch.device(device), "size", (1,), torch.float32, "mode")
    if device == "cpu":
        with pytest.raises(SystemExit, match="peer is wrong"):
            run.gate(op, setting, None)
        return
    assert list(run.gate(op, setting, None).steps) == ["fm_fast", "other"]
    assert "left out: op, size, mode: peer is wrong" in capsys.readouterr().out
    providers[0] = provider("fm_fast", "wrong")
    with pytest.raises(SystemExit, match="fm_fast is wrong"):
        run.gate(op, setting, None)


@pytest.mark.parametrize("where", ["build", "check", "capture", "costs"])
def test_a_peer_that_fails_costs_us_no_rows_on_a_gpu(where, monkeypatch, capsys):
    """Whatever it is: memory that runs out, a compiler, a wait that a capture forbids."""

    def fail_in(place, name):
        if place == where and name == "peer":
            raise RuntimeError("no memory")

    def build(name):
        fail_in("build", name)
        return lambda: name

    def costs(step, device):
        fail_in("costs", step())
        return Costs(0, 3, None)

    providers = [Provider(name, lambda inputs, setting, name=name: build(name)) for name in ("fm_fast", "peer", "other")]

    def check(inputs, setting, step):
        fail_in("check", step())

    op = Op("op", {}, (), lambda setting: None, lambda setting: providers, check, lambda setting: 1 << 30, costs=costs, rounds=1)
    monkeypatch.setattr(timing, "captured", lambda steps: fail_in("capture", steps[0]()) or steps[0])
    monkeypatch.setattr(timing, "device_clock", lambda sets: lambda step: 1.0)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(timing, "warm_up", lambda *arguments: None)
    setting = Setting(torch.device("cuda"), "size", (1,), torch.float32, "mode")
    rows = run.measure(op, setting, run.parse(["--device", "cuda"]))
    shown = ["fm_fast", "other"] if where != "costs" else ["fm_fast", "peer", "other"]  # times are there before costs are counted
    assert [row.provider for row in rows if row.metric == "ratio"] == shown
    assert [row.provider for row in rows if row.metric == "kernels"] == ["fm_fast", "other"]
    assert "left out: op, size, mode: peer failed: RuntimeError: no memory" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit("naive eager is wrong, so nothing is timed")])
def test_a_setting_that_fails_costs_the_report_no_other(error, machine, monkeypatch):
    row = results.Row("op", "ours", "mode", "size", "float32", "ms", 1.0, 0.9, 1.1)

    def settings(op, options):
        return [Setting(torch.device("cpu"), size, (1,), getattr(torch, options.dtype), "mode") for size in ("first", "second")]

    def measure(op, setting, options):
        if setting.size == "second" and setting.dtype == torch.float32:
            raise error
        return [dataclasses.replace(row, size=setting.size)]

    monkeypatch.setattr(gpu_report.run, "settings", settings)
    monkeypatch.setattr(gpu_report.run, "measure", measure)
    monkeypatch.setattr(gpu_report.run, "table", lambda rows, ours: "table")
    monkeypatch.setattr(plan, "GPU_PLAN", [dataclasses.replace(plan.GPU_PLAN[0], dtypes=("float32", "bfloat16"))])
    assert gpu_report.main(["bench"]) == 1
    rows = json.loads((results.FOLDER / "Some_GPU-2026-01-02.json").read_text())
    assert [(row["size"], row["provider"], row["device"]) for row in rows] == [
        (s, "ours", "Some GPU") for s in ("first", "first", "second")
    ]
    assert list(stages()["bench"].values()) == ["ok", "ok", f"FAILED: {error}", "ok", "ok"]


def test_every_test_of_a_gpu_is_run():
    folder = pathlib.Path(__file__).parent
    files = {f"tests/{file.name}" for file in folder.glob("test_*.py") if "pytest.mark.gpu" in file.read_text()}
    others = {f"tests/{pathlib.Path(__file__).name}", "tests/test_software_gpu.py"}
    assert files - others == set(gpu_report.TESTS)
