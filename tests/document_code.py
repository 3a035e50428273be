"""Runs the Python code of Markdown documents: ``python document_code.py DOCUMENT ...``, in a scratch folder.

The code of NAME.setup comes first, then every block of NAME.md in one session. NAME.results receives the tensors and results of
fm_fast that the document assigns to a name at the top level, in their order. Needs only what users have: fm_fast and torch.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import torch

import fm_fast as fm

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RECORDED = (torch.Tensor, fm.Sample, fm.Divergence, fm.Likelihood, fm.SampleWithLogProb, fm.BitsPerDim)


def blocks(text: str) -> list[tuple[int, str]]:
    """(first line, code) of each Python block."""
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in PYTHON_BLOCK.finditer(text)]


def run_block(document: str, line: int, code: str, session: dict[str, Any], results: list[tuple[str, Any]]) -> None:
    """One block, statement by statement; a traceback names the document and its own line."""
    for statement in ast.increment_lineno(ast.parse(code, document), line - 1).body:
        exec(compile(ast.Module([statement], []), document, "exec"), session)
        for name in _assigned(statement):
            if isinstance(session[name], RECORDED):
                value = session[name]
                results.append((name, value.detach().clone() if isinstance(value, torch.Tensor) else value))


def _assigned(statement: ast.stmt) -> list[str]:
    """Names that a statement of the top level gives a value, also by unpacking; loops keep their own."""
    if not isinstance(statement, ast.Assign):
        return []
    return [node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def run(document: Path) -> list[tuple[str, Any]]:
    """(name, value) of everything recorded."""
    session: dict[str, Any] = {"__name__": "document"}
    results: list[tuple[str, Any]] = []
    exec(Path(f"{document.stem}.setup").read_text(encoding="utf-8"), session)
    for line, code in blocks(document.read_text(encoding="utf-8")):
        run_block(document.name, line, code, session, results)
    return results


if __name__ == "__main__":
    for name in sys.argv[1:]:
        torch.save(run(Path(name)), f"{Path(name).stem}.results")
