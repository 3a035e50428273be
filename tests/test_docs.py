"""The documentation tells the truth: its Python code runs and computes what it says, its reference names everything public."""

import importlib.metadata
import os
import re
import subprocess
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from copies import run_python
from document_code import blocks
from test_packaging import ENVIRONMENT_VARIABLES

import fm_fast as fm
import fm_fast.nn
import fm_fast.train
from fm_fast import _backends

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
SET_BY_THE_SYSTEM = {"PATH", "RANK", "LOCAL_RANK", "WORLD_SIZE"}  # the last three by torchrun
OFFLINE = re.compile(r"No matching distribution|Could not fetch|Failed to establish a new connection|Temporary failure in name resolution")
# What the README's code takes for granted. The model is the exact velocity of the OT path for data N(0, 1/4), whatever the shape, with
# a weight to train, so that samples and likelihoods have known answers.
VARIANCE = 0.25
README_SETUP = f"""
import torch
import torch.nn.functional as F
import fm_fast as fm

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, y=None):
        a = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return self.scale * x * (a * {VARIANCE} - (1 - a)) / (a * a * {VARIANCE} + (1 - a) ** 2)


model, step = Model(), 7
x1 = {VARIANCE} ** 0.5 * torch.randn(16, 3, 32, 32)
x = x1
labels = torch.arange(16) % 10
images_uint8 = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
"""


def run_documents(folder: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[tuple[str, Any]]]:
    """What each document's code assigned, by its name; run in a scratch folder by one process of its own."""
    for document in DOCUMENTS:
        (folder / f"{document.stem}.setup").write_text(DOCUMENTS[document].setup, encoding="utf-8")
    result = run(folder, ROOT / "tests" / "document_code.py", *DOCUMENTS)
    assert result.returncode == 0, result.stdout + result.stderr
    return {document.name: torch.load(folder / f"{document.stem}.results", weights_only=False) for document in DOCUMENTS}


