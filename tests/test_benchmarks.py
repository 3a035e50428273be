"""The benchmark's correctness gate: a wrong kernel gets no time printed."""

import json
import pathlib
import platform
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fm_fast as fm

# Benchmarks are not installed. Last on the path, so that the installed fm_fast stays the one that is tested.
sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import peers, points, results, run, timing
from benchmarks.op import Setting
from benchmarks.ops import adamw_ema, path_loss
from benchmarks.run import gate

SETTING = Setting(torch.device("cpu"), "tiny", (64, 3, 16, 16), torch.float32, "x0 drawn")


def test_the_right_result_passes():
    assert "naive eager" in gate(path_loss.OP, SETTING, ["naive", "best"]).steps


def test_a_wrong_loss_stops_the_run(monkeypatch):
    right = fm.PathSample.loss
    monkeypatch.setattr(fm.PathSample, "loss", lambda *arguments: right(*arguments) * (1 + 1e-4))
    with pytest.raises(SystemExit, match=r"is wrong, so nothing is timed: loss is off by 1.0e-04"):
        gate(path_loss.OP, SETTING, ["naive"])


def test_a_wrong_point_stops_the_run(monkeypatch):
    right = fm.sample_path

    def shifted(*arguments, **settings):
        sample = right(*arguments, **settings)
        sample.x_t.add_(1e-3)
        return sample

    monkeypatch.setattr(fm, "sample_path", shifted)
    with pytest.raises(SystemExit, match=r"x_t is off by"):
        gate(path_loss.OP, SETTING, ["naive"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_optimiser_passes_and_a_wrong_one_stops_the_run(dtype, monkeypatch):
    setting = Setting(torch.device("cpu"), "tiny", (32, 1, 1), dtype, "3 averages")
    assert len(gate(adamw_ema.OP, setting, None).steps) == 5
    right = adamw_ema.fixed_decay
    monkeypatch.setattr(adamw_ema, "fixed_decay", lambda decay: right(decay - 0.01))
    with pytest.raises(SystemExit, match=r"fm_fast is wrong, so nothing is timed: average is off by"):
        gate(adamw_ema.OP, setting, ["memory"])


@pytest.mark.parametrize("mode", path_loss.MODES)
@pytest.mark.parametrize("size", [size for size in path_loss.SIZES if size != "large"])
def test_installed_peers_pass_at_every_size(size, mode):
    """Without the compiled providers, which take long to be compiled."""
    setting = Setting(torch.device("cpu"), size, path_loss.SIZES[size], torch.float32, mode)
    steps = gate(path_loss.OP, setting, ["eager", *path_loss.PEERS]).steps
    assert [name for name in steps if name in path_loss.PEERS] == [name for name in path_loss.PEERS if peers.available(name)]


@pytest.mark.parametrize("name", [name for name in path_loss.PEERS if peers.available(name)])
def test_a_wrong_peer_stops_the_run(name, monkeypatch):
    right = points.PEERS[name]()

    def wrong(x1, x0):
        x_t, target, t = right(x1, x0)
        return x_t, target + 1e-3, t

    monkeypatch.setitem(points.PEERS, name, lambda: wrong)
    with pytest.raises(SystemExit, match=f"{name} is wrong, so nothing is timed: "):
        gate(path_loss.OP, SETTING, [name])


HALF = replace(SETTING, dtype=torch.float16)


def test_in_float16_a_mean_whose_gradient_underflows_is_shown_without_a_ratio(tmp_path, capsys):
    """1 / N is below the normal numbers of float16, so eager PyTorch multiplies the gradient by a coarse number. Ours is within 2e-3."""
    file, words = tmp_path / "rows.json", ["--size", "small", "--mode", "drawn", "--dtype", "float16", "--rounds", "1", "--only", "naive"]
    run.main([*words, "--out", str(file), "--threads", str(torch.get_num_threads())])
    naive = {row["metric"]: row["median"] for row in json.loads(file.read_text()) if row["provider"] == "naive eager"}
    assert path_loss.TOLERANCE[torch.float16] < naive["error"] < 2e-2 and naive["ms"] > 0.0 and not {"ratio", "copy_share"} & set(naive)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("naive eager")]
    assert f"inexact: off by {naive['error']:.1e}" in line


@pytest.mark.parametrize("count", [1000, 49152, 131072, 393216])
def test_the_underflow_is_as_large_as_its_bound_says(count):
    """The naive gradient against float64 stays within the bound, and above a fiftieth of it: a bound that excuses little else."""
    o = (3.0**0.5 * torch.randn(count, generator=torch.Generator().manual_seed(count))).half().requires_grad_()
    (o**2).mean().backward()
    exact = 2.0 * o.detach().double() / count
    error = float((o.grad.double() - exact).norm() / exact.norm())
    bound = path_loss._underflow(count)
    assert error <= bound + path_loss.TOLERANCE[torch.float16] and (error > bound / 50 or bound < path_loss.TOLERANCE[torch.float16])


def test_a_gradient_that_is_worse_than_float16_explains_stops_the_run(monkeypatch):
    right = path_loss._naive_loss
    monkeypatch.setattr(path_loss, "_naive_loss", lambda o, target: 1.05 * right(o, target).detach() + (1.05 * (o - o.detach()) * 0).mean())
    with pytest.raises(SystemExit, match="naive eager is wrong, so nothing is timed"):
        gate(path_loss.OP, HALF, ["naive"])


def test_ours_has_no_excuse(monkeypatch):
    """A gradient of ours that is off as eager PyTorch's is stops the run."""
    right = fm.PathSample.loss

    def coarse(sample, o):
        return right(sample, o) + 0.008 * (right(sample, o) - right(sample, o).detach())

    monkeypatch.setattr(fm.PathSample, "loss", coarse)
    with pytest.raises(SystemExit, match=r"fm_fast \w+ is wrong, so nothing is timed: gradient is off by"):
        gate(path_loss.OP, replace(HALF, shape=(128, 3, 32, 32)), ["naive"])


def test_peers_are_pinned_to_the_same_versions_everywhere():
    root = pathlib.Path(__file__).parent.parent
    lines = [line.split(";")[0].strip() for line in (root / "constraints.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line)
    (extra,) = re.findall(r"^bench = \[(.*)\]$", (root / "pyproject.toml").read_text(), re.MULTILINE)
    for name, version in peers.PINNED.items():
        assert pins[name.replace("_", "-")] == version
        assert (f'"{name.replace("_", "-")}=={version}"' in extra) == (name != "torchcfm")
    assert f'"pot=={pins["pot"]}"' in extra and "torch==" in "".join(lines)
    recipe = (root / "Makefile").read_text().split("\nbench:")[1].split("\n\n")[0]
    assert "$(INSTALL) --no-deps torchcfm\n" in recipe and ",bench]" in recipe


@pytest.fixture
def broken_peer(monkeypatch):
    """torchcfm as installed with something that it imports missing."""
    monkeypatch.setattr(peers, "version", lambda name: peers.PINNED[name])
    monkeypatch.setitem(peers.MODULES, "torchcfm", "benchmarks.no_such_module")
    peers.import_error.cache_clear()
    yield
    peers.import_error.cache_clear()


def test_a_peer_that_cannot_be_imported_is_left_out_and_named(broken_peer):
    (remark,) = peers.remarks(["torchcfm"])
    assert remark.startswith("torchcfm 1.0.7 cannot be imported and is left out: ModuleNotFoundError: No module named")
    assert "torchcfm" not in gate(path_loss.OP, SETTING, ["naive", *path_loss.PEERS]).steps


@pytest.mark.slow
def test_the_regression_set_runs():
    """Its small sizes, once each: every op agrees with its reference there, which it asserts before it times."""
    folder = pathlib.Path(__file__).parent.parent
    chosen = ["-k", "128x3x32x32 or 64x128x8x8 or 50x1000", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *chosen, "benchmarks/test_regression.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "18 passed, 18 deselected" in done.stdout, done.stdout


def test_processors_of_two_generations_have_two_names():
    lines = "processor\t: 0\ncpu family\t: {}\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n\n"
    assert results._cpu_name(lines.format(25)) == "AMD EPYC family 25 model 17"
    assert results._cpu_name(lines.format(26)) == "AMD EPYC family 26 model 17"
    assert results._cpu_name("processor\t: 0\n") == results._cpu_name("") == platform.machine()


def test_rows_of_another_kind_are_not_written_over_the_usual_ones():
    def name(threads="2", **kind):
        return results.default_path("op", {"device": "a b", "cpu_isa": "avx2", "date": "2026-01-02", "threads": threads}, **kind).name

    assert name() == name(threads="") == "a_b-avx2-2026-01-02-op.json"
    assert name(dtype="bfloat16", halves=["forward"]) == "a_b-avx2-2026-01-02-op-bfloat16-forward.json"
    assert name(threads="1") == "a_b-avx2-2026-01-02-op-1_threads.json"


def test_a_commit_is_dirty_by_its_sources_and_not_by_results(tmp_path):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    source, rows = tmp_path / "source.py", tmp_path / "benchmarks" / "results" / "rows.csv"
    for path in (source, rows):
        path.write_text("1", encoding="utf-8")
    git("init"), git("add", "."), git("commit", "-m", "first")
    commit = results.commit_of(tmp_path)
    assert len(commit) >= 7 and "dirty" not in commit
    rows.write_text("2", encoding="utf-8")
    assert results.commit_of(tmp_path) == commit
    source.write_text("2", encoding="utf-8")
    assert results.commit_of(tmp_path) == f"{commit}-dirty"
    assert results.commit_of(tmp_path / "nowhere") == ""


class FakeEvents:
    """A device on which a replay takes ``cost`` ms and the start of the first of several another ``latency``."""

    def __init__(self, cost, latency):
        self.cost, self.latency, self.time, self.replays = cost, latency, 0.0, 0

    def __call__(self, enable_timing):
        device = self

        class Event:
            def record(self):
                self.time, device.fresh = device.time, True

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.time - self.time

        return Event()

    def replay(self):
        self.replays += 1
        self.time += self.cost + self.latency * self.fresh
        self.fresh = False


def test_a_sample_on_a_gpu_lasts_long_enough(monkeypatch):
    """The start of a graph takes microseconds, which are no part of its steps' time."""
    for cost, latency in ((0.05, 0.01), (8.0, 0.01)):
        device = FakeEvents(cost, latency)
        monkeypatch.setattr(torch.cuda, "Event", device)
        clock = timing.device_clock(4)
        clock(device.replay)
        device.replays = 0
        assert clock(device.replay) == pytest.approx(cost / 4, rel=0.01)
        assert device.replays == (34 if cost < 1 else 1)
