"""Comparing two commits: the arithmetic of pairs, wrong arguments, and that nothing is left behind whatever ends the comparison."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import against, run
from benchmarks.against import Setting, Side

ROOT = against.ROOT
SMALL = Setting("small", "float32", "x0 drawn", "ms")


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits, of which the first holds the text "one", and temporary files in a folder of their own."""
    root, temporary = tmp_path / "repository", tmp_path / "temporary"
    for folder in (root, temporary):
        folder.mkdir()
    git(root, "init", "--quiet")
    for text in ("one", "two"):
        (root / "text").write_text(text)
        git(root, "add", "text")
        git(root, "commit", "--quiet", "-m", text)
    monkeypatch.setattr(against.tempfile, "tempdir", str(temporary))
    yield root
    assert len(git(root, "worktree", "list").splitlines()) == 1
    assert not list(temporary.iterdir())


def test_pairs_alternate_and_their_ratios_are_paired():
    """Both sides get slower together, so medians of either side alone would say little."""
    order, loads = [], iter([1.0, 1.0, 10.0, 10.0, 4.0, 4.0])

    def measure(side, options):
        order.append(side.name)
        return {SMALL: next(loads) * {"this checkout": 2.0, "abc": 3.0}[side.name]}

    options = run.parse(["--against", "abc", "--pairs", "3"])
    found = against.paired(Side("abc", ROOT, ROOT), options, measure)
    assert order == ["this checkout", "abc", "abc", "this checkout", "this checkout", "abc"]
    assert found == {SMALL: [(2.0, 3.0), (20.0, 30.0), (8.0, 12.0)]}
    assert against.ratios(found[SMALL]) == against.Summary(1.5, 1.5, 1.5)
    (values,) = [line for line in against.table("path_loss", "abc", found).splitlines() if line.startswith("small")]
    assert values.split() == ["small,", "float32,", "x0", "drawn,", "ms", "8.0000", "12.0000", "1.500", "[1.500,", "1.500]"]


def test_a_process_gets_the_options_given():
    words = ["--op", "sampler", "--size", "2-D, many", "tiny", "--mode", "rk4", "--isa", "avx2", "--threads", "1", "--clock", "cpu"]
    given = run.parse([*words, "--against", "HEAD", "--rounds", "3"])
    passed = run.parse(against._forwarded(given))
    assert vars(passed) == {**vars(given), "against": None}
    assert run.parse(against._forwarded(run.parse([]))).rounds == against.ROUNDS


def test_the_ratio_is_the_other_over_this():
    assert against.ratios([(1.0, 2.0), (1.0, 4.0), (1.0, 3.0), (1.0, 1.0), (1.0, 5.0), (1.0, 6.0)]) == against.Summary(3.0, 2.0, 5.0)


def test_the_other_side_is_built_of_its_commit(repository):
    seen = []
    with against.installed("HEAD~1", lambda sources, folder: seen.append((sources / "text").read_text()), repository) as side:
        assert seen == ["one"] and side.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(side.packages)
        assert (side.folder / "benchmarks" / "run.py").is_file() and not (side.folder / "fm_fast").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_build_leaves_nothing(repository, error):
    def install(sources, folder):
        folder.mkdir()
        raise error

    with pytest.raises(error), against.installed("HEAD", install, repository):
        raise AssertionError("not reached")


def test_a_termination_ends_the_build_and_all_it_started(repository, tmp_path):
    def install(sources, folder):
        against._run(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], sources, dict(os.environ))

    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    begin, handler = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, against.installed("HEAD", install, repository):
        raise AssertionError("not reached")
    assert end.value.code == 128 + signal.SIGTERM and time.monotonic() - begin < 30 and signal.getsignal(signal.SIGTERM) == handler
    state = pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_wrong_arguments_are_named(monkeypatch):
    for commit in ("no-such-commit", "--all", ""):
        with pytest.raises(SystemExit, match=f"--against must be a commit, branch or tag of the repository at {ROOT}, got '{commit}'"):
            run.main([f"--against={commit}"])
    with pytest.raises(SystemExit, match="--pairs must be at least 1, got 0"):
        run.main(["--against", "HEAD", "--pairs", "0"])
    with pytest.raises(SystemExit, match="--mode must be part of one of x0 drawn, x0 given for op path_loss, got backward"):
        run.main(["--against", "HEAD", "--mode", "backward"])


def test_a_failed_command_shows_its_error(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)print\(1 failed in .*SyntaxError"):
        against._run([sys.executable, "-c", "print(1"], tmp_path, dict(os.environ))


def test_a_side_that_loads_another_fm_fast_is_refused(tmp_path):
    """As it would be if the commit lacked a module and Python found it in an installed fm_fast."""
    start, packages = tmp_path / "start", tmp_path / "packages"
    for folder in (start, packages):
        folder.mkdir()
    (start / "benchmarks").symlink_to(ROOT / "benchmarks")
    (packages / "fm_fast").symlink_to(ROOT / "fm_fast")
    with pytest.raises(SystemExit, match=r"fm_fast of abc is in .*packages, but its processes also load .*kernels"):
        against._loads_its_own(Side("abc", start, packages), "path_loss")


@pytest.mark.slow
def test_this_commit_against_itself(capfd):
    """The whole way, with the native build."""
    command = [sys.executable, "-m", "benchmarks.run", "--op", "path_loss", "--size", "small", "--mode", "x0 drawn", "--against", "HEAD"]
    done = subprocess.run([*command, "--pairs", "3", "--rounds", "5"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("small, float32, x0 drawn, ms") and 0.2 < float(line.split("[")[0].split()[-1]) < 5.0
    assert "fm_fast-against-" not in git(ROOT, "worktree", "list")