def by_a_copy(folder: Path, script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    # One thread: the networks are tiny, and threads only make them slower on a busy machine.
    code = f"import runpy, torch; torch.set_num_threads(1); runpy.run_path({str(script)!r}, run_name='__main__')"
    return run_python(code, *arguments, folder=folder, path=sys.path)


def values(results: list[tuple[str, Any]], kind: str | type) -> list[Any]:
    """The values of a name or of a type; there is one at least, or the document has lost what is tested here."""
    found = [value for name, value in results if (name == kind if isinstance(kind, str) else isinstance(value, kind))]
    assert found, f"the document assigns no {kind}"
    return found


def setup_session() -> dict[str, Any]:
    session: dict[str, Any] = {}
    exec(README_SETUP, session)
    return session


def check_readme(results: list[tuple[str, Any]]) -> None:
    session = setup_session()
    model, x1, step = session["model"], session["x1"], session["step"]
    x0 = fm.noise(tuple(x1.shape), seed=0, step=step)
    drawn = {kind: fm.noise((len(x1),), seed=0, step=step, stream="t", kind=kind) for kind in ("uniform", "normal")}
    naive = {name: naive_loss(model, x1, x0, t) for name, t in (("uniform", drawn["uniform"]), ("logit-normal", drawn["normal"].sigmoid()))}
    losses = values(results, "loss")
    torch.testing.assert_close(losses[0], naive["uniform"])
    assert all(any(torch.isclose(loss, expected, rtol=1e-5) for expected in naive.values()) for loss in losses)

    noise = values(results, "x0")[0]
    for r in values(results, fm.Sample):
        assert r.x.shape == noise.shape and bool(r.finite.all())
        # The exact flow multiplies every element by the standard deviation of the data.
        torch.testing.assert_close(r.x, VARIANCE**0.5 * noise, rtol=5e-3, atol=5e-3)
    for d in values(results, fm.Divergence):
        torch.testing.assert_close(d.div, torch.full((len(x1),), x1[0].numel() * slope(0.5)), rtol=1e-5, atol=0.0)
    likelihoods = values(results, fm.Likelihood)
    assert likelihoods[0].std_err is not None  # two probes or more tell how uncertain they are
    for likelihood in likelihoods:
        check_log_prob(likelihood.logp, likelihood.std_err, x1)
    for s in values(results, fm.SampleWithLogProb):
        check_log_prob(s.logp, s.std_err, s.x)
    for b in values(results, fm.BitsPerDim):
        assert b.logp.shape == (10, 4)
        assert b.bpd.shape == (4,) and bool(b.bpd.isfinite().all())


def naive_loss(model: torch.nn.Module, x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a = t.reshape(-1, *[1] * (x1.dim() - 1))
    return F.mse_loss(model(a * x1 + (1 - a) * x0, t), x1 - x0).detach()


def slope(t: float) -> float:
    """dv/dx of the setup's model."""
    return (t * VARIANCE - (1 - t)) / (t * t * VARIANCE + (1 - t) ** 2)


def check_log_prob(logp: torch.Tensor, std_err: torch.Tensor | None, x: torch.Tensor) -> None:
    """log p is that of N(0, 1/4) but for the 0.1 % that 100 midpoint steps may cost: random signs are exact for a diagonal Jacobian."""
    exact = torch.distributions.Normal(0.0, VARIANCE**0.5).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(logp, exact, rtol=1e-3, atol=0.0)
    assert std_err is None or (std_err.shape == logp.shape and float(std_err.max()) < 1e-3)


def check_quickstart(results: list[tuple[str, Any]]) -> None:
    first, *others = values(results, "loss")
    naive = values(results, "naive")[0]
    assert all(torch.isclose(loss, naive, rtol=1e-5) for loss in (first, *others))
    assert sorted(values(results, "ids")[0].tolist()) == list(range(256)) and bool(values(results, "paired")[0].isfinite())

    (r,) = values(results, fm.Sample)
    assert r.x.shape == (512, 2) and r.nfe == 40
    assert float(values(results, "near")[0].float().mean()) > 0.8

    estimated, exact = values(results, fm.Likelihood)
    assert estimated.logp.shape == estimated.std_err.shape == estimated.disc_err.shape == (256,)
    assert 0.0 < float(estimated.std_err.mean()) < 0.5
    assert float(exact.std_err.max()) == 0.0
    # Same model, same steps: what the probes add is known to lie within a few of their standard errors.
    assert float(((estimated.logp - exact.logp).abs() <= 5 * estimated.std_err).double().mean()) > 0.95
    data = fm.testing.GaussianMixture(torch.ones(4), values(results, "centres")[0], torch.full((4,), 0.3))
    assert abs(float(exact.logp.mean() - data.log_prob(values(results, "held_out")[0]).mean())) < 0.5


def check_recipes(results: list[tuple[str, Any]]) -> None:
    found = dict(results)
    centres, x1 = found["centres"], found["x1"]
    assert float((torch.cdist(found["guided"], centres).argmin(1) == found["wanted"]).float().mean()) > 0.97
    # Stratified times: as many samples in each quarter.
    torch.testing.assert_close(found["by_quarter"].mean(), found["each"].mean())
    assert 0.0 < float(found["late_counts_less"]) < float(found["each"].mean())
    assert found["by_a_weak_network"].shape == (512, 2)

    def near_a_centre(x: torch.Tensor) -> float:
        return float((torch.cdist(x, centres).amin(1) < 3 * 0.2).float().mean())

    assert near_a_centre(found["student_in_one_step"]) > near_a_centre(found["teacher_in_one_step"]) + 0.3
    assert near_a_centre(found["stochastic"]) > 0.7
    assert near_a_centre(found["moved"]) > 0.7 and float(found["of_data"].logp.mean()) > -3.0  # exactly: -1.0; the source's: -3.4
    original, varied = x1[:256], found["varied"]
    assert near_a_centre(varied) > 0.7 and not torch.equal(varied, original)
    assert float((torch.cdist(varied, centres).argmin(1) == torch.cdist(original, centres).argmin(1)).float().mean()) > 0.7
    assert near_a_centre(found["preview"]) > near_a_centre(found["half_way"]) + 0.1
    # x = t x1 + (1 - t) x0 and the score is -x0 / (1 - t).
    torch.testing.assert_close(found["half_way"], 0.5 * found["preview"] - 0.25 * found["score"])
    completed = found["completed"]
    torch.testing.assert_close(completed[:, 0], torch.ones(512), rtol=0.0, atol=1e-5)
    assert near_a_centre(completed) > 0.6 and 0.2 < float((completed[:, 1] > 0).float().mean()) < 0.8
    torch.testing.assert_close(found["steps_between"][[0, -1]], x1[:2], rtol=0.0, atol=1e-3)
    assert found["steps_between"].shape == (9, 2)
    assert float(found["usual"].logp.mean() - found["unusual"].logp.mean()) > 1.0
    assert found["large"].shape == (4, 3, 16, 16) and found["large"].dtype == torch.uint8
    assert found["decoded"].shape == (2, 3, 64, 64) and found["chunk"].shape == (64, 8, 2)
    assert bool(found["loss"].isfinite())
    torch.testing.assert_close(found["same_chunk"], found["chunk"])
    assert float((torch.cdist(found["by_the_average"], centres).argmin(1) == found["wanted"]).float().mean()) > 0.9
    assert torch.equal(found["by_the_resumed"], found["by_the_average"])


def check_sit(results: list[tuple[str, Any]]) -> None:
    found, session = dict(results), setup_session()
    assert found["losses"].shape == (16,) and bool(found["losses"].isfinite().all())
    noise, by_ode, by_sde = found["noise"], found["images"], found["samples"]
    torch.testing.assert_close(by_ode, VARIANCE**0.5 * noise, rtol=5e-3, atol=5e-3)
    assert abs(float(by_sde.std()) / VARIANCE**0.5 - 1.0) < 0.05 and not torch.allclose(by_sde, by_ode, atol=0.1)
    check_log_prob(found["logp"], None, session["x1"])


class Document(NamedTuple):
    """What a document's code takes for granted, and the check of what it assigned."""

    setup: str
    check: Callable[[list[tuple[str, Any]]], None]


DOCUMENTS = {
    ROOT / "README.md": Document(README_SETUP, check_readme),
    DOCS / "quickstart.md": Document("", check_quickstart),
    DOCS / "recipes.md": Document("", check_recipes),
    DOCS / "migration" / "sit.md": Document(README_SETUP, check_sit),
}


def test_code_of_the_documents(tmp_path: Path) -> None:
    results = run_documents(tmp_path, by_a_copy)
    for path, document in DOCUMENTS.items():
        document.check(results[path.name])


@pytest.mark.slow
def test_code_of_the_documents_in_a_clean_environment(tmp_path: Path) -> None:
    """The same with nothing but what ``pip install '.[train]'`` brings."""
    environment, scratch = tmp_path / "environment", tmp_path / "scratch"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = str(environment / "bin" / "python")
    command = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[train]"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FM_FAST_")}
    installed = subprocess.run(command, capture_output=True, text=True, env=variables)
    if installed.returncode and OFFLINE.search(installed.stdout + installed.stderr):
        pytest.skip("no package index")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    scratch.mkdir()

    def by_the_environment(folder: Path, *command: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *command], capture_output=True, text=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})

    results = run_documents(scratch, by_the_environment)
    for path, document in DOCUMENTS.items():
        document.check(results[path.name])


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n\n```python\nx = 1\ny = 2\n```\n\n```\nshell\n```\n```python\nz = 3\n```\n"
    assert blocks(text) == [(4, "x = 1\ny = 2\n"), (12, "z = 3\n")]


