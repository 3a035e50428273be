"""The arrows between the package's parts run one way: no part needs itself by way of others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(package):
    """The file of every module below a dotted package, by its dotted name."""
    files = (ROOT / package.replace(".", "/")).rglob("*.py")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file, known):
    """The names that a module imports, within functions, too; a module that is named as its package's attribute counts as itself."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in whole)


def arrows(package):
    """For each part of a package (a module, or a folder as one) the other parts that it imports."""
    found, known = {}, modules(package)
    part = {name: name.removeprefix(f"{package}.").split(".")[0] for name in known if name != package}
    for name, file in known.items():
        if name in part:
            targets = {part[target] for target in imported(file, known) if target in part}
            found.setdefault(part[name], set()).update(targets - {part[name]})
    return found


def circle(graph):
    """Parts that need each other, or nothing: what is left when parts without arrows are taken away, again and again."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("package", ["fm_fast", "fm_fast.train", "fm_fast.nn", "fm_fast._solver", "fm_fast.reproduce"])
def test_arrows_run_one_way(package):
    graph = arrows(package)
    assert len(graph) > 5 and sum(map(len, graph.values())) > 5, "the imports are found"
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