@pytest.mark.parametrize(("path", "scheduler"), [("ot", "CondOTScheduler"), ("vp", "VPScheduler"), ("cosine", "CosineScheduler")])
def test_migrating_from_flow_matching_keeps_the_numbers(path: str, scheduler: str) -> None:
    """What docs/migration/flow_matching.md says of the package: the same loss for the same noise, the same samples for the same steps."""
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    from flow_matching.path import AffineProbPath
    from flow_matching.solver import ODESolver

    x0, x1 = (fm.noise((64, 2), seed=0, step=step) for step in (0, 1))
    t = 0.9 * fm.noise((64,), seed=0, step=0, stream="t")
    model = Affine()
    s = AffineProbPath(scheduler=getattr(schedulers, scheduler)()).sample(t=t, x_0=x0, x_1=x1)
    theirs = (model(s.x_t, s.t) - s.dx_t).pow(2).mean()
    torch.testing.assert_close(fm.flow_matching_loss(model, x1, x0=x0, t=t, path=path), theirs)
    samples = ODESolver(velocity_model=model).sample(x_init=x0, step_size=0.02, method="midpoint")
    torch.testing.assert_close(fm.sample(model, x0, method="midpoint", steps=50).x, samples)


class Affine(torch.nn.Module):
    """A velocity whose t may have a dimension or none, as the two libraries' solvers have it."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 1] - t, -x[:, 0] + t * x[:, 1]], dim=1)


# The reference


def directives() -> set[str]:
    return {name for page in (DOCS / "api").glob("*.md") for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))}


def public_names() -> dict[str, Any]:
    """Everything that users are told to use, by its full name: fm_fast's own names, and those of its modules that list theirs."""
    names = {f"fm_fast.{name}": getattr(fm, name) for name in fm.__all__ if name != "__version__"}
    modules = [*(value for value in names.values() if isinstance(value, types.ModuleType)), fm_fast.nn, fm_fast.train]
    listed = {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in getattr(module, "__all__", ())}
    return {**names, **listed}


def test_every_public_name_is_in_the_reference() -> None:
    shown = directives()
    for name, value in public_names().items():
        homes = {name, name.rpartition(".")[0], getattr(value, "__module__", name)} - {"fm_fast"}
        assert homes & shown, f"{name} is on no page of docs/api"


def test_samples_start_from_another_seed_than_the_trainings() -> None:
    """The losses of the documents are of seed 0, and that noise of theirs is what a sample would start from."""
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        found = re.findall(r"fm\.sample\(.*fm\.noise\([^()]*seed=0.*", page.read_text(encoding="utf-8"))
        assert not found, f"{page.name}: {found}"
    assert "fm.noise(shape, seed=0" not in (fm.sample.__doc__ or "")


def test_every_directive_names_something() -> None:
    for name in directives():
        assert name in sys.modules or _resolved(name) is not None, f"{name} does not exist"


def _resolved(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(__import__(module, fromlist=[attribute]), attribute, None)


@pytest.mark.parametrize("op", _backends.OPS)
def test_every_op_has_a_page_of_maths(op: str) -> None:
    page = (DOCS / "maths" / f"{op}.md").read_text(encoding="utf-8")
    assert f"maths/{op}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"[Ee]quation|Algorithm|appendix", page), f"{op}: no source of its formulas"


@pytest.mark.parametrize("variable", sorted(ENVIRONMENT_VARIABLES - SET_BY_THE_SYSTEM))
def test_every_environment_variable_is_documented(variable: str) -> None:
    assert f"`{variable}`" in (DOCS / "backends.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_site_builds_without_warnings_and_holds_every_public_name(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("mkdocs-material")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    # Four lines of header, then one compressed line a name, which begins with the name.
    listed = zlib.decompress((tmp_path / "site" / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.split()[0] for line in listed.splitlines()}
    missing = {name for name in public_names() if name not in shown}
    assert missing == set()
